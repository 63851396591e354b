"""The table of a decoding step's time, from what ``python -m bench decode`` recorded."""

import json
from pathlib import Path

from bench.decode import report

RESULT = Path(__file__).parents[2] / "bench/results/decode/h200.json"


def table() -> str:
    """A row for each case: microseconds, and how much faster than dense."""
    return report.table(json.loads(RESULT.read_text())["rows"])


def where() -> str:
    """The device, the versions and the date, in a sentence."""
    found = json.loads(RESULT.read_text())
    return f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['date'][:10]}."
