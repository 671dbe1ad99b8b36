"""Samples: every so many updates, a model answers a few held-out prompts. Training is untouched.

Nothing of training moves: random numbers are put back, every module's mode too, and nothing is
kept. A run with samples ends with the weights of one without.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import TrainerCallback

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.loss.asking.ask import held_in_mode
from hf_gradacc.recipe.keys.sections import Recipe, SamplesSection
from hf_gradacc.recipe.model.ends import stop_or_end
from hf_gradacc.tracking.preview import plain_numbers
from hf_gradacc.tracking.samples import Sample, record_samples
from hf_gradacc.updates.draws.randomness import RandomSources

__all__ = ["SampleAnswers", "add_samples", "split_row"]

_PROMPT_OF_TEXT = 32
"""Tokens of a document that a model goes on from."""


def add_samples(trainer: Any, recipe: Recipe) -> None:
    """Let a trainer sample as its recipe's `samples` section says; nothing without one.

    Args:
        trainer: The trainer, before it trains.
        recipe: The recipe.

    Raises:
        ConfigError: If the weights are spread over ranks, which would all have to take part.
        DataError: If the rows hold no prompt.
    """
    if recipe.samples is None:
        return
    if trainer.shards_weights:
        raise ConfigError(
            "samples under FSDP or ZeRO-3: a rank holds a part of the weights, and cannot generate "
            "alone.\n  Leave the section out, and look at answers after training."
        )
    is_held_out = trainer.eval_dataset is not None
    rows = trainer.eval_dataset if is_held_out else trainer.train_dataset
    trainer.add_callback(SampleAnswers(trainer, recipe.samples, rows=rows, is_held_out=is_held_out))


class SampleAnswers(TrainerCallback):
    """Generates answers after every so many updates, and after the last.

    Args:
        trainer: The trainer.
        section: How often, how many, how long.
        rows: Prepared rows to take prompts from.
        is_held_out: Whether they are not trained on.

    Raises:
        DataError: If a row has no tokens or no target.
    """

    def __init__(
        self, trainer: Any, section: SamplesSection, *, rows: Any, is_held_out: bool
    ) -> None:
        self._trainer, self._section, self._is_held_out = trainer, section, is_held_out
        config = trainer.model.config
        self._is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        first = itertools.islice(iter(rows), section.count)
        self._rows = [split_row(row, is_seq2seq=self._is_seq2seq) for row in first]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse ranks that share rows, and say where the prompts come from and stay.

        Raises:
            ConfigError: If the model runs on several ranks at once.
        """
        layout = self._trainer.rank_layout
        if layout.num_replicas < args.world_size:
            raise ConfigError(
                "samples under tensor, sequence or context parallelism: one rank cannot generate "
                "alone. Leave the section out, and look at answers after training."
            )
        if not state.is_world_process_zero:
            return
        if not self._is_held_out:
            print("samples: no rows are held out, so prompts are the first rows of data.train")
        if "wandb" in (args.report_to or []) and not args.wandb_upload_text:
            print("W&B: samples stay on this machine; wandb.upload_text: true uploads them")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample on rank 0; the others wait for it in their next update."""
        is_due = (
            state.global_step % self._section.every == 0 or state.global_step == state.max_steps
        )
        if is_due and state.is_world_process_zero:
            record_samples(self._trainer, self._answer_all())

    def _answer_all(self) -> list[Sample]:
        trainer, model = self._trainer, self._trainer.model
        device = trainer.args.device
        devices = [] if device.type == "cpu" else [device]
        with (
            RandomSources().put_back(),
            torch.random.fork_rng(devices=devices, device_type=device.type),
            held_in_mode(model, training=False),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):
            torch.manual_seed(trainer.args.seed)
            return [self._answer(model, *row) for row in self._rows]

    def _answer(self, model: Any, prompt: list[int], expected: list[int]) -> Sample:
        tokenizer = self._trainer.processing_class
        ids = torch.tensor([prompt], device=self._trainer.args.device)
        warmth = self._section.temperature
        drawn = {"do_sample": True, "temperature": warmth, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._room(model, len(prompt)),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_or_end(model, tokenizer),
            use_cache=True,  # gradient checkpointing turns it off in the config
            **(drawn if warmth else greedy),
        )
        written = output[0, 1:] if self._is_seq2seq else output[0, len(prompt) :]
        return Sample(
            tokenizer.decode(prompt),
            tokenizer.decode(written, skip_special_tokens=True),
            tokenizer.decode(expected, skip_special_tokens=True),
        )

    def _room(self, model: Any, length: int) -> int:
        """How many tokens may follow a prompt: a table of positions has an end."""
        limit = None if self._is_seq2seq else getattr(model.config, "max_position_embeddings", None)
        most = self._section.max_new_tokens
        return most if limit is None else max(1, min(most, int(limit) - length))


def split_row(row: Any, *, is_seq2seq: bool = False) -> tuple[list[int], list[int]]:
    """Split a prepared row into its prompt and the first answer behind it.

    A document has no prompt: its first tokens are taken, at most half of it. The answer of a pair
    is the chosen one.

    Args:
        row: `{input_ids, labels}`, or `{prompt_ids, chosen_ids, rejected_ids}`.
        is_seq2seq: Whether labels are a sequence of their own.

    Raises:
        DataError: If the row has no tokens or no target.

    >>> split_row({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]})
    ([5, 6], [7, 8])
    """
    row = {name: plain_numbers(value) for name, value in row.items()}
    if row.get("prompt_ids"):
        return row["prompt_ids"], row["chosen_ids"]
    ids, labels = row.get("input_ids"), row.get("labels")
    targets = [i for i, label in enumerate(labels or []) if label != -100]
    if not ids or not targets:
        raise DataError("samples: a row has no tokens or no target, and so no prompt to answer.")
    if is_seq2seq:
        return list(ids), [labels[i] for i in targets]
    start = targets[0]
    if start <= 1:
        start = max(1, min(_PROMPT_OF_TEXT, len(ids) // 2))
    end = next((i for i in range(start, len(ids)) if labels[i] == -100), len(ids))
    return list(ids[:start]), list(ids[start:end])
