"""Losses of sentence-transformers that compare rows, trained on one rank or several."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from typing import Any

import datasets

from hf_gradacc import GradAccMixin, GradAccOptions

from .reference import float64_everywhere
from .tiny import PLAIN, Recorder

NAMES = (
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "AnglELoss",
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "BatchHardSoftMarginTripletLoss",
)


def rows_for(name: str) -> Any:
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choice("abcdef ") for _ in range(draw.randint(2, 20)))

    num_texts = 1 if "Triplet" in name else 2
    rows: list[dict[str, Any]] = []
    for _ in range(32):
        row: dict[str, Any] = {f"text{n}": text() for n in range(num_texts)}
        if num_texts == 1:
            row["label"] = draw.randrange(4)
        elif name in ("CoSENTLoss", "AnglELoss"):
            row["score"] = draw.random()
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def train_sentences(
    folder: str, *, names: tuple[str, ...] = NAMES, mixed: bool = True, **options: Any
) -> dict[str, Any]:
    """Train an update of 32 rows with each loss; return the gradients by the names of losses.

    Args:
        folder: A tiny BERT and its tokenizer.
        names: The losses. One that can gather rows over ranks by itself is told to.
        mixed: With the mixin.
        **options: Training arguments.
    """
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    @dataclass
    class Arguments(GradAccOptions, st.SentenceTransformerTrainingArguments):
        pass

    class Mixed(GradAccMixin, st.SentenceTransformerTrainer):
        pass

    trainer_class = Mixed if mixed else st.SentenceTransformerTrainer
    arguments = Arguments if mixed else st.SentenceTransformerTrainingArguments
    found = {}
    for name in names:
        model = st.SentenceTransformer(modules=[Transformer(folder), Pooling(16)], device="cpu")
        model = model.double()
        gathers = {"gather_across_devices": True} if name.startswith("Multiple") else {}
        recorder = Recorder()
        with tempfile.TemporaryDirectory() as out, float64_everywhere():
            trainer_class(
                model=model,
                args=arguments(output_dir=out, **PLAIN | options),
                train_dataset=rows_for(name),
                loss=getattr(losses, name)(model, **gathers),
                callbacks=[recorder],
            ).train()
        found[name] = [
            {key.removeprefix("module."): gradient for key, gradient in of.items()}
            for of in recorder.gradients
        ]
    return found
