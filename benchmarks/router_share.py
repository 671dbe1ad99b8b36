"""What is left of a router loss's error in one pass, and how it falls with micro-batches' size.

A router loss is a product of two means over a micro-batch, so without a first pass over the update
no weight makes pieces of it add up: a mean of products is not the product of means. Stock adds it
once per micro-batch; ours adds it once per update, by share, and what remains is that nonlinearity.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import reference, zoo, zoo_rows, zoo_runs  # noqa: E402

CASES = (("Mixtral", "mixtral"), ("Qwen3-MoE", "qwen3_moe"))
CUTS = ((64, 8), (256, 32))  # rows of an update, rows of a micro-batch

NOTE = (
    "In one pass (`update_passes = 1`) a router loss is exact (1e-15) against the share-weighted "
    "sum of the same micro-batches; what is left is its own nonlinearity. It falls with the size "
    "of micro-batches, where stock's error grows with their number:"
)


def study() -> str:
    """Markdown: the error of the whole gradient and of the routers' own weights."""
    lines = [
        "| router loss on | update | micro-batch | whole gradient: stock | ours "
        "| routers' weights: stock | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model_type in CASES:
        for num_rows, per_micro_batch in CUTS:
            errors = _measure(
                zoo.Case(model_type, "causal", router_loss=True), num_rows, per_micro_batch
            )
            cells = " | ".join(f"{error:.1e}" for error in errors)
            lines.append(f"| {name} | {num_rows} rows | {per_micro_batch} rows | {cells} |")
    return "\n".join(lines)


def _measure(case: zoo.Case, num_rows: int, per_micro_batch: int) -> list[float]:
    rng = random.Random(0)
    rows = zoo_rows.rows_for("causal", lengths=[rng.randint(20, 60) for _ in range(num_rows)])
    for row in rows:  # a third of each row is its prompt
        prompt = len(row["input_ids"]) // 3
        row["labels"] = [-100] * prompt + row["input_ids"][prompt:]
    with reference.float64_everywhere():
        model = case.build()
        collator = case.collator(model)
        whole = reference.reference_gradient(model, rows, collator)
        options = {"per_device_train_batch_size": per_micro_batch}
        ours = zoo_runs.train_ours(case.build(), rows, collator, update_passes=1, **options)
        stock = zoo_runs.train_stock(
            case.build(),
            rows,
            collator,
            gradient_accumulation_steps=-(-num_rows // per_micro_batch),
            **options,
        )
    return [
        reference.relative_error(part(run.gradient), part(whole))
        for part in (dict, _routers)
        for run in (stock, ours)
    ]


def _routers(gradient: reference.Gradient) -> reference.Gradient:
    return {name: g for name, g in gradient.items() if name.endswith("gate.weight")}


if __name__ == "__main__":
    print(study())
