"""Selected attention by queries: a program owns a tile of adjacent queries, or one, and visits their blocks."""

import triton
import triton.language as tl

from flexnsa.kernels.launch import Kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visit(
    q_tile, k, v, k_at, v_at, base, first, last, top, total, out, limit, stride_kt, stride_vt, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: row r sees keys base .. base + last[r] - 1, none at or past ``limit``.

    With MASKED it sees none before ``first[r]``.

    ``k_at`` [D_PAD, KEYS] and ``v_at`` [KEYS, DV_PAD] are the places of keys and values from the first on; ``top`` is
    the highest product so far, unscaled.
    """
    offset = tl.arange(0, KEYS)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    inside = offset < limit - base
    k += base.to(tl.int64) * stride_kt
    v += base.to(tl.int64) * stride_vt
    k_tile = tl.load(k + k_at, mask=inside[None, :] & (dim < D)[:, None], other=0.0)
    v_tile = tl.load(v + v_at, mask=inside[:, None] & (value_dim < DV)[None, :], other=0.0)
    scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
    scores = tl.where(offset[None, :] < last[:, None], scores, float("-inf"))
    if MASKED:
        scores = tl.where(base + offset[None, :] >= first[:, None], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher) * scale_log2
    weights = tl.exp2(scores * scale_log2 - anchor[:, None])
    kept = tl.exp2(top * scale_log2 - anchor)
    total = total * kept + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v_tile.dtype), v_tile, out * kept[:, None], input_precision=PRECISION)
    return higher, total, out


@Kernel
@triton.jit(do_not_specialize=["tq", "most"])
def tile_attention(
    q, k, v, seen, low, base, members, count, out, lse,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    hk, tq, most, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, BY_QUERY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Output and LSE over the common blocks of a tile. Grid: (tiles, lanes, row tiles).

    With BY_QUERY a tile that shares nothing is left to ``query_attention``, output and all.
    """
    tile, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = lane // hk, lane % hk
    tile_at = lane * tl.num_programs(0) + tile
    steps = tl.load(count + tile_at) * SUBS
    if BY_QUERY and steps == 0:
        return
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    member, member_head = row // G, (row % G).to(tl.int64)
    query = tile * QUERIES + member
    row_mask = (member < QUERIES) & (query < tq)
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q += batch * stride_qb + head * G * stride_qh
    q_at = query.to(tl.int64) * stride_qt + member_head * stride_qh
    q_tile = tl.load(
        q + q_at[:, None] + dim[None, :] * stride_qd, mask=row_mask[:, None] & (dim < D)[None, :], other=0.0
    )
    last_seen = tl.load(seen + lane * tq + query, mask=row_mask, other=-1)
    first_seen = tl.load(low + lane * tq + query, mask=row_mask, other=0) if MASKED else last_seen
    limit = tl.max(last_seen, axis=0) + 1
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    offset = tl.arange(0, KEYS).to(OFFSET)
    k_at = offset[None, :] * stride_kt + dim[:, None].to(OFFSET) * stride_kd
    v_at = offset[:, None] * stride_vt + value_dim[None, :].to(OFFSET) * stride_vd
    scale_log2 = tl.maximum(scale * LOG2E, 1e-30)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = tl.load(base + tile_at * most + step // SUBS)
        bits = tl.load(members + tile_at * most + step // SUBS)
        part = first + (step % SUBS) * KEYS
        end = tl.minimum(last_seen + 1, first + SELECT)
        last = tl.where((bits >> member) & 1 != 0, end - part, 0)
        top, total, acc = visit(
            q_tile, k, v, k_at, v_at, part, first_seen, last, top, total, acc, tl.minimum(limit, first + SELECT),
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED,
        )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    place = (lane * G + member_head) * tq + query
    tl.store(lse + place, tl.where(some, (top * scale_log2 + tl.log2(total)) * LN2, float("-inf")), mask=row_mask)
    acc *= (1.0 / total)[:, None]
    mask = row_mask[:, None] & (value_dim < DV)[None, :]
    tl.store(out + place[:, None] * DV + value_dim[None, :], acc.to(out.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["tq", "tiles"])
def query_attention(
    q, k, v, seen, low, base, count, out, lse,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    hk, tq, tiles, scale,
    QUERIES: tl.constexpr, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr,
    SUBS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Output and LSE of a query whose tile shares nothing. Grid: (queries, lanes, head tiles)."""
    query, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(count + lane * tiles + query // QUERIES) > 0:
        return
    batch, head = lane // hk, lane % hk
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row_mask = row < G
    dim, value_dim = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q += batch * stride_qb + head * G * stride_qh + query.to(tl.int64) * stride_qt
    q_tile = tl.load(
        q + row.to(tl.int64)[:, None] * stride_qh + dim[None, :] * stride_qd,
        mask=row_mask[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    limit = tl.load(seen + lane * tq + query) + 1
    first_seen = tl.zeros([ROWS], tl.int32) + (tl.load(low + lane * tq + query) if MASKED else 0)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    base += (lane * tq + query) * N
    offset = tl.arange(0, KEYS).to(OFFSET)
    k_at = offset[None, :] * stride_kt + dim[:, None].to(OFFSET) * stride_kd
    v_at = offset[:, None] * stride_vt + value_dim[None, :].to(OFFSET) * stride_vd
    scale_log2 = tl.maximum(scale * LOG2E, 1e-30)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    ahead = tl.load(base)
    for step in tl.range(0, N * SUBS, num_stages=STAGES):
        first = ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(base + tl.minimum((step + 1) // SUBS, N - 1))
        part = first + (step % SUBS) * KEYS
        end = tl.where(first < 0, first, tl.minimum(first + SELECT, limit))
        last = tl.zeros([ROWS], tl.int32) + (end - part)
        top, total, acc = visit(
            q_tile, k, v, k_at, v_at, part, first_seen, last, top, total, acc, end,
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED,
        )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    place = (lane * G + row) * tq + query
    tl.store(lse + place, tl.where(some, (top * scale_log2 + tl.log2(total)) * LN2, float("-inf")), mask=row_mask)
    acc *= (1.0 / total)[:, None]
    mask = row_mask[:, None] & (value_dim < DV)[None, :]
    tl.store(out + place[:, None] * DV + value_dim[None, :], acc.to(out.dtype.element_ty), mask=mask)
