"""What tracking saves with every checkpoint: the W&B run's id, events so far, earlier resumes."""

from __future__ import annotations

from typing import Any

__all__ = ["VERDICT", "keep", "kept"]

STATE_KEY = "TrackingCallback"
"""Our entry in `TrainerState.stateful_callbacks`; `trainer_state.json` carries it."""


VERDICT = "noise_scale_verdict"
"""The event that says whether the batch was too small, right, or larger than useful."""


def keep(state: Any, **attributes: Any) -> None:
    """Save values with every later checkpoint.

    They are written into the state directly, not through `ExportableState`. A checkpoint of the
    stock Trainer lacks our entry, and after resuming from it the next save would fail.
    """
    if isinstance(state.stateful_callbacks, dict):
        entry = state.stateful_callbacks.setdefault(STATE_KEY, {"args": {}, "attributes": {}})
        entry["attributes"].update(attributes)


def kept(state: Any) -> dict[str, Any]:
    """Return the values that `keep` saved; {} in a fresh run."""
    entry = (state.stateful_callbacks or {}).get(STATE_KEY) or {}
    return dict(entry.get("attributes", {})) if isinstance(entry, dict) else {}
