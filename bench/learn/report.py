"""A finished comparison as a table to print."""

from collections.abc import Mapping
from typing import Any


def report(result: Mapping[str, Any]) -> str:
    """Validation bits, speed and size of each model, and what each wrote."""
    unit = "bits/byte" if result["task"] == "text" else "bits/token"
    head = f"{'attention':<10} {unit:>10} {'tokens/s':>10} {'tokens':>10} {'parameters':>11}"
    table = [
        f"{row['attention']:<10} {row['bits_per_token']:>10.4f} {row['tokens_per_second']:>10,.0f} "
        f"{row['tokens']:>10,} {row['parameters']:>11,}"
        for row in result["rows"]
    ]
    samples = [
        f"\n--- {row['attention']} continues, {_speed(row)} ---\n{row['continuation']}" for row in result["rows"]
    ]
    where = f"\n{result['status']} on {result['device']}, torch {result['torch']}, seed {result['seed']}\n"
    return "\n".join([where, head, *table, *samples])


def _speed(row: Mapping[str, Any]) -> str:
    return f"{row['written_per_second']:,.0f} tokens/s {'from a cache' if row['cached'] else 'without a cache'}"
