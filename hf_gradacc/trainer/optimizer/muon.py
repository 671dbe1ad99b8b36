"""``optim = "muon"``: Muon for hidden matrices and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix
orthogonal before it steps. Its authors leave embeddings, the output layer, vectors and scalars to
AdamW. torch has both, but Muon refuses whatever is no matrix; here each has its parameter groups,
and schedule, checkpoint and log see one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.utils import logging

from hf_gradacc.errors import ConfigError
from hf_gradacc.text import nearest

__all__ = ["MuonWithAdamW", "find_hidden_matrices", "muon_options", "refuse_muon"]

logger = logging.get_logger(__name__)

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "adjust_lr_fn": str,
    "momentum": float,
    "nesterov": lambda text: {"true": True, "false": False}[text.lower()],
    "ns_steps": int,
}


class MuonWithAdamW(Optimizer):
    """Steps the groups with ``uses_muon`` by Muon, and all others by AdamW.

    Args:
        params: Parameters or groups of them; all are AdamW's until a group is given ``uses_muon``.
        lr: Learning rate of both. Muon's step is scaled to the size of AdamW's by default
            ("match_rms_adamw", Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that one rate
            and one decay suit both.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Of both.
        muon: Muon's own options: momentum, nesterov, ns_steps, adjust_lr_fn.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        muon: dict[str, Any] | None = None,
    ) -> None:
        nothing = [nn.Parameter(torch.zeros(1, 1))]
        adjusted = {"adjust_lr_fn": "match_rms_adamw", **(muon or {})}
        self._muon: Any = Muon(nothing, lr=lr, weight_decay=weight_decay, **adjusted)
        self._adamw = AdamW(nothing, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults = {**self._muon.defaults, **self._adamw.defaults, "uses_muon": False}
        super().__init__(params, defaults)

    def use_muon(self, group: dict[str, Any]) -> None:
        """Make a group Muon's."""
        group.update(uses_muon=True, eps=self._muon.defaults["eps"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure` computes the loss anew, as for every optimizer of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, is_muon in ((self._muon, True), (self._adamw, False)):
            # Whoever loads a checkpoint or shards the model puts others in their place.
            part.param_groups = [g for g in self.param_groups if g["uses_muon"] is is_muon]
            part.state = self.state
            part.step()
        return loss


def muon_options(optim_args: str | None) -> dict[str, Any]:
    """Read ``optim_args``.

    Raises:
        ConfigError: If an option is not Muon's, or has a value that it cannot have.

    >>> muon_options("momentum=0.9, nesterov=false")
    {'momentum': 0.9, 'nesterov': False}
    """
    options: dict[str, Any] = {}
    for pair in filter(None, (optim_args or "").replace(" ", "").split(",")):
        name, _, value = pair.partition("=")
        if name not in _OPTIONS:
            guess = nearest(name, _OPTIONS)
            hint = f"did you mean {guess}?" if guess else f"use {', '.join(_OPTIONS)}."
            raise ConfigError(f"optim_args: {name!r} is no option of optim = 'muon': {hint}")
        try:
            options[name] = _OPTIONS[name](value)
            Muon([nn.Parameter(torch.zeros(1, 1))], **{name: options[name]})
        except (ValueError, KeyError) as error:
            raise ConfigError(f"optim_args: {name} = {value!r} is not possible: {error}.") from None
    return options


def find_hidden_matrices(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that are Muon's: matrices of hidden layers.

    Embeddings are none, nor adapters of them, nor what stands outside of the model's body: output
    layers and heads. Experts kept in one tensor of three dimensions are none either.
    """
    adapted: Any = model
    whole = adapted.get_base_model() if hasattr(model, "get_base_model") else adapted
    body = getattr(whole, getattr(whole, "base_model_prefix", ""), None)
    inside = body if isinstance(body, nn.Module) else whole
    matrices = {
        id(p)
        for name, p in inside.named_parameters()
        if p.ndim == 2 and "lora_embedding" not in name
    }
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            matrices.discard(id(module.weight))
    find_output: Any = getattr(whole, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None
    if output is not None:
        matrices -= {id(p) for p in output.parameters()}
    return matrices


def refuse_muon(model: nn.Module, *, sharded_by: str | None = None) -> None:
    """Refuse a model that Muon cannot step on.

    Args:
        model: The model.
        sharded_by: What splits its weights or its optimizer between ranks; None if nothing does.

    Raises:
        ConfigError: Naming why, and the way out.
    """
    if sharded_by is not None:
        raise ConfigError(
            f"optim = 'muon' needs whole matrices on each rank, and {sharded_by} splits them: use "
            f"DDP (leave {sharded_by} out), or optim = 'adamw_torch_fused'."
        )
    matrices = find_hidden_matrices(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(id(p) in matrices for p in trained):
        raise ConfigError(
            "optim = 'muon' steps on matrices of hidden layers, and none is trained here: use "
            "optim = 'adamw_torch_fused'."
        )
    wide = sum(p.numel() for p in trained if p.ndim > 2)
    if 2 * wide > sum(p.numel() for p in trained):
        logger.warning_once(
            "optim = 'muon': more than half of the trained weights stand in tensors of more than "
            "two dimensions, such as experts kept together: AdamW steps on those."
        )
