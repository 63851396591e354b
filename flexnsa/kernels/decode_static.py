"""The branches of a decoding step that no selection decides: compressed and window attention, and their merging.

What does not depend on one another is loaded first and used afterwards: a load after a reduction would wait for it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_importance import store_shares
from flexnsa.kernels.decode_parts import (
    NO_PAGE,
    NOTHING,
    SIZES,
    attend,
    attend_window,
    compressed_blocks,
    compressed_tile,
    load_gates,
    load_queries,
    load_rows,
    load_totals,
    load_values,
    merge_parts,
    num_compressed,
    programs_used,
    rows_from,
    sequence_length,
    store_output,
    store_part,
    tile_slots,
    window_tiles,
)


@triton.jit(do_not_specialize=SIZES)
def attend_static(
    q, k, v, table, win_k, win_v, win_table, lengths, cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals,
    shares, ends, befores, afters, tile_peaks, next_peaks, arrived, scale_log2, q_batch, q_head, q_dim,
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

    What a tile of compressed tokens leaves, `store_shares` says. Those programs come first that have most to do.
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
            lane_head = lane * G + tl.arange(0, HEADS)
            is_head = tl.arange(0, HEADS) < G
            slots = tile_slots(RATIO, BLOCKS, RESIDUES)
            k_at = rows_from(k + kv_head * k_head, slots, k_place, k_dim, D_PAD)
            v_at = rows_from(v + kv_head * v_head, slots, v_place, v_dim, DV_PAD)
            for tile in tl.range(program, tiles, cmp_programs, num_stages=LATER_STAGES):
                inside, page, begin, mapped = compressed_tile(
                    table + batch * table_row, tile, count, num_pages, RATIO, OVERLAP, PAGE, BEHIND, BLOCKS, RESIDUES
                )
                k_rows = load_rows(k_at, page, begin, mapped, k_page, k_place, D, D_PAD)
                v_rows = load_rows(v_at, page, begin, mapped, v_page, v_place, DV, DV_PAD)
                weights, peak, total, out = attend(
                    q_rows, k_rows, v_rows, inside, scale_log2, peak, total, out, PRECISION
                )
                store_shares(weights, peak, shares, ends, befores, afters, tile_peaks, next_peaks, lane_head, is_head,
                             tile, pitch, tiles_pitch, HEADS, BLOCKS, RESIDUES, OVERLAP)  # fmt: skip
            if EARLY:
                gdc_launch_dependents()
            store_part(cmp_part, cmp_peaks, cmp_totals, lane, program, cmp_programs, peak, tl.sum(total, axis=1), out,
                       G, HEADS, DV, DV_PAD)  # fmt: skip
    else:
        attend_window(
            q_rows, win_k + kv_head * win_k_head, win_v + kv_head * win_v_head, win_table + batch * win_table_row,
            win_part, win_peaks, win_totals, lane, program - cmp_programs, win_programs, length, scale_log2,
            win_k_page, win_k_place, win_k_dim, win_v_page, win_v_place, win_v_dim, win_num_pages,
            G, D, DV, HEADS, D_PAD, DV_PAD, SELECT_BLOCK, WINDOW, WIN_PAGE, WIN_RING, WIN_BLOCKS, KEYS, STAGES,
            PRECISION,
        )  # fmt: skip


@triton.jit
def mix_static(
    cmp_part, cmp_peaks, cmp_totals, win_part, win_peaks, win_totals, mixed, gates, gate_head, gate_branch,
    lane, head, length, count, cmp_used, cmp_programs, win_programs,
    G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, SELECT_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    KEYS: tl.constexpr, CMP_MOST: tl.constexpr, WIN_MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write `mixed` float32 [lanes, G, DV] of some heads: gate times output, of the compressed and the window branch.

    `gates` are the lane's. Waits for the launch before.
    """
    at, is_head = lane * G + head, head < G
    win_used = programs_used(window_tiles(length, WINDOW, SELECT_BLOCK, KEYS), win_programs)
    cmp_gate = load_gates(gates, gate_head, head, tl.where(count > 0, G, 0))
    win_gate = load_gates(gates + 2 * gate_branch, gate_head, head, tl.where(length > 0, G, 0))
    if EARLY:
        gdc_wait()
    compressed = load_values(cmp_part, at, is_head, cmp_used, cmp_programs, CMP_MOST, DV, DV_PAD)
    window = load_values(win_part, at, is_head, win_used, win_programs, WIN_MOST, DV, DV_PAD)
    cmp_peak, cmp_total = load_totals(cmp_peaks, cmp_totals, at, is_head, cmp_used, cmp_programs, CMP_MOST)
    win_peak, win_total = load_totals(win_peaks, win_totals, at, is_head, win_used, win_programs, WIN_MOST)
    if EARLY:
        gdc_launch_dependents()
    value = cmp_gate * merge_parts(cmp_peak, cmp_total, compressed)
    value += win_gate * merge_parts(win_peak, win_total, window)
    store_output(mixed + lane * G * DV, value, DV, 1, head, G, DV, DV_PAD)
