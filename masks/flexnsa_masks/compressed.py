"""Compressed tokens: each query sees the summaries of what it could see.

Definition: compressed token i summarises the tokens `i * stride .. i * stride + block - 1`, and query q sees it iff it
could see all of them: `i * stride + block - 1 <= q`. Source: Native Sparse Attention (Yuan et al. 2025, arXiv
2502.11089), section 3.3.1, equation 7.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles


def compressed(block: int, stride: int) -> MaskMod:
    """Mask mod over compressed keys: `0 .. (q - block + 1) // stride`.

    Args:
        block: tokens that a compressed token summarises, at least 1 (ValueError otherwise).
        stride: tokens from one compressed token to the next, at least 1 (likewise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(compressed(block=2, stride=1), 1, 1, 4, 3, device="cpu").int().tolist()
    [[[[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    at_least("compressed", 1, block=block, stride=stride)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx * stride + (block - 1) <= q_idx

    def tiles(grid: Grid) -> Tiles:
        query = grid.queries()
        begin = torch.zeros_like(query[0])
        return interval_tiles(
            grid, (begin, begin), ((query[0] - block + 1) // stride, (query[1] - block + 1) // stride)
        )

    return with_tiles(mask_mod, tiles, f"compressed_{block}_{stride}")
