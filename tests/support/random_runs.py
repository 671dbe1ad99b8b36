"""Runs drawn from a number: rows that share in random ways, cut in random ways."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support.hooks import of_no_user

from hf_gradacc import GradAccTrainer

from .kept_rows import keeping_always, watching_kept
from .reference import Gradient, float64_everywhere, gradient_of
from .tiny import VOCABULARY, Row, make_trainer, tiny_llama

__all__ = ["RandomRun", "random_rows", "random_settings", "run_from"]


def random_rows(draw: random.Random, count: int) -> list[Row]:
    """Rows behind beginnings behind beginnings; some are there twice, some are a beginning alone.

    Tokens of a beginning are targets of some rows; a few rows have no target.
    """

    def some(number: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(number)]

    heads = [some(draw.randint(2, 24)) for _ in range(draw.randint(1, 3))]
    for _ in range(draw.choice([0, 3, 6])):
        heads.append(draw.choice(heads)[:40] + some(draw.randint(1, 8)))
    rows: list[Row] = []
    for _ in range(count):
        kind = draw.random()
        ids = draw.choice(heads) + some(draw.choice([1, 1, 2, 3, 5, 9]))
        if kind < 0.1:
            ids = some(draw.randint(2, 30))
        elif kind < 0.2:
            ids = list(draw.choice(heads))
        elif kind < 0.3 and rows:
            ids = list(draw.choice(rows)["input_ids"])
        first = draw.choice([0, 1, draw.randrange(len(ids)), len(ids) - 1, len(ids)])
        labels = [-100] * first + ids[first:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def random_settings(draw: random.Random, num_rows: int) -> dict[str, Any]:
    """Settings of which none may change a gradient."""
    settings: dict[str, Any] = {
        "layout": draw.choice(["auto", "shared_prefix", "shared_prefix"]),
        "num_train_epochs": draw.choice([1, 2]),
        "group_by_prefix": draw.random() < 0.3,
        "target_only_logits": draw.choice([None, False]),
    }
    if draw.random() < 0.3:
        settings["tokens_per_update"] = draw.choice([30, 100, 200])
    else:
        settings["effective_batch_size"] = draw.choice([2, 5, 13, num_rows])
    if draw.random() < 0.5:
        settings["per_device_train_batch_size"] = draw.choice([1, 2, 3, 5])
    else:
        settings["max_tokens_per_micro_batch"] = draw.choice([20, 24, 40, 64, 100])
    if not settings["group_by_prefix"] and draw.random() < 0.3:
        settings["noise_scale_every"] = draw.choice([1, 2, 3])
    return settings


@dataclass
class RandomRun:
    """What a run from a number did.

    Attributes:
        rows: Its rows.
        settings: Its settings.
        trainer: Its trainer.
        members: The rows of each update that had any, by the update.
        weights: What weights were before each update.
        gradients: The gradient of each update.
        computed: Tokens that went through the first layer in each update.
        num_kept: Beginnings that were kept.
    """

    rows: list[Row]
    settings: dict[str, Any]
    trainer: Any = None
    members: list[list[int]] = field(default_factory=list)
    weights: list[Gradient] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    num_kept: int = 0


@contextlib.contextmanager
def run_from(seed: int) -> Iterator[RandomRun]:
    """Train a tiny Llama in float64 with everything drawn from a number."""
    draw = random.Random(seed)
    rows = random_rows(draw, draw.choice([7, 16, 30]))
    run = RandomRun(rows, random_settings(draw, len(rows)))

    class Notes(GradAccTrainer):
        def training_update(self, model: Any, update: Any) -> Any:
            run.members.append([index for micro_batch in update for index in micro_batch.rows])
            run.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
            run.computed.append(0)
            loss = super().training_update(model, update)
            run.gradients.append(gradient_of(model))
            return loss

    def count(layer: Any, args: Any, output: Any) -> None:
        if layer.training and run.computed:
            run.computed[-1] += args[0].shape[0] * args[0].shape[1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(float64_everywhere())
        stack.enter_context(keeping_always())
        kept = stack.enter_context(watching_kept())
        out = stack.enter_context(tempfile.TemporaryDirectory())
        model = tiny_llama(attn_implementation=draw.choice(["sdpa", "sdpa", "eager"]))
        handle = model.model.layers[0].register_forward_hook(of_no_user(count))
        if draw.random() < 0.3:
            model.model.embed_tokens.requires_grad_(False)
            model.model.layers[0].requires_grad_(False)
        run.trainer = make_trainer(out, rows, model=model, trainer_class=Notes, **run.settings)
        run.trainer.train()
        handle.remove()
        run.num_kept = len(kept)
        yield run
