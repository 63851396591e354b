"""Longformer: a window to both sides, and global tokens.

Definition: query q sees key k iff `|q - k| <= reach`, or either of them is one of the first `num_global` tokens.
Source: Longformer (Beltagy et al. 2020, arXiv 2004.05150), section 3.1. The paper's window of w tokens reaches w / 2 to
each side; whether the query's own counts is left open, so `reach` names the side: `2 * reach + 1` keys. The causal form
is `and_masks(longformer(...), causal())`.
"""

from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles
from flexnsa_masks.global_tokens import global_tokens
from flexnsa_masks.rename import rename


def longformer(reach: int, *, num_global: int) -> MaskMod:
    """Mask mod: keys `q - reach .. q + reach` and the global ones; all keys for a global query.

    Args:
        reach: keys to each side of the query's own, at least 0 (ValueError otherwise).
        num_global: number of initial tokens that are global, at least 0 (likewise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(longformer(1, num_global=1), 1, 1, 4, 4, device="cpu").int().tolist()
    [[[[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]]]
    """
    at_least("longformer", 0, reach=reach, num_global=num_global)
    return rename(or_masks(_around(reach), global_tokens(num_global)), f"longformer_{reach}_{num_global}")


def _around(reach: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - kv_idx).abs() <= reach

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        return interval_tiles(grid, (first - reach, last - reach), (first + reach, last + reach))

    return with_tiles(mask_mod, tiles, f"around_{reach}")
