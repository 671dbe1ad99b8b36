"""Run some checks in this process, and write a line before and after each.

Not called by hand: ``python -m benchmarks.gpu`` starts it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import Check, Setting, SkippedCheckError, all_checks
from benchmarks.gpu.schedule import NO_DEVICE

POISONED = 75
"""Exit code after an error that leaves the CUDA context unusable."""

_POISON = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch")


def main() -> None:
    """Run the checks named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import transformers

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device for torch {torch.__version__}", flush=True)
        sys.exit(NO_DEVICE)
    if options.device == "cuda":
        _take_device(torch)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = {check.name: check for check in all_checks(options.device)}
    setting = Setting(options.device, options.results)
    with options.lines.open("a", buffering=1) as lines:

        def tell(**line: Any) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        for name in options.names:
            tell(check=name)
            print(f"== {name}", flush=True)
            began = time.monotonic()
            status, detail, figures = run(known[name], setting)
            tell(
                check=name,
                status=status,
                seconds=round(time.monotonic() - began, 2),
                detail=detail,
                figures=figures,
            )
            if status == "failed" and any(sign in detail for sign in _POISON):
                sys.exit(POISONED)
            _clean_up(options.device)


def _take_device(torch: Any) -> None:
    """Begin to use the device; where it takes one process at a time, wait for the turn."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        if "busy or unavailable" not in str(error):
            raise
        print(str(error).splitlines()[0], flush=True)
        time.sleep(2)
        # Anew, since a context that could not be made is not made again.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.worker", *sys.argv[1:]])


def run(check: Check, setting: Setting) -> tuple[str, str, dict[str, Any]]:
    """Run one check: its status, why it failed or was skipped, and its figures."""
    if check.missing:
        return "skipped", check.missing, {}
    module, _, function = check.run.partition(":")
    try:
        call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        return "passed", "", call(setting, **check.options) or {}
    except SkippedCheckError as why:
        return "skipped", str(why), {}
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:2000], {}


def _clean_up(device: str) -> None:
    """Leave the next check a device as the first found it."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.backends.fp32_precision = "none"  # torch_compile and tf32 set it for the process
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
