"""What preparing rows did to them, in lines: what was cut, left out, or not read as written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from transformers.utils import logging

from hf_gradacc.data.section import DataSection
from hf_gradacc.errors import DataError
from hf_gradacc.text import printable

__all__ = ["NOTES", "Fate", "LengthReport", "StreamReport", "explain_nothing_left", "write_notes"]

logger = logging.get_logger(__name__)


class Fate(IntEnum):
    """What became of a row."""

    KEPT = 0
    TRUNCATED = 1
    TOO_LONG = 2
    NO_TARGET = 3
    UNUSABLE = 4

    @property
    def is_left_out(self) -> bool:
        """Whether training does not see the row."""
        return self > Fate.TRUNCATED


_FATES = {
    Fate.TRUNCATED: "truncated to max_length",
    Fate.TOO_LONG: "dropped as longer than max_length",
    Fate.NO_TARGET: "dropped as having no target",
    Fate.UNUSABLE: "dropped as unusable",
}

NOTES: dict[str, str] = {
    "split": (
        "{n} more sequences than rows: the chat template writes earlier turns otherwise than it "
        "prompts for them, so each is learned behind its own prompt (data.assistant_turns: "
        "together makes one sequence of each conversation)"
    ),
    "split_as_asked": (
        "{n} more sequences than rows: one for each turn (data.assistant_turns: each)"
    ),
    "other_prefix": (
        "{n} turns are learned behind another text than the chat template prompts with, which "
        "generation will not send (data.assistant_turns, data.template_options)"
    ),
    "thought": (
        "{n} thoughts are not learned: the chat template leaves them out, or prompts with an empty "
        "one"
    ),
    "tool call": "{n} turns are not learned: the chat template does not render their tool calls",
    "words": "{n} turns lose words that the chat template does not render",
    "untagged": "{n} turns are not learned: the template's {% generation %} tags leave them out",
    "marked_off": "{n} turns are marked not to be learned, and are not",
    "mark_ignored": (
        "{n} turns of other roles are marked to be learned, and are not: name their roles in "
        "data.roles_to_train"
    ),
    "straddling": (
        "{n} tokens hold the end of a prompt and the beginning of an answer; they count as prompt, "
        "as they do when the model generates"
    ),
    "same_answers": "{n} pairs have the same answer twice, and teach nothing",
    "long_answers": (
        "{n} pairs differ before their last turn: all that follows counts as the answer, turns of "
        "others too, as in TRL"
    ),
    "other_prompt": (
        "{n} prompts are not said in the turns of their answers, and are not read: the turns that "
        "both answers begin with are the prompt"
    ),
}
"""A name for each thing that happens to rows, and the line that tells how often it did."""


def write_notes(notes: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for each thing that happened.

    Args:
        notes: How often each did; names that have no line are left out.

    >>> list(write_notes({"marked_off": 1200, "turns": 5}))
    ['1,200 turns are marked not to be learned, and are not']
    """
    for name, line in NOTES.items():
        if notes.get(name):
            yield line.replace("{n}", f"{notes[name]:,}")


@dataclass(frozen=True)
class LengthReport:
    """What preparing one set of rows did.

    Attributes:
        name: Which set, such as `data.train`.
        num_rows: Rows (documents, for plain text) read.
        num_truncated: Rows cut to `max_length`, and kept.
        num_too_long: Rows left out for their length.
        num_without_target: Rows left out because no token of them would be learned.
        num_sequences: Rows, or blocks of text, that training sees.
        num_tokens: Input tokens in them.
        longest: Tokens in the longest of them; of pairs, in the longest answer with its prompt.
        num_unusable: Rows left out because they cannot be read or rendered.
        first_unusable: Where the first of those is, and what is wrong with it.
        notes: How often each of `NOTES` happened.
        has_pairs: Whether each sequence is a pair of answers.
    """

    name: str
    num_rows: int
    num_truncated: int
    num_too_long: int
    num_without_target: int
    num_sequences: int
    num_tokens: int
    longest: int
    num_unusable: int = 0
    first_unusable: str = ""
    notes: Mapping[str, int] = field(default_factory=dict)
    has_pairs: bool = False

    def __str__(self) -> str:
        kind = "pairs" if self.has_pairs else "sequences"
        parts = [f"{self.name}: {self.num_rows:,} rows -> {self.num_sequences:,} {kind}"]
        # Two answers are as long as a pair; `max_length` is about each of them.
        size = self.num_tokens / max(1, self.num_sequences * (2 if self.has_pairs else 1))
        of = " of an answer" if self.has_pairs else ""
        parts.append(f"{self.num_tokens:,} tokens (mean {size:.0f}{of}, longest {self.longest:,})")
        counts = {
            Fate.TRUNCATED: self.num_truncated,
            Fate.TOO_LONG: self.num_too_long,
            Fate.NO_TARGET: self.num_without_target,
            Fate.UNUSABLE: self.num_unusable,
        }
        lines = [", ".join([*parts, *_write_fates(counts)])]
        if self.first_unusable:
            lines.append(f"the first unusable row: {self.first_unusable}")
        return "\n  ".join([*lines, *write_notes(self.notes)])


