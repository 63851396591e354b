"""The pictures of a run: how the twins learned, what NSA selected, where its branches look, how its gates stand."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bench.learn.look import BRANCHES, Query
from bench.learn.progress import Progress
from flexnsa.inspect import Look, draw_text
from flexnsa.inspect.draw import COLOURS, paint_selection

TWIN_COLOURS = {"nsa": "#c1121f", "full": "#1d3557", "window": "#8d99ae"}
GREY = "#8a8a94"
DPI = 150

Insight = Mapping[str, Any]
"""What ``bench.learn.insight.observe`` returns."""


def draw_losses(path: Path, progress: Mapping[str, Progress], unit: str) -> None:
    """Validation and smoothed training bits over the tokens seen; validation bits by position in the context."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, place = figure.subplots(1, 2)
    for name, twin in progress.items():
        colour = TWIN_COLOURS.get(name)
        tokens, bits = zip(*twin.validation, strict=True)
        curve.plot(tokens, bits, "o-", ms=3, color=colour, label=f"{name}  {twin.bits:.3f}")
        if twin.train_bits:
            seen = np.linspace(0, twin.tokens, len(twin.train_bits) + 1)[1:]
            curve.plot(seen, smoothed(twin.train_bits), color=colour, alpha=0.3, lw=1)
        edges, means = by_position(twin.position_bits)
        place.plot(edges, means, "o-", ms=3, color=colour, label=name)
    lowest = min(twin.bits for twin in progress.values())
    over_tokens(curve)
    curve.set(ylabel=unit, title="validation (points), training (pale)")
    curve.set_ylim(lowest - 0.1, lowest + 2.5)
    place.set(xlabel="position in the context", ylabel=unit, title="validation at the end, by position")
    place.set_xscale("log", base=2)
    for axes in (curve, place):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)


def over_tokens(axes: Axes) -> None:
    """What the horizontal axis counts, in thousands or millions."""
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter())


def smoothed(values: Sequence[float], decay: float = 0.97) -> list[float]:
    """Exponential moving average, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def by_position(bits: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Means over positions [8, 16), [16, 32), [32, 64) ... and their geometric middles, where anything is asked."""
    edges = [8 * 2**i for i in range(16) if 8 * 2**i < len(bits)] + [len(bits)]
    asked = {(a * b) ** 0.5: [x for x in bits[a:b] if x is not None] for a, b in itertools.pairwise(edges)}
    means = {middle: float(np.mean(found)) for middle, found in asked.items() if found}
    return list(means), list(means.values())


def draw_selection(path: Path, looks: Sequence[Look]) -> None:
    """For each KV head (row) and layer (column): the blocks that each query selected, the forced ones paler."""
    layers, heads = len(looks), looks[0].num_kv_heads
    figure = Figure(figsize=(4 * layers + 0.5, 3.6 * heads + 0.3), layout="constrained")
    grid = figure.subplots(heads, layers, squeeze=False, sharex=True, sharey=True)
    for layer, look in enumerate(looks):
        for head in range(heads):
            paint_selection(grid[head, layer], look, head=head)
            grid[head, layer].set_title(f"layer {layer + 1}, KV head {head + 1}", fontsize=9)
    figure.supxlabel("selection block (pale: forced, red: chosen)", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    figure.savefig(path, dpi=DPI)


def draw_query(path: Path, looks: Sequence[Look], query: Query, text: Sequence[str]) -> None:
    """One query in one layer: the text before it, coloured by the attention of each branch and of their gated sum."""
    look = looks[query.layer]
    figure = draw_text(look, text, query.position, head=query.head)
    assert look.config is not None
    figure.suptitle(
        f"Layer {query.layer + 1}, KV head {query.head + 1}: what the byte in the black frame attends to. "
        f"Outlined: its selected blocks of {look.config.select_block} bytes.",
        fontsize=12,
    )
    figure.savefig(path, dpi=DPI)


def draw_gates(path: Path, insights: Sequence[Insight]) -> None:
    """Mean gate of each layer and branch over training."""
    layers = len(insights[0]["gates"])
    figure = Figure(figsize=(3.6 * layers, 3.4), layout="constrained")
    paint_gates(list(figure.subplots(1, layers, sharey=True, squeeze=False).flat), insights)
    figure.savefig(path, dpi=DPI)


def draw_insights(path: Path, insights: Sequence[Insight]) -> None:
    """How far away the freely chosen blocks lie, and the gradients that each branch's parameters get."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    paint_distances(left, insights[-1]["free"])
    paint_gradients(right, insights)
    figure.savefig(path, dpi=DPI)


def draw_grids(path: Path, grids: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Digits found by each model, by the passkey's depth and the row's length."""
    figure = Figure(figsize=(4.2 * len(grids), 3.6), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, len(grids), squeeze=False).flat, grids.items(), strict=True):
        paint_grid(axes, cells)
        axes.set_title(name)
    figure.savefig(path, dpi=DPI)


def paint_gates(grid: Sequence[Axes], insights: Sequence[Insight]) -> None:
    """Mean gate of each branch over training, the band being the heads; a layer on each of the axes."""
    tokens = [insight["tokens"] for insight in insights]
    stacked = np.array([insight["gates"] for insight in insights])
    for layer, axes in enumerate(grid):
        for branch, name in enumerate(BRANCHES):
            heads = stacked[:, layer, :, branch]
            axes.plot(tokens, heads.mean(1), color=COLOURS[name], label=name)
            axes.fill_between(tokens, heads.min(1), heads.max(1), color=COLOURS[name], alpha=0.15, lw=0)
        over_tokens(axes)
        axes.set(title=f"layer {layer + 1}", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("gate (mean; band: heads)")
    grid[0].legend(frameon=False, fontsize=8)


def paint_distances(axes: Axes, free: Mapping[str, Any]) -> None:
    """Share of the freely chosen blocks by distance in tokens, a line for each layer; a random choice dashed."""
    tokens = [distance * free["block"] for distance in free["distances"]]
    for layer, shares in enumerate(free["layers"]):
        axes.plot(tokens, shares, "o-", ms=3, label=f"layer {layer + 1}")
    axes.plot(tokens, free["random"], "--", color=GREY, label="at random")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="distance from the query (tokens)", ylabel="share of freely chosen blocks", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def paint_gradients(axes: Axes, insights: Sequence[Insight]) -> None:
    """Norm of the gradient of each branch's own parameters over training, over all layers together."""
    tokens = [insight["tokens"] for insight in insights]
    for name in BRANCHES:
        found = [[layer.get(name, 0.0) for layer in insight.get("gradients", ())] for insight in insights]
        axes.plot(tokens, [sum(x * x for x in norms) ** 0.5 for norms in found], color=COLOURS[name], label=name)
    axes.set_yscale("log")
    over_tokens(axes)
    axes.set_ylabel("gradient norm of the branch's parameters")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def paint_grid(axes: Axes, cells: Sequence[Mapping[str, Any]]) -> None:
    """Share of the digits found, by depth and length."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("tokens", "depth"))
    found = {(cell["depth"], cell["tokens"]): cell["digits"] for cell in cells}
    table = np.array([[found.get((depth, length), np.nan) for length in lengths] for depth in depths])
    axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        axes.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=7, color="black")
    axes.set_xticks(
        range(len(lengths)), [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths]
    )
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="row length (tokens)", ylabel="depth of the passkey")
