"""What drawing rows together saves that begin alike, and what it does to the noise of updates.

    python benchmarks/families.py               # about ten minutes on one core
    python benchmarks/families.py --quick

1. Chats with one row for each turn, drawn one by one and in families: tokens that are computed of
   those fed in, and CPU seconds of an update. Both runs train in turn.
2. The variance of an update's gradient, at one set of weights: solutions of word problems in parts
   of 20 tokens, a row for each part, which a small model has learned for some epochs. If rows that
   meet resemble each other, an update of them is as noisy as a smaller one of shuffled rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from workloads import SHAPES, make_collator, make_model, make_rows, make_tokenizer

from hf_gradacc import GradAccArguments, GradAccTrainer

WAYS = {"one by one": False, "in families": True}
PART = 20


class Watch(TrainerCallback):
    """Keeps each update's CPU seconds, and its gradient if asked to."""

    def __init__(self, *, keeps_gradients: bool = False) -> None:
        self.keeps_gradients = keeps_gradients
        self.seconds: list[float] = []
        self.gradients: list[Tensor] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if self.keeps_gradients:
            parts = [p.grad.flatten().double() for p in model.parameters()]
            self.gradients.append(torch.cat(parts))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def train(model: Any, rows: Any, watch: Watch, **options: Any) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as out:
        settings = {
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "log_level": "error",
            "max_grad_norm": 0.0,
            "max_tokens_per_micro_batch": 4096,
        }
        trainer = GradAccTrainer(
            model=model,
            args=GradAccArguments(output_dir=out, **settings | options),
            train_dataset=rows,
            data_collator=make_collator(make_tokenizer()),
            callbacks=[watch],
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def measure_speed(shape: str, sizes: list[int], *, updates: int, rounds: int) -> None:
    rows = make_rows("chat-turns", 2000, vocab_size=SHAPES[shape][4])
    print(f"\n2,000 rows of chats, {shape}, {updates} updates, {rounds} rounds\n")
    print("| rows in an update | drawn | computed of the tokens fed in | CPU s/update |")
    print("|---|---|---|---|", flush=True)
    for size in sizes:
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        fractions: dict[str, float] = {}
        for round_ in range(rounds):
            for name, grouped in WAYS.items():
                watch = Watch()
                options = {"effective_batch_size": size, "max_steps": updates, "seed": round_}
                logs = train(make_model(shape), rows, watch, group_by_prefix=grouped, **options)
                seconds[name] += watch.seconds
                computed = sum(row["computed_tokens_per_update"] for row in logs)
                fed_in = sum(row["input_tokens_per_update"] for row in logs)
                fractions[name] = computed / fed_in
        for name in WAYS:
            spent = statistics.median(seconds[name])
            print(f"| {size} | {name} | {fractions[name]:.3f} | {spent:.2f} |", flush=True)


def rows_of_parts(problems: int) -> list[dict[str, list[int]]]:
    """One row for each part of a solution, behind all that stands before it."""
    rows = []
    for row in make_rows("gsm8k", problems, vocab_size=512):
        ids = row["input_ids"]
        prompt = next(i for i, label in enumerate(row["labels"]) if label != -100)
        for start in range(prompt, len(ids), PART):
            stop = min(start + PART, len(ids))
            labels = [-100] * start + ids[start:stop]
            rows.append({"input_ids": ids[:stop], "attention_mask": [1] * stop, "labels": labels})
    return rows


def measure_noise(sizes: list[int], *, problems: int, epochs: int) -> None:
    rows = rows_of_parts(problems)
    model = make_model("rehearsal")
    learned = train(
        model,
        rows,
        Watch(),
        effective_batch_size=32,
        num_train_epochs=epochs,
        learning_rate=3e-3,
    )
    print(
        f"\n{len(rows):,} parts of {problems:,} solutions; loss {learned[0]['loss']:.2f} -> "
        f"{learned[-1]['loss']:.2f}\n"
    )
    print("| rows in an update | variance, in families / one by one | as noisy as |")
    print("|---|---|---|", flush=True)
    for size in sizes:
        variance = {}
        for name, grouped in WAYS.items():
            watch = Watch(keeps_gradients=True)
            train(
                model,
                rows,
                watch,
                effective_batch_size=size,
                group_by_prefix=grouped,
                incomplete_update="drop",
                optim="sgd",
                learning_rate=0.0,
                num_train_epochs=1,
            )
            found = torch.stack(watch.gradients)
            variance[name] = float((found - found.mean(0)).pow(2).sum(1).mean())
        ratio = variance["in families"] / variance["one by one"]
        print(f"| {size} | {ratio:.2f} | {size / ratio:.0f} rows drawn one by one |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["noise", "speed"])
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    if options.only != "speed":
        measure_noise([32, 64], problems=300 if quick else 400, epochs=1 if quick else 3)
    if options.only != "noise":
        shape = "rehearsal" if quick else "llama-9m"
        measure_speed(shape, [64, 32], updates=2, rounds=1 if quick else 2)


if __name__ == "__main__":
    main()
