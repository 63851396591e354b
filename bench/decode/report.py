"""What was measured, in words: a line for each row, and a table for the docs."""

from __future__ import annotations

from typing import Any

from bench.decode.cases import CEILING, CHUNKED, TARGETS

Row = dict[str, Any]


def line(row: Row) -> str:
    """One row as printed while it is measured."""
    place = f"{row['case']:6} {row['tokens']:7} tokens x {row['batch']:<3} {row['engine']:10}"
    if "us" not in row:
        return f"{place} {row['note']}"
    if "bytes" not in row:
        return f"{place} {row['us'] / 1000:9.2f} ms ({row['us_least'] / 1000:.2f} .. {row['us_most'] / 1000:.2f})"
    rate = row["bytes"] / row["us"] * 1e6
    return (
        f"{place} {row['us']:9.1f} us ({row['us_least']:.1f} .. {row['us_most']:.1f})  "
        f"{row['bytes'] / 1e6:7.1f} MB of K and V at {rate / 1e12:.2f} TB/s, {rate / CEILING:.0%} of the ceiling"
    )


def best_dense(rows: list[Row], case: str, tokens: int) -> Row | None:
    """The fastest dense row of a case."""
    dense = [r for r in rows if (r["case"], r["tokens"]) == (case, tokens) and r["engine"] != "nsa" and "us" in r]
    return min(dense, key=lambda row: row["us"], default=None)


def ratios(rows: list[Row]) -> list[tuple[Row, Row, float, float | None]]:
    """(our row, the best dense row, its time over ours, the target) of each case."""
    found = []
    for row in rows:
        dense = best_dense(rows, row["case"], row["tokens"])
        if row["engine"] == "nsa" and "us" in row and dense is not None:
            target = TARGETS.get((row["case"], row["tokens"]))
            found.append((row, dense, dense["us"] / row["us"], target))
    return found


def chunked(rows: list[Row]) -> tuple[Row, float] | None:
    """The row of a prompt in chunks, and its time over that of one call; None where either was not measured."""
    found = {row["engine"]: row for row in rows if row["case"] == "prefill" and "us" in row}
    if found.keys() != {"whole", "chunks"}:
        return None
    return found["chunks"], found["chunks"]["us"] / found["whole"]["us"]


def summary(rows: list[Row]) -> str:
    """A line for each case: how much faster than the best dense step, beside what the bytes allow and the target."""
    lines = []
    for row, dense, ratio, target in ratios(rows):
        aim = "" if target is None else f", target {target:.1f}"
        lines.append(
            f"{row['case']:6} {row['tokens']:7} tokens: {ratio:.2f} times {dense['engine']} "
            f"(the bytes allow {dense['bytes'] / row['bytes']:.1f}{aim})"
        )
    prompt = chunked(rows)
    if prompt is not None:
        row, ratio = prompt
        lines.append(
            f"prefill {row['tokens']:6} tokens in calls of {row['chunk']}: {ratio:.2f} times one call "
            f"(target {CHUNKED:.2f} at most)"
        )
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """The same as Markdown."""
    lines = ["| sequences x tokens | NSA, µs | share of the ceiling | best dense, µs | times faster | bytes allow |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row, dense, ratio, _ in ratios(rows):
        share = row["bytes"] / row["us"] * 1e6 / CEILING
        lines.append(
            f"| {row['batch']} x {row['tokens'] // 1024}k | {row['us']:.0f} | {share:.0%} | "
            f"{dense['us']:.0f} ({dense['engine']}) | {ratio:.1f} | {dense['bytes'] / row['bytes']:.1f} |"
        )
    return "\n".join(lines)
