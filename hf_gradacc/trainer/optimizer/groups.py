"""Which parameters learn at which rate: patterns, LoRA+, and Muon's matrices.

The stock Trainer makes an optimizer of two groups, with weight decay and without. Here those groups
are split, before anything was stepped: each part keeps the settings of its group and has a rate of
its own. So every optimizer can have them, and the schedule scales all groups alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter

from hf_gradacc.errors import ConfigError
from hf_gradacc.safety.identity import digest_of
from hf_gradacc.text import nearest
from hf_gradacc.trainer.as_requested import changed
from hf_gradacc.trainer.optimizer.muon import (
    MuonWithAdamW,
    find_hidden_matrices,
    muon_options,
    refuse_muon,
)

__all__ = [
    "GroupRate",
    "ParameterGroups",
    "all_names",
    "assign_rates",
    "assign_rates_as_asked",
    "group_label",
    "split_groups",
]

_LORAPLUS_EMBEDDING_RATE = 1e-6  # of the authors' code, and of peft's
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class GroupRate(NamedTuple):
    """The learning rate of some parameters.

    Attributes:
        label: Names them in the log; empty for those with ``learning_rate``.
        rate: At the peak of the schedule.
    """

    label: str
    rate: float


def group_label(pattern: str) -> str:
    """Make a name for the log of a pattern: letters, digits and underscores, as W&B asks for.

    >>> group_label(r"layers\\.[0-3]\\."), group_label("embed_tokens|lm_head")
    ('layers_0_3', 'embed_tokens_lm_head')
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", pattern).strip("_") or "group"


