"""Find out which cheaper ways to the same loss a model allows, by trying them on it.

Four shortcuts, each used only where a check on the actual model passes
(`hf_gradacc.loss.shortcuts.trials`):

* **target-only logits**: the LM head sees only positions whose prediction enters the loss;
* **chunked loss**: the logits of these positions are computed some at a time;
* **no mask**: right-padded rows of a causal model need none;
* **packed**: the rows of a micro-batch as one row without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.asking.ask import has_router_loss
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.foreign_hooks import hook_around
from hf_gradacc.loss.layouts import find_head, keep_targets, pack_rows, without_mask
from hf_gradacc.loss.shortcuts.chunked import find_owner
from hf_gradacc.loss.shortcuts.onednn import find_linears, is_onednn_faster_here, why_no_onednn
from hf_gradacc.loss.shortcuts.trials import Trial, can_try_shortcuts
from hf_gradacc.updates.targets import TargetRule

__all__ = ["Setting", "Shortcuts", "attention_of", "choose_shortcuts", "describe_speed"]

logger = logging.get_logger(__name__)


_PACKS_FOR_FREE = ("flash", "flex_attention")
"""In the names of attentions that take the boundaries of packed sequences and compute nothing
across them: ``flash_attention_2``, ``kernels-community/flash-attn3``. Under the others a packed row
is computed whole and masked, which costs more than its padding did.
"""


_NAMES = (
    "target_only_logits",
    "chunked_loss",
    "drop_attention_mask",
    "layout",
    "shared_prefix",
    "kept_beginnings",
)
"""By which names it is told why one is not taken."""


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts are taken, and why the others are not.

    Attributes:
        target_only_logits: Only target positions go through the LM head.
        chunked_loss: Their loss is taken a chunk of logits at a time.
        drop_mask: Right-padded micro-batches are given no mask.
        packed: Micro-batches are one row.
        varlen: Packed rows name their boundaries, for flash attention.
        refused: Why each other shortcut is not taken, in plain words.
        head: The LM head.
        owner: The model that computes a loss from its logits, see `find_owner`.
        linears: Layers that multiply by oneDNN.
        bodies: Parts of models that compute rows which begin alike as trees, see
            `hf_gradacc.loss.trees.hooks`; none if rows are computed as they are.
        trees_by_rows: Their attention is computed row by row, see `TreeCost`.
        keeps_beginnings: What rows of several micro-batches begin with is computed once, see
            `hf_gradacc.loss.trees.kept`.
    """

    target_only_logits: bool = False
    chunked_loss: bool = False
    drop_mask: bool = False
    packed: bool = False
    varlen: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    head: nn.Module | None = field(default=None, repr=False, compare=False)
    owner: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    linears: tuple[nn.Linear, ...] = field(default=(), repr=False, compare=False)
    bodies: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    trees_by_rows: bool = False
    keeps_beginnings: bool = False

    @classmethod
    def none(cls, why: str) -> Shortcuts:
        """Take none of them."""
        return cls(refused=tuple((name, why) for name in _NAMES))

    def shape(
        self, inputs: Mapping[str, Any], *, as_trees: bool = False
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Lay out collated inputs on the CPU.

        Args:
            inputs: Collated inputs.
            as_trees: They are computed as trees: rows stay as they are, with their mask.

        Returns:
            What the model's forward takes, and the positions whose logits are wanted (None: all).
        """
        shaped = dict(inputs)
        if as_trees:
            pass
        elif self.packed:
            shaped = pack_rows(shaped, varlen=self.varlen)
        elif self.drop_mask:
            shaped = without_mask(shaped)
        return keep_targets(shaped) if self.target_only_logits else (shaped, None)

    def reason(self, name: str) -> str:
        """Return why a shortcut is not taken, empty if it is."""
        return dict(self.refused).get(name, "")

    def without_kept(self, why: str) -> Shortcuts:
        """Keep no beginning; `why` counts unless another reason is known."""
        known = () if self.reason("kept_beginnings") else (("kept_beginnings", why),)
        return replace(self, keeps_beginnings=False, refused=self.refused + known)

    def without_trees(self, why: str) -> Shortcuts:
        """Compute rows as they are; `why` counts unless another reason is known."""
        known = () if self.reason("shared_prefix") else (("shared_prefix", why),)
        return replace(
            self,
            bodies=(),
            trees_by_rows=False,
            keeps_beginnings=False,
            refused=self.refused + known,
        )


@dataclass(frozen=True)
class Setting:
    """What decides which shortcuts may be tried, besides the model.

    Attributes:
        args: The trainer's arguments: what was asked for by name, and mixed precision.
        facts: What the probe found out about the loss.
        has_loss_func: ``compute_loss_func`` was given.
        has_foreign_loss: A subclass overrides ``compute_loss``.
        smooths_labels: Label smoothing is on.
        lockstep: The engine puts weights together for each forward.
        splits_rows: Several ranks compute each row together.
        keeps_beginnings: A backward may run beside those of micro-batches.
        insists: A shortcut that was asked for by name and is not exact is an error.
    """

    args: Any
    facts: LossFacts
    has_loss_func: bool = False
    has_foreign_loss: bool = False
    smooths_labels: bool = False
    lockstep: bool = False
    splits_rows: bool = False
    keeps_beginnings: bool = True
    insists: bool = True

    def why_none(self, inputs: Any) -> str:
        """Return why no shortcut at all may be tried, empty if they may."""
        if self.splits_rows:
            return "several ranks compute each row together (cp_size, sp_size)"
        if self.facts.rule is not TargetRule.NEXT_TOKEN:
            return "the model is no causal LM whose loss shifts its labels"
        if self.facts.pad_to_one_width:
            return "padding changes the loss of this model"
        if not can_try_shortcuts(inputs):
            return "there are no two rows of {input_ids, labels} to try it on"
        return ""

    def why_not(self, name: str, model: nn.Module) -> str:
        """Return why one shortcut may not be tried, empty if it may."""
        if name in ("target_only_logits", "chunked_loss") and _is_liger(model):
            # In training mode alone, so that trying it in evaluation mode would not show it.
            return "Liger's kernel takes the loss from hidden states, without calling the LM head"
        if name == "target_only_logits":
            if self.has_loss_func:
                return "compute_loss_func may want all logits"
            if self.has_foreign_loss and not self.args.target_only_logits:
                return "a subclass overrides compute_loss, which may want all logits"
            if self.args.torch_compile and not self.args.target_only_logits:
                return "torch.compile would compile anew for each number of targets"
            hook = hook_around(model, find_head(model))
            if hook and not self.args.target_only_logits:
                return f"a hook ({hook}) may want all logits"
        if name == "chunked_loss":
            if self.has_loss_func or self.has_foreign_loss:
                return "a loss of one's own is computed from logits"
            if self.smooths_labels:
                return "label smoothing is computed from logits"
            if self.args.torch_compile:
                return "torch.compile would compile anew for each number of targets"
            hook = hook_around(model, find_head(model))
            if hook and not self.args.chunked_loss:
                return f"a hook ({hook}) would be given hidden states in place of logits"
        if name == "drop_attention_mask":
            if self.has_foreign_loss and not self.args.drop_attention_mask:
                return "a subclass overrides compute_loss, which may want the mask"
            if has_router_loss(model):
                return "the router loss counts tokens by the mask"
        return ""

    def wanted(self, model: nn.Module) -> dict[str, bool | None]:
        """Return what was asked for: True or False by the user; None leaves it to the checks."""
        packs = {"packed": True, "padded": False}.get(self.args.layout)
        # Updates without common prefixes are laid out as with "auto".
        if packs is None and not any(part in attention_of(model) for part in _PACKS_FOR_FREE):
            packs = False
        return {
            "target_only_logits": self.args.target_only_logits,
            "chunked_loss": self.args.chunked_loss,
            "drop_attention_mask": self.args.drop_attention_mask,
            "layout": packs,
        }


def choose_shortcuts(
    model: nn.Module,
    inputs: Any,
    loss_of: Callable[[Mapping[str, Any], int | None], float],
    *,
    setting: Setting,
    dtype: torch.dtype,
    gradients_of: Callable[
        [Mapping[str, Any], int | None], list[Tensor]
    ] = lambda inputs, count: [],
) -> Shortcuts:
    """Try each shortcut on the model, as it was asked, and take those that are exact.

    Args:
        model: The bare model.
        inputs: A few rows, collated together.
        loss_of: Returns the loss of collated inputs, without gradients.
        setting: What else decides.
        dtype: The coarsest dtype of a forward.
        gradients_of: Returns the gradient of that loss by parameters; nothing if there is none.

    Raises:
        ConfigError: If one was asked for by name and would not give the same gradient.
    """
    wanted = setting.wanted(model)
    refused: dict[str, str] = dict.fromkeys(wanted, setting.why_none(inputs))
    taken: dict[str, bool] = {}
    head = find_head(model)
    owner = find_owner(model, head)
    varlen = "flash" in attention_of(model)
    if head is None and not any(refused.values()):
        refused = dict.fromkeys(wanted, f"{type(model).__name__} names no output embeddings")
    if head is not None and not any(refused.values()):
        trial = Trial(
            inputs, loss_of, head, owner, dtype, setting.facts.wants_own_count, gradients_of
        )
        tries: dict[str, Callable[[], str]] = {
            "target_only_logits": trial.try_target_only_logits,
            "chunked_loss": trial.try_chunked_loss,
            "drop_attention_mask": trial.try_without_mask,
            "layout": lambda: trial.try_packed(varlen=varlen),
        }
        for name, asked in wanted.items():
            refused[name] = setting.why_not(name, model)
            if name == "chunked_loss" and not taken["target_only_logits"]:
                refused[name] = refused["target_only_logits"] or "target_only_logits is off"
            if asked is not False and not refused[name]:
                refused[name] = _attempt(tries[name])
            taken[name] = asked is not False and not refused[name]
    for name, asked in wanted.items():
        if asked and refused[name] and setting.insists:
            value, way_out = (
                ("'packed'", "'padded'") if name == "layout" else ("True", "False or leave out")
            )
            raise ConfigError(
                f"{name} = {value} would not give the same gradient: {refused[name]}.\n"
                f"  Set {name} = {way_out}."
            )
    shortcuts = Shortcuts(
        target_only_logits=taken.get("target_only_logits", False),
        chunked_loss=taken.get("chunked_loss", False),
        drop_mask=taken.get("drop_attention_mask", False),
        packed=taken.get("layout", False),
        varlen=varlen,
        refused=tuple((name, why) for name, why in refused.items() if why),
        head=head,
        owner=owner,
    )
    logger.info(f"shortcuts to the same loss: {shortcuts}")
    return replace(shortcuts, linears=_choose_linears(model, shortcuts, setting))


def _choose_linears(
    model: nn.Module, shortcuts: Shortcuts, setting: Setting
) -> tuple[nn.Linear, ...]:
    """See which layers may multiply by oneDNN, once the other shortcuts are chosen."""
    asked = setting.args.onednn_linear
    if asked is False or not (asked or is_onednn_faster_here()):
        return ()
    found = find_linears(model, leave_out=shortcuts.head if shortcuts.chunked_loss else None)
    why = why_no_onednn()
    if setting.args.bf16 or setting.args.fp16:
        why = why or "autocast multiplies in half precision"
    if setting.args.torch_compile:
        why = why or "compiled models have products of their own"
    if setting.lockstep:
        why = why or "FSDP and DeepSpeed put weights together for torch's own layers"
    if not found:
        why = why or "the model has no large linear layer of float32 weights on a CPU"
    if why and asked and setting.insists:
        raise ConfigError(
            f"onednn_linear = True: {why}.\n  Set onednn_linear = False or leave it out."
        )
    linears = () if why else tuple(found)
    logger.info(f"linear layers that multiply by oneDNN: {len(linears)} {why}")
    return linears


def describe_speed(model: nn.Module, shortcuts: Shortcuts | None, args: Any) -> str:
    """Name what the time of a micro-batch depends on, besides the model and the device."""
    taken = shortcuts or Shortcuts()
    options = {
        "target-only": taken.target_only_logits,
        "chunked": taken.chunked_loss,
        "oneDNN": bool(taken.linears),
        "no mask": taken.drop_mask,
        "packed": taken.packed,
        "checkpointing": args.gradient_checkpointing,
        "compiled": args.torch_compile,
        "bf16": args.bf16,
        "fp16": args.fp16,
    }
    return ", ".join(
        [attention_of(model) or "no attention", *(w for w, on in options.items() if on)]
    )


def _is_liger(model: nn.Module) -> bool:
    """Return whether Liger has replaced the forward of a model, or of one inside of it."""
    return any(
        str(getattr(inspect.unwrap(module.forward), "__module__", "")).startswith("liger_kernel")
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


def attention_of(model: nn.Module) -> str:
    """Name a model's attention implementation, empty if it has none."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "") or "")


def _attempt(check: Callable[[], str]) -> str:
    """Run a check; a model that breaks on the shortcut refuses it, too."""
    try:
        return check()
    except Exception as error:  # an optional shortcut must not end a run, whatever it trips over
        first_line = (str(error).splitlines() or [""])[0]
        return f"it fails with {type(error).__name__}: {first_line}"