def _write_fates(counts: Mapping[Fate, int]) -> Iterator[str]:
    for fate, what in _FATES.items():
        if counts.get(fate):
            yield f"{counts[fate]:,} {what}"


def explain_nothing_left(
    path: str, counts: Mapping[Fate, int], section: DataSection, *, why: str = ""
) -> DataError:
    """Say why no row of a source is left, and what would help that is not set already.

    Args:
        path: The source.
        counts: Rows left out, by reason.
        section: The recipe's `data`.
        why: What is wrong with the first unusable row.
    """
    fixes = []
    if counts.get(Fate.TOO_LONG):
        fixes.append("raise data.max_length, or set data.too_long to truncate")
    if counts.get(Fate.NO_TARGET):
        cut = " (rows cut to data.max_length may have lost theirs)" if section.max_length else ""
        fixes.append(f"check that rows have words to learn{cut}")
    if counts.get(Fate.UNUSABLE):
        fixes.append("set data.unusable to error to see what is wrong with each row in turn")
    reasons = ", ".join(_write_fates(counts))
    first = f" (the first: {why})" if why else ""
    return DataError(f"{path} has no row left: {reasons}{first}: {'; '.join(fixes)}.")


class StreamReport:
    """Counts what a stream leaves out while it is read, and says so, ever more seldom.

    Every rank reads the whole stream; the first one tells.

    Args:
        path: The source.
        section: The recipe's `data`.
    """

    def __init__(self, path: str, section: DataSection) -> None:
        self._path, self._section = path, section
        self._begin()

    def _begin(self) -> None:
        self._counts: Counter[Fate] = Counter()
        self._notes: Counter[str] = Counter()
        self._num_rows = 0
        self._next_line = 1
        self._first_unusable = ""

    def add(
        self, num_rows: int, fates: Iterable[Fate], notes: Mapping[str, int], why: str = ""
    ) -> None:
        """Count some rows that were read; write a line once twice as many have been left out."""
        self._num_rows += num_rows
        self._counts.update(fates)
        self._notes.update(notes)
        self._first_unusable = self._first_unusable or why
        if self._num_told >= self._next_line:
            self._next_line = 2 * self._num_told
            self.tell("so far")

    @property
    def _num_told(self) -> int:
        fates = sum(self._counts[fate] for fate in _FATES)
        return fates + sum(self._notes[name] for name in NOTES)

    def tell(self, until: str) -> None:
        """Write what was left out, if anything was, on the first rank."""
        if not self._num_told or os.environ.get("RANK", "0") != "0":
            return
        lines = [", ".join([f"{self._num_rows:,} rows read {until}", *_write_fates(self._counts)])]
        if self._first_unusable:
            lines.append(f"the first unusable row: {self._first_unusable}")
        told = "\n  ".join([*lines, *write_notes(self._notes)])
        logger.warning(printable(f"{self._path}: {told}"))

    def close(self) -> None:
        """End a pass: tell what it left out.

        Raises:
            DataError: If rows were read, and none is left.
        """
        left = self._counts[Fate.KEPT] + self._counts[Fate.TRUNCATED]
        if self._num_rows and not left:
            why = self._first_unusable
            raise explain_nothing_left(self._path, self._counts, self._section, why=why)
        self.tell("in this pass")
        self._begin()
