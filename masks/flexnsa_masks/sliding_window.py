"""Sliding window: each query sees the latest few keys.

Definition: query q sees key k iff `q - window < k <= q`: exactly `window` keys, its own included. Source: Longformer
(Beltagy et al. 2020, arXiv 2004.05150), section 3.1, in its causal form; NSA's third branch (arXiv 2502.11089, section
3.3.3). Others let a window of w reach w keys back, which makes w + 1 of them.
"""

from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles
from flexnsa_masks.intervals import with_interval


def sliding_window(window: int) -> MaskMod:
    """Mask mod: keys `q - window + 1 .. q`.

    Args:
        window: number of keys, at least 1 (ValueError otherwise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(sliding_window(2), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]
    """
    at_least("sliding_window", 1, window=window)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        return interval_tiles(grid, (first - window + 1, last - window + 1), (first, last))

    named = with_tiles(mask_mod, tiles, f"sliding_window_{window}")
    return with_interval(named, last=lambda b, q_idx: q_idx, first=lambda b, q_idx: q_idx - window + 1)
