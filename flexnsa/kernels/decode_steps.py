"""The launches of a decoding step: compressed and window attention, selection, selected attention, and a merge.

A lane is one sequence and KV head; its g query heads are the rows of every tile. Grids depend on shapes alone:
programs share the work of a sequence as its length says, and those that get none leave at once.

What does not depend on one another is loaded first and used afterwards: a load after a reduction would wait for it.

With EARLY, programs of a launch start while the one before it ends, and wait where they first read what it left. At
least one program of each launch waits, so that whoever has waited for a launch has waited for all before it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_parts import (
    NOTHING,
    attend,
    attend_blocks,
    compressed_blocks,
    divided,
    load_gates,
    load_queries,
    load_rows,
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
from flexnsa.kernels.topn import choose_among, load_scores

NO_PAGE = tl.constexpr(-(2**31))  # what no table holds

_SIZES = ["capacity", "num_pages", "win_num_pages", "tiles_pitch", "table_row", "win_table_row",
          "imp_programs", "cmp_programs", "win_programs", "slc_programs"]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def attend_static(
    q, k, v, table, win_k, win_v, win_table, lengths, cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals,
    shares, edges, tile_peaks, arrived, scale_log2, q_batch, q_head, q_dim,
    k_page, k_head, k_place, k_dim, v_page, v_head, v_place, v_dim, table_row, num_pages,
    win_k_page, win_k_head, win_k_place, win_k_dim, win_v_page, win_v_head, win_v_place, win_v_dim, win_table_row,
    win_num_pages, heads, capacity, cmp_programs, win_programs, pitch, tiles_pitch,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, WIN_PAGE: tl.constexpr, WIN_RING: tl.constexpr, BEHIND: tl.constexpr, WIN_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, RESIDUES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, LATER_STAGES: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What no selection decides: the first programs of a lane attend to compressed tokens, the others to the window.

    A tile of compressed tokens are those that end in BLOCKS adjacent blocks; what they leave, `_store_shares` says. A
    compressed token lies BEHIND places before its slot. Those programs come first that have most to do.
    """
    lane, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = lane // heads, lane % heads
    # Asked for while the length is on its way.
    q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
    length = sequence_length(lengths, batch, capacity)
    if program < cmp_programs:
        if program == 0:
            tl.store(arrived + lane, 0)
        RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
        OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
        # The first page's number, asked for while the length is on its way: the loop will find it in the cache.
        first_page = tl.load(table + batch * table_row + program * (BLOCKS * RATIO) // PAGE)
        count = num_compressed(tl.where(first_page == NO_PAGE, 0, length), COMPRESS_BLOCK, COMPRESS_STRIDE)
        tiles = (compressed_blocks(count, RATIO, OVERLAP) + BLOCKS - 1) // BLOCKS
        if program < tiles:
            peak = tl.full([HEADS], NOTHING, tl.float32)
            total = tl.zeros([HEADS, BLOCKS * RESIDUES], tl.float32)
            out = tl.zeros([HEADS, DV_PAD], tl.float32)
            row = tl.arange(0, BLOCKS * RESIDUES)
            lane_head = lane * G + tl.arange(0, HEADS)
            is_head = tl.arange(0, HEADS) < G
            within = (row // RESIDUES) * RATIO + row % RESIDUES
            for tile in tl.range(program, tiles, cmp_programs, num_stages=LATER_STAGES):
                begin = tile * (BLOCKS * RATIO)
                slot = begin + within
                token = slot - (OVERLAP - 1)
                inside = (token >= 0) & (token < count)
                if RESIDUES != RATIO:
                    inside = inside & (row % RESIDUES < RATIO)
                if PAGE % (BLOCKS * RATIO) == 0:
                    page = tl.load(table + batch * table_row + begin // PAGE)
                    place = begin % PAGE + within - BEHIND
                    mapped = inside & (token < tl.where((page >= 0) & (page < num_pages), count, 0))
                else:
                    page = locate(table + batch * table_row, slot, inside, num_pages, PAGE)
                    place = slot % PAGE - BEHIND
                    mapped = page >= 0
                k_rows = load_rows(k + kv_head * k_head, page, place, mapped, k_page, k_place, k_dim, D, D_PAD)
                v_rows = load_rows(v + kv_head * v_head, page, place, mapped, v_page, v_place, v_dim, DV, DV_PAD)
                weights, peak, total, out = attend(
                    q_rows, k_rows, v_rows, inside, scale_log2, peak, total, out, PRECISION
                )
                _store_shares(weights, peak, shares, edges, tile_peaks, lane_head, is_head, tile, pitch, tiles_pitch,
                              HEADS, BLOCKS, RESIDUES, OVERLAP)  # fmt: skip
            if EARLY:
                gdc_launch_dependents()
            store_part(cmp_part, cmp_peaks, cmp_totals, lane, program, cmp_programs, peak, tl.sum(total, axis=1), out,
                       G, HEADS, DV, DV_PAD)  # fmt: skip
    else:
        program -= cmp_programs
        low = tl.maximum(length - WINDOW, 0)
        first, last = share(window_tiles(length, WINDOW, SELECT_BLOCK, KEYS), win_programs, program)
        if first < last:
            blocks = low // SELECT_BLOCK + tl.arange(0, WIN_BLOCKS)
            at = blocks * SELECT_BLOCK
            found = locate(win_table + batch * win_table_row, at, at < length, win_num_pages, WIN_PAGE)
            peak, total, out = attend_blocks(
                q_rows, win_k + kv_head * win_k_head, win_v + kv_head * win_v_head, blocks, found, first, last, low,
                length, scale_log2, win_k_page, win_k_place, win_k_dim, win_v_page, win_v_place, win_v_dim,
                WIN_BLOCKS, HEADS, D, DV, D_PAD, DV_PAD, SELECT_BLOCK, WIN_PAGE, WIN_RING, KEYS, STAGES, PRECISION,
            )  # fmt: skip
            if EARLY:
                gdc_launch_dependents()
            store_part(win_part, win_peaks, win_totals, lane, program, win_programs, peak, total, out, G, HEADS, DV,
                       DV_PAD)  # fmt: skip


@triton.jit
def _store_shares(
    weights, peak, shares, edges, tile_peaks, lane_head, is_head, tile, pitch, tiles_pitch,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Leave what the tokens of a tile add to the importance of its blocks, over 2 ** `tile_peaks` [lanes, G, tiles].

    `shares` [lanes, G, pitch] lack, in the last block of a tile, the tokens that also lie in the next tile's first, and
    those that this one shares with the block before it. Both are in `edges` [lanes, G, tiles, 2]: what the tile adds to
    the block before it, and what its last block adds to its predecessor.
    """
    weights, residue = tl.reshape(weights, [HEADS, BLOCKS, RESIDUES]), tl.arange(0, RESIDUES)[None, None, :]
    column = tl.arange(0, BLOCKS)[None, :]
    # Tokens that a compressed token shares with the block in which it ends, in strides.
    own = tl.minimum(residue + 1, OVERLAP)
    if OVERLAP == 2:
        here = tl.sum(tl.where(own == 2, weights * 2, 0.0), axis=2)
        before = tl.sum(tl.where(own == 1, weights, 0.0), axis=2)
    else:
        here = tl.sum(weights * own.to(tl.float32), axis=2)
        before = tl.sum(weights * (OVERLAP - own).to(tl.float32), axis=2)
    if OVERLAP > 1:
        at = (lane_head * tiles_pitch + tile) * 2
        tl.store(edges + at, tl.sum(tl.where(column == 0, before, 0.0), axis=1), mask=is_head)
        tl.store(edges + at + 1, tl.sum(tl.where(column == BLOCKS - 1, before, 0.0), axis=1), mask=is_head)
        if BLOCKS > 1:
            index = tl.broadcast_to(tl.minimum(column + 1, BLOCKS - 1), [HEADS, BLOCKS])
            here = tl.where(column < BLOCKS - 1, _joined(here, tl.gather(before, index, 1), before, OVERLAP), here)
    tl.store(shares + lane_head[:, None] * pitch + tile * BLOCKS + column, here, mask=is_head[:, None])
    tl.store(tile_peaks + lane_head * tiles_pitch + tile, peak, mask=is_head)


@triton.jit
def _joined(here, after, before, OVERLAP: tl.constexpr):
    """A block's importance of its own tokens, those of the next block, and those that it adds to the one before."""
    if OVERLAP == 2:
        # The one token in two blocks counts once in each, and is added to both in the same way.
        return here + (after + before)
    else:
        return here + after


@triton.jit
def _sum_heads(
    shares, edges, tile_peaks, cmp_peaks, cmp_totals, sums, lane, first, tiles, used, cmp_programs, pitch, tiles_pitch,
    G: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, CMP_MOST: tl.constexpr, TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write `sums` [lanes, pitch]: the importances of a run of tiles, as probabilities summed over the heads."""
    head, tile, column = tl.arange(0, HEADS), first + tl.arange(0, TILES), tl.arange(0, BLOCKS)
    lane_head = lane * G + head
    mask = (head < G)[:, None] & (tile < tiles)[None, :]
    # Whole tiles are read, and so the loads are wide.
    place = tile[:, None] * BLOCKS + column[None, :]
    found = tl.load(shares + (lane_head * pitch)[:, None, None] + place[None, :, :], mask=mask[:, :, None], other=0.0)
    at = lane_head[:, None] * tiles_pitch + tile[None, :]
    peak = tl.load(tile_peaks + at, mask=mask, other=NOTHING)
    if OVERLAP > 1:
        followed = mask & (tile + 1 < tiles)[None, :]
        next_peak = tl.load(tile_peaks + at + 1, mask=followed, other=NOTHING)
        after = tl.load(edges + at * 2 + 2, mask=followed, other=0.0)
        before = tl.load(edges + at * 2 + 1, mask=mask, other=0.0)
    peaks, totals = load_totals(cmp_peaks, cmp_totals, lane_head, head < G, used, cmp_programs, CMP_MOST)
    top, total = softmax_of_parts(peaks, totals)
    top = top[:, None]
    inverse = 1.0 / tl.where(head < G, total, 1.0)[:, None]
    # Scaled by 2 ** 64, which changes no order, so that blocks of probability 1e-45 still compare.
    if OVERLAP > 1:
        # The last block joins numbers of two tiles, over the larger of their peaks.
        common = tl.maximum(peak, next_peak)
        fade = power_of_two(peak - common)
        after = after * power_of_two(next_peak - common)
        end = _joined(found * fade[:, :, None], after[:, :, None], (before * fade)[:, :, None], OVERLAP)
        end *= (power_of_two(common - top + 64.0) * inverse)[:, :, None]
    found *= (power_of_two(peak - top + 64.0) * inverse)[:, :, None]
    if OVERLAP > 1:
        found = tl.where(column[None, None, :] == BLOCKS - 1, end, found)
    tl.store(sums + lane * pitch + place, tl.sum(found, axis=0), mask=(tile < tiles)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def select(
    lengths, cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals, shares, edges, tile_peaks, arrived, sums,
    indices, gates, mixed, gate_batch, gate_head, gate_branch,
    heads, capacity, imp_programs, cmp_programs, win_programs, pitch, tiles_pitch,
    G: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, CMP_MOST: tl.constexpr, WIN_MOST: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Importance, a run of tiles to a program, the last of which chooses; others merge the static branches meanwhile.

    `mixed` float32 [lanes, G, DV] is the sum of gate times output over the compressed and the window branch.
    """
    lane, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
    OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
    count = num_compressed(length, COMPRESS_BLOCK, COMPRESS_STRIDE)
    touched = compressed_blocks(count, RATIO, OVERLAP)
    tiles = (touched + BLOCKS - 1) // BLOCKS
    cmp_used = tl.minimum(tiles, cmp_programs)
    if EARLY:
        gdc_wait()
    if program < imp_programs:
        if program * TILES < tiles:
            _sum_heads(shares, edges, tile_peaks, cmp_peaks, cmp_totals, sums, lane, program * TILES, tiles, cmp_used,
                       cmp_programs, pitch, tiles_pitch, G, HEADS, BLOCKS, CMP_MOST, TILES, OVERLAP)  # fmt: skip
        if EARLY:
            gdc_launch_dependents()
        tl.debug_barrier()
        if tl.atomic_add(arrived + lane, 1, sem="acq_rel") == imp_programs - 1:
            one = tl.zeros([1, 1], tl.int32)
            current = (length + SELECT_BLOCK - 1) // SELECT_BLOCK - 1 + one
            choose_among(load_scores(sums + lane * pitch + one, touched, S), indices + lane * NUM_SELECTED + one,
                         0, current, current, touched + one, NUM_SELECTED, NUM_INITIAL, NUM_LOCAL, S, N, 1,
                         False)  # fmt: skip
            tl.store(arrived + lane, 0)  # for the next launch
    else:
        head = (program - imp_programs) * ROWS + tl.arange(0, ROWS)
        at, is_head = lane * G + head, head < G
        win_used = programs_used(window_tiles(length, WINDOW, SELECT_BLOCK, KEYS), win_programs)
        compressed = load_values(cmp_part, at, is_head, cmp_used, cmp_programs, CMP_MOST, DV, DV_PAD)
        window = load_values(win_part, at, is_head, win_used, win_programs, WIN_MOST, DV, DV_PAD)
        cmp_peak, cmp_total = load_totals(cmp_peaks, cmp_totals, at, is_head, cmp_used, cmp_programs, CMP_MOST)
        win_peak, win_total = load_totals(win_peaks, win_totals, at, is_head, win_used, win_programs, WIN_MOST)
        gates += batch * gate_batch + kv_head * G * gate_head
        cmp_gate = load_gates(gates, gate_head, head, tl.where(count > 0, G, 0))
        win_gate = load_gates(gates + 2 * gate_branch, gate_head, head, tl.where(length > 0, G, 0))
        if EARLY:
            gdc_launch_dependents()
        value = cmp_gate * merge_parts(cmp_peak, cmp_total, compressed)
        value += win_gate * merge_parts(win_peak, win_total, window)
        store_output(mixed + lane * G * DV, value, DV, 1, head, G, DV, DV_PAD)


@triton.jit
def _load_mixed(mixed, lane, head, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    dim = tl.arange(0, DV_PAD)
    mask = (head < G)[:, None] & (dim < DV)[None, :]
    return tl.load(mixed + (lane * G + head)[:, None] * DV + dim[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def attend_selected(
    q, k, v, table, lengths, indices, arrived, slc_part, slc_peaks, slc_totals, mixed, gates, out, scale_log2,
    q_batch, q_head, q_dim, k_page, k_head, k_place, k_dim, v_page, v_head, v_place, v_dim, table_row, num_pages,
    gate_batch, gate_head, gate_branch, out_batch, out_head, out_dim, heads, capacity, slc_programs,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    SELECT_BLOCK: tl.constexpr, NUM_SELECTED: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr,
    SLC_MOST: tl.constexpr, MERGES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention to a run of the selected blocks. With MERGES a lane's last program to arrive finishes the output."""
    program, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    chosen = tl.minimum((length + SELECT_BLOCK - 1) // SELECT_BLOCK, NUM_SELECTED)
    first, last = share(chosen * SUBS, slc_programs, program)
    if program == 0 or first < last:
        q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
        head = tl.arange(0, HEADS)
        if MERGES:
            gates += batch * gate_batch + kv_head * G * gate_head + gate_branch
            gate = load_gates(gates, gate_head, head, tl.where(length > 0, G, 0))
            out += batch * out_batch + kv_head * G * out_head
        if EARLY:
            gdc_wait()
        if MERGES:
            others = _load_mixed(mixed, lane, head, G, DV, DV_PAD)
        entry = tl.arange(0, N)
        blocks = tl.load(indices + lane * NUM_SELECTED + entry, mask=entry < chosen, other=-1)
        at = blocks * SELECT_BLOCK
        found = locate(table + batch * table_row, at, (blocks >= 0) & (at < length), num_pages, PAGE)
        peak, total, value = attend_blocks(
            q_rows, k + kv_head * k_head, v + kv_head * v_head, blocks, found, first, last, 0, length, scale_log2,
            k_page, k_place, k_dim, v_page, v_place, v_dim,
            N, HEADS, D, DV, D_PAD, DV_PAD, SELECT_BLOCK, PAGE, 0, KEYS, STAGES, PRECISION,
        )  # fmt: skip
        if SLC_MOST == 1:
            store_output(out, gate * divided(value, total) + others, out_head, out_dim, head, G, DV, DV_PAD)
        else:
            if EARLY:
                gdc_launch_dependents()
            store_part(slc_part, slc_peaks, slc_totals, lane, program, slc_programs, peak, total, value, G, HEADS, DV,
                       DV_PAD)  # fmt: skip
            if MERGES:
                used = programs_used(chosen * SUBS, slc_programs)
                tl.debug_barrier()
                if tl.atomic_add(arrived + lane, 1, sem="acq_rel") == tl.maximum(used, 1) - 1:
                    row, is_head = lane * G + head, head < G
                    values = load_values(slc_part, row, is_head, used, slc_programs, SLC_MOST, DV, DV_PAD)
                    peaks, totals = load_totals(slc_peaks, slc_totals, row, is_head, used, slc_programs, SLC_MOST)
                    merged = gate * merge_parts(peaks, totals, values) + others
                    store_output(out, merged, out_head, out_dim, head, G, DV, DV_PAD)


@triton.jit(do_not_specialize=_SIZES)
def add_selected(
    lengths, slc_part, slc_peaks, slc_totals, mixed, gates, out,
    gate_batch, gate_head, gate_branch, out_batch, out_head, out_dim, heads, capacity, slc_programs,
    G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, SELECT_BLOCK: tl.constexpr, NUM_SELECTED: tl.constexpr,
    KEYS: tl.constexpr, SLC_MOST: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The step's output: the static branches, mixed before, and the gate times the selected branch's merged parts."""
    lane = tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    head = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    chosen = tl.minimum((length + SELECT_BLOCK - 1) // SELECT_BLOCK, NUM_SELECTED)
    used = programs_used(chosen * SUBS, slc_programs)
    gates += batch * gate_batch + kv_head * G * gate_head + gate_branch
    gate = load_gates(gates, gate_head, head, tl.where(length > 0, G, 0))
    if EARLY:
        gdc_wait()
    at, is_head = lane * G + head, head < G
    values = load_values(slc_part, at, is_head, used, slc_programs, SLC_MOST, DV, DV_PAD)
    peak, total = load_totals(slc_peaks, slc_totals, at, is_head, used, slc_programs, SLC_MOST)
    value = _load_mixed(mixed, lane, head, G, DV, DV_PAD) + gate * merge_parts(peak, total, values)
    store_output(out + batch * out_batch + kv_head * G * out_head, value, out_head, out_dim, head, G, DV, DV_PAD)
