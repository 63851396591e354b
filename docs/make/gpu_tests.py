"""The table of the tests that were run on a GPU, from bench/results/gpu-tests.json."""

import json
from pathlib import Path

RESULT = Path(__file__).parents[2] / "bench/results/gpu-tests.json"


def table() -> str:
    """A row for each run, failures and what was not reached included."""
    found = json.loads(RESULT.read_text())
    rows = ["| run | passed | failed | not reached | |", "|---|--:|--:|--:|---|"]
    rows += [
        f"| {_lines(row['tests'])} | {row['passed']} | {row['failed']} | {row['not_reached']} | {row.get('note', '')} |"
        for row in found["rows"]
    ]
    where = f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['date']}"
    return "\n".join(rows) + f"\n\n{where}, commit {found['commit']}."


def _lines(tests: str) -> str:
    """A file on each line, since a column is no wider than its longest word."""
    return "<br>".join(f"`{word.removeprefix('tests/')}`" for word in tests.split())
