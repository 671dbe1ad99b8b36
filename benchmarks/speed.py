"""Seconds per update: the stock Trainer's sampling strategies, TRL, and ours, on the same rows.

    python benchmarks/speed.py --rows gsm8k --shape llama-9m --rounds 5

One round trains one update of 64 sequences with every variant, in random order, through the whole
Trainer (loading, collating, forward, backward, optimizer step). All variants of a round see the
same 64 rows, and other load on the machine falls on all of them alike; what is reported are the
medians over rounds, of seconds and of the ratio to ours in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from transformers import Trainer, TrainerCallback, TrainingArguments
from workloads import (
    SHARING,
    dense_rows,
    describe,
    make_collator,
    make_model,
    make_rows,
    make_tokenizer,
    text_source,
)

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.loss.shortcuts.onednn import is_onednn_faster_here
from hf_gradacc.updates.trees.prefixes import count_distinct_tokens, sort_by_prefix

BATCH = 64
OURS = "ours"
DENSE = "dense bound"


class Stopwatch(TrainerCallback):
    """Time an epoch of one update, and keep its gradient if asked."""

    def __init__(self, *, keep_gradient: bool = False) -> None:
        self.keep_gradient = keep_gradient
        self.gradient: list[torch.Tensor] = []
        self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _finish_device_work()
        self.start = clock()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep_gradient:
            paused = clock()
            parameters = kwargs["model"].parameters()
            self.gradient = [p.grad.detach().clone() for p in parameters if p.grad is not None]
            self.start += clock() - paused

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _finish_device_work()
        self.seconds = clock() - self.start


class CountingCollator:
    """Count what goes through any collator."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.computed = self.used = self.batches = 0

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        mask = batch.get("attention_mask")
        self.computed += batch["input_ids"].numel()
        self.used += batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.batches += 1
        return batch


def clock() -> float:
    """Seconds of this process on a CPU, of the wall on a GPU.

    With one thread the two are the same on an idle machine; on a shared one only the first says
    what the work costs.
    """
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


Maker = Callable[[Any, list[Any], Any], Trainer]


def common(**options: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 0.0,  # all variants meet the same weights
        "max_grad_norm": 0,
        "logging_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        **options,
    }


def stock(strategy: str, size: int, **options: Any) -> Maker:
    def make(model: Any, rows: list[Any], collator: Any) -> Trainer:
        args = TrainingArguments(
            **common(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=BATCH // size,
                train_sampling_strategy=strategy,
                **options,
            )
        )
        return Trainer(model, args, train_dataset=rows, data_collator=collator)

    return make


def ours(budget: int | str, *, attention: str = "sdpa", **options: Any) -> Maker:
    def make(model: Any, rows: list[Any], collator: Any) -> Trainer:
        model.set_attn_implementation(attention)
        args = GradAccArguments(
            **common(effective_batch_size=BATCH, max_tokens_per_micro_batch=budget, **options)
        )
        return GradAccTrainer(model, args, train_dataset=rows, data_collator=collator)

    return make


def trl(size: int, *, attention: str = "sdpa", **options: Any) -> Maker:
    def make(model: Any, rows: list[Any], collator: Any) -> Trainer:
        import datasets
        from trl import SFTConfig, SFTTrainer

        model.set_attn_implementation(attention)
        args = SFTConfig(
            **common(
                per_device_train_batch_size=size,
                **{
                    "gradient_accumulation_steps": BATCH // size,
                    "max_length": None,
                    "completion_only_loss": True,
                    "gradient_checkpointing": False,
                    **options,
                },
            )
        )
        dataset = datasets.Dataset.from_list(
            [
                {
                    "input_ids": row["input_ids"],
                    "completion_mask": [int(label != -100) for label in row["labels"]],
                }
                for row in rows
            ]
        )
        return SFTTrainer(
            model, args=args, train_dataset=dataset, processing_class=make_tokenizer()
        )

    return make


