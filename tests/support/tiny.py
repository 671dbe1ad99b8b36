"""A tiny model, its rows and its trainer, for hundreds of runs; and a recorder of gradients."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.tracking.phases import PHASE_KEYS

Row = dict[str, list[int]]

VOCABULARY = 48
CLOCK_KEYS = {"hours_left", "target_tokens_per_second", "step_seconds", *PHASE_KEYS.values()}
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
}
"""Training arguments: plain SGD, nothing clipped, nothing written."""


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes)).to(dtype)


def ragged_rows(count: int, *, seed: int = 0, longest: int = 14) -> list[Row]:
    """Rows of every length, each with another number of targets; some keep their first label."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(3, longest)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        masked = draw.choice([0, 0, *range(length - 1)])
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [-100] * masked + ids[masked:],
            }
        )
    return rows


def spaced_rows(count: int = 24) -> list[Row]:
    """Rows of 4 to 16 tokens below 61, the same on every machine; the first two are no target."""
    rows = []
    for index in range(count):
        length = 4 + 5 * index % 13
        ids = [(7 * index + 3 * position) % 60 + 1 for position in range(length)]
        labels = [-100, -100, *ids[2:]]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in fills.items()
        if key in rows[0]
    }


class Recorder(TrainerCallback):
    """Keeps what a run did: the gradient of each update, and every event."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.events: list[str] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.events.append("pre_optimizer_step")
        self.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def _note(event: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(event.removeprefix("on_"))

    return method


for _event in ("train_begin", "epoch_begin", "step_begin", "substep_end", "optimizer_step"):
    setattr(Recorder, f"on_{_event}", _note(f"on_{_event}"))
for _event in ("step_end", "epoch_end", "train_end", "log", "evaluate", "save"):
    setattr(Recorder, f"on_{_event}", _note(f"on_{_event}"))


def make_trainer(
    out: Any,
    rows: Any,
    *,
    model: nn.Module | None = None,
    trainer_class: Any = GradAccTrainer,
    arguments_class: Any = GradAccArguments,
    callbacks: Sequence[Any] = (),
    eval_dataset: Any = None,
    data_collator: Any = pad,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Make a trainer that steps with plain SGD, clips nothing and writes nothing by default."""
    return trainer_class(
        model=tiny_llama() if model is None else model,
        args=arguments_class(output_dir=str(out), **PLAIN | options),
        data_collator=data_collator,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
        **trainer_options or {},
    )


def log_rows(trainer: Any) -> list[dict[str, float]]:
    """The training rows of a run's log."""
    return [row for row in trainer.state.log_history if "loss" in row]


def timeless_log_rows(trainer: Any) -> list[dict[str, float]]:
    """The same rows without what a clock measured: two runs can be compared by them."""
    return [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in log_rows(trainer)]
