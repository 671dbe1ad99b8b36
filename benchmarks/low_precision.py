"""What becomes of small steps on bfloat16 weights: rounded away, at random, or kept in float32.

    python benchmarks/low_precision.py --updates 200 --write
    python benchmarks/low_precision.py --updates 200 --layers 1 --write    # minutes on two cores

SmolLM2-135M-Instruct (`make real`) is fine-tuned on word problems with AdamW, all runs from the
same bfloat16 weights and on the same updates. With ``--layers`` only its first layers are kept, and
of its vocabulary only what occurs. A weight has moved if its value differs from the one it began
with. The loss is that of held-out rows, computed in float32 from the weights as they would
be saved, so that only what was learned differs between runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_gradacc import GradAccArguments, GradAccTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.real_parts import part_folder  # noqa: E402

HELD_OUT, ROWS_PER_UPDATE, LONGEST = 32, 4, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stock Trainer": {},
    "bfloat16, plain": {"low_precision_updates": "plain"},
    "bfloat16, stochastic": {"low_precision_updates": "stochastic"},
    "bfloat16, master": {"low_precision_updates": "master"},
}

NOTES = """Lost share: 1 - <r, s> / <s, s>, with s the float32 step and r what rounding leaves,
measured on one update. Bytes per weight: weights, summed gradients, optimizer state and master
weights; the stock Trainer sums gradients in bfloat16. With stochastic rounding there are 4 bytes
more while the optimizer steps."""
BYTES = {"float32": 16, "stock": 8, "plain": 10, "stochastic": 14, "master": 18}


def load(layers: int | None, used: Tensor) -> nn.Module:
    """Load the model, or its first layers with the part of its vocabulary that is used."""
    model = AutoModelForCausalLM.from_pretrained(part_folder("smollm2"), dtype=torch.bfloat16)
    if layers is None:
        return model
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    kept = model.get_input_embeddings().weight.detach()[used].clone()
    model.resize_token_embeddings(len(used))
    model.get_input_embeddings().weight.data.copy_(kept)
    return model


def make_rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    lines = (ROOT / "recipes/data/word_problems.jsonl").read_text().splitlines()
    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    ids = [tokenizer(text).input_ids[:LONGEST] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


def held_out_loss(model: nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """The mean loss per target of the weights as they are, computed in float32."""
    wide = AutoModelForCausalLM.from_config(model.config).float().eval()
    wide.load_state_dict(model.state_dict())
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            total += float(wide(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def column(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


class Moved(transformers.TrainerCallback):
    """The share of weights that differ from those a run began with, after the first update."""

    def __init__(self, before: dict[str, Tensor]) -> None:
        self.before = before
        self.after_one = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.after_one = moved(model, self.before)


def moved(model: nn.Module, before: dict[str, Tensor]) -> float:
    differing = sum(int((p != before[n]).sum()) for n, p in model.named_parameters())
    return differing / sum(p.numel() for p in before.values())


def train(
    variant: str,
    model: nn.Module,
    rows: list[dict[str, list[int]]],
    *,
    updates: int,
    learning_rate: float,
) -> list[str]:
    is_stock = "stock" in variant
    if variant == "float32":
        model = model.float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = Moved(before)
    kind, base = (TrainingArguments, Trainer) if is_stock else (GradAccArguments, GradAccTrainer)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        trainer = base(
            model,
            kind(
                output_dir=out,
                per_device_train_batch_size=ROWS_PER_UPDATE // 2,
                gradient_accumulation_steps=2,
                max_steps=updates,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=20,
                **VARIANTS[variant],
            ),
            train_dataset=rows[:-HELD_OUT],
            data_collator=pad,
            callbacks=[seen],
        )
        trainer.train()
    seconds = (time.process_time() - started) / updates
    steps = getattr(trainer, "optimizer_steps", None)
    lost = None if steps is None else steps.lost_share
    return [
        variant,
        "-" if lost is None else f"{lost:.1%}",
        f"{seen.after_one:.1%}",
        f"{moved(model, before):.1%}",
        f"{held_out_loss(model, rows[-HELD_OUT:]):.4f}",
        str(next(size for name, size in BYTES.items() if name in variant)),
        f"{seconds:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--write", action="store_true", help="keep the result under results/")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = make_rows(AutoTokenizer.from_pretrained(part_folder("smollm2")))
    used = torch.tensor(sorted({token for row in rows for token in row["input_ids"]}))
    if options.layers is not None:
        place = {int(token): i for i, token in enumerate(used)}
        rows = [{name: [place[t] for t in ids] for name, ids in row.items()} for row in rows]
    model = load(options.layers, used)
    size = sum(p.numel() for p in model.parameters())
    loss = held_out_loss(model, rows[-HELD_OUT:])
    before = (
        f"{size:,} weights, learning rate {options.learning_rate:g}. Held-out loss before "
        f"training: {loss:.4f}."
    )
    lines = []
    for variant in VARIANTS:
        model = load(options.layers, used)
        lines.append(
            train(
                variant,
                model,
                rows,
                updates=options.updates,
                learning_rate=options.learning_rate,
            )
        )
        print(*lines[-1], sep=" | ", flush=True)
        gc.collect()
    header = [
        "weights",
        "lost share of a step",
        "moved after 1 update",
        f"moved after {options.updates}",
        "held-out loss",
        "bytes per weight",
        "CPU seconds per update",
    ]
    result = table(header, lines)
    print(before, result, sep="\n")
    if options.write:
        write_result("low-precision", machine(), [before, result], notes=NOTES)


if __name__ == "__main__":
    main()
