"""A mask under a name of its own: what a published pattern needs that is composed of others."""

from functools import partial

from torch import Tensor

from flexnsa_masks.geometry import MaskMod, tiles_of, with_tiles
from flexnsa_masks.intervals import interval_of, with_interval


def rename(mask_mod: MaskMod, name: str) -> MaskMod:
    """The same mask mod, tile geometry and interval included, with another `__name__`; the given one keeps its own.

    >>> from flexnsa_masks import or_masks, sink, sliding_window
    >>> rename(or_masks(sliding_window(8), sink(4)), "streaming").__name__
    'streaming'
    """

    def renamed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx)

    named, interval = with_tiles(renamed, partial(tiles_of, mask_mod), name), interval_of(mask_mod)
    return named if interval is None else with_interval(named, *interval)
