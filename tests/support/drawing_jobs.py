"""Train masked words on some ranks, for `tests.promise.test_draws`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .drawing import mask_words, tiny_bert, token_rows
from .reference import float64_everywhere
from .tiny import Recorder, log_rows, make_trainer

__all__ = ["train_masked_words"]


def train_masked_words(
    out: str, *, collator: Any = None, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Train a tiny BERT in float64; 8 rows an update, 3 updates an epoch.

    Returns:
        The gradient of each update, the tokens of each, and the weights at the end.
    """
    recorder = Recorder()
    settings = {"effective_batch_size": 8, "max_steps": 5, "seed": 3}
    with float64_everywhere():
        trainer = make_trainer(
            Path(out),
            token_rows(),
            model=tiny_bert(),
            data_collator=collator or mask_words(),
            callbacks=[recorder],
            **settings | options,
        )
        trainer.train(resume_from_checkpoint=True if resume else None)
    return {
        "gradients": [{k: v.clone() for k, v in g.items()} for g in recorder.gradients],
        "tokens": [row["tokens_per_update"] for row in log_rows(trainer)],
        "weights": {k: v.detach().clone() for k, v in trainer.model.state_dict().items()},
    }
