"""Which tests `make test` leaves to `make test-thorough`, and which of the same claim it runs."""

from __future__ import annotations

import re

__all__ = ["is_thorough"]

_CASES = (
    # ZeRO-1 and an offloaded ZeRO-2; ZeRO-2, ZeRO-3 and an offloaded ZeRO-3 stay.
    r"ranks/test_deepspeed\.py::test_(every_update|logs_are|a_resumed)\w*\[1",
    r"ranks/test_deepspeed\.py::test_an_offloaded\w*\[2",
    r"ranks/test_deepspeed\.py::test_mistakes\w*\[.*-[13]\]",
    r"ranks/test_deepspeed\.py::test_weights_do_not_hang\w*\[True",
    # Four ranks; two and three stay.
    r"ranks/test_(tensor|sequence|context)_parallel\.py::\w+\[4",
    r"ranks/test_ranks\.py::\w+\[4",
    # A stop at the end of a pass and in the second, for each form of the data; in the first stays.
    r"trainer/test_position\.py::test_resumed_in_any_pass\w*\[(6|10)-(?!list)",
    # Optimizers of which others stay.
    r"test_equivalence_zoo_weights\.py::test_weights\w*\[bert-qa-",
)
_THOROUGH = re.compile("|".join(_CASES))


def is_thorough(name: str) -> bool:
    """Return whether a test, by its node id, is left to `make test-thorough`."""
    return _THOROUGH.search(name) is not None
