"""A resume that says the truth: what changed since the checkpoint, and what holds of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging

from hf_gradacc.errors import CheckpointError, ConfigError, DataError
from hf_gradacc.safety.agreement import COMPARED, describe_disagreement, find_disagreements
from hf_gradacc.safety.identity import digest_of
from hf_gradacc.safety.model_facts import describe_layout, sample_values
from hf_gradacc.safety.resume_rules import (
    HYPERPARAMETERS,
    SCHEDULE,
    STEPS,
    changed_config,
    changed_settings,
    describe_change,
    find_other_groups,
    find_refusals,
    options_named_in,
)
from hf_gradacc.safety.run_state import keep
from hf_gradacc.safety.withheld import shown_without_secrets
from hf_gradacc.tracking.run_facts import versions
from hf_gradacc.trainer.checkpoints.choosing import Start, read_record
from hf_gradacc.trainer.checkpoints.position import FACTS_OF_DATA
from hf_gradacc.trainer.optimizer.packages import projectors_readable, refuse_lost_state

__all__ = ["Beginning"]

logger = logging.get_logger(__name__)


@dataclass
class Beginning:
    """How a run begins: by which identity, with which changes since its checkpoint.

    Attributes:
        start: The checkpoint, and the run.
    """

    start: Start

    def __post_init__(self) -> None:
        self._then: dict[str, Any] = {}
        self._model: dict[str, Any] = {}
        self._changed: dict[str, tuple[Any, Any]] = {}
        self._arguments: dict[str, Any] = {}  # as asked for: the stock loop sees others

    # ---- before anything is loaded -------------------------------------------------------------

    def check(self, trainer: Any) -> None:
        """Compare the checkpoint with the model and settings that are there.

        Raises:
            CheckpointError: If its weights or optimizer cannot be gone on with.
        """
        checkpoint = self.start.checkpoint
        self._arguments = _recorded_arguments(trainer.args)
        if checkpoint is None:
            return
        self._then = read_record(checkpoint)
        self._changed = changed_settings(self._then.get("arguments") or {}, self._arguments)
        now = self._model = describe_layout(trainer.model)
        refusals = list(find_refusals(self._then.get("model") or _seen_in(checkpoint, now), now))
        if refusals:
            raise _refusal(checkpoint, "; ".join(refusals))

    def check_optimizer(self, optimizer: Any, groups: list[list[Any]] | None) -> None:
        """Compare the optimizer that was made, and its groups, with those of the checkpoint.

        DeepSpeed loads its state as soon as it has the model, so this comes before.

        Args:
            optimizer: Just made, in no wrapper or any.
            groups: As `ParameterGroups.describe` gives them.

        Raises:
            CheckpointError: If it is another, or parameters stand in other groups.
        """
        checkpoint = self.start.checkpoint
        if checkpoint is None or not self._then or optimizer is None:
            return
        name, saved_name = _class_of(optimizer), self._then.get("optimizer")
        refuse_lost_state(name, checkpoint)
        if saved_name not in (None, name):
            return  # refused by name, once an engine that wraps it has done so
        if why := find_other_groups(self._then.get("optimizer_groups"), groups):
            raise _refusal(checkpoint, why)

    # ---- in the order of the stock code --------------------------------------------------------

    def begin(self, trainer: Any, membership: dict[str, Any]) -> None:
        """Let ranks agree, and record with the run's state what decides its result.

        Args:
            trainer: The trainer, its state new or loaded from the checkpoint.
            membership: What decides which sequences share an update.

        Raises:
            ConfigError, DataError: If ranks disagree.
        """
        args, state = trainer.args, trainer.state
        model = describe_layout(trainer.model)
        _agree(trainer, membership, model)
        decides = {"arguments": self._arguments, "updates": membership, "model": model}
        keep(
            state,
            run=self.start.run.to_dict(),
            digest=digest_of({**decides, "versions": versions()}),
            arguments=self._arguments,
            model=model,
            folder_is_shared=self.start.shares_folder,
        )
        if self.start.checkpoint is None:
            return
        if any(name in self._changed for name in STEPS):
            state.compute_steps(args, state.max_steps)
        if any(name in self._changed for name in ("metric_for_best_model", "greater_is_better")):
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def load_optimizer(self, trainer: Any, load: Callable[[], None]) -> None:
        """Load optimizer and schedule, and let what was changed since take effect.

        The stock code takes learning rate, decay and betas from the checkpoint, whatever the
        arguments say now.

        Args:
            trainer: The trainer, its optimizer and schedule made from its arguments.
            load: The stock ``_load_optimizer_and_scheduler``.

        Raises:
            CheckpointError: If the checkpoint's state is of another optimizer.
        """
        checkpoint = self.start.checkpoint
        optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
        if checkpoint is None or optimizer is None:
            load()
            return
        name, saved_name = _class_of(optimizer), self._then.get("optimizer")
        if saved_name not in (None, name):
            raise _refusal(checkpoint, f"the optimizer: {saved_name} before, {name} now")
        fresh_rates = list(getattr(schedule, "base_lrs", ()))
        fresh = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        kinds = self._changed.get("lr_scheduler_type", ("", ""))
        has_other_state = any(kind in _WITH_STATE for kind in kinds) and kinds[0] != kinds[1]
        try:
            if has_other_state:
                trainer.lr_scheduler = _Ignored()
            with projectors_readable():
                load()
        except (KeyError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise _refusal(
                checkpoint, f"the optimizer: its state does not fit ({error})"
            ) from error
        finally:
            trainer.lr_scheduler = schedule
        planned = self._then.get("updates_planned")
        moves = any(n in self._changed for n in SCHEDULE) or planned != trainer.state.max_steps
        if moves and self._then:
            _move_schedule(optimizer, schedule, fresh, fresh_rates, step=trainer.state.global_step)
        changed_groups = {key for n in self._changed for key in HYPERPARAMETERS.get(n, ())}
        changed_groups.add("label")  # patterns may be written in another way
        if "optim_args" in self._changed:
            changed_groups |= set(options_named_in(trainer.args.optim_args))
        for group, now in zip(optimizer.param_groups, fresh, strict=False):
            group.update({key: now[key] for key in changed_groups if key in now})

    def tell(self, trainer: Any) -> None:
        """Say what changed since the checkpoint, and what holds; record the optimizer."""
        if trainer.optimizer is not None:
            keep(
                trainer.state,
                optimizer=_class_of(trainer.optimizer),
                optimizer_groups=trainer.parameter_groups.describe(),
            )
        if self.start.checkpoint is None or not trainer.is_world_process_zero():
            return
        lines = []
        of_model = changed_config(self._then.get("model") or {}, self._model)
        for name, (then, now) in {**self._changed, **of_model}.items():
            told = describe_change(
                name,
                begins_data_anew=trainer.args.ignore_data_skip,
                restores_optimizer=trainer.is_deepspeed_enabled,
            )
            if told is not None:
                lines.append(f"  {name}: {then} before, {now} now: {told}")
        if lines:
            where = Path(self.start.checkpoint).name
            logger.warning("\n".join([f"changed since {where}:", *lines]))


_WITH_STATE = ("greedy", "reduce_lr_on_plateau")
"""Schedules that follow what was measured, not the step alone."""


class _Ignored:
    """Takes the place of a schedule whose state is of another kind than the one saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""


