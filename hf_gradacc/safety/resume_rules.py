"""What holds of a setting that was changed between a checkpoint and the run that resumes it.

Plain functions on recorded settings. The trainer applies what they say, see `trainer.resume`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_gradacc.safety.identity import differing

__all__ = [
    "HYPERPARAMETERS",
    "SCHEDULE",
    "STEPS",
    "changed_config",
    "changed_settings",
    "describe_change",
    "find_other_groups",
    "find_refusals",
    "options_named_in",
]

SCHEDULE = (
    "learning_rate",
    "learning_rates",
    "loraplus_ratio",
    "lr_decay_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "warmup_ratio",
    "warmup_steps",
)
"""Settings that decide the learning rate of an update."""

HYPERPARAMETERS: dict[str, tuple[str, ...]] = {
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
    "weight_decay": ("weight_decay",),
}
"""Settings that an optimizer keeps in its groups, and under which names."""

STEPS = ("eval_steps", "logging_steps", "save_steps")

_IN_MEMBERSHIP = (
    "data_seed",
    "dataloader_drop_last",
    "effective_batch_size",
    "group_by_prefix",
    "incomplete_update",
    "tokens_per_update",
    "train_sampling_strategy",
)
"""Refused where the position in the data depends on them, see `trainer.position.Ledger`."""

_CUTS = (
    "gradient_accumulation_steps",
    "layout",
    "max_tokens_per_micro_batch",
    "per_device_train_batch_size",
)
_BEST = ("greater_is_better", "metric_for_best_model")

_SAYS_NOTHING = (
    "_n_gpu",
    "allow_changed_data",
    "deepspeed_plugin",
    "disable_tqdm",
    "distributed_state",
    "do_eval",
    "do_predict",
    "do_train",
    "hub_model_id",
    "hub_token",
    "ignore_data_skip",
    "local_rank",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "output_dir",
    "overwrite_output_dir",
    "project",
    "push_to_hub_token",
    "resume_from_checkpoint",
    "run_name",
    "trackio_bucket_id",
    "trackio_space_id",
    "use_cpu",
    "wandb_per_rank",
    "wandb_report",
)
"""Where a run writes and what it is called: no part of what it computes."""


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with their values before and now.

    >>> changed_settings({"learning_rate": 0.1, "run_name": "a"}, {"learning_rate": 0.2})
    {'learning_rate': (0.1, 0.2)}
    """
    changed = sorted(differing(then, now).items())
    return {name: values for name, values in changed if name not in _SAYS_NOTHING}


def describe_change(
    name: str, *, begins_data_anew: bool, restores_optimizer: bool = False
) -> str | None:
    """Return what holds of a changed setting; None if somebody else refuses it.

    Args:
        name: The setting.
        begins_data_anew: ``ignore_data_skip``: no position in the data is gone on from.
        restores_optimizer: The engine restores its optimizer by itself, as DeepSpeed does.

    >>> describe_change("max_grad_norm", begins_data_anew=False)
    'takes effect from here'
    """
    if name in _IN_MEMBERSHIP and not begins_data_anew:
        return None
    if restores_optimizer and name in (*HYPERPARAMETERS, "optim_args"):
        return "no effect: DeepSpeed restores its optimizer as it was saved"
    if name in _CUTS:
        return "takes effect from here: other micro-batches, the same updates"
    if name == "seed":
        return "takes effect from here; dropout goes on from the checkpoint's random state"
    if name in _BEST:
        return "takes effect from here, and the best checkpoint is looked for anew"
    return "takes effect from here"


def changed_config(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs in the configuration of a model whose weights have the same shapes.

    Args:
        then: The model as `describe_layout` recorded it with the checkpoint.
        now: The model that is there.
    """
    if not then.get("config") or not now.get("config"):
        return {}
    changed = sorted(differing(then["config"], now["config"]).items())
    return {f"model.{name}": values for name, values in changed if name != "use_cache"}


def find_other_groups(then: Any, now: Any) -> str | None:
    """Say how the groups of an optimizer differ from those of a checkpoint; None if they do not.

    Args:
        then: Label, number of parameters and digest of their names of each group, as recorded with
            the checkpoint; None if no parameter had a learning rate of its own.
        now: Of the optimizer that is there.

    >>> find_other_groups([["", 4, "a"]], [["", 3, "b"], ["head", 1, "c"]])
    'the groups of learning rates: none before, head (1 parameter) now'
    """
    if [group[1:] for group in then or []] == [group[1:] for group in now or []]:
        return None
    told = [_describe_groups(groups) for groups in (then, now)]
    others = ", of other parameters" if told[0] == told[1] else ""
    return f"the groups of learning rates: {told[0]} before, {told[1]} now{others}"


def _describe_groups(groups: Any) -> str:
    own: dict[str, int] = {}
    for label, count, _ in groups or []:
        if label:  # twice, if some of its parameters decay and others do not
            own[label] = own.get(label, 0) + count
    counted = [f"{label} ({n} parameter{'s' if n != 1 else ''})" for label, n in own.items()]
    return ", ".join(counted) or "none"


def options_named_in(optim_args: str | None) -> tuple[str, ...]:
    """Return the names in ``optim_args``.

    >>> options_named_in("rank=64, scale=0.1")
    ('rank', 'scale')
    """
    pairs = (optim_args or "").replace(" ", "").split(",")
    return tuple(pair.partition("=")[0] for pair in pairs if "=" in pair)


def find_refusals(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps a model from going on with a checkpoint's weights and optimizer.

    Args:
        then: The model as `describe_layout` recorded it with the checkpoint.
        now: The model that is there.
    """
    if then.get("adapter_kind") != now.get("adapter_kind"):
        kinds = [facts.get("adapter_kind") or "all weights" for facts in (then, now)]
        yield f"what is trained: {kinds[0]} before, {kinds[1]} now"
        return
    if then.get("layout") != now.get("layout"):
        changes = [
            f"{prefix}.{key}: {old!r} before, {new!r} now"
            for prefix in ("config", "adapter")
            for key, (old, new) in differing(then.get(prefix, {}), now.get(prefix, {})).items()
        ]
        yield "; ".join(changes) or (
            f"the model's weights: {then.get('num_parameters'):,} in {then.get('class')} before, "
            f"{now.get('num_parameters'):,} in {now.get('class')} now, by other names or shapes"
        )
        return
    if then.get("trained") != now.get("trained"):
        yield (
            f"what is trained: {then.get('num_trained')} tensors before, {now.get('num_trained')} "
            f"now, or others of them"
        )
    old, new = then.get("dtype"), now.get("dtype")
    if _BITS.get(str(new), 64) < _BITS.get(str(old), 0):
        yield f"the precision of the weights: {old} before, {new} now, which would round them"
    frozen = (then.get("frozen"), now.get("frozen"))
    if None not in frozen and frozen[0] != frozen[1]:
        yield (
            f"the frozen weights: those of {now.get('name')!r} are not the ones that the trained "
            f"weights were trained with ({then.get('name')!r})"
        )


_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
