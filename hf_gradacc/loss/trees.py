"""Compute rows that begin alike as trees: each common prefix once, in the body of a model.

The rows of a micro-batch go into the model as they are. In front of its body (all layers, without
the head) they are laid out as trees, and behind it every row gets its hidden states back, those of
a common prefix several times. So head, loss, label smoothing, metrics and whoever else reads what
the body returns see what they always see, and a gradient that reaches a common prefix is the sum
over the rows that hold it. No model code is patched: two hooks do it, for as long as a micro-batch
runs.

A tree is laid out depth first. Its nodes descend from those that stand before them and have not
ended, which is all the attention has to know: token ``i`` sees ``j`` if ``j <= i < end[j]``.
Positions count from the root, so that they are those of the row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedModel

from hf_gradacc.loss.layouts import find_head
from hf_gradacc.loss.tree_attention import (
    Group,
    Marker,
    attending_by_rows,
    group_rows,
    repeat,
)
from hf_gradacc.updates.prefixes import sort_by_prefix
from hf_gradacc.updates.update import start_copy

__all__ = [
    "ATTENTIONS",
    "Trees",
    "Watched",
    "computing_these",
    "computing_trees",
    "is_same",
    "lay_out_trees",
    "takes_rows",
    "tree_masks",
    "watching_bodies",
    "why_no_masks",
]

ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that take a mask of any shape."""

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class Trees:
    """The rows of a micro-batch as trees, beside each other and padded to the widest.

    Attributes:
        rows: Token ids ``[rows, seq]`` as the model is given them.
        ids: Token ids ``[trees, width]``.
        positions: Each token's place in its row ``[trees, width]``.
        ends: Where the descendants of each token end ``[trees, width]``, in places of its tree.
        nodes: For each token of the rows ``[rows, seq]``, its place in the flattened trees. Padding
            has that of its row's first token, and whatever comes back there goes nowhere.
        num_tokens: Tokens of all trees, without what pads them.
        groups: How their attention is computed row by row, see `hf_gradacc.loss.tree_attention`;
            none if it is computed under a mask over each tree.
        places: See `group_rows`.
    """

    rows: Tensor
    ids: Tensor
    positions: Tensor
    ends: Tensor
    nodes: Tensor
    num_tokens: int
    groups: tuple[Group, ...] = ()
    places: Tensor | None = None

    def to(self, device: torch.device) -> Trees:
        """Copy to a device, without waiting for it."""
        names = ("rows", "ids", "positions", "ends", "nodes")
        there: dict[str, Any] = {name: start_copy(getattr(self, name), device) for name in names}
        if self.places is not None:
            there["places"] = start_copy(self.places, device)
            there["groups"] = tuple(group.to(device) for group in self.groups)
        return replace(self, **there)


def lay_out_trees(
    ids: Tensor,
    mask: Tensor | None,
    trees: Sequence[Sequence[int]],
    *,
    by_rows: bool = False,
) -> Trees:
    """Lay out padded rows as trees.

    Args:
        ids: Token ids ``[rows, seq]``; trees are laid out on the CPU.
        mask: 1 for tokens, 0 for padding, of that shape; None if there is no padding.
        trees: The rows of each tree; every row is in one. Rows of a tree that have nothing in
            common stand beside each other in it.
        by_rows: Attention is computed row by row. All trees then stand in one row, without padding.

    >>> trees = lay_out_trees(torch.tensor([[5, 6, 7], [5, 6, 8]]), None, [(0, 1)])
    >>> trees.ids.tolist(), trees.positions.tolist(), trees.ends.tolist(), trees.nodes.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 2]], [[4, 4, 3, 4]], [[0, 1, 2], [0, 1, 3]])
    """
    ids = ids.cpu()  # a step of somebody's own may have moved the rows
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().ne(0)
    tokens = [row[of_row].numpy() for row, of_row in zip(ids, real, strict=True)]
    # Nothing tells trees in one row from a tree whose rows have nothing in common.
    together = [[row for rows in trees for row in rows]] if by_rows else trees
    grown = [_grow(tokens, rows) for rows in together]
    width = max(len(tree.ids) for tree in grown)
    shape = (len(grown), width)
    # What pads a tree sees itself alone: attention to nothing is NaN.
    flat_ids = ids.new_full(shape, int(ids[0, 0]))
    positions = torch.zeros(shape, dtype=torch.int64)
    ends = torch.arange(1, width + 1).repeat(len(grown), 1)
    nodes = torch.zeros(ids.shape, dtype=torch.int64)
    for place, tree in enumerate(grown):
        size = len(tree.ids)
        flat_ids[place, :size] = torch.tensor(tree.ids, dtype=ids.dtype)
        positions[place, :size] = torch.tensor(tree.positions)
        ends[place, :size] = torch.tensor(tree.ends)
        for row, path in tree.paths.items():
            where = torch.tensor(path, dtype=torch.int64) + place * width
            nodes[row] = where[0] if len(where) else place * width
            nodes[row, real[row]] = where
    laid_out = Trees(ids, flat_ids, positions, ends, nodes, sum(len(tree.ids) for tree in grown))
    if not by_rows:
        return laid_out
    (tree,) = grown
    groups, places = group_rows(
        list(tree.paths.values()), [tree.num_own[row] for row in tree.paths]
    )
    return replace(laid_out, groups=tuple(groups), places=places)


