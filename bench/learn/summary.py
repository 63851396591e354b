"""A run's result in short: what is kept in the repository, and what pages are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.learn.pictures import by_position

CURVE = 120
"""Points of a training curve."""


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with curves instead of a number for each step, and ranges of positions instead of each."""
    if "rows" not in result:
        return dict(result)
    return dict(result) | {"rows": [_row(row) for row in result["rows"]]}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    long = {"train_bits", "norms", "position_bits", "insights"}
    insights = [dict(insight) for insight in row["insights"]]
    for insight in insights[:-1]:
        del insight["free"]
    return {name: value for name, value in row.items() if name not in long} | {
        "steps": len(row["train_bits"]),
        "train": means(row["train_bits"], CURVE),
        "gradient_norm": spread_of(row["norms"]),
        "by_position": list(zip(*by_position(row["position_bits"]), strict=True)),
        "insights": insights,
    }


def means(values: Sequence[float], points: int) -> list[float]:
    """At most ``points`` means of adjacent values.

    >>> means([1.0, 3.0, 5.0, 7.0, 9.0], 2)
    [3.0, 8.0]
    """
    size = max(1, -(-len(values) // points))
    parts = [values[first : first + size] for first in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def spread_of(norms: Sequence[float]) -> dict[str, float] | None:
    """Median and maximum of the finite ones, and how many are not finite; None without any."""
    finite = sorted(norm for norm in norms if math.isfinite(norm))
    if not finite:
        return None
    return {"median": finite[len(finite) // 2], "max": finite[-1], "not_finite": len(norms) - len(finite)}
