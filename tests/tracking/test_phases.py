"""Where the time of an update goes, measured on runs that are slow in one place on purpose."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from support.tiny import log_rows, make_trainer, ragged_rows, tiny_llama

from hf_gradacc.tracking import phases
from hf_gradacc.tracking.phases import PHASE_KEYS, PhaseClock
from hf_gradacc.trainer import log_row

ROWS = ragged_rows(12, seed=5)
PAUSE = 0.08


class OwnTime:
    """A clock of the time this thread runs or pauses, which others on the machine do not take."""

    def __init__(self):
        self.paused = 0.0

    def perf_counter(self):
        return time.thread_time() + self.paused


@pytest.fixture
def own_time(monkeypatch):
    clock = OwnTime()
    for module in (phases, log_row):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class SlowRows(list):
    def __getitem__(self, index):
        time.sleep(PAUSE / 4)  # four rows to an update
        return super().__getitem__(index)


class SlowSgd(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(PAUSE)
        return super().step(closure)


def slow_forward(module, args, kwargs):
    if module.training:
        time.sleep(PAUSE / 2)  # two micro-batches to an update


def train(tmp_path, rows=ROWS, *, model=None, optimizer=torch.optim.SGD, **options):
    model = model or tiny_llama()
    settings = {"effective_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 3}
    trainer = make_trainer(
        tmp_path,
        rows,
        model=model,
        trainer_options={"optimizers": (optimizer(model.parameters(), lr=0.01), None)},
        **settings | options,
    )
    trainer.train()
    return log_rows(trainer)


def slow_in(place, tmp_path):
    """The log of a run with one slow place, and what the same run takes without it."""
    if place == "data":
        return train(tmp_path, SlowRows(ROWS))
    if place == "optimizer":
        return train(tmp_path, optimizer=SlowSgd)
    model = tiny_llama()
    model.register_forward_pre_hook(slow_forward, with_kwargs=True)
    return train(tmp_path, model=model)


@pytest.mark.parametrize("place", ["data", "optimizer", "forward_backward"])
def test_time_lost_in_one_place_is_found_there_and_nowhere_else(tmp_path, place):
    rows = slow_in(place, tmp_path)
    assert len(rows) == 3
    for row in rows:
        assert row[PHASE_KEYS[place]] >= PAUSE
        # A busy machine stretches any phase, but what sleeps here sleeps once.
        others = sum(row[key] for name, key in PHASE_KEYS.items() if name != place)
        assert row["step_seconds"] - others >= PAUSE


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_phases_add_up_to_the_step(tmp_path, own_time, logging_steps):
    class PausingSgd(torch.optim.SGD):
        def step(self, closure=None):
            own_time.paused += PAUSE
            return super().step(closure)

    rows = train(tmp_path, optimizer=PausingSgd, logging_steps=logging_steps)
    assert len(rows) == 3 // logging_steps
    for row in rows:
        total = sum(row[key] for key in PHASE_KEYS.values())
        assert PAUSE <= total <= row["step_seconds"]
        assert total >= row["step_seconds"] - PAUSE / 4
        assert row["reduction_seconds"] == 0.0, "one process has nothing to reduce"


def test_an_update_that_never_came_and_a_run_that_broke_off_leave_no_time_behind(own_time):
    clock = PhaseClock(torch.device("cpu"))
    clock.enter("data")
    clock.drop()
    assert clock.take() == {}
    own_time.paused += PAUSE
    clock.enter("optimizer")
    clock.stop()
    assert clock.take()["optimizer_seconds"] < PAUSE


def test_outside_of_a_timed_update_nothing_is_counted():
    clock = PhaseClock(torch.device("cpu"))
    with clock.within("reduction"):
        pass
    assert clock.take() == {}


class FakeEvent:
    """An event on a device whose clock the test moves."""

    now, passed, waits = 0.0, float("inf"), 0

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return self.at <= FakeEvent.passed

    def synchronize(self):
        FakeEvent.waits += 1
        FakeEvent.passed = max(FakeEvent.passed, self.at)

    def elapsed_time(self, end):
        assert self.query()
        assert end.query(), "read before the device has come that far"
        return (end.at - self.at) * 1e3


@pytest.fixture
def device_clock():
    FakeEvent.now, FakeEvent.passed, FakeEvent.waits = 0.0, 0.0, 0
    return PhaseClock(torch.device("cuda"), make_event=FakeEvent)


def run_update(clock, *, num_micro_batches=2):
    clock.enter("data")
    FakeEvent.now += 1
    clock.enter("forward_backward")
    FakeEvent.now += 2 * num_micro_batches
    with clock.within("reduction"):
        FakeEvent.now += 3
    FakeEvent.now += 4
    clock.enter("optimizer")
    FakeEvent.now += 5
    clock.stop()
    FakeEvent.now += 100  # evaluation, saving


def test_on_a_device_its_own_time_counts_and_it_is_waited_for_once_per_log_row(device_clock):
    for num_micro_batches in (2, 4):
        run_update(device_clock, num_micro_batches=num_micro_batches)
    assert FakeEvent.waits == 0
    assert device_clock.take() == {
        "data_seconds": 1.0,
        "forward_backward_seconds": 10.0,  # 2 x 2 + 4 and 2 x 4 + 4
        "reduction_seconds": 3.0,
        "optimizer_seconds": 5.0,
    }
    assert FakeEvent.waits == 1
    assert device_clock.take() == {}


def test_events_do_not_pile_up_where_rows_are_logged_rarely(device_clock):
    for _ in range(500):
        run_update(device_clock)
        FakeEvent.passed = FakeEvent.now - 1000  # the device is far behind
    assert len(device_clock._spans) < 400
    assert FakeEvent.waits == 0
    assert device_clock.take()["optimizer_seconds"] == pytest.approx(5.0)
