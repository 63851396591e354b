"""Top-n: the most important blocks of each query, as ascending block ids, chosen by bisection on float bits.

A program owns a few rows of importances (a row: one query of one KV group) in registers. Importances are sums of
exponentials, hence non-negative, and non-negative floats order as their bit patterns do: counting the keys at or above
a threshold finds the n-th largest without sorting, and a prefix sum over the chosen gives each its slot, ids ascending.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flexnsa.kernels.launch import Kernel, next_power


class Table(NamedTuple):
    """Where each query stands and what it sees, int64 [b or 1, tq] with unit stride along tq.

    Attributes:
        position: absolute position, -1 for padding.
        start: first token of the query's document.
        offset: first compressed token of that document.
        low: first token that the query may see, None for `start`.
        high: last token that it may see, None for `position`.
    """

    position: torch.Tensor
    start: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor | None

    @property
    def masked(self) -> bool:
        """Whether kernels read `low` and `high`."""
        return self.low is not None

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """What kernels are given; they do not read what stands in for None."""
        return tuple(self.position if column is None else column for column in self)

    @property
    def strides(self) -> list[int]:
        """From one row to the next, of each column."""
        return [0 if column.shape[0] == 1 else column.stride(0) for column in self.columns]


NOTHING = tl.constexpr(0x7FFFFFFF)  # a threshold that no score reaches
NAN = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)  # not a candidate: below NaN, which loses to every number but stays selectable


@triton.jit
def visible_count(local, compress_block: tl.constexpr, compress_stride: tl.constexpr):
    """Compressed tokens that end at or before a position counted from its document's start (negative: none)."""
    count = (local - compress_block + 1) // compress_stride + 1
    return tl.where(local >= compress_block - 1, count, 0)


