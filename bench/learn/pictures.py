"""The pictures of a run: how the twins learned, what NSA selected, where its branches look, how its gates stand."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from bench.learn.look import BRANCHES, Query
from bench.learn.train import Progress
from flexnsa.inspect import Look, draw_text
from flexnsa.inspect.draw import COLOURS, paint_selection

TWIN_COLOURS = {"nsa": "#c1121f", "full": "#1d3557", "window": "#8d99ae"}
DPI = 150


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
    curve.set(xlabel="training tokens", ylabel=unit, title="validation (points), training (pale)")
    curve.set_ylim(lowest - 0.1, lowest + 2.5)
    place.set(xlabel="position in the context", ylabel=unit, title="validation at the end, by position")
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


def draw_gates(path: Path, tokens: Sequence[int], means: Sequence[Tensor]) -> None:
    """Mean gate of each layer and branch over training; `means` holds a [layers, heads, branches] tensor a point."""
    stacked = np.stack([mean.numpy() for mean in means])
    layers = stacked.shape[1]
    figure = Figure(figsize=(3.6 * layers, 3.4), layout="constrained")
    for layer, axes in enumerate(figure.subplots(1, layers, sharey=True, squeeze=False).flat):
        for branch, name in enumerate(BRANCHES):
            heads = stacked[:, layer, :, branch]
            axes.plot(tokens, heads.mean(1), color=COLOURS[name], label=name)
            axes.fill_between(tokens, heads.min(1), heads.max(1), color=COLOURS[name], alpha=0.15, lw=0)
        axes.set(title=f"layer {layer + 1}", xlabel="training tokens", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("gate (mean; band: heads)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
