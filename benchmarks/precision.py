"""What adding up bfloat16 gradients loses: the stock Trainer's sum, and ours in float32.

    python benchmarks/precision.py

A tiny Llama with bfloat16 weights trains one update of GA micro-batches. A hook adds up the very
gradients that autograd hands over, in float64; the error is how far the accumulated gradient is
from that sum, so neither the model's own bfloat16 arithmetic nor any weighting enters. "Identical
rows" repeats one row: every micro-batch then has the same gradient, and the norm should be theirs.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_gradacc import GradAccArguments, GradAccTrainer

VOCABULARY, LENGTH = 256, 32

NOTES = """Errors are relative, in the norm over all parameters, against the float64 sum of the same
micro-batch gradients. The cast is one rounding to 8 bits (at most 2^-8 of an element, 0.17 % of the
norm here), and does not grow with GA. The sum in float32 takes 2 more bytes per trainable weight
until the optimizer has stepped."""


class Sums(TrainerCallback):
    """The accumulated gradient, and the float64 sum of what went into it."""

    def __init__(self) -> None:
        self.true: dict[str, Tensor] = {}
        self.clipped: dict[str, Tensor] = {}
        self.stepped: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._add(name, gradient))

    def _add(self, name: str, gradient: Tensor) -> None:
        self.true[name] = self.true.get(name, torch.zeros(())) + gradient.double()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.stepped = gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum(float((actual[n] - g).square().sum()) for n, g in expected.items())
    return (difference / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


def norm(gradient: dict[str, Tensor]) -> float:
    return sum(float(g.square().sum()) for g in gradient.values()) ** 0.5


def accumulate(ours: bool, rows: list[dict[str, list[int]]]) -> tuple[float, float, float]:
    """Train one update of as many micro-batches as rows.

    Returns:
        Error of the sum, error of what the optimizer gets, norm of the sum over the true one.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    sums = Sums()
    sums.watch(model)
    arguments = GradAccArguments if ours else TrainingArguments
    base = GradAccTrainer if ours else Trainer

    class Looking(base):  # type: ignore[misc, valid-type]
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            sums.clipped = gradients(model)
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    with tempfile.TemporaryDirectory() as out:
        Looking(
            model,
            arguments(
                output_dir=out,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=len(rows),
                max_steps=1,
                max_grad_norm=0.0,
                optim="sgd",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            callbacks=[sums],
        ).train()
    return (
        error(sums.clipped, sums.true),
        error(sums.stepped, sums.true),
        norm(sums.clipped) / norm(sums.true),
    )


def make_rows(count: int, *, identical: bool) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    shape = (1 if identical else count, LENGTH)
    ids = torch.randint(VOCABULARY, shape, generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return rows * count if identical else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--write", action="store_true", help="keep the result under results/")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines = []
    for steps in options.steps:
        rows = make_rows(steps, identical=False)
        stock, _, _ = accumulate(False, rows)
        ours, stepped, _ = accumulate(True, rows)
        same = make_rows(steps, identical=True)
        _, _, stock_norm = accumulate(False, same)
        _, _, our_norm = accumulate(True, same)
        lines.append(
            [
                str(steps),
                f"{stock:.2%}",
                f"{ours:.1e}",
                f"{stepped:.2%}",
                f"{stock_norm:.3f}",
                f"{our_norm:.3f}",
            ]
        )
    header = [
        "GA",
        "error of stock's sum (bf16)",
        "error of our sum (fp32)",
        "ours, cast for the optimizer",
        "identical rows: stock's norm / true",
        "ours / true",
    ]
    result = table(header, lines)
    print(result)
    if options.write:
        write_result("precision", machine(), [result], notes=NOTES)


if __name__ == "__main__":
    main()
