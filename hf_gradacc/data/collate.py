"""The stock collator that pads rows of a task."""

from __future__ import annotations

from typing import Any

from hf_gradacc.recipe_sections import Task

__all__ = ["make_collator"]


def make_collator(task: Task, *, tokenizer: Any, model: Any = None) -> Any:
    """A transformers collator: labels of language models are padded with -100, classes are not.

    Args:
        task: The recipe's `model.task`.
        tokenizer: Pads `input_ids`.
        model: Encoder-decoders make their decoder's input from the labels with it.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if task == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model if task == "seq2seq" else None)
