"""Files that the other tool's file names: JSON, read as they are."""

from __future__ import annotations

import json
from typing import Any

from hf_gradacc.elsewhere.shared import Places
from hf_gradacc.errors import ConfigError

__all__ = ["read_file"]


def read_file(places: Places, path: str) -> dict[str, Any] | None:
    """Read a JSON file of options; None if it is not there.

    Raises:
        ConfigError: If it is there and holds no JSON object.
    """
    place = places.find(path)
    if place is None or not place.is_file():
        return None
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place} cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{place} holds no JSON object.")
    return found
