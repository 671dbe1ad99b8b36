"""Find where a network ends and its loss begins, by trying: rows alone against rows together.

A network returns the same for a row whatever stands beside it; a loss that compares rows does not.
So from the outermost modules inwards, a module whose outputs do not depend on the other rows is
part of the network, and one whose outputs do is opened. Nothing goes by names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from transformers.utils import logging

from hf_gradacc.loss.asking.ask import held_in_mode
from hf_gradacc.loss.coupled.joint import Leaf, LeafKey, Part, Recording, joint_loss, recording
from hf_gradacc.loss.coupled.recorded import CallKey, Cut, Returned, layout_of, returned_by
from hf_gradacc.loss.coupled.replay import Replay
from hf_gradacc.loss.facts import differ, rounding_of
from hf_gradacc.updates.batch import can_slice_rows, count_rows
from hf_gradacc.updates.collator import make_micro_batch

__all__ = ["find_replay"]

logger = logging.get_logger(__name__)

_MOST_NUMBERS = 2**18
"""Of each row; 1 MiB in float32. Keeping logits over a vocabulary would cost more than it saves."""

_MOST_LEVELS = 6

_CONSTANTS = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


def find_replay(
    trainer: Any,
    model: nn.Module,
    inputs: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    *,
    compute: Callable[[Mapping[str, Any]], Tensor],
    dtype: torch.dtype,
    rows_per_sequence: int | None = 1,
    left: bool = False,
) -> Replay | None:
    """Find a way to compute a loss once over all rows of an update.

    What it finds is not checked against the gradient of the whole here.

    Args:
        trainer: The trainer, whose wrapped model is known.
        model: The bare model, in the mode it is asked in.
        inputs: A few collated rows.
        parts: The same rows in their order, in two parts or more.
        compute: Returns the loss of collated inputs, as ``compute_loss`` does, on the bare model.
        dtype: The coarsest dtype of a forward, see `dtype_computed_in`.
        rows_per_sequence: Collated rows of each sequence; None if they cannot be told apart.
        left: Padding goes in front.

    Returns:
        What couples the rows; None if there is no such way, or it would keep too much. A loss that
        gathers rows over ranks by itself (``gather_across_devices``) does so no longer.
    """
    if rows_per_sequence is None or len(parts) < 2:
        return None
    sizes = [count_rows(part) // rows_per_sequence for part in parts]
    if not can_slice_rows(inputs, sum(sizes), rows_per_sequence=rows_per_sequence):
        return None
    tolerance = rounding_of(dtype, "shortcut")
    # Widened on the left, rows would have padding in front of what stands in front of them.
    in_front = 0 if left else _virtual_tokens(model)
    sample = _Sample(inputs, parts, sizes, rows_per_sequence, compute, tolerance, in_front)
    gathering = _losses_that_gather(trainer)
    for loss in gathering:
        loss.gather_across_devices = False
    replay = None
    try:
        with _batch_norm_as_in_training(model), torch.enable_grad():
            replay = _find(trainer, model, sample, left=left, limit=rounding_of(dtype, "loss"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.info("no loss of all rows at once: %s: %s", type(error).__name__, error)
    finally:
        for loss in gathering:
            loss.gather_across_devices = replay is None
    return replay


def _virtual_tokens(model: nn.Module) -> int:
    """Return how many virtual tokens PEFT puts in front of each row."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", 0) or 0)


