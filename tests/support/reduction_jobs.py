"""What the tests of reducing gradients over ranks run on each of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.ranks import engine
from hf_gradacc.ranks.ddp import free_buckets, keep_ranks_apart
from hf_gradacc.ranks.reduction import Reduction

from .reference import float64_everywhere
from .tiny import Recorder, make_trainer, ragged_rows, tiny_llama

__all__ = [
    "Sends",
    "free_and_use_ddp",
    "reduce_by_hand",
    "say_what_has_no_effect",
    "small_buckets",
    "train_and_write_late",
    "train_sharded",
]


@contextlib.contextmanager
def small_buckets(size: int = 3000) -> Iterator[None]:
    """Cut tiny models into several buckets, so that some are sent from inside of a backward."""
    with mock.patch.object(engine, "bucket_bytes_of", return_value=size):
        yield


class Sends:
    """Counts buckets: those sent before the last backward was over, and all."""

    def __init__(self) -> None:
        self.early = self.all = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        send, end = Reduction._send, Reduction.end_backward

        def counting_send(reduction: Reduction) -> None:
            self.all += 1
            send(reduction)

        def counting_end(reduction: Reduction) -> None:
            self.early += len(reduction._sent) if reduction._is_open else 0
            end(reduction)

        with (
            mock.patch.object(Reduction, "_send", counting_send),
            mock.patch.object(Reduction, "end_backward", counting_end),
        ):
            yield


class Tower(nn.Module):
    """Layers in a row, of which an input says which are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(6))

    def forward(self, value: Tensor, used: tuple[int, ...]) -> Tensor:
        for i in used:
            value = torch.tanh(self.layers[i](value))
        return value.square().sum()


def reduce_by_hand(
    updates: list[dict[str, Any]], *, bucket_bytes: int = 300
) -> list[dict[str, Any]]:
    """Reduce updates of a tower on this rank; give each one's gradient, and how it went.

    Args:
        updates: For each, ``micro_batches``: by rank, the layers that each micro-batch uses;
            ``fails``: the rank that fails in its last backward; ``twice``: the rank that runs its
            last backward twice; ``writes``: the rank that writes into ``.grad`` after it.
        bucket_bytes: Of the reduction.
    """
    dist.init_process_group("gloo")
    rank, model, results = dist.get_rank(), Tower(), []
    reduction = Reduction(bucket_bytes=bucket_bytes, is_early=True)
    for u, update in enumerate(updates):
        attempts = 0
        while True:
            attempts += 1
            first = attempts == 1
            result = _attempt(
                model,
                reduction,
                update["micro_batches"][rank],
                seed=100 * u + 10 * rank,
                fails=first and update.get("fails") == rank,
                twice=update.get("twice") == rank,
                writes=update.get("writes") == rank,
            )
            if result is not None:
                break
        results.append({**result, "attempts": attempts, "is_early": reduction.is_early})
        model.zero_grad()
    return results


def _attempt(
    model: Tower,
    reduction: Reduction,
    micro_batches: list[tuple[int, ...]],
    *,
    seed: int,
    fails: bool,
    twice: bool,
    writes: bool,
) -> dict[str, Any] | None:
    parameters = list(model.parameters())
    reduction.begin(parameters)
    failed, num_early = False, 0
    for i, used in enumerate(micro_batches):
        is_last = i + 1 == len(micro_batches)
        try:
            with reduction.listening() if is_last else contextlib.nullcontext():
                loss = model(make_value(seed + i), used)
                if fails and is_last:
                    parameters[2 * used[0]].register_hook(_raise)
                loss.backward(retain_graph=twice)
                num_early = len(reduction._sent)
                if is_last:
                    reduction.end_backward()
                if twice and is_last:
                    loss.backward()
                if writes and is_last:
                    for p in parameters:
                        if p.grad is not None:
                            p.grad.mul_(2)
        except RuntimeError:
            failed = True
            parameters[2 * used[0]]._backward_hooks.clear()
            for p in parameters:
                p.grad = None
    is_stale, places = reduction.finish(failed=failed)
    told = torch.tensor([failed, is_stale, *places])
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    if told[:2].any():
        reduction.abandon(is_stale=bool(told[1]))
        for p in parameters:
            p.grad = None
        return None
    num_buckets = len(reduction._buckets)
    reduction.complete(told[2:].tolist())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"gradient": grads, "early": num_early, "buckets": num_buckets}