@dataclass
class _Tree:
    """One tree, as lists over its nodes, and the nodes of each row."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    paths: dict[int, list[int]]
    num_own: dict[int, int]


def _grow(tokens: Sequence[Any], rows: Sequence[int]) -> _Tree:
    """Write the tokens of some rows depth first, common prefixes once."""
    found = sort_by_prefix([tokens[row] for row in rows])
    tree = _Tree([], [], [], {}, {})
    path: list[int] = []
    for place, shared in zip(found.order.tolist(), found.shared.tolist(), strict=True):
        own = tokens[rows[place]][shared:].tolist()
        here = len(tree.ids)
        for node in path[shared:]:
            tree.ends[node] = here
        path = path[:shared] + list(range(here, here + len(own)))
        tree.ids += own
        tree.positions += range(shared, shared + len(own))
        tree.ends += [0] * len(own)
        tree.paths[rows[place]], tree.num_own[rows[place]] = path, len(own)
    for node in path:
        tree.ends[node] = len(tree.ids)
    return tree


def tree_masks(
    trees: Trees,
    config: Any,
    *,
    dtype: torch.dtype,
    mark: Callable[[Marker], None] | None = None,
) -> Any:
    """Make the masks of trees, as a model's body takes them.

    Args:
        trees: On the device of the model.
        config: The configuration of the body: its attention, windows, kinds of layers.
        dtype: What the model computes in.
        mark: From `attending_by_rows`, if attention is computed row by row.

    Returns:
        One mask ``[trees, 1, width, width]``, or a flex attention's of that shape; or one for each
        kind of layer, where the configuration names kinds.
    """
    makes: dict[str, Callable[[], Any]] = {
        _FULL: lambda: make(),
        _SLIDING: lambda: make(window=config.sliding_window),
        _CHUNKED: lambda: make(chunk=config.attention_chunk_size),
    }

    def make(**limits: int | None) -> Any:
        if mark is not None and trees.groups and config._attn_implementation == "sdpa":
            marker = _marker(trees, **limits)
            mark(marker)
            return marker.mask
        return _mask(trees, config, dtype=dtype, **limits)

    kinds = _kinds_of_layers(config)
    if kinds and kinds != [_FULL]:
        return {kind: makes[kind]() for kind in kinds}
    # A window that the configuration names is nobody's where all layers are named as full.
    window = None if kinds else getattr(config, "sliding_window", None)
    return makes[_FULL if window is None else _SLIDING]()


def _kinds_of_layers(config: Any) -> list[str]:
    """Return the kinds of layers that a configuration names, none if it names none."""
    return sorted(set(getattr(config, "layer_types", None) or ()))


def takes_rows(config: Any) -> bool:
    """Return whether trees may stand in one row: no mask over all of them has to be computed."""
    return str(getattr(config, "_attn_implementation", "")) in ("sdpa", "flex_attention")


def why_no_masks(config: Any) -> str:
    """Return why masks of trees cannot be made for a body, empty if they can."""
    attention = str(getattr(config, "_attn_implementation", "") or "no attention")
    if attention not in ATTENTIONS:
        return f"{attention} takes no mask of any shape: use sdpa, flex_attention or eager"
    others = [k for k in _kinds_of_layers(config) if k not in (_FULL, _SLIDING, _CHUNKED)]
    if others:
        return (
            f"its layers of {', '.join(others)} carry a state from one token to the next, or "
            f"choose what they attend to"
        )
    return ""


def _marker(trees: Trees, *, window: int | None = None, chunk: int | None = None) -> Marker:
    assert trees.places is not None
    num_trees, width = trees.ids.shape
    mask = torch.ones((), dtype=torch.bool, device=trees.ids.device)
    masks = [group.mask(window=window, chunk=chunk) for group in trees.groups]
    return Marker(mask.expand(num_trees, 1, width, width), trees.groups, masks, trees.places)


def _mask(
    trees: Trees,
    config: Any,
    *,
    window: int | None = None,
    chunk: int | None = None,
    dtype: torch.dtype,
) -> Any:
    ends, positions = trees.ends, trees.positions
    num_trees, width = ends.shape

    def sees(tree: Any, _: Any, i: Any, j: Any) -> Any:
        seen = (j <= i) & (i < ends[tree, j])
        # Windows and chunks count along the row, that is from the root, not over the tree.
        if window is not None:
            seen = seen & (positions[tree, i] - positions[tree, j] < window)
        if chunk is not None:
            seen = seen & (positions[tree, i] // chunk == positions[tree, j] // chunk)
        return seen

    if config._attn_implementation == "flex_attention":
        return create_block_mask(sees, num_trees, None, width, width, device=ends.device)
    every = torch.arange(num_trees, device=ends.device)[:, None, None]
    place = torch.arange(width, device=ends.device)
    seen = sees(every, None, place[:, None], place[None, :]).unsqueeze(1)
    if config._attn_implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


@dataclass
class Watched:
    """What was called while models were watched.

    Attributes:
        bodies: The first part without a head that was called in each model.
        outputs: What they returned, call by call.
    """

    bodies: list[nn.Module] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def watching_bodies(*models: Any) -> Iterator[Watched]:
    """Find the bodies of models (all layers, without a head) by watching which are called.

    What a model calls its body by is not told by its class: some pass over a wrapper of their own
    (OPT), some name none (Llama 4), and PEFT calls a model's forward without the model.

    Args:
        *models: Models, wrapped or bare; what is no model is passed over.

    Yields:
        What is called, filled while the context lasts.
    """
    watched = Watched()
    running: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if not running and all(module is not body for body in watched.bodies):
            watched.bodies.append(module)
        running.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()
        if not running:
            watched.outputs.append(output)

    inside = {
        id(module): module
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not _has_head(module)
    }
    handles = []
    for module in inside.values():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _has_head(model: PreTrainedModel) -> bool:
    return model.base_model is not model or find_head(model) is not None


@contextlib.contextmanager
def computing_trees(
    bodies: Sequence[nn.Module], lay_out: Callable[[Tensor, Tensor | None], Trees | None]
) -> Iterator[list[Trees]]:
    """Let bodies compute trees in place of rows for as long as the context lasts.

    A body that is called with something other than rows of tokens computes it as it is.

    Args:
        bodies: From `watching_bodies`.
        lay_out: Called with the token ids and the mask that a body is given, on its device. Returns
            their trees, on that device; None to compute them as they are.

    Yields:
        The trees that were computed, one for each call of a body.
    """
    computed: list[Trees] = []
    handles = []
    try:
        with attending_by_rows() as mark:
            for body in bodies:
                hooks = _Hooks(body, lay_out, computed, mark)
                handles += [
                    body.register_forward_pre_hook(hooks.before, with_kwargs=True),
                    body.register_forward_hook(hooks.after, always_call=True),
                ]
            yield computed
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def computing_these(
    bodies: Sequence[nn.Module], trees: Trees, ids: Tensor, mask: Tensor | None = None
) -> Iterator[list[Trees]]:
    """Let bodies compute given trees wherever they are called with the rows that these are of.

    A trainer may call several models with its rows, or one of them twice: DPO asks a reference. It
    may also ask with other rows in between, which are computed as they are.

    Args:
        bodies: From `watching_bodies`.
        trees: Of the rows, on the CPU.
        ids: The rows' token ids ``[rows, seq]`` as the model is given them.
        mask: Their mask, likewise.

    Yields:
        The trees that were computed, one for each call of a body that they took the place of.
    """
    here = trees.to(ids.device)
    laid_out = _versions(ids, mask)

    def lay_out(given: Tensor, of_given: Tensor | None) -> Trees | None:
        # A step or a loss may have written into the rows after they were laid out.
        if _versions(ids, mask) != laid_out:
            return None
        return here if is_same(given, ids) and is_same(of_given, mask) else None

    with computing_trees(bodies, lay_out) as computed:
        yield computed


def _versions(*tensors: Tensor | None) -> list[int]:
    """Return how often each was written into, as far as torch counts that."""
    return [0 if t is None or t.is_inference() else t._version for t in tensors]


def is_same(given: Tensor | None, known: Tensor | None) -> bool:
    """Compare what a body is given with what is known, by its values only if need be.

    A device would have to be waited for.
    """
    if given is None or known is None or given is known:
        return given is known
    return given.shape == known.shape and torch.equal(given, known.to(given))


class _Hooks:
    """What is done in front of a body, and behind it."""

    def __init__(
        self,
        body: nn.Module,
        lay_out: Callable[[Tensor, Tensor | None], Trees | None],
        computed: list[Trees],
        mark: Callable[[Marker], None],
    ) -> None:
        self.config: Any = body.config
        self.lay_out = lay_out
        self.computed = computed
        self.mark = mark
        self.running: Trees | None = None

    def before(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.running = None
        given = _named(args, kwargs)
        if given is None or getattr(self.config, "output_attentions", False):
            return None
        mask = given.get("attention_mask")
        trees = self.lay_out(given["input_ids"], mask if isinstance(mask, Tensor) else None)
        if trees is None:
            return None
        dtype = next((p.dtype for p in body.parameters()), torch.float32)
        if torch.is_autocast_enabled(trees.ids.device.type):
            dtype = torch.get_autocast_dtype(trees.ids.device.type)
        given |= {
            "input_ids": trees.ids,
            "position_ids": trees.positions,
            "attention_mask": tree_masks(trees, self.config, dtype=dtype, mark=self.mark),
            "use_cache": False,
        }
        self.running = trees
        self.computed.append(trees)
        return (), given

    def after(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        trees, self.running = self.running, None
        return output if trees is None or output is None else _as_rows(output, trees)


_TAKEN = ("input_ids", "attention_mask", "position_ids", "use_cache")
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")
"""What models hand on with everything else, and their loss alone reads."""


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a body's inputs by name if they are rows of tokens and nothing else, else None."""
    given = dict(kwargs)
    if len(args) == 1 and "input_ids" not in given:
        given["input_ids"] = args[0]
    elif args:
        return None
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return None
    if given.get("position_ids") is not None or given.get("output_attentions"):
        return None
    known = (*_TAKEN, *_OF_THE_LOSS)
    others = [value for key, value in given.items() if key not in known]
    return None if any(_holds_something(value) for value in others) else given


def _holds_something(value: Any) -> bool:
    """Return whether an input may differ from token to token; flags and numbers do not."""
    return not (value is None or isinstance(value, bool | int | float | str))


def _as_rows(output: Any, trees: Trees) -> Any:
    """Give every row what a body has computed for its tokens."""
    if isinstance(output, Tensor):
        num_trees, width = trees.ids.shape
        flat = trees.nodes.reshape(-1).to(output.device)
        if output.shape[:2] == (num_trees, width):
            found = repeat(output.reshape(num_trees * width, *output.shape[2:]), flat)
            return found.view(*trees.nodes.shape, *output.shape[2:])
        if output.ndim == 2 and output.shape[0] == num_trees * width:  # logits of a router
            return repeat(output, flat)
        return output
    if isinstance(output, dict):  # Transformers' outputs, which are dictionaries of their fields
        for key, value in list(output.items()):
            output[key] = _as_rows(value, trees)
        return output
    if isinstance(output, tuple | list):
        return type(output)(_as_rows(value, trees) for value in output)
    return output