@dataclass
class _Sample:
    """The rows a loss is tried on.

    Attributes:
        whole: All rows, collated.
        parts: The same, taken apart.
        sizes: Rows of each part.
        rows_per_sequence: Collated rows of each row.
        compute: The loss.
        tolerance: What rounding may do to an output.
        in_front: Tokens that the model puts in front of each row.
    """

    whole: Mapping[str, Any]
    parts: Sequence[Mapping[str, Any]]
    sizes: list[int]
    rows_per_sequence: int
    compute: Callable[[Mapping[str, Any]], Tensor]
    tolerance: float
    in_front: int = 0

    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Compute the loss of a copy."""
        return self.compute(
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        )


def _find(
    trainer: Any, model: nn.Module, sample: _Sample, *, left: bool, limit: float
) -> Replay | None:
    found = _find_cuts(trainer, sample)
    if found is None:
        return None
    cuts, specs, leaves = found
    what = Recording(
        cuts,
        specs,
        leaves,
        sample.compute,
        next(model.parameters()).device,
        left=left,
        wrappers=lambda: _wrappers(trainer, model),
    )
    parts = _record(what, sample)
    loss = float(sample.run(sample.whole).detach())

    def is_exact() -> bool:
        joint = _joint_value(what, parts)
        if joint is None or differ(joint, loss) > limit:
            return False
        with held_in_mode(model, training=True):  # which may look at more, for its metrics
            return _joint_value(what, parts) is not None

    if not is_exact() or not is_exact():  # once may be by chance, if it draws
        return None
    _leave_out(what, parts, is_exact)
    used = [key for key in what.tensors() if key not in what.unused]
    if not any(what.leaves[key].needs_gradient for key in used):
        return None
    numbers = sum(part.outputs[key].numel() for part in parts for key in used)
    numbers //= sum(sample.sizes)
    if numbers > _MOST_NUMBERS:
        logger.warning_once(
            f"the loss compares rows with each other by {numbers:,} numbers of each row. Keeping "
            f"them for all rows of an update takes more memory than it saves (the limit is "
            f"{_MOST_NUMBERS:,}), so only rows of one micro-batch are compared."
        )
        return None
    with held_in_mode(model, training=True), torch.no_grad():
        _record(what, sample)  # raises if the network is called otherwise in training
    return Replay(what, numbers_per_row=numbers)


# ---- where the network ends ----------------------------------------------------------------------


@dataclass
class _Call:
    """A module that was called, and those that were called inside of it."""

    module: nn.Module
    inside: list[_Call] = field(default_factory=list)
    result: Any = None

    def outermost(self) -> list[_Call]:
        """List the outermost calls inside of it of modules that have weights."""
        found: list[_Call] = []
        for call in self.inside:
            has_weights = next(call.module.parameters(), None) is not None
            found += [call] if has_weights else call.outermost()
        return found

    def passes_on(self) -> bool:
        """Return whether it only hands on what one module inside returns, as wrappers do."""
        return len(self.inside) == 1 and self.inside[0].result is self.result


def _calls(run: Callable[[], Any]) -> _Call:
    """Run something, and return the tree of the modules it called."""
    root = _Call(nn.Identity())
    stack = [root]

    def enter(module: nn.Module, args: Any) -> None:
        call = _Call(module)
        stack[-1].inside.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        stack.pop().result = result

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return root


def _find_cuts(
    trainer: Any, sample: _Sample
) -> tuple[list[Cut], dict[CallKey, Any], dict[LeafKey, Leaf]] | None:
    """Find the outermost modules that treat each row by itself, and what their calls return."""
    if hasattr(trainer, "compute_update_loss"):  # it says where
        cuts = [Cut(trainer, "compute_row_outputs")]
        known = _by_row(cuts, sample)
        return None if any(x is None for x in known.values()) else _described(cuts, known)
    frontier = _calls(lambda: sample.run(sample.whole)).outermost()
    for _ in range(_MOST_LEVELS):
        frontier = [call for outer in frontier for call in _unwrapped(outer)]
        modules = list({id(call.module): call.module for call in frontier}.values())
        cuts = [Cut.of(module) for module in modules]
        known = _by_row(cuts, sample)
        mixing = {id(modules[index]) for (index, _), x in known.items() if x is None}
        if not mixing:
            return _described(cuts, known) if known else None
        frontier = [
            call
            for outer in frontier
            for call in (outer.outermost() if id(outer.module) in mixing else [outer])
        ]
    return None


def _unwrapped(call: _Call) -> list[_Call]:
    while call.passes_on():
        call = call.inside[0]
    return [call] if next(call.module.parameters(), None) is not None else []


def _by_row(
    cuts: Sequence[Cut], sample: _Sample
) -> dict[CallKey, tuple[Returned, list[Leaf]] | None]:
    """Say of each call what it returns; None if that depends on what other rows there are."""
    whole = returned_by(cuts, lambda: sample.run(sample.whole))
    apart = [returned_by(cuts, partial(sample.run, part)) for part in sample.parts]
    known: dict[CallKey, tuple[Returned, list[Leaf]] | None] = {}
    for key in {key for one in (whole, *apart) for key in one}:
        known[key] = None
        if not all(key in one for one in (whole, *apart)):
            continue
        parts = [one[key] for one in apart]
        if any(part.spec != whole[key].spec for part in parts):
            continue
        leaves = [
            _leaf_of(value, [part.leaves[i] for part in parts], sample)
            for i, value in enumerate(whole[key].leaves)
        ]
        if all(leaf is not None for leaf in leaves):
            known[key] = whole[key], [leaf for leaf in leaves if leaf is not None]
    return dict(sorted(known.items()))


def _leaf_of(whole: Any, parts: list[Any], sample: _Sample) -> Leaf | None:
    if not isinstance(whole, Tensor):
        is_constant = isinstance(whole, _CONSTANTS) and all(part == whole for part in parts)
        return Leaf(None, constant=whole if is_constant else _Unrecorded())
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    detached = [part.detach() for part in parts]
    layout = layout_of(whole.detach(), detached, sample.sizes, tolerance=sample.tolerance)
    if layout is None:
        return None
    widths = {v.shape[-1] for v in sample.whole.values() if isinstance(v, Tensor) and v.ndim > 1}
    widths |= {width + sample.in_front for width in widths}
    sizes = tuple(None if size in widths else size for size in whole.shape[1:])
    return Leaf(layout, needs_gradient=whole.requires_grad, sizes=sizes)


class _Unrecorded:
    """Stands for an output that is no tensor and differs between micro-batches: a cache, say."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: updates in two passes do not keep this output")


