"""BlockMasks from tile geometry: FlexAttention's tables of the key tiles that each query tile visits, and the reverse.

Definition: a tile is visited iff it may hold a visible pair; it is visited without evaluating the mask mod iff it holds
nothing else. Source: FlexAttention (Dong et al. 2024, arXiv 2412.05496). `create_block_mask` of torch
gets the same tables, or tighter ones, from the mask mod's value on every pair.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexnsa_masks.geometry import Grid, MaskMod, at_least, tiles_of
from flexnsa_masks.memory import in_memory


def block_mask(
    mask_mod: MaskMod,
    *,
    q_len: int,
    kv_len: int,
    batch: int | None = None,
    heads: int | None = None,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    repeat: int = 1,
) -> BlockMask:
    """FlexAttention's BlockMask from a mask mod's tile geometry, not from its value on q_len x kv_len pairs.

    Args:
        mask_mod: any mask mod; one without geometry gets a table of all tiles, correct and slow.
        q_len: query rows (tokens times the group, where the group is folded into the query axis).
        kv_len: key tokens.
        batch: batch size of the attention call, checked against the pattern's tables; those that the batch shares
            stay one row.
        heads: query heads of the attention call, likewise. Pass it: FlexAttention's backends disagree on a mask with
            another number of heads than 1 or this (CUDA takes `head % rows`, the CPU `head // group`).
        block_size: tokens per tile, one number or (query, key).
        device: where queries and keys are.
        repeat: batch size of the tables of a pattern that the batch shares. FlexAttention wants as many as queries
            where one key and value sequence serves them all.

    Raises:
        ValueError: a size below 1, or tables that do not fit the lengths, `batch`, `heads`, `device` or `repeat`.

    >>> from flexnsa_masks import block_mask, causal
    >>> mask = block_mask(causal(), q_len=256, kv_len=384)
    >>> mask.kv_num_blocks.tolist(), mask.full_kv_num_blocks.tolist()  # tiles to mask, tiles visible as a whole
    ([[[1, 1]]], [[[0, 1]]])
    """
    q_block, kv_block = (block_size, block_size) if isinstance(block_size, int) else block_size
    at_least("block_mask", 1, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block, repeat=repeat)
    grid = Grid(q_len, kv_len, q_block, kv_block, torch.device(device))
    some, full = tiles_of(mask_mod, grid)
    _check_rows("batch", some.shape[0], batch)
    _check_rows("heads", some.shape[1], heads)
    if repeat != 1:
        _check_rows("batch", some.shape[0], 1)
        some = some.expand(repeat, -1, -1, -1)
        full = None if full is None else full.expand(repeat, -1, -1, -1)
    full = None if full is None else some & full & _whole(grid)
    # Kernels step along the batch by the stride of the heads, of a single one too, for which a compiler may choose any:
    # in memory it is that of a contiguous tensor.
    counts, indices, q_counts, q_indices = map(in_memory, _tables(some if full is None else some & ~full))
    full_tables = (None,) * 4 if full is None else tuple(map(in_memory, _tables(full)))
    # The constructor, since BlockMask.from_kv_blocks would sort its way from tables by row to tables by column.
    return BlockMask(
        seq_lengths=(q_len, kv_len),
        kv_num_blocks=counts,
        kv_indices=indices,
        full_kv_num_blocks=full_tables[0],
        full_kv_indices=full_tables[1],
        q_num_blocks=q_counts,
        q_indices=q_indices,
        full_q_num_blocks=full_tables[2],
        full_q_indices=full_tables[3],
        BLOCK_SIZE=(q_block, kv_block),
        mask_mod=mask_mod,
    )


def _check_rows(axis: str, rows: int, size: int | None) -> None:
    if size is not None and rows != 1 and rows != size:  # not `in`: Dynamo compares symbols by identity there
        raise ValueError(f"block_mask: the mask's tables have {rows} rows along {axis}, expected 1 or {axis}={size}")


def _whole(grid: Grid) -> Tensor:
    """Tiles that no end of a sequence cuts, bool `[nq, nk]`; the others are not full, in torch's masks neither."""
    rows, columns = (torch.arange(1, count + 1, device=grid.device) for count in grid.shape)
    return (rows * grid.q_block <= grid.q_len)[:, None] & (columns * grid.kv_block <= grid.kv_len)


def _tables(tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of the key tiles of each query tile, then of the query tiles of each key tile."""
    return (*_ordered(tiles), *_ordered(tiles.mT.contiguous()))


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ascending indices of the true entries of each row, int32 `[.., rows]` and `[.., rows, columns]`.

    The false entries follow, so that every row is a permutation: a scatter without collisions instead of a sort. All
    tables of a mask are contiguous and equally wide: torch 2.11 reads the full tables with the partial ones' strides.
    """
    rank = tiles.cumsum(-1, dtype=torch.int32)
    column = torch.arange(tiles.shape[-1], dtype=torch.int32, device=tiles.device)
    slot = torch.where(tiles, rank - 1, rank[..., -1:] + column - rank)
    indices = torch.empty_like(slot).scatter_(-1, slot.to(torch.int64), column.expand_as(slot))
    return rank[..., -1].contiguous(), indices
