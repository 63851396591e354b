"""The selection turned around: for each KV block the queries that chose it, in ascending order.

A *pair* is one query and one of its selected blocks. The kernels that own a KV block read the pairs of that block; the
pairs are numbered ``query * n + slot`` within a chunk of queries, so that what a pair produces has a place of its own
and sums are taken in the order of the slots, never by atomics.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.launch import Kernel, ceil_div
from flexnsa.kernels.spans import Span

_BLOCK = 1024


class Inversion(NamedTuple):
    """Pairs of each lane (one batch element and KV head) and chunk of queries, sorted by block, then by query.

    A *bin* is a block; an *item* is a run of at most ``split`` pairs of one bin, the work of one program. Bins of
    several items ("split" bins) are numbered too, and so are their items, which must be summed afterwards.

    Attributes:
        pairs: int32 ``[lanes, chunks, chunk * n]``, the pairs that see nothing last.
        first_pair: int32 ``[lanes, chunks, bins + 1]``, where each bin begins in ``pairs``. This table and the two like
            it hold nothing beyond the bin that follows the last one with pairs.
        first_item: int32 ``[lanes, chunks, bins + 1]``, the number of items before each bin.
        item_bin: int32 ``[lanes, chunks, max_items]``, the bin of each item, ``bins`` past the last.
        first_split: int32 ``[lanes, chunks, bins + 1]``, the number of items of split bins before each bin.
        split_bin: int32 ``[lanes, chunks, max_split_bins]``, the split bins, ``bins`` past the last.
    """

    pairs: Tensor
    first_pair: Tensor
    first_item: Tensor
    item_bin: Tensor
    first_split: Tensor
    split_bin: Tensor


def invert_selection(
    base: Tensor, rank: Tensor | None, span: Span, num_keys: int, select_block: int, split: int
) -> Inversion:
    """Sort the pairs of a span's lanes and chunks by block.

    Args:
        base: int32 ``[lanes, tq, n]``, first tokens of the selected blocks, -1 for none.
        rank: int32 ``[lanes, tq]`` or None, as in ``Blocks``. Blocks of two documents can share
            ``base // select_block``; adding the rank within the chunk keeps every bin one block.
        span: the lanes and the chunks.
        num_keys: tk.
        select_block: tokens of a block.
        split: most pairs of an item.

    Returns:
        The inversion, of O(chunks * chunk * n) memory.
    """
    tq, n = base.shape[1:]
    lanes, chunks, per_chunk = span.lanes, span.chunks, span.queries * n
    bins = ceil_div(num_keys, select_block) + (1 if rank is None else span.queries)
    keys = base.new_empty(lanes, chunks, per_chunk)
    programs = ceil_div(per_chunk, _BLOCK)
    _pair_keys[(programs, chunks, lanes)](
        base, base if rank is None else rank, keys, span.lane, span.query, tq, span.queries, bins,
        SELECT=select_block, N=n, BLOCK=_BLOCK, PACKED=rank is not None,
    )  # fmt: skip
    ordered, order = keys.flatten().sort(stable=True)
    first_pair, first_item, first_split = (base.new_empty(lanes, chunks, bins + 1) for _ in range(3))
    item_bin = base.new_empty(lanes, chunks, min(bins, per_chunk) + per_chunk // split)
    split_bin = base.new_empty(lanes, chunks, max(1, per_chunk // (split + 1)))
    pairs = keys  # sorted, hence free
    _tabulate[(1 + programs, chunks, lanes)](
        ordered, order, pairs, first_pair, first_item, item_bin, first_split, split_bin,
        per_chunk, 1 << (per_chunk.bit_length() - 1), bins, item_bin.shape[-1], split_bin.shape[-1], split,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return Inversion(pairs, first_pair, first_item, item_bin, first_split, split_bin)


@Kernel
@triton.jit(do_not_specialize=["first_lane", "query", "tq", "chunk", "bins"])
def _pair_keys(
    base, rank, keys, first_lane, query, tq, chunk, bins,
    SELECT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sort key of each pair: its segment (lane and chunk), then its bin. Grid: (pairs, chunks, lanes)."""
    segment = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lane = (first_lane + tl.program_id(2)).to(tl.int64)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = query + tl.program_id(1).to(tl.int64) * chunk
    token = first + pair // N
    inside = (pair < chunk * N) & (token < tq)
    begin = tl.load(base + (lane * tq + token) * N + pair % N, mask=inside, other=-1)
    key = (begin + SELECT - 1) // SELECT
    if PACKED:
        earlier = tl.load(rank + lane * tq + tl.minimum(first, tq - 1))
        key += tl.load(rank + lane * tq + token, mask=inside, other=0) - earlier
    key = tl.where((begin >= 0) & (key >= 0) & (key < bins), key, bins)
    tl.store(keys + segment * (chunk * N) + pair, (segment * (bins + 1) + key).to(tl.int32), mask=pair < chunk * N)


