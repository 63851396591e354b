"""The table of a decoding step's time, from what ``python -m bench decode`` recorded."""

from typing import Any

import recorded

from bench.decode import report
from bench.decode.cases import CEILING, LARGE

RESULT = "decode/h200"

DESIGNS = "decode/designs"

CHOSEN = " (chosen)"


def table() -> str:
    """A row for each case: microseconds, and how much faster than dense; then what a prompt in chunks costs."""
    rows = recorded.result(RESULT)["rows"]
    return f"{report.table(rows)}\n{_chunks(rows)}"


def _chunks(rows: list[report.Row]) -> str:
    """What a prompt costs in chunks, in a sentence, where it was measured."""
    found = report.chunked(rows)
    if found is None:
        return ""
    row, ratio = found
    return (
        f"\nA prompt of {row['tokens']:,} tokens through a layer of width {row['dim']:,} with a cache takes "
        f"{row['us'] / 1000:.1f} ms in eager calls of {row['chunk']:,}, {ratio:.2f} times what one call takes.\n"
    )


def where() -> str:
    """The device, the versions and the date, in a sentence."""
    return f"{recorded.where(recorded.result(RESULT))}."


def designs() -> str:
    """Every division of one sequence's step that was timed, the fastest of the longest sequence first.

    Those of later runs are in italics.
    """
    rows, lengths = _by_design()
    lines = ["| design | " + " | ".join(f"{n // 1024}k, µs | cached" for n in lengths) + " |"]
    lines.append("|---" + "|--:" * 2 * len(lengths) + "|")
    for name, found in sorted(rows.items(), key=lambda item: item[1][lengths[-1]]["us"]):
        later = any("run" in row for row in found.values())
        mark = "**" if name.endswith(CHOSEN) else "*" if later else ""
        cells = [mark + name.removesuffix(CHOSEN) + mark]
        for row in (found[n] for n in lengths):
            cells += [f"{mark}{row['us']:.1f}{mark}", f"{row['in_cache_us']:.1f}" if "in_cache_us" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{recorded.where(recorded.result(DESIGNS))}."


def timeline() -> str:
    """From when to when each part of one sequence's step runs."""
    rows: dict[str, dict[int, Any]] = {}
    for row in recorded.result(DESIGNS)["timeline"]:
        rows.setdefault(row["part"], {})[row["tokens"]] = row
    lengths = sorted({tokens for found in rows.values() for tokens in found})
    lines = ["| one sequence | " + " | ".join(f"{n // 1024}k, µs" for n in lengths) + " |", "|---|--:|--:|"]
    for part, found in rows.items():
        cells = (f"{found[n]['begin_us']:.1f} to {found[n]['end_us']:.1f}" for n in lengths)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bounds() -> str:
    """What the time of one sequence's step goes to, in two sentences."""
    rows, lengths = _by_design()
    tokens = lengths[-1]
    row = next(found for name, found in rows.items() if name.endswith(CHOSEN))[tokens]
    case = next(case for case in LARGE if (case.name, case.tokens) == ("single", tokens))
    least = 1e6 * case.sparse_bytes / CEILING
    return (
        f"At {tokens:,} tokens all keys and values that a step reads take {least:.1f} µs at the ceiling, the step "
        f"{row['us']:.1f} µs, and {row['in_cache_us']:.1f} with everything in the L2 cache already."
    )


def _by_design() -> tuple[dict[str, dict[int, Any]], list[int]]:
    """(design -> tokens -> row, the lengths)."""
    found: dict[str, dict[int, Any]] = {}
    for row in recorded.result(DESIGNS)["rows"]:
        found.setdefault(row["design"], {})[row["tokens"]] = row
    return found, sorted({tokens for rows in found.values() for tokens in rows})
