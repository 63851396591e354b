"""Global tokens: a few tokens see every token, and every token sees them.

Definition: query q sees key k iff `q < n` or `k < n`. Source: Longformer (Beltagy et al. 2020, arXiv 2004.05150),
section 3.1, and BigBird (Zaheer et al. 2020, arXiv 2007.14062), section 2, where any positions may be global. Here
they are the first n, where the papers' tasks put them: a classification token, a question.
"""

import torch
from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, with_tiles
from flexnsa_masks.prefix import prefix
from flexnsa_masks.rename import rename


def global_tokens(n: int) -> MaskMod:
    """Mask mod: all keys for the queries `0 .. n - 1`, the keys `0 .. n - 1` for the others.

    Args:
        n: number of global tokens, at least 0 (ValueError otherwise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(global_tokens(1), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 1, 1], [1, 0, 0], [1, 0, 0]]]]
    """
    at_least("global_tokens", 0, n=n)
    return rename(or_masks(prefix(n), _all_seeing(n)), f"global_tokens_{n}")


def _all_seeing(n: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx < n) & (kv_idx >= 0)

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        blank = torch.zeros(grid.shape, dtype=torch.bool, device=grid.device)
        return Tiles((first < n) | blank, (last < n) | blank)

    return with_tiles(mask_mod, tiles, f"all_seeing_{n}")
