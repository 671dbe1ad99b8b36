"""What ranks cost: how evenly they are loaded, how often they talk, how long a step takes.

    python benchmarks/ranks.py                   # spread and collectives
    python benchmarks/ranks.py --time            # also seconds per update on 1 and 2 processes

Spread: rows of one kind, updates of 64 and 256, dealt to 2, 4 and 8 ranks. A micro-batch of n rows
padded to w tokens costs ``n·w·(1 + w / 6h)`` and an overhead of 64 tokens (what the planner takes
for a CPU; 1,024 for a GPU), at width h = 1024. An update takes as long as its slowest rank; where
ranks run in step (FSDP2), as long as the slowest of each pass. Both are given over those of
``batch_rebalance``. Idle is the share of time a rank waits for the slowest, ``1 - mean / max``.

- *8 rows*: the default limit. batch_rebalance knows none and puts up to 89 rows into one.
- *budget*: 8 times the 75th percentile of lengths.
- *GPU*: the overhead of a GPU; the budget is batch_rebalance's own largest micro-batch, which is
  larger than ours on most rows.

Collectives: what gloo carried in one update of a 9-million-parameter Llama on two processes,
counted by torch's profiler. Times: runs of stock and ours take turns, and each pair of neighbours
gives one ratio.
"""

from __future__ import annotations

import argparse
import itertools
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
from pairs import StepSeconds, spread_of
from support.ranks import run_ranks
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hf_gradacc import GradAccArguments, GradAccTrainer, UpdateCollator
from hf_gradacc.updates.dealing_updates import deal_update
from hf_gradacc.updates.planner import OVERHEAD_ON_ACCELERATOR, OVERHEAD_ON_CPU

HIDDEN = 1024
MICRO_BATCH = 8

Share = list[list[int]]  # the micro-batches of one rank, as lengths


def cost_of(piece: Sequence[int], overhead: int) -> float:
    width = max(piece)
    return len(piece) * width * (1 + width / (6 * HIDDEN)) + overhead


def slowest(shares: list[Share], overhead: int) -> float:
    return max(sum(cost_of(piece, overhead) for piece in share) for share in shares)


def slowest_in_step(shares: list[Share], overhead: int) -> float:
    costs = [sorted((cost_of(p, overhead) for p in share), reverse=True) for share in shares]
    return sum(map(max, itertools.zip_longest(*costs, fillvalue=0)))


def idle(shares: list[Share], overhead: int) -> float:
    costs = [sum(cost_of(piece, overhead) for piece in share) for share in shares]
    return float(1 - np.mean(costs) / max(costs))


def largest(shares: list[Share]) -> int:
    return max(len(piece) * max(piece) for share in shares for piece in share)


def deal_random(lengths: list[int], ranks: int) -> list[Share]:
    """Stock: a random order, micro-batches of 8, handed to ranks in turn."""
    pieces = [lengths[i : i + MICRO_BATCH] for i in range(0, len(lengths), MICRO_BATCH)]
    return [pieces[rank::ranks] for rank in range(ranks)]


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


def deal_ours(
    lengths: list[int],
    ranks: int,
    *,
    budget: int | None = None,
    overhead: int = OVERHEAD_ON_CPU,
    lockstep: bool = False,
) -> list[Share]:
    """What the trainer does: the loader's deal, then each rank's collator plans its share."""
    collator = UpdateCollator(
        list, max_tokens=budget, max_sequences=None if budget else MICRO_BATCH
    )
    collator.overhead_tokens, collator.num_ranks = overhead, ranks
    dealt = deal_update(collator, lengths, ranks, attention_length=6 * HIDDEN, lockstep=lockstep)
    shares = []
    for members in dealt:
        own = [lengths[i] for i in members]
        shares.append([[own[i] for i in piece] for piece in collator.cut(own)])
    return shares


def print_spread() -> None:
    print(
        "| rows | update | ranks | idle: stock, random | batch_rebalance | ours, 8 rows | "
        "ours, budget | slowest rank over batch_rebalance's: stock, random | ours, 8 rows | "
        "ours, budget | ours, GPU | ours, GPU, in step | us a row |"
    )
    print("|---" * 13 + "|")
    for kind in ("gsm8k", "lognormal", "heavy-tail"):
        rows = workloads.make_rows(kind, 5120)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        budget = int(MICRO_BATCH * np.quantile(lengths, 0.75))
        for size in (64, 256):
            order = np.random.default_rng(0).permutation(len(lengths))
            updates = [lengths[order[i : i + size]].tolist() for i in range(0, len(order), size)]
            for ranks in (2, 4, 8):
                print_row(kind, updates, ranks, budget)


