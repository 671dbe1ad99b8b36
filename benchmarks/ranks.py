"""What ranks cost: how evenly they are loaded, how often they talk, how long a step takes.

    python benchmarks/ranks.py                   # spread and collectives
    python benchmarks/ranks.py --time            # also seconds per update on 1 and 2 processes

Spread: rows of one kind, updates of 64 and 256, dealt to 2, 4 and 8 ranks three ways. A rank's
cost is that of the micro-batches it runs, padding included, ``n·w·(1 + w / 6h)`` for n rows padded
to w tokens at width h = 1024. Idle is the share of time a rank waits for the slowest,
``1 - mean / max``; tokens is what is computed, over stock's random order.

Collectives: what gloo carried in one update of a 9-million-parameter Llama on two processes,
counted by torch's profiler.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import workloads
from support.ranks import run_ranks
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hf_gradacc import GradAccArguments, GradAccTrainer, plan_micro_batches
from hf_gradacc.planner import deal_by_cost

HIDDEN = 1024
MICRO_BATCH = 8

Share = list[list[int]]  # the micro-batches of one rank, as lengths


def row_cost(length: float) -> float:
    return length * (1 + length / (6 * HIDDEN))


def share_cost(share: Share) -> float:
    return sum(len(piece) * row_cost(max(piece)) for piece in share)


def cut(lengths: Sequence[int], size: int = MICRO_BATCH) -> Share:
    return [list(lengths[i : i + size]) for i in range(0, len(lengths), size)]


def deal_random(lengths: list[int], ranks: int) -> list[Share]:
    """Stock: a random order, micro-batches of 8, handed to ranks in turn."""
    return [cut(lengths)[rank::ranks] for rank in range(ranks)]


def deal_rebalanced(lengths: list[int], ranks: int) -> list[Share]:
    """transformers' ``batch_rebalance`` on these rows as one update."""
    shares = []
    for rank in range(ranks):
        sampler = BatchRebalanceSampler(
            lengths=lengths,
            effective_batch_size=len(lengths),
            dp_size=ranks,
            grad_accum=len(lengths) // (MICRO_BATCH * ranks),
            rank=rank,
            shuffle=False,
        )
        shares.append([[lengths[i] for i in batch] for batch in sampler])
    return shares


def deal_ours(lengths: list[int], ranks: int, *, budget: int | None = None) -> list[Share]:
    """Whole rows by cost, then each rank plans its own micro-batches."""
    shares = []
    for members in deal_by_cost([row_cost(n) for n in lengths], ranks):
        own = [lengths[i] for i in members]
        limits = {"max_tokens": budget} if budget else {"max_sequences": MICRO_BATCH}
        shares.append([[own[i] for i in piece] for piece in plan_micro_batches(own, **limits)])
    return shares


def print_spread() -> None:
    print("| rows | update | ranks | way | idle | tokens |")
    print("|---|---|---|---|---|---|")
    for kind in ("gsm8k", "lognormal", "heavy-tail"):
        rows = workloads.make_rows(kind, 5120)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        budget = int(MICRO_BATCH * np.quantile(lengths, 0.75))
        ways = {
            "stock, random": deal_random,
            "stock, batch_rebalance": deal_rebalanced,
            "ours, 8 rows": deal_ours,
            "ours, budget": functools.partial(deal_ours, budget=budget),
        }
        for size in (64, 256):
            order = np.random.default_rng(0).permutation(len(lengths))
            updates = [lengths[order[i : i + size]].tolist() for i in range(0, len(order), size)]
            for ranks in (2, 4, 8):
                base = None
                for name, deal in ways.items():
                    idle, computed = [], 0
                    for update in updates:
                        shares = deal(update, ranks)
                        assert sorted(n for s in shares for p in s for n in p) == sorted(update)
                        costs = [share_cost(share) for share in shares]
                        idle.append(1 - np.mean(costs) / max(costs))
                        computed += sum(len(p) * max(p) for share in shares for p in share)
                    base = base or computed
                    print(
                        f"| {kind} | {size} | {ranks} | {name} | {np.mean(idle):.1%} "
                        f"| {computed / base:.2f} |"
                    )


# ---- real processes --------------------------------------------------------------------------


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.profiler: Any = None
        self.counted: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.profiler is not None:
            self.profiler.start()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        if state.global_step == 3 and self.profiler is not None:
            self.profiler.stop()
            for event in self.profiler.key_averages():
                if event.key.startswith("gloo:"):
                    self.counted[event.key] = event.count


def train(ours: bool, steps: int, profiled: bool, ranks: int) -> tuple[dict[str, int], list[float]]:
    rows, collate = workloads.make_rows("gsm8k", 512), workloads.make_collator
    clock = Clock()
    if profiled:
        clock.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            "output_dir": out,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "max_steps": steps,
            "per_device_train_batch_size": 4,
        }
        arguments: Any = (
            GradAccArguments(**shared, effective_batch_size=32)
            if ours
            else TrainingArguments(**shared, gradient_accumulation_steps=8 // ranks)
        )
        tokenizer = workloads.make_tokenizer()
        (GradAccTrainer if ours else Trainer)(
            workloads.make_model("llama-9m"),
            arguments,
            train_dataset=rows,
            data_collator=collate(tokenizer),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    return clock.counted, clock.seconds[2:]


def print_collectives() -> None:
    print("\n| collectives in one update, 2 ranks | stock DDP | ours |\n|---|---|---|")
    counts = [
        run_ranks(train, 2, timeout=300, ours=ours, steps=3, profiled=True, ranks=2)[0][0]
        for ours in (False, True)
    ]
    for key in sorted({key for count in counts for key in count}):
        print(
            f"| {key.removeprefix('gloo:')} | {counts[0].get(key, 0)} | {counts[1].get(key, 0)} |"
        )


def print_times() -> None:
    print("\n| seconds per update of 32 rows | 1 process | 2 processes |\n|---|---|---|")
    for ours in (False, True):
        job = {"ours": ours, "steps": 8, "profiled": False}
        seconds = [
            np.median(run_ranks(train, n, timeout=500, ranks=n, **job)[0][1]) for n in (1, 2)
        ]
        name = "ours" if ours else "stock"
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    print_spread()
    print_collectives()
    if options.time:
        print_times()
