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
from flexnsa.kernels.sharing import share_selection
from flexnsa.kernels.spans import PARTIAL_BYTES, Span, spans

_ROWS_PER_ITEM = 4096
_SUM_ROWS = 16
_SPLIT_ROWS = 4
_PLACE = ["lane0", "query0", "queries", "chunk", "chunks", "tq"]


@triton.jit(do_not_specialize=_PLACE)
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


@triton.jit(do_not_specialize=[*_PLACE, "tk", "bins", "items", "split", "split_items"])
def pair_gradients(
    q, k, v, dout, tops, means, base, seen,
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
        pairs, tl.load(first_pair + at), tl.load(first_pair + at + 1), base, seen + lane * tq + query0, N, SELECT
    )
    offset = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    begin, end = tl.load(first_split + at), tl.load(first_split + at + 1)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    key_mask = first_key + offset < limit
    k_mask = key_mask[:, None] & (dim < D)[None, :]
    v_mask = key_mask[:, None] & (value_dim < DV)[None, :]
    token = local_lane * tk + first_key + offset
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
def tile_gradients(
    k, part_scores, base, slots, count, seen, dq, stride_kb, stride_kh, stride_kt, stride_kd,
    lane0, query0, queries, hk, tq, most, scale,
    QUERIES: tl.constexpr, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SUBS: tl.constexpr, SELECT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries that share blocks, from their scores' gradients. Grid: (tiles, lanes, row tiles)."""
    tile, local_lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile_at = local_lane * tl.num_programs(0) + tile
    steps = tl.load(count + tile_at) * SUBS
    if steps == 0:
        return
    lane = lane0 + local_lane
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    member, head = row // G, row % G
    query = tile * QUERIES + member
    token = query0.to(tl.int64) + query
    row_mask = (member < QUERIES) & (query < queries) & (token < tq)
    limit = tl.max(tl.load(seen + lane * tq + token, mask=row_mask, other=-1), axis=0) + 1
    dim, offset = tl.arange(0, D_PAD), tl.arange(0, KEYS)
    k += (lane // hk) * stride_kb + (lane % hk) * stride_kh
    part_scores += local_lane * queries * (N * SUBS * G * KEYS)
    dq_tile = tl.zeros([ROWS, D_PAD], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = tl.load(base + tile_at * most + step // SUBS)
        slot = (tl.load(slots + tile_at * most + step // SUBS) >> (member * 8).to(tl.int64)).to(tl.int32) & 255
        part = first + step % SUBS * KEYS
        inside = part + offset < tl.minimum(limit, first + SELECT)
        k_tile = tl.load(
            k + (part.to(tl.int64) + offset)[:, None] * stride_kt + dim[None, :] * stride_kd,
            mask=inside[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        pair = (query * N + slot) * SUBS + step % SUBS
        at = pair.to(tl.int64) * (KEYS * G) + head
        if G >= 8 and G & (G - 1) == 0:
            at = tl.max_contiguous(tl.multiple_of(at, G), G)
        scores = tl.load(
            part_scores + (at[:, None] + offset[None, :] * G),
            mask=(row_mask & (slot != 255))[:, None] & inside[None, :],
            other=0.0,
        )
        dq_tile = tl.dot(scores, k_tile, dq_tile, input_precision=PRECISION)
    place = (lane * G + head) * tq + token
    mask = row_mask[:, None] & (dim < D)[None, :]
    tl.store(dq + place[:, None] * D + dim[None, :], (dq_tile * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLACE)
def query_gradients(
    k, part_scores, base, count, seen, dq, stride_kb, stride_kh, stride_kt, stride_kd,
    lane0, query0, queries, hk, tq, tiles, scale,
    QUERIES: tl.constexpr, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SUBS: tl.constexpr, SELECT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a query whose tile shares nothing. Grid: (queries of a chunk, lanes, head tiles)."""
    query, local_lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = lane0 + local_lane
    token = query0.to(tl.int64) + query
    if token >= tq:
        return
    if tl.load(count + local_lane * tiles + query // QUERIES) > 0:
        return
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim, offset = tl.arange(0, D_PAD), tl.arange(0, KEYS)
    k += (lane // hk) * stride_kb + (lane % hk) * stride_kh
    base += (lane * tq + token) * N
    part_scores += (local_lane * queries + query) * (N * SUBS * G * KEYS)
    limit = tl.load(seen + lane * tq + token) + 1
    dq_tile = tl.zeros([ROWS, D_PAD], tl.float32)
    ahead = tl.load(base)
    for step in tl.range(0, N * SUBS, num_stages=STAGES):
        first = ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(base + tl.minimum((step + 1) // SUBS, N - 1))
        part = first + step % SUBS * KEYS
        inside = part + offset < tl.where(first < 0, first, tl.minimum(limit, first + SELECT))
        k_tile = tl.load(
            k + (part.to(tl.int64) + offset)[:, None] * stride_kt + dim[None, :] * stride_kd,
            mask=inside[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        scores = tl.load(
            part_scores + ((step * KEYS + offset)[None, :] * G + row[:, None]),
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
    dlse: Tensor
    out: Tensor
    lse: Tensor
    blocks: Blocks
    dq: Tensor
    dk: Tensor
    dv: Tensor


def differentiate(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks,
    select_block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV of selected attention, given the gradients of its output and LSE; layouts as in the forward."""
    group, dv = q.shape[1] // k.shape[1], v.shape[-1]
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    work = Gradients(q, k, v, dout, dlse, out, lse, blocks, *grads)
    plan = backward_plan(q.element_size(), q.shape[-1], dv, select_block, group, shared_memory(q.device))
    keys, split = triton.cdiv(select_block, plan.tile.keys) * plan.tile.keys, _pairs_per_item(group)
    width = keys if plan.keep_scores else keys // plan.tile.keys * q.shape[-1]
    item_bytes = keys * (q.shape[-1] + dv) * 4
    pair_bytes = group * width * q.element_size() + 2 * item_bytes // split
    lanes, tq, n = blocks.base.shape
    other_bytes = k.shape[2] * (q.shape[-1] + dv) * 4 + blocks.base.nbytes
    todo = list(spans(lanes, tq, n, pair_bytes, max(PARTIAL_BYTES // 4, PARTIAL_BYTES - other_bytes)))
    sums = tuple(x.new_empty(todo[0].at_once, *x.shape[2:], dtype=torch.float32) for x in (k, v))
    for span in todo:
        _differentiate_span(work, sums, span, plan, select_block, scale)
    return work.dq, work.dk, work.dv


def _pairs_per_item(group: int) -> int:
    return triton.cdiv(_ROWS_PER_ITEM, group)


def _width(plan: BackwardPlan, q: Tensor) -> int:
    """Numbers that a pair leaves for each head."""
    return plan.tile.keys if plan.keep_scores else q.shape[-1]


def _differentiate_span(
    work: Gradients, sums: tuple[Tensor, ...], span: Span, plan: BackwardPlan, select_block: int, scale: float
) -> None:
    """Add one span's share to the sums, write dQ of its queries, and dK and dV after a lane's last queries."""
    (hq, tq, d), (hk, tk, dv), n = work.q.shape[1:], work.v.shape[1:], work.blocks.base.shape[-1]
    group, tile, blocks = hq // hk, plan.tile, work.blocks
    parts, split = triton.cdiv(select_block, tile.keys), _pairs_per_item(group)
    inversion = invert_span(blocks.base, blocks.rank, span, tk, select_block, split)
    split_items = max(1, 2 * span.queries * n // split)
    tops, means = (work.lse.new_empty(span.at_once, span.queries, group) for _ in range(2))
    part_dq = work.q.new_empty(span.at_once, span.queries * n * parts * group, _width(plan, work.q))
    part_dk = sums[0].new_empty(span.at_once, split_items, parts * tile.keys, d)
    part_dv = sums[1].new_empty(span.at_once, split_items, parts * tile.keys, dv)
    dims = {"D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv)}
    shape = {"N": n, "SELECT": select_block, "SUBS": parts, "KEYS": tile.keys}
    row_tiles = triton.cdiv(parts * tile.keys, _SPLIT_ROWS)
    query_tiles = triton.cdiv(span.queries * group, _SUM_ROWS)
    for lane, count, chunk in span.steps():
        found = inversion.of_lanes(lane, count)
        first_lane = span.lane + lane
        if span.query == 0 and chunk == 0:
            for total in sums:
                total.zero_()
        bins, items, split_bins = found.first_pair.shape[-1] - 1, found.item_bin.shape[-1], found.split_bin.shape[-1]
        place = (first_lane, span.query + chunk * span.queries, span.queries)
        row_statistics[(query_tiles, count)](
            work.out, work.dout, work.lse, work.dlse, tops, means, *work.dout.stride(), *work.dlse.stride(),
            *place, hk, tq, G=group, DV=dv, DV_PAD=padded(dv), ROWS=_SUM_ROWS,
        )  # fmt: skip
        pair_gradients[(items, count, parts)](
            *work[:4], tops, means, blocks.base, blocks.seen, *found[:5], part_dq, part_dk, part_dv, *sums,
            *work.q.stride(), *work.k.stride(), *work.v.stride(), *work.dout.stride(),
            *place, chunk, span.chunks, hk, tq, tk, bins, items, split, split_items, scale,
            **shape, **dims, G=group, ROWS=tile.rows, PRECISION=precision(work.q), STAGES=tile.stages,
            OFFSET=offset_type(group, work.q, work.dout), KEEP_SCORES=plan.keep_scores, num_warps=tile.warps,
        )  # fmt: skip
        sum_split_bins[(split_bins, count, row_tiles)](
            blocks.base, blocks.seen, found.pairs, found.first_pair, found.first_split, found.split_bin,
            part_dk, part_dv, *sums, *place, chunk, span.chunks, tq, tk, bins, split_bins, split_items,
            **shape, **dims, ROWS=_SPLIT_ROWS, UNROLL=8,
        )  # fmt: skip
        if plan.keep_scores:
            _multiply_scores(work, part_dq, place, count, plan, select_block, scale)
        else:
            sum_query_pairs[(query_tiles, count)](
                part_dq, blocks.base, work.dq, *place, tq,
                N=n, G=group, D=d, D_PAD=padded(d), SUBS=parts, ROWS=_SUM_ROWS,
            )  # fmt: skip
        if place[1] + span.queries >= tq:
            for grad, total in zip((work.dk, work.dv), sums, strict=True):
                grad.view(-1, *grad.shape[2:])[first_lane : first_lane + count] = total[:count]


def _multiply_scores(
    work: Gradients, part_scores: Tensor, place: tuple[int, int, int], lanes: int, plan: BackwardPlan,
    select_block: int, scale: float,
) -> None:  # fmt: skip
    """dQ of a chunk's queries from the gradients of their scores: by tiles that share blocks, else by query."""
    (hq, tq, d), hk, (lane, query, queries) = work.q.shape[1:], work.k.shape[1], place
    group, base = hq // hk, work.blocks.base
    # Several lanes are worked on at once only where a chunk holds all queries: the slice is always contiguous.
    sharing = share_selection(
        base[lane : lane + lanes, query : query + queries], plan.queries, 1, plan.worth, slots=True
    )
    tiles, most = sharing.base.shape[1:]
    shape = {
        "QUERIES": plan.queries, "N": base.shape[-1], "G": group, "D": d, "D_PAD": padded(d), "SELECT": select_block,
        "SUBS": triton.cdiv(select_block, plan.tile.keys), "KEYS": plan.tile.keys, "PRECISION": precision(work.q),
    }  # fmt: skip
    rows = min(64, padded(plan.queries * group))
    tile_gradients[(tiles, lanes, triton.cdiv(plan.queries * group, rows))](
        work.k, part_scores, sharing.base, sharing.slots, sharing.common, work.blocks.seen, work.dq, *work.k.stride(),
        *place, hk, tq, most, scale, **shape, ROWS=rows, STAGES=3, num_warps=4,
    )  # fmt: skip
    rows = min(64, padded(group))
    query_gradients[(queries, lanes, triton.cdiv(group, rows))](
        work.k, part_scores, base, sharing.common, work.blocks.seen, work.dq, *work.k.stride(),
        *place, hk, tq, tiles, scale, **shape, ROWS=rows, STAGES=3, num_warps=max(2, rows // 16),
    )  # fmt: skip