def print_row(kind: str, updates: list[list[int]], ranks: int, budget: int) -> None:
    """Sum one row of the table over its updates."""
    cpu, gpu = OVERHEAD_ON_CPU, OVERHEAD_ON_ACCELERATOR
    idles, ours, theirs = np.zeros(4), np.zeros(5), np.zeros(5)
    seconds = 0.0
    for update in updates:
        random, peer = deal_random(update, ranks), deal_rebalanced(update, ranks)
        same_memory = {"budget": max(largest(peer), max(update)), "overhead": gpu}
        started = time.process_time()
        by_rows = deal_ours(update, ranks)
        seconds += time.process_time() - started
        by_tokens = deal_ours(update, ranks, budget=budget)
        on_gpu = deal_ours(update, ranks, **same_memory)
        lockstep = deal_ours(update, ranks, **same_memory, lockstep=True)
        for shares in (random, peer, by_rows, by_tokens, on_gpu, lockstep):
            assert sorted(n for s in shares for p in s for n in p) == sorted(update)
        idles += [idle(shares, cpu) for shares in (random, peer, by_rows, by_tokens)]
        ours += [
            *(slowest(shares, cpu) for shares in (random, by_rows, by_tokens)),
            slowest(on_gpu, gpu),
            slowest_in_step(lockstep, gpu),
        ]
        theirs += [*[slowest(peer, cpu)] * 3, slowest(peer, gpu), slowest_in_step(peer, gpu)]
    cells = [f"{value / len(updates):.1%}" for value in idles]
    cells += [f"{value:.3f}" for value in ours / theirs]
    per_row = 1e6 * seconds / sum(map(len, updates))
    print(f"| {kind} | {len(updates[0])} | {ranks} | {' | '.join(cells)} | {per_row:.0f} |")


# ---- real processes --------------------------------------------------------------------------


class Clock(StepSeconds):
    def __init__(self) -> None:
        super().__init__()
        self.profiler: Any = None
        self.counted: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.profiler is not None:
            self.profiler.start()
        super().on_step_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control)
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
        run_ranks(train, 2, still_after=300, ours=ours, steps=3, profiled=True, ranks=2)[0][0]
        for ours in (False, True)
    ]
    for key in sorted({key for count in counts for key in count}):
        print(
            f"| {key.removeprefix('gloo:')} | {counts[0].get(key, 0)} | {counts[1].get(key, 0)} |"
        )


def print_times(rounds: int, steps: int) -> None:
    """Time stock and ours in turns: a neighbour of the machine then slows both of a pair."""
    seconds: dict[tuple[bool, int], list[float]] = {}
    for _ in range(rounds):
        for ranks in (1, 2):
            for ours in (False, True):
                job = {"ours": ours, "steps": steps, "profiled": False, "ranks": ranks}
                _, own = run_ranks(train, ranks, still_after=500, **job)[0]
                seconds.setdefault((ours, ranks), []).append(float(np.median(own)))
                done = f"{'ours' if ours else 'stock'}, {ranks} ranks: {np.median(own):.2f} s"
                print(done, file=sys.stderr, flush=True)
    print(
        f"\n| seconds per update of 32 rows, median of {rounds} | 1 process | 2 processes | "
        f"speed-up, median of pairs |\n|---|---|---|---|"
    )
    for ours, name in ((False, "stock"), (True, "ours")):
        one, two = np.array(seconds[ours, 1]), np.array(seconds[ours, 2])
        print(
            f"| {name} | {np.median(one):.2f} | {np.median(two):.2f} | {np.median(one / two):.2f} |"
        )
    ratios = [np.array(seconds[False, n]) / np.array(seconds[True, n]) for n in (1, 2)]
    cells = [spread_of(of_pairs) for of_pairs in ratios]
    print(f"| stock over ours, pairs | {cells[0]} | {cells[1]} | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--only-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="pairs that are timed")
    parser.add_argument(
        "--steps", type=int, default=6, help="updates of a run; the first 2 warm up"
    )
    options = parser.parse_args()
    if not options.only_time:
        print_spread()
        print_collectives()
    if options.time or options.only_time:
        print_times(options.rounds, options.steps)
