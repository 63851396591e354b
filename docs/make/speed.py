"""The tables and pictures of the page on speed, from the files in bench/results/speed.

    PYTHONPATH=. python docs/make/speed.py

draws the README's picture, docs/assets/speed-h200.png.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import recorded
from matplotlib.figure import Figure

from bench.speed import report
from bench.speed.pictures import draw_ratios, draw_stages, draw_times

RUNS = ("h200", "h200-shapes")
ROWS = (draw_times, draw_ratios, draw_stages)
MISSING = "\n\nNot in this run: "


def result(device: str) -> Mapping[str, Any]:
    """What was measured on a device."""
    return recorded.result(f"speed/{device}")


def where(device: str) -> str:
    """The device, the versions and the ceiling, in a sentence."""
    found = result(device)
    return (
        f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['dtype']}, {found['date'][:10]}; "
        f"a large matrix product ran at {found['ceiling_tflops']:.0f} TFLOP/s."
    )


def times(device: str) -> str:
    """Whole calls of every case."""
    rows = result(device)["rows"]
    parts = [f"**{case}**\n\n{report.times_table(rows, case)}" for case in measured(device)]
    missing = "; ".join(f"{row['case']} by {row['engine']} ({row['missing']})" for row in rows if "missing" in row)
    told = "".join(f"\n\n\\* {name}: {note}." for note, name in _notes(rows).items())
    return "\n\n".join(parts) + told + (MISSING + missing + "." if missing else "")


def _notes(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The rows that have a note, by their note."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "note" in row:
            found.setdefault(row["note"], []).append(f"{row['engine']} at {row['tokens']:,}")
    return {note: ", ".join(names) for note, names in found.items()}


def stages(device: str) -> str:
    """The stages of every case that was broken down."""
    rows = result(device)["rows"]
    found = [case for case in report.case_names(rows) if report.stage_rows(rows, case)]
    return "\n\n".join(f"**{case}**\n\n{report.stages_table(rows, case)}" for case in found)


def sharing(device: str) -> str:
    """How alike 8 adjacent queries selected, for each case of the run in which that was measured."""
    rows = result(device)["rows"]
    found = {case: report.shared(rows, case) for case in report.case_names(rows)}
    return "; ".join(f"`{case}` {report.in_words(shared)}" for case, shared in found.items() if shared) + "."


def memory(device: str) -> str:
    """What is held and recomputed, and where that was measured."""
    rows = result(f"{device}-recompute")["rows"]
    tables = [report.memory_table(rows, case) for case in report.case_names(rows)]
    return "\n\n".join([*(table for table in tables if table is not None), where(f"{device}-recompute")])


def growth(device: str) -> str:
    """The fitted terms of every case with lengths enough."""
    rows = result(device)["rows"]
    tables = [report.growth_table(rows, case) for case in measured(device)]
    return "\n\n".join(table for table in tables if table is not None)


def measured(device: str) -> list[str]:
    """Cases of which some whole call was timed."""
    rows = result(device)["rows"]
    return [case for case in report.case_names(rows) if report.whole(rows, case)]


def picture(device: str) -> Figure:
    """The first case: times, ratios and stages downwards, forward on the left and backward on the right."""
    rows, broken_down = (result(name)["rows"] for name in (device, f"{device}-shapes"))
    sheet = Figure(figsize=(8.5, 9.5), layout="constrained")
    for line, draw in zip(sheet.subplots(3, 2), ROWS, strict=True):
        for axes, direction in zip(line, report.DIRECTIONS, strict=True):
            draw(axes, broken_down if draw is draw_stages else rows, measured(device)[0], direction)
    for axes in sheet.axes[2:4]:
        axes.set(ylabel="dense attention's time / time")
    for axes in sheet.axes[-2:]:
        axes.set(xlabel="tokens", ylabel="share of the stages' time")
    return sheet


def overview(device: str) -> Figure:
    """Ratios of the first case for the README, forward on the left and backward on the right."""
    rows = result(device)["rows"]
    sheet = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, direction in zip(sheet.subplots(1, 2), report.DIRECTIONS, strict=True):
        draw_ratios(axes, rows, measured(device)[0], direction)
        axes.set(ylabel="dense attention's time / time")
    return sheet


DETAILS = (("sharing", sharing), ("memory", memory))
TABLES: Mapping[str, Callable[[], str]] = {
    f"speed {name} {device}": (lambda make=make, device=device: make(device))
    for name, make in (("where", where), ("times", times), ("stages", stages), ("growth", growth), *DETAILS)
    for device in RUNS
}
PICTURES: Mapping[str, Callable[[], Figure]] = {"speed-h200": lambda: picture("h200")}

if __name__ == "__main__":
    overview("h200").savefig(recorded.RESULTS.parents[1] / "docs/assets/speed-h200.png", dpi=110)
