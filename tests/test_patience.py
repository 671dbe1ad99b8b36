"""A rank that hangs is ended soon, one that is merely slow is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from support.patience import Watch, crowding
from support.ranks import run_ranks

LOOP = "while True: pass"
WAIT = "import time; time.sleep(600)"


@pytest.fixture
def start():
    started = []

    def start(code):
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def lost(watch, *, seconds):
    """What a watch says in so many seconds, empty if nothing."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        why = watch.why_lost()
        if why:
            return why
        time.sleep(0.02)
    return ""


@pytest.mark.slow
def test_processes_of_which_none_works_are_hung(start):
    watch = Watch([start(WAIT), start(WAIT)], still_after=5)
    assert lost(watch, seconds=60) == "used no CPU time for 5 s"


@pytest.mark.slow
def test_one_that_works_is_a_reason_to_wait_for_another(start):
    watch = Watch([start(WAIT), start(LOOP)], still_after=5)
    assert lost(watch, seconds=12) == ""


def test_an_endless_loop_is_told_by_its_cpu_time(start):
    assert "s of CPU time" in lost(Watch([start(LOOP)], busy_after=0.5), seconds=60)


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_are_ended_and_named():
    with pytest.raises(AssertionError, match=r"still running: \[0, 1\] \(used no CPU time for 5 s"):
        run_ranks(wait_for_nobody, 2, still_after=5)


def wait_for_nobody():
    dist.init_process_group("gloo", init_method="env://")
    if os.environ["RANK"] == "0":
        dist.recv(torch.zeros(1), src=1)
    dist.barrier()


def test_an_idle_machine_is_not_crowded(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, expected in ((0.1, 1.0), (20.0, 10.0)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert crowding() == expected
