"""Values of the `train` section that have the right type and are still impossible.

Some are out of range, some contradict each other. The training arguments themselves are asked,
but only up to the point where they would look for a device: checking a recipe must not start
torch.distributed, and `plan` runs on machines without the recipe's hardware.

What a recipe needs of the machine it runs on: packages, a device, a folder it may write.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_gradacc.compat import options_as_installed
from hf_gradacc.data.section import PAIR_TASKS
from hf_gradacc.recipe.checks.foreseen import packages_of_optimizer
from hf_gradacc.recipe.file.problems import Origin, Problem
from hf_gradacc.recipe.file.source import RecipeSource
from hf_gradacc.recipe.keys.evaluation import is_rouge_installed
from hf_gradacc.recipe.keys.pairs import is_trl_installed
from hf_gradacc.recipe.keys.sections import Recipe, arguments_class, train_section
from hf_gradacc.text import nearest

__all__ = ["check_values", "machine_problems"]

_AT_LEAST: dict[str, float] = {
    "adam_epsilon": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "ddp_bucket_cap_mb": 1,
    "ddp_timeout": 1,
    "eval_delay": 0,
    "eval_steps": 0,
    "learning_rate": 0,
    "logging_steps": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "per_device_eval_batch_size": 1,
    "save_steps": 0,
    "save_total_limit": 1,
    "seed": 0,
    "weight_decay": 0,
}
"""Smallest values that mean something; transformers takes any number and fails later, or never."""


_SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")

_STEPS = ("eval_delay", "eval_steps", "logging_steps", "save_steps", "warmup_steps")

_LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""


class _AllCheckedError(Exception):
    """Ends the construction of arguments whose values have all been checked."""


def check_values(source: RecipeSource, *, faulty: set[str]) -> list[Problem]:
    """Find the values of `train` that the training arguments would refuse or misread.

    Args:
        source: The recipe's values, and where each was written.
        faulty: Keys of the section already reported, which are left out.
    """
    section = source.values.get("train")
    if not isinstance(section, dict):
        return []
    fields = train_section().model_fields
    given = {name: value for name, value in section.items() if name in fields.keys() - faulty}
    try:  # YAML's `no` becomes text here
        given = train_section().model_validate(given).model_dump(exclude_unset=True)
    except ValidationError:  # a problem whose key is not told apart; it is reported already
        return []
    values = {name: value for name, value in given.items() if value is not None}
    reporters = values.pop("report_to", "none")  # names are looked up when a trainer is made
    problems = _unknown_reporters(reporters, source) + [
        Problem(f"train.{name}", why, fix, source.origin(("train", name)), values.pop(name))
        for name, why, fix in _out_of_range(values)
    ]
    # The stock checks stop at their first complaint: without the value it blames, ask again.
    for _ in range(len(values) + 1):
        complaints = _complaints(values)
        for complaint in complaints:
            problems.append(_word(complaint, values, source))
        blamed = {problem.key.removeprefix("train.") for problem in problems} & set(values)
        if not complaints or not blamed:
            break
        for name in blamed:
            del values[name]
    return problems


def _unknown_reporters(value: Any, source: RecipeSource) -> list[Problem]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = ["all", "none", *INTEGRATION_TO_CALLBACK]
    found: list[Problem] = []
    for name in value if isinstance(value, list) else [value]:
        if name not in known:
            guess = nearest(str(name), known)
            fix = f"did you mean {guess}?" if guess else f"use one of {', '.join(known)}"
            where = source.origin(("train", "report_to"))
            found.append(Problem("train.report_to", "no such reporter", fix, where, name))
    return found


def _out_of_range(values: dict[str, Any]) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in _AT_LEAST and not value >= _AT_LEAST[name]:  # NaN is not, either
            found.append((name, "is out of range", f"use at least {_AT_LEAST[name]:g}"))
        elif name in _SHARES and not 0 <= value < 1:
            found.append((name, "is out of range", "use at least 0 and less than 1"))
        elif not math.isfinite(value):
            found.append((name, "is no number", "use a finite one"))
        elif name == "max_steps" and value < 1 and value != -1:
            fix = "use at least 1, or leave it out and set num_train_epochs"
            found.append((name, "is out of range", fix))
        elif name == "num_train_epochs" and not value > 0:
            found.append((name, "trains nothing", "use more than 0"))
        elif name in ("seed", "data_seed") and value > _LARGEST_SEED:
            found.append((name, "is out of range", f"use at most {_LARGEST_SEED}"))
        elif name in _STEPS and value > 1 and value != int(value):
            fix = "use a whole number, or a share of the run below 1"
            found.append((name, "is no number of updates", fix))
    return found


def _complaints(values: dict[str, Any]) -> list[str]:
    """What the arguments' own checks say; nothing on a device or a process group is touched."""
    from hf_gradacc.arguments import _find_problems

    base = arguments_class()
    if not hasattr(base, "_validate_args"):  # if a release renames it: `recipe_arguments` will tell
        return []
    ours: list[str] = []

    class Checked(base):  # type: ignore[misc, valid-type]
        def _validate_args(self) -> None:
            ours.extend(_find_problems(self))
            super()._validate_args()
            raise _AllCheckedError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arguments of the run itself will warn
            options = options_as_installed(values, base)
            Checked(**{**options, "use_cpu": True})  # bf16 asks for a GPU, which this may lack
    except _AllCheckedError:
        return ours
    except (ValueError, TypeError, ArithmeticError, ImportError, NotImplementedError) as error:
        return [*ours, " ".join(str(error).split())]
    return ours


def _word(complaint: str, values: dict[str, Any], source: RecipeSource) -> Problem:
    """A complaint as a problem of the first of the recipe's keys that it names."""
    name = next((word for word in re.findall(r"\w+", complaint) if word in values), None)
    key = ("train",) if name is None else ("train", name)
    text = complaint
    for start in (f"{name} = {values.get(name or '')!r}", f"{name} = {values.get(name or '')}"):
        text = text.removeprefix(start)
    why, _, fix = text.strip(" :").partition(": ") if not text.startswith(":") else ("", "", text)
    return Problem(
        ".".join(key),
        why.rstrip(".") or "has a wrong value",
        fix.strip(" :") or "change it, or leave it out",
        source.origin(key),
        ... if name is None else values[name],
    )


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
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    package = packages_of_optimizer(optimizer)
    if package is not None and _missing(package):
        why = f"comes from {package}, not installed here"
        fix = f"install {package}, or use adamw_torch_fused"
        yield Problem("train.optim", why, fix, _HERE, optimizer)
    if recipe.peft.options.get("init_lora_weights") == "loftq":
        missing = _missing("bitsandbytes")
        if missing or arguments.device.type == "cpu":
            why = f"rounds weights with {missing}, not installed here" if missing else "needs a GPU"
            fix = "run it on a machine that has both, or use pissa or olora"
            yield Problem("peft.options.init_lora_weights", why, fix, _HERE, "loftq")
    if recipe.model.task in PAIR_TASKS and not is_trl_installed():
        fix = "`pip install 'hf_gradacc[trl]'`"
        yield Problem(
            "model.task", "trains with TRL, not installed here", fix, _HERE, recipe.model.task
        )
    if "rouge" in recipe.evaluation.metrics and not is_rouge_installed():
        why, fix = "needs rouge_score, not installed here", "`pip install 'hf_gradacc[metrics]'`"
        yield Problem("evaluation.metrics", why, fix, _HERE, "rouge")
    if arguments.fsdp and arguments.world_size == 1:
        why = "spreads a model over several processes, and this run has one"
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
