"""Ask and count the terms of a loss, see `hf_gradacc.loss.terms`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.errors import ConfigError, LossError
from hf_gradacc.loss.asking.answers import Loss
from hf_gradacc.loss.coupling import Exchange
from hf_gradacc.loss.facts import LossFacts, TermFacts, differ, rounding_of
from hf_gradacc.loss.terms import LossTerms
from hf_gradacc.trainer.loss.settle import LossSettler
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import MicroBatch

__all__ = ["CountedAhead", "ask_terms", "sizes_of", "sums_of_terms"]


def sizes_of(trainer: Any, micro_batch: MicroBatch) -> list[float]:
    """Return what each term of a micro-batch is divided by; of a plain loss, the only size.

    A term that is counted by its forward has the size 1 until then.
    """
    facts: LossFacts = trainer.facts
    if not facts.terms:
        return [facts.size_of(micro_batch)]
    names = [term.name for term in facts.terms if term.facts is None]
    said: Mapping[str, float] = dict.fromkeys(names, 1.0)
    if names and not isinstance(facts.coupling, CountedAhead):
        said = _said_counts(trainer, micro_batch.inputs, names)
    return [term.size_of(micro_batch, said) for term in facts.terms]


def sums_of_terms(
    trainer: Any, terms: LossTerms, micro_batch: MicroBatch
) -> dict[str, tuple[Tensor, float | Tensor]]:
    """Return each term of a batch that was evaluated, as a sum, and what to divide it by.

    Args:
        trainer: The trainer; its ``facts`` are known.
        terms: What ``compute_loss`` returned.
        micro_batch: What it returned that for.
    """
    facts: LossFacts = trainer.facts
    if facts.weighing != "terms":
        return {}
    found: dict[str, tuple[Tensor, float | Tensor]] = {}
    for term in facts.terms:
        value = terms.value_of(term.name).detach()
        count = terms.count_of(term.name)
        if count is None:
            size = term.size_of(micro_batch, {})
            adds_up = term.facts is not None and term.facts.weighing == "sum"
            found[term.name] = (value if adds_up else value * size, size)
        else:
            found[term.name] = (value if term.is_sum else value * count, count)
    return {
        name: (total, size)
        for name, (total, size) in found.items()
        if isinstance(size, Tensor) or size  # the mean over nothing is NaN
    }


def _counting(trainer: Any) -> Any:
    """Return what counts terms in collated inputs: the trainer's own method, or ours; or None."""
    own, added = getattr(trainer, "count_terms", None), trainer._loss_settler.added
    return own if callable(own) else getattr(added, "count_terms", None)


def _said_counts(trainer: Any, inputs: Any, names: list[str]) -> dict[str, float]:
    """Return what a trainer's ``count_terms`` says of collated inputs.

    Raises:
        LossError: If a count is missing, negative or no number.
    """
    counts = _counting(trainer)(inputs)
    found: dict[str, float] = {}
    for name in names:
        count = counts.get(name) if isinstance(counts, Mapping) else None
        number = float(count) if isinstance(count, int | float | Tensor) else math.nan
        if not (math.isfinite(number) and number >= 0):
            raise LossError(
                f"{type(trainer).__name__}.count_terms returned {count!r} for the term {name!r}: "
                f"return a number for each of {', '.join(names)}, 0 where it has nothing."
            )
        found[name] = number
    return found


def ask_terms(
    trainer: Any,
    loss: Loss,
    inputs: Mapping[str, Any],
    take_apart: Callable[[], list[Mapping[str, Any]]],
    ask: Callable[[Loss], LossFacts],
    *,
    dtype: torch.dtype,
) -> LossFacts | None:
    """Ask each term of a loss what it is divided by; None if the loss has no terms.

    Args:
        trainer: The trainer; its settler has seen what ``compute_loss`` returns.
        loss: Of a model held in the mode to ask in.
        inputs: Collated rows to ask with.
        take_apart: Returns the same rows in two parts or more; fewer if they cannot be told apart.
        ask: Finds out how one loss counts.
        dtype: The coarsest dtype of a forward.

    Raises:
        LossError: If ``count_terms`` and the terms disagree.
        ConfigError: If counts are known after a forward only, and ``update_passes = 1``.
    """
    settler: LossSettler = trainer._loss_settler
    terms = settler.seen  # the mode was chosen by asking with these rows
    if terms is None:
        return None
    said = [name for name in terms if terms.count_of(name) is not None]
    has_counts = bool(said) and _counting(trainer) is not None
    if has_counts:
        _check_said(trainer, terms, inputs, said)
    elif said and trainer.args.update_passes == 1:
        raise ConfigError(
            f"update_passes = 1, but the count of the term {said[0]!r} is known only after a "
            f"forward: define count_terms(self, inputs) in {type(trainer).__name__}, which returns "
            f"it by name, or leave update_passes at 'auto'."
        )
    found = [_ask_term(loss, settler, terms, name, ask) for name in terms]
    misfits = [
        f"term {term.name!r}: {term.facts.misfit}"
        for term in found
        if term.facts is not None and term.facts.misfit
    ]
    misfits += _misfits_of_said(loss, settler, inputs, take_apart, said, dtype=dtype)
    asked = [term.facts for term in found if term.facts is not None]
    # Tokens are what is reported; a term that must be told its count is told its own.
    asked.sort(key=lambda facts: (not facts.wants_own_count, facts.rule is TargetRule.SEQUENCE))
    return LossFacts(
        asked[0].rule if asked else TargetRule.SEQUENCE,
        "terms",
        wants_own_count=any(facts.wants_own_count for facts in asked),
        pad_to_one_width=any(facts.pad_to_one_width for facts in asked),
        draws=any(facts.draws for facts in asked),
        terms=tuple(found),
        coupling=CountedAhead(settler, found) if said and not has_counts else None,
        misfit=" ".join(misfits),
        other_warnings=tuple(line for facts in asked for line in facts.other_warnings),
    )


