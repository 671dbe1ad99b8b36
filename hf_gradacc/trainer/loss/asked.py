"""Notice that a model has changed since it was asked how its loss counts, and ask it again.

A model is asked before the first update, so before ``on_train_begin``. A callback may put hooks on
it there or later, give it another loss or another attention, or widen its vocabulary. What was
found of the model before is then not true of the one that trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.foreign_hooks import HOOKS, foreign_hooks
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.ranks.collectives import largest_over_ranks
from hf_gradacc.trainer.loss.asking import find_models

__all__ = ["Asked", "as_they_stand"]

logger = logging.get_logger(__name__)

_DROPOUTS = {"attention_dropout", "attn_dropout", "dropout", "dropout_p", "p"}
_IDLE = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Settings that do not change what is trained. Saving writes some of them, generation the cache."""

_BY_NAME = ("layout", "target_only_logits", "chunked_loss", "drop_attention_mask")
"""Options that ask for a way to the loss."""

_MOST_ANSWERS = 6
"""Whoever changes a model in each update would have it asked in each."""


@dataclass(frozen=True)
class _Answer:
    """What a model was like when it was asked, and what was found."""

    standing: dict[str, Any]
    facts: LossFacts
    shortcuts: Shortcuts | None


class Asked:
    """What a trainer's model was like whenever it was asked."""

    def __init__(self) -> None:
        self._models: list[nn.Module] = []
        self._answers: list[_Answer] = []
        self._standing: dict[str, Any] | None = None
        self._is_plain = False

    def note(self, trainer: Any) -> None:
        """Note what the model was like that has just been asked."""
        wrapped, bare = trainer.model_wrapped, trainer.model
        self._models = [m for m in find_models(trainer) if m is not wrapped or m is bare]
        self._standing, self._is_plain = self._look_at(trainer), False
        self._answers.append(_Answer(self._standing, trainer.facts, trainer.shortcuts))

    def holds(self, trainer: Any) -> bool:
        """Return whether the model is as it was when it was asked."""
        return self._standing is None or self._standing == self._look_at(trainer)

    def _look_at(self, trainer: Any) -> dict[str, Any]:
        own = [vars(trainer).get(name) for name in ("model", "compute_loss", "training_step")]
        functions = [trainer.compute_loss_func, trainer.label_smoother, *own]
        return {**as_they_stand(self._models), "the trainer's loss": [id(f) for f in functions]}

    def look_again(self, trainer: Any, model: nn.Module, *, together: bool) -> None:
        """Ask the model again if it has changed.

        Within an epoch, ranks would have to tell each other in each update whether theirs has. So
        if there are several, a changed model computes rows as they are until the next one begins.

        Args:
            trainer: The trainer. If no rows were read ahead, its ``facts`` are None afterwards.
            model: The model, wrapped or bare.
            together: All ranks look at this point, so that they can ask together.
        """
        if self._standing is None or trainer.facts is None:
            return
        now, before = self._look_at(trainer), self._standing
        has_changed = now != before
        if together:
            mine = int(has_changed or self._is_plain)
            has_changed = bool(largest_over_ranks(mine, device=trainer.args.device))
        if not has_changed:
            return
        why = f"{_changed(before, now)} changed since the model was asked how its loss counts"
        is_alone = trainer.rank_layout.world_size == 1
        known = next((answer for answer in self._answers if answer.standing == now), None)
        if is_alone and known is not None:
            self._standing, self._is_plain = now, False
            trainer._take_answer(known.facts, known.shortcuts)
        elif together or (is_alone and len(self._answers) < _MOST_ANSWERS):
            logger.info(f"{why}: it is again")
            trainer.facts = None
            trainer._ask_with_sample(model, insists=False)
            _tell_what_is_lost(trainer, why)
        else:
            self._standing, self._is_plain = now, True
            if trainer.shortcuts is not None:  # the loader goes on planning, alike on all ranks
                trainer._micro_batch_step.shortcuts = Shortcuts.none(why)
            logger.warning_once(
                f"{why}. Until it is asked again, at the begin of the next epoch, rows are "
                f"computed as they are and with all logits, and the loss is taken to be a mean "
                f"over the same as before."
            )


def as_they_stand(models: Iterable[nn.Module]) -> dict[str, Any]:
    """Describe what decides how models compute, but for weights: equal if nothing was put on them.

    Weights are trained, parameters frozen and thawed, coefficients annealed; none of this changes
    which ways lead to the same loss. It takes a few microseconds a module.

    Args:
        models: The model, and others whose answers enter the loss.

    Returns:
        Values that can be compared, by what they are in plain words.
    """
    modules: list[int | None] = []
    hooks: list[Any] = []
    forwards: list[Any] = []
    losses: list[Any] = []
    settings: dict[int, Any] = {}
    drops = False
    for place, module in enumerate(part for model in models for part in model.modules()):
        attributes = vars(module)
        modules.append(id(module))
        if any(map(attributes.get, HOOKS)):
            hooks += [(place, name) for name in foreign_hooks(module)]
        if "forward" in attributes:
            forwards.append((place, id(attributes["forward"])))
        if not drops and not _DROPOUTS.isdisjoint(attributes):
            rates = [attributes.get(name) for name in _DROPOUTS]
            drops = any(isinstance(rate, float) and rate > 0 for rate in rates)
        # Not the shape of a weight, which ZeRO-3 takes apart between forwards.
        if "out_features" in attributes or "num_embeddings" in attributes:
            modules += [attributes.get("out_features"), attributes.get("num_embeddings")]
        elif isinstance(module, PreTrainedModel):
            losses.append((place, id(attributes.get("_loss_function"))))
            settings.setdefault(id(module.config), _set_in(module.config))
    return {
        "its layers": modules,
        "hooks on it": hooks,
        "its forward": forwards,
        "its loss function": losses,
        "its configuration": list(settings.values()),
        "its dropout": drops,
    }


def _set_in(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration; of a coefficient only whether it is zero."""
    settings: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in _IDLE:
            continue
        if isinstance(value, float):
            settings[name] = value != 0
        elif value is None or isinstance(value, bool | int | str):
            settings[name] = value
        elif isinstance(value, Mapping | list | tuple):
            settings[name] = repr(value)
    return settings


def _tell_what_is_lost(trainer: Any, why: str) -> None:
    """Say which ways to the loss were asked for by name and are not taken any more."""
    if trainer.facts is None or trainer.shortcuts is None:
        return
    for option in _BY_NAME:
        wanted = getattr(trainer.args, option)
        reason = trainer.shortcuts.reason("shared_prefix" if wanted == "shared_prefix" else option)
        if wanted not in (None, False, "auto", "padded") and reason:
            logger.warning_once(f"{why}. {option} = {wanted!r} is not followed any more: {reason}.")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name in plain words what has changed."""
    names = [name for name, value in now.items() if before[name] != value]
    return ", ".join(names) or "a model of another rank"
