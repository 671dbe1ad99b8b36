"""A causal LM's loss without its logits: computed from hidden states, some rows at a time.

The logits of a micro-batch are ``targets × vocabulary`` numbers, kept several times over: as they
are, in float32, as log-probabilities and as their gradient. `ChunkedLoss` takes the same loss a
chunk of rows at a time, and the gradient with it.

Transformers' models call their LM head and hand its result to ``self.loss_function``. Both have a
public place to put something else, so no model code is patched: for the time of a micro-batch the
head passes hidden states on, and the loss multiplies by the head's weight itself. If a model
changes its logits in between (soft-capping, scaling), the loss does not get what the head passed
on. This is noticed and refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_gradacc.loss.shortcuts.head_gradient import add_product
from hf_gradacc.loss.shortcuts.onednn import matmul
from hf_gradacc.loss.trees.targets import TreeTargets

__all__ = ["ChunkedLoss", "find_owner", "rows_per_chunk", "why_not_chunked", "without_logits"]

_ROWS_ON_CPU = 256
_FEWEST_ROWS_ON_CPU = {512: 256, 256: 128, 0: 64}
"""By width of the head: each chunk reads its weight and adds to its gradient."""
_LOGITS_ON_CPU = 2**21
_BYTES_ELSEWHERE = 256 * 2**20
_MOST_ROWS_FOR_HEAD = 1024


def rows_per_chunk(
    vocab_size: int, *, width: int, device_type: str, sums_apart: bool = False
) -> int:
    """Return how many rows of logits to hold at once: by shapes alone, so a resumed run does alike.

    On a CPU the logits of a chunk are best kept in the cache, 8 MiB of them, as they are passed
    over several times; but a wide head wants more rows, since each chunk reads its weight and adds
    to its gradient. Up to 256 rows; more gain nothing. On heads of 1,024 to 150,000 words this is
    within a few per cent of the fastest size (``benchmarks/chunks.py``), which measuring at the
    beginning of a run would not find more reliably.

    Elsewhere kernels should be large, and the logits of a chunk (in float32) small beside a model.
    A head of half precision that trains sums its gradient in float32: ``4·V·H`` bytes, read and
    written once a chunk, beside ``6·R·V·H`` operations for R rows. A device that computes 200
    operations in the time of a byte then moves that sum for ``8·200 / 6R`` of the time that it
    computes: 60 % for the 447 rows of 150,000 words, a quarter for 1,024. So there a chunk may be
    as large as that sum, which is ``R = H``, up to those rows.

    Args:
        vocab_size: V.
        width: H.
        device_type: Where the head is.
        sums_apart: The head trains in half precision.

    >>> [rows_per_chunk(v, width=64, device_type="cpu") for v in (4_096, 16_384, 150_000)]
    [256, 128, 64]
    >>> [rows_per_chunk(150_000, width=w, device_type="cpu") for w in (256, 512)]
    [128, 256]
    >>> rows_per_chunk(150_000, width=896, device_type="cuda")
    447
    >>> rows_per_chunk(150_000, width=896, device_type="cuda", sums_apart=True)
    896
    """
    if device_type == "cpu":
        fewest = next(rows for least, rows in _FEWEST_ROWS_ON_CPU.items() if width >= least)
        return min(_ROWS_ON_CPU, max(fewest, _LOGITS_ON_CPU // vocab_size))
    of_head = min(width, _MOST_ROWS_FOR_HEAD) if sums_apart else 0
    return max(_ROWS_ON_CPU, of_head, _BYTES_ELSEWHERE // (4 * vocab_size))


def find_owner(model: nn.Module, head: nn.Module | None) -> PreTrainedModel | None:
    """Find the model whose forward calls a head and the loss, inside of wrappers such as PEFT's."""
    owners = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is head
    ]
    return owners[-1] if owners and head is not None else None


def why_not_chunked(owner: PreTrainedModel | None, head: nn.Module | None) -> str:
    """Return why a loss cannot be computed from a head's input, empty if it may be tried."""
    if owner is None or head is None:
        return "no model was found that calls its LM head itself"
    if type(head) is not nn.Linear or not (_has_own_forward(head) or _is_only_placed(head)):
        return f"its LM head is a {type(head).__name__} that does more than multiply by a weight"
    if owner.loss_function is not ForCausalLMLoss:
        return "its loss is not Transformers' loss of causal LMs"
    if hasattr(head.weight, "ds_id"):
        return "ZeRO-3 gathers the weight of its LM head inside of the head alone"
    return ""


