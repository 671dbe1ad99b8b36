"""The command line of the suite, see the package's first lines."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import all_checks
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Result, Results
from benchmarks.gpu.schedule import NoDeviceError, run_checks

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540.0


def main() -> int:
    """Run the suite; 0 if something passed and nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="all that there is")
    parser.add_argument("--jobs", type=int, default=0, help="processes side by side")
    parser.add_argument("--only", nargs="+", default=[], help="names that begin so")
    parser.add_argument("--leave-out", nargs="+", default=[], help="names that begin so")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    checks = [
        check
        for check in all_checks(options.device)
        if not options.only or check.name.startswith(("machine", *options.only))
        if not check.name.startswith(tuple(options.leave_out))
    ]
    if options.list:
        print(*(f"{check.name}  ({check.group})" for check in checks), sep="\n")
        return 0
    folder = options.results.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for old in (folder / "logs").glob("*.*"):
        old.unlink()
    kind = "rehearsal on a CPU" if options.device == "cpu" else "checks on a CUDA device"
    results = Results(folder, title=f"GPU suite: {kind}")

    def record(result: Result) -> None:
        results.add(result)
        told = f": {' '.join(result.detail.split())[:200]}" if result.detail else ""
        print(f"{result.status:8} {result.seconds:6.1f} s  {result.check}{told}", flush=True)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    for check in checks:
        if check.missing:  # no process has to begin for that
            record(Result(check.name, SKIPPED, detail=check.missing))
    try:
        run_checks(
            [check for check in checks if not check.missing],
            make_command=lambda names, lines: [
                *(sys.executable, "-m", "benchmarks.gpu.worker"),
                *("--device", options.device, "--results", str(folder), "--lines", str(lines)),
                *names,
            ],
            record=record,
            folder=folder / "logs",
            seconds=options.seconds,
            jobs=options.jobs or max(1, min(8, (os.cpu_count() or 2) // 2)),
            environment=_environment(),
        )
    except NoDeviceError as error:
        print(f"error: {error}\n  `make gpu DEVICE=cpu` rehearses the suite without one.")
        return 2
    except KeyboardInterrupt:
        print("ended by a signal; what had run is in the results")
        return 1
    count = results.counts()
    print(f"\n{count[PASSED]} passed, {count[FAILED]} failed, {count[SKIPPED]} skipped")
    print(f"written to {folder / 'results.md'}")
    return 1 if count[FAILED] or not count[PASSED] else 0


def _environment() -> dict[str, str]:
    """Let workers find the checkout, whatever folder and Python this was started from."""
    places = [ROOT, ROOT / "tests", ROOT / "benchmarks"]
    before = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": "1",  # several processes side by side; threads that wait would spin
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, places), *([before] if before else [])]),
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
