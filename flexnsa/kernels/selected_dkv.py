"""Selected attention, dK and dV: the kernels that go over (block, query) pairs, and those that sum what they leave."""

import triton
import triton.language as tl

from flexnsa.kernels.launch import Kernel
from flexnsa.kernels.selected_dq import PLACE
from flexnsa.kernels.selected_pairs import LOG2E, item_keys


@Kernel
@triton.jit(do_not_specialize=PLACE)
def row_statistics(
    out, dout, lse, dlse, statistics,
    stride_db, stride_dh, stride_dt, stride_dd, stride_lb, stride_lh, stride_lt,
    lane0, query0, queries, hk, tq, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row [lane, query, head of the group]: the LSE to base 2, and sum(out * dout) - dlse, which the softmax's
    gradient subtracts. Grid: (row tiles of a chunk, lanes)."""
    local_lane = tl.program_id(1).to(tl.int64)
    lane = lane0 + local_lane
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head = row // G, lane % hk * G + row % G
    token = query0.to(tl.int64) + query
    row_mask = (query < queries) & (token < tq)
    value_dim = tl.arange(0, DV_PAD)
    mask = row_mask[:, None] & (value_dim < DV)[None, :]
    place = (lane // hk * hk * G + head) * tq + token
    x = tl.load(out + place[:, None] * DV + value_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    where = lane // hk * stride_db + head * stride_dh + token * stride_dt
    dx = tl.load(dout + where[:, None] + value_dim[None, :] * stride_dd, mask=mask, other=0.0).to(tl.float32)
    where = lane // hk * stride_lb + head * stride_lh + token * stride_lt
    back = tl.load(dlse + where, mask=row_mask, other=0.0)
    into = statistics + (local_lane * queries * G + row) * 2
    tl.store(into, tl.load(lse + place, mask=row_mask, other=0.0) * LOG2E, mask=row_mask)
    tl.store(into + 1, tl.sum(x * dx, axis=1) - back, mask=row_mask)


@triton.jit
def _query(pair, N: tl.constexpr):
    """The query of a pair; neither is ever negative, which spares the division a correction."""
    return (pair.to(tl.uint32) // N).to(tl.int32)


@triton.jit
def _row_heads(row, HEADS: tl.constexpr):
    """The head, of a run of HEADS, of each row of a tile.

    A thread of a matrix product holds two adjacent columns of every eight, and rows eight apart. Heads and keys are
    dealt so that what it holds of a pair's scores is adjacent in memory, and leaves its registers as it is.
    """
    if HEADS < 8:
        return row % HEADS
    return row // 2 % 4 * (HEADS // 4) + row % HEADS // 8 * 2 + row % 2


@triton.jit
def _row_keys(row, KEYS: tl.constexpr):
    """The key, of a part of a block, of each of a tile's rows: see above."""
    return row // 8 % 2 * (KEYS // 2) + row // 16 * 8 + row % 8


@triton.jit
def _by_row(records, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """What two numbers of each head, [runs, HEADS * 2], are by row: two tensors [ROWS]."""
    if HEADS >= 8:
        records = tl.reshape(records, [ROWS // HEADS, 4, HEADS // 8, 2, 2])
        records = tl.permute(records, [0, 2, 1, 3, 4])
    return tl.split(tl.reshape(records, [ROWS, 2]))


@triton.jit
def _by_head(scores, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Scores [KEYS, ROWS] as they lie in memory, [runs, KEYS * HEADS]."""
    if HEADS >= 8:
        scores = tl.reshape(scores, [KEYS // 16, 2, 8, ROWS // HEADS, HEADS // 8, 4, 2])
        scores = tl.permute(scores, [3, 1, 0, 2, 5, 4, 6])
    else:
        scores = tl.reshape(scores, [KEYS // 16, 2, 8, ROWS // HEADS, HEADS])
        scores = tl.permute(scores, [3, 1, 0, 2, 4])
    return tl.reshape(scores, [ROWS // HEADS, KEYS * HEADS])


@Kernel
@triton.jit(do_not_specialize=[*PLACE, "key0", "summed", "split_items"])
def pair_gradients(
    q, k, v, dout, statistics, seen, low, pairs, listed, part_dq, part_dk, part_dv, sum_dk, sum_dv,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_db, stride_dh, stride_dt, stride_dd,
    lane0, query0, queries, chunk, chunks, hk, tq, key0, summed, split_items, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, KEEP_SCORES: tl.constexpr, MASKED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one item, added to the sums or left as partials; dQ of its pairs. Grid: (items, lanes, parts).

    The sums are those of keys key0 .. key0 + summed - 1. Blocks without any of them count for dQ alone, which the call
    for the first keys leaves.
    """
    # A tile's rows are runs of heads, each of one query; a query is one or several runs.
    HEADS: tl.constexpr = min(G & -G, ROWS)
    RUNS: tl.constexpr = ROWS // HEADS
    PER_QUERY: tl.constexpr = G // HEADS
    local_lane = tl.program_id(1).to(tl.int64)
    part = 0 if SUBS == 1 else tl.program_id(2)
    segment = local_lane * chunks + chunk
    listed += (segment * tl.num_programs(0) + tl.program_id(0)) * FIELDS
    begin, end = tl.load(listed), tl.load(listed + 1)
    first_key, limit, number = tl.load(listed + 2), tl.load(listed + 3), tl.load(listed + 4)
    if begin == end:
        return
    lane = lane0 + local_lane
    batch, head = lane // hk, lane % hk
    pairs += segment * (queries * N)
    seen += lane * tq + query0
    low += lane * tq + query0
    if key0 > 0 and (first_key + SELECT <= key0 or first_key >= key0 + summed):
        return
    offset = part * KEYS + _row_keys(tl.arange(0, KEYS), KEYS)
    key = first_key.to(tl.int64) + offset
    key_mask = key < limit
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    k_mask = key_mask[:, None] & (dim < D)[None, :]
    v_mask = key_mask[:, None] & (value_dim < DV)[None, :]
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    k_tile = tl.load(k + key[:, None] * stride_kt + dim[None, :] * stride_kd, mask=k_mask, other=0.0)
    v_tile = tl.load(v + key[:, None] * stride_vt + value_dim[None, :] * stride_vd, mask=v_mask, other=0.0)
    dk = tl.zeros([KEYS, D_PAD], tl.float32)
    dv = tl.zeros([KEYS, DV_PAD], tl.float32)
    q += batch * stride_qb + head * G * stride_qh + query0.to(tl.int64) * stride_qt
    dout += batch * stride_db + head * G * stride_dh + query0.to(tl.int64) * stride_dt
    statistics += local_lane * queries * (G * 2)
    part_dq += local_lane * (queries * N) * (SUBS * G * (KEYS if KEEP_SCORES else D))
    row, run, score = tl.arange(0, ROWS), tl.arange(0, RUNS), tl.arange(0, KEYS * HEADS)
    row_run, row_head = row // HEADS, _row_heads(row, HEADS)
    first_run, end_run = begin * PER_QUERY, end * PER_QUERY
    key32 = first_key + offset
    ahead = tl.load(pairs + tl.minimum((first_run + run) // PER_QUERY, end - 1))
    row_ahead = tl.load(pairs + tl.minimum((first_run + row_run) // PER_QUERY, end - 1))
    for first in tl.range(first_run, end_run, RUNS, num_stages=STAGES):
        pair, row_pair = ahead, row_ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        after, row_after = first + RUNS + run, first + RUNS + row_run
        ahead = tl.load(pairs + after // PER_QUERY, mask=after < end_run, other=ahead)
        row_ahead = tl.load(pairs + row_after // PER_QUERY, mask=row_after < end_run, other=row_ahead)
        # The first head of a run, and the head of a row.
        member_head = 0 if PER_QUERY == 1 else (first + run) % PER_QUERY * HEADS
        row_member_head = row_head + (0 if PER_QUERY == 1 else (first + row_run) % PER_QUERY * HEADS)
        run_mask = first + run < end_run
        query, row_query = _query(pair, N), _query(row_pair, N)
        q_at = row_query.to(OFFSET) * stride_qt + row_member_head.to(OFFSET) * stride_qh
        d_at = row_query.to(OFFSET) * stride_dt + row_member_head.to(OFFSET) * stride_dh
        q_tile = tl.load(q + (q_at[:, None] + dim[None, :] * stride_qd), mask=(dim < D)[None, :], other=0.0)
        d_at = dout + (d_at[:, None] + value_dim[None, :] * stride_dd)
        d_tile = tl.load(d_at, mask=(value_dim < DV)[None, :], other=0.0)
        records_at = statistics + (query * G + member_head) * 2
        records = tl.load(records_at[:, None] + tl.arange(0, HEADS * 2)[None, :])
        top, mean = _by_row(records, ROWS, HEADS)
        last = tl.minimum(tl.where(run_mask, tl.load(seen + query), -1), limit - 1)
        # Keys are the rows of all tiles here, so that what a product leaves in registers goes straight into the next.
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.reshape(tl.exp2(scores - top[None, :]), [KEYS, RUNS, HEADS])
        weights = tl.where(key32[:, None, None] <= last[None, :, None], weights, 0.0)
        if MASKED:
            hidden = tl.load(low + query)
            weights = tl.where(key32[:, None, None] >= hidden[None, :, None], weights, 0.0)
        weights = tl.reshape(weights, [KEYS, ROWS])
        dweights = tl.dot(v_tile, tl.trans(d_tile), input_precision=PRECISION)
        dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv, input_precision=PRECISION)
        dscores = (weights * (dweights - mean[None, :])).to(k_tile.dtype)
        dk = tl.dot(dscores, q_tile, dk, input_precision=PRECISION)
        if KEEP_SCORES:
            at = part_dq + ((pair * SUBS + part) * (KEYS * G) + member_head)
            at = at[:, None] + (score // HEADS * G + score % HEADS)[None, :]
            if HEADS >= 8:
                at = tl.max_contiguous(at, [1, min(8, HEADS // 4)])
            block = _by_head(dscores, KEYS, ROWS, HEADS)
            tl.store(at, block, mask=run_mask[:, None], cache_modifier=".cs")
        else:
            dq = tl.dot(tl.trans(k_tile), dscores, input_precision=PRECISION) * scale
            place = (row_pair * SUBS + part) * G + row_member_head
            mask = (first + row_run < end_run)[None, :] & (dim < D)[:, None]
            at = part_dq + (place[None, :] * D + dim[:, None])
            tl.store(at, dq.to(part_dq.dtype.element_ty), mask=mask)
    dk *= scale
    if number < 0:
        # What is not the call's is another's: the same block's other keys are summed there.
        key_mask = key_mask & (key >= key0) & (key < key0 + summed)
        k_mask = key_mask[:, None] & (dim < D)[None, :]
        v_mask = key_mask[:, None] & (value_dim < DV)[None, :]
        token = local_lane * summed + key - key0
        dk_at = sum_dk + token[:, None] * D + dim[None, :]
        dv_at = sum_dv + token[:, None] * DV + value_dim[None, :]
        tl.store(dk_at, tl.load(dk_at, mask=k_mask, other=0.0) + dk, mask=k_mask)
        tl.store(dv_at, tl.load(dv_at, mask=v_mask, other=0.0) + dv, mask=v_mask)
    else:
        place = (local_lane * split_items + number) * (SUBS * KEYS) + offset
        tl.store(part_dk + place[:, None] * D + dim[None, :], dk, mask=(dim < D)[None, :])
        tl.store(part_dv + place[:, None] * DV + value_dim[None, :], dv, mask=(value_dim < DV)[None, :])


@Kernel
@triton.jit(do_not_specialize=[*PLACE, "key0", "summed", "bins", "split_bins", "split_items"])
def sum_split_bins(
    base, reach, pairs, first_pair, first_split, split_bin, part_dk, part_dv, sum_dk, sum_dv,
    lane0, query0, queries, chunk, chunks, tq, key0, summed, bins, split_bins, split_items,
    N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Add the partial dK and dV of each split bin to the sums. Grid: (split bins, lanes, row tiles of a block)."""
    local_lane = tl.program_id(1).to(tl.int64)
    segment = local_lane * chunks + chunk
    owner = tl.load(split_bin + segment * split_bins + tl.program_id(0))
    if owner >= bins:
        return
    at = segment * (bins + 1) + owner
    lane = lane0 + local_lane
    base += (lane * tq + query0) * N
    pairs += segment * (queries * N)
    first_key, limit = item_keys(
        pairs, tl.load(first_pair + at), tl.load(first_pair + at + 1), base, reach + lane * tq + query0, N, SELECT
    )
    offset = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    begin, end = tl.load(first_split + at), tl.load(first_split + at + 1)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    key = first_key + offset
    key_mask = (key < limit) & (key >= key0) & (key < key0 + summed)
    k_mask = key_mask[:, None] & (dim < D)[None, :]
    v_mask = key_mask[:, None] & (value_dim < DV)[None, :]
    token = local_lane * summed + key - key0
    dk_at = sum_dk + token[:, None] * D + dim[None, :]
    dv_at = sum_dv + token[:, None] * DV + value_dim[None, :]
    dk = tl.load(dk_at, mask=k_mask, other=0.0)
    dv = tl.load(dv_at, mask=v_mask, other=0.0)
    for number in tl.range(begin, end, loop_unroll_factor=UNROLL):
        place = (local_lane * split_items + number) * (SUBS * KEYS) + offset
        dk += tl.load(part_dk + place[:, None] * D + dim[None, :], mask=k_mask, other=0.0)
        dv += tl.load(part_dv + place[:, None] * DV + value_dim[None, :], mask=v_mask, other=0.0)
    tl.store(dk_at, dk, mask=k_mask)
    tl.store(dv_at, dv, mask=v_mask)


@Kernel
@triton.jit(do_not_specialize=["lane0", "key0", "summed", "tk"])
def settle(
    sum_dk, sum_dv, dk, dv, lane0, key0, summed, tk, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the sums of some lanes to dK and dV. Grid: (numbers of a lane, lanes)."""
    local_lane = tl.program_id(1).to(tl.int64)
    token = (lane0 + local_lane) * tk + key0
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.minimum(summed, tk - key0) * D
    total = tl.load(sum_dk + local_lane * summed * D + place, mask=mask, other=0.0)
    tl.store(dk + token * D + place, total.to(dk.dtype.element_ty), mask=mask)
    mask = place < tl.minimum(summed, tk - key0) * DV
    total = tl.load(sum_dv + local_lane * summed * DV + place, mask=mask, other=0.0)
    tl.store(dv + token * DV + place, total.to(dv.dtype.element_ty), mask=mask)
