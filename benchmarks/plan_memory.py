"""What `hf-gradacc plan` says of memory, beside what runs take: anonymous memory, or the GPU's.

    python benchmarks/plan_memory.py --write
    python benchmarks/plan_memory.py --layers 6 --write    # minutes on two cores

Each variant is a recipe for SmolLM2-135M's shape with random weights, trained for two updates in a
process of its own, a fork of one that has imported everything. On a CPU the peak is that of
anonymous memory (`RssAnon`), read every 5 ms; files that are mapped, such as libraries, do not
count. Python, libraries, tokenizer and rows, which are there before the model is, stand in a column
of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from report import machine, table, write_result

import hf_gradacc.recipe.run
import hf_gradacc.trainer.mixin
from hf_gradacc.recipe.plan import screen as plan_screen
from hf_gradacc.recipe.plan.memory import anonymous_bytes

SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ROWS = Path(__file__).resolve().parents[1] / "recipes/data/word_problems.jsonl"
VARIANTS: dict[str, dict[str, Any]] = {
    "full, float32": {"model.dtype": "float32"},
    "full, bfloat16, plain": {
        "model.dtype": "bfloat16",
        "train.low_precision_updates": "plain",
    },
    "full, bfloat16, master": {
        "model.dtype": "bfloat16",
        "train.low_precision_updates": "master",
    },
    "LoRA, bfloat16": {"model.dtype": "bfloat16", "peft": "lora"},
}


def make_recipe(variant: str, layers: int, out: str) -> Any:
    from hf_gradacc.recipe import load_recipe

    recipe = {
        "model": {"config": SHAPE | {"num_hidden_layers": layers}},
        "tokenizer": {"train": {"vocab_size": 2048}},
        "data": {"train": str(ROWS), "format": "question_answer", "max_length": 512},
        "train": {
            "max_steps": 2,
            "effective_batch_size": 4,
            "max_tokens_per_micro_batch": 256,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
        },
        "output": {"dir": out},
    }
    path = Path(out, "recipe.json")
    path.write_text(json.dumps(recipe))
    changes = [f"{key}={value}" for key, value in VARIANTS[variant].items()]
    return load_recipe(path, overrides=changes)


def held() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return anonymous_bytes()


def measure(variant: str, layers: int) -> dict[str, float]:
    """Train, and return the memory before the model was made and the peak."""
    run = hf_gradacc.recipe.run
    before = 0
    peak = 0
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, held())
            time.sleep(0.005)

    def load_model(*args: Any, **kwargs: Any) -> Any:
        nonlocal before
        before = held()
        return stock(*args, **kwargs)

    stock, run.load_model = run.load_model, load_model
    with tempfile.TemporaryDirectory() as out:
        trainer, _ = run.build_trainer(make_recipe(variant, layers, out))
        sampler = threading.Thread(target=sample)
        sampler.start()
        trainer.train()
        ended.set()
        sampler.join()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"before": before, "peak": peak}


def plan(variant: str, layers: int) -> dict[str, float]:
    """Return what the plan of the same recipe says, without the weights being made."""
    from rich.console import Console

    said: dict[str, float] = {}
    estimate = plan_screen.estimate_memory

    def listen(*args: Any, **kwargs: Any) -> Any:
        memory = estimate(*args, **kwargs)
        said.update(total=memory.total, **vars(memory))
        return memory

    plan_screen.estimate_memory = listen
    with tempfile.TemporaryDirectory() as out:
        recipe = make_recipe(variant, layers, out)
        plan_screen.show_plan(recipe, console=Console(file=sys.stderr))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="keep the result under results/")
    options = parser.parse_args()
    forks = multiprocessing.get_context("fork")
    lines = []
    for variant in VARIANTS:
        found = []
        for function in (plan, measure):
            with forks.Pool(1) as pool:
                found.append(pool.apply(function, (variant, options.layers)))
        said, took = found
        run = took["peak"] - took["before"]
        parts = (
            "weights",
            "gradients",
            "optimizer",
            "masters",
            "activations",
            "logits",
            "new_gradient",
        )
        line = [
            variant,
            *(f"{said[part] / 1e6:,.0f}" for part in parts),
            f"{said['total'] / 1e6:,.0f}",
            f"{run / 1e6:,.0f}",
            f"{said['total'] / run:.2f}",
            f"{took['before'] / 1e6:,.0f}",
        ]
        print(*line, sep=" | ", flush=True)
        lines.append(line)
    header = [
        "recipe (MB)",
        "weights",
        "gradients",
        "optimizer",
        "masters",
        "activations",
        "logits",
        "new gradient",
        "planned",
        "measured",
        "planned / measured",
        "before the model",
    ]
    result = table(header, lines)
    print(result)
    if options.write:
        write_result("plan-memory", machine(), [result])


if __name__ == "__main__":
    main()
