"""Tile geometry: what a mask mod knows about query tiles x key tiles, so that nobody evaluates it on every pair.

A *mask mod* is FlexAttention's: a function of (batch, head, query index, key index) that says whether the pair is
visible. It is the whole truth about a pattern; eager FlexAttention reads nothing else. Here a mask mod may also carry
its *tile geometry*: a function that says, for a `Grid` of tiles, which tiles hold any visible pair and which hold
nothing else. `block_mask` needs no more than that. Both answers may err, towards more work and never towards a wrong
result, so geometry survives `and_masks`, `or_masks` and `at_positions`.

Axes: `b` batch, `h` heads, `nq` query tiles, `nk` key tiles. Lengths and indices count tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TileGeometry = Callable[["Grid"], "Tiles"]

# Beyond every index, yet exact as a float (`pad` takes floats) and far from overflow when a window is subtracted.
FAR = 1 << 60


class Grid(NamedTuple):
    """Query tiles x key tiles: lengths in tokens, tile sizes in tokens, and where the answer shall live.

    Tile i covers the query indices `i * q_block ..` unless `span`, set by `at_positions`, holds the least and greatest
    query index of each tile, int64 `[b|1, 1, nq, 1]`.
    """

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    device: torch.device
    span: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of query tiles and of key tiles."""
        return -(-self.q_len // self.q_block), -(-self.kv_len // self.kv_block)

    def queries(self) -> tuple[Tensor, Tensor]:
        """First and last query index of each query tile, int64 `[b|1, 1, nq, 1]`."""
        if self.span is not None:
            return self.span
        first = torch.arange(self.shape[0], device=self.device).view(1, 1, -1, 1) * self.q_block
        return first, (first + self.q_block - 1).clamp(max=self.q_len - 1)

    def keys(self) -> tuple[Tensor, Tensor]:
        """First and last key index of each key tile, int64 `[1, 1, 1, nk]`."""
        first = torch.arange(self.shape[1], device=self.device).view(1, 1, 1, -1) * self.kv_block
        return first, (first + self.kv_block - 1).clamp(max=self.kv_len - 1)

    def require(self, pattern: str, table: Tensor, *, q_len: int | None = None, kv_len: int | None = None) -> None:
        """Raise ValueError unless the lengths that a pattern's tables describe, and their device, are this grid's."""
        for axis, described, asked in (("q_len", q_len, self.q_len), ("kv_len", kv_len, self.kv_len)):
            if described is not None and described != asked:
                raise ValueError(f"{pattern}: its tables describe {axis}={described}, the BlockMask asks for {asked}")
        if table.device.type != self.device.type:
            raise ValueError(f"{pattern}: its tables are on {table.device}, got device={self.device}; pass the former")


class Tiles(NamedTuple):
    """What a pattern knows of each tile, bool `[b|1, h|1, nq, nk]`.

    `some`: may hold a visible pair (false means surely none). `full`: holds visible pairs only (false means unknown);
    None where that is never known, which spares the BlockMask its tables of full tiles.
    """

    some: Tensor
    full: Tensor | None


def with_tiles(mask_mod: MaskMod, tiles: TileGeometry, name: str) -> MaskMod:
    """Name a mask mod and attach its tile geometry; the result is the same plain function, as torch.compile wants it.

    >>> from flexnsa_masks import Grid, Tiles, and_masks, causal, with_tiles
    >>> def own_half(b, h, q_idx, kv_idx):
    ...     return (q_idx < 512) == (kv_idx < 512)
    >>> def tiles(grid: Grid) -> Tiles:  # for tiles that divide 512
    ...     (q_first, _), (k_first, _) = grid.queries(), grid.keys()
    ...     same = (q_first < 512) == (k_first < 512)
    ...     return Tiles(same, same)
    >>> and_masks(causal(), with_tiles(own_half, tiles, "own_half")).__name__
    'and_masks(causal, own_half)'
    """
    mod: Any = mask_mod
    mod.__name__ = name
    mod.tiles = tiles
    return mask_mod


def name_of(mod: Callable[..., Tensor]) -> str:
    """Name of a mask mod or score mod: its function's, or its type's where it is no function."""
    return getattr(mod, "__name__", type(mod).__name__)


def unknown_tiles(grid: Grid) -> Tiles:
    """Tiles of a pattern that says nothing: any tile may hold visible pairs, none surely holds nothing else."""
    return Tiles(torch.ones(1, 1, *grid.shape, dtype=torch.bool, device=grid.device), None)


def tiles_of(mask_mod: MaskMod, grid: Grid) -> Tiles:
    """Tile geometry of a mask mod on a grid, bool `[b|1, h|1, nq, nk]`; `unknown_tiles` for one that carries none."""
    geometry = cast("TileGeometry | None", getattr(mask_mod, "tiles", None))
    return unknown_tiles(grid) if geometry is None else geometry(grid)


def interval_tiles(grid: Grid, first: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor]) -> Tiles:
    """Tiles of a pattern in which each query sees the keys `first .. last`.

    Args:
        grid: the tiles.
        first: least and greatest `first` over the queries of each tile, int64 `[b|1, h|1, nq|1, 1]`.
        last: least and greatest `last`, likewise. A query that sees nothing has `last < first`.
    """
    low, high = grid.keys()
    some = (low <= last[1]) & (high >= first[0])
    full = (low >= first[1]) & (high <= last[0])
    blank = torch.zeros(grid.shape, dtype=torch.bool, device=grid.device)
    return Tiles(some | blank, full | blank)


def tile_bounds(table: Tensor, tile: int, *, group: int = 1) -> tuple[Tensor, Tensor]:
    """Least and greatest entry in each tile of a table's rows, int64 `[b, ceil(t * group / tile)]`.

    Args:
        table: integers `[b, t]`.
        tile: rows in a tile.
        group: rows that each entry stands for: row r reads entry `r // group`.
    """
    rows = table.to(torch.int64).unsqueeze(-1).expand(-1, -1, group).flatten(1)
    # Counted as `Grid.shape` counts them: to a compiler, sizes that are equal by other formulas are different ones.
    count = -(-rows.shape[1] // tile)
    tail = count * tile - rows.shape[1]
    least = pad(rows, (0, tail), value=FAR).unflatten(1, (count, tile)).amin(-1)
    return least, pad(rows, (0, tail), value=-FAR).unflatten(1, (count, tile)).amax(-1)


def table_row(batch: Tensor, shared: bool) -> Tensor:
    """Row of a per-batch table for FlexAttention's batch index: its own, or row 0 of a table that the batch shares.

    int64, as every index into a table must be: in the int32 of the kernels, offsets overflow in tables beyond 2^31.
    """
    row = batch.to(torch.int64)
    return torch.zeros_like(row) if shared else row


def at_least(pattern: str, minimum: int, **sizes: int) -> None:
    """Raise ValueError, naming pattern and argument, for the first of `sizes` below `minimum`."""
    for name, size in sizes.items():
        if size < minimum:
            raise ValueError(f"{pattern}: expected {name} >= {minimum}, got {size}")
