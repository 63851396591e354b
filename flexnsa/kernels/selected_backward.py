"""Selected attention, backward: one pass over (block, query) pairs gives dK, dV and each pair's share of dQ.

A program owns a run of the queries that chose one block. Scores are recomputed once; dK and dV stay in registers.
What a pair owes to dQ goes to a place of its own: the share itself, or the gradients of its scores, to be multiplied by
K later. Either is summed in the order of the query's list. Blocks chosen by very many queries (block 0 by all) are
split over programs, whose dK and dV are summed in order afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.configs import BackwardPlan, backward_plan, padded, shared_memory
from flexnsa.kernels.inversion import invert_selection
from flexnsa.kernels.launch import Kernel, ceil_div
from flexnsa.kernels.selected_dq import PLACE, SUM_ROWS, Gradients, multiply_scores, sum_query_pairs
from flexnsa.kernels.selected_forward import offset_type, precision
from flexnsa.kernels.selected_pairs import LOG2E, item_keys, item_range
from flexnsa.kernels.spans import PARTIAL_BYTES, Span, spans

_ROWS_PER_ITEM = 4096
_SPLIT_ROWS = 4
_SETTLED = 2048

SUM_BYTES = 256 << 20
"""Bytes that the float32 sums of dK and dV may take."""


@Kernel
@triton.jit(do_not_specialize=PLACE)
def row_statistics(
    out, dout, lse, dlse, tops, means,
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
    into = local_lane * queries * G + row
    tl.store(means + into, tl.sum(x * dx, axis=1) - back, mask=row_mask)
    tl.store(tops + into, tl.load(lse + place, mask=row_mask, other=0.0) * LOG2E, mask=row_mask)


@Kernel
@triton.jit(do_not_specialize=[*PLACE, "key0", "summed", "bins", "items", "split", "split_items"])
def pair_gradients(
    q, k, v, dout, tops, means, base, seen, low, reach,
    pairs, first_pair, first_item, item_bin, first_split, part_dq, part_dk, part_dv, sum_dk, sum_dv,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_db, stride_dh, stride_dt, stride_dd,
    lane0, query0, queries, chunk, chunks, hk, tq, key0, summed, bins, items, split, split_items, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, KEEP_SCORES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one item, added to the sums or left as partials; dQ of its pairs. Grid: (items, lanes, parts).

    The sums are those of keys key0 .. key0 + summed - 1. Blocks without any of them count for dQ alone, which the call
    for the first keys leaves.
    """
    item = tl.program_id(0)
    local_lane = tl.program_id(1).to(tl.int64)
    segment = local_lane * chunks + chunk
    owner, begin, end = item_range(item, segment, first_pair, first_item, item_bin, bins, items, split)
    if owner >= bins:
        return
    lane = lane0 + local_lane
    batch, head = lane // hk, lane % hk
    pairs += segment * (queries * N)
    base += (lane * tq + query0) * N
    seen += lane * tq + query0
    low += lane * tq + query0
    first_key, limit = item_keys(pairs, begin, end, base, reach + lane * tq + query0, N, SELECT)
    if key0 > 0 and (first_key + SELECT <= key0 or first_key >= key0 + summed):
        return
    offset = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
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
    row = tl.arange(0, ROWS)
    q += batch * stride_qb + head * G * stride_qh + query0.to(tl.int64) * stride_qt
    dout += batch * stride_db + head * G * stride_dh + query0.to(tl.int64) * stride_dt
    tops += local_lane * queries * G
    means += local_lane * queries * G
    part_dq += local_lane * (queries * N) * (SUBS * G * (KEYS if KEEP_SCORES else D))
    ahead = tl.load(pairs + tl.minimum((begin * G + row) // G, end - 1))
    for first in tl.range(begin * G, end * G, ROWS, num_stages=STAGES):
        member = first + row
        member_head = member % G
        row_mask = member < end * G
        pair = ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(pairs + tl.minimum((member + ROWS) // G, end - 1))
        query = pair // N
        last = tl.minimum(tl.where(row_mask, tl.load(seen + query), -1), limit - 1) - first_key
        q_at = query.to(OFFSET) * stride_qt + member_head.to(OFFSET) * stride_qh
        d_at = query.to(OFFSET) * stride_dt + member_head.to(OFFSET) * stride_dh
        q_tile = tl.load(q + (q_at[:, None] + dim[None, :] * stride_qd), mask=(dim < D)[None, :], other=0.0)
        d_at = dout + (d_at[:, None] + value_dim[None, :] * stride_dd)
        d_tile = tl.load(d_at, mask=(value_dim < DV)[None, :], other=0.0)
        top = tl.load(tops + (query * G + member_head))
        mean = tl.load(means + (query * G + member_head))
        # Keys are the rows of all tiles here, so that what a product leaves in registers goes straight into the next.
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(offset[:, None] <= last[None, :], tl.exp2(scores - top[None, :]), 0.0)
        if MASKED:
            hidden = tl.load(low + query) - first_key
            weights = tl.where(offset[:, None] >= hidden[None, :], weights, 0.0)
        dweights = tl.dot(v_tile, tl.trans(d_tile), input_precision=PRECISION)
        dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv, input_precision=PRECISION)
        dscores = (weights * (dweights - mean[None, :])).to(k_tile.dtype)
        dk = tl.dot(dscores, q_tile, dk, input_precision=PRECISION)
        place = (pair * SUBS + tl.program_id(2)) * G + member_head
        if KEEP_SCORES:
            at = (pair * SUBS + tl.program_id(2)) * (KEYS * G) + member_head
            tl.store(
                part_dq + (at[None, :] + tl.arange(0, KEYS)[:, None] * G),
                dscores,
                mask=row_mask[None, :],
                cache_modifier=".cs",
            )
        else:
            dq = tl.dot(tl.trans(k_tile), dscores, input_precision=PRECISION) * scale
            at = part_dq + (place[None, :] * D + dim[:, None])
            tl.store(at, dq.to(part_dq.dtype.element_ty), mask=row_mask[None, :] & (dim < D)[:, None])
    dk *= scale
    bin_at = segment * (bins + 1) + owner
    if tl.load(first_item + bin_at + 1) - tl.load(first_item + bin_at) == 1:
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
        number = tl.load(first_split + bin_at) + item - tl.load(first_item + bin_at)
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


def differentiate(work: Gradients, select_block: int, scale: float) -> None:
    """Write dQ, dK and dV of selected attention, given the gradients of its output and LSE.

    dK and dV are summed over all queries in float32. Where the sums of all keys would be larger than ``SUM_BYTES``, the
    queries are gone through again for each run of keys that are not.
    """
    q, k, v, blocks = work.q, work.k, work.v, work.blocks
    group, dv = q.shape[1] // k.shape[1], v.shape[-1]
    plan = backward_plan(q.element_size(), q.shape[-1], dv, select_block, group, shared_memory(q.device))
    parts, split = ceil_div(select_block, plan.tile.keys), _pairs_per_item(group)
    item_bytes = parts * plan.tile.keys * (q.shape[-1] + dv) * 4
    pair_bytes = group * parts * _width(plan, q) * q.element_size() + 2 * item_bytes // split
    key_bytes = (q.shape[-1] + dv) * 4
    summed = min(k.shape[2], max(select_block, SUM_BYTES // key_bytes))
    other_bytes = summed * key_bytes + blocks.base.nbytes
    lanes, tq, n = blocks.base.shape
    todo = list(spans(lanes, tq, n, pair_bytes, max(PARTIAL_BYTES // 4, PARTIAL_BYTES - other_bytes)))
    sums = k.new_empty(todo[0].at_once * summed * (q.shape[-1] + dv), dtype=torch.float32)
    for key in range(0, k.shape[2], summed):
        for span in todo:
            _differentiate_span(work, sums, key, summed, span, plan, select_block, scale)


def _pairs_per_item(group: int) -> int:
    return ceil_div(_ROWS_PER_ITEM, group)


def _width(plan: BackwardPlan, q: Tensor) -> int:
    """Numbers that a pair leaves for each head and part of its block."""
    return plan.tile.keys if plan.keep_scores else q.shape[-1]


def _differentiate_span(
    work: Gradients, sums: Tensor, key: int, summed: int, span: Span, plan: BackwardPlan, select_block: int,
    scale: float,
) -> None:  # fmt: skip
    """Add one span's share to the sums of ``summed`` keys from ``key`` on, write dK and dV after a lane's last queries,
    and, with the first keys, dQ of its queries."""
    (hq, tq, d), (hk, tk, dv), n = work.q.shape[1:], work.v.shape[1:], work.blocks.base.shape[-1]
    group, tile, blocks = hq // hk, plan.tile, work.blocks
    parts, split = ceil_div(select_block, tile.keys), _pairs_per_item(group)
    found = invert_selection(blocks.base, blocks.rank, span, tk, select_block, split)
    bins, items, split_bins = found.first_pair.shape[-1] - 1, found.item_bin.shape[-1], found.split_bin.shape[-1]
    sum_dk, sum_dv = sums.split([span.at_once * summed * x for x in (d, dv)])
    split_items = max(1, 2 * span.queries * n // split)
    tops, means = (work.lse.new_empty(span.at_once, span.queries, group) for _ in range(2))
    part_dq = work.q.new_empty(span.at_once, span.queries * n * parts * group, _width(plan, work.q))
    part_dk = sums.new_empty(span.at_once, split_items, parts * tile.keys, d)
    part_dv = sums.new_empty(span.at_once, split_items, parts * tile.keys, dv)
    dims = {"D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv)}
    shape = {"N": n, "SELECT": select_block, "SUBS": parts, "KEYS": tile.keys}
    row_tiles = ceil_div(parts * tile.keys, _SPLIT_ROWS)
    query_tiles = ceil_div(span.queries * group, SUM_ROWS)
    for lane, count, chunk in span.steps():
        first_lane = span.lane + lane
        if span.query == 0 and chunk == 0:
            sums.zero_()
        segment = lane * span.chunks + chunk
        place = (first_lane, span.query + chunk * span.queries, span.queries)
        row_statistics[(query_tiles, count)](
            work.out, work.dout, work.lse, work.dlse, tops, means, *work.dout.stride(), *work.dlse.stride(),
            *place, hk, tq, G=group, DV=dv, DV_PAD=padded(dv), ROWS=SUM_ROWS,
        )  # fmt: skip
        pair_gradients[(items, count, parts)](
            *work[:4], tops, means, *blocks[:4], *found[:5], part_dq, part_dk, part_dv, sum_dk, sum_dv,
            *work.q.stride(), *work.k.stride(), *work.v.stride(), *work.dout.stride(),
            *place, segment, span.chunks, hk, tq, key, summed, bins, items, split, split_items, scale,
            **shape, **dims, G=group, ROWS=tile.rows, PRECISION=precision(work.q), STAGES=tile.stages,
            OFFSET=offset_type(group, work.q, work.dout), KEEP_SCORES=plan.keep_scores, MASKED=blocks.masked,
            num_warps=tile.warps,
        )  # fmt: skip
        sum_split_bins[(split_bins, count, row_tiles)](
            blocks.base, blocks.reach, found.pairs, found.first_pair, found.first_split, found.split_bin,
            part_dk, part_dv, sum_dk, sum_dv,
            *place, segment, span.chunks, tq, key, summed, bins, split_bins, split_items,
            **shape, **dims, ROWS=_SPLIT_ROWS, UNROLL=8,
        )  # fmt: skip
        if plan.keep_scores and key == 0:
            multiply_scores(work, part_dq, place, count, plan, select_block, scale)
        elif key == 0:
            sum_query_pairs[(query_tiles, count)](
                part_dq, blocks.base, work.dq, *place, tq,
                N=n, G=group, D=d, D_PAD=padded(d), SUBS=parts, ROWS=SUM_ROWS,
            )  # fmt: skip
        if place[1] + span.queries >= tq:
            settle[(ceil_div(summed * max(d, dv), _SETTLED), count)](
                sum_dk, sum_dv, work.dk, work.dv, first_lane, key, summed, tk, D=d, DV=dv, BLOCK=_SETTLED
            )
