"""Losses that compare rows with each other, their models, and a plain loop of two passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from hf_gradacc.loss.coupled.cuts import find_replay
from hf_gradacc.loss.coupling import Exchange, ForwardEnded
from hf_gradacc.updates.batch import slice_rows
from hf_gradacc.updates.collator import make_micro_batch

Compute = Callable[[Mapping[str, Any]], Tensor]


def tiny_bert(*, seed: int = 0, dropout: float = 0.0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config).double()


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": 60, "max_position_embeddings": 16} | size
    tokens = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    image = {"image_size": 16, "patch_size": 8} | size
    config = CLIPConfig(text_config=text | tokens, vision_config=image, projection_dim=8)
    return CLIPModel(config).double()


def rows_of_text(count: int = 14, *, width: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Rows of unequal lengths with a class each; ``other`` is a second view of each row."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, width), generator=draw)
    lengths = torch.randint(3, width + 1, (count,), generator=draw)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.arange(count) % 3,
        "other": torch.randint(3, 60, (count, width), generator=draw),
    }


def sup_con(vectors: Tensor, labels: Tensor, scale: Any = 4.0) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020): rows of a class against all others."""
    vectors = F.normalize(vectors, dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (vectors @ vectors.T * scale).masked_fill(itself, -1e9)
    positive = (labels[:, None] == labels) & ~itself
    logs = scores - scores.logsumexp(1, keepdim=True)
    return -((logs * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def info_nce(a: Tensor, b: Tensor, scale: Any = 4.0) -> Tensor:
    scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * scale
    return F.cross_entropy(scores, torch.arange(len(a), device=a.device))


class SupCon(nn.Module):
    """A model that has its loss inside, with a temperature of its own beside the network."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.bert = tiny_bert(dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(16, 8).double()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def vectors(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.project(self.dropout((hidden * mask).sum(1) / mask.sum(1)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
        vectors = self.vectors(input_ids, attention_mask)
        return {"loss": sup_con(vectors, labels, self.scale), "vectors": vectors}


def find(model: nn.Module, compute: Compute, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Find the two passes of a loss, as a trainer would ask for them."""
    trainer = options.pop("trainer", None) or SimpleNamespace(model_wrapped=model)
    sample = slice_rows(inputs, range(4))
    parts = [slice_rows(sample, [0, 1]), slice_rows(sample, [2, 3])]
    was_training = model.training
    model.eval()
    options = {"dtype": torch.float64} | options
    found = find_replay(trainer, model, sample, parts, compute=compute, **options)
    model.train(was_training)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_gradient(model: nn.Module, compute: Compute, inputs: Any) -> dict[str, Tensor]:
    """One forward and backward of all rows, by torch alone."""
    model.zero_grad()
    compute(inputs).backward()
    return gradients(model)


def cut(inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Any]:
    """Cut rows into micro-batches, each trimmed to its own width."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = []
    for start, size in zip(starts, sizes, strict=True):
        rows = range(start, start + size)
        part = slice_rows(inputs, rows)
        if "attention_mask" in part:
            width = int(part["attention_mask"].sum(1).max())
            for key in ("input_ids", "attention_mask"):
                part[key] = part[key][:, :width]
        found.append(make_micro_batch(part, indices=tuple(rows), places=tuple(rows)))
    return found


def two_passes(
    replay: Any,
    model: nn.Module,
    compute: Compute,
    micro_batches: Sequence[Any],
    *,
    exchange: Exchange | None = None,
    may_end: bool = True,
) -> tuple[dict[str, Tensor], float]:
    """Run an update in two passes; return its gradient and loss."""
    model.zero_grad()
    replay.begin()
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(i)
        with (
            torch.no_grad(),
            contextlib.suppress(ForwardEnded),
            replay.gathering(micro_batch, may_end=may_end),
        ):
            compute(dict(micro_batch.inputs))
    replay.couple(exchange or Exchange())
    total = 0.0
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(i)
        with replay.applying(i, scale=3.0):
            own = compute(dict(micro_batch.inputs))
            loss = replay.loss_of(own) / 3.0
            loss.backward()
        total += loss.item()
        del own, loss  # as the stock step does
    return gradients(model), total
