"""The suite for GPUs loses no result, whatever becomes of the processes its checks run in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import schedule, worker
from benchmarks.gpu.checks import SPEED, Check, Setting, SkippedCheckError, all_checks
from benchmarks.gpu.results import Result, Results, page
from benchmarks.gpu.schedule import NoDeviceError, run_checks
from benchmarks.gpu.speed_page import goals, speed_section

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, os, signal, sys, time
lines = open(sys.argv[1], "a")
def tell(**line):
    lines.write(json.dumps(line) + "\\n")
    lines.flush()
for name in sys.argv[2:]:
    tell(check=name)
    if "crash" in name: os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name: time.sleep(60)
    if "slow" in name: time.sleep(0.4)
    if "last" in name: tell(check=name, status="passed", seconds=0.1); time.sleep(60)
    if "no device" in name: print("none found", flush=True); sys.exit(76)
    status = "failed" if "poison" in name else "passed"
    tell(check=name, status=status, seconds=0.1, detail="", figures={"process": os.getpid()})
    if "poison" in name: sys.exit(75)
"""


def run(tmp_path, names, *, worker=WORKER, seconds=60.0, jobs=2, limit=30.0, **changes):
    """Run made-up checks; a name is ``group/what``."""
    found = []
    checks = [
        Check(name, "none:none", name.split("/")[0], limit, **changes.get(name, {}))
        for name in names
    ]
    run_checks(
        checks,
        make_command=lambda names, lines: [sys.executable, "-c", worker, str(lines), *names],
        record=found.append,
        folder=tmp_path,
        seconds=seconds,
        jobs=jobs,
        environment=dict(os.environ),
    )
    assert sorted(result.check for result in found) == sorted(names)
    return {result.check: result for result in found}


def test_checks_of_a_group_share_a_process_and_groups_do_not(tmp_path):
    found = run(tmp_path, ["a/1", "a/2", "b/1"])
    assert {result.status for result in found.values()} == {"passed"}
    process = {name: result.figures["process"] for name, result in found.items()}
    assert process["a/1"] == process["a/2"] != process["b/1"]


@pytest.mark.parametrize("what", ["crash", "poison"])
def test_what_ends_a_process_costs_one_check(tmp_path, what):
    found = run(tmp_path, ["a/1", f"a/{what}", "a/3", "b/1"])
    assert {n for n, result in found.items() if result.status == "failed"} == {f"a/{what}"}
    assert found["a/1"].figures["process"] != found["a/3"].figures["process"]
    if what == "crash":
        assert "ended with -11" in found["a/crash"].detail


def test_a_check_that_hangs_is_ended_at_its_limit(tmp_path):
    found = run(tmp_path, ["a/hang", "a/2"], limit=2.0)
    assert found["a/hang"].status == "failed"
    assert "longer than 2 s" in found["a/hang"].detail
    assert found["a/2"].status == "passed"


def test_when_time_is_up_what_has_not_run_is_skipped_and_says_so(tmp_path):
    began = time.monotonic()
    found = run(tmp_path, ["a/1", "a/hang", "a/3", "b/1"], seconds=3.0, jobs=1)
    assert time.monotonic() - began < 10
    assert found["a/1"].status == "passed"
    assert found["a/hang"].status == found["a/3"].status == found["b/1"].status == "skipped"
    assert "while it ran" in found["a/hang"].detail
    assert "time of the suite" in found["b/1"].detail


def test_the_first_phase_leaves_the_second_its_share(tmp_path):
    found = run(
        tmp_path,
        ["a/hang", "s/1", "s/2"],
        seconds=6.0,
        **{"s/1": {"phase": SPEED}, "s/2": {"phase": SPEED}},
    )
    assert found["a/hang"].status == "skipped"
    assert found["s/1"].status == found["s/2"].status == "passed"


def test_a_process_that_does_not_end_is_ended_before_speed_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_SECONDS_TO_END", 1.0)
    began = time.monotonic()
    found = run(tmp_path, ["a/last", "s/1"], **{"s/1": {"phase": SPEED}})
    assert time.monotonic() - began < 20
    assert found["a/last"].status == found["s/1"].status == "passed"


def test_a_process_that_never_begins_fails_each_check_once(tmp_path):
    found = run(tmp_path, ["a/1", "a/2"], worker="raise SystemExit(3)")
    assert [found[name].status for name in ("a/1", "a/2")] == ["failed", "failed"]
    assert "ended with 3" in found["a/1"].detail


