"""The pictures of a run: how the twins learned, what NSA selected, where its branches look, how its gates stand."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from bench.learn.look import BRANCHES, Look, Query
from bench.learn.train import Progress

TWIN_COLOURS = {"nsa": "#c1121f", "full": "#1d3557", "window": "#8d99ae"}
BRANCH_COLOURS = {"compressed": "Purples", "selected": "Reds", "window": "Greens"}
DPI = 150


def draw_losses(path: Path, progress: Mapping[str, Progress]) -> None:
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
    curve.set(xlabel="training tokens", ylabel="bits per byte", title="validation (points), training (pale)")
    curve.set_ylim(lowest - 0.1, lowest + 2.5)
    place.set(xlabel="position in the context", ylabel="bits per byte", title="validation at the end, by position")
    place.set_xscale("log", base=2)
    for axes in (curve, place):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)


def smoothed(values: Sequence[float], decay: float = 0.97) -> list[float]:
    """Exponential moving average, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def by_position(bits: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over positions [8, 16), [16, 32), [32, 64) ... and the geometric middle of each range."""
    edges = [8 * 2**i for i in range(16) if 8 * 2**i < len(bits)] + [len(bits)]
    pairs = list(itertools.pairwise(edges))
    return [(a * b) ** 0.5 for a, b in pairs], [float(np.mean(bits[a:b])) for a, b in pairs]


def draw_selection(path: Path, look: Look) -> None:
    """For each KV head (row) and layer (column): the blocks that each query selected, the forced ones paler."""
    layers, heads = look.selected.shape[:2]
    figure = Figure(figsize=(4 * layers + 0.5, 3.6 * heads + 0.3), layout="constrained")
    grid = figure.subplots(heads, layers, squeeze=False, sharex=True, sharey=True)
    for layer in range(layers):
        for head in range(heads):
            axes: Axes = grid[head, layer]
            chosen = look.selected[layer, head].float() - 0.6 * look.forced.float()
            axes.imshow(chosen.numpy(), aspect="auto", cmap="Reds", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {layer + 1}, KV head {head + 1}", fontsize=9)
    figure.supxlabel("selection block (pale: forced, red: chosen)", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    figure.savefig(path, dpi=DPI)


def draw_query(path: Path, look: Look, query: Query, text: Sequence[str]) -> None:
    """One query in one layer: the text before it, coloured by the attention of each branch and of their gated sum."""
    lines = page(text[: query.position + 1])[-1][0] + 1
    figure = Figure(figsize=(15, 1.2 + 2 * min(4.5, 0.4 + 0.3 * lines)), layout="constrained")
    for axes, branch in zip(figure.subplots(2, 2).flat, (*BRANCHES, "all three, gated"), strict=True):
        if branch in BRANCHES:
            gate = query.gates[BRANCHES.index(branch)].item()
            title = f"{branch} (gate {gate:.2f})"
            _draw_text(axes, text, query, look.block, query.weights[BRANCHES.index(branch)], BRANCH_COLOURS[branch])
        else:
            title = branch
            _draw_text(axes, text, query, look.block, (query.gates[:, None] * query.weights).sum(0), "Oranges")
        axes.set_title(title, fontsize=11, loc="left")
    figure.suptitle(
        f"Layer {query.layer + 1}, KV head {query.head + 1}: what the byte in the black frame attends to. "
        f"Outlined: the {len(query.blocks)} selected blocks of {look.block} bytes.",
        fontsize=12,
    )
    figure.savefig(path, dpi=DPI)


def _draw_text(axes: Axes, text: Sequence[str], query: Query, size: int, weights: Tensor, colours: str) -> None:
    """The bytes up to the query as a page; colour grows with the square root of the weight, so that small ones show."""
    places = page(text[: query.position + 1])
    rows, columns = (max(place[i] for place in places) + 1 for i in (0, 1))
    cells = np.zeros((rows, columns))
    for (row, column), weight in zip(places, weights.tolist(), strict=False):
        cells[row, column] = weight**0.5
    axes.imshow(cells, cmap=colours, vmin=0, vmax=max(cells.max() * 1.3, 1e-6), aspect="auto")
    for (row, column), letter in zip(places, text, strict=False):
        axes.text(column, row, letter, family="monospace", fontsize=min(7.5, 280 / rows), ha="center", va="center")
    for block in query.blocks:
        _outline(axes, places[block * size : (block + 1) * size], "#c1121f", 0.6)
    _outline(axes, places[query.position :], "black", 1.5)
    axes.set_axis_off()


def _outline(axes: Axes, places: Sequence[tuple[int, int]], colour: str, width: float) -> None:
    for row in {row for row, _ in places}:
        columns = [column for at, column in places if at == row]
        left, right = min(columns) - 0.5, max(columns) + 0.5
        xs, ys = (left, right, right, left, left), (row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5)
        axes.add_line(Line2D(xs, ys, color=colour, lw=width))


def page(text: Sequence[str], width: int = 88) -> list[tuple[int, int]]:
    """Row and column of each character: lines break after a newline and at `width`."""
    places, row, column = [], 0, 0
    for letter in text:
        if column == width:
            row, column = row + 1, 0
        places.append((row, column))
        column += 1
        if letter == NEWLINE:
            row, column = row + 1, 0
    return places


NEWLINE = "\N{RETURN SYMBOL}"


def printable(tokens: Sequence[int]) -> list[str]:
    """One visible character for each byte: newlines as a sign, what ASCII cannot show as a middle dot."""
    return [NEWLINE if token == 10 else chr(token) if 32 <= token < 127 else "\N{MIDDLE DOT}" for token in tokens]


def draw_gates(path: Path, tokens: Sequence[int], means: Sequence[Tensor]) -> None:
    """Mean gate of each layer and branch over training; `means` holds a [layers, heads, branches] tensor a point."""
    stacked = np.stack([mean.numpy() for mean in means])
    layers = stacked.shape[1]
    figure = Figure(figsize=(3.6 * layers, 3.4), layout="constrained")
    for layer, axes in enumerate(figure.subplots(1, layers, sharey=True, squeeze=False).flat):
        for branch, name in enumerate(BRANCHES):
            colour = {"compressed": "#6a51a3", "selected": "#cb181d", "window": "#238b45"}[name]
            heads = stacked[:, layer, :, branch]
            axes.plot(tokens, heads.mean(1), color=colour, label=name)
            axes.fill_between(tokens, heads.min(1), heads.max(1), color=colour, alpha=0.15, lw=0)
        axes.set(title=f"layer {layer + 1}", xlabel="training tokens", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("gate (mean; band: heads)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
