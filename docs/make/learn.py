"""The table of the demo's models, from what ``python -m bench learn`` recorded."""

import json
from pathlib import Path

RESULT = Path(__file__).parents[2] / "bench/results/learn/text-cpu-seed0.json"


def table() -> str:
    """A row for each model, and where it was trained."""
    found = json.loads(RESULT.read_text())
    rows = ["| attention | validation, bits a byte | bytes seen | parameters |", "|---|--:|--:|--:|"]
    rows += [
        f"| {row['attention']} | {row['bits_per_token']:.3f} | {row['tokens']:,} | {row['parameters']:,} |"
        for row in found["rows"]
    ]
    seconds = sum(row["seconds"] for row in found["rows"])
    where = f"{found['device']}, torch {found['torch']}, {found['date'][:10]}, seed {found['seed']}"
    return "\n".join(rows) + f"\n\n{where}; {seconds:.0f} seconds of training in all."
