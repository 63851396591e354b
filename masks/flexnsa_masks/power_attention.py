"""PowerAttention: keys at distances that are powers of two, so that what d layers reach grows as 2^d.

Definition: with tokens cut into blocks, query q sees key k iff `k <= q` and the distance of their blocks,
`q // block - k // block`, is 0 or a power of two; a window of recent keys and a few initial ones are seen besides. In d
layers any earlier block within 2^d is reached: every number below 2^d is a sum of at most d powers of two. Source:
PowerAttention (Chen et al. 2025, arXiv 2503.03588). The paper argues on tokens and runs on blocks; `block=1` is the
former. That a block distance counts from the query's own block, which makes the pattern one of whole blocks, is our
reading.
"""

from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, with_tiles
from flexnsa_masks.rename import rename
from flexnsa_masks.sink import sink
from flexnsa_masks.sliding_window import sliding_window


def power_attention(window: int, *, sinks: int = 0, block: int = 1) -> MaskMod:
    """Mask mod: keys at block distances 0, 1, 2, 4, 8 .., the latest `window` keys and the first `sinks`.

    Args:
        window: number of recent keys, the query's own included, at least 1 (ValueError otherwise).
        sinks: number of initial keys, at least 0 (likewise).
        block: tokens that a distance counts as one, at least 1 (likewise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(power_attention(1), 1, 1, 6, 6, device="cpu")[0, 0, -1].int().tolist()
    [0, 1, 0, 1, 1, 1]
    """
    at_least("power_attention", 1, window=window, block=block)
    at_least("power_attention", 0, sinks=sinks)
    union = or_masks(_powers(block), sliding_window(window), sink(sinks))
    return rename(union, f"power_attention_{window}_{sinks}_{block}")


def _powers(block: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx // block - kv_idx // block
        return (kv_idx <= q_idx) & ((distance & (distance - 1)) == 0)

    def tiles(grid: Grid) -> Tiles:
        (q_first, q_last), (k_first, k_last) = grid.queries(), grid.keys()
        least, most = q_first // block - k_last // block, q_last // block - k_first // block
        power = _power_up_to(most)
        single = (least == most) & (power == most)
        # Distances up to 2 leave no gap between powers; from there on a tile is full only if all its pairs are at one.
        return Tiles(
            (k_first <= q_last) & (power >= least),
            (k_last <= q_first) & (single | (most <= 2)),
        )

    return with_tiles(mask_mod, tiles, f"powers_{block}")


def _power_up_to(number: Tensor) -> Tensor:
    """Greatest power of two that is no greater than each number, 0 for 0; meaningless below 0."""
    for shift in (1, 2, 4, 8, 16, 32):
        number = number | (number >> shift)
    return number - (number >> 1)
