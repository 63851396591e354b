"""Selected attention block by block: a program owns a KV block and gathers the queries that chose it.

Each (query, block) pair yields a partial output and LSE of its own; a second kernel merges a query's partials in the
order of its list. A block is read once for all its queries, where a program per query would read it for each.
"""

import triton
import triton.language as tl

from flexnsa.kernels.launch import Kernel

_SIZES = ["lane0", "query0", "queries", "chunk", "chunks", "tq", "bins", "items", "split"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def item_range(item, segment, first_pair, first_item, item_bin, bins, items, split):
    """(bin, first pair, end) of an item; the bin is ``bins`` where there is no such item."""
    owner = tl.load(item_bin + segment * items + item)
    at = segment * (bins + 1) + tl.minimum(owner, bins - 1)
    begin = tl.load(first_pair + at) + (item - tl.load(first_item + at)) * split
    end = tl.minimum(begin + split, tl.load(first_pair + at + 1))
    return owner, begin, end


@triton.jit
def item_keys(pairs, begin, end, base, reach, N: tl.constexpr, SELECT: tl.constexpr):
    """(first token, limit) of an item's block: no query of the item sees a key at or past the limit."""
    first = tl.load(base + tl.load(pairs + begin))
    # Queries ascend within an item, hence the last one reaches furthest; what lies past that may be another document.
    last = tl.load(reach + tl.load(pairs + end - 1) // N)
    return first, tl.minimum(first + SELECT, last + 1)


@Kernel
@triton.jit(do_not_specialize=_SIZES)
def pair_attention(
    q, k, v, base, seen, low, reach, pairs, first_pair, first_item, item_bin, part, part_lse,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    lane0, query0, queries, chunk, chunks, hk, tq, bins, items, split, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Partial output and base-2 LSE of each pair of one item. Grid: (items, lanes, parts of a block)."""
    local_lane = tl.program_id(1).to(tl.int64)
    segment = local_lane * chunks + chunk
    owner, begin, end = item_range(tl.program_id(0), segment, first_pair, first_item, item_bin, bins, items, split)
    if owner >= bins:
        return
    lane = lane0 + local_lane
    batch, head = lane // hk, lane % hk
    pairs += segment * (queries * N)
    base += (lane * tq + query0) * N
    seen += lane * tq + query0
    low += lane * tq + query0
    token, limit = item_keys(pairs, begin, end, base, reach + lane * tq + query0, N, SELECT)
    offset = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    key = token.to(tl.int64) + offset
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    key_mask = key < limit
    k_tile = tl.load(
        k + key[None, :] * stride_kt + dim[:, None] * stride_kd, mask=key_mask[None, :] & (dim < D)[:, None], other=0.0
    )
    v_tile = tl.load(
        v + key[:, None] * stride_vt + value_dim[None, :] * stride_vd,
        mask=key_mask[:, None] & (value_dim < DV)[None, :],
        other=0.0,
    )
    row = tl.arange(0, ROWS)
    q += batch * stride_qb + head * G * stride_qh + query0.to(tl.int64) * stride_qt
    part_lse += local_lane * (queries * N) * (SUBS * G)
    part += local_lane * (queries * N) * (SUBS * G * DV)
    ahead = tl.load(pairs + tl.minimum((begin * G + row) // G, end - 1))
    for first in tl.range(begin * G, end * G, ROWS, num_stages=STAGES):
        member = first + row
        member_head = member % G
        row_mask = member < end * G
        pair = ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(pairs + tl.minimum((member + ROWS) // G, end - 1))
        query = pair // N
        last = tl.minimum(tl.where(row_mask, tl.load(seen + query), -1), limit - 1) - token
        q_at = query.to(OFFSET) * stride_qt + member_head.to(OFFSET) * stride_qh
        q_tile = tl.load(
            q + (q_at[:, None] + dim[None, :] * stride_qd),
            mask=(dim < D)[None, :],
            other=0.0,
        )
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(offset[None, :] <= last[:, None], scores, float("-inf"))
        if MASKED:
            hidden = tl.load(low + query) - token
            scores = tl.where(offset[None, :] >= hidden[:, None], scores, float("-inf"))
        top = tl.max(scores, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        some = total > 0
        total = tl.where(some, total, 1.0)
        out *= (1.0 / total)[:, None]
        place = (pair * SUBS + tl.program_id(2)) * G + member_head
        tl.store(part_lse + place, tl.where(some, top + tl.log2(total), float("-inf")), mask=row_mask)
        tl.store(
            part + (place[:, None] * DV + value_dim[None, :]),
            out.to(part.dtype.element_ty),
            mask=row_mask[:, None] & (value_dim < DV)[None, :],
        )


@Kernel
@triton.jit(do_not_specialize=["lane0", "query0", "queries", "tq"])
def merge_pairs(
    part, part_lse, rest_count, out, lse,
    lane0, query0, queries, tq,
    N: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Add a query's partials to its output and LSE, in order. Grid: (row tiles of a chunk, lanes)."""
    local_lane = tl.program_id(1).to(tl.int64)
    lane = lane0 + local_lane
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head = row // G, row % G
    token = query0.to(tl.int64) + query
    row_mask = (query < queries) & (token < tq)
    count = tl.load(rest_count + lane * tq + token, mask=row_mask, other=0) * SUBS
    most = tl.max(count, axis=0)
    if most == 0:
        return
    value_dim = tl.arange(0, DV_PAD)
    column_mask = (value_dim < DV)[None, :]
    place = (lane * G + head) * tq + token
    out_at = out + place[:, None] * DV + value_dim[None, :]
    top = tl.load(lse + place, mask=row_mask, other=float("-inf")) * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    merged = tl.load(out_at, mask=row_mask[:, None] & column_mask, other=0.0).to(tl.float32)
    for slot in tl.range(0, most, loop_unroll_factor=4):
        present = slot < count
        part_at = ((local_lane * queries + query) * (N * SUBS) + slot) * G + head
        value = tl.load(part_lse + part_at, mask=present, other=float("-inf"))
        rows_at = part + part_at[:, None] * DV + value_dim[None, :]
        rows = tl.load(rows_at, mask=present[:, None] & column_mask, other=0.0)
        higher = tl.maximum(top, value)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        kept, weight = tl.exp2(top - anchor), tl.exp2(value - anchor)
        merged = merged * kept[:, None] + rows.to(tl.float32) * weight[:, None]
        total = total * kept + weight
        top = higher
    some = total > 0
    total = tl.where(some, total, 1.0)
    # Several threads have read each of these numbers, and need not all be here yet.
    tl.debug_barrier()
    tl.store(lse + place, tl.where(some, (top + tl.log2(total)) * LN2, float("-inf")), mask=row_mask)
    merged *= (1.0 / total)[:, None]
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask)
