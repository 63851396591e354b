"""The site's pictures, each drawn from a run of the library, once for the light and once for the dark theme.

`python docs/make/pictures.py FOLDER` writes them all.
"""

import functools
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from flexnsa import (
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    NSAConfig,
    SelectedBranch,
    Selection,
    SparseAttention,
    WindowBranch,
    block_importance,
    compressed_attention,
    documents_from_lengths,
    select_blocks,
    selected_attention,
    window_attention,
)
from flexnsa.inspect import Look, draw_branches, draw_query, draw_selection, look_at_attention

THEMES = {"light": "#1b1b1f", "dark": "#e4e4ea"}
COLOURS = {"compressed": "#8264d6", "selected": "#e0533a", "window": "#2a9d6e"}
GREY, PALE = "#8a8a94", "#c9b3ae"

SMALL = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=5, window=24)
TOKENS, DIM, GROUP = 256, 32, 4
TOPICS, PASSAGE = "ABCADBCA", 32


class Run(NamedTuple):
    """One call of each stage on the toy sequence; weights are over raw tokens, summed to 1 over what is seen."""

    weights: Mapping[str, Tensor]
    p_cmp: Tensor
    importance: Tensor
    selection: Selection


def toy() -> tuple[Tensor, Tensor]:
    """Queries [1, g, t, d] and keys [1, 1, t, d]: passages about topics, alike where the topic is the same."""
    random = torch.Generator().manual_seed(0)
    topic = {name: torch.randn(DIM, generator=random) for name in sorted(set(TOPICS))}
    meant = torch.stack([topic[name] for name in TOPICS]).repeat_interleave(PASSAGE, 0)
    keys = meant + 0.7 * torch.randn(TOKENS, DIM, generator=random)
    queries = 0.7 * meant + 0.7 * torch.randn(GROUP, TOKENS, DIM, generator=random)
    return queries[None], keys[None, None]


@functools.cache
def run(lengths: tuple[int, ...] | None = None) -> Run:
    """The stages one after another. With the identity for values a branch's output is its weights."""
    q, k = toy()
    documents = None if lengths is None else documents_from_lengths(list(lengths), TOKENS)
    token = torch.eye(TOKENS)[None, None]
    k_cmp, v_cmp = MeanPool(SMALL)(k, token)
    slots = torch.eye(k_cmp.shape[2])[None, None]
    compressed = compressed_attention(q, k_cmp, v_cmp, SMALL, documents=documents)
    p_cmp = compressed_attention(q, k_cmp, slots, SMALL, documents=documents).out
    scored = (q, k_cmp, compressed.lse, SMALL)
    selection = select_blocks(*scored, num_tokens=TOKENS, documents=documents)
    selected = selected_attention(q, k, token, selection, SMALL, documents=documents)
    window = window_attention(q, k, token, SMALL, documents=documents)
    outputs = {"compressed": compressed, "selected": selected, "window": window}
    return Run(
        {name: output.out[0].mean(0) for name, output in outputs.items()},
        p_cmp[0],
        block_importance(*scored, num_tokens=TOKENS, documents=documents)[0, 0],
        selection,
    )


