"""Selected blocks: each query sees the tokens of the key blocks that its index list names.

Definition: query token t of row b and head h sees key k iff `k >= start[b, t]` and block
`(k - start[b, t]) // select_block` is in `indices[b, h, t]`. Source: Native Sparse Attention (Yuan et al. 2025, arXiv
2502.11089), section 3.3.2. Causality is another pattern's business:
`and_masks(selected(...), key_range(start, position))` is NSA's selected branch.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, table_row, unknown_tiles, with_tiles
from flexnsa_masks.memory import in_memory

WORD = 32


def selected(
    indices: Tensor, select_block: int, *, num_blocks: int, start: Tensor | None = None, group: int = 1
) -> MaskMod:
    """Mask mod of block selection; its tiles are the union of the blocks that the queries of a tile name.

    Args:
        indices: int32 `[b|1, h|1, tq, n]`, distinct block ids, -1 for padding. `h` is the number of query heads of the
            attention call: of its KV heads, where the group is folded into the query axis.
        select_block: tokens in a block.
        num_blocks: blocks that ids may name; ids outside `0 .. num_blocks - 1` count as padding.
        start: int64 `[b|1, tq]`, token at which block 0 of this query begins (its document's first); None for 0.
        group: query heads folded into the query axis, row `t * group + head`; 1 where they are not.

    Raises:
        ValueError: wrong rank or lengths, or a size below 1.
        TypeError: indices that are not int32, or a start that is not int64.

    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_mask
    >>> mask_mod = selected(torch.tensor([[[[0, 2], [1, -1]]]], dtype=torch.int32), 2, num_blocks=3)
    >>> create_mask(mask_mod, 1, 1, 2, 6, device="cpu").int().tolist()
    [[[[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]]]
    """
    _check(indices, start, select_block=select_block, num_blocks=num_blocks, group=group)
    words = block_bits(indices, num_blocks)
    start = None if start is None else in_memory(start)
    # A tensor and not an int: a mask mod that closes over a length is compiled anew for every length.
    last_block = torch.full((), num_blocks - 1, dtype=torch.int64, device=indices.device)
    shared, one_head = indices.shape[0] == 1, indices.shape[1] == 1
    one_start = start is not None and start.shape[0] == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        token, key = q_idx.to(torch.int64) // group, kv_idx.to(torch.int64)
        if start is not None:
            key = key - start[table_row(b, one_start), token]
        block = key // select_block
        near = torch.minimum(block.clamp(min=0), last_block)
        word = words[table_row(b, shared), table_row(h, one_head), token, near // WORD]
        return (block == near) & (((word >> (near % WORD).to(torch.int32)) & 1) == 1)

    def tiles(grid: Grid) -> Tiles:
        if grid.span is not None:
            return unknown_tiles(grid)
        grid.require("selected", indices, q_len=indices.shape[2] * group)
        listed = (indices >= 0) & (indices < num_blocks)
        first = indices.to(torch.int64) * select_block
        first = first if start is None else first + start[:, None, :, None]
        return Tiles(_union(grid, first, listed, select_block, group, aligned=start is None), None)

    return with_tiles(mask_mod, tiles, f"selected_{select_block}")


def block_bits(indices: Tensor, num_blocks: int) -> Tensor:
    """Bit-packed membership, int32 `[b, h, tq, ceil(num_blocks / 32)]`: bit `j % 32` of word `j // 32` for block j.

    Indices int32 `[b, h, tq, n]`, distinct apart from padding. Adding distinct bits is setting them, in whatever order,
    so the result is deterministic.
    """
    block = indices.to(torch.int64)
    listed = (block >= 0) & (block < num_blocks)
    # Shifted in 64 bits: narrowing wraps bit 31 to the sign, where shifting an int32 into its sign need not.
    bit = torch.where(listed, torch.ones_like(block) << (block % WORD), 0).to(torch.int32)
    words = torch.zeros(*indices.shape[:3], -(-num_blocks // WORD), dtype=torch.int32, device=indices.device)
    return in_memory(words.scatter_add_(-1, torch.where(listed, block // WORD, 0), bit))


def _union(grid: Grid, first: Tensor, listed: Tensor, select_block: int, group: int, *, aligned: bool) -> Tensor:
    """Tiles that hold a token of a listed block, bool `[b, h, nq, nk]`; rows of a query and blocks may straddle tiles.

    `first`: int64 `[b, h, tq, n]`, first token of each block; `aligned` where that is a multiple of `select_block`.
    """
    rows, columns = grid.shape
    left = first // grid.kv_block
    right = (first + select_block - 1).clamp(max=grid.kv_len - 1) // grid.kv_block
    token = torch.arange(first.shape[2], device=first.device)[:, None]
    top, bottom = token * group // grid.q_block, ((token + 1) * group - 1) // grid.q_block
    # One cell more than there are tiles, for the padding to go to.
    hit = torch.zeros(*first.shape[:2], rows * columns + 1, dtype=torch.bool, device=first.device)
    inside = listed & (first >= 0) & (first < grid.kv_len)
    for down in range(_tiles_touched(group, grid.q_block, aligned=True)):
        for along in range(_tiles_touched(select_block, grid.kv_block, aligned=aligned)):
            cell = torch.minimum(top + down, bottom) * columns + torch.minimum(left + along, right)
            hit.scatter_(-1, torch.where(inside, cell, rows * columns).flatten(2), True)
    return hit[..., :-1].unflatten(-1, (rows, columns))


def _tiles_touched(run: int, tile: int, *, aligned: bool) -> int:
    """Most tiles that `run` consecutive tokens touch; `aligned` runs begin at multiples of their length."""
    if aligned and tile % run == 0:
        return 1
    if aligned and run % tile == 0:
        return run // tile
    return (run + tile - 2) // tile + 1


def _check(indices: Tensor, start: Tensor | None, **sizes: int) -> None:
    at_least("selected", 1, **sizes)
    if indices.dim() != 4:
        raise ValueError(f"selected: expected indices of shape [b|1, h|1, tq, n], got {list(indices.shape)}")
    if indices.dtype != torch.int32:
        raise TypeError(f"selected: expected indices in int32, got {indices.dtype}; convert with .to(torch.int32)")
    if start is None:
        return
    batch, tokens = indices.shape[0], indices.shape[2]
    if start.dim() != 2 or start.shape[1] != tokens or start.shape[0] not in (1, batch):
        raise ValueError(f"selected: expected start of shape [{batch}|1, {tokens}], got {list(start.shape)}")
    if start.dtype != torch.int64:
        raise TypeError(f"selected: expected start in int64, got {start.dtype}; convert with .to(torch.int64)")
