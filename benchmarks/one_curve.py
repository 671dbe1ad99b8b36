"""One loss curve, cut three ways: the stock Trainer against ours, as a picture.

    python benchmarks/one_curve.py            trains, writes the picture and a result file
    python benchmarks/one_curve.py --quick    a few updates, nothing written

A tiny T5 with random weights learns to answer the word problems of ``recipes/data``. Each update
holds the same 32 rows, whichever trainer runs it and whichever way it is cut: as one micro-batch of
32, four of 8, or sixteen of 2. Both trainers run with their default AdamW and clipping, without
dropout, in float64: float32's rounding would grow to a percent within a hundred updates of AdamW.
The curves are the ``loss`` that each run logs. The held-out loss is computed by one function for
all of them, per target token, on rows that no run trains on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from transformers import (
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.data import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import float64_everywhere  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "one_curve.png"
UPDATE = 32
CUTS = ((1, 32), (4, 8), (16, 2))
HELD_OUT = 128
Row = dict[str, list[int]]

NOTES = """T5's forward takes `**kwargs`, so the stock Trainer believes that the loss was divided by
`num_items_in_batch` and leaves out the division by the number of micro-batches; the loss ignores
that count. Both the logged loss and the gradient are about as many times too large as there are
micro-batches. AdamW takes out a factor, but clipping comes first and acts that much harder, so
stock's three runs end with different weights: see the held-out losses."""


@dataclasses.dataclass
class Run:
    """What one trainer logged on one cut.

    Attributes:
        losses: The logged ``loss`` of each update.
        norms: The logged ``grad_norm`` of each update.
        held_out: Loss per target token on the held-out rows after the last update.
    """

    losses: list[float]
    norms: list[float]
    held_out: float


def prepare_rows(tokenizer: Any, problems: list[dict[str, str]]) -> list[Row]:
    return [
        {
            "input_ids": tokenizer(problem["question"])["input_ids"],
            "labels": [*tokenizer(problem["answer"])["input_ids"], tokenizer.eos_token_id],
        }
        for problem in problems
    ]


def make_model(tokenizer: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config).double()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: list[Row], collator: Any) -> float:
    """Loss per target token over all rows, in plain torch."""
    model.eval()
    total, targets = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collator(rows[start : start + 16])
        logits = model(**batch).logits
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
            )
        )
        targets += int(batch["labels"].ne(-100).sum())
    return total / targets


def train(
    cut: tuple[int, int],
    *,
    ours: bool,
    updates: int,
    rows: list[Row],
    held_out: list[Row],
    tokenizer: Any,
) -> Run:
    micro_batches, size = cut
    model = make_model(tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    arguments_class = GradAccArguments if ours else TrainingArguments
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=micro_batches,
            max_steps=updates,
            learning_rate=2e-3,
            warmup_steps=10,
            logging_steps=1,
            train_sampling_strategy="sequential",  # the same rows in each update of both trainers
            log_level="error",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = (GradAccTrainer if ours else Trainer)(
            model=model, args=arguments, train_dataset=rows, data_collator=collator
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with float64_everywhere():
            trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return Run(
        [row["loss"] for row in history],
        [row["grad_norm"] for row in history],
        held_out_loss(model, held_out, collator),
    )


def spread(runs: list[Run]) -> float:
    """How far the losses of one update lie apart at most: largest over smallest, minus 1."""
    updates = zip(*(run.losses for run in runs), strict=True)
    return max(max(losses) / min(losses) for losses in updates) - 1


def draw(stock: list[Run], ours: list[Run], path: Path) -> None:
    """Draw two panels that share their axes: three curves of stock's, three of ours."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = [f"{micro_batches} × {size} rows" for micro_batches, size in CUTS]
    colors = ("#0b3c49", "#e4572e", "#f3a712")
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "xtick.color": "#555555",
        "ytick.color": "#555555",
    }
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(8.4, 3.5), dpi=130, sharex=True, sharey=True
        )
        for axes, title, runs, widths in (
            (left, "transformers.Trainer", stock, (1.6, 1.6, 1.6)),
            (right, "GradAccTrainer", ours, (1.6, 4.2, 8.0)),
        ):
            steps = range(1, len(runs[0].losses) + 1)
            for run, color, width in reversed(list(zip(runs, colors, widths, strict=True))):
                axes.plot(steps, run.losses, color=color, lw=width, solid_capstyle="round")
            axes.set_yscale("log")
            axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
            axes.minorticks_off()
            axes.grid(axis="y", color="#dddddd", lw=0.6)
            axes.set_axisbelow(True)
            axes.set_title(title, loc="left", fontweight="bold", family="monospace", fontsize=10)
            axes.set_xlabel("update")
            axes.set_xlim(0, len(steps) * 1.27)
            axes.set_xticks(range(0, len(steps) + 1, 10))
            axes.set_ylim(0.9, 170)
        left.set_ylabel("logged training loss")
        for run, name, color in zip(stock, names, colors, strict=True):
            left.annotate(
                name, (len(run.losses), run.losses[-1]), (5, 0), textcoords="offset points",
                va="center", color=color, fontweight="bold",
            )  # fmt: skip
        end = (len(ours[0].losses), ours[0].losses[-1])
        for line, (name, color) in enumerate(zip(names, colors, strict=True)):
            right.annotate(
                name, end, (5, 12 * (1 - line)), textcoords="offset points", va="center",
                color=color, fontweight="bold",
            )  # fmt: skip
        figure.suptitle(
            "A T5 in updates of 32 rows, cut into micro-batches three ways: same rows, same seed",
            x=0.012, ha="left", fontsize=10.5, color="#222222",
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0, 1, 0.99))
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = (ROOT / "recipes" / "data" / "word_problems.jsonl").read_text("utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    tokenizer = train_tokenizer([p["question"] + p["answer"] for p in problems], vocab_size=512)
    every = prepare_rows(tokenizer, problems)
    stock, ours = (
        [
            train(
                cut,
                ours=ours,
                updates=3 if options.quick else options.updates,
                rows=every[HELD_OUT:],
                held_out=every[:HELD_OUT],
                tokenizer=tokenizer,
            )
            for cut in CUTS
        ]
        for ours in (False, True)
    )
    body = [
        [trainer, f"{n} x {size}", *(f"{x:.4f}" for x in (run.losses[0], run.losses[-1])),
         f"{run.norms[0]:.3f}", f"{run.held_out:.4f}"]
        for trainer, runs in (("stock", stock), ("ours", ours))
        for (n, size), run in zip(CUTS, runs, strict=True)
    ]  # fmt: skip
    header = ["trainer", "cut", "first loss", "last loss", "first grad_norm", "held-out loss"]
    results = table(header, body)
    apart = (
        f"Logged losses of one update lie apart by up to {spread(stock):.3g} with stock and "
        f"{spread(ours):.1e} with ours (largest over smallest of the three cuts, minus 1)."
    )
    print(results, apart, sep="\n\n")
    if not options.quick:
        draw(stock, ours, PICTURE)
        head = f"Tiny T5 in float64, {options.updates} updates of {UPDATE} rows, {machine()}."
        write_result("one-curve", head, [results, apart], notes=NOTES)


if __name__ == "__main__":
    main()
