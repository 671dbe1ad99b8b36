"""Rows of a few prompts each with several answers, and what of a run was computed as trees."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_gradacc.loss.trees import hooks as tree_hooks

from .alike import training_apart
from .tiny import VOCABULARY, Row

__all__ = ["Calls", "rows_of_prompts", "watching_calls"]


def rows_of_prompts(
    count: int, *, seed: int = 0, prompts: int = 3, length: int = 24, longest: int = 6
) -> list[Row]:
    """Rows in no order, whose answers have one to so many tokens.

    Every fourth row is trained on a part of its prompt as well, and one keeps its first label, so
    that tokens which rows have in common are targets of some of them.

    Args:
        count: Rows.
        seed: Of everything.
        prompts: How many there are; each row has one of them.
        length: Tokens of each prompt, give or take three.
        longest: Most tokens of an answer.
    """
    draw = random.Random(seed)

    def some(number: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(number)]

    begins = [some(length + draw.randint(-3, 3)) for _ in range(prompts)]
    rows = []
    for index in range(count):
        prompt = draw.choice(begins)
        ids = prompt + some(draw.randint(1, longest))
        first = 0 if index == 1 else len(prompt) // 2 if index % 4 == 0 else len(prompt)
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * first + ids[first:],
            }
        )
    return rows


@dataclass
class Calls:
    """Calls of bodies that hooks stood in front of, and which of them computed trees.

    Attributes:
        of_trees: One entry for each, in order.
        trained: Those of training.
        widths: Tokens that were computed in each.
    """

    of_trees: list[bool] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    @property
    def num_trees(self) -> int:
        return sum(self.of_trees)

    @property
    def num_trained_trees(self) -> int:
        return sum(a and b for a, b in zip(self.of_trees, self.trained, strict=True))


@contextlib.contextmanager
def watching_calls() -> Iterator[Calls]:
    """See which calls of bodies compute trees for as long as the context lasts."""
    calls, before = Calls(), tree_hooks._Hooks.before

    with training_apart() as is_training:

        def note(self: Any, body: Any, args: Any, kwargs: Any) -> Any:
            changed = before(self, body, args, kwargs)
            calls.of_trees.append(changed is not None)
            calls.trained.append(is_training())
            calls.widths.append(0 if changed is None else self.running.ids.numel())
            return changed

        tree_hooks._Hooks.before = note  # type: ignore[method-assign]
        try:
            yield calls
        finally:
            tree_hooks._Hooks.before = before  # type: ignore[method-assign]
