"""How many rows of logits a chunk of the chunked loss should hold on a CPU, by measurement.

    python benchmarks/chunks.py                 # ten minutes on one core
    python benchmarks/chunks.py --dtype bfloat16

For vocabularies and widths of heads, the CPU time of loss and gradients per row with chunks of
several sizes, against that of the size that `rows_per_chunk` chooses. Sizes take turns, and the
fastest of a few turns counts, so other work on the machine slows all alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from hf_gradacc.loss.shortcuts import chunked

SHAPES = [
    *((1_024, width) for width in (64, 256, 512, 1024, 2048)),
    *((4_096, width) for width in (64, 256, 512, 1024, 2048)),
    *((16_384, width) for width in (64, 256, 512, 1024, 2048)),
    *((32_000, width) for width in (64, 256, 512, 1024)),
    *((65_536, width) for width in (64, 256, 512)),
    *((150_000, width) for width in (64, 256)),
]
SIZES = (32, 64, 128, 256, 512, 1024)
NUM_ROWS = 1024


def seconds(vocab: int, width: int, *, dtype: torch.dtype, turns: int) -> dict[int, float]:
    """Return the CPU seconds of a loss and its gradients for each size of chunks."""
    torch.manual_seed(0)
    rows = min(NUM_ROWS, max(512, 2**31 // (vocab * width)))
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, width)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,))
    sizes = [size for size in SIZES if size <= rows]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(turns):
        for size in sizes:
            chunked.rows_per_chunk = lambda *_, size=size, **__: size
            began = time.process_time()
            loss = chunked.ChunkedLoss.apply(hidden, weight, None, labels, True)
            (loss / rows).backward()
            found[size].append(time.process_time() - began)
            hidden.grad = weight.grad = None
    return {size: min(times) / rows for size, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    choose = chunked.rows_per_chunk
    lines = [
        "| words | width | " + " | ".join(map(str, SIZES)) + " | rule | of the fastest |",
        "|---" * (len(SIZES) + 4) + "|",
    ]
    losses: list[float] = []
    for vocab, width in SHAPES:
        found = seconds(vocab, width, dtype=getattr(torch, chosen.dtype), turns=chosen.turns)
        rule = choose(vocab, device_type="cpu", width=width)
        near = min(found, key=lambda size: abs(size - rule))
        losses.append(found[near] / min(found.values()))
        cells = [f"{1e6 * found[size]:.0f}" if size in found else "–" for size in SIZES]
        lines.append(f"| {vocab:,} | {width} | {' | '.join(cells)} | {rule} | {losses[-1]:.2f} |")
        print(lines[-1], flush=True)
    processor = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    print(
        f"\n{processor}, torch {torch.__version__}, {chosen.dtype}, {chosen.threads} threads; CPU "
        f"microseconds a row.\nThe rule is {statistics.median(losses):.2f} of the fastest in the "
        f"median, {max(losses):.2f} at worst.\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
