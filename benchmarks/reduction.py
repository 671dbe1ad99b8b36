"""What it takes to sum gradients over two ranks: seconds of an update.

    python benchmarks/reduction.py            # under gloo on this machine's loopback
    python benchmarks/reduction.py --write

Two processes of one thread each train a Llama of 14 million parameters (54 MiB of float32
gradients), one row of 128 tokens a micro-batch. Runs of stock, of ours with the reduction after the
last backward, and of ours with it inside take turns; each round gives one ratio.

A loopback has no latency, and its copying takes the cores that compute. So there is a slow link,
too: each all-reduce begins when the one before has ended, and takes its bytes over a bandwidth
longer. The process sleeps meanwhile, as it would wait for a network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from pairs import StepSeconds, spread_of
from report import machine, table, write_result
from support.ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.ranks import reduction

LINKS = (None, 100.0)
"""MiB a second; None for the bare loopback."""

WAYS = ("stock", "after the backward", "inside of it")


class SlowLink:
    """Lets each all-reduce of a vector take longer, by its size."""

    def __init__(self, mib_per_second: float) -> None:
        self.rate = mib_per_second * 2**20
        self.line = ThreadPoolExecutor(1)
        self.send = dist.all_reduce

    def all_reduce(self, tensor: Any, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        seconds = tensor.numel() * tensor.element_size() / self.rate
        work = self.send(tensor, *args, async_op=True, **kwargs)

        def carry() -> None:
            work.wait()
            time.sleep(seconds)

        carried = self.line.submit(carry)
        if not async_op:
            carried.result()
            return None
        return Carried(carried)


class Carried:
    """What an asynchronous all-reduce returns."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def wait(self) -> None:
        self.future.result()


class Clock(StepSeconds):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        super().on_step_begin(*args, **kwargs)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            pad_token_id=0,
            use_cache=False,
        )
    )


def train(way: str, micro_batches: int, steps: int, link: float | None) -> dict[str, Any]:
    """Train on this rank; return seconds of each update but the first two."""
    shape = (2 * micro_batches * steps, 128)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in np.random.default_rng(0).integers(1, 4096, shape).tolist()
    ]
    clock, slow = Clock(), SlowLink(link) if link else None
    make = reduction.Reduction.__init__

    def make_reduction(self: Any, *, bucket_bytes: int, is_early: bool) -> None:
        make(self, bucket_bytes=bucket_bytes, is_early=is_early and way == "inside of it")

    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            "output_dir": out,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": micro_batches,
            "optim": "sgd",
            "ddp_bucket_cap_mb": 8,
        }
        stock = way == "stock"
        arguments: Any = TrainingArguments(**shared) if stock else GradAccArguments(**shared)
        trainer = (Trainer if stock else GradAccTrainer)(
            model(), arguments, train_dataset=rows, callbacks=[clock], data_collator=collate
        )
        with contextlib.ExitStack() as patches:
            patches.enter_context(
                mock.patch.object(reduction.Reduction, "__init__", make_reduction)
            )
            if slow and stock:
                send_by_hook(trainer.accelerator, slow)
            elif slow:
                patches.enter_context(mock.patch.object(dist, "all_reduce", slow.all_reduce))
            trainer.train()
    return {"seconds": clock.seconds[2:]}


def send_by_hook(accelerator: Any, link: SlowLink) -> None:
    """Let DDP send over the slow link, by a communication hook: the mean over ranks."""
    prepare = accelerator.prepare_model

    def send(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations
        future: Any = torch.futures.Future()
        tensor = bucket.buffer().div_(dist.get_world_size())
        carried = link.all_reduce(tensor, async_op=True)
        carried.future.add_done_callback(lambda done: future.set_result(tensor))
        return future

    def prepare_model(*args: Any, **kwargs: Any) -> Any:
        wrapped = prepare(*args, **kwargs)
        wrapped.register_comm_hook(None, send)
        return wrapped

    accelerator.prepare_model = prepare_model


def collate(rows: list[Any]) -> dict[str, Any]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def measure(rounds: int, steps: int) -> list[list[str]]:
    lines = []
    for link in LINKS:
        for micro_batches in (1, 4):
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    ranks = run_ranks(
                        train, 2, way=way, micro_batches=micro_batches, steps=steps, link=link
                    )
                    seconds[way].append(float(np.median(ranks[0]["seconds"])))
            after, inside = (np.array(seconds[way]) for way in WAYS[1:])
            name = "loopback" if link is None else f"{link:.0f} MiB/s"
            lines.append(
                [
                    name,
                    str(micro_batches),
                    *(f"{np.median(seconds[way]):.3f}" for way in WAYS),
                    spread_of(inside / after),
                ]
            )
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="updates; the first 2 warm up")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    head = [
        "link",
        "micro-batches a rank",
        *(f"s/update, {way}" for way in WAYS),
        "inside over after, pairs",
    ]
    text = table(head, measure(options.rounds, options.steps))
    print(text)
    if options.write:
        write_result("reduction", machine(), [text])