def _ask_term(
    loss: Loss,
    settler: LossSettler,
    terms: LossTerms,
    name: str,
    ask: Callable[[Loss], LossFacts],
) -> TermFacts:
    if terms.count_of(name) is not None:
        return TermFacts(name, None, terms.is_sum(name))

    def compute(part: Mapping[str, Any], count: int | None) -> Tensor:
        loss.compute(part, count)
        assert settler.seen is not None
        return settler.seen.value_of(name)

    return TermFacts(name, ask(loss.computed_by(compute)))


def _check_said(
    trainer: Any, terms: LossTerms, inputs: Mapping[str, Any], names: list[str]
) -> None:
    said = _said_counts(trainer, inputs, names)
    for name in names:
        own: Any = terms.count_of(name)
        if differ(said[name], float(own)) > 1e-6:
            raise LossError(
                f"{type(trainer).__name__}.count_terms says {said[name]:g} for the term {name!r} "
                f"of a micro-batch, and its LossTerm says {float(own):g}: both count the same."
            )


def _misfits_of_said(
    loss: Loss,
    settler: LossSettler,
    inputs: Mapping[str, Any],
    take_apart: Callable[[], list[Mapping[str, Any]]],
    names: list[str],
    *,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Yield which terms, times the counts they say, do not add up over rows."""
    parts = take_apart() if names else []
    if len(parts) < 2:
        return

    def sums(part: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        loss.value(part, None)
        terms = settler.seen
        assert terms is not None
        found = {}
        for name in names:
            value, count = float(terms.value_of(name)), float(terms.count_of(name) or 0)
            found[name] = (value if terms.is_sum(name) or not count else value * count, count)
        return found

    together, apart = sums(inputs), [sums(part) for part in parts]
    for name in names:
        for i, what in enumerate(("sum", "count")):
            whole = together[name][i]
            error = differ(whole, sum(part[name][i] for part in apart))
            if error > rounding_of(dtype):
                yield (
                    f"term {name!r}: the {what} of rows together differs from that of their parts "
                    f"by {error:.1e} (relative): rows influence each other, or its count is not "
                    f"what it is a mean over. The gradient of an update depends on how it is cut."
                )
                break


class CountedAhead:
    """Collects the counts that terms say in their forward, over an update and all ranks.

    Args:
        settler: Has seen what ``compute_loss`` returned.
        terms: All terms.
    """

    def __init__(self, settler: LossSettler, terms: list[TermFacts]) -> None:
        self._settler = settler
        self._terms = [term for term in terms if term.facts is None]
        self._counts: list[Tensor] = []
        self._totals = torch.zeros(len(self._terms), dtype=torch.float64)

    @property
    def note(self) -> str:
        """What is done, and what it costs."""
        names = ", ".join(repr(term.name) for term in self._terms)
        return (
            f"the count of {names} is known only after a forward, so each micro-batch runs one "
            f"more ahead of its own. count_terms(self, inputs) in the trainer saves that."
        )

    def begin(self) -> None:
        """Forget the last attempt at an update."""
        self._counts = []

    @contextlib.contextmanager
    def gathering(self, micro_batch: MicroBatch, *, may_end: bool) -> Iterator[None]:
        """Collect what the terms of a micro-batch say."""
        yield
        terms = self._settler.seen
        assert terms is not None
        counts = [torch.as_tensor(terms.count_of(term.name)) for term in self._terms]
        device = terms.value_of(next(iter(terms))).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._counts.append(torch.stack([count.to(device, dtype) for count in counts]))

    def couple(self, exchange: Exchange) -> None:
        """Add up all counts."""
        none = torch.zeros(len(self._terms), dtype=torch.float64)
        self._totals = exchange.add_up(
            sum(self._counts[1:], start=self._counts[0]) if self._counts else none
        )

    @contextlib.contextmanager
    def applying(self, index: int, *, scale: float) -> Iterator[None]:
        """Weigh the terms of a micro-batch by its share of the counts."""
        counts = self._counts[index]
        totals = self._totals.to(counts.device).clamp(min=torch.finfo(counts.dtype).tiny)
        weights = self._settler.weights
        assert weights is not None
        for i, term in enumerate(self._terms):
            weights[term.name] = (1 if term.is_sum else counts[i]) / totals[i]
        yield

    def loss_of(self, own: Tensor) -> Tensor:
        """Return the loss as it is."""
        return own

    def metrics(self) -> dict[str, Tensor | float]:
        """Return nothing: terms are logged as all terms are."""
        return {}
