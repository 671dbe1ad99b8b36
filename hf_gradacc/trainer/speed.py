"""The Trainer's fast side: shortcuts to the same loss, and inputs copied without waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.chunked import find_owner, without_logits
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.layouts import find_head, kept_rows
from hf_gradacc.loss.onednn import find_linears, onednn_linears, suits_here, why_no_onednn
from hf_gradacc.loss.shortcuts import Shortcuts, Trial, can_try
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.targets import TargetRule

__all__ = ["FastSteps"]

logger = logging.get_logger(__name__)


# Attentions that take the boundaries of packed sequences and compute nothing across them. Under
# the others a packed row is computed whole and masked, which costs more than its padding did.
_PACKS_FOR_FREE = ("flash", "flex_attention")


class FastSteps(Trainer):
    """Overrides that lay out a micro-batch the cheapest way that is exact."""

    _collator: UpdateCollator | None = None
    _shortcuts: Shortcuts | None = None
    _head: nn.Module | None = None
    _owner: PreTrainedModel | None = None
    _linears: tuple[nn.Linear, ...] = ()

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Lay out one micro-batch, start copying it, then run the stock step on it.

        Layout happens here and not in the loader, so that whoever cuts an update again (out of
        memory, or a loader of somebody else's) deals with plain padded rows.
        """
        with onednn_linears(self._linears):
            return self._step_shaped(model, inputs, num_items_in_batch)

    def _step_shaped(self, model: nn.Module, inputs: Any, count: Tensor | int | None) -> Tensor:
        if self._shortcuts is None or not isinstance(inputs, Mapping):
            return super().training_step(model, inputs, count)
        shaped, positions = self._shortcuts.shape(inputs)
        shaped = {key: self._start_copy(value) for key, value in shaped.items()}
        chunked = self._shortcuts.chunked_loss and positions is not None
        with (
            kept_rows(self._head, self._start_copy(positions)),
            without_logits(
                self._owner if chunked else None, self._head, onednn=bool(self._linears)
            ),
        ):
            return super().training_step(model, shaped, count)

    def _start_copy(self, value: Any) -> Any:
        """Copy to the device behind what it still computes; the host does not wait for it."""
        if not isinstance(value, Tensor) or value.device == self.args.device:
            return value
        if self.args.device.type == "cuda" and value.device.type == "cpu":
            # From pageable memory the host would wait until the copy is staged.
            value = value if value.is_pinned() else value.pin_memory()
        return value.to(self.args.device, non_blocking=True)

    # ---- choosing ------------------------------------------------------------------------------

    def _choose_shortcuts(
        self,
        bare: nn.Module,
        inputs: Any,
        loss_of: Callable[[Mapping[str, Any], int | None], float],
        *,
        facts: LossFacts,
    ) -> None:
        """Try each shortcut on the model, in evaluation mode, and take those that are exact."""
        wanted = self._wanted_shortcuts(bare)
        refused: dict[str, str] = dict.fromkeys(wanted, self._why_none(inputs, facts))
        taken: dict[str, bool] = {}
        head = find_head(bare)
        owner = find_owner(bare, head)
        varlen = str(_attention(bare)).startswith("flash")
        if head is None and not any(refused.values()):
            refused = dict.fromkeys(wanted, f"{type(bare).__name__} names no output embeddings")
        if head is not None and not any(refused.values()):
            dtype = self._dtype_computed_in(bare)
            trial = Trial(inputs, loss_of, head, owner, dtype, facts.wants_own_count)
            tries: dict[str, Callable[[], str]] = {
                "target_only_logits": trial.try_target_only_logits,
                "chunked_loss": trial.try_chunked_loss,
                "drop_attention_mask": trial.try_without_mask,
                "layout": lambda: trial.try_packed(varlen=varlen),
            }
            for name, asked in wanted.items():
                refused[name] = self._why_not(name, bare)
                if name == "chunked_loss" and not taken["target_only_logits"]:
                    refused[name] = refused["target_only_logits"] or "target_only_logits is off"
                if asked is not False and not refused[name]:
                    refused[name] = _attempt(tries[name])
                taken[name] = asked is not False and not refused[name]
        for name, asked in wanted.items():
            if asked and refused[name]:
                value, way_out = (
                    ("'packed'", "'padded'") if name == "layout" else ("True", "False or leave out")
                )
                raise ConfigError(
                    f"{name} = {value} would not give the same gradient: {refused[name]}.\n"
                    f"  Set {name} = {way_out}."
                )
        self._head, self._owner = head, owner
        self._shortcuts = Shortcuts(
            target_only_logits=taken.get("target_only_logits", False),
            chunked_loss=taken.get("chunked_loss", False),
            drop_mask=taken.get("drop_attention_mask", False),
            packed=taken.get("layout", False),
            varlen=varlen,
            refused=tuple((name, why) for name, why in refused.items() if why),
        )
        if self._collator is not None:
            self._collator.packed = self._shortcuts.packed
        logger.info(f"shortcuts to the same loss: {self._shortcuts}")

    def _choose_products(self, bare: nn.Module) -> None:
        """See which layers may multiply by oneDNN; once the other shortcuts are chosen."""
        self._linears = ()
        asked = self.args.onednn_linear
        if asked is False or not (asked or suits_here()):
            return
        chunked = self._shortcuts is not None and self._shortcuts.chunked_loss
        found = find_linears(bare, leave_out=self._head if chunked else None)
        why = why_no_onednn()
        if self.args.bf16 or self.args.fp16:
            why = why or "autocast multiplies in half precision"
        if self.args.torch_compile:
            why = why or "compiled models have products of their own"
        if Engine.of(self).lockstep:
            why = why or "FSDP and DeepSpeed put weights together for torch's own layers"
        if not found:
            why = why or "the model has no large linear layer of float32 weights on a CPU"
        if why and asked:
            raise ConfigError(
                f"onednn_linear = True: {why}.\n  Set onednn_linear = False or leave it out."
            )
        self._linears = () if why else tuple(found)
        logger.info(f"linear layers that multiply by oneDNN: {len(self._linears)} {why}")

    def _dtype_computed_in(self, bare: nn.Module) -> torch.dtype:
        """Give the coarsest dtype of a forward: it says how much two evaluations may differ."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtypes = {p.dtype for p in bare.parameters()}
        if not all(dtype.is_floating_point for dtype in dtypes):
            return torch.bfloat16  # quantized: weights are unpacked to that, or to something finer
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def _wanted_shortcuts(self, bare: nn.Module) -> dict[str, bool | None]:
        """Say what was asked for: True and False are the user's, None leaves it to the checks."""
        packs = {"packed": True, "padded": False}.get(self.args.layout)
        if packs is None and not str(_attention(bare)).startswith(_PACKS_FOR_FREE):
            packs = False
        return {
            "target_only_logits": self.args.target_only_logits,
            "chunked_loss": self.args.chunked_loss,
            "drop_attention_mask": self.args.drop_attention_mask,
            "layout": packs,
        }

    def _why_none(self, inputs: Any, facts: LossFacts) -> str:
        """Say why no shortcut at all may be tried, empty if they may."""
        if facts.rule is not TargetRule.NEXT_TOKEN:
            return "the model is no causal LM whose loss shifts its labels"
        if facts.pads_alike:
            return "padding changes the loss of this model"
        if not can_try(inputs):
            return "there are no two rows of {input_ids, labels} to try it on"
        return ""

    def _why_not(self, name: str, bare: nn.Module) -> str:
        """Say why one shortcut may not be tried, empty if it may."""
        if name == "target_only_logits":
            if self.compute_loss_func is not None:
                return "compute_loss_func may want all logits"
            if self._has_foreign_loss() and not self.args.target_only_logits:
                return "a subclass overrides compute_loss, which may want all logits"
            if self.args.torch_compile and not self.args.target_only_logits:
                return "torch.compile would compile anew for each number of targets"
        if name == "chunked_loss":
            if self.compute_loss_func is not None or self._has_foreign_loss():
                return "a loss of one's own is computed from logits"
            if self.label_smoother is not None:
                return "label smoothing is computed from logits"
            if self.args.torch_compile:
                return "torch.compile would compile anew for each number of targets"
        if name == "drop_attention_mask":
            if self._has_foreign_loss() and not self.args.drop_attention_mask:
                return "a subclass overrides compute_loss, which may want the mask"
            router = getattr(bare.config, "output_router_logits", False)
            text = getattr(bare.config, "get_text_config", lambda: None)()
            if router or getattr(text, "output_router_logits", False):
                return "the router loss counts tokens by the mask"
        return ""

    def _describe_speed(self, bare: nn.Module) -> str:
        """Name what the time of a micro-batch depends on, besides the model and the device."""
        taken = self._shortcuts or Shortcuts()
        words = {
            "target-only": taken.target_only_logits,
            "chunked": taken.chunked_loss,
            "oneDNN": bool(self._linears),
            "no mask": taken.drop_mask,
            "packed": taken.packed,
            "checkpointing": self.args.gradient_checkpointing,
            "compiled": self.args.torch_compile,
            "bf16": self.args.bf16,
            "fp16": self.args.fp16,
        }
        return ", ".join(
            [_attention(bare) or "no attention", *(w for w, on in words.items() if on)]
        )

    def _has_foreign_loss(self) -> bool:
        """Say whether ``compute_loss`` is anybody's but the stock Trainer's and ours."""
        for cls in type(self).__mro__:
            module = cls.__module__.partition(".")[0]
            if "compute_loss" in vars(cls) and cls is not Trainer and module != "hf_gradacc":
                return True
        return False


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "") or "")


def _attempt(check: Callable[[], str]) -> str:
    """Run a check; a model that breaks on the shortcut refuses it, too."""
    try:
        return check()
    except Exception as error:  # an optional shortcut must not end a run, whatever it trips over
        first_line = (str(error).splitlines() or [""])[0]
        return f"it fails with {type(error).__name__}: {first_line}"
