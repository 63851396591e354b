"""Dilated window: each query sees every so many-th of the latest keys.

Definition: query q sees the keys `q - i * dilation`, `i = 0 .. window - 1`: `window` keys over `(window - 1) * dilation
+ 1` tokens. Source: Longformer (Beltagy et al. 2020, arXiv 2004.05150), section 3.1, in its causal form.
"""

from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles


def dilated(window: int, dilation: int) -> MaskMod:
    """Mask mod: keys `q, q - dilation, .., q - (window - 1) * dilation`.

    Args:
        window: number of keys, at least 1 (ValueError otherwise).
        dilation: tokens from one to the next, at least 1 (likewise); 1 makes a sliding window.

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(dilated(window=2, dilation=2), 1, 1, 4, 4, device="cpu").int().tolist()
    [[[[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]]]
    """
    at_least("dilated", 1, window=window, dilation=dilation)
    reach = (window - 1) * dilation

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        back = q_idx - kv_idx
        return (back >= 0) & (back <= reach) & (back % dilation == 0)

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        some, full = interval_tiles(grid, (first - reach, last - reach), (first, last))
        return Tiles(some, full if dilation == 1 else None)

    return with_tiles(mask_mod, tiles, f"dilated_{window}_{dilation}")
