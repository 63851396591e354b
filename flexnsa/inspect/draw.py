"""Pictures of a look: its branches, one query of it, its selection, and its attention over text. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from flexnsa.inspect.look import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIXED = "all, each times its gate"
COLOURS = {"compressed": "#8264d6", "selected": "#e0533a", "window": "#2a9d6e", MIXED: "#c77800"}
OTHERS = ("#3f7fbf", "#b0568f", "#7a7a29", "#5b8c8c")
GREY, PALE = "#8a8a94", "#c9b3ae"
NEWLINE = "\N{RETURN SYMBOL}"


def draw_branches(look: Look, *, row: int = 0, head: int = 0) -> Figure:
    """A map for each branch and for their gated sum: queries downwards, tokens to the right, weights as colour.

    Args:
        look: of consecutive queries, for a picture that reads as a matrix.
        row: row of the batch.
        head: query head.
    """
    figure = _figure((3.1 * (len(look.weights) + 1) + 0.4, 3.3))
    maps = {**look.weights, MIXED: look.mixed}
    for axes, (name, weights) in zip(figure.subplots(1, len(maps), sharey=True), maps.items(), strict=True):
        # The fourth root: what is seen at all matters as much as how much it is.
        share = weights[row, head] / weights[row, head].amax(-1, keepdim=True).clamp(min=1e-9)
        axes.imshow(
            _array(share) ** 0.25, cmap=_fade(look, name), vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_title(_title(look, name, look.gates[row, head]), fontsize=9)
        axes.set_xlabel("token")
    figure.axes[0].set_ylabel("query")
    return figure


def draw_query(look: Look, query: int = -1, *, row: int = 0, head: int = 0) -> Figure:
    """One query from top to bottom: importance of each block, weights of each branch over tokens, their gated sum.

    Args:
        look: what was seen.
        query: which of the queries that were looked at, counted from 0, or from the last with -1.
        row: row of the batch.
        head: KV head, whose query heads are averaged.
    """
    panels = {**look.weights, MIXED: look.mixed}
    figure = _figure((9, 1.4 * (len(panels) + (look.importance is not None)) + 0.5))
    stack = list(figure.subplots(len(panels) + (look.importance is not None), 1, sharex=True, squeeze=False)[:, 0])
    if look.importance is not None:
        _importance_bars(stack.pop(0), look, row, head, query)
    for axes, (name, weights) in zip(stack, panels.items(), strict=True):
        values = _array(_of_group(weights, look, row, head)[query])
        axes.bar(range(len(values)), values, 1.0, color=_colour(look, name))
        axes.set(ylabel="weight")
        axes.set_title(_title(look, name, _of_group(look.gates, look, row, head)[query]), fontsize=9, loc="left")
    at = int(look.positions[row % look.positions.shape[0], query])
    for axes in figure.axes:
        axes.axvline(at, lw=0.8, ls=":", color=GREY)
        axes.set_xlim(-0.5, look.num_tokens - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].set_xlabel(f"token (dotted: the query, at {at})")
    return figure


def draw_selection(look: Look, *, row: int = 0) -> Figure:
    """For each KV head the blocks that each query selected, the forced ones paler.

    Args:
        look: of consecutive queries, for a picture that reads as a matrix.
        row: row of the batch.
    """
    heads = look.chosen.shape[1]
    figure = _figure((3.4 * heads + 0.6, 3.5))
    for head, axes in enumerate(figure.subplots(1, heads, sharey=True, squeeze=False)[0]):
        paint_selection(axes, look, row=row, head=head)
        axes.set_title(f"KV head {head}", fontsize=9)
    figure.supxlabel("block of the query's document (pale: forced)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return figure


def draw_text(look: Look, text: Sequence[str], query: int = -1, *, row: int = 0, head: int = 0) -> Figure:
    """What a query attends to in the text before it: a page for each branch and for their gated sum.

    Args:
        look: what was seen.
        text: one short string for each token, such as a character; newlines break lines.
        query: which of the queries that were looked at; framed. Its selected blocks are outlined.
        row: row of the batch.
        head: KV head, whose query heads are averaged.
    """
    maps = {**look.weights, MIXED: look.mixed}
    at, columns = int(look.positions[row % look.positions.shape[0], query]), 2 if len(maps) > 1 else 1
    places = page(text[: at + 1])
    rows = -(-len(maps) // columns)
    figure = _figure((7.5 * columns, 1.2 + rows * min(4.5, 0.4 + 0.3 * (places[-1][0] + 1))))
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, weights) in zip(grid, maps.items(), strict=False):
        _paint_page(axes, text, places, _of_group(weights, look, row, head)[query], _fade(look, name))
        for tokens in _block_tokens(look, row, head, query):
            _outline(axes, [places[token] for token in tokens if token <= at], COLOURS["selected"], 0.6)
        _outline(axes, [places[at]], axes.xaxis.label.get_color(), 1.5)
        axes.set_title(_title(look, name, _of_group(look.gates, look, row, head)[query]), fontsize=11, loc="left")
    for axes in grid:
        axes.set_axis_off()
    return figure


def paint_selection(axes: Axes, look: Look, *, row: int = 0, head: int = 0) -> None:
    """One KV head's panel of ``draw_selection``, on axes that exist already."""
    chosen = look.chosen[row, head].float()
    pale = chosen * look.forced.expand(look.chosen.shape[0], -1, -1, -1)[row, 0]
    axes.imshow(
        _array(chosen - 0.6 * pale),
        aspect="auto",
        cmap=_fade(look, "selected"),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )


