"""A short part of `benchmarks/fuzz.py`: hostile recipes and damaged run files."""

from collections import Counter
from pathlib import Path

import pytest
from support import fuzzing

from hf_gradacc import GradAccError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import save_recipe
from hf_gradacc.tracking.run_files import read_run

RUN = Path(__file__).parents[2] / "docs/example_report/batch-64"


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    for name in (*fuzzing.VARIABLES, "USER"):
        monkeypatch.setenv(name, fuzzing.SECRET)
    monkeypatch.chdir(tmp_path)


def test_hostile_recipes_load_or_are_one_report_and_tell_no_secret(tmp_path):
    def load(file, overrides):
        return save_recipe(load_recipe(file, overrides=overrides), tmp_path / "saved").read_text()

    ends = Counter(fuzzing.try_recipe(seed, tmp_path, load) for seed in range(120))
    assert min(ends["loaded"], ends["refused"]) > 5


def test_damaged_run_files_are_read_or_are_one_error(tmp_path):
    ends = Counter()
    for seed in range(60):
        fuzzing.spoil_run(seed, RUN, tmp_path / str(seed))
        try:
            with fuzzing.alarm(5.0):
                read_run(tmp_path / str(seed))
            ends["read"] += 1
        except GradAccError:
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 2
