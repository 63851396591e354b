"""The static branches of a decoding step of few lanes: passes of their own over compressed keys, scores and values.

What the choice waits for is short that way: values and window are read meanwhile.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexnsa.kernels.decode_importance import by_block, joined
from flexnsa.kernels.decode_parts import (
    NO_PAGE,
    NOTHING,
    SIZES,
    UNSEEN,
    attend_window,
    compressed_blocks,
    compressed_tile,
    load_queries,
    load_rows,
    load_totals,
    num_compressed,
    power_of_two,
    rows_from,
    scored,
    sequence_length,
    softmax_of_parts,
    store_value,
    tile_slots,
    weighed,
)


@triton.jit(do_not_specialize=SIZES)
def score_compressed(
    q, k, table, lengths, scores, cmp_peaks, cmp_totals, summed, scale_log2, q_batch, q_head, q_dim,
    k_page, k_head, k_place, k_dim, table_row, num_pages, heads, capacity, cmp_programs, scores_pitch,
    G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BEHIND: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr,
    LATER_STAGES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`scores` [lanes, G, blocks * RESIDUES] of compressed tokens, and peaks and totals of a program's softmax.

    Sets `summed` [lanes] to 0.
    """
    lane, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = lane // heads, lane % heads
    # Asked for while the length is on its way.
    q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
    length = sequence_length(lengths, batch, capacity)
    RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
    OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
    TOKENS: tl.constexpr = BLOCKS * RESIDUES
    # The first page's number, asked for while the length is on its way: the loop will find it in the cache.
    first_page = tl.load(table + batch * table_row + program * (BLOCKS * RATIO) // PAGE)
    count = num_compressed(tl.where(first_page == NO_PAGE, 0, length), COMPRESS_BLOCK, COMPRESS_STRIDE)
    tiles = (compressed_blocks(count, RATIO, OVERLAP) + BLOCKS - 1) // BLOCKS
    if program == 0:
        tl.store(summed + lane, 0)
    if program < tiles:
        peak = tl.full([HEADS], NOTHING, tl.float32)
        total = tl.zeros([HEADS, TOKENS], tl.float32)
        head, token = tl.arange(0, HEADS), tl.arange(0, TOKENS)
        row = lane * G + head
        at = row[:, None] * scores_pitch + token[None, :]
        k_at = rows_from(k + kv_head * k_head, tile_slots(RATIO, BLOCKS, RESIDUES), k_place, k_dim, D_PAD)
        for tile in tl.range(program, tiles, cmp_programs, num_stages=LATER_STAGES):
            inside, page, begin, mapped = compressed_tile(
                table + batch * table_row, tile, count, num_pages, RATIO, OVERLAP, PAGE, BEHIND, BLOCKS, RESIDUES
            )
            k_rows = load_rows(k_at, page, begin, mapped, k_page, k_place, D, D_PAD)
            score = scored(q_rows, k_rows, inside, scale_log2, PRECISION)
            tl.store(scores + at + tile * TOKENS, score, mask=(head < G)[:, None])
            whole = tl.floor(score)
            new_peak = tl.maximum(peak, tl.max(whole, axis=1))
            total = total * power_of_two(peak - new_peak)[:, None] + weighed(score, whole, new_peak[:, None])
            peak = new_peak
        if EARLY:
            gdc_launch_dependents()
        part = row * cmp_programs + program
        tl.store(cmp_peaks + part, peak, mask=head < G)
        tl.store(cmp_totals + part, tl.sum(total, axis=1), mask=head < G)


@triton.jit(do_not_specialize=SIZES)
def use_scores(
    q, v, table, win_k, win_v, win_table, lengths, scores, cmp_peaks, cmp_totals, val_part, val_peaks,
    win_part, win_peaks, win_totals, sums, summed, scale_log2, q_batch, q_head, q_dim,
    v_page, v_head, v_place, v_dim, table_row, num_pages,
    win_k_page, win_k_head, win_k_place, win_k_dim, win_v_page, win_v_head, win_v_place, win_v_dim, win_table_row,
    win_num_pages, heads, capacity, val_programs, imp_programs, cmp_programs, win_programs, pitch,
    scores_pitch,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, WIN_PAGE: tl.constexpr, WIN_RING: tl.constexpr, BEHIND: tl.constexpr, WIN_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, RESIDUES: tl.constexpr, RUN: tl.constexpr, CMP_MOST: tl.constexpr, VAL_MOST: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, LATER_STAGES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Importance; meanwhile others attend to the compressed values and to the window, for which no choice waits.

    `sums` [lanes, pitch] are the importances of blocks, RUN a program; `summed` counts a lane's programs that are done.
    The next launch reads it without having waited for this one. So it may begin only after all that sum run, and know
    what the launch before this one left.
    """
    program, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = lane // heads, lane % heads
    length = sequence_length(lengths, batch, capacity)
    RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
    OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
    count = num_compressed(length, COMPRESS_BLOCK, COMPRESS_STRIDE)
    tiles = (compressed_blocks(count, RATIO, OVERLAP) + BLOCKS - 1) // BLOCKS
    if program < val_programs:
        if program < tiles:
            if EARLY:
                gdc_wait()
                gdc_launch_dependents()
            _attend_values(
                v + kv_head * v_head, table + batch * table_row, scores, cmp_peaks, val_part, val_peaks, lane, program,
                val_programs, cmp_programs, tiles, count, num_pages, scores_pitch, v_page, v_place, v_dim,
                G, HEADS, DV, DV_PAD, RATIO, OVERLAP, PAGE, BEHIND, BLOCKS, RESIDUES, CMP_MOST // VAL_MOST,
                LATER_STAGES, PRECISION,
            )  # fmt: skip
    elif program < val_programs + imp_programs:
        program -= val_programs
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        _sum_scores(scores, cmp_peaks, cmp_totals, sums + lane * pitch, lane, program, tiles, cmp_programs,
                    pitch, scores_pitch, G, HEADS, OVERLAP, BLOCKS, RESIDUES, RUN, CMP_MOST)  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(summed + lane, 1, sem="release")
    else:
        if EARLY:
            gdc_launch_dependents()
        q_rows = load_queries(q + batch * q_batch + kv_head * G * q_head, q_head, q_dim, G, HEADS, D, D_PAD)
        attend_window(
            q_rows, win_k + kv_head * win_k_head, win_v + kv_head * win_v_head, win_table + batch * win_table_row,
            win_part, win_peaks, win_totals, lane, program - val_programs - imp_programs, win_programs, length,
            scale_log2, win_k_page, win_k_place, win_k_dim, win_v_page, win_v_place, win_v_dim, win_num_pages,
            G, D, DV, HEADS, D_PAD, DV_PAD, SELECT_BLOCK, WINDOW, WIN_PAGE, WIN_RING, WIN_BLOCKS, KEYS, STAGES,
            PRECISION,
        )  # fmt: skip


@triton.jit
def _sum_scores(
    scores, cmp_peaks, cmp_totals, sums, lane, program, tiles, cmp_programs, pitch, scores_pitch,
    G: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr,
    RUN: tl.constexpr, CMP_MOST: tl.constexpr,
):  # fmt: skip
    """The importance of a run of blocks. Nothing is asked for later than the length: what lies past it is dropped."""
    head, block, part = tl.arange(0, HEADS), program * RUN + tl.arange(0, RUN), tl.arange(0, CMP_MOST)
    row, is_head, used = lane * G + head, head < G, part < tl.minimum(tiles, cmp_programs)
    peaks, totals = load_totals(cmp_peaks, cmp_totals, row, is_head, cmp_programs, cmp_programs, CMP_MOST)
    at, last = scores + row * scores_pitch, tiles * BLOCKS
    own = _load_blocks(at, block, is_head, scores_pitch, RESIDUES)
    if OVERLAP > 1:
        following = _load_blocks(at, block + 1, is_head, scores_pitch, RESIDUES)
    peaks = tl.where(used[None, :], peaks, NOTHING)
    top, total = softmax_of_parts(peaks, tl.where(used[None, :], totals, 0.0))
    inverse = 1.0 / tl.where(total != 0.0, total, 1.0)
    # Scaled by 2 ** 64, which changes no order, so that blocks of probability 1e-45 still compare.
    top = (top - 64.0)[None, :, None]
    own = tl.where((block < last)[:, None, None], own, UNSEEN)
    found, before = by_block(tl.exp2(own - top), RESIDUES, OVERLAP)
    if OVERLAP > 1:
        following = tl.where((block + 1 < last)[:, None, None], following, UNSEEN)
        _, after = by_block(tl.exp2(following - top), RESIDUES, OVERLAP)
        found = joined(found, after, before, OVERLAP)
    tl.store(sums + block, tl.sum(found * inverse[None, :], axis=1), mask=block < tl.minimum(last, pitch))


@triton.jit
def _load_blocks(at, block, is_head, scores_pitch, RESIDUES: tl.constexpr):
    """[blocks, heads, RESIDUES] scores of the tokens that end in some blocks; UNSEEN past the last that there may be.

    Heads are the middle axis: so a thread holds several of them of a block, and adds them by itself.
    """
    token = block[:, None] * RESIDUES + tl.arange(0, RESIDUES)[None, :]
    mask = (block * RESIDUES < scores_pitch)[:, None] & is_head[None, :]
    return tl.load(at[None, :, None] + token[:, None, :], mask=mask[:, :, None], other=UNSEEN)


@triton.jit
def _attend_values(
    v, table, scores, cmp_peaks, part, peaks, lane, program, programs, cmp_programs, tiles, count, num_pages,
    scores_pitch, v_page, v_place, v_dim,
    G: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, RATIO: tl.constexpr,
    OVERLAP: tl.constexpr, PAGE: tl.constexpr, BEHIND: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr,
    EACH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The values of those tiles whose keys were scored by the programs `program`, + `programs`, ..., EACH at most."""
    TOKENS: tl.constexpr = BLOCKS * RESIDUES
    head, token = tl.arange(0, HEADS), tl.arange(0, TOKENS)
    row, is_head = lane * G + head, head < G
    scorer = program + tl.arange(0, EACH) * programs
    mask = is_head[:, None] & (scorer < tl.minimum(tiles, cmp_programs))[None, :]
    found = tl.load(cmp_peaks + row[:, None] * cmp_programs + scorer[None, :], mask=mask, other=NOTHING)
    peak = tl.max(found, axis=1)
    at = scores + row[:, None] * scores_pitch + token[None, :]
    out = tl.zeros([HEADS, DV_PAD], tl.float32)
    v_at = rows_from(v, tile_slots(RATIO, BLOCKS, RESIDUES), v_place, v_dim, DV_PAD)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        _, page, begin, mapped = compressed_tile(
            table, tile, count, num_pages, RATIO, OVERLAP, PAGE, BEHIND, BLOCKS, RESIDUES
        )
        v_rows = load_rows(v_at, page, begin, mapped, v_page, v_place, DV, DV_PAD)
        score = tl.load(at + tile * TOKENS, mask=is_head[:, None], other=UNSEEN)
        weights = tl.exp2(score - peak[:, None])
        out = tl.dot(weights.to(v_rows.dtype), v_rows, out, input_precision=PRECISION)
    tl.store(peaks + row * programs + program, peak, mask=is_head)
    store_value(part, lane, program, programs, out, G, HEADS, DV, DV_PAD)