def all_names(model: nn.Module) -> dict[int, tuple[Parameter, list[str]]]:
    """Return every parameter with all its names: tied ones have several.

    Returns:
        By the parameter's id; the names without what wrappers of torch put into them.
    """
    found: dict[int, tuple[Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        found.setdefault(id(parameter), (parameter, []))[1].append(name.removeprefix("module."))
    return found


def assign_rates(
    model: nn.Module,
    *,
    learning_rate: float,
    learning_rates: dict[str, float] | None,
    loraplus_ratio: float | None,
) -> dict[int, GroupRate]:
    """Say at which rate each trained parameter learns.

    A pattern is searched for in all names of a parameter, and the first that is found holds. LoRA+
    (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) divides what is left as its authors do:
    B matrices and vectors learn faster, adapters of embeddings at a rate of their own.

    Args:
        model: The model, with its adapter.
        learning_rate: Of parameters that nothing else is said about.
        learning_rates: Rates by pattern.
        loraplus_ratio: How many times `learning_rate` B matrices learn with.

    Returns:
        By the parameter's id.

    Raises:
        ConfigError: If a pattern has no effect, or if there is no LoRA to speed up.
    """
    labels = _labels(learning_rates or {})
    used = dict.fromkeys(learning_rates or {}, False)
    finds_lora = False
    assigned: dict[int, GroupRate] = {}
    trained = {i: named for i, named in all_names(model).items() if named[0].requires_grad}
    for i, (parameter, names) in trained.items():
        pattern = next((p for p in used if any(re.search(p, name) for name in names)), None)
        is_b = any("lora_B" in name for name in names)
        finds_lora |= is_b
        if pattern is not None:
            used[pattern] = True
            assigned[i] = GroupRate(labels[pattern], (learning_rates or {})[pattern])
        elif loraplus_ratio is None:
            assigned[i] = GroupRate("", learning_rate)
        elif any("lora_embedding" in name for name in names):
            assigned[i] = GroupRate("lora_embedding", _LORAPLUS_EMBEDDING_RATE)
        elif is_b or parameter.ndim == 1:
            assigned[i] = GroupRate("lora_B", learning_rate * loraplus_ratio)
        else:
            assigned[i] = GroupRate("", learning_rate)
    problems = [
        _explain_unused(pattern, model, [name for _, names in trained.values() for name in names])
        for pattern, was_used in used.items()
        if not was_used
    ]
    if loraplus_ratio is not None and not finds_lora:
        problems.append(
            f"loraplus_ratio = {loraplus_ratio}, and no trained parameter is a lora_B matrix: use "
            f"it with a LoRA adapter, or leave it out."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return assigned


def assign_rates_as_asked(model: nn.Module, args: Any) -> dict[int, GroupRate]:
    """Return what `assign_rates` does for training arguments."""
    return assign_rates(
        model,
        learning_rate=args.learning_rate,
        learning_rates=args.learning_rates,
        loraplus_ratio=args.loraplus_ratio,
    )


def _labels(patterns: dict[str, float]) -> dict[str, str]:
    """Name each pattern for the log; no two alike."""
    labels: dict[str, str] = {}
    for pattern in patterns:
        label = plain = group_label(pattern)
        number = 2
        while label in labels.values():
            label, number = f"{plain}_{number}", number + 1
        labels[pattern] = label
    return labels


def _explain_unused(pattern: str, model: nn.Module, trained: list[str]) -> str:
    start = f"learning_rates: {pattern!r}"
    if any(re.search(pattern, name) for name in trained):
        return f"{start} matches only parameters that patterns before it match: put it first."
    everything = [name for _, names in all_names(model).values() for name in names]
    frozen = [name for name in everything if re.search(pattern, name)]
    if frozen:
        return f"{start} matches only parameters that are not trained, such as {frozen[0]}."
    words = sorted({word for name in trained for word in (name, *name.split("."))})
    guess = nearest(pattern, words)
    hint = f"did you mean {guess}?" if guess else f"there are such as {', '.join(trained[:3])}."
    return f"{start} matches no parameter of the model; {hint}"


class ParameterGroups:
    """Splits the groups of a run's optimizer, and follows their learning rates.

    Attributes:
        are_split: Whether the run's optimizer has groups beside those of stock.
        rates: The learning rate of each group that has one of its own, in the last update.
    """

    def __init__(self) -> None:
        self.are_split = False
        self.rates: dict[str, float] = {}
        self._split: Any = None  # the optimizer whose groups were split
        self._described: list[list[Any]] | None = None

    @staticmethod
    def are_asked_for(args: Any) -> bool:
        """Return whether arguments give some parameters a rate of their own."""
        return bool(args.learning_rates) or args.loraplus_ratio is not None

    def create(self, trainer: Any, stock: Callable[[], Any], model: nn.Module | None) -> Any:
        """Let the stock code make the optimizer, then split its groups.

        Args:
            trainer: The trainer.
            stock: The ``create_optimizer`` behind ours.
            model: The wrapped model; by default the trainer's.

        Returns:
            The optimizer.

        Raises:
            ConfigError: If patterns have no effect, or the optimizer has no groups to split.
        """
        if trainer.optimizer is not None:  # the user's own, or that of the last call of train()
            return stock()
        model = trainer.model if model is None else model
        if not _steps_with_muon(trainer):
            optimizer = stock()
            if self.are_asked_for(trainer.args):
                self._split_groups(optimizer, model, trainer.args)
            return optimizer
        args = trainer.args
        refuse_muon(model, sharded_by=_splitting(trainer))
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "muon": muon_options(args.optim_args),
        }
        with changed(trainer, optimizer_cls_and_kwargs=(MuonWithAdamW, options)):
            optimizer = stock()
        self._split_groups(optimizer, model, args, matrices=find_hidden_matrices(model))
        return optimizer

    def _split_groups(
        self,
        optimizer: Any,
        model: nn.Module,
        args: Any,
        *,
        matrices: Collection[int] = (),
    ) -> None:
        assigned = assign_rates_as_asked(model, args)
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not stepped >= set(assigned):
            name = getattr(args.optim, "value", args.optim)
            raise ConfigError(
                f"learning_rates and loraplus_ratio need an optimizer that steps on the model's "
                f"parameters in groups, and optim = {name!r} does not: use another, or leave them "
                f"out."
            )
        split_groups(optimizer, assigned, matrices=matrices)
        names = all_names(model)
        self._split, self.are_split = optimizer, True
        self._described = [
            [
                group["label"],
                len(group["params"]),
                digest_of([names[id(p)][1] for p in group["params"]]),
            ]
            for group in optimizer.param_groups
        ]

    def check(self, trainer: Any) -> None:
        """Make sure that the optimizer the run steps with has the groups that were asked for.

        Raises:
            ConfigError: If somebody else made it.
        """
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        asked = [
            name for name in ("learning_rates", "loraplus_ratio") if getattr(trainer.args, name)
        ]
        if _steps_with_muon(trainer):
            asked.append("optim = 'muon'")
        if asked and optimizer is not self._split:
            raise ConfigError(
                f"{' and '.join(asked)}: no effect, for the optimizer was passed to the trainer, "
                f"or made by DeepSpeed or by a create_optimizer that does not call ours. Say it "
                f"there, and leave it out here."
            )

    def describe(self) -> list[list[Any]] | None:
        """Return label, size and digest of each group; None if none was split."""
        return self._described

    def note(self, optimizer: Any) -> None:
        """Read the rate that each group is about to be stepped with; stock logs the first's."""
        self.rates = {
            group["label"]: float(group["lr"])
            for group in optimizer.param_groups
            if group.get("label")
        }

    def metrics(self) -> dict[str, float]:
        """Return the rates for a log row, beside ``learning_rate``."""
        return {f"learning_rate/{label}": rate for label, rate in self.rates.items()}


def split_groups(
    optimizer: Any, assigned: dict[int, GroupRate], *, matrices: Collection[int] = ()
) -> None:
    """Split an optimizer's groups by learning rate, in place.

    What has no rate of its own stays where it was, in front: the first group's rate is the one that
    stock logs as ``learning_rate``.

    Args:
        optimizer: Just made.
        assigned: The rate of each parameter, by its id.
        matrices: Ids of parameters that Muon steps on; the optimizer is a `MuonWithAdamW` then.
    """
    kept, split = [], []
    for group in optimizer.param_groups:
        parts: dict[tuple[GroupRate, bool], list[Parameter]] = {}
        for p in group["params"]:
            parts.setdefault((assigned[id(p)], id(p) in matrices), []).append(p)
        left = [key for key in parts if not key[0].label and not key[1]]
        group["params"] = [p for key in left for p in parts.pop(key)]
        group["label"] = ""
        kept.append(group)
        for ((label, rate), is_matrix), parameters in parts.items():
            part = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
            lr = part["lr"]
            part["lr"] = lr.new_tensor(rate) if isinstance(lr, Tensor) else rate
            if is_matrix:
                optimizer.use_muon(part)
            split.append(part | {"params": parameters, "label": label})
    optimizer.param_groups[:] = [*kept, *split]


def _steps_with_muon(trainer: Any) -> bool:
    return trainer.args.optim == "muon" and trainer.optimizer_cls_and_kwargs is None


def _splitting(trainer: Any) -> str | None:
    """Name what splits weights or the optimizer between ranks."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "deepspeed" if trainer.is_deepspeed_enabled else "fsdp"
    if any(hasattr(p, "device_mesh") for p in trainer.model.parameters()):
        return "distributed_config"
    return None
