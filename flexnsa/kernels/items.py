"""The runs of pairs that programs which own a block work off: what each must know, and in which order they start."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.inversion import Inversion
from flexnsa.kernels.launch import Kernel, ceil_div
from flexnsa.kernels.spans import Span

FIELDS = 8
"""Numbers that an item takes, those not used included: a sector of memory."""

_BLOCK = 1024


def list_items(found: Inversion, blocks: Blocks, span: Span, select_block: int, split: int) -> Tensor:
    """What a program must know of its item, in one place, the items of the most pairs first.

    Programs that start late are short then, and those of a launch end together.

    Args:
        found: the inversion.
        blocks: what was inverted.
        span: the lanes and the chunks, as the inversion was made with; so ``select_block`` and ``split``.

    Returns:
        int32 ``[lanes, chunks, max_items, FIELDS]``: where the item begins in ``pairs`` and ends, the first token of
        its block, the limit that no query of it sees a key at or past, and its number among the items of split bins,
        -1 where its bin has no other. Items that are not there are empty.
    """
    lanes, chunks, items = found.item_bin.shape
    tables, sizes = found[:5], (found.first_pair.shape[-1] - 1, items, split)
    keys, listed = torch.empty_like(found.item_bin), found.item_bin.new_empty(lanes, chunks, items, FIELDS)
    grid = (ceil_div(items, _BLOCK), chunks, lanes)
    _item_keys[grid](*tables[1:4], keys, *sizes, BLOCK=_BLOCK)
    order = keys.flatten().sort(stable=True).indices
    tq, n = blocks.base.shape[1:]
    _list_items[grid](
        *tables, order, blocks.base, blocks.reach, listed, *sizes, span.lane, span.query, tq, span.queries,
        SELECT=select_block, N=n, FIELDS=FIELDS, BLOCK=_BLOCK,
    )  # fmt: skip
    return listed


@triton.jit
def _item_pairs(first_pair, first_item, item_bin, segment, item, bins, items, split):
    """(bin, begin, end) of items; where there is no such item, 0 pairs of no bin."""
    owner = tl.load(item_bin + segment * items + item, mask=item < items, other=bins)
    mask = owner < bins
    at = segment * (bins + 1) + owner
    begin = tl.load(first_pair + at, mask=mask, other=0)
    begin += (item - tl.load(first_item + at, mask=mask, other=item)) * split
    return owner, begin, tl.minimum(begin + split, tl.load(first_pair + at + 1, mask=mask, other=0))


@Kernel
@triton.jit(do_not_specialize=["bins", "items", "split"])
def _item_keys(first_pair, first_item, item_bin, keys, bins, items, split, BLOCK: tl.constexpr):
    """The sort key of each item: its segment, then what it lacks of ``split`` pairs. Grid: (items, chunks, lanes)."""
    segment = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, begin, end = _item_pairs(first_pair, first_item, item_bin, segment, item, bins, items, split)
    key = segment * (split + 1) + split - (end - begin)
    tl.store(keys + segment * items + item, key.to(tl.int32), mask=item < items)


@Kernel
@triton.jit(do_not_specialize=["bins", "items", "split", "first_lane", "query", "tq", "chunk"])
def _list_items(
    pairs, first_pair, first_item, item_bin, first_split, order, base, reach, listed,
    bins, items, split, first_lane, query, tq, chunk,
    SELECT: tl.constexpr, N: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the items in their order. Grid: (items, chunks, lanes)."""
    segment = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = (first_lane + tl.program_id(2)).to(tl.int64) * tq + query + tl.program_id(1).to(tl.int64) * chunk
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < items
    item = (tl.load(order + segment * items + place, mask=inside, other=0) - segment * items).to(tl.int32)
    item = tl.where(inside, item, items)
    owner, begin, end = _item_pairs(first_pair, first_item, item_bin, segment, item, bins, items, split)
    some = begin < end
    pairs += segment * (chunk * N)
    token = tl.load(base + first * N + tl.load(pairs + begin, mask=some, other=0), mask=some, other=0)
    # Queries ascend within an item, hence the last one reaches furthest; what lies past that may be another document.
    last = tl.load(reach + first + tl.load(pairs + end - 1, mask=some, other=0) // N, mask=some, other=0)
    at = segment * (bins + 1) + owner
    item -= tl.load(first_item + at, mask=some, other=0)
    alone = tl.load(first_item + at + 1, mask=some, other=0) - tl.load(first_item + at, mask=some, other=0) == 1
    number = tl.where(alone, -1, tl.load(first_split + at, mask=some, other=0) + item)
    listed += (segment * items + place) * FIELDS
    tl.store(listed, begin, mask=inside)
    tl.store(listed + 1, end, mask=inside)
    tl.store(listed + 2, token, mask=inside)
    tl.store(listed + 3, tl.minimum(token + SELECT, last + 1), mask=inside)
    tl.store(listed + 4, number, mask=inside)
