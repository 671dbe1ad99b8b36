"""The result of the parity check, kept beside the run it belongs to.

`hf-gradacc verify` writes it into the recipe's output folder, `record_parity` does for a check of
your own; training then files it with the run's settings, in W&B and in `gradacc_run.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_gradacc.tracking.mfu import count_parameters
from hf_gradacc.tracking.run_files import to_json

__all__ = ["PARITY_NAME", "describe_parity", "read_parity", "record_parity"]

PARITY_NAME = "gradacc_parity.json"


def record_parity(report: Any, *, output_dir: str | Path, model: Any) -> Path:
    """Keep the result of `verify_parity` for the runs in an output directory.

    Args:
        report: The `ParityReport`.
        output_dir: As in the training arguments; made if it is not there.
        model: The model that was checked, adapters included.

    Returns:
        The file written.
    """
    path = Path(output_dir) / PARITY_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    found = asdict(report)
    found.pop("preflight")
    facts = {
        "passed": report.passed,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        **found,
        "checked": _fingerprint(model),
    }
    path.write_text(json.dumps(to_json(facts), indent=2) + "\n", "utf-8")
    return path


def read_parity(output_dir: str | Path, *, model: Any = None) -> dict[str, Any] | None:
    """Return what `record_parity` kept, None if nothing was checked.

    Args:
        output_dir: Of the run.
        model: The model about to be trained, wrapped or not.

    Returns:
        The fields of `ParityReport`, "passed", "date", and "matches_run": whether model class,
        parameters and versions are still those that were checked.
    """
    path = Path(output_dir) / PARITY_NAME
    try:
        facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
        checked = facts.pop("checked")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # never checked, or a file that somebody else wrote
    return {**facts, "matches_run": model is None or checked == _fingerprint(model)}


def describe_parity(parity: dict[str, Any]) -> str:
    """Describe the result in one sentence.

    >>> describe_parity({"passed": True, "date": "2026-11-24 16:00 UTC", "error": 1.2e-7,
    ...     "tolerance": 1e-4, "dtype": "float32", "matches_run": True})
    'passed on 2026-11-24 16:00 UTC, relative error 1.2e-07 (rounding in float32 explains 1e-04)'
    """
    result = "passed" if parity["passed"] else "failed"
    text = f"{result} on {parity['date']}"
    if "nan" not in (parity["error"], parity["tolerance"]):  # as where the loss was refused
        text += (
            f", relative error {parity['error']:.1e} (rounding in {parity['dtype']} explains "
            f"{parity['tolerance']:.0e})"
        )
    return text if parity["matches_run"] else f"{text}; but the model or a version has changed"


def _fingerprint(model: Any) -> dict[str, Any]:
    while hasattr(model, "module"):
        model = model.module
    total, trained = count_parameters(model)
    names = ("hf_gradacc", "torch", "transformers")
    return {
        "class": type(model).__name__,
        "num_parameters": total,
        "num_trainable_parameters": trained,
        "versions": {name: metadata.version(name) for name in names},
    }
