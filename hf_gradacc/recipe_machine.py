"""What a recipe needs of the machine it runs on: packages, a device, a folder it may write."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_gradacc.recipe_report import Origin, Problem
from hf_gradacc.recipe_sections import Recipe

__all__ = ["machine_problems"]

_HERE = Origin("this machine")


def machine_problems(recipe: Recipe, arguments: Any) -> Iterator[Problem]:
    """Everything this machine lacks, looked for before data or weights are.

    Args:
        recipe: A checked recipe.
        arguments: Its training arguments, which know the device.
    """
    if arguments.use_liger_kernel:
        missing = _missing("liger_kernel", "triton")
        if missing or arguments.device.type == "cpu":
            why = f"needs {missing}, not installed here" if missing else "needs a GPU"
            fix = "`pip install liger-kernel` on a machine with a GPU, or set it to false"
            yield Problem("train.use_liger_kernel", why, fix, _HERE, True)
    if recipe.peft.method == "qlora" and (missing := _missing("bitsandbytes")):
        why = f"loads the model in 4 bits with {missing}, not installed here"
        yield Problem("peft.method", why, "`pip install bitsandbytes`, or use lora", _HERE, "qlora")
    if arguments.fsdp and arguments.world_size == 1:
        why = "spreads a model over several processes, and this is one"
        fix = (
            "start it with `torchrun --nproc-per-node 8 -m hf_gradacc train ...`, or set it to null"
        )
        yield Problem("train.fsdp", why, fix, _HERE, recipe.train.get("fsdp"))
    folder = Path(arguments.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        yield Problem("output.dir", why, "name another folder", _HERE, str(folder))


def _missing(*packages: str) -> str:
    return " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
