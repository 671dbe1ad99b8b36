"""The speed table of a page of results, and which goals it meets. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["goals", "speed_section"]

Figures = Mapping[str, Any]

COLUMNS = {
    "s/update": ".3f",
    "tokens/s": ",.0f",
    "mfu": ".1%",
    "peak GiB": ".1f",
    "padding": ".1%",
    "micro-batches": ".1f",
    "kernels": ",.0f",
    "waits": ",.0f",
    "graphs": ",.0f",
    "attention": "",
}
PACKED, RANDOM, REBALANCE, DENSE = "ours-packed", "stock-random", "stock-rebalance", "dense-bound"


def speed_section(figures: Mapping[str, Figures]) -> str:
    """Render the speed table of each kind of rows; empty if nothing was timed.

    Args:
        figures: Of the checks that passed, by their names.
    """
    kinds: dict[str, dict[str, Figures]] = {}
    for check, found in figures.items():
        area, _, rest = check.partition("/")
        if area == "speed" and "s/update" in found:
            rows, _, variant = rest.partition("/")
            kinds.setdefault(rows, {})[variant] = found
    parts = []
    for rows, variants in kinds.items():
        columns = [c for c in COLUMNS if any(c in found for found in variants.values())]
        lines = ["| variant | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for variant, found in sorted(variants.items(), key=lambda item: item[1]["s/update"]):
            cells = [_cell(found.get(column), COLUMNS[column]) for column in columns]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        parts += [f"## Speed on {rows}", "\n".join(lines)]
        if told := goals(variants):
            parts.append("\n".join(f"- {line}" for line in told))
    return "\n\n".join(parts)


def goals(variants: Mapping[str, Figures]) -> list[str]:
    """Say of each goal whether it is met; those whose figures are missing are left out.

    >>> fast, slow = {"s/update": 0.1, "mfu": 0.5}, {"s/update": 0.15, "mfu": 0.3}
    >>> goals({"ours-packed": fast, "stock-rebalance-8": slow})[0]
    'packed is 1.50 times as fast as the best batch_rebalance (goal: 1.3): met'
    """
    seconds = {name: found["s/update"] for name, found in variants.items()}
    told = []
    packed = seconds.get(PACKED)
    rebalanced = [value for name, value in seconds.items() if name.startswith(REBALANCE)]
    if packed is not None:
        if rebalanced:
            told.append(
                _goal("packed is {:.2f} times as fast as the best batch_rebalance", 1.3)(
                    min(rebalanced) / packed
                )
            )
        if RANDOM in seconds:
            told.append(
                _goal("packed is {:.2f} times as fast as random", 2.0)(seconds[RANDOM] / packed)
            )
        if DENSE in seconds:
            told.append(
                _goal("packed runs at {:.2f} of the dense bound", 0.85)(seconds[DENSE] / packed)
            )
    mfu = {name: found["mfu"] for name, found in variants.items() if "mfu" in found}
    ours = [value for name, value in mfu.items() if name.startswith("ours")]
    peers = [value for name, value in mfu.items() if name.startswith(("stock", "trl"))]
    if ours and peers:
        verdict = "met" if max(ours) > max(peers) else "missed"
        told.append(
            f"MFU {max(ours):.1%}, of the best peer {max(peers):.1%} (goal: above it): {verdict}"
        )
    return told


def _goal(text: str, least: float) -> Any:
    def judge(value: float) -> str:
        verdict = "met" if value >= least else "missed"
        return f"{text.format(value)} (goal: {least:g}): {verdict}"

    return judge


def _cell(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)
