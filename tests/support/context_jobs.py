"""Context parallelism on CPUs: all of it but torch's ring attention, which has no kernel there.

FSDP2, torch's ``context_parallel`` and the way it cuts rows are real. Attention is a stand-in that
gathers the keys and values of all ranks, and masks by the place each token has in its row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig
from torch import Tensor

from hf_gradacc.ranks import engine as engines
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.trainer import mixin

from .rank_jobs import (
    FSDP2,
    WholeGradients,
    _note_membership,
    allow_sharding_on_cpu,
    whole,
)
from .reference import float64_everywhere
from .sequence_jobs import NUM_ROWS, OPTIONS, answers, model_of
from .tiny import make_trainer, ragged_rows, timeless_log_rows


def place_in_row(length: int, rank: int, ranks: int) -> Tensor:
    """The places of a rank's tokens: one piece from the front, one from the back."""
    piece = length // 2
    front = torch.arange(piece) + rank * piece
    back = torch.arange(piece) + (2 * ranks - 1 - rank) * piece
    return torch.cat([front, back])


class Gathered(torch.autograd.Function):
    """Joins the parts of all ranks along a row; sums what all ranks say of each part's gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, part.shape[2]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.split(ctx.length, dim=2)[dist.get_rank(ctx.group)], None


@contextlib.contextmanager
def gathering_attention() -> Iterator[None]:
    """Let a model attend to rows that are split between ranks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, split = ALL_ATTENTION_FUNCTIONS["sdpa"], Accelerator.maybe_context_parallel
    meshes: list[Any] = []

    @contextlib.contextmanager
    def noting(self: Any, **kwargs: Any) -> Iterator[None]:
        meshes.append(self.torch_device_mesh["cp"])
        try:
            with split(self, **kwargs):
                yield
        finally:
            meshes.pop()

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if not meshes:
            return plain(module, query, key, value, mask, **kwargs)
        mesh = meshes[-1]
        rank, ranks, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
        keys, values = (Gathered.apply(x.contiguous(), group) for x in (key, value))
        length = query.shape[2]
        places = torch.cat([place_in_row(length, r, ranks) for r in range(ranks)])
        own = place_in_row(length, rank, ranks)
        scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(places[None, :] > own[:, None], -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    Accelerator.maybe_context_parallel = noting
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        Accelerator.maybe_context_parallel = split


def train_in_ring(scenarios: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario in one process group."""
    allow_sharding_on_cpu()
    engines.can_attend_in_ring = lambda device: True
    return {name: _train(**scenario) for name, scenario in scenarios.items()}


def _train(*, dp_shard_size: int = 1, mistake: str | None = None, **options: Any) -> dict[str, Any]:
    recorder = WholeGradients()
    with (
        tempfile.TemporaryDirectory() as out,
        float64_everywhere(),
        gathering_attention(),
        break_on_purpose(mistake),
    ):
        trainer = make_trainer(
            out,
            answers(NUM_ROWS),
            model=model_of(),
            callbacks=[recorder],
            eval_dataset=ragged_rows(7, seed=5),
            parallelism_config=ParallelismConfig(cp_size=2, dp_shard_size=dp_shard_size),
            **{**OPTIONS, **FSDP2, **options},
        )
        seen = _note_membership(trainer)
        trainer.train()
        return {
            "gradients": recorder.gradients,
            "seen": seen,
            "weights": {n: whole(p.detach()).clone() for n, p in trainer.model.named_parameters()},
            "logs": timeless_log_rows(trainer),
            "eval_loss": trainer.evaluate()["eval_loss"],
            "layout": trainer.rank_layout,
        }


@contextlib.contextmanager
def break_on_purpose(mistake: str | None) -> Iterator[None]:
    """Make one of the mistakes that are made with split rows."""
    once, rows_for_ring = RankLayout.once, mixin.rows_for_ring

    def shifted_after(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = rows_for_ring(inputs, *args, **kwargs)
        return {key: value for key, value in rows.items() if key != "shift_labels"}

    if mistake == "counted by every rank":
        RankLayout.once = lambda self, counts: counts
    elif mistake == "shifted after splitting":
        mixin.rows_for_ring = shifted_after
    else:
        assert mistake is None
    try:
        yield
    finally:
        RankLayout.once, mixin.rows_for_ring = once, rows_for_ring
