"""How long a recipe will take: from a few real updates on this machine, or from an earlier run."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_gradacc.data import PreparedData, make_collator
from hf_gradacc.data.section import PAIR_TASKS
from hf_gradacc.errors import DataError
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.load import recipe_arguments
from hf_gradacc.recipe.model.load import apply_peft, empty_model, load_model
from hf_gradacc.recipe.plan.updates import RecipePlan
from hf_gradacc.text import count_updates, duration, quantity
from hf_gradacc.tracking.run_files import read_run

__all__ = [
    "Measurement",
    "describe_time",
    "expected_seconds",
    "measure_updates",
    "read_earlier_run",
]

# An update is timed as the run will train it, and nothing else is done. One process measures.
_ONLY_UPDATES: dict[str, Any] = {
    "deepspeed": None,
    "disable_tqdm": True,
    "eval_on_start": False,
    "eval_strategy": "no",
    "fsdp": None,
    "fsdp_config": None,
    "load_best_model_at_end": False,
    "log_level": "error",
    "logging_steps": 1,
    "logging_strategy": "steps",
    "noise_scale_every": None,
    "push_to_hub": False,
    "remember_tuned_budget": False,
    "report_to": "none",
    "resume_from_checkpoint": None,
    "save_strategy": "no",
    "wandb_per_rank": False,
    "wandb_report": False,
}


@dataclass(frozen=True)
class Measurement:
    """What updates took.

    Attributes:
        seconds_per_token: Seconds of an update over the tokens that it computes: those that rows
            share cost next to nothing, and padding costs what it is.
        source: Where that was measured, in words.
        world_size: Ranks that measured.
        updates_done: Updates that a run to go on with has done.
        shares: Whether beginnings of rows were computed once there, so that they will be again.
    """

    seconds_per_token: float
    source: str
    world_size: int = 1
    updates_done: int = 0
    shares: bool = True


def expected_seconds(
    measurement: Measurement, plan: RecipePlan, *, num_updates: int | None = None
) -> float:
    """Return the seconds of updates like those of a plan; ranks are taken to divide them evenly.

    Args:
        measurement: What a token took.
        plan: Knows the tokens that an update computes, and the ranks.
        num_updates: How many; by default all of the run.
    """
    count = plan.num_updates if num_updates is None else num_updates
    instead = [way for way in plan.ways if way.stands_in and not measurement.shares]
    way = instead[0] if instead else plan.chosen
    seconds = measurement.seconds_per_token * way.computed_per_update * count
    return seconds * measurement.world_size / plan.world_size


def describe_time(
    measured: Measurement, plan: RecipePlan, *, price_per_hour: float | None = None
) -> Iterator[tuple[str, str]]:
    """Yield how long updates, the run and what is left of it take, as names and texts.

    Args:
        measured: What updates took.
        plan: The updates.
        price_per_hour: Of all machines together, in any currency.
    """

    def told(seconds: float) -> str:
        if price_per_hour is None:
            return duration(seconds)
        price = f"{seconds / 3600 * price_per_hour:,.2f} at {price_per_hour:g} an hour"
        return f"{duration(seconds)}, {price}"

    one = expected_seconds(measured, plan, num_updates=1)
    scaled = f", if {plan.world_size} ranks share it evenly"
    yield (
        "an update",
        f"{quantity(one)} s{scaled if plan.world_size != measured.world_size else ''}",
    )
    inputs, targets = plan.inputs_per_update.mean / one, plan.targets_per_update.mean / one
    yield "tokens/s", f"{quantity(inputs)}; {quantity(targets)} targets/s"
    yield "the run", f"{told(expected_seconds(measured, plan))}, without evaluations and saves"
    left = plan.num_updates - measured.updates_done
    if measured.updates_done and left > 0:
        rest = expected_seconds(measured, plan, num_updates=left)
        yield "left", f"{told(rest)} for {count_updates(left)}, with --resume"


def measure_updates(
    recipe: Recipe, data: PreparedData, *, tokenizer: Any, num_updates: int = 2
) -> Measurement:
    """Train a few updates and time all but the first, which compiles, allocates and warms up.

    The model has random weights of the recipe's shape, so nothing is downloaded; a 4-bit model has
    to be loaded. Nothing is saved or sent.

    Args:
        recipe: A checked recipe.
        data: Its rows.
        tokenizer: Its tokenizer.
        num_updates: Updates to time.

    Raises:
        ConfigError: If the recipe cannot be trained on this machine.
    """
    from transformers import set_seed

    from hf_gradacc.trainer.mixin import GradAccTrainer

    with tempfile.TemporaryDirectory() as folder:
        changes = _ONLY_UPDATES | {"output_dir": folder, "max_steps": num_updates + 1}
        arguments = recipe_arguments(recipe, **changes)
        set_seed(arguments.seed)
        model = _model_of_shape(recipe, data, tokenizer=tokenizer, device=str(arguments.device))
        parts: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": data.train}
        parts["processing_class"] = tokenizer
        trainer: Any
        if recipe.model.task in PAIR_TASKS:
            from hf_gradacc.recipe.pair_trainers import make_pair_trainer

            trainer = make_pair_trainer(recipe, **parts)
        else:
            collator = make_collator(recipe.model.task, tokenizer=tokenizer, model=model)
            trainer = GradAccTrainer(data_collator=collator, **parts)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        rows = [row for row in trainer.state.log_history if "step_seconds" in row]
    timed = rows[1:] or rows
    weights = "loaded" if recipe.peft.method == "qlora" else "random"
    return Measurement(
        _seconds_per_token(timed),
        f"{count_updates(len(timed))} on {arguments.device}, {weights} weights",
        shares=_shares(timed),
    )


def _model_of_shape(recipe: Recipe, data: PreparedData, *, tokenizer: Any, device: str) -> Any:
    section, names = recipe.model, data.label_names
    if recipe.peft.method == "qlora":
        model = load_model(section, tokenizer=tokenizer, label_names=names, quantize=True)
    else:
        model = empty_model(section, tokenizer=tokenizer, label_names=names, device=device)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return apply_peft(model, recipe.peft, task=section.task)


def read_earlier_run(
    folder: str | Path, *, num_parameters: int, world_size: int
) -> Measurement | None:
    """Take the times that a run in a folder has logged; None if none fits.

    Args:
        folder: The recipe's output folder.
        num_parameters: Of the recipe's model; a run of another model says nothing.
        world_size: Ranks planned for; the run must have had as many.
    """
    with contextlib.suppress(DataError, OSError):
        settings, log = read_run(Path(folder))
        rows = [row for row in log if row.get("kind") == "train" and "step_seconds" in row]
        ranks = settings.get("batch", {}).get("world_size", 1)
        before = settings.get("model", {}).get("num_parameters", 0)
        if len(rows) < 2 or ranks != world_size or abs(before - num_parameters) > 0.05 * before:
            return None
        hardware = settings.get("hardware", {})
        device = hardware.get("device_name", hardware.get("device", "its device"))
        done = rows[-1]["step"]
        return Measurement(
            _seconds_per_token(rows[1:], since=rows[0]["step"]),
            f"{count_updates(done - rows[0]['step'])} of the run in {folder}, {ranks} × {device}",
            world_size=ranks,
            updates_done=done,
            shares=_shares(rows),
        )
    return None


def _seconds_per_token(rows: list[dict[str, Any]], *, since: int | None = None) -> float:
    """Divide sums: each row is the mean of the updates since the row before it."""
    seconds = tokens = 0.0
    for row in rows:
        count = 1 if since is None else row["step"] - since
        since = None if since is None else row["step"]
        seconds += count * row["step_seconds"]
        # Logs of earlier releases have no such key, and shared nothing.
        padded = row["input_tokens_per_update"] / (1 - row.get("padding_fraction", 0.0))
        tokens += count * row.get("computed_tokens_per_update", padded)
    return seconds / max(tokens, 1.0)


def _shares(rows: list[dict[str, Any]]) -> bool:
    return any(row.get("shared_fraction") for row in rows)
