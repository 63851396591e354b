"""The tables and pictures of the page on speed, from bench/results/speed/h200.json.

    PYTHONPATH=. python docs/make/speed.py

draws the README's picture, docs/assets/speed-h200.png.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import recorded
from matplotlib.figure import Figure

from bench.speed import report
from bench.speed.cases import CASES
from bench.speed.pictures import draw_ratios, draw_stages, draw_times
from flexnsa.engines import FLASH_HEAD_DIMS

ROWS = (draw_times, draw_ratios, draw_stages)
MISSING = "\n\nNot in this run: "
WITH, WITHOUT, COMPILED = "flexnsa-eager", "flexnsa-triton-eager", "flexnsa"
SHOWN = (WITH, COMPILED, WITHOUT, "cudnn", "fa2", "fla-nsa", "flex-dense")
"""Engines in the pictures."""


def result() -> Mapping[str, Any]:
    """The run on record."""
    return recorded.result("speed/h200")


def where() -> str:
    """The device, the versions and the ceiling, in a sentence."""
    found = result()
    return (
        f"{recorded.where(found)}, flash-attn-4 {found['flash-attn-4']}, {found['dtype']}; "
        f"a large matrix product ran at {found['ceiling_tflops']:.0f} TFLOP/s."
    )


def times() -> str:
    """Whole calls of every case."""
    rows = result()["rows"]
    parts = [f"**{case}**\n\n{report.times_table(rows, case)}" for case in measured()]
    missing = "; ".join(f"{row['case']} by {row['engine']} ({row['missing']})" for row in rows if "missing" in row)
    return "\n\n".join(parts) + (MISSING + missing + "." if missing else "")


def again() -> str:
    """Ratios against dense attention of the run after, case by case, the compiled function's where it was timed."""
    rows = recorded.result("speed/h200-again")["rows"]
    found = []
    for case in report.case_names(rows):
        for tokens, by_engine in _by_length(rows, case):
            row = by_engine.get(COMPILED) or by_engine[WITH]
            both = [report.ratio(rows, row, direction) for direction in report.DIRECTIONS]
            if None not in both:
                ratios = " and ".join(f"{x:.2f}" for x in both)
                found.append(f"{ratios} at {tokens:,} tokens (`{row['engine']}`, `{case}`)")
    return "; ".join(found) + "."


def _by_length(rows: Sequence[report.Row], case: str) -> list[tuple[int, dict[str, report.Row]]]:
    """The rows of a case's whole calls: for each length, by their engine."""
    found: dict[int, dict[str, report.Row]] = {}
    for row in report.whole(rows, case):
        found.setdefault(row["tokens"], {})[row["engine"]] = row
    return sorted(found.items())


def stages() -> str:
    """The stages of every case that was broken down."""
    rows = result()["rows"]
    found = [case for case in report.case_names(rows) if report.stage_rows(rows, case)]
    return "\n\n".join(f"**{case}**\n\n{report.stages_table(rows, case)}" for case in found)


def sharing() -> str:
    """How alike 8 adjacent queries selected, for each case in which that was measured."""
    rows = result()["rows"]
    found = {case: report.shared(rows, case) for case in report.case_names(rows)}
    return "; ".join(f"`{case}` {report.in_words(shared)}" for case, shared in found.items() if shared) + "."


def memory() -> str:
    """What is held and recomputed."""
    rows = result()["rows"]
    tables = {case: report.memory_table(rows, case) for case in report.case_names(rows)}
    return "\n\n".join(f"**{case}**\n\n{table}" for case, table in tables.items() if table is not None)


def growth() -> str:
    """The fitted terms of every case with lengths enough."""
    rows = result()["rows"]
    tables = [report.growth_table(rows, case) for case in measured()]
    return "\n\n".join(table for table in tables if table is not None)


def flash() -> str:
    """Whole calls with flash-attn-4's kernels and without them, of the cases that they take."""
    rows = result()["rows"]
    lines = [
        "| case | tokens | with it: ms forward / backward | without | gain | peak GiB with it | without |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in filter(_flash_takes, measured()):
        for tokens, by_engine in _by_length(rows, case):
            if {WITH, WITHOUT} <= by_engine.keys():
                pair = by_engine[WITH], by_engine[WITHOUT]
                times = [f"{row['forward_ms']:.2f} / {row['backward_ms']:.2f}" for row in pair]
                gain = " / ".join(f"{pair[1][key] / pair[0][key]:.2f}" for key in ("forward_ms", "backward_ms"))
                peaks = [f"{row['peak_gib']:.1f}" for row in pair]
                lines.append(f"| {' | '.join((case, f'{tokens:,}', *times, gain, *peaks))} |")
    return "\n".join(lines)


def _flash_takes(case: str) -> bool:
    shape = CASES[case]
    return shape.dim == shape.value_dim and shape.dim in FLASH_HEAD_DIMS and shape.documents == 1


def measured() -> list[str]:
    """Cases of which some whole call was timed."""
    rows = result()["rows"]
    return [case for case in report.case_names(rows) if report.whole(rows, case)]


def shown() -> list[Mapping[str, Any]]:
    """The rows in the pictures."""
    return [row for row in result()["rows"] if row["engine"] in SHOWN]


def picture() -> Figure:
    """The first case: times, ratios and stages downwards, forward on the left and backward on the right."""
    sheet = Figure(figsize=(8.5, 9.5), layout="constrained")
    for line, draw in zip(sheet.subplots(3, 2), ROWS, strict=True):
        for axes, direction in zip(line, report.DIRECTIONS, strict=True):
            draw(axes, shown(), measured()[0], direction)
    for axes in sheet.axes[:2]:
        axes.get_legend().remove()  # the colours are those of the line below
    for axes in sheet.axes[2:4]:
        axes.set(ylabel="dense attention's time / time")
    for axes in sheet.axes[-2:]:
        axes.set(xlabel="tokens", ylabel="share of the stages' time")
    return sheet


def overview() -> Figure:
    """Ratios of the first case for the README, forward on the left and backward on the right."""
    sheet = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, direction in zip(sheet.subplots(1, 2), report.DIRECTIONS, strict=True):
        draw_ratios(axes, shown(), measured()[0], direction)
        axes.set(ylabel="dense attention's time / time")
    return sheet


TABLES: Mapping[str, Callable[[], str]] = {
    f"speed {make.__name__}": make for make in (where, times, again, stages, growth, sharing, memory, flash)
}
PICTURES: Mapping[str, Callable[[], Figure]] = {"speed-h200": picture}

if __name__ == "__main__":
    overview().savefig(recorded.RESULTS.parents[1] / "docs/assets/speed-h200.png", dpi=110)
