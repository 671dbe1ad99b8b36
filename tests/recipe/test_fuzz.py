"""A short part of `benchmarks/fuzz.py`: hostile and plausible recipes, damaged files."""

from collections import Counter
from pathlib import Path

import pytest
from support import every_key, fuzzing, plausible

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


def test_plausible_recipes_reach_a_run_or_are_refused_and_no_key_of_theirs_is_idle(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    every_key.make_folder(tmp_path)
    ends = Counter(plausible.try_plausible(seed, tmp_path) for seed in range(24))
    assert set(ends) <= {"resolved", "refused", "impossible"}, ends
    assert min(ends["resolved"], ends["refused"]) > 3


def test_damaged_data_files_are_read_or_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    ends = Counter(plausible.try_data(seed, tmp_path) for seed in range(40))
    assert set(ends) == {"read", "refused"}, ends