def variants(
    *, sizes: list[int], budgets: list[int], with_trl: bool, shares: bool = False
) -> dict[str, Maker]:
    best = budgets[len(budgets) // 2]
    found: dict[str, Maker] = {"stock random 8x8": stock("random", 8)}
    for strategy in ("group_by_length", "batch_rebalance"):
        for size in sizes:
            found[f"stock {strategy} {size}x{BATCH // size}"] = stock(strategy, size)
    if with_trl:
        found["TRL SFTTrainer 8x8"] = trl(8)
        found["TRL padding-free 8x8"] = trl(8, padding_free=True)
        # All rows of the update in bins of that length, one bin a micro-batch.
        found[f"TRL packing {best}"] = trl(1, packing=True, max_length=best)
    if not shares:
        found |= _parts(best)
    for budget in budgets:
        found[f"{OURS}, budget {budget}"] = ours(budget)
        if shares:
            found[f"padded, budget {budget}"] = ours(budget, layout="padded")
    found[f"{OURS}, packed, budget {best}"] = ours(best, layout="packed")
    if torch.cuda.is_available():
        for attention in ("flash_attention_2", "flex_attention"):
            found[f"{OURS}, packed, {attention}, budget {best}"] = ours(
                best, layout="packed", attention=attention
            )
    return found


def _parts(best: int) -> dict[str, Maker]:
    """Ours with some parts left out, to see what each gives."""
    found: dict[str, Maker] = {}
    plain = {"target_only_logits": False, "drop_attention_mask": False, "layout": "padded"}
    plain |= {"onednn_linear": False}
    found[f"budget {best} alone"] = ours(best, **plain)
    found[f"budget {best}, target-only logits"] = ours(best, **(plain | TARGETS))
    if is_onednn_faster_here():
        found[f"budget {best}, all but oneDNN"] = ours(best, onednn_linear=False)
    return found


TARGETS = {"target_only_logits": True}


def run_once(
    make: Maker,
    model: Any,
    rows: list[Any],
    *,
    keep_gradient: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Stopwatch, CountingCollator]:
    """Train; the watch and the counts are those of the last epoch."""
    watch = Stopwatch(keep_gradient=keep_gradient)
    trainer: Any
    collator = CountingCollator(make_collator(make_tokenizer()))
    with quietly():
        trainer = make(model, rows, collator)
        if not isinstance(trainer, GradAccTrainer) and type(trainer) is not Trainer:
            collator.collator, trainer.data_collator = trainer.data_collator, collator
        trainer.add_callback(watch)
        # The rows the model is asked with before training are no part of the update.
        trainer.add_callback(_ResetCounts(collator))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
    if isinstance(trainer, GradAccTrainer):  # what was collated is laid out anew
        collator.computed = trainer.last_update.stats.num_computed_tokens
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("sdpa")
    del trainer
    gc.collect()
    return watch, collator


class _ResetCounts(TrainerCallback):
    def __init__(self, collator: CountingCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.computed = self.collator.used = self.collator.batches = 0


def reference_gradient(model: Any, rows: list[Any]) -> list[torch.Tensor]:
    """The mean over all targets, row by row: together, padded rows could need 20 GiB of logits."""
    collate = make_collator(make_tokenizer())
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    model.train()
    for row, count in zip(rows, counts, strict=True):
        batch = {key: value.to(model.device) for key, value in collate([row]).items()}
        (model(**batch).loss * (count / sum(counts))).backward()
    gradient = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradient


def describe_sharing(kind: str) -> str:
    """Say how many of an update's tokens are left if each beginning is computed once."""
    tokens = [row["input_ids"] for row in make_rows(kind, BATCH)]
    distinct = count_distinct_tokens(sort_by_prefix(tokens))
    return f"{distinct / sum(map(len, tokens)):.3f} of an update's tokens are distinct"


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for b in expected)
    return (off / size) ** 0.5


def measure(kind: str, shape: str, *, rounds: int, makers: dict[str, Maker]) -> dict[str, Any]:
    """Run all rounds; give for each variant its seconds, padding and gradient difference."""
    model = make_model(shape).to("cuda" if torch.cuda.is_available() else "cpu")
    vocab = model.config.vocab_size
    # The dense bound runs the same code on rows of one length, with each of our budgets.
    dense_makers = {
        name.replace(OURS, DENSE): maker
        for name, maker in makers.items()
        if name.startswith(f"{OURS}, budget")
    }
    if kind in SHARING:
        dense_makers = {}
    makers = makers | dense_makers
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    facts: dict[str, dict[str, float]] = {name: {} for name in seconds}
    for number in range(rounds):
        rows = make_rows(kind, BATCH, vocab_size=vocab, seed=number)
        dense = dense_rows(rows, seed=number)
        order = list(makers)
        random.Random(number).shuffle(order)
        expected = reference_gradient(model, rows) if number == 0 else []
        targets = sum(label != -100 for row in rows for label in row["labels"][1:])
        for name in order:
            used = dense if name in dense_makers else rows
            try:
                watch, collator = run_once(makers[name], model, used, keep_gradient=number == 0)
            except Exception as error:
                if number > 0:
                    raise
                # A variant that does not run here is left out, and that is said.
                print(f"  {name} left out: {type(error).__name__}: {error}", flush=True)
                del makers[name], seconds[name], facts[name]
                continue
            seconds[name].append(watch.seconds)
            fact = facts[name]
            if number == 0 and used is rows:
                fact["gradient_error"] = difference(watch.gradient, expected)
            fact["targets"] = fact.get("targets", 0) + targets
            for key in ("computed", "used", "batches"):
                fact[key] = fact.get(key, 0) + getattr(collator, key)
        line = ", ".join(f"{name} {times[-1]:.2f}" for name, times in seconds.items())
        print(f"  round {number + 1}: {line}", flush=True)
    return {"seconds": seconds, "facts": facts}


def summarize(result: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Rows of the table, and which of ours is compared with."""
    seconds, facts = result["seconds"], result["facts"]
    fastest = min(
        (name for name in seconds if name.startswith(OURS)),
        key=lambda name: statistics.median(seconds[name]),
    )
    lines = []
    for name, times in seconds.items():
        fact = facts[name]
        ratio = statistics.median(a / b for a, b in zip(times, seconds[fastest], strict=True))
        packed = "pack" in name or "padding-free" in name
        computed = 1.0 if packed and OURS not in name else fact["computed"] / max(fact["used"], 1)
        error = fact.get("gradient_error")
        lines.append(
            [
                f"**{name}**" if name == fastest else name,
                f"{statistics.median(times):.2f}",
                f"{ratio:.2f}",
                f"{fact['targets'] / sum(times):,.0f}",
                f"{computed:.3f}",
                f"{fact['batches'] / len(times):.0f}",
                "" if error is None else f"{error:.0e}",
            ]
        )
    return lines, fastest


HEADER = ["variant", "s/update", "x ours", "targets/s", "computed", "micro-batches", "grad. off"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["gsm8k"])
    parser.add_argument("--shape", default="llama-9m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--only", nargs="+", help="variants whose name holds one of these")
    parser.add_argument("--out", help="theme of a file under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    text = []
    for kind in options.rows:
        sample = make_rows(kind, 1024)
        source = f" from {text_source()}" if kind.startswith("gsm8k") else ""
        print(f"{kind}{source}: {describe(sample)}", flush=True)
        makers = variants(
            sizes=options.sizes,
            budgets=options.budgets,
            with_trl=not options.no_trl,
            shares=kind in SHARING,
        )
        if options.only:
            makers = {k: v for k, v in makers.items() if any(part in k for part in options.only)}
        lines, _ = summarize(measure(kind, options.shape, rounds=options.rounds, makers=makers))
        about = describe(sample) + (f"; {describe_sharing(kind)}" if kind in SHARING else "")
        section = f"### {kind}{source}\n\n{about}\n\n{table(HEADER, lines)}"
        print(section, flush=True)
        text.append(section)
    head = (
        f"{options.shape}, effective batch {BATCH}, {options.rounds} rounds, "
        f"{options.threads} thread(s), {machine()}. Medians over rounds; `x ours` is the median "
        f"of the ratios to the fastest of ours (bold) in the same round; `computed` are the tokens "
        f"that go through the model, for each input token. Seconds are "
        f"{'of the wall' if torch.cuda.is_available() else 'of CPU time'}."
    )
    if options.out:
        write_result(options.out, head, text)


if __name__ == "__main__":
    main()