def _move_schedule(
    optimizer: Any, schedule: Any, fresh: list[dict[str, Any]], rates: list[Any], *, step: int
) -> None:
    """Set a schedule to the place it would have if it had begun with the present settings."""
    if isinstance(schedule, LambdaLR):
        schedule.last_epoch = max(step, 0)
        schedule.base_lrs = rates
        now: list[Any] = [
            rate * f(step) for rate, f in zip(rates, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = now
    elif type(schedule).__name__ in ("GreedyLR", "ReduceLROnPlateau"):
        now = [group["lr"] for group in fresh]
    else:
        return
    for group, lr, made in zip(optimizer.param_groups, now, fresh, strict=True):
        group["lr"] = lr
        if "initial_lr" in made:
            group["initial_lr"] = made["initial_lr"]


def _class_of(optimizer: Any) -> str:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__.removeprefix("Paged")


def _recorded_arguments(args: Any) -> dict[str, Any]:
    """Return the arguments as JSON values, without secrets; of others their text counts."""
    with shown_without_secrets(args):
        kept: dict[str, Any] = json.loads(json.dumps(args.to_dict(), default=_plain))
    return kept


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _seen_in(checkpoint: str, now: dict[str, Any]) -> dict[str, Any]:
    """Return what the files of a checkpoint say that nobody recorded a model with."""
    has_adapter = Path(checkpoint, "adapter_config.json").is_file()
    has_model = Path(checkpoint, "config.json").is_file()
    if has_adapter == has_model:
        return now
    kind = (now["adapter_kind"] or "an adapter") if has_adapter else None
    return {**now, "adapter_kind": kind}


def _refusal(checkpoint: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} cannot be gone on from: {why}.\n  Resume with what it was trained with. Or "
        f"begin a new run from its weights, in another folder: from_pretrained({checkpoint!r}), "
        f"model.name in a recipe, without resume_from_checkpoint."
    )


# ---- ranks -------------------------------------------------------------------------------------


def _agree(trainer: Any, membership: dict[str, Any], model: dict[str, Any]) -> None:
    """Compare what ranks must have in common, before the first update.

    Raises:
        ConfigError, DataError: Naming the field, who has which value, and the way out.
    """
    args = trainer.args
    if args.world_size == 1:
        return
    loads_itself = trainer.update_collator is None  # a loader of the user's own: it deals the rows
    of_data = {} if loads_itself else membership
    settings = {name: getattr(args, name, None) for name in COMPARED} | {"seed": args.seed}
    layout = {name: model[name] for name in ("class", "layout", "trained", "dtype")}
    begins_whole = not trainer.shards_weights or not _reads_on_first_rank(trainer)
    values = sample_values(trainer.model.parameters()) if begins_whole else None
    facts = {
        **{f"updates.{name}": value for name, value in of_data.items()},
        **{f"arguments.{name}": value for name, value in settings.items()},
        **{f"model.{name}": value for name, value in layout.items()},
        "weights": values,
        "versions": versions(),
    }
    found = find_disagreements(facts, device=args.device)
    for name in [n for n in found if n in _ONLY_SAID or (n == "arguments.seed")]:
        logger.warning(f"ranks disagree: {describe_disagreement(name, found.pop(name))}.")
    is_stream = membership.get("order") == "stream"
    if is_stream and "updates.fingerprint" in found:
        del found["updates.fingerprint"]
        logger.warning(
            "ranks disagree: the stream begins with other rows on some of them. Each takes its "
            "share of the stream it reads, so rows come twice or never, unless all read the same."
        )
    if "weights" in found and not trainer.shards_weights:
        del found["weights"]
        logger.warning(
            "ranks disagree: they begin with other weights. Those of rank 0 are sent to all."
        )
    if not found:
        return
    lines = "\n  ".join(describe_disagreement(name, values) for name, values in found.items())
    if any(f"updates.{name}" in found for name in FACTS_OF_DATA):
        raise DataError(
            f"ranks have other training data:\n  {lines}\nEach update is dealt to the ranks here, "
            f"so rows would be trained twice or never. Give every rank the whole dataset in the "
            f"same order: do not shard or shuffle it by rank, and seed what prepares it."
        )
    raise ConfigError(
        f"ranks disagree:\n  {lines}\nThey would train another model than asked for, or wait for "
        f"each other forever. Start all with the same settings and the same model."
    )


_ONLY_SAID = ("versions",)


def _reads_on_first_rank(trainer: Any) -> bool:
    """Return whether only rank 0 holds weights before they are sharded, or a sync follows."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is None or bool(getattr(plugin, "cpu_ram_efficient_loading", False))
