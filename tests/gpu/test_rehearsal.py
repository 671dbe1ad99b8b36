"""The suite for GPUs runs here on tiny sizes, so that it cannot rot between two GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The rest takes several processes, and is rehearsed elsewhere: recipes and ranks have tests.
AREAS = ("exactness", "out-of-memory", "waits", "modes", "speed")
OF_A_DEVICE = {
    "exactness/packed-flash_attention_2/llama",
    "exactness/packed-flash_attention_2/qwen3",
    "exactness/packed-flex_attention/llama",
    "exactness/packed-flex_attention/qwen3",
    "out-of-memory/pressure",
    "waits/packed-flash",
    "modes/fp16",
    "modes/qlora",
    "modes/liger",
}
"""What only a CUDA device can show, or a package that runs nowhere else."""


@pytest.mark.slow
def test_every_check_that_can_run_on_a_cpu_passes_there(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--seconds", "900"),
            *("--results", str(tmp_path), "--only", *AREAS, "--leave-out", "modes/quickstart"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = {line["check"]: line for line in map(json.loads, lines)}
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {name for name, line in found.items() if line["status"] == "skipped"}
    assert skipped == OF_A_DEVICE
    assert len(found) - len(skipped) >= 35
    assert "ours-packed" in (tmp_path / "results.md").read_text()
