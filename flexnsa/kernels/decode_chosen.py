"""The selected branch of a decoding step of few lanes: every program chooses by itself, then attends to its blocks.

Few lanes leave most of a device idle, and a step is a chain of waits. So the programs of a lane all sum the same
importances and choose the same blocks, rather than wait for one that does.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_importance import importances
from flexnsa.kernels.decode_parts import (
    attend_blocks,
    compressed_blocks,
    load_queries,
    locate,
    num_compressed,
    sequence_length,
    share,
    store_part,
)
from flexnsa.kernels.decode_static import SIZES, mix_static
from flexnsa.kernels.topn import NAN, NOTHING, OUTSIDE, count_bits


@triton.jit
def _choose(
    scores, current, touched, NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[S] whether a block is selected by its score, which counts as 0 from block `touched` on.

    As `topn.choose_among` does it, for one row, with two thresholds a round: their counts share a word.
    """
    block = tl.arange(0, S)
    initial = tl.minimum(current + 1, NUM_INITIAL)
    before_local = tl.maximum(current + 1 - NUM_LOCAL, initial)
    wanted = NUM_SELECTED - initial - (current + 1 - before_local)
    keys = tl.where(scores == scores, scores.to(tl.int32, bitcast=True), NAN)
    keys = tl.where(block < touched, keys, 0)
    keys = tl.where((block >= initial) & (block < before_local), keys, OUTSIDE)

    # Each of N >= n columns has its maximum at or above the least of these maxima, so at least n keys are.
    tops = tl.max(tl.reshape(keys, [S // N, N]), axis=0)
    low, high = tl.maximum(tl.min(tops, axis=0), NAN), tl.max(tops, axis=0) + 1
    found = S
    if wanted <= 0:
        low, found = NOTHING, wanted
    elif before_local - initial <= wanted:
        low, found = NAN, wanted
    while (found != wanted) & (high - low > 1):
        third = tl.maximum((high - low) // 3, 1)
        lower, upper = low + third, tl.minimum(low + 2 * third, high - 1)
        counts = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16), axis=0)
        if (counts >> 16) >= wanted:
            low, found = upper, counts >> 16
        elif (counts & 0xFFFF) >= wanted:
            low, found, high = lower, counts & 0xFFFF, upper
        else:
            high = lower
    if found != wanted:
        # The last of the keys are tied, and the lowest blocks among the tied stay.
        surplus = tl.sum((keys >= low).to(tl.int32), axis=0) - wanted
        tied = (keys == low).to(tl.int32)
        keys = tl.where((tied > 0) & (tl.cumsum(tied, axis=0, reverse=True) <= surplus), OUTSIDE, keys)
    forced = (block < initial) | ((block >= before_local) & (block <= current))
    return forced | (keys >= low)


@triton.jit
def _numbers(selected, nth, S: tl.constexpr):
    """Numbers of the `nth` selected blocks, counted from 0; anything past the last."""
    block, index = tl.arange(0, S), tl.arange(0, S // 32)
    bit = tl.full([S], 1, tl.uint32) << (block % 32).to(tl.uint32)
    words = tl.sum(tl.reshape(tl.where(selected, bit, 0), [S // 32, 32]), axis=1)
    counts = count_bits(words).to(tl.int32)
    rest = nth[:, None] - (tl.cumsum(counts, axis=0) - counts)[None, :]
    # One sum finds the word, its place, and which of its bits is meant.
    packed = words.to(tl.int64)[None, :] | ((index[None, :] * 32 + rest).to(tl.int64) << 32)
    packed = tl.sum(tl.where((rest >= 0) & (rest < counts[None, :]), packed, 0), axis=1)[:, None]
    word, rest = (packed & 0xFFFFFFFF).to(tl.uint32), (packed >> 32).to(tl.int32)
    bit = tl.arange(0, 32)[None, :].to(tl.uint32)
    lower = (tl.full([1, 32], 1, tl.uint32) << bit) - 1
    meant = (((word >> bit) & 1) > 0) & (count_bits(word & lower).to(tl.int32) == rest % 32)
    return tl.sum(tl.where(meant, rest // 32 * 32 + bit.to(tl.int32), 0), axis=1)


@triton.jit(do_not_specialize=SIZES)
def attend_chosen(
    q, k, v, table, lengths, cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals,
    shares, ends, befores, afters, tile_peaks, next_peaks, indices, slc_part, slc_peaks, slc_totals, mixed, gates,
    scale_log2, q_batch, q_head, q_dim, k_page, k_head, k_place, k_dim, v_page, v_head, v_place, v_dim, table_row,
    num_pages, gate_batch, gate_head, gate_branch, heads, capacity, cmp_programs, win_programs, slc_programs,
    pitch, tiles_pitch,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, BLOCKS: tl.constexpr, ALL_TILES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
    CMP_MOST: tl.constexpr, WIN_MOST: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    SLC_STAGES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Choose, and attend to a run of the selected blocks, OWN at most; other programs merge the static branches."""
    program, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
    OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    S: tl.constexpr = ALL_TILES * BLOCKS
    count = num_compressed(length, COMPRESS_BLOCK, COMPRESS_STRIDE)
    touched = compressed_blocks(count, RATIO, OVERLAP)
    tiles = (touched + BLOCKS - 1) // BLOCKS
    cmp_used = tl.minimum(tiles, cmp_programs)
    if program < slc_programs:
        chosen = tl.minimum((length + SELECT_BLOCK - 1) // SELECT_BLOCK, NUM_SELECTED)
        first, last = share(chosen * SUBS, slc_programs, program)
        if program == 0 or first < last:
            q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
            block, current = tl.arange(0, S), (length + SELECT_BLOCK - 1) // SELECT_BLOCK - 1
            # Every page's number, while the launch before ends: none has to be asked for once the choice is made.
            pages = locate(table + batch * table_row, block * SELECT_BLOCK, block <= current, num_pages, PAGE)
            if EARLY:
                gdc_wait()
            scores = importances(shares, ends, befores, afters, tile_peaks, next_peaks, cmp_peaks, cmp_totals, lane,
                                 0, tiles, cmp_used, cmp_programs, pitch, tiles_pitch,
                                 G, CHUNK, BLOCKS, CMP_MOST, ALL_TILES, OVERLAP)  # fmt: skip
            selected = _choose(tl.reshape(scores, [S]), current, touched, NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S, N)
            if EARLY:
                gdc_launch_dependents()
            base = first // SUBS
            entry = base + tl.arange(0, OWN)
            own = tl.where(entry < chosen, _numbers(selected, entry, S), -1)
            found = tl.sum(tl.where(block[None, :] == own[:, None], pages[None, :] + 1, 0), axis=1) - 1
            tl.store(indices + lane * NUM_SELECTED + entry, own, mask=entry * SUBS < last)
            peak, total, out = attend_blocks(
                q_rows, k + kv_head * k_head, v + kv_head * v_head, own, found, first - base * SUBS,
                last - base * SUBS, 0, length, scale_log2, k_page, k_place, k_dim, v_page, v_place, v_dim,
                OWN, HEADS, D, DV, D_PAD, DV_PAD, SELECT_BLOCK, PAGE, 0, KEYS, SLC_STAGES, PRECISION,
            )  # fmt: skip
            store_part(slc_part, slc_peaks, slc_totals, lane, program, slc_programs, peak, total, out, G, HEADS, DV,
                       DV_PAD)  # fmt: skip
            if program == 0:
                unused = tl.arange(0, N)
                tl.store(indices + lane * NUM_SELECTED + unused, tl.full([N], -1, tl.int32),
                         mask=(unused >= chosen) & (unused < NUM_SELECTED))  # fmt: skip
    else:
        mix_static(cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals, mixed,
                   gates + batch * gate_batch + kv_head * G * gate_head, gate_head, gate_branch, lane,
                   (program - slc_programs) * ROWS + tl.arange(0, ROWS), length, count, cmp_used, cmp_programs,
                   win_programs, G, DV, DV_PAD, SELECT_BLOCK, WINDOW, KEYS, CMP_MOST, WIN_MOST, EARLY)  # fmt: skip
