"""Find the fastest token budget by trying some on the first updates.

The cut of an update never changes its gradient, so trying costs nothing but a few slower updates.
Pure bookkeeping: `trainer.budget` times the updates, `updates.planner` plans them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["FIRST_BUDGET", "BudgetTuner", "LayoutTurns", "TokenBudget"]

FIRST_BUDGET = 1024
"""Tokens that "auto" plans with before it has seen an update."""


_SMALLEST = 256
_TRIES_ON_THE_WAY_UP = 2
_TRIES_OF_THE_BEST = 3
_CLEARLY_SLOWER = 1.05
_ENOUGH_UPDATES = 20


@dataclass
class BudgetTuner:
    """Chooses the budget of the next update from how long the last ones took.

    Budgets double from the smallest that holds the longest sequence, two updates each, until one
    is clearly slower, does not fit, or holds the whole update. The two best then take turns, three
    updates each, and the one with the smaller median wins.

    Times are compared per input token, since updates hold different sequences. The first update
    warms up and counts for nothing.

    >>> tuner = BudgetTuner()
    >>> while not tuner.settled:
    ...     per_token = {512: 3.0, 1024: 2.0, 2048: 2.2}[tuner.tokens]
    ...     tuner.note(tuner.tokens, seconds=per_token * 9000, num_tokens=9000, longest=400)
    >>> tuner.tokens, tuner.num_updates
    (1024, 13)

    Attributes:
        tokens: What to plan the next update with.
        settled: Nothing is tried any more.
        tried: Seconds per input token of each budget, in the order of the updates.
        num_updates: Updates it took so far.
        setting: What the fastest budget depends on, by which it is remembered; empty for nothing.
    """

    tokens: int = FIRST_BUDGET
    settled: bool = False
    tried: dict[int, list[float]] = field(default_factory=dict)
    num_updates: int = 0
    setting: str = ""
    _finals: dict[int, list[float]] = field(default_factory=dict)
    _limit: int | None = None
    _whole: int = 0
    _proposed: int = 0

    def note(self, planned: int | None, *, seconds: float, num_tokens: int, longest: int) -> None:
        """Take in one finished update and choose the budget of the next.

        Args:
            planned: The budget it was planned with; loader workers plan ahead, so it may be an
                older one. None if it was not planned with any.
            seconds: How long it took.
            num_tokens: Tokens fed in, without padding.
            longest: Tokens of its longest sequence.
        """
        if self.settled:
            return
        self.num_updates += 1
        if self.num_updates == 1:
            self.tokens = max(_SMALLEST, _power_of_two_from(longest))
            self._whole = _power_of_two_from(num_tokens)
            return
        if planned is not None and num_tokens > 0:
            self.tried.setdefault(planned, []).append(seconds / num_tokens)
            if planned in self._finals:
                self._finals[planned].append(seconds / num_tokens)
        self._proposed += 1
        if self._finals:
            self._take_turns()
        elif self._proposed >= _TRIES_ON_THE_WAY_UP:
            self._climb()
        if self.num_updates >= _ENOUGH_UPDATES and self.tried:
            self._settle()

    def adopt(self, budget: int) -> None:
        """Settle on a budget that an earlier run found."""
        self.tokens, self.settled = budget, True

    def forbid(self, budget: int) -> None:
        """Record that a budget does not fit into memory, and stay below it."""
        self._limit = budget - 1 if self._limit is None else min(self._limit, budget - 1)
        self.tried = {b: times for b, times in self.tried.items() if b <= self._limit}
        self._finals = {b: times for b, times in self._finals.items() if b <= self._limit}
        if self.tokens > self._limit:
            self.tokens = max(self.tried, default=max(1, self._limit))
            if not self.settled and self.tried and not self._finals:
                self._choose_finalists()

    def describe(self) -> str:
        """Describe what was tried and which budget won, in one line."""
        if not self.tried:
            return f"max_tokens_per_micro_batch = {self.tokens}, as an earlier run tuned it"
        best = min(statistics.median(times) for times in self.tried.values())
        tried = ", ".join(
            f"{budget}: {statistics.median(times) / best:.2f}"
            for budget, times in sorted(self.tried.items())
        )
        return (
            f"max_tokens_per_micro_batch = {self.tokens} after {self.num_updates} updates; time "
            f"per token relative to the fastest: {tried}"
        )

    def _climb(self) -> None:
        # The faster of two: what else the machine does only ever adds to a time. Workers plan
        # ahead, so the last budgets proposed may not have been measured yet.
        times = {
            budget: min(tries)
            for budget, tries in sorted(self.tried.items())
            if len(tries) >= _TRIES_ON_THE_WAY_UP
        }
        largest = max(times, default=0)
        smaller = [seconds for budget, seconds in times.items() if budget < largest]
        slower = bool(smaller) and times[largest] > _CLEARLY_SLOWER * min(smaller)
        following = self.tokens * 2
        at_end = self.tokens >= self._whole or bool(self._limit and following > self._limit)
        if slower or (at_end and self.tokens in times):
            self._choose_finalists()
        elif not at_end:
            self.tokens, self._proposed = following, 0

    def _choose_finalists(self) -> None:
        best = sorted(self.tried, key=lambda budget: min(self.tried[budget]))
        self._finals = {budget: [] for budget in best[:2]}
        self._take_turns()

    def _take_turns(self) -> None:
        if len(self._finals) < 2 or min(map(len, self._finals.values())) >= _TRIES_OF_THE_BEST:
            self._settle()
        else:
            first, second = self._finals
            self.tokens = first if self.tokens == second else second

    def _settle(self) -> None:
        among = {budget: times for budget, times in self._finals.items() if times} or self.tried
        self.tokens = min(among, key=lambda budget: statistics.median(among[budget]))
        self.settled = True


@dataclass
class LayoutTurns:
    """Compares updates of trees with updates of rows, which take turns, three each.

    What trees save is estimated by a model of costs, `hf_gradacc.updates.trees.cost.TreeCost`.
    Where budgets are timed anyway, so is this: trees stay unless rows are faster on this device.
    Times are compared per input token.

    >>> turns = LayoutTurns()
    >>> while not turns.settled:
    ...     turns.note(turns.with_trees, seconds=2.0 if turns.with_trees else 1.0, num_tokens=100)
    >>> turns.with_trees, turns.describe()
    (False, 'layout: rows, since trees take 2.00 of their time')

    Ranks may settle differently, each by its own clock. That changes neither a gradient nor who is
    dealt what: rows are dealt by costs that all ranks know, and each cuts its share by itself.

    Attributes:
        with_trees: Whether the next update may be planned as trees.
        settled: Nothing is compared any more.
        tried: Seconds per input token with trees, and without.
        num_without_saving: Updates that trees would have saved too little of.
    """

    with_trees: bool = True
    settled: bool = False
    tried: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    num_without_saving: int = 0

    def note_without_saving(self) -> None:
        """Count an update of rows because trees would save too little; many settle on rows."""
        self.num_without_saving += 1
        if not self.settled and self.num_without_saving >= _ENOUGH_UPDATES:
            self.settled, self.with_trees = True, False

    def note(self, with_trees: bool, *, seconds: float, num_tokens: int) -> None:
        """Take in one finished update and choose the layout of the next.

        Args:
            with_trees: Whether it was planned as trees; loader workers plan ahead.
            seconds: How long it took.
            num_tokens: Tokens of its rows, without padding.
        """
        if self.settled or num_tokens == 0:
            return
        self.tried[with_trees].append(seconds / num_tokens)
        tries = {way: len(times) for way, times in self.tried.items()}
        self.settled = min(tries.values()) >= _TRIES_OF_THE_BEST
        self.with_trees = self._ratio() <= 1 if self.settled else tries[True] <= tries[False]

    def describe(self) -> str:
        """Describe what was found, in one line."""
        if min(map(len, self.tried.values())) < _TRIES_OF_THE_BEST:
            return (
                f"layout: rows, since trees would have saved too little in "
                f"{self.num_without_saving} updates"
            )
        taken, others = ("trees", "") if self.with_trees else ("rows", "since trees ")
        return f"layout: {taken}, {others or 'which '}take {self._ratio():.2f} of " + (
            "the time of rows" if self.with_trees else "their time"
        )

    def _ratio(self) -> float:
        """Time of trees over that of rows."""
        return statistics.median(self.tried[True]) / statistics.median(self.tried[False])


def _power_of_two_from(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(eq=False)
class TokenBudget(TrainerCallback, ExportableState):
    """The tokens a micro-batch may compute: asked for or tuned, and capped by memory.

    The cap comes on top of what was asked for. It halves with each failure until the micro-batch
    that failed no longer fits, and tries the next larger size again after many updates without
    one: what used the memory may have gone. It is saved with every checkpoint.

    Attributes:
        asked: What the user asked for; None for no number.
        tuner: Finds the fastest one while training; None unless "auto" was asked for.
        turns: Compares trees with rows, where the budget tunes itself; None otherwise.
        cap: Most tokens that memory turned out to allow, as the planner counts; None for no limit.
        ceiling: What failed first; a cap that has grown back to that is dropped.
        clean_updates: Updates since the last failure or growth.
        patience: Updates to wait before the next try. Doubles whenever a try fails.
        on_trial: The cap has grown since the last failure.
    """

    asked: int | None = None
    tuner: BudgetTuner | None = None
    turns: LayoutTurns | None = None
    cap: int | None = None
    ceiling: int | None = None
    clean_updates: int = 0
    patience: int = 256
    on_trial: bool = False

    def begin(self, asked: int | Literal["auto"] | None) -> None:
        """Begin a run with what the user asks for; the machine may be another one than before."""
        self.asked = None if asked == "auto" else asked
        self.tuner = BudgetTuner() if asked == "auto" else None
        self.turns = LayoutTurns() if asked == "auto" else None

    @property
    def tuned(self) -> int | None:
        """The budget that is being tried, or was settled on; None unless it tunes itself."""
        return None if self.tuner is None else self.tuner.tokens

    @property
    def planned(self) -> int | None:
        """What the loader plans with: never the cap, which ranks of other runs do not know."""
        return self.asked if self.tuner is None else self.tuned

    @property
    def limit(self) -> int | None:
        """The smallest of what is known; None for no limit."""
        return min((n for n in (self.planned, self.cap) if n is not None), default=None)

    def propose(self, cost: int, *, num_rows: int) -> int | None:
        """Halve until a micro-batch of this cost is cut; None if it is a single row.

        Args:
            cost: Tokens of the micro-batch that failed, as the planner counts them.
            num_rows: Its sequences.

        >>> TokenBudget(asked=8192).propose(3000, num_rows=4)
        2048
        >>> TokenBudget().propose(3000, num_rows=4)
        1500
        """
        if num_rows <= 1:
            return None
        cap = self.limit or cost
        while cap >= cost:
            cap //= 2
        return max(cap, 1)

    def shrink_to(self, cap: int, *, cost: int | None = None) -> None:
        """Take a smaller cap, the same on all ranks.

        Args:
            cap: See `propose`.
            cost: Tokens of the micro-batch that failed.
        """
        if self.on_trial:
            self.patience, self.on_trial = self.patience * 2, False
        if self.ceiling is None:
            self.ceiling = self.planned or cost or cap * 2
        self.cap, self.clean_updates = cap, 0

    def note_success(self) -> None:
        """Count an update that went through; after many, allow twice as much."""
        if self.cap is None:
            return
        self.clean_updates += 1
        if self.clean_updates < self.patience:
            return
        self.cap, self.clean_updates, self.on_trial = self.cap * 2, 0, True
        if self.ceiling is not None and self.cap >= self.ceiling:
            self.cap = self.ceiling = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in _KEPT}}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on with what a checkpoint kept, or without any cap."""
        attributes = (saved or TokenBudget().state())["attributes"]
        for name in _KEPT:
            setattr(self, name, attributes[name])


_KEPT = ("cap", "ceiling", "clean_updates", "patience", "on_trial")