def views() -> Figure:
    """What each branch lets each query see."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    titles = {"compressed": "compressed: all of the past, coarsely", "selected": "selected: a few blocks, exactly"}
    for axes, (name, weights) in zip(figure.subplots(1, 3, sharey=True), run().weights.items(), strict=True):
        _map(axes, weights, name)
        axes.set_title(titles.get(name, "window: the last few tokens"), fontsize=9)
        axes.set_xlabel("key token")
        _passages(axes)
    figure.axes[0].set_ylabel("query token")
    return figure


def query() -> Figure:
    """The stages for one query of the toy sequence, from top to bottom."""
    at, found = 235, run()
    blocks = [block for block in found.selection.indices[0, 0, at].tolist() if block >= 0]
    figure = Figure(figsize=(9, 7.4), layout="constrained")
    rows = figure.subplots(5, 1, sharex=True)
    stride, length, block = SMALL.compress_stride, SMALL.compress_block, SMALL.select_block
    seen = (at - length + 1) // stride + 1
    probability = found.p_cmp[:, at, :seen]
    start = torch.arange(seen) * stride
    for head, values in enumerate(probability):
        rows[0].step(
            start.numpy() + length / 2,
            values.numpy(),
            where="mid",
            lw=0.8,
            alpha=0.5 + head / 8,
            color=COLOURS["compressed"],
        )
    rows[0].set(ylabel="probability", title=f"1  compressed attention of query {at}: {GROUP} heads, {seen} summaries")
    importance = found.importance[at, : at // block + 1]
    forced = {0, at // block, at // block - 1}
    colours = [GREY if j in forced else COLOURS["selected"] if j in blocks else PALE for j in range(len(importance))]
    rows[1].bar(np.arange(len(importance)) * block, importance.numpy(), block * 0.94, align="edge", color=colours)
    rows[1].set(ylabel="importance", title="2  importance of each block, heads summed; red: chosen, grey: forced")
    for axes, (name, title) in zip(
        rows[2:],
        {
            "compressed": "3  what the compressed branch weighs, spread over the tokens it summarises",
            "selected": f"4  what the selected branch weighs: {len(blocks)} blocks of {block} tokens",
            "window": f"5  what the window weighs: {SMALL.window} tokens, the query's own included",
        }.items(),
        strict=True,
    ):
        axes.bar(np.arange(TOKENS), found.weights[name][at].numpy(), 1.0, color=COLOURS[name])
        axes.set(ylabel="weight", title=title)
    for axes in rows:
        axes.title.set(fontsize=9, ha="left")
        axes.title.set_position((0, 1))
        axes.axvline(at, lw=0.8, ls=":", color=GREY)
        _passages(axes)
        axes.set_xlim(0, TOKENS)
    rows[-1].set_xlabel("token (letters: the passage's topic; dotted: the query)")
    return figure


def overlap() -> Figure:
    """How much each compressed token counts for each block, asked of `block_importance` one token at a time."""
    config, tokens = NSAConfig(), 512
    count = config.num_compressed(tokens)
    # Query i scores compressed token i 60 above the others, and its LSE says that this is all there is.
    q, k_cmp = 60 * torch.eye(count)[None, None], torch.eye(count)[None, None]
    weights = block_importance(
        q, k_cmp, torch.full((1, 1, count), 60.0), config, num_tokens=tokens, scale=1.0,
        positions=tokens - count + torch.arange(count),
    )[0, 0]  # fmt: skip
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights.T.numpy(), cmap=_fade("compressed"), aspect="auto", vmin=0, vmax=2.6)
    for i, j in (weights > 0.5).nonzero().tolist():
        axes.text(i, j, f"{weights[i, j]:.0f}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="compressed token i", ylabel="selection block j", xticks=range(0, count, 2))
    return figure


def reads() -> Figure:
    """Keys that the last query of a sequence is scored against, by branch, with the paper's sizes."""
    config = NSAConfig()
    lengths = [2**i for i in range(9, 21)]
    selected = [min(n, config.num_selected * config.select_block) for n in lengths]
    window = [min(n, config.window) for n in lengths]
    compressed = [config.num_compressed(n) for n in lengths]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, lengths, color=GREY, ls="--", label="dense attention")
    for name, values in {"compressed": compressed, "selected": selected, "window": window}.items():
        axes.plot(lengths, values, "o-", ms=3, color=COLOURS[name], label=name)
    total = [2 * c + s + w for c, s, w in zip(compressed, selected, window, strict=True)]
    axes.plot(lengths, total, color=matplotlib.rcParams["text.color"], label="all three, and the scoring")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="position of the query (tokens)", ylabel="keys scored against it")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


PACKED = (100, 56, 100)


def packed() -> Figure:
    """The selected branch of three documents packed into one row, beside the same row as one document."""
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    for axes, lengths in zip(figure.subplots(1, 2, sharey=True), (None, PACKED), strict=True):
        _map(axes, run(lengths).weights["selected"], "selected")
        axes.set_title("one document" if lengths is None else f"documents of {', '.join(map(str, PACKED))}", fontsize=9)
        axes.set_xlabel("key token")
    figure.axes[0].set_ylabel("query token")
    return figure


def _map(axes: Axes, weights: Tensor, name: str) -> None:
    """Weights as colour, the small ones lifted: seen is what matters."""
    share = weights / weights.amax(-1, keepdim=True).clamp(min=1e-9)
    axes.imshow(share.numpy() ** 0.25, cmap=_fade(name), vmin=0, vmax=1)


def _fade(name: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(name, [COLOURS[name] + "00", COLOURS[name]])


def _passages(axes: Axes) -> None:
    for index, topic in enumerate(TOPICS):
        axes.text((index + 0.5) * PASSAGE, 0.98, topic, ha="center", va="top", fontsize=7, color=GREY,
                  transform=axes.get_xaxis_transform())  # fmt: skip


@functools.cache
def look() -> Look:
    """The toy sequence in a composition that mean-pools, its gates set by hand."""
    q, k = toy()
    attention = SparseAttention(
        {
            "compressed": CompressedBranch(SMALL, MeanPool(SMALL)),
            "selected": SelectedBranch(SMALL),
            "window": WindowBranch(SMALL),
        },
        gate=lambda x: torch.tensor([0.3, 0.9, 0.6]).expand(1, GROUP, x.shape[1], 3),
        selector=ImportanceSelector(SMALL),
    )
    return look_at_attention(attention, q, dict.fromkeys(attention.branches, (k, k)), torch.zeros(1, TOKENS, 1))


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "views": views,
    "query": query,
    "overlap": overlap,
    "reads": reads,
    "packed": packed,
    "inspect-branches": lambda: draw_branches(look()),
    "inspect-query": lambda: draw_query(look(), 235),
    "inspect-selection": lambda: draw_selection(look()),
}


@functools.cache
def files() -> dict[str, bytes]:
    """Every picture in every theme, as SVG, by file name."""
    return themed(PICTURES)


def themed(pictures: Mapping[str, Callable[[], Figure]]) -> dict[str, bytes]:
    """Pictures in every theme, as SVG, by file name."""
    return {f"{name}-{theme}.svg": _svg(draw, theme) for name, draw in pictures.items() for theme in THEMES}


def _svg(draw: Callable[[], Figure], theme: str) -> bytes:
    ink = THEMES[theme]
    style = {name: ink for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({**style, "font.size": 9, "axes.facecolor": "none", "svg.hashsalt": theme}):
        file = io.BytesIO()
        draw().savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in files().items():
        (folder / file_name).write_bytes(content)
