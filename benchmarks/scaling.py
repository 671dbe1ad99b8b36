"""Cost curves: an update against its number of micro-batches, planning against dataset size.

python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np
import torch
import transformers
from report import machine, table, write_result
from speed import Stopwatch, common
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import make_collator, make_tokenizer

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.updates.planner import count_padding, plan_micro_batches, plan_packed_micro_batches
from hf_gradacc.updates.sampler import UpdateSampler


def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            use_cache=False,
        )
    )


def micro_batch_curve(counts: list[int]) -> list[list[str]]:
    """Time and memory of an update of 1 to 1,024 micro-batches of two rows."""
    draw = np.random.default_rng(0)
    lines = []
    for count in counts:
        rows = []
        for length in draw.integers(30, 60, 2 * count):
            ids = draw.integers(2, 512, length).tolist()
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
        args = GradAccArguments(
            **common(effective_batch_size=2 * count, per_device_train_batch_size=2)
        )
        watch = Stopwatch()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        GradAccTrainer(
            tiny_model(),
            args,
            train_dataset=rows,
            data_collator=make_collator(make_tokenizer()),
            callbacks=[watch],
        ).train()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        tokens = sum(len(row["input_ids"]) for row in rows)
        lines.append(
            [f"{count:,}", f"{watch.seconds / tokens * 1e6:.0f}", f"{max(0.0, grown):.0f} MiB"]
        )
    return lines


def dataset_curve(sizes: list[int]) -> list[list[str]]:
    """Time of the sampler, of one update of 64, and of its plan, as the dataset grows."""
    lines = []
    for size in sizes:
        lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, size), 8, 4096).astype(int)
        started = time.perf_counter()
        sampler = UpdateSampler(size, effective_batch_size=64, seed=0)
        built = time.perf_counter()
        updates = iter(sampler)
        next(updates)
        first = time.perf_counter()
        shares = [next(updates) for _ in range(min(200, len(sampler) - 1))]
        following = (time.perf_counter() - first) / len(shares)
        plan_started = time.perf_counter()
        for share in shares:
            plan_micro_batches(lengths[share].tolist(), max_tokens=4096)
        per_row = (time.perf_counter() - plan_started) / (64 * len(shares))
        lines.append(
            [
                f"{size:,}",
                f"{(built - started) * 1e3:.1f} ms",
                f"{(first - built) * 1e3:.0f} ms",
                f"{following * 1e6:.0f} µs",
                f"{per_row * 1e6:.1f} µs",
            ]
        )
    return lines


def plan_curve(sizes: list[int]) -> list[list[str]]:
    """Time of a plan and the padding it leaves, as one rank's share of an update grows."""
    lines = []
    for size in sizes:
        draw = np.random.default_rng(1)
        lengths = np.clip(draw.lognormal(5, 0.8, size), 8, 4096).astype(int).tolist()
        budget = 8192
        times = {}
        for name, plan in (("padded", plan_micro_batches), ("packed", plan_packed_micro_batches)):
            runs = []
            for _ in range(3):
                started = time.perf_counter()
                cut = plan(lengths, max_tokens=budget)
                runs.append(time.perf_counter() - started)
            times[name] = statistics.median(runs) / size * 1e6
            if name == "padded":
                wasted = count_padding(lengths, cut)
                padding = wasted / (sum(lengths) + wasted)
        lines.append(
            [
                f"{size:,}",
                f"{times['padded']:.1f} µs",
                f"{times['packed']:.1f} µs",
                f"{padding:.1%}",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10_000_000)
    parser.add_argument("--micro-batches", type=int, default=1024)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sizes = [10**k for k in range(3, 8) if 10**k <= options.largest]
    counts = [4**k for k in range(6) if 4**k <= options.micro_batches]
    sections = []
    for title, header, lines in (
        (
            "An update against its number of micro-batches (2 rows each)",
            ["micro-batches", "µs per token", "peak memory added"],
            micro_batch_curve(counts),
        ),
        (
            "Sampling and planning against dataset size (updates of 64)",
            ["rows", "make sampler", "first update", "each further update", "plan, per row"],
            dataset_curve(sizes),
        ),
        (
            "Planning against the size of an update (budget 8,192)",
            ["sequences", "padded, per row", "packed, per row", "padding"],
            plan_curve([16, 64, 256, 1024, 4096]),
        ),
    ):
        sections.append(f"### {title}\n\n{table(header, lines)}")
        print(sections[-1], flush=True)
    if options.out:
        write_result(options.out, machine(), sections)


if __name__ == "__main__":
    main()
