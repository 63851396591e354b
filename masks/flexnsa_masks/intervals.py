"""Intervals: masks that let each query see one run of keys, and say which.

A mask mod may carry its *interval*: for each batch row and query the first and the last key that it sees, whatever the
head. Engines that cannot evaluate a mask on every pair, such as flexnsa's kernels, need no more than that. Like tile
geometry it survives `and_masks`, and `or_masks` where every mask begins at the first key. It is a promise: flexnsa
compares it with the mask mod for a few queries, on a CPU and inside of its `debug()`.

Source: NSA's own patterns are of this kind (Yuan et al. 2025, arXiv 2502.11089, section 3), as are prefixes and packed
documents.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flexnsa_masks.geometry import MaskMod

Bound = Callable[[Tensor, Tensor], Tensor]
"""`(b, q_idx) -> key index`, elementwise; the result broadcasts with `b` and `q_idx`."""


class Interval(NamedTuple):
    """The keys `first(b, q_idx) .. last(b, q_idx)`, both included; none where last < first.

    Attributes:
        last: the last key that a query sees.
        first: the first one; None where that is key 0 for all.
    """

    last: Bound
    first: Bound | None = None


def with_interval(mask_mod: MaskMod, last: Bound, first: Bound | None = None) -> MaskMod:
    """Say that a mask mod is an interval; returns the same function. `mask_mod.interval = Interval(...)` does as well.

    >>> import torch
    >>> from flexnsa_masks import with_interval
    >>> ends = torch.tensor([3, 3, 3, 3, 7, 7, 7, 7])  # last token of each token's sentence
    >>> def whole_sentences(b, h, q_idx, kv_idx):
    ...     return kv_idx <= ends[q_idx]
    >>> mask_mod = with_interval(whole_sentences, last=lambda b, q_idx: ends[q_idx])
    """
    mod: Any = mask_mod
    mod.interval = Interval(last, first)
    return mask_mod


def interval_of(mask_mod: MaskMod) -> Interval | None:
    """The interval that a mask mod carries, or None."""
    return cast("Interval | None", getattr(mask_mod, "interval", None))


def intersection(intervals: Sequence[Interval | None]) -> Interval | None:
    """Of masks that all have to see a key."""
    known = [interval for interval in intervals if interval is not None]
    return reduce(_both, known) if len(known) == len(intervals) else None


def union(intervals: Sequence[Interval | None]) -> Interval | None:
    """Of masks one of which has to see a key: an interval where all begin at key 0."""
    known = [interval for interval in intervals if interval is not None and interval.first is None]
    return reduce(_either, known) if len(known) == len(intervals) else None


def _both(a: Interval, b: Interval) -> Interval:
    firsts = [first for first in (a.first, b.first) if first is not None]
    return Interval(_join(torch.minimum, a.last, b.last), reduce(_larger, firsts) if firsts else None)


def _either(a: Interval, b: Interval) -> Interval:
    return Interval(_join(torch.maximum, a.last, b.last))


def _larger(a: Bound, b: Bound) -> Bound:
    return _join(torch.maximum, a, b)


def _join(pick: Callable[[Tensor, Tensor], Tensor], one: Bound, other: Bound) -> Bound:
    return lambda b, q_idx: pick(one(b, q_idx), other(b, q_idx))
