"""The selected branch of a decoding step of few lanes: every program chooses by itself, then attends to its blocks.

Few lanes leave most of a device idle, and a step is a chain of waits. So the programs of a lane all choose the same
blocks, rather than wait for one that does.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_parts import (
    SIZES,
    attend_blocks,
    compressed_blocks,
    divided,
    load_gates,
    load_peaks,
    load_queries,
    load_totals,
    load_values,
    locate,
    merge_parts,
    num_compressed,
    power_of_two,
    programs_used,
    sequence_length,
    share,
    softmax_of_parts,
    store_output,
    store_part,
    window_tiles,
)
from flexnsa.kernels.topn import NAN, NOTHING, OUTSIDE


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

    # Each of N >= n sets has its maximum at or above the least of these maxima, so at least n keys are. A set is of
    # blocks four at a time, as a thread holds them.
    NEAR: tl.constexpr = min(4, S // N)
    tops = tl.max(tl.max(tl.reshape(keys, [S // N // NEAR, N, NEAR]), axis=2), axis=0)
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
        tied = (keys == low).to(tl.int32)
        staying = wanted - tl.sum((keys > low).to(tl.int32), axis=0)
        keys = tl.where((tied > 0) & (tl.cumsum(tied, axis=0) > staying), OUTSIDE, keys)
    forced = (block < initial) | ((block >= before_local) & (block <= current))
    return forced | (keys >= low)


@triton.jit
def _from(selected, pages, first, S: tl.constexpr, OWN: tl.constexpr):
    """(numbers, pages) [OWN] of the selected blocks from the `first` on, counted from 0; -1 past the last."""
    block, entry = tl.arange(0, S), tl.arange(0, OWN)
    rank = tl.where(selected, tl.cumsum(selected.to(tl.int32), axis=0) - 1 - first, -1)
    numbers, places = tl.full([OWN], -1, tl.int32), tl.full([OWN], -1, tl.int32)
    for i in tl.static_range(OWN):
        both = tl.where((rank == i)[:, None], tl.join(block, pages) + 1, 0)
        number, place = tl.split(tl.sum(both, axis=0) - 1)
        numbers, places = tl.where(entry == i, number, numbers), tl.where(entry == i, place, places)
    return numbers, places


@triton.jit(do_not_specialize=SIZES)
def attend_chosen(
    q, k, v, table, lengths, sums, summed, indices, slc_part, slc_peaks, slc_totals, scale_log2, q_batch, q_head, q_dim,
    k_page, k_head, k_place, k_dim, v_page, v_head, v_place, v_dim, table_row, num_pages, heads, capacity,
    imp_programs, slc_programs, pitch,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, PAGE: tl.constexpr,
    S: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr, OWN: tl.constexpr, SLC_STAGES: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Choose, and attend to a run of the selected blocks, OWN at most.

    The choice waits for the lane's importances alone; the launch before is waited for at the end.
    """
    program, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    count = num_compressed(length, COMPRESS_BLOCK, COMPRESS_STRIDE)
    touched = compressed_blocks(count, SELECT_BLOCK // COMPRESS_STRIDE, COMPRESS_BLOCK // COMPRESS_STRIDE)
    chosen = tl.minimum((length + SELECT_BLOCK - 1) // SELECT_BLOCK, NUM_SELECTED)
    first, last = share(chosen * SUBS, slc_programs, program)
    if program == 0 or first < last:
        q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
        block, current = tl.arange(0, S), (length + SELECT_BLOCK - 1) // SELECT_BLOCK - 1
        # No program can be kept from running by those that wait here: this launch begins after all of them have.
        while tl.atomic_add(summed + lane, 0, sem="acquire") < imp_programs:
            pass
        # Whole groups of 16 are read, so that loads are wide.
        found = tl.load(sums + lane * pitch + block, mask=block < (touched + 15) // 16 * 16, other=0.0)
        # Every page's number, on its way while blocks are chosen.
        pages = locate(table + batch * table_row, block * SELECT_BLOCK, block <= current, num_pages, PAGE)
        selected = _choose(found, current, touched, NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S, N)
        base = first // SUBS
        own, found = _from(selected, pages, base, S, OWN)
        entry = base + tl.arange(0, OWN)
        tl.store(indices + lane * NUM_SELECTED + entry, own, mask=entry * SUBS < last)
        if EARLY:
            gdc_launch_dependents()
        peak, total, out = attend_blocks(
            q_rows, k + kv_head * k_head, v + kv_head * v_head, own, found, first - base * SUBS,
            last - base * SUBS, 0, length, scale_log2, k_page, k_place, k_dim, v_page, v_place, v_dim,
            OWN, HEADS, D, DV, D_PAD, DV_PAD, SELECT_BLOCK, PAGE, 0, KEYS, SLC_STAGES, PRECISION,
        )  # fmt: skip
        if EARLY:
            gdc_wait()
        store_part(slc_part, slc_peaks, slc_totals, lane, program, slc_programs, peak, total, out, G, HEADS, DV, DV_PAD)
        if program == 0:
            unused = tl.arange(0, N)
            tl.store(indices + lane * NUM_SELECTED + unused, tl.full([N], -1, tl.int32),
                     mask=(unused >= chosen) & (unused < NUM_SELECTED))  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def merge_branches(
    lengths, cmp_peaks, cmp_totals, val_part, val_peaks, win_part, win_peaks, win_totals,
    slc_part, slc_peaks, slc_totals, gates, out, gate_batch, gate_head, gate_branch, out_batch, out_head, out_dim,
    heads, capacity, cmp_programs, val_programs, win_programs, slc_programs,
    G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, COMPRESS_BLOCK: tl.constexpr,
    COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr, NUM_SELECTED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr, CMP_MOST: tl.constexpr, VAL_MOST: tl.constexpr, WIN_MOST: tl.constexpr,
    SLC_MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A step's output: the gated sum of the three branches, ROWS heads and COLUMNS values a program."""
    lane = tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    part = tl.program_id(0)
    head = part // (DV_PAD // COLUMNS) * ROWS + tl.arange(0, ROWS)
    column = part % (DV_PAD // COLUMNS) * COLUMNS
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    count = num_compressed(length, COMPRESS_BLOCK, COMPRESS_STRIDE)
    touched = compressed_blocks(count, SELECT_BLOCK // COMPRESS_STRIDE, COMPRESS_BLOCK // COMPRESS_STRIDE)
    tiles = (touched + BLOCKS - 1) // BLOCKS
    cmp_used, val_used = tl.minimum(tiles, cmp_programs), tl.minimum(tiles, val_programs)
    win_used = programs_used(window_tiles(length, WINDOW, SELECT_BLOCK, KEYS), win_programs)
    chosen = tl.minimum((length + SELECT_BLOCK - 1) // SELECT_BLOCK, NUM_SELECTED)
    slc_used = programs_used(chosen * SUBS, slc_programs)
    gates += batch * gate_batch + kv_head * G * gate_head
    cmp_gate = load_gates(gates, gate_head, head, tl.where(count > 0, G, 0))
    slc_gate = load_gates(gates + gate_branch, gate_head, head, tl.where(length > 0, G, 0))
    win_gate = load_gates(gates + 2 * gate_branch, gate_head, head, tl.where(length > 0, G, 0))
    if EARLY:
        gdc_wait()
    at, is_head = lane * G + head, head < G
    compressed = load_values(val_part, at, is_head, val_used, val_programs, VAL_MOST, DV, COLUMNS, column)
    selected = load_values(slc_part, at, is_head, slc_used, slc_programs, SLC_MOST, DV, COLUMNS, column)
    window = load_values(win_part, at, is_head, win_used, win_programs, WIN_MOST, DV, COLUMNS, column)
    cmp_peak, cmp_total = load_totals(cmp_peaks, cmp_totals, at, is_head, cmp_used, cmp_programs, CMP_MOST)
    val_peak = load_peaks(val_peaks, at, is_head, val_used, val_programs, VAL_MOST)
    slc_peak, slc_total = load_totals(slc_peaks, slc_totals, at, is_head, slc_used, slc_programs, SLC_MOST)
    win_peak, win_total = load_totals(win_peaks, win_totals, at, is_head, win_used, win_programs, WIN_MOST)
    top, total = softmax_of_parts(cmp_peak, cmp_total)
    value = cmp_gate * divided(tl.sum(compressed * power_of_two(val_peak - top[:, None])[:, :, None], axis=1), total)
    value += slc_gate * merge_parts(slc_peak, slc_total, selected)
    value += win_gate * merge_parts(win_peak, win_total, window)
    store_output(
        out + batch * out_batch + kv_head * G * out_head, value, out_head, out_dim, head, G, DV, COLUMNS, column
    )
