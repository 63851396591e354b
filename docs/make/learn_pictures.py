"""The pictures of the page on learning, each with its place on the page; no place for one that cannot be drawn."""

from collections.abc import Callable, Mapping

from learn_runs import by_attention, curve, rows, runs, seconds_at
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.learn.pictures import over_tokens, paint_distances, paint_gates, paint_gradients, paint_grid

COLOURS = {
    "full": "#4a7bb5",
    "nsa": "#d6404e",
    "window": "#8a8a94",
    "nsa-no-selected": "#e6a04c",
    "nsa-no-compressed": "#8264d6",
    "nsa-no-window": "#2a9d6e",
    "nsa-shared-kv": "#b5548f",
    "nsa-mean-pool": "#6fa8a0",
    "moba": "#8c6d46",
}


def mqar() -> Figure:
    """Accuracy over training at both sizes, a line for each model and seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, tokens in zip(figure.subplots(1, 2, sharey=True), (512, 2048), strict=True):
        for name, seeds in by_attention(runs(f"mqar-{tokens}-")).items():
            for number, (_, row) in enumerate(seeds):
                seen, accuracy = zip(*row["accuracy"], strict=True)
                axes.plot(seen, accuracy, color=COLOURS[name], lw=1.2, label=name if number == 0 else None)
        _finish(axes, "", "accuracy" if tokens == 512 else "")
        over_tokens(axes)
        axes.set(title=f"{tokens:,} tokens", ylim=(0, 1.02))
    lines = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    names = [name for name in COLOURS if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside right center", frameon=False, fontsize=8)
    return figure


def passkey() -> Figure:
    """The heat map of each model."""
    found = [(row["attention"], row["grid"]) for _, row in rows(runs("passkey"))]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, len(found), squeeze=False).flat, found, strict=True):
        paint_grid(axes, cells)
        axes.set_title(name)
    return figure


def text() -> Figure:
    """Validation over tokens and over seconds, and by position in the context."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, over_time, places = figure.subplots(1, 3)
    for name, seeds in by_attention(runs("text-seed")).items():
        for number, (_, row) in enumerate(seeds):
            style = {"color": COLOURS[name], "lw": 1.2, "label": name if number == 0 else None}
            tokens, bits = zip(*curve(row), strict=True)
            curves.plot(tokens, bits, "o-", ms=2, **style)
            over_time.plot([seconds_at(row, seen) for seen in tokens], bits, "o-", ms=2, **style)
            places.plot(*zip(*row["by_position"], strict=True), "o-", ms=2, **style)
    _finish(curves, "", "validation, bits a byte")
    over_tokens(curves)
    _finish(over_time, "seconds of training", "")
    _finish(places, "position in the context", "")
    places.set_xscale("log", base=2)
    curves.legend(frameon=False, fontsize=8)
    return figure


def inside() -> Figure:
    """What the text model of the first seed did inside: gates of each layer, distances, gradients."""
    insights = next(row["insights"] for _, row in rows(runs("text-seed")) if row["attention"] == "nsa")
    columns = min(4, len(insights[0]["gates"]))
    lines = len(insights[0]["gates"]) // columns
    figure = Figure(figsize=(9, 2.2 * lines + 3.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.2 * lines, 3.4))
    grid = upper.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    paint_gates(list(grid.flat), insights)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    left, right = lower.subplots(1, 2)
    paint_distances(left, insights[-1]["free"])
    paint_gradients(right, insights)
    return figure


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)


DRAWN: Mapping[str, tuple[Callable[[], Figure], Callable[[], bool], str]] = {
    "learn-mqar": (mqar, lambda: bool(runs("mqar-512-") and runs("mqar-2048-")), "Accuracy over training"),
    "learn-passkey": (
        passkey,
        lambda: any(row["grid"] for _, row in rows(runs("passkey"))),
        "Share of digits found, by depth and length",
    ),
    "learn-text": (text, lambda: bool(runs("text-seed")), "Validation over tokens, over time, and by position"),
    "learn-inside": (inside, lambda: bool(runs("text-seed")), "Gates by layer, chosen blocks by distance, gradients"),
}
"""Each picture: how it is drawn, whether its runs are there, and what it shows."""

PICTURES: Mapping[str, Callable[[], Figure]] = {name: draw for name, (draw, there, _) in DRAWN.items() if there()}

PLACES: Mapping[str, Callable[[], str]] = {
    f"{name} picture": (lambda name=name, shown=shown: f"![{shown}](pictures/{name}.svg)" if name in PICTURES else "")
    for name, (_, _, shown) in DRAWN.items()
}
"""The Markdown of each picture, by the name of its marker."""
