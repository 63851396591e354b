"""Top-n: the most important blocks of each query, as ascending block ids, chosen by bisection on float bits.

A program owns a few rows of importances (a row: one query of one KV group) in registers. Importances are sums of
exponentials, hence non-negative, and non-negative floats order as their bit patterns do: counting the keys at or above
a threshold finds the n-th largest without sorting, and a prefix sum over the chosen gives each its slot, ids ascending.
"""

from typing import Any

import torch
import triton
import triton.language as tl

NOTHING = tl.constexpr(0x7FFFFFFF)  # a threshold that no score reaches
NAN = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)  # not a candidate: below NaN, which loses to every number but stays selectable


@triton.jit
def visible_count(local, compress_block: tl.constexpr, compress_stride: tl.constexpr):
    """Compressed tokens that end at or before a position counted from its document's start (negative: none)."""
    count = (local - compress_block + 1) // compress_stride + 1
    return tl.where(local >= compress_block - 1, count, 0)


@triton.jit
def touched_blocks(count, ratio: tl.constexpr, overlap: tl.constexpr):
    """Leading selection blocks that share a token with the first `count` compressed tokens; the others score zero."""
    return tl.where(count > 0, (count + overlap - 2) // ratio + 1, 0)


@triton.jit
def split_tile(tile, rows, tq, R: tl.constexpr):
    """(batch * KV head, query tile) of a tile: the latest queries, whose work is largest, come first."""
    return tile % rows, (tq + R - 1) // R - 1 - tile // rows


@triton.jit
def _count_bits(words):
    """Set bits of each word, as every processor can count them, the interpreter too."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _keep(scores, current, touched, wanted, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
          S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """[ROWS, S / 32] words whose bits are the `wanted` best blocks that are not forced."""
    block = tl.arange(0, S)[None, :]
    # Whole groups of 16 are read, so that loads are wide; what lies past `touched` is replaced.
    score = tl.load(scores + block, mask=block < (touched + 15) // 16 * 16, other=0.0)
    keys = tl.where(score == score, score.to(tl.int32, bitcast=True), NAN)
    keys = tl.where(block < touched, keys, 0)
    keys = tl.where((block >= NUM_INITIAL) & (block <= current - NUM_LOCAL), keys, OUTSIDE)

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
def _choose(
    scores, slots, current, touched, NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the chosen blocks of ROWS rows, all of them below S, to `slots`; the other arguments are [ROWS, 1]."""
    initial = tl.minimum(current + 1, NUM_INITIAL)
    before_local = tl.maximum(current + 1 - NUM_LOCAL, initial)
    wanted = NUM_SELECTED - initial - (current + 1 - before_local)
    words = _keep(scores, current, touched, wanted, NUM_INITIAL, NUM_LOCAL, S, N, ROWS)

    first = tl.arange(0, S // 32)[None, :] * 32
    own = _below(current + 1, first)
    words |= own & (_below(initial, first) | ~_below(before_local, first))
    bits = _count_bits(words).to(tl.int32)
    total = tl.sum(bits, axis=1, keep_dims=True)
    slot = slots + (tl.cumsum(bits, axis=1) - bits)
    while tl.max(words) > 0:
        lowest = words & (~words + 1)
        # The exponent of a power of two is its bit's number.
        number = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(slot, first + number, mask=words > 0)
        slot += 1
        words ^= lowest
    free = tl.arange(0, N)[None, :]
    unused = (free >= total) & (free < NUM_SELECTED) & (current > -2)
    tl.store(slots + free, tl.full([ROWS, N], -1, tl.int32), mask=unused)


@triton.jit(do_not_specialize=["first_tile", "rows", "heads", "tq", "num_blocks", "num_tokens"])
def _top_blocks(
    importance, position, start, offset, indices, first_tile, rows, heads, tq, num_blocks, pitch, num_tokens,
    position_row, start_row, offset_row,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    bh, query_tile = split_tile(first_tile + tl.program_id(0) * ROWS // R, rows, tq, R)
    query = query_tile * R + row % R
    is_query = query < tq
    batch = (bh // heads).to(tl.int64)
    at = tl.load(position + batch * position_row + query, mask=is_query, other=-1)
    local = at - tl.load(start + batch * start_row + query, mask=is_query, other=0)
    # -1: a padding query, which has no candidates; -2: no query at all, and nothing is written.
    current = tl.where((at >= 0) & (local >= 0), tl.minimum(local // SELECT_BLOCK, num_blocks - 1), -1)
    current = tl.where(is_query, current, -2).to(tl.int32)
    count = visible_count(local, COMPRESS_BLOCK, COMPRESS_STRIDE)
    count = tl.minimum(count, num_tokens - tl.load(offset + batch * offset_row + query, mask=is_query, other=0))
    touched = touched_blocks(count, SELECT_BLOCK // COMPRESS_STRIDE, COMPRESS_BLOCK // COMPRESS_STRIDE)
    touched = tl.minimum(touched, current + 1).to(tl.int32)

    scores = importance + row.to(tl.int64) * pitch
    slots = indices + (bh.to(tl.int64) * tq + query) * NUM_SELECTED
    if S >= 512 and tl.max(current) < S // 2:
        _choose(scores, slots, current, touched, NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S // 2, N, ROWS)
    else:
        _choose(scores, slots, current, touched, NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S, N, ROWS)


def top_blocks(
    importance: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    tiles: range,
    queries_per_tile: int,
    num_blocks: int,
    num_tokens: int,
    **geometry: Any,
) -> None:
    """Write `indices` int32 [b, hk, tq, n] for the queries of `tiles`.

    `importance` float32 [tiles * queries_per_tile, at least s], in the order of `split_tile`: only blocks that share a
    token with a visible compressed token are used, the others score zero. `table` is (position, start, offset), each
    int64 [b or 1, tq]; `num_blocks` is s, `num_tokens` the compressed tokens, c; `geometry` NSAConfig's, in capitals.
    """
    batch, heads, tq, num_selected = indices.shape
    slots = max(16, triton.next_power_of_2(num_selected))
    size = max(slots, 32, triton.next_power_of_2(num_blocks))
    rows = min(queries_per_tile, max(1, 512 // size))
    row_strides = [0 if column.shape[0] == 1 else column.stride(0) for column in table]
    _top_blocks[(len(tiles) * queries_per_tile // rows,)](
        importance, *table, indices, tiles.start, batch * heads, heads, tq, num_blocks, importance.stride(0),
        num_tokens, *row_strides, NUM_SELECTED=num_selected, R=queries_per_tile, S=size, N=slots, ROWS=rows,
        num_warps=max(1, min(32, size // 1024)), **geometry,
    )  # fmt: skip
