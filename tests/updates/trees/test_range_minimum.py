"""The least of a run of numbers is the least of them."""

import numpy as np
import pytest

from hf_gradacc.updates.trees.range_minimum import RangeMinimum


@pytest.mark.parametrize("count", [1, 2, 3, 8, 33])
def test_the_least_of_every_run_is_found(count):
    values = np.random.default_rng(count).integers(-9, 9, count)
    runs = [(a, b) for a in range(count) for b in range(a + 1, count + 1)]
    expected = [min(values[a:b]) for a, b in runs]
    least = RangeMinimum(values)
    assert [least(a, b) for a, b in runs] == expected
    assert least.of_each(*np.array(runs).T).tolist() == expected


def test_no_runs_have_no_least():
    none = np.zeros(0, dtype=np.int64)
    assert RangeMinimum(none).of_each(none, none).tolist() == []