@triton.jit
def hidden_count(local, compress_stride: tl.constexpr):
    """Compressed tokens that begin before a token counted from its document's start (negative: none)."""
    return tl.maximum((local + compress_stride - 1) // compress_stride, 0)


@triton.jit
def touched_blocks(count, ratio: tl.constexpr, overlap: tl.constexpr):
    """Leading selection blocks that share a token with the first `count` compressed tokens; the others score zero."""
    return tl.where(count > 0, (count + overlap - 2) // ratio + 1, 0)


@triton.jit
def split_tile(tile, rows, tq, R: tl.constexpr):
    """(batch * KV head, query tile) of a tile: the latest queries, whose work is largest, come first."""
    return tile % rows, (tq + R - 1) // R - 1 - tile // rows


@triton.jit
def count_bits(words):
    """Set bits of each word, as every processor can count them, the interpreter too."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _keep(
    scores, lowest, highest, own, touched, wanted, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, S / 32] words whose bits are the `wanted` best candidates that are not forced."""
    block = tl.arange(0, S)[None, :]
    keys = tl.where(scores == scores, scores.to(tl.int32, bitcast=True), NAN)
    keys = tl.where(block < touched, keys, 0)
    if MASKED:
        free = (block >= tl.maximum(lowest, NUM_INITIAL)) & (block <= highest)
        free = free & ((block <= own - NUM_LOCAL) | (block > own))
    else:
        free = (block >= NUM_INITIAL) & (block <= highest - NUM_LOCAL)
    keys = tl.where(free, keys, OUTSIDE)

    # Each of N >= n columns has its maximum at or above the least of these maxima, so at least n keys are.
    low = tl.min(tl.max(tl.reshape(keys, [ROWS, S // N, N]), axis=1), axis=1, keep_dims=True)
    low = tl.where(wanted > 0, tl.maximum(low, NAN), NOTHING)
    high = tl.max(keys, axis=1, keep_dims=True) + 1
    found = tl.sum((keys >= low).to(tl.int32), axis=1, keep_dims=True)
    while tl.max(tl.minimum(found - wanted, high - low - 1)) > 0:
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle).to(tl.int32), axis=1, keep_dims=True)
        enough = (count >= wanted) & (wanted > 0)
        low = tl.where(enough, middle, low)
        found = tl.where(enough, count, found)
        high = tl.where(enough, high, middle)
    surplus = tl.maximum(found - wanted, 0)
    if tl.max(surplus) > 0:
        # The last of the keys are tied, and the lowest blocks among the tied stay.
        tied = (keys == low).to(tl.int32)
        keys = tl.where((tied > 0) & (tl.cumsum(tied, axis=1, reverse=True) <= surplus), OUTSIDE, keys)
    bit = tl.full([1, S], 1, tl.uint32) << (block % 32).to(tl.uint32)
    bits = tl.where(keys >= low, bit, 0)
    return tl.sum(tl.reshape(bits, [ROWS, S // 32, 32]), axis=2)


@triton.jit
def _below(count, first):
    """Words with the bits of the blocks `first + bit` that lie below `count`."""
    ones = tl.minimum(tl.maximum(count - first, 0), 32).to(tl.uint64)
    return ((tl.full(ones.shape, 1, tl.uint64) << ones) - 1).to(tl.uint32)


@triton.jit
def load_scores(rows, touched, S: tl.constexpr):
    """[ROWS, S] importances of the rows that begin at `rows` [ROWS, 1]; from block `touched` on they are anything."""
    block = tl.arange(0, S)[None, :]
    # Whole groups of 16 are read, so that loads are wide.
    return tl.load(rows + block, mask=block < (touched + 15) // 16 * 16, other=0.0)


@triton.jit
def choose_among(
    scores, slots, lowest, highest, own, touched, NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr,
    NUM_LOCAL: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the chosen of the candidates `lowest .. highest` of ROWS rows, all of them below S, to `slots`.

    `scores` are [ROWS, S] and count as 0 from block `touched` on. The other arguments are [ROWS, 1]; `own` is the
    block that the query stands in. Without MASKED, `lowest` is 0 and `highest` is `own`.
    """
    first = tl.arange(0, S // 32)[None, :] * 32
    forced = _below(highest + 1, first)
    if MASKED:
        local = _below(own + 1, first) & ~_below(tl.maximum(own + 1 - NUM_LOCAL, 0), first)
        forced = forced & ~_below(lowest, first) & (_below(NUM_INITIAL, first) | local)
        wanted = NUM_SELECTED - tl.sum(count_bits(forced).to(tl.int32), axis=1, keep_dims=True)
    else:
        initial = tl.minimum(highest + 1, NUM_INITIAL)
        before_local = tl.maximum(highest + 1 - NUM_LOCAL, initial)
        forced = forced & (_below(initial, first) | ~_below(before_local, first))
        wanted = NUM_SELECTED - initial - (highest + 1 - before_local)
    words = forced | _keep(scores, lowest, highest, own, touched, wanted, NUM_INITIAL, NUM_LOCAL, S, N, ROWS, MASKED)
    bits = count_bits(words).to(tl.int32)
    total = tl.sum(bits, axis=1, keep_dims=True)
    slot = slots + (tl.cumsum(bits, axis=1) - bits)
    while tl.max(words) > 0:
        bit = words & (~words + 1)
        # The exponent of a power of two is its bit's number.
        number = (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(slot, first + number, mask=words > 0)
        slot += 1
        words ^= bit
    free = tl.arange(0, N)[None, :]
    unused = (free >= total) & (free < NUM_SELECTED) & (highest > -2)
    tl.store(slots + free, tl.full([ROWS, N], -1, tl.int32), mask=unused)


@Kernel
@triton.jit(do_not_specialize=["first_tile", "rows", "heads", "tq", "num_blocks", "num_tokens"])
def _top_blocks(
    importance, position, start, offset, low, high, indices,
    first_tile, rows, heads, tq, num_blocks, pitch, num_tokens,
    position_row, start_row, offset_row, low_row, high_row,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    bh, query_tile = split_tile(first_tile + tl.program_id(0) * ROWS // R, rows, tq, R)
    query = query_tile * R + row % R
    is_query = query < tq
    batch = (bh // heads).to(tl.int64)
    at = tl.load(position + batch * position_row + query, mask=is_query, other=-1)
    origin = tl.load(start + batch * start_row + query, mask=is_query, other=0)
    last = at
    seeing = at >= origin
    if MASKED:
        first = tl.load(low + batch * low_row + query, mask=is_query, other=0)
        last = tl.load(high + batch * high_row + query, mask=is_query, other=-1)
        seeing = (at >= 0) & (first <= last) & (last >= origin)
    # -1: a query that sees nothing, which has no candidates; -2: no query at all, and nothing is written.
    highest = tl.where(seeing & (at >= 0), tl.minimum((last - origin) // SELECT_BLOCK, num_blocks - 1), -1)
    highest = tl.where(is_query, highest, -2).to(tl.int32)
    count = visible_count(last - origin, COMPRESS_BLOCK, COMPRESS_STRIDE)
    count = tl.minimum(count, num_tokens - tl.load(offset + batch * offset_row + query, mask=is_query, other=0))
    touched = touched_blocks(count, SELECT_BLOCK // COMPRESS_STRIDE, COMPRESS_BLOCK // COMPRESS_STRIDE)
    touched = tl.minimum(touched, highest + 1).to(tl.int32)
    lowest, own = 0, highest
    if MASKED:
        lowest = tl.minimum(tl.maximum(first - origin, 0) // SELECT_BLOCK, num_blocks).to(tl.int32)
        own = tl.minimum(tl.maximum(at - origin, 0) // SELECT_BLOCK, num_blocks - 1).to(tl.int32)

    scores = importance + row.to(tl.int64) * pitch
    slots = indices + (bh.to(tl.int64) * tq + query) * NUM_SELECTED
    if S >= 512 and tl.max(highest) < S // 2:
        choose_among(load_scores(scores, touched, S // 2), slots, lowest, highest, own, touched,
                     NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S // 2, N, ROWS, MASKED)  # fmt: skip
    else:
        choose_among(load_scores(scores, touched, S), slots, lowest, highest, own, touched,
                     NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S, N, ROWS, MASKED)  # fmt: skip


def top_blocks(
    importance: torch.Tensor,
    table: Table,
    indices: torch.Tensor,
    tiles: range,
    queries_per_tile: int,
    num_blocks: int,
    num_tokens: int,
    **geometry: Any,
) -> None:
    """Write `indices` int32 [b, hk, tq, n] for the queries of `tiles`.

    `importance` float32 [tiles * queries_per_tile, at least s], in the order of `split_tile`: only blocks that share a
    token with a visible compressed token are used, the others score zero. `num_blocks` is s, `num_tokens` the
    compressed tokens, c; `geometry` NSAConfig's, in capitals.
    """
    batch, heads, tq, num_selected = indices.shape
    slots = max(16, next_power(num_selected))
    size = max(slots, 32, next_power(num_blocks))
    rows = min(queries_per_tile, max(1, 512 // size))
    _top_blocks[(len(tiles) * queries_per_tile // rows,)](
        importance, *table.columns, indices, tiles.start, batch * heads, heads, tq, num_blocks, importance.stride(0),
        num_tokens, *table.strides, NUM_SELECTED=num_selected, R=queries_per_tile, S=size, N=slots, ROWS=rows,
        MASKED=table.masked, num_warps=max(1, min(32, size // 1024)), **geometry,
    )  # fmt: skip
