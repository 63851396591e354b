"""The table of the tests that were run on a GPU, from bench/results/gpu-tests.json."""

import recorded


def table() -> str:
    """A row for each run, failures and what was not reached included."""
    found = recorded.result("gpu-tests")
    rows = ["| run | passed | failed | not reached | |", "|---|--:|--:|--:|---|"]
    rows += [
        f"| {_lines(row['tests'])} | {row['passed']} | {row['failed']} | {row['not_reached']} | {row.get('note', '')} |"
        for row in found["rows"]
    ]
    return "\n".join(rows) + f"\n\n{recorded.where(found)}, commit {found['commit']}."


def _lines(tests: str) -> str:
    """A file on each line, since a column is no wider than its longest word."""
    return "<br>".join(f"`{word.removeprefix('tests/')}`" for word in tests.split())
