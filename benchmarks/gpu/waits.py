"""How often an update makes the host wait for the device, and who asks for it.

On CUDA torch itself tells of each wait (`torch.cuda.set_sync_debug_mode`), with the Python frames
that led to it. A wait whose innermost frame outside of torch is ours must not grow with the number
of micro-batches; what the model does in its own forward is counted beside it. Without a device the
operations that would wait are counted.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.host_reads import Waits
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import TrainerCallback

import hf_gradacc
from benchmarks.gpu.checks import Setting
from hf_gradacc.loss.shortcuts import chunked
from hf_gradacc.loss.shortcuts.choose import Shortcuts

PACKAGE = str(Path(hf_gradacc.__file__).parent)
NUM_ROWS = 24
FEW, MANY = 12, 1
"""Rows in a micro-batch: an update is cut in 2, and in 24."""

WARNING = "called a synchronizing CUDA operation"
"""Of a wait (c10/cuda/CUDAFunctions.cpp); switching them on warns once of something else."""

KINDS: dict[str, dict[str, Any]] = {
    "padded": {
        "target_only_logits": False,
        "drop_attention_mask": False,
        "layout": "padded",
    },
    "auto": {},
    "bf16": {"bf16": True},
    "packed": {"layout": "packed"},
    "packed-flash": {"layout": "packed", "attention": "flash_attention_2", "bf16": True},
    "workers": {"dataloader_num_workers": 2},
}


def count(setting: Setting, *, kind: str) -> dict[str, Any]:
    """Count the waits of a second update that is cut in 2, and of one that is cut in 24."""
    if "flash" in kind:
        setting.needs_cuda("flash attention runs nowhere else")
    few = _count(setting, size=FEW, **KINDS[kind])
    many = _count(setting, size=MANY, **KINDS[kind])
    num_more = NUM_ROWS // MANY - NUM_ROWS // FEW
    ours = (many["ours"] - few["ours"]) / num_more
    told = ", ".join(f"{place}: {n}" for place, n in many["places"].most_common(6))
    assert ours == 0, f"{ours:.2f} waits of ours per micro-batch. {told}"
    return {
        "ours per update": few["ours"],
        "ours per micro-batch": ours,
        "the model's per micro-batch": (many["others"] - few["others"]) / num_more,
        "where": told,
    }


def _count(
    setting: Setting, *, size: int, attention: str = "sdpa", **options: Any
) -> dict[str, Any]:
    model = tiny_llama(
        dtype=torch.float32,
        hidden_size=64,
        attn_implementation=attention,
        use_cache=False,
        max_position_embeddings=512,
    )
    window = _OfTheSecondUpdate(setting.device)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            out,
            ragged_rows(2 * NUM_ROWS, seed=3),
            model=model,
            callbacks=[window],
            effective_batch_size=NUM_ROWS,
            per_device_train_batch_size=size,
            max_steps=2,
            max_grad_norm=1.0,
            logging_steps=10,
            use_cpu=setting.is_rehearsal,
            **options,
        )
        with window.laying_out_uncounted():
            trainer.train()
    assert window.is_closed, "there was no second update"
    return {"ours": window.ours, "others": window.others, "places": window.places}


class _OfTheSecondUpdate(TrainerCallback):
    """Counts from the beginning of the second update to the end of its optimizer step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ours = self.others = 0
        self.places: collections.Counter[str] = collections.Counter()
        self.is_closed = False
        self._stack = contextlib.ExitStack()
        self._mode: Waits | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        if state.global_step == 1:
            self._stack.enter_context(self._of_cuda() if self.device == "cuda" else self._of_cpu())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if state.global_step == 1:
            self._stack.close()
            self.is_closed = True

    @contextlib.contextmanager
    def laying_out_uncounted(self) -> Iterator[None]:
        """Leave out what runs on the host by design, where only operations can be counted."""
        shape, reads_for_free = Shortcuts.shape, chunked._reads_for_free

        def uncounted(shortcuts: Shortcuts, inputs: Any, **how: Any) -> Any:
            if self._mode is None:
                return shape(shortcuts, inputs, **how)
            self._mode.paused = True
            try:
                return shape(shortcuts, inputs, **how)
            finally:
                self._mode.paused = False

        Shortcuts.shape = uncounted  # type: ignore[method-assign]
        chunked._reads_for_free = lambda device_type: False  # as on a GPU, which would wait
        try:
            yield
        finally:
            Shortcuts.shape = shape  # type: ignore[method-assign]
            chunked._reads_for_free = reads_for_free

    @contextlib.contextmanager
    def _of_cuda(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._note_warning
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def _of_cpu(self) -> Iterator[None]:
        seen = self

        class ByPlace(Waits):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                before = sum(self.counts.values())
                result = super().__torch_dispatch__(func, types, args, kwargs)
                if sum(self.counts.values()) > before:
                    seen._note()
                return result

        self._mode = ByPlace()
        with self._mode:
            yield
        self._mode = None

    def _note_warning(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if WARNING in str(message):
            self._note()

    def _note(self) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and not frame.filename.endswith("/waits.py")
        ]
        frame = next((f for f in reversed(frames) if "warnings.py" not in f.filename), None)
        place = "unknown" if frame is None else f"{_short(frame.filename)}:{frame.lineno}"
        self.places[place] += 1
        if frame is not None and frame.filename.startswith(PACKAGE):
            self.ours += 1
        else:
            self.others += 1


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
