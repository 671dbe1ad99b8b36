"""Runs that the tests of this folder share: a model that knows its rows, an adapter, classes."""

import contextlib
import os
import sys

import pytest
from support import templates
from support.small_runs import ROWS, make_base, train_rows

from hf_gradacc import cli

CLASSES = [{"text": "aa", "label": "x"}, {"text": "b", "label": "y\x1b[0m"}]


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """A folder with the runs `run` (with checkpoints), `adapter` and `classes`."""
    import datasets

    folder = tmp_path_factory.mktemp("runs")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    make_base(folder / "base", template=templates.CHATML, tokens=templates.CHATML_TOKENS)
    saving = {"max_steps": 60, "save_strategy": "steps", "save_steps": 30}
    saving |= {"logging_steps": 10}
    train_rows(folder, "run", ROWS, train=saving, data={"eval": "run.jsonl"})
    on_run = {"model": {"name": str(folder / "run")}, "train": {"max_steps": 60}}
    on_run["train"] |= {"save_strategy": "steps", "save_steps": 60}
    turned = [{**row, "answer": ROWS[i - 1]["answer"]} for i, row in enumerate(ROWS)]
    train_rows(folder, "adapter", turned, peft={"method": "lora", "r": 16}, **on_run)
    train_rows(
        folder,
        "classes",
        [*CLASSES, {"text": "ccc", "label": "z"}],
        model={"name": str(folder / "base"), "task": "classification"},
        data={"format": "classification"},
        peft={"method": "lora", "modules_to_save": ["score"]},
        train={"max_steps": 40},
    )
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; gives exit code, output and errors."""

    def run_command(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["hf-gradacc", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_command


@pytest.fixture
def terminal():
    """A terminal on which texts have been typed: `terminal("a\\n", "\\x04")` is its file."""
    with contextlib.ExitStack() as stack:

        def typed(*texts):
            ours, theirs = os.openpty()
            stack.callback(os.close, ours)
            os.write(ours, "".join(texts).encode())
            return stack.enter_context(os.fdopen(theirs, "r"))

        yield typed
