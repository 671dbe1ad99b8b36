"""What the tests of rows that several ranks compute together run on each rank."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_gradacc import GradAccError
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.trainer import mixin
from hf_gradacc.trainer.loss import row_parts

from .rank_jobs import _note_membership
from .reference import float64_everywhere, reference_gradient
from .resume_jobs import StopAfter
from .tiny import PLAIN, make_trainer, pad, ragged_rows, timeless_log_rows, tiny_llama
from .zero_jobs import ZeroTrainer, allow_float64, config_of, set_up, whole_gradient, whole_weights

NUM_ROWS = 9
OPTIONS: dict[str, Any] = {
    "effective_batch_size": 4,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "include_num_input_tokens_seen": True,
}


def answers(count: int, *, seed: int = 3) -> list[Any]:
    """Rows of every length; of each second one only the last token is a target.

    So the first half of a row often holds no target at all.
    """
    rows = ragged_rows(count, seed=seed)
    for row in rows[::2]:
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    return rows


def model_of(attention: str = "sdpa") -> Any:
    return tiny_llama(attn_implementation=attention, num_key_value_heads=2)


@functools.cache
def expected() -> list[Any]:
    """The gradients of all updates, by a model that is not split."""
    gradients = []
    with float64_everywhere():
        model, rows = model_of("eager"), answers(NUM_ROWS)
        for start in range(0, NUM_ROWS, 4):
            gradients.append(reference_gradient(model, rows[start : start + 4], pad))
            with torch.no_grad():
                for name, gradient in gradients[-1].items():
                    model.get_parameter(name).sub_(0.1 * gradient)
    return gradients


def split_rows(num_replicas: int) -> ParallelismConfig:
    """Split each row between two ranks, and the ranks into so many pairs."""
    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
    return ParallelismConfig(sp_size=2, dp_replicate_size=num_replicas, sp_handler=handler)


def train_rows_in_parts(
    scenarios: dict[str, dict[str, Any]], *, num_replicas: int = 1
) -> dict[str, Any]:
    """Train each scenario in one process group, and give what the ranks must agree on."""
    set_up()
    allow_float64()
    return {name: _train(num_replicas, **scenario) for name, scenario in scenarios.items()}


def _train(num_replicas: int, *, stage: int | None, **options: Any) -> dict[str, Any]:
    resume, stop = options.pop("resume", None), options.pop("stop", None)
    mistake, out = options.pop("mistake", None), options.pop("out", None)
    if stage is not None:
        options["deepspeed"] = config_of(stage)
        options["parallelism_config"] = split_rows(num_replicas)
    with (
        tempfile.TemporaryDirectory() as own_out,
        float64_everywhere(),
        break_on_purpose(mistake),
    ):
        trainer = make_trainer(
            out or own_out,
            answers(NUM_ROWS),
            model=model_of(),
            trainer_class=ZeroTrainer,
            callbacks=[StopAfter(stop)],
            eval_dataset=ragged_rows(7, seed=5),
            **{**OPTIONS, **options},
        )
        seen = _note_membership(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return {
            "gradients": trainer.gradients,
            "seen": seen,
            "weights": whole_weights(trainer.model),
            "logs": timeless_log_rows(trainer),
            "eval_loss": trainer.evaluate()["eval_loss"],
            "layout": trainer.rank_layout,
        }


@contextlib.contextmanager
def break_on_purpose(mistake: str | None) -> Iterator[None]:
    """Make one of the mistakes that are made with split rows."""
    once, part_of_rows, loss_of_part = RankLayout.once, row_parts.part_of_rows, mixin.loss_of_part

    def shifted_after(inputs: Any, layout: RankLayout) -> Any:
        part = part_of_rows({**inputs, "shift_labels": inputs["labels"]}, layout)
        labels = part["shift_labels"][:, 1:]
        return {**part, "shift_labels": functional.pad(labels, (0, 1), value=-100)}

    def mean_of_part(model: Any, inputs: Any, *, count: Any, **kwargs: Any) -> Any:
        part = part_of_rows(inputs, kwargs["layout"])
        own = (part["shift_labels"] != -100).sum().clamp(min=1)
        return loss_of_part(model, inputs, count=own * kwargs["layout"].row_parts, **kwargs)

    if mistake == "counted by every rank":
        RankLayout.once = lambda self, counts: counts
    elif mistake == "shifted after splitting":
        row_parts.part_of_rows = shifted_after
    elif mistake == "a mean of each part":
        mixin.loss_of_part = mean_of_part
    else:
        assert mistake is None
    try:
        yield
    finally:
        RankLayout.once = once
        row_parts.part_of_rows = part_of_rows
        mixin.loss_of_part = loss_of_part


def train_with_stock(stage: int) -> Any:
    """Train one update of one row with the stock Trainer, on two ranks that split it."""
    set_up()
    allow_float64()
    gradients: list[Any] = []

    def collate(rows: Any) -> Any:
        batch = pad(rows)
        more = 16 - batch["input_ids"].shape[1]
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {k: functional.pad(v, (0, more), value=fills[k]) for k, v in batch.items()}
        batch["position_ids"] = torch.arange(16).expand(len(rows), -1).contiguous()
        return batch

    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    step = DeepSpeedEngine.step

    def noting_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = self.module.named_parameters()
        gradients.append({name: whole_gradient(p).clone() for name, p in named})
        return step(self, *args, **kwargs)

    DeepSpeedEngine.step = noting_step
    with tempfile.TemporaryDirectory() as out, float64_everywhere():
        trainer = Trainer(
            model=model_of(),
            args=TrainingArguments(
                output_dir=out,
                per_device_train_batch_size=1,
                train_sampling_strategy="sequential",
                deepspeed=config_of(stage),
                parallelism_config=split_rows(1),
                **{**PLAIN, "max_steps": 1},
            ),
            data_collator=collate,
            train_dataset=ragged_rows(2, seed=3),
        )
        deepspeed.init_distributed(dist_backend="gloo")
        trainer.train()
    DeepSpeedEngine.step = step
    return gradients[0]


def ask_for_what_needs_whole_rows() -> dict[str, str]:
    """Ask for losses that parts of rows do not add up to; give what each is answered."""
    from .rank_jobs import loss_by_count

    set_up()
    answered = {}
    for name, options in {
        "a loss of one's own": {"trainer_options": {"compute_loss_func": loss_by_count}},
        "smoothed labels": {"label_smoothing_factor": 0.1},
        "packing": {"layout": "packed"},
    }.items():
        with tempfile.TemporaryDirectory() as out:
            try:
                make_trainer(
                    out,
                    answers(4),
                    model=model_of().float(),
                    deepspeed=config_of(1),
                    parallelism_config=split_rows(1),
                    **{**OPTIONS, **options},
                ).train()
                answered[name] = "trained"
            except GradAccError as error:
                answered[name] = f"{type(error).__name__}: {error}"
    return answered
