"""A finished comparison as a table to print."""

from collections.abc import Mapping
from typing import Any


def report(result: Mapping[str, Any]) -> str:
    """Validation bits, accuracy, speed and size of each model, and what each wrote."""
    bits = f"bits/{result['unit']}"
    head = f"{'attention':<17} {bits:>11} {'accuracy':>8} {'tokens/s':>10} {'tokens':>11} {'parameters':>11}"
    table = [
        f"{row['attention']:<17} {row['bits_per_token']:>11.4f} {row['accuracy'][-1][1]:>8.3f} "
        f"{row['tokens_per_second']:>10,.0f} {row['tokens']:>11,} {row['parameters']:>11,}"
        for row in result["rows"]
    ]
    samples = [
        f"\n--- {row['attention']} continues, {_speed(row)} ---\n{row['continuation']}"
        for row in result["rows"]
        if row["continuation"] is not None
    ]
    seen = _answers_seen(result)
    where = f"\n{result['status']} on {result['device']}, torch {result['torch']}, seed {result['seed']}\n"
    return "\n".join([where, head, *table, *seen, *samples])


def _answers_seen(result: Mapping[str, Any]) -> list[str]:
    """How many answers lie in selected blocks, of each NSA and of a selector that fills its free slots blindly."""
    if result["random_hits"] is None:
        return []
    lines = [f"\nanswers in a selected block: {result['random_hits']:.3f} where free slots are filled at random"]
    for row in result["rows"]:
        if row["insights"]:
            layers = ", ".join(f"{hits:.3f}" for hits in row["insights"][-1]["hits"])
            lines.append(f"  {row['attention']}, layer by layer: {layers}")
    return lines


def _speed(row: Mapping[str, Any]) -> str:
    return f"{row['written_per_second']:,.0f} tokens/s {'from a cache' if row['cached'] else 'without a cache'}"
