"""Trainings with a loss of all rows of an update, on one rank or several."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc import GradAccTrainer

from .contrastive import gradients, rows_of_text, sup_con, tiny_bert
from .tiny import Recorder, make_trainer

ROWS = rows_of_text(15)


class Embedder(nn.Module):
    """Vectors of rows, and the scale that their loss multiplies by.

    Args:
        dropout: How much.
        fails: In which pass a micro-batch of more than two rows does not fit: "first" or "second".
    """

    def __init__(self, *, dropout: float = 0.0, fails: str = "") -> None:
        super().__init__()
        self.bert = tiny_bert(dropout=dropout)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.fails = fails
        # No plain number: that would be put back with all that a first pass leaves behind.
        self.failures = SimpleNamespace(count=0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        is_failing = self.fails == ("second" if torch.is_grad_enabled() else "first")
        if is_failing and self.training and len(input_ids) > 2:
            self.failures.count += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        vectors = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        return {"vectors": vectors, "scale": self.scale}


class AllRows(GradAccTrainer):
    def compute_row_outputs(self, model: Any, inputs: Any) -> Any:
        return model(inputs["input_ids"], inputs["attention_mask"])

    def compute_update_loss(self, outputs: Any, inputs: Any) -> Tensor:
        return loss_of(outputs, inputs["labels"])


def loss_of(outputs: Any, labels: Tensor) -> Tensor:
    """A contrastive loss, and a term that one row alone has, too."""
    vectors = outputs["vectors"].to(torch.float64)
    return sup_con(vectors, labels, outputs["scale"]) + (vectors[:, 0] ** 2).mean()


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    width = int(batch["attention_mask"].sum(1).max())
    return {key: value[:, :width] if value.ndim > 1 else value for key, value in batch.items()}


def dataset() -> list[dict[str, Tensor]]:
    keys = ("input_ids", "attention_mask", "labels")
    return [{key: ROWS[key][i] for key in keys} for i in range(15)]


def train(
    *,
    dropout: float = 0.0,
    fails: str = "",
    resume: bool = False,
    out: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train; return gradients, the rows of each update, losses, and how often memory ran out."""
    recorder, model = Recorder(), Embedder(dropout=dropout, fails=fails)
    options = {
        "learning_rate": 0.0,
        "effective_batch_size": 14,
        "per_device_train_batch_size": 3,
        "label_names": ["labels"],
    } | options
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            out or folder,
            dataset(),
            model=model,
            trainer_class=AllRows,
            data_collator=collate,
            callbacks=[recorder],
            **options,
        )
        trainer.train(resume_from_checkpoint="auto" if resume else None)
    name = len("module.")
    return {
        "gradients": [
            {key[name:] if key.startswith("module.") else key: g for key, g in of.items()}
            for of in recorder.gradients
        ],
        "updates": trainer.get_train_dataloader().updates.batch_sampler.membership(0),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "failures": model.failures.count,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "notes": trainer.facts.notes,
    }


def reference(rows: Sequence[int]) -> tuple[dict[str, Tensor], float]:
    """One forward and backward of all rows of an update."""
    model = Embedder().train()
    batch = collate([dataset()[i] for i in rows])
    loss = loss_of(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
    loss.backward()
    return gradients(model), loss.item()