def _has_own_forward(head: nn.Module) -> bool:
    """Return whether a call runs what its class defines."""
    return "forward" not in vars(head)


def _is_only_placed(head: nn.Module) -> bool:
    """Return whether accelerate has put a forward in front that only moves what it is given.

    So it does for each module of a model that ``device_map`` spreads over several devices. If the
    weight is offloaded, it is only there while the head runs.
    """
    hook: Any = getattr(head, "_hf_hook", None)
    return type(hook) is AlignDevicesHook and not hook.offload


@contextlib.contextmanager
def without_logits(
    owner: PreTrainedModel | None,
    head: nn.Module | None,
    *,
    onednn: bool = False,
    divisor: float = 1.0,
    targets: TreeTargets | None = None,
) -> Iterator[None]:
    """Let a model compute its loss in chunks for as long as the context lasts.

    Its inputs have to hold ``shift_labels`` for just the rows that reach the head, see
    `hf_gradacc.loss.layouts.kept_rows`. The ``logits`` it returns are hidden states then. Nothing
    of it stays on the model.

    Args:
        owner: From `find_owner`; None changes nothing.
        head: Its LM head, a plain linear layer.
        onednn: Let oneDNN multiply, see `hf_gradacc.loss.shortcuts.onednn`.
        divisor: What the loss will be divided by before its backward, as far as is known. It
            saves time if it is so, and changes nothing if not.
        targets: What the head reads where rows are computed as trees.
    """
    if owner is None or head is None:
        yield
        return
    assert isinstance(head, nn.Linear)
    passed_on: list[tuple[Tensor, int]] = []

    def pass_on(hidden: Tensor) -> Tensor:
        passed_on[:] = [(hidden, hidden._version)]
        return hidden

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        weight = head.weight
        hidden, version = passed_on[0] if passed_on else (None, 0)
        if logits is not hidden or logits._version != version or vocab_size != weight.shape[0]:
            raise RuntimeError("the model does something to its logits before the loss")
        if shift_labels is None or isinstance(weight, DTensor):
            raise RuntimeError("the loss got no shift_labels, or the head's weight is sharded")
        num_items = shift_labels.numel() if num_items_in_batch is None else num_items_in_batch
        weights = None
        if targets is not None:
            logits, shift_labels, weights = targets.weigh(logits, shift_labels)
        return _mean_loss(
            logits,
            shift_labels,
            weight=weight,
            bias=head.bias,
            num_items=num_items,
            weights=weights,
            onednn=onednn,
            divisor=divisor,
        )

    own_loss = vars(owner).get("_loss_function")
    own_forward = vars(head).get("forward")
    vars(head)["forward"] = pass_on  # where an instance attribute would lie, in front of the class
    owner.loss_function = loss_function
    try:
        yield
    finally:
        del vars(head)["forward"]
        if own_forward is not None:
            vars(head)["forward"] = own_forward
        if own_loss is None:
            del owner._loss_function
        else:
            owner.loss_function = own_loss


def _mean_loss(
    hidden: Tensor,
    labels: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    num_items: Tensor | int,
    weights: Tensor | None = None,
    onednn: bool = False,
    divisor: float = 1.0,
) -> Tensor:
    """Return what `ForCausalLMLoss` gives for ``hidden @ weight.T + bias``, each row so often."""
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(weight.device)
    labels = labels.reshape(-1).to(weight.device)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):  # as the head's own product would be
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device_type, enabled=False):
        onednn = onednn and device_type == "cpu" and hidden.dtype == torch.float32
        expected = 1.0
        if _reads_for_free(device_type) and hidden.dtype in (torch.float32, torch.float64):
            count = float(num_items)
            expected = 1.0 / (divisor * count) if count else 0.0
        loss: Tensor = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            labels,
            torch.is_grad_enabled(),
            onednn,
            expected or 1.0,  # 0: weightless
            None if weights is None else weights.to(weight.device),
        )
    if isinstance(num_items, Tensor):
        num_items = num_items.to(loss.device)
    return loss / num_items


