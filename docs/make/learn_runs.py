"""The runs of the page on learning, as ``python -m bench learn-all`` summed them up; any of them may be missing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]

RUNS = Path(__file__).parents[2] / "bench/results/learn/h200"
MISSING = "*Not measured yet: `python -m bench learn-all` on a GPU measures it.*"


def load(name: str) -> Result | None:
    """What one run wrote, None if it was not made."""
    path = RUNS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def runs(begin: str) -> list[Result]:
    """All runs whose names begin so, in order of name, of which some training is on record."""
    found = [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"{begin}*.json"))]
    return [result for result in found if any(row["steps"] for row in result.get("rows", ()))]


def rows(results: Sequence[Result]) -> Iterator[tuple[Result, Row]]:
    """Each model of each run."""
    for result in results:
        for row in result["rows"]:
            yield result, row


def by_attention(results: Sequence[Result]) -> dict[str, list[tuple[Result, Row]]]:
    """The models of the same name, one for each seed."""
    found: dict[str, list[tuple[Result, Row]]] = {}
    for result, row in rows(results):
        found.setdefault(row["attention"], []).append((result, row))
    return found


def seconds_at(row: Row, tokens: float) -> float:
    """Seconds of training until so many tokens were seen, at the run's mean speed."""
    return row["seconds"] * tokens / row["tokens"] if row["tokens"] else 0.0


def curve(row: Row) -> list[tuple[int, float]]:
    """Tokens seen and bits at each validation but the first and, if there are others, the last, of more rows."""
    points = row["validation"][1:]
    return points[:-1] or points


def tokens_until(row: Row, bits: float) -> float | None:
    """Tokens after which the curve reached so few bits, points joined by straight lines; None if it never did."""
    for (before, high), (after, low) in pairwise(row["validation"][:-1]):
        if low <= bits < high:
            return before + (after - before) * (high - bits) / (high - low)
    return None


def sentence_of_budget(results: Sequence[Result]) -> str:
    """Where the runs were made and what they were allowed, and how they ended."""
    first = results[0]
    steps = sorted({row["steps"] for _, row in rows(results)})
    asked = first["config"]["tokens"] // (first["config"]["batch"] * first["config"]["context"])
    ended = sorted({result["status"] for result in results})
    beside = sorted({result.get("beside", 1) for result in results})
    others = " to ".join(str(count) for count in dict.fromkeys((beside[0], beside[-1])))
    counts = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1])))
    return (
        f"{first['device']}, torch {first['torch']}, {first['date'][:10]}: {counts} of {asked:,} planned steps of "
        f"{first['config']['batch'] * first['config']['context']:,} tokens ({', '.join(ended)}), "
        f"{max(result['config']['minutes'] for result in results):.1f} minutes allowed to each process, with "
        f"{others} processes of the plan on the GPU."
    )
