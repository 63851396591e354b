"""Pictures of masks: the visible pairs, and beside them the tiles that a kernel visits for them. Needs matplotlib."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexnsa_masks.geometry import Grid, MaskMod, at_least, tiles_of

PARTIAL, FULL = 1, 2


def draw(mask_mod: MaskMod, tokens: int, *, heads: int = 1, block_size: int = 8, title: str | None = None) -> Any:
    """Figure of a mask: a row for each head, tokens on the left, tiles on the right (dark ones need no masking).

    Args:
        mask_mod: any mask mod; it is evaluated on all `heads * tokens * tokens` pairs.
        tokens: queries, and keys.
        heads: heads to draw, from the first.
        block_size: tokens along both sides of a tile.
        title: above everything; None for the mask's name.

    Returns:
        A `matplotlib.figure.Figure`, which saves itself: `draw(mask_mod, 128).savefig("mask.png")`.

    Raises:
        ValueError: sizes below 1, or more heads than the mask's tables have.
        ImportError: matplotlib is not installed.
    """
    at_least("draw", 1, tokens=tokens, heads=heads, block_size=block_size)
    tiles = _tiles(mask_mod, tokens, heads, block_size)
    pairs = create_mask(mask_mod, 1, heads, tokens, tokens, device="cpu")[0].int() * FULL
    figure = _figure_class()(figsize=(8, 4 * heads + 0.5), layout="constrained")
    figure.suptitle(getattr(mask_mod, "__name__", "mask") if title is None else title)
    for head, axes in enumerate(figure.subplots(heads, 2, squeeze=False)):
        label = f"head {head}: " if heads > 1 else ""
        visited = (tiles[head] > 0).float().mean().item()
        _paint(axes[0], pairs[head], f"{label}tokens")
        _paint(axes[1], tiles[head], f"{label}tiles of {block_size}, {visited:.0%} visited")
    return figure


def _tiles(mask_mod: MaskMod, tokens: int, heads: int, block_size: int) -> Tensor:
    """0, PARTIAL or FULL for each tile, int `[heads, nq, nk]`."""
    some, full = tiles_of(mask_mod, Grid(tokens, tokens, block_size, block_size, torch.device("cpu")))
    known = torch.zeros_like(some) if full is None else full & some
    state = some.int() * PARTIAL + known.int() * (FULL - PARTIAL)
    if 1 < state.shape[1] < heads:
        raise ValueError(f"draw: the mask's tables have {state.shape[1]} heads, got heads={heads}")
    return state[0].expand(max(heads, state.shape[1]), -1, -1)[:heads]


def _figure_class() -> Any:
    # Not an import statement: the package must load, and its imports read, as needing torch alone.
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError("drawing a mask needs matplotlib; install it with `pip install flexnsa[viz]`") from error


def _paint(axes: Any, values: Tensor, title: str) -> None:
    axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=FULL, interpolation="nearest")
    axes.set(title=title, xlabel="key", ylabel="query")
    axes.locator_params(integer=True)
