"""Scores of answers against those of the rows, and of predicted classes; no model is needed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

__all__ = [
    "class_accuracy",
    "exact_match",
    "final_number",
    "has_same_number",
    "macro_f1",
    "make_scorer",
]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if two texts are the same but for case and blanks, else 0.

    >>> exact_match(" The  Cat\\n", "the cat"), exact_match("-5", "5")
    (1.0, 0.0)
    """
    return float(_plain(answer) == _plain(expected))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def final_number(text: str) -> Decimal | None:
    """Find the number that an answer ends with: the first behind its last ``####``, or its last.

    GSM8K writes `#### 42`. Commas between digits are left out.

    >>> final_number("6 * 7 = 42, so\\n#### 1,042.0"), final_number("It is 7, or 8.")
    (Decimal('1042.0'), Decimal('8'))
    """
    before, mark, behind = text.rpartition("####")
    found = _NUMBER.findall(behind if mark else text)
    if not found:
        return final_number(before) if mark and before else None
    return Decimal((found[0] if mark else found[-1]).replace(",", ""))


def has_same_number(answer: str, expected: str) -> float:
    """Return 1 if two answers end with the same number, else 0.

    >>> has_same_number("So it is $42.", "40 + 2 = 42\\n#### 42"), has_same_number("", "#### 1")
    (1.0, 0.0)
    """
    number = final_number(answer)
    return float(number is not None and number == final_number(expected))


Scorer = Callable[[str, str], dict[str, float]]
"""From an answer and the row's own to the score of each metric."""


def make_scorer(metrics: Sequence[str]) -> Scorer:
    """Make what scores one answer against that of its row.

    Args:
        metrics: Of `exact_match`, `final_number` and `rouge`; the latter needs rouge_score, and
            gives the F-measures of ROUGE-1, 2 and L, words stemmed.

    Returns:
        A function of the answer and of the expected one.
    """
    rouge: Any = None
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def score(answer: str, expected: str) -> dict[str, float]:
        found: dict[str, float] = {}
        if "exact_match" in metrics:
            found["exact_match"] = exact_match(answer, expected)
        if "final_number" in metrics:
            found["final_number"] = has_same_number(answer, expected)
        if rouge is not None:
            scores = rouge.score(expected, answer)
            found |= {name: float(one.fmeasure) for name, one in scores.items()}
        return found

    return score


def class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows whose class is predicted.

    Args:
        predicted: Class ids ``[rows]``.
        labels: Class ids ``[rows]``.

    >>> class_accuracy(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
    0.75
    """
    return float((predicted == labels).mean())


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur, each counted alike.

    Args:
        predicted: Class ids ``[rows]``.
        labels: Class ids ``[rows]``.

    >>> round(macro_f1(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])), 4)
    0.7778
    """
    scores = []
    for one in np.union1d(predicted, labels):
        hits = int(((predicted == one) & (labels == one)).sum())
        scores.append(2 * hits / int((predicted == one).sum() + (labels == one).sum()))
    return float(np.mean(scores))
