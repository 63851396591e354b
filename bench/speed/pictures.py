"""A run as pictures: time over length, ratio against dense attention, and the stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.speed.report import DIRECTIONS, Row, case_names, ratio, stage_rows, whole

COLOURS = {
    "flexnsa": "#c1121f",
    "flexnsa-eager": "#e76f51",
    "flexnsa-recompute-window": "#9c6644",
    "flexnsa-recompute-both": "#7f5539",
    "flexnsa-composed": "#ff758f",
    "flexnsa-composed-eager": "#ffb3c1",
    "flexnsa-flash": "#6a040f",
    "flexnsa-flash-eager": "#d00000",
    "flexnsa-triton": "#9d0208",
    "flexnsa-triton-eager": "#f3722c",
    "flexnsa-flex": "#f4a261",
    "flexnsa-reference": "#bc8a5f",
    "cudnn": "#3a86ff",
    "fa2": "#457b9d",
    "sdpa": "#3a86ff",
    "flex-dense": "#8d99ae",
    "fla-nsa": "#6a994e",
}
STAGE_COLOURS = {
    "compression": "#ced4da",
    "compressed": "#8264d6",
    "selection": "#f4a261",
    "selected": "#c1121f",
    "window": "#2a9d8f",
    "gates": "#6c757d",
}
DPI = 150


def draw(stem: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write `STEM-CASE.png` for each case with two lengths or more; the paths written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for case in case_names(result["rows"]):
        if len({row["tokens"] for row in whole(result["rows"], case)}) >= 2:
            path = stem.with_name(f"{stem.name}-{case}.png")
            figure(result["rows"], case).savefig(path, dpi=DPI)
            written.append(path)
    return written


def figure(rows: Sequence[Row], case: str) -> Figure:
    """Time, ratio and stages of one case, forward above and backward below."""
    sheet = Figure(figsize=(13, 7), layout="constrained")
    for line, direction in zip(sheet.subplots(2, 3), DIRECTIONS, strict=True):
        draw_times(line[0], rows, case, direction)
        draw_ratios(line[1], rows, case, direction)
        draw_stages(line[2], rows, case, direction)
    sheet.suptitle(case)
    return sheet


def draw_times(axes: Axes, rows: Sequence[Row], case: str, direction: str) -> None:
    """Milliseconds over tokens, both logarithmic, a line for each engine."""
    for engine in dict.fromkeys(row["engine"] for row in whole(rows, case)):
        points = _points(rows, case, engine, direction)
        if points:
            tokens, times = zip(*points, strict=True)
            axes.plot(tokens, times, "o-", ms=3, color=COLOURS.get(engine), label=engine)
    axes.set_yscale("log")
    axes.set(title=direction, ylabel="ms")
    _finish(axes)


def draw_ratios(axes: Axes, rows: Sequence[Row], case: str, direction: str) -> None:
    """Dense attention's time over each engine's: above 1 is faster than dense."""
    for engine in dict.fromkeys(row["engine"] for row in whole(rows, case)):
        found = [(row["tokens"], ratio(rows, row, direction)) for row in whole(rows, case) if row["engine"] == engine]
        points = sorted((tokens, times) for tokens, times in found if times is not None)
        if points:
            tokens, times = zip(*points, strict=True)
            axes.plot(tokens, times, "o-", ms=3, color=COLOURS.get(engine), label=engine)
    axes.axhline(1, color="#adb5bd", lw=1, zorder=0)
    axes.set(title=f"{direction}: times as fast as dense", ylabel="x")
    _finish(axes)


def draw_stages(axes: Axes, rows: Sequence[Row], case: str, direction: str) -> None:
    """Each stage's share of the stages' summed time, stacked."""
    found = [row for row in stage_rows(rows, case) if f"{direction}_ms" in row]
    tokens = sorted({row["tokens"] for row in found})
    totals = [sum(row[f"{direction}_ms"] for row in found if row["tokens"] == t) for t in tokens]
    below = [0.0] * len(tokens)
    for stage in dict.fromkeys(row["stage"] for row in found):
        times = {row["tokens"]: row[f"{direction}_ms"] for row in found if row["stage"] == stage}
        shares = [times.get(t, 0.0) / total for t, total in zip(tokens, totals, strict=True)]
        axes.bar([f"{t:,}" for t in tokens], shares, bottom=below, color=STAGE_COLOURS[stage], label=stage)
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axes.set(title=f"{direction}: where the time goes", ylim=(0, 1))
    axes.tick_params(axis="x", labelrotation=30)
    if found:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(rows: Sequence[Row], case: str, engine: str, direction: str) -> list[tuple[int, float]]:
    own = [row for row in whole(rows, case) if row["engine"] == engine and f"{direction}_ms" in row]
    return sorted((row["tokens"], row[f"{direction}_ms"]) for row in own)


def _finish(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k"))
    axes.set_xlabel("tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
