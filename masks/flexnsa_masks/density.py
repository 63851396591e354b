"""Density: what share of the pairs a mask lets through, and what share of the tiles a kernel visits for it.

Definition: of the pairs `k <= q` (or of all pairs), the share that is visible; of the tiles that hold such a pair, the
share that may hold a visible one as far as the tile geometry knows. The first is a property of the pattern, the second
is the work of FlexAttention (Dong et al. 2024, arXiv 2412.05496), which visits what the BlockMask lists.
"""

import torch
from torch import Tensor

from flexnsa_masks.causal import causal as causal_mask
from flexnsa_masks.compose import and_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, tiles_of

# Small tiles leave few pairs to evaluate, yet their tables must stay small: beyond MAX_TILES along a side they grow.
MIN_TILE = 64
MAX_TILES = 2048
# Pairs evaluated at once.
CHUNK = 1 << 20


def density(
    mask_mod: MaskMod,
    tokens: int,
    *,
    heads: int = 1,
    causal: bool = True,
    device: torch.device | str = "cpu",
) -> float:
    """Share of the causal pairs that are visible, exact, as a mean over heads, for the first row of the batch.

    Only pairs in tiles that are neither empty nor full are evaluated, a bounded number at once, so that nothing of size
    tokens x tokens is stored. A mask mod without geometry is evaluated on every pair.

    Args:
        mask_mod: any mask mod.
        tokens: queries, and keys.
        heads: heads to count; 1 for a pattern that is the same in all.
        causal: count among the pairs `k <= q`; otherwise among all pairs.
        device: where the pattern's tables are.

    Raises:
        ValueError: sizes below 1, or tables for another number of heads or tokens.

    >>> from flexnsa_masks import sliding_window
    >>> density(sliding_window(2), 4)  # 7 of 10 pairs
    0.7
    """
    at_least("density", 1, tokens=tokens, heads=heads)
    tile = max(MIN_TILE, -(-tokens // MAX_TILES))
    grid = Grid(tokens, tokens, tile, tile, torch.device(device))
    seen = and_masks(mask_mod, causal_mask()) if causal else mask_mod
    some, full = _by_head(tiles_of(seen, grid), heads)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return (_sizes(grid, full) + _visible(seen, grid, some & ~full)) / (heads * pairs)


def tile_density(
    mask_mod: MaskMod,
    tokens: int,
    *,
    heads: int = 1,
    causal: bool = True,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> float:
    """Share of the causal tiles that a BlockMask of the pattern visits, as a mean over heads, for the first row.

    Args:
        mask_mod: any mask mod; one without geometry visits every tile.
        tokens: queries, and keys.
        heads: heads to count; 1 for a pattern that is the same in all.
        causal: count among the tiles that hold a pair `k <= q`; otherwise among all tiles.
        block_size: tokens along both sides of a tile.
        device: where the pattern's tables are.

    Raises:
        ValueError: sizes below 1, or tables for another number of heads or tokens.

    >>> from flexnsa_masks import sliding_window
    >>> tile_density(sliding_window(128), 1024)  # 15 of 36 tiles
    0.4166666666666667
    """
    at_least("tile_density", 1, tokens=tokens, heads=heads, block_size=block_size)
    grid = Grid(tokens, tokens, block_size, block_size, torch.device(device))
    seen = and_masks(mask_mod, causal_mask()) if causal else mask_mod
    visited = int(_by_head(tiles_of(seen, grid), heads)[0].sum())
    rows = grid.shape[0]
    return visited / (heads * (rows * (rows + 1) // 2 if causal else rows * rows))


def _by_head(tiles: Tiles, heads: int) -> tuple[Tensor, Tensor]:
    """Tiles of the batch's first row that may hold a visible pair, and those that are full, bool `[heads, nq, nk]`."""
    some = tiles.some[0]
    if some.shape[0] not in (1, heads):
        raise ValueError(f"density: the mask's tables have {some.shape[0]} heads, got heads={heads}")
    some = some.expand(heads, -1, -1)
    full = torch.zeros_like(some) if tiles.full is None else tiles.full[0].expand_as(some)
    return some, full & some


def _sizes(grid: Grid, tiles: Tensor) -> int:
    """Pairs in the tiles that are marked, those at the end being smaller."""
    rows, columns = ((last - first + 1).flatten() for first, last in (grid.queries(), grid.keys()))
    return int((tiles * rows[:, None] * columns).sum())


def _visible(mask_mod: MaskMod, grid: Grid, tiles: Tensor) -> int:
    """Visible pairs in the tiles that are marked, evaluated pair by pair."""
    count, batch = 0, torch.zeros((), dtype=torch.int64, device=grid.device)
    within = torch.arange(grid.q_block, device=grid.device)
    for chunk in tiles.nonzero().split(max(1, CHUNK // grid.q_block**2)):
        head, row, column = chunk.view(-1, 3, 1, 1).unbind(1)
        query, key = row * grid.q_block + within[:, None], column * grid.kv_block + within
        inside = (query < grid.q_len) & (key < grid.kv_len)
        # Clamped, so that no table is read beyond its end.
        seen = mask_mod(batch, head, query.clamp(max=grid.q_len - 1), key.clamp(max=grid.kv_len - 1))
        count += int((seen & inside).sum())
    return count
