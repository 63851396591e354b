"""The launches of a decoding step after the static branches, where many lanes fill the device: select, then attend.

A lane is one sequence and KV head; its g query heads are the rows of every tile. Grids depend on shapes alone:
programs share the work of a sequence as its length says, and those that get none leave at once.

With EARLY, programs of a launch start while the one before it ends, and wait where they first read what it left. At
least one program of each launch waits, so that whoever has waited for a launch has waited for all before it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_importance import importances
from flexnsa.kernels.decode_parts import (
    SIZES,
    attend_blocks,
    compressed_blocks,
    divided,
    load_gates,
    load_queries,
    load_totals,
    load_values,
    locate,
    merge_parts,
    num_compressed,
    programs_used,
    sequence_length,
    share,
    store_output,
    store_part,
)
from flexnsa.kernels.decode_static import mix_static
from flexnsa.kernels.topn import choose_among, load_scores


@triton.jit(do_not_specialize=SIZES)
def select(
    lengths, cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals,
    shares, ends, befores, afters, tile_peaks, next_peaks, arrived, sums, indices, gates, mixed,
    gate_batch, gate_head, gate_branch, heads, capacity, imp_programs, cmp_programs, win_programs, pitch, tiles_pitch,
    G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, CMP_MOST: tl.constexpr,
    WIN_MOST: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Importance, a run of tiles to a program, the last of which chooses; others merge the static branches meanwhile.

    `sums` [lanes, pitch] are the importances of all blocks.
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
    if program < imp_programs:
        if EARLY:
            gdc_wait()
        first = program * TILES
        if first < tiles:
            found = importances(shares, ends, befores, afters, tile_peaks, next_peaks, cmp_peaks, cmp_totals, lane,
                                first, tiles, cmp_used, cmp_programs, pitch, tiles_pitch,
                                G, CHUNK, BLOCKS, CMP_MOST, TILES, OVERLAP)  # fmt: skip
            tile = first + tl.arange(0, TILES)
            place = tile[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
            tl.store(sums + lane * pitch + place, found, mask=(tile < tiles)[:, None])
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
        mix_static(cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals, mixed,
                   gates + batch * gate_batch + kv_head * G * gate_head, gate_head, gate_branch, lane,
                   (program - imp_programs) * ROWS + tl.arange(0, ROWS), length, count, cmp_used, cmp_programs,
                   win_programs, G, DV, DV_PAD, SELECT_BLOCK, WINDOW, KEYS, CMP_MOST, WIN_MOST, EARLY)  # fmt: skip


@triton.jit
def _load_mixed(mixed, lane, head, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    dim = tl.arange(0, DV_PAD)
    mask = (head < G)[:, None] & (dim < DV)[None, :]
    return tl.load(mixed + (lane * G + head)[:, None] * DV + dim[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
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


@triton.jit(do_not_specialize=SIZES)
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
