"""Key range: each query sees one interval of keys, given by two tables.

Definition: query token t of row b sees key k iff `first[b, t] <= k <= last[b, t]`. Windows, causality, compressed
tokens and packed documents are all of this kind once positions and document starts are known, so that one pattern
serves NSA's compressed and window branches (Yuan et al. 2025, arXiv 2502.11089, section 3) for any slice of queries.
"""

import torch
from torch import Tensor

from flexnsa_masks import geometry
from flexnsa_masks.geometry import FAR, Grid, MaskMod, Tiles, tile_bounds
from flexnsa_masks.memory import in_memory


def key_range(first: Tensor, last: Tensor, *, group: int = 1) -> MaskMod:
    """Mask mod: the query of row r, token `t = r // group`, sees the keys `first[b, t] .. last[b, t]`, both included.

    Args:
        first: int64 `[b|1, tq]`, first visible key of each query token.
        last: int64 `[b|1, tq]`, last visible key; below `first` for a query that sees nothing.
        group: query heads folded into the query axis, row `t * group + head`; 1 where they are not.

    Raises:
        ValueError: tables that are not of rank 2 and one length, or `group` below 1.
        TypeError: tables that are not int64.

    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_mask
    >>> mask_mod = key_range(torch.tensor([[0, 0, 2]]), torch.tensor([[-1, 1, 2]]))
    >>> create_mask(mask_mod, 1, 1, 3, 4, device="cpu").int().tolist()
    [[[[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]]]
    """
    _check(first, last, group)
    first, last = (in_memory(table.contiguous()) for table in torch.broadcast_tensors(first, last))
    shared = first.shape[0] == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, token = geometry.table_row(b, shared), q_idx.to(torch.int64) // group
        return (first[row, token] <= kv_idx) & (kv_idx <= last[row, token])

    def tiles(grid: Grid) -> Tiles:
        if grid.span is not None:
            return geometry.unknown_tiles(grid)
        grid.require("key_range", first, q_len=first.shape[1] * group)
        empty = last < first
        low = tile_bounds(torch.where(empty, FAR, first), grid.q_block, group=group)
        high = tile_bounds(torch.where(empty, -FAR, last), grid.q_block, group=group)
        columns = [bound[:, None, :, None] for bound in (*low, *high)]
        return geometry.interval_tiles(grid, (columns[0], columns[1]), (columns[2], columns[3]))

    return geometry.with_tiles(mask_mod, tiles, "key_range")


def _check(first: Tensor, last: Tensor, group: int) -> None:
    geometry.at_least("key_range", 1, group=group)
    for name, table in (("first", first), ("last", last)):
        if table.dim() != 2:
            raise ValueError(f"key_range: expected {name} of shape [b|1, tq], got {list(table.shape)}")
        if table.dtype != torch.int64:
            raise TypeError(f"key_range: expected {name} in int64, got {table.dtype}; convert with .to(torch.int64)")
    rows = {first.shape[0], last.shape[0]} - {1}
    if first.shape[1] != last.shape[1] or len(rows) > 1:
        raise ValueError(f"key_range: expected first and last alike, got {list(first.shape)} and {list(last.shape)}")
