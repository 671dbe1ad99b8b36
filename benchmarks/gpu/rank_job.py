"""One rank of `benchmarks.gpu.ranks`: train an update and compare its gradient with the whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from benchmarks.gpu.checks import Setting
from benchmarks.gpu.modes import IN_FLOAT32, NUM_ROWS, off, train, whole
from hf_gradacc.ranks import collectives
from hf_gradacc.ranks.engine import DataParallel
from hf_gradacc.trainer import mixin


class InCompany(DataParallel):
    """The engine of several ranks, on one that believes to have another."""

    def __init__(self, accelerator: Any, args: Any) -> None:
        super().__init__(accelerator, args)
        self.world_size = 2


def main(device: str, kind: str, out: str) -> None:
    """Train on this rank; rank 0 writes what it found."""
    setting = Setting(device, Path(out).parent)
    figures: dict[str, Any] = {}
    # Rank 1 gets what rank 0 cannot hold: shares of unequal size.
    options: dict[str, Any] = {"effective_batch_size": NUM_ROWS, "per_device_train_batch_size": 2}
    if kind == "two-on-one-device":
        options["ddp_backend"] = "gloo"
    trainer, recorder = train(setting, **options)
    figures["backend"] = dist.get_backend()
    figures["engine"] = type(trainer._rank_engine).__name__
    figures["off"] = off(recorder.gradients[0], whole(setting), limit=IN_FLOAT32)
    if kind == "torchrun":
        figures["off in company"] = in_company(setting, options)
    else:
        assert dist.get_world_size() == 2
        assert figures["engine"] == "DataParallel"
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def in_company(setting: Setting, options: dict[str, Any]) -> float:
    """Train as with several ranks: a model in DDP, and every collective of an update."""
    PartialState.use_distributed = property(lambda self: True)  # type: ignore[assignment]
    collectives._is_alone = lambda: False
    mixin.make_engine = lambda accelerator, args, **kwargs: InCompany(accelerator, args)
    calls: list[str] = []
    reduce, agree = InCompany.reduce, InCompany.agree

    def counted_reduce(self: InCompany, model: Any) -> None:
        calls.append("reduce")
        assert any(name.startswith("module.") for name, _ in model.named_parameters()), "no DDP"
        reduce(self, model)

    def counted_agree(self: InCompany, *args: Any, **kwargs: Any) -> Any:
        calls.append("agree")
        return agree(self, *args, **kwargs)

    InCompany.reduce, InCompany.agree = counted_reduce, counted_agree  # type: ignore[method-assign]
    _, recorder = train(setting, **options)
    assert calls == ["agree", "reduce"], calls
    return off(recorder.gradients[0], whole(setting), limit=IN_FLOAT32)


if __name__ == "__main__":
    main(*sys.argv[1:])
