"""Masks from masks: intersection and union as in `torch.nn.attention.flex_attention`, tile geometry and interval kept.

Definition: a pair is visible to `and_masks(a, b)` iff both see it, to `or_masks(a, b)` iff either does. A tile that is
surely empty for one is empty for the intersection; a tile that is full for one is full for the union. Intervals
intersect in an interval; their union is one where all begin at the first key. Source: FlexAttention (Dong et al. 2024,
arXiv 2412.05496), whose own `and_masks` and `or_masks` take these mask mods as well, and drop both.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch.nn.attention import flex_attention

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, name_of, tiles_of, with_tiles
from flexnsa_masks.intervals import Interval, intersection, interval_of, union, with_interval


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """Intersection of one or more mask mods; one without geometry narrows the mask and not its tiles.

    Raises:
        ValueError: called with no mask mod.

    >>> import torch
    >>> from flexnsa_masks import causal, document
    >>> and_masks(causal(), document(torch.tensor([[0, 0, 1]]))).__name__
    'and_masks(causal, document)'
    """

    def tiles(grid: Grid) -> Tiles:
        return reduce(_both, [tiles_of(mod, grid) for mod in mask_mods])

    both = with_tiles(flex_attention.and_masks(*mask_mods), tiles, _name("and_masks", mask_mods))
    return _with_joint_interval(both, intersection, mask_mods)


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """Union of one or more mask mods; one without geometry makes every tile possible.

    Raises:
        ValueError: called with no mask mod.

    >>> from flexnsa_masks import sink, sliding_window
    >>> or_masks(sliding_window(1024), sink(4)).__name__
    'or_masks(sliding_window_1024, sink_4)'
    """

    def tiles(grid: Grid) -> Tiles:
        return reduce(_either, [tiles_of(mod, grid) for mod in mask_mods])

    either = with_tiles(flex_attention.or_masks(*mask_mods), tiles, _name("or_masks", mask_mods))
    return _with_joint_interval(either, union, mask_mods)


def _both(a: Tiles, b: Tiles) -> Tiles:
    return Tiles(a.some & b.some, None if a.full is None or b.full is None else a.full & b.full)


def _either(a: Tiles, b: Tiles) -> Tiles:
    known = [full for full in (a.full, b.full) if full is not None]
    return Tiles(a.some | b.some, reduce(torch.logical_or, known) if known else None)


def _with_joint_interval(
    mask_mod: MaskMod,
    join: Callable[[Sequence[Interval | None]], Interval | None],
    mask_mods: tuple[MaskMod, ...],
) -> MaskMod:
    interval = join([interval_of(mod) for mod in mask_mods])
    return mask_mod if interval is None else with_interval(mask_mod, *interval)


def _name(verb: str, mask_mods: tuple[MaskMod, ...]) -> str:
    if not mask_mods:
        raise ValueError(f"{verb}: expected one or more mask mods, got none")
    return f"{verb}({', '.join(name_of(mod) for mod in mask_mods)})"
