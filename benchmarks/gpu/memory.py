"""Out of memory for real: torch's allocator refuses, and the update must come out the same.

In forward, backward, the optimizer and an evaluation the device is asked for more than it has at a
place that is known, so that a run without the failure can be made that must agree with it. Under
`pressure` it is the micro-batches themselves that do not fit. Without a CUDA device the allocator's
error is made up.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from support import failing
from support.failing import Failure, beyond
from support.tiny import make_trainer, ragged_rows, tiny_llama

from benchmarks.gpu.checks import Setting
from hf_gradacc import MemoryBudgetError

TIGHT = 40


def ask_for_too_much(device: str) -> None:
    """Run out of memory on a device, as the allocator does it there."""
    if device == "cpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    free, _ = torch.cuda.mem_get_info()
    torch.empty(2 * free, dtype=torch.uint8, device=device)
    raise AssertionError("the device gave twice of what it had")


class RealFailure(Failure):
    """A `Failure` whose error is the allocator's own."""

    device = "cpu"

    def _raise(self) -> None:
        self.raised += 1
        ask_for_too_much(self.device)


def recover(setting: Setting, *, where: str) -> dict[str, Any]:
    """Run out in a forward or backward; compare with a run whose budget was lowered before."""
    failures: list[RealFailure] = []

    def prepare(model: Any) -> None:
        # Before the trainer moves the model: hooks stay on it.
        failure = RealFailure(model, beyond(TIGHT), where=where)
        failure.device = setting.device
        failures.append(failure)

    options = {"use_cpu": setting.is_rehearsal}
    with tempfile.TemporaryDirectory() as out:
        failed = failing.train(f"{out}/failed", prepare=prepare, **options)
        after = _draw(setting.device)
        lower = (0, failed["cap"])
        calm = failing.train(f"{out}/calm", lower=lower, **options)
        undisturbed = _draw(setting.device)
        other = failing.train(f"{out}/other", lower=lower, seed=8, **options)
    assert failures[0].raised > 0, "nothing failed"
    off = _largest_difference(failed, calm)
    assert off <= 1e-12, f"weights are {off:.1e} off a run without the failure"
    assert _largest_difference(failed, other) > 1e-6, "other dropout masks would not be seen"
    assert torch.equal(failed["random"], calm["random"]), "the host's random state moved"
    assert torch.equal(after, undisturbed), "the device's random state moved"
    return {"failures": failures[0].raised, "cap": failed["cap"], "weights off": off}


def pressure(setting: Setting) -> dict[str, Any]:
    """Let micro-batches themselves not fit: the process may use a fraction of the memory."""
    setting.needs_cuda("there is no allocator to be given a limit")
    options: dict[str, Any] = {
        # Of one length: the planner would part long from short, and never need that much.
        "rows": [{k: (v * 512)[:512] for k, v in row.items()} for row in ragged_rows(32, seed=5)],
        "effective_batch_size": 16,
        # 60 MB of float32 logits a row, and as much again for their gradient and the loss.
        "model": {
            "vocab_size": 30_000,
            "attention_dropout": 0.1,
            "max_position_embeddings": 512,
            "dtype": torch.float32,
        },
        "target_only_logits": False,
        "use_cpu": False,
    }
    with tempfile.TemporaryDirectory() as out, _in_default_precision():
        failing.train(f"{out}/calm", max_tokens_per_micro_batch=512, **options)  # loads kernels
        torch.cuda.reset_peak_memory_stats()
        failing.train(f"{out}/calm", max_tokens_per_micro_batch=512, **options)
        needed = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(3 * needed / total)
        try:
            tight = failing.train(f"{out}/tight", max_tokens_per_micro_batch=8192, **options)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert tight["cap"] is not None, "everything fitted"
        same = failing.train(f"{out}/same", max_tokens_per_micro_batch=tight["cap"], **options)
    assert tight["cap"] < 8192
    assert [row["effective_batch_size"] for row in tight["logs"]] == [16, 16]
    off = _largest_difference(tight, same)
    assert off <= 1e-5, f"weights are {off:.1e} off those of a run with that budget"
    return {"MiB for one row": needed >> 20, "cap": tight["cap"], "weights off": off}


def optimizer(setting: Setting) -> dict[str, Any]:
    """Run out in the optimizer's step: no finer cut helps, and the error must say so."""

    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            ask_for_too_much(setting.device)

    model = tiny_llama(dtype=torch.float32)
    greedy = Greedy(model.to(setting.device).parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            out,
            ragged_rows(12, seed=1),
            model=model,
            trainer_options={"optimizers": (greedy, None)},
            effective_batch_size=12,
            per_device_train_batch_size=4,
            use_cpu=setting.is_rehearsal,
        )
        try:
            trainer.train()
        except MemoryBudgetError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
    assert "the optimizer's step" in text, text
    assert "out of memory" in text.lower(), text
    return {}


def evaluation(setting: Setting) -> dict[str, Any]:
    """Run out in an evaluation: it goes on with fewer rows, and gives the same loss."""
    losses = []
    raised = 0
    for fails in (False, True):
        model = tiny_llama(dtype=torch.float32)
        failure = None
        if fails:
            failure = RealFailure(model, lambda rows, width, seen: rows > 2, evaluation=True)
            failure.device = setting.device
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(
                out,
                ragged_rows(12, seed=1),
                model=model,
                eval_dataset=ragged_rows(15, seed=2),
                per_device_eval_batch_size=8,
                max_steps=1,
                use_cpu=setting.is_rehearsal,
            )
            trainer.train()
            losses.append(trainer.evaluate()["eval_loss"])
        raised = failure.raised if failure else 0
    assert raised > 0, "nothing failed"
    assert abs(losses[0] - losses[1]) <= 1e-6 * losses[0], losses
    return {"failures": raised, "eval loss": losses[1]}


def row_alone(setting: Setting) -> dict[str, Any]:
    """Name the row that does not fit by itself, and leave a device that works."""
    rows = ragged_rows(10, seed=5)
    longest = max(range(10), key=lambda i: len(rows[i]["input_ids"]))
    width = len(rows[longest]["input_ids"])

    def prepare(model: Any) -> None:
        failure = RealFailure(model, lambda rows, wide, seen: wide >= width)
        failure.device = setting.device

    with tempfile.TemporaryDirectory() as out:
        try:
            failing.train(out, rows=rows, prepare=prepare, use_cpu=setting.is_rehearsal)
        except MemoryBudgetError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
    assert f"{width} tokens does not fit" in text, text
    assert "The allocator said: CUDA out of memory" in text, text
    assert float(torch.ones(8, device=setting.device).sum()) == 8.0
    return {}


def _draw(device: str) -> torch.Tensor:
    return torch.rand(3, device=device).cpu()


def _largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    pairs = [(left["weights"][name], weight) for name, weight in right["weights"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


@contextlib.contextmanager
def _in_default_precision() -> Iterator[None]:
    """Let `failing.train` compute in the dtypes it is given, and not everything in float64."""
    before = failing.float64_everywhere
    failing.float64_everywhere = contextlib.nullcontext  # type: ignore[assignment]
    try:
        yield
    finally:
        failing.float64_everywhere = before