@Kernel
@triton.jit(do_not_specialize=["per_chunk", "half", "bins", "items", "split_bins", "split"])
def _tabulate(
    ordered, order, pairs, first_pair, first_item, item_bin, first_split, split_bin,
    per_chunk, half, bins, items, split_bins, split, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything about a segment's bins, by its first program; its pairs in their order, by the others.

    ``half`` is the largest power of two up to ``per_chunk``. Grid: (1 + pairs, chunks, lanes).
    """
    segment = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if tl.program_id(0) == 0:
        first_bin = segment * (bins + 1)
        _tabulate_bins(
            ordered + segment * per_chunk, first_pair + first_bin, first_item + first_bin, item_bin + segment * items,
            first_split + first_bin, split_bin + segment * split_bins, first_bin.to(tl.int32),
            per_chunk, half, bins, items, split_bins, split, BLOCK,
        )  # fmt: skip
    else:
        place = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        at = segment * per_chunk + place
        inside = place < per_chunk
        pair = tl.load(order + at, mask=inside, other=0) - segment * per_chunk
        tl.store(pairs + at, pair.to(tl.int32), mask=inside)


@triton.jit
def _tabulate_bins(
    ordered, first_pair, first_item, item_bin, first_split, split_bin, first_key,
    per_chunk, half, bins, items, split_bins, split, BLOCK: tl.constexpr,
):  # fmt: skip
    end, _ = _pairs_before(ordered, first_key + bins, per_chunk, half)
    place = tl.arange(0, BLOCK)
    nothing = end * 0
    begin, first_bin, item, split_item, split_number = nothing, nothing, nothing, nothing, nothing
    while begin < end:
        owner = first_bin + place
        first, next_first = _pairs_before(ordered, first_key + tl.minimum(owner, bins), per_chunk, half)
        parts = tl.where(owner < bins, (next_first - first + split - 1) // split, 0)
        several = (parts > 1).to(tl.int32)
        part = item + tl.cumsum(parts, axis=0) - parts
        tl.store(first_pair + owner, first, mask=owner <= bins)
        tl.store(first_item + owner, part, mask=owner <= bins)
        split_part = split_item + tl.cumsum(parts * several, axis=0) - parts * several
        tl.store(first_split + owner, split_part, mask=owner <= bins)
        number = split_number + tl.cumsum(several, axis=0) - several
        tl.store(split_bin + number, owner, mask=several > 0)
        for piece in range(tl.max(parts, axis=0)):
            tl.store(item_bin + part + piece, owner, mask=piece < parts)
        begin = tl.max(tl.where(owner < bins, next_first, 0), axis=0)
        first_bin += BLOCK
        item += tl.sum(parts, axis=0)
        split_item += tl.sum(parts * several, axis=0)
        split_number += tl.sum(several, axis=0)
    if first_bin <= bins:
        tl.store(first_pair + first_bin, end)
        tl.store(first_item + first_bin, item)
        tl.store(first_split + first_bin, split_item)
    for first in range(item, items, BLOCK):
        tl.store(item_bin + first + place, bins, mask=first + place < items)
    for first in range(split_number, split_bins, BLOCK):
        tl.store(split_bin + first + place, bins, mask=first + place < split_bins)


@triton.jit
def _pairs_before(ordered, key, per_chunk, half):
    """How many of a segment's sorted keys are below ``key``, and how many up to it."""
    below, up_to = key * 0, key * 0
    step = half
    while step > 0:
        tried = below + step
        found = tl.load(ordered + tried - 1, mask=tried <= per_chunk, other=0x7FFFFFFF)
        below = tl.where(found < key, tried, below)
        tried = up_to + step
        found = tl.load(ordered + tried - 1, mask=tried <= per_chunk, other=0x7FFFFFFF)
        up_to = tl.where(found <= key, tried, up_to)
        step //= 2
    return below, up_to
