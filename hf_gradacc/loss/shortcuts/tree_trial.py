"""Find out whether models may compute rows that begin alike as trees, by trying it on them.

Rows are made to begin alike. What a body returns for them as one tree is compared with what it
returns for them as they are, and so is the loss. Then the own tokens of one row are changed, which
may move no other row. Behind a kept beginning they are tried the same way.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradacc.loss.facts import Compared, differ, gradients_differ, have_moved, rounding_of
from hf_gradacc.loss.shortcuts.trials import other_tokens
from hf_gradacc.loss.trees.hooks import computing_trees, is_same, watching_bodies
from hf_gradacc.loss.trees.kept import KeptBeginning, why_not_kept_by
from hf_gradacc.loss.trees.layout import Trees, lay_out_trees
from hf_gradacc.loss.trees.masks import takes_rows, why_no_masks

__all__ = ["Sharing", "TreeTrial", "describe_failure"]


@dataclass(frozen=True)
class Sharing:
    """Whether common prefixes are computed once, and why not.

    Attributes:
        bodies: The parts of models that compute trees; none if rows are computed as they are.
        refused: Why, in plain words; empty if they compute trees.
        by_rows: Attention over trees is computed row by row.
        not_kept: Why no beginning is kept over several micro-batches; empty if that is done.
    """

    bodies: tuple[nn.Module, ...] = ()
    refused: str = ""
    by_rows: bool = False
    not_kept: str = "rows are computed as they are"


_NOT_BY_MASK = (
    "it does not go by the mask and the positions it is given, as layers do that carry a state, "
    "look ahead or go by distance"
)
_MASKED = "its attention over trees is not computed row by row"
_NO_POSITIONS = "it takes no position_ids, and a token's place in a tree is not its own"
_LONGEST_TABLE = 8192
"""Places of the longest table that a trial outgrows; what has more was made for any length."""


def describe_failure(error: Exception) -> str:
    """Say what a trial tripped over, in a line."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"it fails with {type(error).__name__}: {first_line}"


@dataclass(frozen=True)
class _AsRows:
    """The rows of a trial, which begin alike, and what comes of them as they are.

    Attributes:
        inputs: Collated.
        real: Which places hold tokens ``[rows, seq]``.
        loss: Their loss.
        outputs: What each call of a body returned.
    """

    inputs: Mapping[str, Any]
    real: Tensor
    loss: float
    outputs: Sequence[Any]


