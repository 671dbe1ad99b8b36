"""Run a real trainer on one update of a zoo case and hand back what reached the optimizer."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradacc import GradAccArguments, GradAccTrainer, Update

from .reference import Batch, Gradient, gradient_of
from .zoo_rows import IGNORE_INDEX, LENGTHS, HeadRow

ROWS_PER_MICRO_BATCH = 3
EFFECTIVE_BATCH_SIZE = len(LENGTHS)
MICRO_BATCHES = -(-EFFECTIVE_BATCH_SIZE // ROWS_PER_MICRO_BATCH)


@dataclasses.dataclass
class Run:
    """What one trainer did with one update.

    Attributes:
        gradient: What the optimizer found in ``.grad``.
        micro_batches: The cut, as collated.
        warnings: What our trainer said about how the loss counts.
        loss: The logged training loss.
        shortcuts: Which ones ours took; empty of stock.
    """

    gradient: Gradient
    micro_batches: list[Batch]
    warnings: list[str]
    loss: float
    shortcuts: tuple[str, ...] = ()


def train_ours(model: nn.Module, rows: list[HeadRow], collator: Any, **options: Any) -> Run:
    """One update of ``GradAccTrainer``, three rows a micro-batch."""
    options.setdefault("effective_batch_size", len(rows))
    trainer_class = options.pop("trainer_class", GradAccTrainer)
    return _train(trainer_class, GradAccArguments, model, rows, collator, options)


def train_stock(model: nn.Module, rows: list[HeadRow], collator: Any, **options: Any) -> Run:
    """The same update by ``transformers.Trainer``, with as many accumulation steps."""
    options.setdefault("gradient_accumulation_steps", -(-len(rows) // ROWS_PER_MICRO_BATCH))
    return _train(Trainer, TrainingArguments, model, rows, collator, options)


def count_micro_batch(head: str, batch: Batch, *, shifts: bool) -> int:
    """Targets of a micro-batch, by a definition of our own."""
    if head in ("causal", "seq2seq", "mlm", "tok"):
        labels = batch["labels"][:, 1:] if head == "causal" and shifts else batch["labels"]
        return int((labels != IGNORE_INDEX).sum())
    return len(batch["input_ids"])


def _train(
    trainer_class: type[Trainer],
    arguments_class: type[TrainingArguments],
    model: nn.Module,
    rows: list[HeadRow],
    collator: Any,
    options: dict[str, Any],
) -> Run:
    trainer_options = {
        key: options.pop(key)
        for key in ("compute_loss_func", "optimizers", "processing_class")
        if key in options
    }
    grab = _GrabGradient()
    inputs: list[Batch] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            output_dir=folder,
            **{
                "max_steps": 1,
                "per_device_train_batch_size": ROWS_PER_MICRO_BATCH,
                "max_grad_norm": 0.0,
                "learning_rate": 1e-3,
                "use_cpu": True,
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
                **options,
            },
        )
        trainer = _recording(trainer_class, inputs)(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[grab],
            **trainer_options,
        )
        result = trainer.train()
    facts = getattr(trainer, "facts", None)
    said = list(facts.warnings) if facts is not None else []
    taken = getattr(trainer, "shortcuts", None)
    names = ("target_only_logits", "chunked_loss", "drop_mask", "packed")
    shortcuts = tuple(name for name in names if getattr(taken, name, False))
    return Run(grab.gradient, inputs, said, result.training_loss, shortcuts)


class _GrabGradient(TrainerCallback):
    """Copies the gradient just before the optimizer's step."""

    gradient: Gradient

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradient = gradient_of(model)


def _recording(trainer_class: type[Trainer], seen: list[Batch]) -> type[Trainer]:
    """Record each micro-batch as it was collated, before any shortcut changes it."""

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            batches = [mb.inputs for mb in inputs] if isinstance(inputs, Update) else [inputs]
            seen.extend(dict(batch) for batch in batches)
            return super().training_step(model, inputs, num_items_in_batch)

    Recording.__name__ = trainer_class.__name__
    return Recording
