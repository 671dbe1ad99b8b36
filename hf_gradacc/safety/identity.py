"""Which run a folder, a checkpoint or a log row belongs to.

A run has an id, drawn when it begins and kept by everything it writes, and a digest of what decides
its result: arguments, updates, model and versions. A run that goes on from a checkpoint keeps its
id. If the folder holds later checkpoints of that id, they are another branch: then a new id is
drawn, and the lineage says how far the old one is part of the new run.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunIdentity", "as_number", "differing", "digest_of", "go_on"]

UNNAMED = ""
"""Stands for checkpoints that name no run, as the stock Trainer writes them."""


@dataclass(frozen=True)
class RunIdentity:
    """The id of a run, and the runs it went on from.

    Attributes:
        id: Eight characters, drawn at random.
        lineage: For each run it went on from, the last update that is part of this one.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    lineage: Mapping[str, int] = field(default_factory=dict)

    def owns(self, run: str | None, step: int) -> bool:
        """Return whether a checkpoint is one of this run.

        >>> mine = RunIdentity("b", {"a": 4})
        >>> mine.owns("b", 9), mine.owns("a", 4), mine.owns("a", 5), mine.owns(None, 1)
        (True, True, False, False)
        """
        return run == self.id or step <= self.lineage.get(run or UNNAMED, -1)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"id": self.id, "lineage": dict(self.lineage)}

    @classmethod
    def of(cls, saved: Any) -> RunIdentity | None:
        """Read what `to_dict` returned; None if it is anything else."""
        if not isinstance(saved, Mapping) or not isinstance(saved.get("id"), str):
            return None
        lineage = saved.get("lineage")
        known = lineage.items() if isinstance(lineage, Mapping) else ()
        return cls(saved["id"], {str(k): v for k, v in known if isinstance(v, int)})


def go_on(
    saved: RunIdentity | None, *, step: int, others: Iterable[tuple[str | None, int]]
) -> RunIdentity:
    """Return the identity of a run that goes on from a checkpoint.

    Args:
        saved: What the checkpoint says; None if it names no run.
        step: Its update.
        others: Run and update of each checkpoint in the folder.

    >>> go_on(RunIdentity("a"), step=4, others=[("a", 2), ("a", 4), ("b", 9)]).id
    'a'
    >>> dict(go_on(RunIdentity("a"), step=4, others=[("a", 12)]).lineage)
    {'a': 4}
    """
    if saved is None:
        return RunIdentity(lineage={UNNAMED: step})
    if not any(run == saved.id and other > step for run, other in others):
        return saved
    lineage = {run: min(last, step) for run, last in saved.lineage.items()}
    return RunIdentity(lineage={**lineage, saved.id: step})


def digest_of(value: Any) -> str:
    """Hash JSON values; of others their text counts.

    >>> digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def as_number(value: Any) -> int:
    """Hash a value to an integer of 63 bits, which ranks can exchange in a vector."""
    return int(digest_of(value), 16) >> 1


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two records of settings say differently: the old value and the new one.

    A setting that only one of them has was added or dropped by another version, and is left out.
    """
    return {
        key: (then[key], now[key])
        for key in now
        if key in then and digest_of(then[key]) != digest_of(now[key])
    }
