"""A finished run as text: times and ratios, the stages, and how the cost grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.speed.cases import CASES, Case
from bench.speed.cost import Fit, costs, fit
from bench.speed.engines import DENSE

Row = Mapping[str, Any]
DIRECTIONS = ("forward", "backward")


def report(result: Mapping[str, Any]) -> str:
    """Everything that a run has to say."""
    rows = result["rows"]
    head = (
        f"{result['status']} on {result['device']}, torch {result['torch']}, triton {result['triton']}, "
        f"{result['dtype']}; a matrix product runs at {result['ceiling_tflops']} TFLOP/s"
    )
    parts = [head]
    for case in case_names(rows):
        parts += [f"\n{case}", times_table(rows, case), *_detail_lines(rows, case), *_growth_lines(rows, case)]
    missing = {(row["engine"], row["missing"]) for row in rows if "missing" in row}
    parts += [f"{engine}: {why}" for engine, why in sorted(missing)]
    return "\n".join(parts)


def case_names(rows: Sequence[Row]) -> list[str]:
    """Cases in the order in which they were measured."""
    return list(dict.fromkeys(row["case"] for row in rows))


def whole(rows: Iterable[Row], case: str) -> list[Row]:
    """The rows of whole calls of a case that hold times."""
    return [row for row in rows if row["case"] == case and row["stage"] == "whole" and "forward_ms" in row]


def dense_time(rows: Sequence[Row], case: str, tokens: int, direction: str) -> tuple[str, float] | None:
    """Dense attention's engine and time at a length, None where it was not measured."""
    for engine in DENSE:
        for row in whole(rows, case):
            if row["engine"] == engine and row["tokens"] == tokens and f"{direction}_ms" in row:
                return engine, row[f"{direction}_ms"]
    return None


def ratio(rows: Sequence[Row], row: Row, direction: str) -> float | None:
    """Dense attention's time over this row's; both directions together for "both"."""
    total, own = 0.0, 0.0
    for part in DIRECTIONS if direction == "both" else (direction,):
        found = dense_time(rows, row["case"], row["tokens"], part)
        if found is None or f"{part}_ms" not in row:
            return None
        total, own = total + found[1], own + row[f"{part}_ms"]
    return total / own


