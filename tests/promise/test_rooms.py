"""An update goes through the folders without running back and forth.

Watched on a real run: every call of ours between the begin of an update of three micro-batches and
its end. Of the tower of mixins that the Trainer was before, the same watch counted 26 files, 134
moves and 17 frames.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.tiny import make_trainer, ragged_rows
from transformers import Trainer, TrainerCallback

import hf_gradacc

PACKAGE = str(Path(hf_gradacc.__file__).parent)


class Watch(TrainerCallback):
    """Notes the file of each call of ours during one update, and our frames around stock's step."""

    def __init__(self):
        self.files: list[str] = []
        self.frames: list[int] = []

    def note(self, frame, event, argument):
        if event != "call":
            return
        code = frame.f_code
        if code is Trainer.training_step.__code__:
            self.frames.append(self.count_frames(frame.f_back))
        if code.co_filename.startswith(PACKAGE):
            self.files.append(code.co_filename.removeprefix(PACKAGE))

    def count_frames(self, frame):
        count = 0
        while frame is not None and frame.f_code is not Trainer._run_epoch.__code__:
            count += frame.f_code.co_filename.startswith(PACKAGE)
            frame = frame.f_back
        return count

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            sys.setprofile(self.note)

    def on_step_end(self, args, state, control, **kwargs):
        sys.setprofile(None)


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    watch = Watch()
    options = {"effective_batch_size": 6, "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = make_trainer(
        tmp_path_factory.mktemp("run"), ragged_rows(12), callbacks=[watch], **options
    )
    trainer.train()
    return watch


def test_three_micro_batches_run_through_the_stock_step_within_six_frames_of_ours(watch):
    assert watch.frames == [6, 6, 6]


def test_an_update_enters_at_most_21_files(watch):
    assert 10 < len(set(watch.files)) <= 21, sorted(set(watch.files))


def test_an_update_moves_from_file_to_file_at_most_101_times(watch):
    moves = sum(here != there for here, there in pairwise(watch.files))
    divides_itself = hasattr(Trainer, "loss_is_scaled_for_ga")
    assert 30 < moves <= (101 if divides_itself else 106)  # else `compat` divides


def test_no_class_of_ours_stands_between_the_mixin_and_the_stock_trainer():
    ours = [c for c in hf_gradacc.GradAccMixin.__mro__ if c.__module__.startswith("hf_gradacc")]
    assert ours == [hf_gradacc.GradAccMixin]


def test_the_table_of_overrides_is_the_class():
    """The docstring names every hook of the stock Trainer that the mixin overrides, once."""
    lines = [line.strip() for line in hf_gradacc.GradAccMixin.__doc__.splitlines()]
    begin, end = [i for i, line in enumerate(lines) if line.startswith("=====")]
    named = [line.split("``")[1] for line in lines[begin:end] if line.startswith("``")]
    overridden = {
        name
        for name, value in vars(hf_gradacc.GradAccMixin).items()
        if (callable(value) or isinstance(value, property))
        and not name.startswith("__")
        and (hasattr(Trainer, name) or name == "current_gradient_accumulation_steps")
    }
    assert len(named) == len(set(named))
    assert set(named) == overridden
