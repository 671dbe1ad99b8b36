"""Peak memory of one micro-batch with a vocabulary of 150,000: all logits, or only the targets'.

    python benchmarks/memory.py

Every variant trains the same 8 rows as one micro-batch, in a process of its own. On a CPU the peak
is that of the process's resident memory, on a GPU that of the allocator; what stands there before
training (Python, weights) is subtracted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from report import machine, table, write_result
from workloads import make_collator, make_model, make_rows, make_tokenizer

from hf_gradacc.loss.shortcuts.chunked import ChunkedLoss

VOCAB = 150_000
ROWS = 8
VARIANTS = {
    "stock": {},
    "ours, all logits": {"target_only_logits": False},
    "ours, target-only logits": {"target_only_logits": True, "chunked_loss": False},
    "ours, chunked loss": {"target_only_logits": True, "chunked_loss": True},
}
# torch's chunked kernel as it comes and as it is fastest here, and ours.
KERNELS = (
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy, 256 rows, compact",
    "ours",
)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def train(variant: str) -> dict[str, float]:
    """Train one update; the plan is the same for all: one micro-batch."""
    import transformers
    from transformers import Trainer, TrainingArguments

    from hf_gradacc import GradAccArguments, GradAccTrainer

    transformers.logging.set_verbosity_error()
    options = {
        "output_dir": "/tmp/benchmark-memory",
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "use_cpu": not torch.cuda.is_available(),
    }
    model = make_model("llama-9m", vocab_size=VOCAB, num_hidden_layers=2)
    rows = make_rows("gsm8k", ROWS, seed=1)
    tools = {"train_dataset": rows, "data_collator": make_collator(make_tokenizer())}
    if variant == "stock":
        trainer = Trainer(model, TrainingArguments(**options), **tools)
    else:
        trainer = GradAccTrainer(model, GradAccArguments(**options, **VARIANTS[variant]), **tools)
    before = peak_bytes()
    started = time.process_time()
    trainer.train()
    return {"bytes": peak_bytes() - before, "seconds": time.process_time() - started}


def run_kernel(name: str) -> dict[str, float]:
    """Loss over chosen rows: all their logits at once, or a chunk of them."""
    torch.manual_seed(0)
    hidden = torch.randn(700, 256, requires_grad=True)
    weight = torch.randn(VOCAB, 256, requires_grad=True)
    labels = torch.randint(0, VOCAB, (700,))
    before = peak_bytes()
    started = time.process_time()
    if name == "ours":
        loss = ChunkedLoss.apply(hidden, weight, None, labels, True) / len(labels)
    elif name.startswith("linear_cross_entropy"):
        settings = {"batch_chunk_size": 256, "chunking_method": None, "acc_policy": "compact"}
        options = torch.nn.LinearCrossEntropyOptions(**(settings if "compact" in name else {}))
        loss = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)
    else:
        loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    loss.backward()
    return {"bytes": peak_bytes() - before, "seconds": time.process_time() - started}


def in_a_process(name: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=[*VARIANTS, *KERNELS])
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        one = run_kernel(options.one) if options.one in KERNELS else train(options.one)
        print(json.dumps(one))
        return
    sections = []
    for title, names in (
        (f"One micro-batch of {ROWS} GSM8K rows, hidden 256, 2 layers", list(VARIANTS)),
        ("The loss alone: 700 target rows, hidden 256", list(KERNELS)),
    ):
        results = {name: in_a_process(name) for name in names}
        first = results[names[0]]
        lines = [
            [
                name,
                f"{result['bytes'] / 2**20:,.0f} MiB",
                f"{result['bytes'] / first['bytes']:.2f}",
                # Training's seconds would hold those of asking the model how its loss counts.
                f"{result['seconds']:.2f}" if name in KERNELS else "",
            ]
            for name, result in results.items()
        ]
        header = ["variant", "peak above what was there", "of the first", "CPU seconds"]
        sections.append(f"### {title}\n\n{table(header, lines)}")
        print(sections[-1], flush=True)
    if options.out:
        write_result(options.out, f"Vocabulary {VOCAB:,}, float32, {machine()}.", sections)


if __name__ == "__main__":
    main()
