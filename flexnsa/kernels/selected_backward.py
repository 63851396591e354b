"""Selected attention, backward: one pass over (block, query) pairs gives dK, dV and each pair's share of dQ.

A program owns a run of the queries that chose one block. Scores are recomputed once; dK and dV stay in registers.
What a pair owes to dQ goes to a place of its own: the share itself, or the gradients of its scores, to be multiplied by
K later. Either is summed in the order of the query's list. Blocks chosen by very many queries (block 0 by all) are
split over programs, whose dK and dV are summed in order afterwards.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.configs import BackwardPlan, backward_plan, padded, shared_memory
from flexnsa.kernels.selected_forward import invert_span, offset_type, precision
from flexnsa.kernels.selected_pairs import LOG2E, item_keys, item_range
from flexnsa.kernels.spans import Span, spans

_ROWS_PER_ITEM = 2048
_SUM_ROWS = 16
_FOLD = 8
_PLACE = ["lane0", "query0", "queries", "chunk", "chunks", "tq"]


@triton.jit(do_not_specialize=["rows"])
def output_delta(
    out, dout, dlse, delta,
    stride_db, stride_dh, stride_dt, stride_dd, stride_lb, stride_lh, stride_lt,
    hq, tq, rows, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * dout) - dlse of each row [b, hq, tq]: what the softmax's gradient subtracts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    batch, head, token = row // (hq * tq), row // tq % hq, row % tq
    value_dim = tl.arange(0, DV_PAD)
    mask = row_mask[:, None] & (value_dim < DV)[None, :]
    x = tl.load(out + row[:, None] * DV + value_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    where = batch * stride_db + head * stride_dh + token * stride_dt
    dx = tl.load(dout + where[:, None] + value_dim[None, :] * stride_dd, mask=mask, other=0.0).to(tl.float32)
    back = tl.load(dlse + batch * stride_lb + head * stride_lh + token * stride_lt, mask=row_mask, other=0.0)
    tl.store(delta + row, tl.sum(x * dx, axis=1) - back, mask=row_mask)


@triton.jit(do_not_specialize=[*_PLACE, "tk", "bins", "items", "split", "split_items"])
def pair_gradients(
    q, k, v, dout, lse, delta, base, seen,
    pairs, first_pair, first_item, item_bin, first_split, part_dq, part_dk, part_dv, sum_dk, sum_dv,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_db, stride_dh, stride_dt, stride_dd,
    lane0, query0, queries, chunk, chunks, hk, tq, tk, bins, items, split, split_items, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, KEEP_SCORES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one item, added to the sums or left as partials; dQ of its pairs. Grid: (items, lanes, parts)."""
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
    first_key, limit = item_keys(pairs, begin, end, base, seen, N, SELECT)
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
    lse += lane * G * tq + query0
    delta += lane * G * tq + query0
    part_dq += local_lane * (queries * N) * (SUBS * G * (KEYS if KEEP_SCORES else D))
    for first in tl.range(begin * G, end * G, ROWS, num_stages=STAGES):
        member = first + row
        member_head = member % G
        row_mask = member < end * G
        pair = tl.load(pairs + tl.minimum(member // G, end - 1))
        query = pair // N
        last = tl.minimum(tl.where(row_mask, tl.load(seen + query), -1), limit - 1) - first_key
        q_at = query.to(OFFSET) * stride_qt + member_head.to(OFFSET) * stride_qh
        d_at = query.to(OFFSET) * stride_dt + member_head.to(OFFSET) * stride_dh
        q_tile = tl.load(q + (q_at[:, None] + dim[None, :] * stride_qd), mask=(dim < D)[None, :], other=0.0)
        d_at = dout + (d_at[:, None] + value_dim[None, :] * stride_dd)
        d_tile = tl.load(d_at, mask=(value_dim < DV)[None, :], other=0.0)
        top = tl.load(lse + (member_head * tq + query)) * LOG2E
        mean = tl.load(delta + (member_head * tq + query))
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(offset[None, :] <= last[:, None], tl.exp2(scores - top[:, None]), 0.0)
        dweights = tl.dot(d_tile, tl.trans(v_tile), input_precision=PRECISION)
        # Where a weight is 0 its gradient may be anything, NaN too, that an unseen value yields.
        dscores = tl.where(offset[None, :] <= last[:, None], weights * (dweights - mean[:, None]), 0.0).to(k_tile.dtype)
        dv += tl.dot(tl.trans(weights.to(d_tile.dtype)), d_tile, input_precision=PRECISION)
        dk += tl.dot(tl.trans(dscores), q_tile, input_precision=PRECISION)
        place = (pair * SUBS + tl.program_id(2)) * G + member_head
        if KEEP_SCORES:
            tl.store(part_dq + (place[:, None] * KEYS + tl.arange(0, KEYS)[None, :]), dscores, mask=row_mask[:, None])
        else:
            dq = tl.dot(dscores, k_tile, input_precision=PRECISION) * scale
            at = part_dq + (place[:, None] * D + dim[None, :])
            tl.store(at, dq.to(part_dq.dtype.element_ty), mask=row_mask[:, None] & (dim < D)[None, :])
    dk *= scale
    bin_at = segment * (bins + 1) + owner
    if tl.load(first_item + bin_at + 1) - tl.load(first_item + bin_at) == 1:
        token = local_lane * tk + key
        dk_at = sum_dk + token[:, None] * D + dim[None, :]
        dv_at = sum_dv + token[:, None] * DV + value_dim[None, :]
        tl.store(dk_at, tl.load(dk_at, mask=k_mask, other=0.0) + dk, mask=k_mask)
        tl.store(dv_at, tl.load(dv_at, mask=v_mask, other=0.0) + dv, mask=v_mask)
    else:
        number = tl.load(first_split + bin_at) + item - tl.load(first_item + bin_at)
        place = (local_lane * split_items + number) * (SUBS * KEYS) + offset
        tl.store(part_dk + place[:, None] * D + dim[None, :], dk, mask=(dim < D)[None, :])
        tl.store(part_dv + place[:, None] * DV + value_dim[None, :], dv, mask=(value_dim < DV)[None, :])


@triton.jit(do_not_specialize=[*_PLACE, "tk", "bins", "split_bins", "split_items"])
def sum_split_bins(
    base, seen, pairs, first_pair, first_split, split_bin, part_dk, part_dv, sum_dk, sum_dv,
    lane0, query0, queries, chunk, chunks, tq, tk, bins, split_bins, split_items,
    N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, FOLD: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
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
        pairs, tl.load(first_pair + at), tl.load(first_pair + at + 1), base, seen + lane * tq + query0, N, SELECT
    )
    offset = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    begin, end = tl.load(first_split + at), tl.load(first_split + at + 1)
    step = tl.where(end - begin > FOLD, FOLD, 1)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    key_mask = first_key + offset < limit
    k_mask = key_mask[:, None] & (dim < D)[None, :]
    v_mask = key_mask[:, None] & (value_dim < DV)[None, :]
    token = local_lane * tk + first_key + offset
    dk_at = sum_dk + token[:, None] * D + dim[None, :]
    dv_at = sum_dv + token[:, None] * DV + value_dim[None, :]
    dk = tl.load(dk_at, mask=k_mask, other=0.0)
    dv = tl.load(dv_at, mask=v_mask, other=0.0)
    for number in range(begin, end, step):
        place = (local_lane * split_items + number) * (SUBS * KEYS) + offset
        dk += tl.load(part_dk + place[:, None] * D + dim[None, :], mask=k_mask, other=0.0)
        dv += tl.load(part_dv + place[:, None] * DV + value_dim[None, :], mask=v_mask, other=0.0)
    tl.store(dk_at, dk, mask=k_mask)
    tl.store(dv_at, dv, mask=v_mask)


@triton.jit(do_not_specialize=["chunk", "chunks", "bins", "items", "split_items"])
def fold_split_items(
    first_item, item_bin, first_split, part_dk, part_dv, chunk, chunks, bins, items, split_items,
    D: tl.constexpr, DV: tl.constexpr, STEP: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Sum each FOLD partials of a bin of more than FOLD items into the first of them: block 0 has very many.

    Grid: (items, lanes, row tiles of a block).
    """
    item, local_lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    segment = local_lane * chunks + chunk
    owner = tl.load(item_bin + segment * items + item)
    if owner >= bins:
        return
    at = segment * (bins + 1) + owner
    first = tl.load(first_item + at)
    count = tl.load(first_item + at + 1) - first
    if (count <= FOLD) | ((item - first) % FOLD != 0):
        return
    number = tl.load(first_split + at) + item - first
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    place = ((local_lane * split_items + number) * STEP + row)[:, None]
    k_mask, v_mask = (row < STEP)[:, None] & (dim < D)[None, :], (row < STEP)[:, None] & (value_dim < DV)[None, :]
    dk = tl.zeros([ROWS, D_PAD], tl.float32)
    dv = tl.zeros([ROWS, DV_PAD], tl.float32)
    for following in tl.static_range(FOLD):
        inside = (row < tl.where(item - first + following < count, STEP, 0))[:, None]
        dk += tl.load(
            part_dk + (place + following * STEP) * D + dim[None, :], mask=inside & (dim < D)[None, :], other=0.0
        )
        dv += tl.load(
            part_dv + (place + following * STEP) * DV + value_dim[None, :],
            mask=inside & (value_dim < DV)[None, :],
            other=0.0,
        )
    tl.store(part_dk + place * D + dim[None, :], dk, mask=k_mask)
    tl.store(part_dv + place * DV + value_dim[None, :], dv, mask=v_mask)


@triton.jit(do_not_specialize=_PLACE)
def sum_query_pairs(
    part_dq, base, dq,
    lane0, query0, queries, tq,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """dQ of each query from its pairs, in the order of its list. Grid: (row tiles of a chunk, lanes)."""
    local_lane = tl.program_id(1).to(tl.int64)
    lane = lane0 + local_lane
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head = row // G, row % G
    token = query0.to(tl.int64) + query
    row_mask = (query < queries) & (token < tq)
    dim = tl.arange(0, D_PAD)
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    for slot in tl.static_range(N * SUBS):
        present = tl.load(base + (lane * tq + token) * N + slot // SUBS, mask=row_mask, other=-1) >= 0
        place = ((local_lane * queries + query) * (N * SUBS) + slot) * G + head
        mask = present[:, None] & (dim < D)[None, :]
        total += tl.load(part_dq + place[:, None] * D + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    place = (lane * G + head) * tq + token
    mask = row_mask[:, None] & (dim < D)[None, :]
    tl.store(dq + place[:, None] * D + dim[None, :], total.to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLACE)
def query_gradients(
    k, part_scores, base, seen, dq, stride_kb, stride_kh, stride_kt, stride_kd,
    lane0, query0, queries, hk, tq, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SUBS: tl.constexpr, SELECT: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a query from the gradients of its scores. Grid: (queries of a chunk, lanes, head tiles)."""
    query, local_lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = lane0 + local_lane
    token = query0.to(tl.int64) + query
    if token >= tq:
        return
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim, offset = tl.arange(0, D_PAD), tl.arange(0, KEYS)
    k += (lane // hk) * stride_kb + (lane % hk) * stride_kh
    base += (lane * tq + token) * N
    part_scores += (local_lane * queries + query) * (N * SUBS * G * KEYS)
    limit = tl.load(seen + lane * tq + token) + 1
    dq_tile = tl.zeros([ROWS, D_PAD], tl.float32)
    for step in tl.range(0, N * SUBS, num_stages=STAGES):
        first = tl.load(base + step // SUBS)
        part = first + step % SUBS * KEYS
        inside = part + offset < tl.where(first < 0, first, tl.minimum(limit, first + SELECT))
        k_tile = tl.load(
            k + (part.to(tl.int64) + offset)[:, None] * stride_kt + dim[None, :] * stride_kd,
            mask=inside[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        scores = tl.load(
            part_scores + ((step * G + row)[:, None] * KEYS + offset[None, :]),
            mask=(row < G)[:, None] & inside[None, :],
            other=0.0,
        )
        dq_tile = tl.dot(scores, k_tile, dq_tile, input_precision=PRECISION)
    place = (lane * G + row) * tq + token
    mask = (row < G)[:, None] & (dim < D)[None, :]
    tl.store(dq + place[:, None] * D + dim[None, :], (dq_tile * scale).to(dq.dtype.element_ty), mask=mask)


class Gradients(NamedTuple):
    """What the backward pass of one call reads and writes."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    blocks: Blocks
    dq: Tensor
    dk: Tensor
    dv: Tensor


def differentiate(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks,
    select_block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV of selected attention, given the gradients of its output and LSE; layouts as in the forward."""
    (_, hq, tq, dv), hk = out.shape, k.shape[1]
    delta = torch.empty_like(lse)
    output_delta[(triton.cdiv(delta.numel(), _SUM_ROWS),)](
        out, dout, dlse, delta, *dout.stride(), *dlse.stride(), hq, tq, delta.numel(),
        DV=dv, DV_PAD=padded(dv), ROWS=_SUM_ROWS,
    )  # fmt: skip
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    work = Gradients(q, k, v, dout, lse, delta, blocks, *grads)
    plan = backward_plan(q.element_size(), q.shape[-1], dv, select_block, hq // hk, shared_memory(q.device))
    pair_bytes = triton.cdiv(select_block, plan.tile.keys) * (hq // hk) * _width(plan, q) * q.element_size()
    lanes, _, n = blocks.base.shape
    todo = list(spans(lanes, tq, n, pair_bytes))
    sums = tuple(x.new_empty(todo[0].at_once, *x.shape[2:], dtype=torch.float32) for x in (k, v))
    for span in todo:
        _differentiate_span(work, sums, span, plan, select_block, scale)
    return work.dq, work.dk, work.dv


def _width(plan: BackwardPlan, q: Tensor) -> int:
    """Numbers that a pair leaves for each head."""
    return plan.tile.keys if plan.keep_scores else q.shape[-1]


def _differentiate_span(
    work: Gradients, sums: tuple[Tensor, ...], span: Span, plan: BackwardPlan, select_block: int, scale: float
) -> None:
    """Add one span's share to the sums, write dQ of its queries, and dK and dV after a lane's last queries."""
    (hq, tq, d), (hk, tk, dv), n = work.q.shape[1:], work.v.shape[1:], work.blocks.base.shape[-1]
    group, tile, blocks = hq // hk, plan.tile, work.blocks
    parts, split = triton.cdiv(select_block, tile.keys), triton.cdiv(_ROWS_PER_ITEM, group)
    inversion = invert_span(blocks.base, blocks.rank, span, tk, select_block, split)
    split_items = max(1, 2 * span.queries * n // split)
    part_dq = work.q.new_empty(span.at_once, span.queries * n * parts * group, _width(plan, work.q))
    part_dk = sums[0].new_empty(span.at_once, split_items, parts * tile.keys, d)
    part_dv = sums[1].new_empty(span.at_once, split_items, parts * tile.keys, dv)
    dims = {"D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv)}
    shape = {"N": n, "SELECT": select_block, "SUBS": parts, "KEYS": tile.keys}
    by_query = {"N": n, "G": group, "D": d, "D_PAD": padded(d), "SUBS": parts}
    row_tiles = triton.cdiv(parts * tile.keys, _SUM_ROWS)
    for lane, count, chunk in span.steps():
        found = inversion.of_lanes(lane, count)
        first_lane = span.lane + lane
        if span.query == 0 and chunk == 0:
            for total in sums:
                total.zero_()
        bins, items, split_bins = found.first_pair.shape[-1] - 1, found.item_bin.shape[-1], found.split_bin.shape[-1]
        place = (first_lane, span.query + chunk * span.queries, span.queries)
        pair_gradients[(items, count, parts)](
            *work[:6], blocks.base, blocks.seen, *found[:5], part_dq, part_dk, part_dv, *sums,
            *work.q.stride(), *work.k.stride(), *work.v.stride(), *work.dout.stride(),
            *place, chunk, span.chunks, hk, tq, tk, bins, items, split, split_items, scale,
            **shape, **dims, G=group, ROWS=tile.rows, PRECISION=precision(work.q), STAGES=tile.stages,
            OFFSET=offset_type(group, work.q, work.dout), KEEP_SCORES=plan.keep_scores, num_warps=tile.warps,
        )  # fmt: skip
        fold_split_items[(items, count, row_tiles)](
            found.first_item, found.item_bin, found.first_split, part_dk, part_dv,
            chunk, span.chunks, bins, items, split_items, **dims, STEP=parts * tile.keys, FOLD=_FOLD, ROWS=_SUM_ROWS,
        )  # fmt: skip
        sum_split_bins[(split_bins, count, row_tiles)](
            blocks.base, blocks.seen, found.pairs, found.first_pair, found.first_split, found.split_bin,
            part_dk, part_dv, *sums, *place, chunk, span.chunks, tq, tk, bins, split_bins, split_items,
            **shape, **dims, ROWS=_SUM_ROWS, FOLD=_FOLD,
        )  # fmt: skip
        if plan.keep_scores:
            query_gradients[(span.queries, count, triton.cdiv(group, _SUM_ROWS))](
                work.k, part_dq, blocks.base, blocks.seen, work.dq, *work.k.stride(), *place, hk, tq, scale,
                **by_query, SELECT=select_block, KEYS=tile.keys, ROWS=_SUM_ROWS, PRECISION=precision(work.q), STAGES=2,
                num_warps=2,
            )  # fmt: skip
        else:
            sum_query_pairs[(triton.cdiv(span.queries * group, _SUM_ROWS), count)](
                part_dq, blocks.base, work.dq, *place, tq, **by_query, ROWS=_SUM_ROWS,
            )  # fmt: skip
        if place[1] + span.queries >= tq:
            for grad, total in zip((work.dk, work.dv), sums, strict=True):
                grad.view(-1, *grad.shape[2:])[first_lane : first_lane + count] = total[:count]