@dataclass(frozen=True)
class TreeTrial:
    """Computes a few rows as they are and as trees.

    Attributes:
        models: The model, and others whose answers enter the loss (a reference model).
        inputs: The rows, collated together, on the CPU.
        loss_of: Returns the loss of collated inputs, without gradients.
        dtype: The coarsest dtype of a forward.
        why_not_kept: What speaks against keeping beginnings alone, in plain words.
        gradients_of: Returns the gradient of their loss by parameters; nothing if there is none.
    """

    models: Sequence[Any]
    inputs: Mapping[str, Any]
    loss_of: Callable[[Mapping[str, Any]], float]
    dtype: torch.dtype
    why_not_kept: str = ""
    gradients_of: Callable[[Mapping[str, Any]], list[Tensor]] = lambda inputs: []
    taken: list[bool] = field(default_factory=list)
    """Which calls of bodies had the rows, and computed trees. A loss may ask with others as well
    (KTO does, for its KL), and they stay as they are."""

    def run(self) -> Sharing:
        """Return the bodies that compute trees, or why none may."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) < 2:
            return Sharing(refused="there are no two rows of input_ids to try it on")
        if not (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape)):
            return Sharing(refused="the attention mask is not one of rows and tokens")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.ne(0)
        alike = {**self.inputs, "input_ids": _beginning_alike(ids, real)}
        with _narrow_windows(self.models, int(real.sum(1).max()) // 2):
            return self._try_ways(alike, real)

    def _try_ways(self, alike: Mapping[str, Any], real: Tensor) -> Sharing:
        """Compute rows that begin alike as they are, and as one tree, in one way or the other."""
        ids, mask = alike["input_ids"], alike.get("attention_mask")
        with watching_bodies(*self.models) as plain:
            loss = self.loss_of(alike)
        bodies, as_rows = tuple(plain.bodies), _AsRows(alike, real, loss, plain.outputs)
        if not bodies:
            return Sharing(
                refused="no part of the model was seen to compute hidden states of its rows"
            )
        for body in bodies:
            if why := why_no_masks(getattr(body, "config", None)):
                return Sharing(refused=why)
            if "position_ids" not in inspect.signature(body.forward).parameters:
                return Sharing(refused=_NO_POSITIONS)
        by_rows = all(takes_rows(body.config) for body in bodies)
        refused = ""
        # Models that call torch's attention by themselves take a mask over the tree.
        for way in (True, False) if by_rows else (False,):
            trees = lay_out_trees(ids, mask, [range(len(ids))], by_rows=way)
            try:
                why = self._compare_with(trees, bodies, as_rows)
                why = why or self._compare_gradients(trees, bodies, alike)
            except Exception:
                if not way:
                    raise
                continue
            if not why:
                kept = self._try_kept(bodies, as_rows) if way else _MASKED
                return Sharing(bodies, by_rows=way, not_kept=kept)
            refused = refused or why
        return Sharing(refused=refused)

    def _compare_with(self, trees: Trees, bodies: Sequence[nn.Module], as_rows: _AsRows) -> str:
        """Compare rows as trees with rows as they are; empty if they agree."""
        alike, real, plain = as_rows.inputs, as_rows.real, as_rows.outputs
        tree_loss, outputs = self._run_as(trees, bodies, alike)
        if len(self.taken) < len(plain) or not outputs:
            return "its body is not given rows of tokens alone"
        if not differ(tree_loss, as_rows.loss) <= rounding_of(self.dtype, "shortcut"):
            figures = (
                f"its loss as a tree is {tree_loss:.7g} where that of rows is {as_rows.loss:.7g}"
            )
            return f"{figures}: {_NOT_BY_MASK}"
        expected = [_hidden(output) for output in self._of_trees(plain)]
        actual = [_hidden(output) for output in outputs]
        if any(self._moved(a, b, real) for a, b in zip(actual, expected, strict=True)):
            return f"its hidden states differ between a tree and rows: {_NOT_BY_MASK}"
        changed, others = _with_other_tokens(trees, real)
        _, outputs = self._run_as(changed, bodies, alike)
        moved = [_hidden(output) for output in outputs]
        if any(self._moved(a, b, others, "isolation") for a, b in zip(moved, actual, strict=True)):
            return "in a tree one row changes the hidden states of the others"
        # Row by row, attention is given no more tokens than a row has.
        for width in set() if trees.groups else {_table_size(body) for body in bodies} - {0}:
            try:
                _, outputs = self._run_as(_wider(trees, width + 1), bodies, alike)
                wide = [_hidden(output) for output in outputs]
                has_moved = any(self._moved(a, b, real) for a, b in zip(wide, actual, strict=True))
            except RuntimeError:
                has_moved = True
            if has_moved:
                return f"it looks places up in a table of {width}, and a tree may have more"
        return ""

    def _compare_gradients(
        self, trees: Trees, bodies: Sequence[nn.Module], alike: Mapping[str, Any]
    ) -> str:
        """Compare the gradient of rows as trees with that of rows; empty if they agree.

        A branch that a gate of zero closes does not show in any loss, but in the gate's gradient.
        """
        try:
            expected = self.gradients_of(alike)
        except RuntimeError:  # layers that are computed again by reentrant backwards
            return ""
        if not expected:
            return ""
        with computing_trees(bodies, lambda ids, mask: self._trees_for(trees, alike, ids, mask)):
            actual = self.gradients_of(alike)
        if gradients_differ(actual, expected, dtype=self.dtype):
            return f"its gradient differs between a tree and rows: {_NOT_BY_MASK}"
        return ""

    def _trees_for(
        self, trees: Trees, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None
    ) -> Trees | None:
        """Return trees for a body that is given their rows; None for others."""
        is_theirs = is_same(ids, trees.rows) and is_same(mask, inputs.get("attention_mask"))
        return trees.to(ids.device) if is_theirs else None

    def _try_kept(self, bodies: Sequence[nn.Module], as_rows: _AsRows) -> str:
        """Compute the rows behind a beginning that is kept; empty if they are as they were."""
        whys = [self.why_not_kept, *(why_not_kept_by(body.config) for body in bodies)]
        if why := next(filter(None, whys), ""):
            return why
        alike, real, plain = as_rows.inputs, as_rows.real, as_rows.outputs
        if len(plain) > len(bodies):
            return "its loss calls the model several times"
        ids, mask = alike["input_ids"], alike.get("attention_mask")
        shortest = int(real.sum(1).min())
        beginning = ids[0][real[0]][: max(1, shortest // 2)]
        if len(beginning) >= shortest:
            return "the rows to try it on are too short"

        def lay_out(behind: KeptBeginning) -> Trees:
            return lay_out_trees(ids, mask, [range(len(ids))], by_rows=True, behind=behind)

        behind = KeptBeginning(beginning)
        trees = lay_out(behind)
        after = real & (real.cumsum(1) > len(beginning))
        try:
            why = self._compare_with(trees, bodies, as_rows)
            if not why:
                other = KeptBeginning(other_tokens(beginning))
                _, outputs = self._run_as(lay_out(other), bodies, alike)
                pairs = zip(outputs, self._of_trees(plain), strict=True)
                if not all(self._moved(_hidden(a), _hidden(b), after) for a, b in pairs):
                    why = "its rows do not see the beginning that they stand behind"
        except Exception as error:
            why = describe_failure(error)
        return behind.refused or why

    def _run_as(
        self, trees: Trees, bodies: Sequence[nn.Module], inputs: Mapping[str, Any]
    ) -> tuple[float, list[Any]]:
        """Return the loss of rows computed as trees, and what those calls returned that did."""
        self.taken.clear()
        if trees.behind is not None:
            trees.behind.begin_micro_batch()

        def lay_out(ids: Tensor, mask: Tensor | None) -> Trees | None:
            found = self._trees_for(trees, inputs, ids, mask)
            self.taken.append(found is not None)
            return found

        with computing_trees(bodies, lay_out), watching_bodies(*bodies) as watched:
            loss = self.loss_of(inputs)
        return loss, self._of_trees(watched.outputs)

    def _of_trees(self, outputs: Sequence[Any]) -> list[Any]:
        """Return what those calls returned that computed trees; none if calls went by unseen."""
        if len(outputs) != len(self.taken):
            return []
        return [output for taken, output in zip(self.taken, outputs, strict=True) if taken]

    def _moved(
        self, actual: Tensor, expected: Tensor, rows: Tensor, kind: Compared = "shortcut"
    ) -> bool:
        """Return whether the hidden state of any such token moved by more than rounding."""
        if actual.shape[:2] != rows.shape:
            return True
        return have_moved(actual, expected, dtype=self.dtype, rows=rows, kind=kind)


def _hidden(output: Any) -> Tensor:
    """Return the hidden states ``[rows, seq, hidden]`` among what a body returned."""
    states = output if isinstance(output, Tensor) else output[0]
    assert isinstance(states, Tensor)
    return states.detach()


def _beginning_alike(ids: Tensor, real: Tensor) -> Tensor:
    """Let all rows begin as the first does, for half the length of the shortest."""
    alike = ids.clone()
    half = max(1, int(real.sum(1).min()) // 2)
    start = alike[0][real[0]][:half]
    for row, of_row in zip(alike, real, strict=True):
        places = of_row.nonzero()[:half, 0]
        row[places] = start
    return alike


@contextlib.contextmanager
def _narrow_windows(models: Sequence[Any], width: int) -> Iterator[None]:
    """Let windows and chunks be narrower than the rows of a trial, so that it sees how they count.

    Masks are made by what the configuration says, here as in the model. A model that has another
    window, or none though its configuration names one, then computes something else than a tree.
    """
    configs = {
        id(module.config): module.config
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    }
    before = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name in ("sliding_window", "attention_chunk_size")
        if type(getattr(config, name, None)) is int and getattr(config, name) > max(width, 2)
    ]
    try:
        for config, name, _ in before:
            setattr(config, name, max(width, 2))
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def _table_size(body: nn.Module) -> int:
    """Return how many places a body has tables for that are no weights; 0 if it has none.

    Weights are looked up by position, and no tree has more of these than its rows.
    """
    size = getattr(getattr(body, "config", None), "max_position_embeddings", None)
    if type(size) is not int or not 0 < size <= _LONGEST_TABLE:
        return 0
    return size if any(size in buffer.shape for buffer in body.buffers()) else 0


def _wider(trees: Trees, width: int) -> Trees:
    """Pad a single tree to a width, and attend over it under a mask."""
    more = width - trees.ids.shape[1]
    trees = replace(trees, groups=(), places=None)
    if more <= 0:
        return trees
    pad = torch.nn.functional.pad
    return replace(
        trees,
        ids=pad(trees.ids, (0, more), value=int(trees.ids[0, 0])),
        positions=pad(trees.positions, (0, more)),
        ends=torch.cat((trees.ends, torch.arange(width - more + 1, width + 1)[None]), dim=1),
    )


def _with_other_tokens(trees: Trees, real: Tensor) -> tuple[Trees, Tensor]:
    """Change the tokens that the longest row has for itself.

    Returns:
        The trees, and where the tokens of all other rows are ``[rows, seq]``.
    """
    longest = int(real.sum(1).argmax())
    others = real.clone()
    others[longest] = False
    own = torch.ones(trees.ids.numel(), dtype=torch.bool)
    nodes = trees.nodes[others] - (0 if trees.behind is None else len(trees.behind.tokens))
    own[nodes[nodes >= 0]] = False
    ids = trees.ids.reshape(-1).clone()
    ids[own] = other_tokens(ids)[own]
    return replace(trees, ids=ids.view(trees.ids.shape)), others
