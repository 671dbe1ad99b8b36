"""`hf-gradacc verify`: the parity check on a recipe's own model and rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from hf_gradacc.data.lengths import measure_lengths
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.run import build_trainer
from hf_gradacc.tracking.parity_file import record_parity
from hf_gradacc.updates.lengths import measure_length
from hf_gradacc.verify.conditions import own_log_level
from hf_gradacc.verify.parity import verify_parity
from hf_gradacc.verify.result import ParityReport

__all__ = ["verify_recipe"]

STREAMED_ROWS = 500


# An update has the same gradient however its model is spread, so one process is asked.
_ON_ONE_PROCESS: dict[str, Any] = {"fsdp": None, "fsdp_config": None, "deepspeed": None}


@own_log_level()
def verify_recipe(recipe: Recipe, *, num_rows: int = 16, preflight: bool = True) -> ParityReport:
    """Compare gradients on rows of uneven length drawn from a recipe's training set.

    The result is also kept in the recipe's output folder, for the runs there to file.

    Args:
        recipe: A checked recipe.
        num_rows: Rows of the update that is compared.
        preflight: Also run the longest rows of the set once.
    """
    trainer, data = build_trainer(recipe, report_to="none", log_level="error", **_ON_ONE_PROCESS)
    rows = data.train
    if not hasattr(rows, "__len__"):
        rows = list(itertools.islice(rows, STREAMED_ROWS))
    order = np.argsort(measure_lengths(rows), kind="stable").tolist()
    # Evenly from the shortest to the longest: uneven rows show most.
    places = np.linspace(0, len(order) - 1, min(num_rows, len(order))).round().astype(int)
    chosen = [rows[order[place]] for place in places]
    longest = [rows[index] for index in order[-_most_rows(trainer.args, order, rows) :]]
    report = verify_parity(
        trainer.model,
        chosen,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
        arguments=trainer.args,
        trainer_class=type(trainer),
        trainer_parts=_parts_of(trainer),
        preflight_rows=longest if preflight else None,
    )
    record_parity(report, output_dir=trainer.args.output_dir, model=trainer.model)
    return report


def _most_rows(arguments: Any, order: list[int], rows: Any) -> int:
    """How many of the longest rows the largest micro-batch can hold."""
    budget = arguments.max_tokens_per_micro_batch
    if not isinstance(budget, int):
        return int(arguments.per_device_train_batch_size)
    return max(1, budget // measure_length(rows[order[-1]]))


def _parts_of(trainer: Any) -> dict[str, Any]:
    """What a trainer was made with that no other has: the reference of DPO."""
    reference = getattr(trainer, "ref_model", None)
    return {} if reference is None else {"ref_model": reference}