def test_a_worker_that_leaves_a_check_out_is_not_started_for_ever(tmp_path):
    found = run(tmp_path, ["a/1", "a/2"], worker="pass")
    assert {result.detail for result in found.values()} == {"its process left it out"}


def test_without_a_device_it_ends_at_once(tmp_path):
    with pytest.raises(NoDeviceError, match="none found"):
        run(tmp_path, ["a/no device", "a/2", "b/hang"])


def test_each_result_is_on_the_disk_at_once(tmp_path):
    results = Results(tmp_path, title="T")
    for i, status in enumerate(("passed", "failed", "skipped")):
        results.add(Result(f"a/{i}", status, 1.0, "because | of this", {"off": 1e-7}))
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["check"] for line in lines] == [f"a/{n}" for n in range(i + 1)]
        assert f"| a/{i} | {status} |" in (tmp_path / "results.md").read_text()
    assert "1 passed, 1 failed, 1 skipped" in (tmp_path / "results.md").read_text()
    assert "- `a/1`: because / of this" in (tmp_path / "results.md").read_text()


SLOW_SUITE = """
import sys
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu.checks import Check
suite.all_checks = lambda device: [Check(f"g{i}/hang", "x:y", f"g{i}", 60) for i in range(2)]
sys.argv = ["gpu", "--device", "cpu", "--results", sys.argv[1]]
sys.exit(suite.main())
"""


def test_a_signal_leaves_the_results_and_no_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SUITE, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("logs/*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended by a signal" in text
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["skipped", "skipped"]


# ---- a worker, from inside ---------------------------------------------------------------------


def check_of(monkeypatch, call, **changes):
    import types

    module = types.ModuleType("benchmarks.gpu.made_up")
    module.call = call
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.made_up", module)
    return worker.run(
        Check("a/1", "made_up:call", "a", 10, **changes), Setting("cpu", Path("nowhere"))
    )


def test_a_check_passes_with_its_figures_and_fails_with_its_error(monkeypatch):
    assert check_of(monkeypatch, lambda s: {"off": 1.0}) == ("passed", "", {"off": 1.0})
    status, detail, _ = check_of(monkeypatch, lambda s: 1 / 0)
    assert (status, detail) == ("failed", "ZeroDivisionError: division by zero")


def test_what_is_missing_or_does_not_apply_is_skipped_with_the_reason(monkeypatch):
    def call(setting):
        setting.needs_cuda("for this")

    assert check_of(monkeypatch, call)[:2] == ("skipped", "needs a CUDA device: for this")
    status, detail, _ = check_of(monkeypatch, call, packages=("json", "no_such_module"))
    assert (status, detail) == ("skipped", "not installed: no_such_module")
    with pytest.raises(SkippedCheckError):
        call(Setting("cpu", Path("nowhere")))
    assert Setting("cuda", Path("nowhere")).needs_cuda("for this") is None


# ---- what there is -----------------------------------------------------------------------------


def test_every_check_has_its_own_name_and_a_function_that_exists():
    import ast

    for device in ("cuda", "cpu"):
        checks = all_checks(device)
        names = [check.name for check in checks]
        assert len(set(names)) == len(names) > 40
        for check in checks:
            module, _, function = check.run.partition(":")
            tree = ast.parse((ROOT / "benchmarks" / "gpu" / f"{module}.py").read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in defined, check.run


def test_twenty_architectures_and_more_are_compared():
    names = [check.options["case"] for check in all_checks("cuda") if "case" in check.options]
    assert len({name.split("-")[0] for name in names}) >= 20


def test_goals_are_said_to_be_met_or_missed():
    figures = {
        "speed/x/ours-packed": {"s/update": 0.1, "mfu": 0.5, "tokens/s": 10},
        "speed/x/stock-random": {"s/update": 0.19, "mfu": 0.2},
        "speed/x/stock-rebalance-8": {"s/update": 0.2, "mfu": 0.2},
        "speed/x/stock-rebalance-16": {"s/update": 0.15, "mfu": 0.51},
        "speed/x/dense-bound": {"s/update": 0.09, "mfu": 0.6},
        "waits/padded": {"ours per update": 1},
    }
    text = speed_section(figures)
    assert "## Speed on x" in text
    assert "waits" not in text
    assert [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith("- ")] == [
        "met",  # 1.5 times as fast as the best batch_rebalance
        "missed",  # 1.9 times random
        "met",  # 0.9 of the dense bound
        "missed",  # MFU below a peer's
    ]
    assert goals({}) == []
    assert page("T", [Result(name, "passed", figures=f) for name, f in figures.items()])
