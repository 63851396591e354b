"""S2-Attention: each head sees the recent blocks and a shard of the context, and the heads together see all of it.

Definition: query q sees key k in head h iff `k <= q` and, with blocks `i = q // block`, `j = k // block`, either
`i - j < local_blocks` or `(j + 1 + h * step) % stride == 0`, `step = max(1, stride // heads)`. Source: S2-Attention
(Lin et al. 2024, arXiv 2407.17678): heads shard the context. The offsets of the shards are those of the mask that its
released kernels (github.com/linxihui/dkernel) build. They cover the context iff there are at least `stride` heads.
"""

import torch
from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles
from flexnsa_masks.rename import rename


def s2_attention(heads: int, *, stride: int, local_blocks: int, block: int = 64) -> MaskMod:
    """Mask mod: the latest `local_blocks` blocks, and every `stride`-th block with an offset of the head's own.

    Args:
        heads: query heads of the attention call, at least 1 (ValueError otherwise): each its own row in a BlockMask.
        stride: blocks from one that a head sees to the next, at least 1 (likewise).
        local_blocks: recent blocks, the query's own included, at least 1 (likewise).
        block: tokens in a block, at least 1 (likewise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> mask_mod = s2_attention(2, stride=2, local_blocks=1, block=1)
    >>> create_mask(mask_mod, 1, 2, 5, 5, device="cpu")[0, :, -1].int().tolist()  # the last query, in either head
    [[0, 1, 0, 1, 1], [1, 0, 1, 0, 1]]
    """
    at_least("s2_attention", 1, heads=heads, stride=stride, local_blocks=local_blocks, block=block)
    union = or_masks(_recent(local_blocks, block), _shard(heads, stride, block))
    return rename(union, f"s2_attention_{heads}_{stride}_{local_blocks}_{block}")


def _recent(local_blocks: int, block: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx // block - kv_idx // block < local_blocks)

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        begin, end = ((query // block - local_blocks + 1) * block for query in (first, last))
        return interval_tiles(grid, (begin, end), (first, last))

    return with_tiles(mask_mod, tiles, f"recent_{local_blocks}_{block}")


def _shard(heads: int, stride: int, block: int) -> MaskMod:
    step = max(1, stride // heads)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx // block + 1 + h * step) % stride == 0)

    def tiles(grid: Grid) -> Tiles:
        (q_first, q_last), (k_first, k_last) = grid.queries(), grid.keys()
        head = torch.arange(heads, device=grid.device).view(1, -1, 1, 1)
        left, right = k_first // block, k_last // block
        # The first block of the shard that the key tile touches, if it touches any.
        seen = left + (-(left + 1 + head * step)) % stride
        some = (seen <= right) & (torch.maximum(seen * block, k_first) <= q_last)
        whole = (seen == left) & ((left == right) | (stride == 1))
        return Tiles(some, whole & (k_last <= q_first))

    return with_tiles(mask_mod, tiles, f"shard_{heads}_{stride}_{block}")
