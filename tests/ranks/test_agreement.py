"""Ranks that would train something else than asked for stop before the first update."""

from __future__ import annotations

from typing import Any

import pytest
from support.agreement_jobs import CASES, begin_differently
from support.ranks import run_ranks

from hf_gradacc.safety.identity import as_number


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What each rank was told, case by case: one pair of processes for all."""
    first, second = run_ranks(begin_differently, 2)
    assert first.keys() == second.keys() == CASES.keys()
    assert {name for name in first if bool(first[name][0]) != bool(second[name][0])} == set()
    return dict(first)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("sharded by the user", "DataError", "trained twice or never"),
        ("one rank has fewer rows", "DataError", "num_sequences: 12 on rank 0, 11 on rank 1"),
        ("shuffled by each rank", "DataError", "updates.fingerprint"),
        ("a subset by rank", "DataError", "updates.fingerprint"),
        ("another seed", "ConfigError", "updates.seed: 42 on rank 0, 43 on rank 1"),
        ("another learning rate", "ConfigError", "learning_rate: 0.1 on rank 0, 0.2 on rank 1"),
        ("another width", "ConfigError", "model.layout"),
        ("other layers trained", "ConfigError", "model.trained"),
    ],
)
def test_a_disagreement_is_refused_by_field_rank_and_value(told, case, kind, words):
    error, text, updates = told[case]
    assert error == kind
    assert words in text
    assert updates == 0, "before the first update"


@pytest.mark.parametrize("case", ["nothing", "other weights", "a seed that decides no membership"])
def test_what_trains_the_same_is_let_through(told, case):
    error, _, updates = told[case]
    assert (error, updates) == ("", 1)


def test_numbers_stand_for_values_and_not_for_objects():
    assert as_number({"a": [1, 2]}) == as_number({"a": [1, 2]}) != as_number({"a": [2, 1]})
    assert 0 <= as_number(None) < 2**63
