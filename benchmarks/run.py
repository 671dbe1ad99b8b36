"""All benchmarks, one after another; what ``make bench`` calls. About half an hour on two cores.

    python benchmarks/run.py            all of them, results under benchmarks/results
    python benchmarks/run.py --quick    fewer rounds, nothing written

On a GPU the speed benchmark takes a Qwen3-0.6B shape in bfloat16 and also runs packed through
flash attention where it is installed; on a CPU the Llama shapes of 9 and 25 million parameters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ALL_ROWS = ["gsm8k", "heavy-tail", "lognormal", "equal"]
SHARING = ["gsm8k-4shot", "chat-turns", "pairs"]
"""Rows that begin alike. Four examples before each question make an update of 50,000 tokens."""


def commands(*, quick: bool) -> list[list[str]]:
    """The command lines, in order."""
    out = (lambda theme: []) if quick else (lambda theme: ["--out", theme])
    if torch.cuda.is_available():
        budgets = ["--sizes", "8", "16", "32", "--budgets", "4096", "8192", "16384"]
        shape = ["--shape", "qwen3-0.6b", "--rounds", "2" if quick else "7", *budgets]
        speed = [["speed.py", *shape, "--rows", *ALL_ROWS, *out("speed-qwen3-0.6b")]]
    else:
        rounds = ["--rounds", "1" if quick else "5"]
        rows = ["gsm8k"] if quick else ALL_ROWS
        speed = [["speed.py", *rounds, "--rows", *rows, *out("speed-llama-9m")]]
        sizes = ["--sizes", "8", "--budgets", "2048", "4096"]
        few = ["--rounds", "1" if quick else "3", *sizes]
        kinds = SHARING[1:] if quick else SHARING
        speed.append(["speed.py", *few, "--rows", *kinds, *out("speed-sharing")])
        if not quick:
            speed.append(
                ["speed.py", *rounds, "--shape", "llama-25m", "--no-trl", *out("speed-llama-25m")]
            )
    smaller = ["--largest", "100000", "--micro-batches", "64"] if quick else []
    tuning = [] if quick else [["tuning.py", *out("tuning")]]
    return [
        *speed,
        *tuning,
        ["memory.py", *out("memory")],
        ["scaling.py", *smaller, *out("scaling")],
        ["one_curve.py", *(["--quick"] if quick else [])],
        ["router_balance.py", *(["--quick"] if quick else [])],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for script, *arguments in commands(quick=options.quick):
        print(f"== {script} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
