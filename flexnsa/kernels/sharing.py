"""What adjacent queries have in common: the blocks that a tile of them visits together, and what is left to each.

Neighbours often select alike. A block that enough queries of a tile chose is worth one visit by the whole tile, with
membership masked per query; the others are left to the queries themselves. All of it is decided on the device, tile by
tile, so that nothing waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.launch import Kernel, ceil_div, next_power

NO_LIMIT = tl.constexpr((1 << 31) - 1)
NEVER = 33
"""More queries than a tile has."""


class Sharing(NamedTuple):
    """The common blocks of each tile and the remaining blocks of each query.

    Attributes:
        base: int32 ``[lanes, tiles, most]``, first token of each common block, in the order of their first choosers;
            those that all of the tile see whole come first, if they are asked for.
        members: int8, or int32 for tiles of 8 queries or more, ``[lanes, tiles, most]``, bit r set where the tile's
            query r chose it.
        slots: int64 ``[lanes, tiles, most]``, byte r its place in the list of query r, 255 for none.
        common: int32 ``[lanes, tiles]``, number of common blocks.
        whole: int32 ``[lanes, tiles]``, how many of them all of the tile see whole.
        rest: int32 ``[lanes, tq, n]``, first tokens of each query's other blocks, left-packed, padded with -1.
        rest_count: int32 ``[lanes, tq]``, number of those.

    What nobody asked for is empty: ``slots``, or ``members``; ``whole``; and what is about the rest.
    """

    base: Tensor
    members: Tensor
    slots: Tensor
    common: Tensor
    whole: Tensor
    rest: Tensor
    rest_count: Tensor


def share_selection(
    base: Tensor, queries: int, least: int, worth: float, *, otherwise: int = NEVER, even: bool = False,
    slots: bool = False, rest: bool = False, blocks: Blocks | None = None, select_block: int = 1,
) -> Sharing:  # fmt: skip
    """Divide a selection into what a tile of ``queries`` adjacent queries visits together, and the rest.

    A tile takes the blocks that ``least`` or more of its queries chose, if they number at most ``worth`` times the
    choices that they stand for, else those that ``otherwise`` or more chose.

    ``base`` int32 [lanes, tq, n] holds first tokens, -1 for none; ``queries`` is at most 32, at most 8 with ``slots``.
    With ``blocks``, of which it is the base, those that all of a tile see whole come first. With ``even`` as well, a
    tile leaves as many blocks to one of its queries as to another, and only such as no other query of it chose and that
    one sees whole; a last tile that is not full leaves none.
    """
    lanes, tq, n = base.shape
    tiles = ceil_div(tq, queries)
    most = queries * n if even else max(1, queries * n // least)
    common, count, nothing = base.new_empty(lanes, tiles, most), base.new_empty(lanes, tiles), base.new_empty(0)
    members = nothing if slots else torch.empty_like(common, dtype=torch.int8 if queries < 8 else torch.int32)
    places = base.new_empty(lanes, tiles, most, dtype=torch.int64) if slots else nothing
    left, left_count = (torch.empty_like(base), base.new_empty(lanes, tq)) if rest else (nothing, nothing)
    seen, low = (blocks.seen, blocks.low) if blocks else (nothing, nothing)
    whole = torch.empty_like(count) if blocks else nothing
    _divide[(tiles, lanes)](
        base, seen, low, common, members, places, count, whole, left, left_count, tq, most, worth,
        N=n, N_PAD=next_power(n), LEAST=least, OTHERWISE=otherwise, SELECT=select_block,
        QUERIES=queries, QUERIES_PAD=next_power(queries), SLOTS=slots, REST=rest, WHOLE=blocks is not None, EVEN=even,
        MASKED=blocks is not None and blocks.masked, num_warps=1,
    )  # fmt: skip
    return Sharing(common, members, places, count, whole, left, left_count)


@Kernel
@triton.jit(do_not_specialize=["tq", "most"])
def _divide(
    base, seen, low, common, members, slots, count, whole, rest, rest_count, tq, most, worth,
    N: tl.constexpr, N_PAD: tl.constexpr, LEAST: tl.constexpr, OTHERWISE: tl.constexpr, SELECT: tl.constexpr,
    QUERIES: tl.constexpr, QUERIES_PAD: tl.constexpr, SLOTS: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    tile, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile_at = lane * tl.num_programs(0) + tile
    first = lane * tq + tile * QUERIES
    members_here = tl.minimum(QUERIES, tq - tile * QUERIES)
    entry = tl.arange(0, QUERIES_PAD * N_PAD)
    member, slot = entry // N_PAD, entry % N_PAD
    inside = (slot < N) & (member < members_here)
    mine = tl.load(base + (first + member) * N + slot, mask=inside, other=-1)
    bits = tl.zeros([QUERIES_PAD * N_PAD], tl.int32)
    places = tl.zeros([QUERIES_PAD * N_PAD], tl.int64)
    number = tl.zeros([QUERIES_PAD * N_PAD], tl.int32)
    lowest = tl.full([QUERIES_PAD * N_PAD], 32, tl.int32)
    for other in range(members_here):
        found = tl.full([QUERIES_PAD * N_PAD], 255, tl.int32)
        for other_slot in tl.static_range(N):
            found = tl.where(mine == tl.load(base + (first + other) * N + other_slot), other_slot, found)
        chosen = (found != 255).to(tl.int32)
        if SLOTS:
            places |= found.to(tl.int64) << (8 * other)
        bits |= chosen << other
        number += chosen
        lowest = tl.where((chosen != 0) & (lowest == 32), other, lowest)
    taken = mine >= 0
    common_here = taken & (number >= LEAST)
    leads = taken & (lowest == member)
    blocks, choices = tl.sum((common_here & leads).to(tl.int32), axis=0), tl.sum(common_here.to(tl.int32), axis=0)
    least = tl.where(blocks <= worth * choices, LEAST, OTHERWISE)
    alone = taken & (number < least)
    if WHOLE:
        last = tl.load(seen + first + member, mask=inside, other=-1)
        start = tl.zeros([QUERIES_PAD * N_PAD], tl.int32)
        if MASKED:
            start = tl.load(low + first + member, mask=inside & (last >= 0), other=0)
        if EVEN:
            alone = alone & (number == 1) & (mine >= start) & (mine + (SELECT - 1) <= last)
            own = tl.reshape(alone.to(tl.int32), [QUERIES_PAD, N_PAD])
            counts = tl.where(tl.arange(0, QUERIES_PAD) < QUERIES, tl.sum(own, axis=1), N)
            alone = alone & (tl.reshape(tl.cumsum(own, axis=1), [QUERIES_PAD * N_PAD]) <= tl.min(counts, axis=0))
    leads = leads & ~alone
    place = tl.cumsum(leads.to(tl.int32), axis=0) - 1
    if WHOLE:
        full = leads & (mine + (SELECT - 1) <= tl.min(tl.where(last < 0, NO_LIMIT, last), axis=0))
        full = full & (mine >= tl.max(start, axis=0))
        before = tl.cumsum(full.to(tl.int32), axis=0)
        fulls = tl.sum(full.to(tl.int32), axis=0)
        place = tl.where(full, before - 1, place + fulls - before)
        tl.store(whole + tile_at, tl.minimum(fulls, most))
    # A list that names a block twice could overflow; what does not fit is left to the query.
    leads = leads & (place < most)
    tl.store(common + tile_at * most + place, mine, mask=leads)
    tl.store(count + tile_at, tl.minimum(tl.sum(leads.to(tl.int32), axis=0), most))
    if SLOTS:
        tl.store(slots + tile_at * most + place, places, mask=leads)
    else:
        tl.store(members + tile_at * most + place, bits, mask=leads)
    if not REST:
        return
    left = tl.reshape(alone.to(tl.int32), [QUERIES_PAD, N_PAD])
    place = tl.cumsum(left, axis=1) - left
    total = tl.sum(left, axis=1)
    row, column = tl.arange(0, QUERIES_PAD), tl.arange(0, N_PAD)
    inside = (row < members_here)[:, None] & (column < N)[None, :]
    rest_at = rest + (first + row)[:, None] * N
    # Stores of one place never race: the padding begins where the packed entries end.
    tl.store(rest_at + place, tl.reshape(mine, [QUERIES_PAD, N_PAD]), mask=inside & (left != 0))
    tl.store(rest_at + column[None, :], -1, mask=inside & (column[None, :] >= total[:, None]))
    tl.store(rest_count + first + row, total, mask=row < members_here)