def _described(
    cuts: list[Cut], known: Mapping[CallKey, tuple[Returned, list[Leaf]] | None]
) -> tuple[list[Cut], dict[CallKey, Any], dict[LeafKey, Leaf]]:
    calls = {key: call for key, call in known.items() if call is not None}
    specs = {key: returned.spec for key, (returned, _) in calls.items()}
    leaves = {(*key, i): leaf for key, (_, of) in calls.items() for i, leaf in enumerate(of)}
    return cuts, specs, leaves


# ---- what the loss needs of it -------------------------------------------------------------------


def _record(what: Recording, sample: _Sample) -> list[Part]:
    parts: list[Part] = []
    for part in sample.parts:
        micro_batch = make_micro_batch(dict(part), rows_per_sequence=sample.rows_per_sequence)
        with recording(what, micro_batch) as recorded:
            sample.run(part)
        parts += recorded
    return parts


def _joint_value(what: Recording, parts: Sequence[Part]) -> float | None:
    """Return the loss of all rows; None if it needs something that is left out."""
    try:
        return float(joint_loss(what, [_left_out(what, part) for part in parts])[0].detach())
    except Exception:
        return None


def _leave_out(what: Recording, parts: Sequence[Part], is_exact: Callable[[], bool]) -> None:
    """Leave out, one by one, each output and input that the loss does not change without."""
    for key in what.tensors():
        what.unused.add(key)
        if not is_exact():
            what.unused.remove(key)
    for name, value in parts[0].inputs.items():
        if isinstance(value, Tensor) and value.ndim:
            what.unused_inputs.add(name)
            if not is_exact():
                what.unused_inputs.remove(name)


def _left_out(what: Recording, part: Part) -> Part:
    def kept(value: Any, is_unused: bool) -> Any:
        return value.to("meta") if is_unused and isinstance(value, Tensor) else value

    return Part(
        part.num_rows,
        part.rows_per_sequence,
        part.rows,
        part.places,
        {key: kept(value, key in what.unused_inputs) for key, value in part.inputs.items()},
        {key: kept(value, key in what.unused) for key, value in part.outputs.items()},
    )


# ---- what stands around --------------------------------------------------------------------------


def _wrappers(trainer: Any, model: nn.Module) -> list[tuple[Cut, Any]]:
    """List what is wrapped around a model, from the outside; each is to call the model itself."""
    found: list[tuple[Cut, Any]] = []
    outer = trainer.model_wrapped
    while isinstance(outer, nn.Module) and outer is not model:
        found.append((Cut.of(outer), model))
        inner = getattr(outer, "module", None)
        outer = inner if inner is not None else getattr(outer, "_orig_mod", None)
    return found


def _losses_that_gather(trainer: Any) -> list[Any]:
    """List the losses of a trainer that collect the embeddings of all ranks by themselves."""
    own = getattr(trainer, "loss", None)
    losses = list(own.values()) if isinstance(own, Mapping) else [own]
    modules = [m for loss in losses if isinstance(loss, nn.Module) for m in loss.modules()]
    return [m for m in modules if getattr(m, "gather_across_devices", False) is True]


@contextlib.contextmanager
def _batch_norm_as_in_training(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm mix rows, as it will, so that nothing behind it is taken for one row's."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm in norms:
            norm.training = False
