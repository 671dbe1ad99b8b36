"""The gradient of an update against that of the whole batch at once, on the device.

Each precision has its own limit. In float64 the two agree to 1e-10. In the others both have
rounding errors, and both are held against the gradient in float64 of the very same weights: ours
may be no further off than a few times what one pass over the whole batch is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from support import alike, reference, zoo, zoo_runs
from support.reference import Batch, Gradient
from support.zoo_configs import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.gpu.checks import Setting, SkippedCheckError
from hf_gradacc import ConfigError

EXACT = 1e-10
TIMES_THE_WHOLE = 3.0
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3}
"""What may be left where the whole batch happens to be nearly right."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {
        "target_only_logits": False,
        "chunked_loss": False,
        "drop_attention_mask": False,
        "layout": "padded",
    },
    "auto": {},
    "packed": {"layout": "packed"},
    "shared_prefix": {"layout": "shared_prefix"},
}
_OF_A_CAUSAL_LM = {"target_only_logits", "chunked_loss", "drop_mask"}
SHORTCUTS = {"llama-causal": _OF_A_CAUSAL_LM, "qwen3-causal": _OF_A_CAUSAL_LM}
"""What has to be taken where nothing is asked for, or the comparison would say little."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float32,
}


def compare(setting: Setting, *, case: str, precision: str) -> dict[str, Any]:
    """Train one update of an architecture in every layout it allows, and compare."""
    found = zoo.case_named(case)
    rows = found.rows()
    layouts = [name for name in LAYOUTS if name != "shared_prefix"]  # these rows share nothing
    if found.head != "causal":
        layouts = ["auto"]
    if setting.is_rehearsal and precision != "float32":
        layouts = ["auto"]

    def build() -> nn.Module:
        return found.build()

    comparison = _Comparison(setting, build, rows, found.collator(build()), precision=precision)
    assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none"), "TF32 is on"
    figures: dict[str, Any] = comparison.whole()
    for layout in layouts:
        figures[layout] = comparison.of(layout)
    figures["shortcuts"] = ", ".join(sorted(comparison.shortcuts)) or "none"
    missing = SHORTCUTS.get(case, set()) - comparison.shortcuts
    assert not missing, f"these shortcuts were refused: {missing}"
    if precision == "float32" and found.head == "causal" and not found.router_loss:
        figures["mean of means"] = comparison.rejects_mean_of_means()
    return figures


def _with_wide_heads(model_type: str) -> nn.Module:
    """A causal LM whose heads are as wide as kernels of attention want them."""
    config = tiny_config(
        model_type, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def compare_packed(setting: Setting, *, model_type: str, attention: str) -> dict[str, Any]:
    """Compare packed rows under an attention that takes them for free, in bfloat16."""
    setting.needs_cuda(f"{attention} has no backward elsewhere")
    case = zoo.case_named(f"{model_type}-causal")

    def build() -> nn.Module:
        return _with_wide_heads(model_type).double()

    rows = case.rows(seed=2)
    comparison = _Comparison(setting, build, rows, case.collator(build()), precision="bfloat16")
    figures: dict[str, Any] = comparison.whole()
    comparison.attention = attention
    for layout in ("packed", "auto"):
        comparison.shortcuts.clear()
        figures[layout] = comparison.of(layout)
        assert "packed" in comparison.shortcuts, f"{layout} did not pack"
    return figures


def compare_trees(setting: Setting, *, model_type: str, attention: str) -> dict[str, Any]:
    """Compare rows that begin alike, computed as trees, with the whole batch, in float32."""
    if attention == "flex_attention":
        setting.needs_cuda(f"{attention} has no backward elsewhere")
    case = zoo.case_named(f"{model_type}-causal")

    def build() -> nn.Module:
        return _with_wide_heads(model_type)

    rows: list[Any] = alike.rows_alike("causal", unit=8)
    comparison = _Comparison(setting, build, rows, case.collator(build()), precision="float32")
    figures: dict[str, Any] = comparison.whole()
    comparison.attention = attention
    for layout in ("shared_prefix", "auto"):
        with alike.counting_trees() as computed:
            figures[layout] = comparison.of(layout)
        assert computed, f"{layout} computed no trees"
        figures[f"{layout}, tokens"] = sum(trees.num_tokens for trees in computed)
    return figures


class _Comparison:
    """One architecture in one precision: its true gradient, the whole batch's, and ours."""

    def __init__(
        self,
        setting: Setting,
        build: Callable[[], nn.Module],
        rows: list[Any],
        collator: Any,
        *,
        precision: str,
    ) -> None:
        self.device = setting.device
        self.dtype = DTYPES[precision]
        self.is_autocast = precision == "autocast"
        self._weights = build()  # once: in another default dtype other weights would be drawn
        self.rows = rows
        self.collator = collator
        self.attention: str | None = None
        self.shortcuts: set[str] = set()
        self._batches: list[Batch] = [self._on_device(dict(collator(list(rows))))]
        self._error_of_whole = 0.0
        self._expected: Gradient = {}

    def whole(self) -> dict[str, Any]:
        """Measure one pass over the whole batch, against float64."""
        try:
            self._hold(self._batches, [1.0])
        except Exception as error:
            raise SkippedCheckError(
                f"the model itself does not run in this precision: {type(error).__name__}: {error}"
            ) from error
        return {"whole": self._error_of_whole}

    def of(self, layout: str) -> float | str:
        """Train one update in a layout; return how far its gradient is off."""
        model = self._model()
        if self.attention is not None:
            model.set_attn_implementation(self.attention)
        options = {
            "use_cpu": self.device == "cpu",
            "dataloader_pin_memory": self.device != "cpu",
            "bf16": self.is_autocast,
            **LAYOUTS[layout],
        }
        try:
            with self._everywhere():
                run = zoo_runs.train_ours(model, self.rows, self.collator, **options)
        except ConfigError as error:
            if layout == "packed" and "would not give the same gradient" in str(error):
                return "refused"
            raise
        assert len(run.micro_batches) > 1, "the update was not cut"
        self.shortcuts |= set(run.shortcuts)
        assert not run.warnings, run.warnings
        error = reference.relative_error(_on_host(run.gradient), self._expected)
        assert error <= self._limit, (
            f"{layout}: {error:.2e} off where the whole batch is {self._error_of_whole:.2e} off"
        )
        return error

    def rejects_mean_of_means(self) -> float:
        """Check that the limit would not let the usual mistake pass."""
        cut = [self.rows[:1], self.rows[1:6], self.rows[6:]]
        batches = [self._on_device(dict(self.collator(part))) for part in cut]
        wrong = reference.mean_of_means(self._model(), batches, [1, 1, 1])
        error = reference.relative_error(_on_host(wrong), self._expected)
        assert error > 10 * self._limit, f"the mistake is only {error:.2e} off"
        return error

    @property
    def _limit(self) -> float:
        if self.dtype == torch.float64:
            return EXACT
        kind = torch.bfloat16 if self.is_autocast else self.dtype
        return max(TIMES_THE_WHOLE * self._error_of_whole, FLOOR[kind])

    def _hold(self, batches: list[Batch], weights: list[float]) -> None:
        """Compute the true gradient of a weighted cut, and how far one in this precision is off."""
        with reference.float64_everywhere():
            true = self._model().double()  # the rounded weights, and what is computed of them
            self._expected = _on_host(reference.weighted_gradient(true, batches, weights))
        model = self._model()
        with self._everywhere():
            gradient = reference.weighted_gradient(model, batches, weights, loss_of=self._loss_of)
        self._error_of_whole = reference.relative_error(_on_host(gradient), self._expected)

    def _loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_autocast):
            return reference.model_loss(model, batch)

    def _model(self) -> nn.Module:
        return copy.deepcopy(self._weights).to(self.device, self.dtype)

    def _everywhere(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype == torch.float64:
            return reference.float64_everywhere()
        return contextlib.nullcontext()

    def _on_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device) for key, value in batch.items()}


def _on_host(gradient: Gradient) -> Gradient:
    return {name: value.double().cpu() for name, value in gradient.items()}
