"""The table of training steps of a whole model, from what ``python -m bench model`` recorded."""

import json
from pathlib import Path

from bench.model import report

RESULT = Path(__file__).parents[2] / "bench/results/model/h200.json"


def table() -> str:
    """A row for each attention, and where it was measured."""
    found = json.loads(RESULT.read_text())
    where = f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['date'][:10]}"
    note = f" Note: {found['note']}." if "note" in found else ""
    return f"{report.table(found['rows'])}\n\n{where}.{note}"
