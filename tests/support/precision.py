"""What summing gradients in a low precision costs, against a sum in float64."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from .reference import gradient_of, reference_gradient, relative_error
from .tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama


def gradient_error(rows: list[Any]) -> float:
    """The error of bf16 backward passes themselves, their gradients summed in float64."""
    model = tiny_llama(dtype=torch.bfloat16)
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    total: dict[str, torch.Tensor] = {}
    for row, count in zip(rows, counts, strict=True):
        if not count:
            continue
        model.zero_grad(set_to_none=True)
        (model(**pad([row])).loss * (count / sum(counts))).backward()
        for name, gradient in gradient_of(model).items():
            total[name] = total.get(name, 0) + gradient.double()
    expected = reference_gradient(tiny_llama(dtype=torch.bfloat16).double(), rows, pad)
    return relative_error(total, expected)


def train_in_bf16_on_ranks() -> dict[str, Any]:
    """Train bf16 weights on this rank, with sums in float32 and without."""
    rows = ragged_rows(64, seed=2)
    expected = reference_gradient(tiny_llama(dtype=torch.bfloat16).double(), rows, pad)
    results: dict[str, Any] = {}
    for in_fp32 in (None, False):
        model, recorder = tiny_llama(dtype=torch.bfloat16), Recorder()
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(
                out,
                rows,
                model=model,
                callbacks=[recorder],
                effective_batch_size=64,
                per_device_train_batch_size=1,
                accumulate_grads_in_fp32=in_fp32,
                low_precision_updates="stochastic",  # ranks must round alike
            )
            seen: set[torch.dtype] = set()
            stock = trainer._get_grad_norm

            def look(
                model: Any, grad_norm: Any = None, stock: Any = stock, seen: Any = seen
            ) -> Any:
                seen.update(p.grad.dtype for p in model.parameters())
                return stock(model, grad_norm=grad_norm)

            trainer._get_grad_norm = look
            trainer.train()
        gradient = {n.removeprefix("module."): g for n, g in recorder.gradients[0].items()}
        error = relative_error(gradient, expected)
        if in_fp32 is None:
            results |= {
                "error": error,
                "reduced": seen,
                "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
            }
        else:
            results["error_in_bf16"] = error
    return results