def times_table(rows: Sequence[Row], case: str) -> str:
    """Times, ratios against dense attention, memory, and rates of the whole calls, as Markdown."""
    lines = [
        "| engine | tokens | forward ms | backward ms | x forward | x backward | x both | held GiB | peak GiB "
        "| of the ceiling |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(whole(rows, case), key=lambda row: row["tokens"]):
        ratios = [_number(ratio(rows, row, direction), ".2f") for direction in (*DIRECTIONS, "both")]
        shares = " / ".join(_number(row.get(f"{direction}_share_of_ceiling"), ".0%") for direction in DIRECTIONS)
        times = [_timing(row, direction) for direction in DIRECTIONS]
        memory = [_number(row.get(f"{name}_gib"), ".1f") for name in ("held", "peak")]
        cells = [row["engine"], f"{row['tokens']:,}", *times, *ratios, *memory, shares]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _timing(row: Row, direction: str) -> str:
    if f"{direction}_ms" not in row:
        return ""
    time = _short(row[f"{direction}_ms"])
    if f"{direction}_range_ms" not in row:  # the difference of two times, or of too few runs
        return time
    low, high = row[f"{direction}_range_ms"]
    return f"{time} ({_short(low)} to {_short(high)})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def stage_rows(rows: Iterable[Row], case: str) -> list[Row]:
    """The rows of single stages of a case that hold times."""
    return [row for row in rows if row["case"] == case and row["stage"] != "whole" and "forward_ms" in row]


def stages_table(rows: Sequence[Row], case: str) -> str:
    """Milliseconds of each stage at each length, forward and backward, as Markdown."""
    found = stage_rows(rows, case)
    tokens = sorted({row["tokens"] for row in found})
    lines = ["| stage, forward / backward ms | " + " | ".join(f"{t:,}" for t in tokens) + " |"]
    lines.append("|---|" + "--:|" * len(tokens))
    for stage in dict.fromkeys(row["stage"] for row in found):
        by_length = {row["tokens"]: row for row in found if row["stage"] == stage}
        cells = [
            f"{by_length[t]['forward_ms']:.3g} / {_number(by_length[t].get('backward_ms'), '.3g') or '-'}"
            if t in by_length
            else ""
            for t in tokens
        ]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _detail_lines(rows: Sequence[Row], case: str) -> Iterator[str]:
    if stage_rows(rows, case):
        yield stages_table(rows, case)
    memory = memory_table(rows, case)
    if memory is not None:
        yield memory
    if shared(rows, case):
        yield f"8 adjacent queries share {in_words(shared(rows, case))}"


def memory_table(rows: Sequence[Row], case: str) -> str | None:
    """What is kept for the backward, with and without recomputing, and what that costs; None where not measured."""
    found = [row for row in whole(rows, case) if row.get("held_gib") is not None]
    found = [row for row in found if row["engine"].startswith("flexnsa") or row["engine"] in DENSE]
    lengths = {row["tokens"] for row in found if "recompute" in row["engine"]}
    lines = [
        "| engine | tokens | held GiB | peak GiB | forward + backward ms |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in sorted((row for row in found if row["tokens"] in lengths), key=lambda row: row["tokens"]):
        both = row["forward_ms"] + row["backward_ms"]
        lines.append(
            f"| {row['engine']} | {row['tokens']:,} | {row['held_gib']:.2f} | {row['peak_gib']:.2f} | {_short(both)} |"
        )
    return "\n".join(lines) if lengths else None


def shared(rows: Sequence[Row], case: str) -> dict[int, float]:
    """Selected blocks that 8 adjacent queries share, by length."""
    return {row["tokens"]: row["shared_blocks"] for row in whole(rows, case) if "shared_blocks" in row}


def in_words(shared: Mapping[int, float]) -> str:
    """Shared blocks by length, short."""
    return ", ".join(f"{blocks:.1f} at {tokens:,} tokens" for tokens, blocks in sorted(shared.items()))


def growth_table(rows: Sequence[Row], case: str) -> str | None:
    """Fitted linear and quadratic terms beside what arithmetic says; None for fewer than three lengths."""
    known = CASES.get(case)
    if known is None:
        return None
    lines = [
        "| forward | linear, us a token | quadratic, ps a pair of tokens | of dense's | by FLOPs | quadratic, longest "
        "| by FLOPs | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    fits = {name: _Fitted.to(found) for name, found in _lengths(rows, case).items() if len(found) >= 3}
    dense = next((fits[name].terms.quadratic for name in DENSE if name in fits), None)
    lines += [_growth(known, name, found, dense) for name, found in fits.items()]
    return "\n".join(lines) if len(lines) > 2 else None


def _lengths(rows: Sequence[Row], case: str) -> dict[str, dict[int, float]]:
    """Forward times by length of dense attention, whole NSA and each stage."""
    found: dict[str, dict[int, float]] = {}
    for row in [*whole(rows, case), *stage_rows(rows, case)]:
        if row["engine"].startswith("flexnsa") or row["engine"] in DENSE:
            name = row["engine"] if row["stage"] == "whole" else row["stage"]
            found.setdefault(name, {})[row["tokens"]] = row["forward_ms"]
    return found


class _Fitted(NamedTuple):
    terms: Fit
    longest: int

    @classmethod
    def to(cls, times: Mapping[int, float]) -> _Fitted:
        tokens = sorted(times)
        return cls(fit(tokens, [times[t] for t in tokens]), tokens[-1])


def _growth(case: Case, name: str, found: _Fitted, dense: float | None) -> str:
    terms, longest = found
    known = costs(case)
    predicted = known.get("dense" if name in DENSE else "whole" if name.startswith("flexnsa") else name)
    cells = [f"{1e3 * terms.linear:.3g}", f"{1e9 * terms.quadratic:.3g}"]
    cells += [f"{terms.quadratic / dense:.3f}" if dense else ""]
    cells += [f"{predicted.quadratic / known['dense'].quadratic:.3f}" if predicted else ""]
    cells += [f"{terms.quadratic_share(longest):.0%}"]
    cells += [f"{predicted.quadratic_share(longest):.0%}" if predicted else "", f"{terms.error:.0%}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def _growth_lines(rows: Sequence[Row], case: str) -> Iterator[str]:
    table = growth_table(rows, case)
    if table is not None:
        yield table


def _short(number: float) -> str:
    """Three digits, and never an exponent."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
