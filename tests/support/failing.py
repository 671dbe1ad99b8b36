"""Failures as they happen: allocators that give up, numbers that go bad, at a chosen place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from support.hooks import of_no_user
from torch import Tensor, nn

from hf_gradacc import GradAccTrainer

from .reduction_jobs import small_buckets
from .reference import float64_everywhere
from .tiny import make_trainer, ragged_rows, timeless_log_rows, tiny_llama


class _Passing(torch.autograd.Function):
    """Gives its input; calls back when the gradient comes through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


class Failure:
    """Raises in the last layer of a model, in forward or in backward, when told so.

    Args:
        model: A tiny Llama.
        when: Called with rows, width and how many micro-batches came before; True to fail.
        where: "forward" or "backward".
        error: What to raise.
    """

    def __init__(
        self,
        model: nn.Module,
        when: Callable[[int, int, int], bool],
        *,
        where: str = "forward",
        error: Exception | None = None,
        evaluation: bool = False,
    ) -> None:
        self.when, self.where, self.evaluation = when, where, evaluation
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        self.seen = self.raised = 0
        layer = model.model.layers[-1]
        self.handle = layer.register_forward_hook(of_no_user(self._after_forward))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if module.training == self.evaluation:
            return output
        fails = self.when(hidden.shape[0], hidden.shape[1], self.seen)
        self.seen += 1
        if not fails:
            return output
        if self.where == "forward":
            self._raise()
        hidden = _Passing.apply(hidden, self._raise)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _raise(self) -> None:
        self.raised += 1
        # A new one each time: raised again, it would keep the frames of all times before.
        raise type(self.error)(*self.error.args)


def beyond(tokens: int) -> Callable[[int, int, int], bool]:
    """Fail on micro-batches of more tokens."""
    return lambda rows, width, seen: rows * width > tokens


def train(
    out: Any,
    *,
    rows: Any = None,
    model: dict[str, Any] | None = None,
    failure: dict[str, Any] | None = None,
    lower: tuple[int, int] | None = None,
    callbacks: Any = (),
    prepare: Callable[[nn.Module], None] | None = None,
    seed: int = 7,
    **options: Any,
) -> dict[str, Any]:
    """Train a tiny Llama in float64, with dropout, and give back everything that must agree.

    Args:
        out: Output directory.
        rows: The dataset.
        model: Changes to the tiny Llama.
        failure: Arguments of `Failure`.
        lower: (update, cap): lower the budget before that update without any failure.
        callbacks: For the trainer.
        prepare: Called with the model first.
        seed: Of dropout.
        **options: Of the trainer.
    """
    settings: dict[str, Any] = {"effective_batch_size": 10, "max_tokens_per_micro_batch": 64}
    with float64_everywhere():
        network = tiny_llama(**{"attention_dropout": 0.2} | (model or {}))
        if prepare is not None:
            prepare(network)
        injected = Failure(network, **failure) if failure else None
        trainer = make_trainer(
            out,
            ragged_rows(30, seed=5) if rows is None else rows,
            model=network,
            callbacks=callbacks,
            **settings | options,
        )
        if lower is not None:
            _lower_before(trainer, *lower)
        torch.manual_seed(seed)
        trainer.train()
    return {
        "trainer": trainer,
        "weights": {n: p.detach().clone() for n, p in network.named_parameters()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "logs": timeless_log_rows(trainer),
        "raised": injected.raised if injected else 0,
        "cap": trainer.token_budget.cap,
        "noise": _measurements(trainer),
        "random": torch.rand(3),
    }


def _measurements(trainer: Any) -> list[list[float]]:
    record = trainer._noise_listener.record
    return [] if record is None else record.meter.state()


def _lower_before(trainer: Any, update: int, cap: int) -> None:
    run = trainer.training_update

    def lowered(model: Any, loaded: Any) -> Any:
        if trainer.state.global_step == update and trainer.token_budget.cap is None:
            trainer.token_budget.shrink_to(cap)
        return run(model, loaded)

    trainer.training_update = lowered


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two runs agree bit for bit: weights, optimizer, logs, random numbers to come."""
    return (
        all(torch.equal(left["weights"][n], w) for n, w in right["weights"].items())
        and str(left["optimizer"]) == str(right["optimizer"])
        and left["logs"] == right["logs"]
        and torch.equal(left["random"], right["random"])
    )


def train_ranks(scenarios: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train scenarios in one process group; the failure strikes on the ranks it names."""
    import os
    import tempfile

    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        scenario = dict(scenario)
        on_ranks = scenario.pop("on_ranks", ())
        limit = scenario.pop("limit", None)
        where = scenario.pop("where", "forward")
        error = scenario.pop("error", None)
        poison = scenario.pop("poison", ())
        if poison:
            scenario |= {"rows": _poisoned(poison), "trainer_class": Poisoned}
        if limit is not None and int(os.environ["RANK"]) in on_ranks:
            scenario["failure"] = {"when": beyond(limit), "where": where, "error": error}
        with tempfile.TemporaryDirectory() as out, small_buckets():
            try:
                result = train(out, **scenario)
                result.pop("trainer")
            except Exception as caught:
                result = {"error": type(caught).__name__, "text": str(caught)}
        results[name] = result
    return results


def run_out_of_memory_while_sharded(where: str) -> tuple[str, str]:
    """Train under FSDP2; one rank runs out of memory inside of a forward or backward.

    Returns:
        What kind of error ended this rank, and its words.
    """
    import os
    import tempfile

    from .rank_jobs import FSDP2, allow_sharding_on_cpu

    allow_sharding_on_cpu()
    fails = os.environ["RANK"] == "1"
    failure = {"when": lambda rows, width, seen: seen == 4, "where": where} if fails else None
    with tempfile.TemporaryDirectory() as out:
        try:
            train(out, failure=failure, max_tokens_per_micro_batch=24, **FSDP2)
        except Exception as caught:
            return type(caught).__name__, str(caught)
    return "", ""


POISON = 1  # a token that no row holds by itself


class Poisoned(GradAccTrainer):
    """Gives a loss of NaN for rows with one certain token."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and bool((inputs["input_ids"] == POISON).any()):
            return loss * math.nan
        return loss


def _poisoned(indices: Any) -> list[Any]:
    rows = ragged_rows(30, seed=5)
    for index in indices:
        rows[index]["input_ids"][0] = POISON
    return rows


def train_in_little_memory() -> tuple[int | None, float]:
    """Train where the kernel gives no more than 500 MiB on top of what is already used.

    Returns:
        The budget it settled on, and how far its weights are from those of a run in peace.
    """
    import resource
    import tempfile
    from pathlib import Path

    options: dict[str, Any] = {
        # Of one length: the planner would part long from short, and never need that much.
        "rows": [{k: (v * 60)[:60] for k, v in row.items()} for row in ragged_rows(16, seed=5)],
        "effective_batch_size": 16,
        "model": {"vocab_size": 60_000, "attention_dropout": 0.0},
        "target_only_logits": False,
    }
    with tempfile.TemporaryDirectory() as out:
        calm = train(out, max_tokens_per_micro_batch=100, **options)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 500 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        tight = train(out, max_tokens_per_micro_batch=4096, **options)
    errors = [(tight["weights"][n] - w).abs().max() for n, w in calm["weights"].items()]
    return tight["cap"], float(max(errors))


__all__ = [
    "Failure",
    "beyond",
    "run_out_of_memory_while_sharded",
    "same",
    "train",
    "train_in_little_memory",
    "train_ranks",
]