def _reads_for_free(device_type: str) -> bool:
    """Return whether a number of a tensor can be looked at without waiting for a device."""
    return device_type == "cpu"


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden @ weight.T + bias``, with one chunk of logits at once.

    The gradient of a row's loss is ``softmax(logits) - onehot(label)``, so a chunk's share of all
    gradients is computed while its logits are there (as Liger's fused linear cross-entropy does,
    arXiv 2410.10989): the three products of a forward and backward, and nothing computed twice.
    torch's own `linear_cross_entropy` does the same as fast, but returns the loss of half-precision
    weights in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        wants_grad: bool,
        onednn: bool = False,
        expected: float = 1.0,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the summed loss, a scalar in float32 or wider.

        Args:
            ctx: Of autograd.
            hidden: ``[rows, hidden]``.
            weight: ``[vocab, hidden]`` in the same type.
            bias: ``[vocab]`` or None.
            labels: ``[rows]``, each a class; none is ignored.
            wants_grad: A backward will follow.
            onednn: Let oneDNN multiply; float32 on a CPU only.
            expected: The gradient of this sum that the backward will be handed; other than 1 on a
                CPU in float32 or wider only. A row of hidden states is then multiplied by it
                instead of the weight's gradient, which is as many times larger as the vocabulary.
            weights: How often each row counts ``[rows]``, in float32; None for once.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = [wants_grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        of_hidden = torch.empty_like(hidden) if wants[0] else None
        of_weight = of_bias = None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        limit = rows_per_chunk(
            weight.shape[0],
            width=hidden.shape[1],
            device_type=hidden.device.type,
            sums_apart=wants[1] and hidden.dtype != wide,
        )
        size = -(-len(hidden) // max(1, -(-len(hidden) // limit)))  # chunks as equal as can be
        for start in range(0, len(hidden), size or 1):
            rows, right = hidden[start : start + size], labels[start : start + size, None]
            scores = narrow = None  # those of the chunk before go first
            logits = matmul(rows, weight, bias) if onednn else linear(rows, weight, bias)
            scores = logits.to(wide)  # the same memory, unless weights are in half precision
            del logits
            torch.log_softmax(scores, 1, out=scores)
            of_row = None if weights is None else weights[start : start + size, None].to(wide)
            found = scores.gather(1, right)
            loss -= (found if of_row is None else found * of_row).sum()
            if not any(wants):
                continue
            scores.exp_().scatter_add_(1, right, scores.new_full((len(rows), 1), -1.0))
            if of_row is not None:
                scores.mul_(of_row)
            rows = rows if expected == 1.0 else rows * expected
            narrow = scores.to(rows.dtype)  # what a linear layer's backward would be handed
            if of_hidden is not None:
                share = matmul(narrow, weight.t()) if onednn else narrow @ weight
                of_hidden[start : start + size] = share
            if wants[1]:
                if onednn:
                    share = matmul(narrow.t(), rows.t())
                    of_weight = share if of_weight is None else of_weight.add_(share)
                elif rows.dtype != wide:
                    of_weight = add_product(of_weight, scores, narrow, rows)
                elif of_weight is None:
                    of_weight = torch.mm(narrow.t(), rows)
                else:
                    of_weight.addmm_(narrow.t(), rows)
            if wants[2]:
                of_bias = scores.sum(0) if of_bias is None else of_bias.add_(scores.sum(0))
        if expected != 1.0:
            of_hidden = None if of_hidden is None else of_hidden.mul_(expected)
            of_bias = None if of_bias is None else of_bias.mul_(expected)
        ctx.grads, ctx.expected = (of_hidden, of_weight, of_bias), expected
        ctx.dtypes = [_grad_dtype(x) for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients there are; once, since they are scaled in place."""
        if ctx.grads is None:
            raise RuntimeError("the gradient of a chunked loss can be taken only once")
        grads, ctx.grads = ctx.grads, None
        factor: Tensor | None = grad
        if ctx.expected != 1.0:
            factor = grad.double() / ctx.expected
            # The divisions that led here were rounded, as this one is.
            if abs(float(factor) - 1) <= 4 * torch.finfo(grad.dtype).eps:
                factor = None
        scaled = [
            None if x is None else (x if factor is None else x.mul_(factor)).to(dtype)
            for x, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _grad_dtype(x: Tensor | None) -> torch.dtype | None:
    """Return the type autograd wants a gradient in: a weight may sum up in float32."""
    if x is None:
        return None
    return (x.grad_dtype if x.is_leaf else None) or x.dtype