def make_value(seed: int) -> Tensor:
    """The input of a micro-batch."""
    torch.manual_seed(seed)
    return torch.randn(3, 6, dtype=torch.float64)


def _raise(gradient: Tensor) -> None:
    raise RuntimeError("out of memory")


def _write(trainer: Any) -> None:
    for p in trainer.model.parameters():
        if p.grad is not None:
            p.grad.mul_(1.5)


class Writing(GradAccTrainer):
    """Changes gradients once the stock step has run, which nobody can see from its names."""

    write: Callable[[Any], None] = staticmethod(_write)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.write()
        return loss


def train_and_write_late(*, early: bool) -> dict[str, Any]:
    """Train with a step that changes ``.grad`` after its backward.

    Args:
        early: Try to send gradients from the backward; False sends them after it.
    """
    recorder, sends = Recorder(), Sends()
    size = 3000 if early else 1
    Writing.write = lambda trainer: _write(trainer)  # type: ignore[method-assign]
    make = Reduction.__init__

    def make_late(self: Reduction, *, bucket_bytes: int, is_early: bool) -> None:
        make(self, bucket_bytes=bucket_bytes, is_early=is_early and early)

    with (
        tempfile.TemporaryDirectory() as out,
        small_buckets(size),
        sends.counted(),
        mock.patch.object(Reduction, "__init__", make_late),
    ):
        trainer = make_trainer(
            out,
            ragged_rows(12, seed=3),
            model=tiny_llama(),
            trainer_class=Writing,
            callbacks=[recorder],
            effective_batch_size=4,
            per_device_train_batch_size=1,
        )
        trainer.train()
    return {"gradients": recorder.gradients, "sent": sends.all}


def free_and_use_ddp() -> dict[str, Any]:
    """Free DDP's buckets, train without them, then run a forward that DDP has to reduce."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])
    size = sum(_bytes(p) for p in model.parameters())
    ddp = DistributedDataParallel(model)
    keep_ranks_apart(ddp)
    before = _asked_bytes()
    free_buckets(ddp)
    freed = before - _asked_bytes()
    value = torch.full((2, 1024), 1.0 + dist.get_rank())
    with ddp.no_sync():
        ddp(value).sum().backward()
    local = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    ddp.zero_grad()
    ddp(value).sum().backward()
    mean = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {"size": size, "freed": freed, "local": local[0], "mean": mean[0]}


def _asked_bytes() -> int:
    """What the process has asked the system for: buckets are not touched before they are used."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmData"))


class Held(TrainerCallback):
    """Counts the bytes of gradients that this rank holds between two micro-batches."""

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.shards: list[int] = []

    def on_substep_end(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        groups = {id(g): g for state in states for g in state._fsdp_param_groups}
        whole = shards = 0
        for group in groups.values():
            for parameter in group.fsdp_params:
                whole += _bytes(parameter.unsharded_accumulated_grad)
                unsharded = getattr(parameter, "_unsharded_param", None)
                whole += _bytes(None if unsharded is None else unsharded.grad)
                shard = parameter.sharded_param.grad
                shards += _bytes(None if shard is None else shard.to_local())
        self.whole.append(whole)
        self.shards.append(shards)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def train_sharded(*, each: bool) -> dict[str, Any]:
    """Train under FSDP2; tell gradients, and what was held between micro-batches.

    Args:
        each: Ask accelerate to reduce in each micro-batch.
    """
    from .rank_jobs import FSDP2, WholeGradients, allow_sharding_on_cpu

    allow_sharding_on_cpu()
    recorder, held = WholeGradients(), Held()
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": each}}
    with tempfile.TemporaryDirectory() as out, float64_everywhere():
        model = tiny_llama()
        size = sum(_bytes(p) for p in model.parameters())
        trainer = make_trainer(
            out,
            ragged_rows(9, seed=3),
            model=model,
            callbacks=[recorder, held],
            effective_batch_size=5,
            per_device_train_batch_size=1,
            accelerator_config=config,
            **FSDP2,
        )
        trainer.train()
    return {
        "gradients": [gradient for gradient in recorder.gradients if gradient],
        "whole": held.whole,
        "shards": held.shards,
        "size": size,
    }


def say_what_has_no_effect() -> list[str]:
    """Ask for a reduction in each micro-batch under DDP; return the warnings."""
    import logging

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger(engine.__name__)
    logger.addHandler(handler)
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    with tempfile.TemporaryDirectory() as out:
        make_trainer(out, ragged_rows(6), effective_batch_size=3, accelerator_config=config).train()
    return lines
