"""Rows of the head and CPU seconds of an update of trees: each row's targets, or shared ones once.

    python benchmarks/shared_targets.py --rows gsm8k-4shot-all chat-turns-all gsm8k-4shot

Both ways train the same rows in one run, update by update in random order, so that other load on
the machine falls on both. Reported are medians over rounds, of seconds and of their ratio within a
round.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from speed import clock, common, quietly
from transformers import TrainerCallback
from workloads import make_collator, make_model, make_rows, make_tokenizer

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.loss.trees import targets as tree_targets

WAYS = ("each row's", "shared once")
HEADER = ["rows", "targets", "rows of the head", "each row's, s", "shared once, s", "ratio"]


class Ways(TrainerCallback):
    """Takes turns between both ways, and keeps what each update took."""

    def __init__(self, order: list[str]) -> None:
        self.order = order
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.in_head = dict.fromkeys(WAYS, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        merge, weigh = tree_targets.merge_targets, tree_targets.TreeTargets.weigh

        def merge_or_not(nodes: Any, labels: Any) -> Any:
            return merge(nodes, labels) if self.way == WAYS[1] else None

        def count(targets: Any, hidden: Any, labels: Any) -> Any:
            found = weigh(targets, hidden, labels)
            self.in_head[self.way] += len(found[0])
            return found

        tree_targets.merge_targets, tree_targets.TreeTargets.weigh = merge_or_not, count
        try:
            yield
        finally:
            tree_targets.merge_targets, tree_targets.TreeTargets.weigh = merge, weigh

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.way = self.order[state.global_step]
        self.in_head[self.way] = 0
        self.start = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > len(WAYS):  # the first round warms up
            self.seconds[self.way].append(clock() - self.start)


def measure(kind: str, shape: str, *, batch: int, rounds: int, budget: int) -> list[str]:
    """Train all rounds; give a line of the table."""
    model, order, rows = make_model(shape), [], []
    for number in range(rounds + 1):
        order += random.Random(number).sample(WAYS, len(WAYS))
        rows += make_rows(kind, batch, vocab_size=model.config.vocab_size, seed=number) * len(WAYS)
    watch = Ways(order)
    args = GradAccArguments(
        **common(
            effective_batch_size=batch,
            max_tokens_per_micro_batch=budget,
            layout="shared_prefix",
            train_sampling_strategy="sequential",
        )
    )
    collator = make_collator(make_tokenizer())
    with quietly(), watch.watching():
        trainer = GradAccTrainer(
            model, args, train_dataset=rows, data_collator=collator, callbacks=[watch]
        )
        trainer.train()
    each, once = (watch.seconds[way] for way in WAYS)
    ratio = statistics.median(b / a for a, b in zip(each, once, strict=True))
    return [
        kind,
        f"{trainer.last_update.stats.num_targets:,}",
        f"{watch.in_head[WAYS[1]]:,}",
        f"{statistics.median(each):.2f}",
        f"{statistics.median(once):.2f}",
        f"{ratio:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", nargs="+", default=["gsm8k-4shot-all", "chat-turns-all", "gsm8k-4shot"]
    )
    parser.add_argument("--shape", default="llama-9m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="theme of a file under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    sizes = {"batch": options.batch, "rounds": options.rounds, "budget": options.budget}
    lines = [measure(kind, options.shape, **sizes) for kind in options.rows]
    head = (
        f"{options.shape}, effective batch {options.batch}, budget {options.budget}, "
        f"{options.rounds} rounds, {options.threads} thread(s), {machine()}. Targets and rows of "
        f"the head are those of the last update."
    )
    print(head, table(HEADER, lines), sep="\n\n", flush=True)
    if options.out:
        write_result(options.out, head, [table(HEADER, lines)])


if __name__ == "__main__":
    main()
