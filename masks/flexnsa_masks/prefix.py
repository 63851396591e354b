"""Prefix: every query sees the first few keys, also those after it.

Definition: query q sees key k iff `k < n`. `or_masks(prefix(n), causal())` is the prefix language model: bidirectional
within the first n tokens, causal after them. Source: T5 (Raffel et al. 2020, arXiv 1910.10683), section 3.2.1.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, table_row, with_tiles
from flexnsa_masks.intervals import with_interval


def prefix(n: int | Tensor) -> MaskMod:
    """Mask mod: keys `0 .. n - 1`, whoever asks.

    Args:
        n: tokens of the prefix, at least 0; an int, or an integer tensor `[b]`, one length per row of the batch.

    Raises:
        ValueError: a negative int, or a tensor of another rank.

    >>> from flexnsa_masks import causal, or_masks
    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(or_masks(prefix(2), causal()), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    return _ragged(n) if isinstance(n, Tensor) else _fixed(n)


def _fixed(n: int) -> MaskMod:
    at_least("prefix", 0, n=n)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < n

    def tiles(grid: Grid) -> Tiles:
        begin = torch.zeros_like(grid.queries()[0])
        return interval_tiles(grid, (begin, begin), (begin + n - 1, begin + n - 1))

    named = with_tiles(mask_mod, tiles, f"prefix_{n}")
    return with_interval(named, last=lambda b, q_idx: torch.full_like(q_idx, n - 1))


def _ragged(n: Tensor) -> MaskMod:
    if n.dim() != 1:
        raise ValueError(f"prefix: expected n to be an int or of shape [b], got {list(n.shape)}")
    shared = n.shape[0] == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < n[table_row(b, shared)]

    def tiles(grid: Grid) -> Tiles:
        grid.require("prefix", n)
        last = n.to(torch.int64)[:, None, None, None] - 1
        begin = torch.zeros_like(last)
        return interval_tiles(grid, (begin, begin), (last, last))

    named = with_tiles(mask_mod, tiles, "prefix")
    return with_interval(named, last=lambda b, q_idx: n[table_row(b, shared)].to(torch.int64) - 1)
