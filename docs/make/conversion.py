"""The table of what conversion costs, from what ``measure_conversion.py`` recorded."""

import itertools
import json
from pathlib import Path

HERE = Path(__file__).parent


def table() -> str:
    """Bits per byte of each model, by how many bytes came before."""
    record = json.loads((HERE / "conversion-cpu.json").read_text())
    head = [f"after {low} to {high} bytes" for low, high in itertools.pairwise(record["edges"])]
    rows = [["bits per byte", *head], ["---", *["---:"] * len(head)]]
    rows += [[name, *(f"{value:.3f}" for value in values)] for name, values in record["bits"].items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
