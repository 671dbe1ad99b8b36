"""Losses of TRL that add a mean over tokens to a mean over pairs: taken apart into two terms.

ORPO, CPO and TPO add the cross entropy of the better answer's tokens. It is the only cross entropy
they ask torch for, so it is seen when they do; what is left of the loss is the mean over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_gradacc.loss.terms import LossTerm, LossTerms
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = ["AddedMean", "find_added_mean"]


@dataclass(frozen=True)
class AddedMean:
    """A mean over tokens that is added to a mean over pairs.

    Attributes:
        weight: What it is multiplied by.
        count: Counts its tokens in collated inputs.
    """

    weight: float
    count: Callable[[Mapping[str, Any]], float]

    def count_terms(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """Count as a trainer's own ``count_terms`` would."""
        return {"tokens": self.count(inputs)}

    def take_apart(self, compute: Callable[[], Any]) -> Any:
        """Compute a loss, and return it in two terms; as it is if it took no such mean."""
        with _CrossEntropies() as seen:
            result = compute()
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        if len(seen.found) != 1 or not isinstance(loss, Tensor):
            return result
        mean, count = seen.found[0]
        tokens = self.weight * mean
        terms = LossTerms(tokens=LossTerm(tokens, count), pairs=loss - tokens.to(loss.device))
        return (terms, *outputs) if isinstance(result, tuple) else terms


class _CrossEntropies(TorchFunctionMode):
    """Sees the means of cross entropies that are taken while it is entered, and over how many."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_mean = kwargs.get("reduction", "mean") == "mean" and kwargs.get("weight") is None
        if func is functional.cross_entropy and is_mean:
            target = args[1] if len(args) > 1 else kwargs["target"]
            ignored = kwargs.get("ignore_index", IGNORE_INDEX)
            self.found.append((result, target.ne(ignored).sum()))
        return result


def find_added_mean(trainer: Any) -> AddedMean | None:
    """Return what a trainer of TRL adds to its mean over pairs, by its name; None if nothing."""
    names = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")}
    if "ORPOTrainer" in names:
        return AddedMean(1.0, _of_all_tokens if _is_causal(trainer) else _of_labels)
    if "CPOTrainer" in names and trainer.cpo_alpha != 0:
        shift = 1 if _is_causal(trainer) else 0
        return AddedMean(trainer.cpo_alpha, lambda inputs: _of_labels(inputs, shift=shift))
    if "TPOTrainer" in names and trainer.tpo_alpha != 0:
        return AddedMean(trainer.tpo_alpha, _of_references)
    return None


def _is_causal(trainer: Any) -> bool:
    return not getattr(trainer, "is_encoder_decoder", False)


def _of_all_tokens(inputs: Mapping[str, Any]) -> float:
    """ORPO takes the whole chosen text, its prompt too."""
    return float(inputs["chosen_attention_mask"][:, 1:].eq(1).sum())


def _of_labels(inputs: Mapping[str, Any], *, shift: int = 0) -> float:
    return float(inputs["chosen_labels"][:, shift:].ne(IGNORE_INDEX).sum())


def _of_references(inputs: Mapping[str, Any]) -> float:
    """TPO's rows lie in blocks: chosen, rejected, reference."""
    mask: Tensor = torch.chunk(inputs["completion_mask"], 3)[2]
    return float(mask[:, 1:].ne(0).sum())
