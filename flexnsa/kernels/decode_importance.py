"""The importance of blocks in a decoding step: what tiles of compressed tokens leave, and its sum over the heads.

A tile's numbers are relative to a power of two of its own, so that no program waits for the whole softmax. Two numbers
of adjacent tiles belong to one block, the last of the first: they are joined where the heads are summed.
"""

import triton
import triton.language as tl

from flexnsa.kernels.decode_parts import NOTHING, load_totals, power_of_two, softmax_of_parts


@triton.jit
def by_block(weights, RESIDUES: tl.constexpr, OVERLAP: tl.constexpr):
    """What tokens that end in a block [rows, blocks, RESIDUES] add to its importance, and to that of the one before."""
    # Tokens that a compressed token shares with the block in which it ends, in strides.
    own = tl.minimum(tl.arange(0, RESIDUES)[None, None, :] + 1, OVERLAP)
    if OVERLAP == 2:
        here = tl.sum(tl.where(own == 2, weights * 2, 0.0), axis=2)
        before = tl.sum(tl.where(own == 1, weights, 0.0), axis=2)
    else:
        here = tl.sum(weights * own.to(tl.float32), axis=2)
        before = tl.sum(weights * (OVERLAP - own).to(tl.float32), axis=2)
    return here, before


@triton.jit
def joined(here, after, before, OVERLAP: tl.constexpr):
    """A block's importance of its own tokens, those of the next block, and those that it adds to the one before."""
    if OVERLAP == 2:
        # The one token in two blocks counts once in each, and is added to both in the same way.
        return here + (after + before)
    else:
        return here + after


@triton.jit
def store_shares(
    weights, peak, shares, ends, befores, afters, tile_peaks, next_peaks, lane_head, is_head, tile, pitch, tiles_pitch,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Leave what the tokens of a tile add to the importance of its blocks, over 2 ** `tile_peaks` [lanes, G, tiles].

    `shares` [lanes, G, pitch] hold it but for the last block of a tile, to which the next tile adds. That block's are
    [lanes, G, tiles]: `ends`, of the tokens that end in it; `befores`, what those add to the block before it; `afters`,
    what the next tile adds, over 2 ** `next_peaks`, that tile's own.
    """
    column = tl.arange(0, BLOCKS)[None, :]
    here, before = by_block(tl.reshape(weights, [HEADS, BLOCKS, RESIDUES]), RESIDUES, OVERLAP)
    at = lane_head * tiles_pitch + tile
    if OVERLAP > 1:
        last = tl.where((column == BLOCKS - 1) & is_head[:, None], 1, 0) > 0
        first = tl.where((column == 0) & is_head[:, None], tile, 0) > 0
        everywhere = at[:, None] + tl.zeros([1, BLOCKS], tl.int32)
        tl.store(ends + everywhere, here, mask=last)
        tl.store(befores + everywhere, before, mask=last)
        tl.store(afters + everywhere - 1, before, mask=first)
        tl.store(next_peaks + at - 1, peak, mask=tl.where(is_head, tile, 0) > 0)
        if BLOCKS > 1:
            index = tl.broadcast_to(tl.minimum(column + 1, BLOCKS - 1), [HEADS, BLOCKS])
            here = joined(here, tl.gather(before, index, 1), before, OVERLAP)
    tl.store(shares + lane_head[:, None] * pitch + tile * BLOCKS + column, here, mask=is_head[:, None])
    tl.store(tile_peaks + at, peak, mask=is_head)


@triton.jit
def importances(
    shares, ends, befores, afters, tile_peaks, next_peaks, cmp_peaks, cmp_totals, lane, first, tiles, used,
    cmp_programs, pitch, tiles_pitch,
    G: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr, CMP_MOST: tl.constexpr, TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """[TILES, BLOCKS] importances of the tiles from `first` on, as probabilities summed over the heads.

    CHUNK heads are read at a time. They are the middle axis: so a thread holds all of them of a block, and sums them
    without asking its neighbours.
    """
    tile, column = first + tl.arange(0, TILES), tl.arange(0, BLOCKS)
    sums = tl.zeros([TILES, BLOCKS], tl.float32)
    for begin in tl.static_range(0, G, CHUNK):
        head = begin + tl.arange(0, CHUNK)
        lane_head, is_head = lane * G + head, head < G
        mask = (tile < tiles)[:, None] & is_head[None, :]
        at = lane_head[None, :] * tiles_pitch + tile[:, None]
        peaks, totals = load_totals(cmp_peaks, cmp_totals, lane_head, is_head, used, cmp_programs, CMP_MOST)
        peak = tl.load(tile_peaks + at, mask=mask, other=NOTHING)
        if OVERLAP > 1:
            followed = mask & (tile + 1 < tiles)[:, None]
            next_peak = tl.load(next_peaks + at, mask=followed, other=NOTHING)
            after = tl.load(afters + at, mask=followed, other=0.0)
            before = tl.load(befores + at, mask=mask, other=0.0)
            end = tl.load(ends + at, mask=mask, other=0.0)
        # Whole tiles are read, and so the loads are wide.
        place = tile[:, None, None] * BLOCKS + column[None, None, :]
        found = tl.load(shares + (lane_head * pitch)[None, :, None] + place, mask=mask[:, :, None], other=0.0)
        top, total = softmax_of_parts(peaks, totals)
        inverse = 1.0 / tl.where(total != 0.0, total, 1.0)[None, :]
        # Scaled by 2 ** 64, which changes no order, so that blocks of probability 1e-45 still compare.
        top = top[None, :] - 64.0
        found *= (power_of_two(peak - top) * inverse)[:, :, None]
        if OVERLAP > 1:
            # The last block joins numbers of two tiles, over the larger of their peaks.
            common = tl.maximum(peak, next_peak)
            fade = power_of_two(peak - common)
            end = joined(end * fade, after * power_of_two(next_peak - common), before * fade, OVERLAP)
            end *= power_of_two(common - top) * inverse
            found = tl.where((column == BLOCKS - 1)[None, None, :], end[:, :, None], found)
        sums += tl.sum(found, axis=1)
    return sums
