"""Queries from anywhere in a sequence: a pattern of positions, asked about rows.

Definition: row r of `at_positions(mask_mod, positions)` sees what query index `positions[b, r]` of `mask_mod` sees; -1
sees nothing. That turns a pattern for whole sequences into one for chunked prefill, decoding and context parallelism.
"""

import torch
from torch import Tensor

from flexnsa_masks import geometry
from flexnsa_masks.geometry import FAR, Grid, MaskMod, Tiles, tile_bounds


def at_positions(mask_mod: MaskMod, positions: Tensor, *, group: int = 1) -> MaskMod:
    """Mask mod that reads its query index from a table, tile geometry included.

    Patterns made of tables of their own (`document`, `key_range`, `selected`) work too, but say nothing about tiles
    then: give them the tables of the queries at hand instead.

    Args:
        mask_mod: a pattern over absolute query positions.
        positions: int64 `[tq]` or `[b|1, tq]`, absolute position of each query token, in any order; -1 for padding.
        group: query heads folded into the query axis, row `t * group + head`; 1 where they are not.

    Raises:
        ValueError: positions of another rank, or `group` below 1.
        TypeError: positions that are not int64.

    >>> import torch
    >>> from flexnsa_masks import causal
    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(at_positions(causal(), torch.tensor([2, 0, -1])), 1, 1, 3, 4, device="cpu").int().tolist()
    [[[[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]]
    """
    table = _check(positions, group)
    shared = table.shape[0] == 1

    def positioned(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = table[geometry.table_row(b, shared), q_idx.to(torch.int64) // group]
        return (position >= 0) & mask_mod(b, h, position.clamp(min=0), kv_idx)

    def tiles(grid: Grid) -> Tiles:
        if grid.span is not None:
            return geometry.unknown_tiles(grid)
        grid.require("at_positions", table, q_len=table.shape[1] * group)
        least, greatest = (x[:, None, :, None] for x in tile_bounds(table, grid.q_block, group=group))
        first, _ = tile_bounds(torch.where(table < 0, FAR, table), grid.q_block, group=group)
        some, full = geometry.tiles_of(mask_mod, grid._replace(span=(first[:, None, :, None], greatest)))
        return Tiles(some & (greatest >= 0), None if full is None else full & (least >= 0))

    return geometry.with_tiles(positioned, tiles, f"at_positions({geometry.name_of(mask_mod)})")


def _check(positions: Tensor, group: int) -> Tensor:
    geometry.at_least("at_positions", 1, group=group)
    if positions.dim() not in (1, 2):
        raise ValueError(f"at_positions: expected positions of shape [tq] or [b, tq], got {list(positions.shape)}")
    if positions.dtype != torch.int64:
        raise TypeError(f"at_positions: expected int64 positions, got {positions.dtype}; convert with .to(torch.int64)")
    return positions if positions.dim() == 2 else positions.unsqueeze(0)
