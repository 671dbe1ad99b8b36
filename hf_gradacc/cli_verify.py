"""`hf-gradacc verify`: the parity check on a recipe's own model and rows."""

from __future__ import annotations

import itertools

from hf_gradacc.data.progress import with_progress
from hf_gradacc.recipe_run import build_trainer
from hf_gradacc.recipe_sections import Recipe
from hf_gradacc.tracking_parity import record_parity
from hf_gradacc.verify import ParityReport, verify_parity
from hf_gradacc.verify_conditions import own_log_level

__all__ = ["verify_recipe"]

STREAMED_ROWS = 500


@own_log_level()
def verify_recipe(recipe: Recipe, *, num_rows: int = 16, preflight: bool = True) -> ParityReport:
    """Compare gradients on rows of uneven length drawn from a recipe's training set.

    The result is also kept in the recipe's output folder, for the runs there to file.

    Args:
        recipe: A checked recipe.
        num_rows: Rows of the update that is compared.
        preflight: Also run the longest rows of the set once.
    """
    trainer, data = build_trainer(recipe, report_to="none", log_level="error")
    rows = data.train
    if not hasattr(rows, "__len__"):
        rows = list(itertools.islice(rows, STREAMED_ROWS))
    lengths = [len(row["input_ids"]) for row in with_progress(rows, what="measuring rows")]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # Evenly from the shortest to the longest: uneven rows show most.
    step = max(1, len(order) // num_rows)
    chosen = [rows[index] for index in order[::step][:num_rows]]
    longest = [rows[index] for index in order[-num_rows:]]
    report = verify_parity(
        trainer.model,
        chosen,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
        arguments=trainer.args,
        preflight_rows=longest if preflight else None,
    )
    record_parity(report, output_dir=trainer.args.output_dir, model=trainer.model)
    return report