def page(text: Sequence[str], width: int = 88) -> list[tuple[int, int]]:
    """Line and column of each token: lines break after a newline, or its sign, and at ``width``.

    >>> page(["a", NEWLINE, "b", "c"])
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    places, line, column = [], 0, 0
    for token in text:
        if column == width:
            line, column = line + 1, 0
        places.append((line, column))
        column += 1
        if token in ("\n", NEWLINE):
            line, column = line + 1, 0
    return places


def _importance_bars(axes: Axes, look: Look, row: int, head: int, query: int) -> None:
    assert look.importance is not None
    block = 1 if look.config is None else look.config.select_block
    start = int(look.starts[row % look.starts.shape[0], query])
    values = _array(look.importance[row, head, query])
    colours = [GREY] * len(values)
    if look.selection is not None and look.config is not None:
        forced = look.forced.expand(look.importance.shape[0], -1, -1, -1)[row, 0, query].tolist()
        chosen = look.chosen[row, head, query].tolist()
        colours = [GREY if f else COLOURS["selected"] if c else PALE for f, c in zip(forced, chosen, strict=True)]
    left = [start + block * index for index in range(len(values))]
    axes.bar(left, values, 0.94 * block, align="edge", color=colours)
    axes.set(ylabel="importance")
    axes.set_title("importance of each block; red: chosen, grey: forced", fontsize=9, loc="left")


def _block_tokens(look: Look, row: int, head: int, query: int) -> list[range]:
    """The tokens of each selected block."""
    if look.selection is None or look.config is None:
        return []
    size, start = look.config.select_block, int(look.starts[row % look.starts.shape[0], query])
    blocks = [block for block in look.selection.indices[row, head, query].tolist() if block >= 0]
    return [range(start + block * size, start + (block + 1) * size) for block in blocks]


def _paint_page(
    axes: Axes,
    text: Sequence[str],
    places: Sequence[tuple[int, int]],
    weights: Float[Tensor, " tk"],
    colours: Any,
) -> None:
    """Tokens as a page; colour grows with the square root of the weight, so that small ones show."""
    lines, columns = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    cells = [[0.0] * columns for _ in range(lines)]
    for (line, column), weight in zip(places, weights.tolist(), strict=False):
        cells[line][column] = weight**0.5
    most = max(max(line) for line in cells)
    axes.imshow(cells, cmap=colours, vmin=0, vmax=max(1.3 * most, 1e-6), aspect="auto")
    for (line, column), token in zip(places, text, strict=False):
        axes.text(
            column,
            line,
            token.replace("\n", NEWLINE),
            family="monospace",
            fontsize=min(7.5, 280 / lines),
            ha="center",
            va="center",
        )
    axes.set_axis_off()


def _outline(axes: Axes, places: Sequence[tuple[int, int]], colour: str, width: float) -> None:
    for line in {line for line, _ in places}:
        columns = [column for at, column in places if at == line]
        left, right = min(columns) - 0.5, max(columns) + 0.5
        xs = (left, right, right, left, left)
        ys = (line - 0.5, line - 0.5, line + 0.5, line + 0.5, line - 0.5)
        axes.plot(xs, ys, color=colour, lw=width)


def _of_group(values: Tensor, look: Look, row: int, head: int) -> Tensor:
    """What the query heads of a KV head have in ``[b, hq, tq, ..]``: their mean, ``[tq, ..]``."""
    return values[row].unflatten(0, (look.num_kv_heads, -1))[head].float().mean(0)


def _title(look: Look, name: str, gates: Tensor) -> str:
    """A branch's name, and its gate, the mean over what is left of ``[.., branches]``."""
    return name if name == MIXED else f"{name} (gate {gates[..., list(look.weights).index(name)].mean():.2f})"


def _colour(look: Look, name: str) -> str:
    others = [other for other in look.weights if other not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHERS[others.index(name) % len(OTHERS)]


def _fade(look: Look, name: str) -> Any:
    colour = _colour(look, name)
    return _matplotlib("colors").LinearSegmentedColormap.from_list(name, [colour + "00", colour])


def _array(values: Tensor) -> Any:
    return values.detach().float().cpu().numpy()


def _figure(size: tuple[float, float]) -> Any:
    return _matplotlib("figure").Figure(figsize=size, layout="constrained")


def _matplotlib(module: str) -> Any:
    # Imported at the first picture: a look itself needs torch alone.
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("drawing a look needs matplotlib; install it with `pip install flexnsa[viz]`") from error
