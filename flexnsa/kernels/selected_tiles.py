"""Selected attention by queries: a program owns a tile of adjacent queries, or one, and visits their blocks.

Blocks that all rows see whole, most of them, need no masks: Hopper's copy engine fetches them, which spares the program
the addresses. The few at the edge of what a query sees follow.
"""

import triton
import triton.language as tl

from flexnsa.kernels.launch import Kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tokens(
    x, copy, x_at, batch, head, token, inside, stride_t,
    DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """[KEYS, PAD]: keys or values from ``token`` on.

    Those not ``inside`` are 0, except that the copy engine brings whatever is there. All are in a WHOLE tile.
    """
    if COPY:
        return copy.load([batch, head, token, 0]).reshape(KEYS, PAD)
    places = x + token.to(tl.int64) * stride_t + x_at
    within = (tl.arange(0, PAD) < DIM)[None, :]
    if not WHOLE:
        return tl.load(places, mask=within & inside[:, None], other=0.0)
    return tl.load(places) if DIM == PAD else tl.load(places, mask=within, other=0.0)


@triton.jit
def visit(
    q_tile, k, v, k_copy, v_copy, k_at, v_at, batch, head, base, first, last, limit, top, total, out,
    stride_kt, stride_vt, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: row r sees keys base .. base + last[r] - 1, none at or past ``limit``.

    With MASKED it sees none before ``first[r]``. Of a WHOLE tile a row sees all, or none where last[r] = 0.

    ``k_at`` [KEYS, D_PAD] and ``v_at`` [KEYS, DV_PAD] are the places of keys and values from the first on; ``top`` is
    the highest product so far, unscaled.
    """
    offset = tl.arange(0, KEYS)
    inside = offset < limit - base
    k_tile = load_tokens(k, k_copy, k_at, batch, head, base, inside, stride_kt, D, D_PAD, KEYS, WHOLE, COPY)
    v_tile = load_tokens(v, v_copy, v_at, batch, head, base, inside, stride_vt, DV, DV_PAD, KEYS, WHOLE, COPY)
    if COPY and not WHOLE:
        # What weighs nothing must be a number all the same.
        v_tile = tl.where(inside[:, None], v_tile, 0.0)
    scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
    if WHOLE:
        highest = tl.where(last > 0, tl.max(scores, axis=1), float("-inf"))
    else:
        scores = tl.where(offset[None, :] < last[:, None], scores, float("-inf"))
        if MASKED:
            scores = tl.where(base + offset[None, :] >= first[:, None], scores, float("-inf"))
        highest = tl.max(scores, axis=1)
    higher = tl.maximum(top, highest)
    anchor = tl.where(higher == float("-inf"), 0.0, higher) * scale_log2
    # Of what a row does not see the weights are 0: cheaper by row than by key.
    below = tl.where(last > 0, anchor, float("inf")) if WHOLE else anchor
    weights = tl.exp2(scores * scale_log2 - below[:, None])
    kept = tl.exp2(top * scale_log2 - anchor)
    total = total * kept + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v_tile.dtype), v_tile, out * kept[:, None], input_precision=PRECISION)
    return higher, total, out


@triton.jit
def finish(out, lse, place, row_mask, top, total, acc, scale_log2, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """Write the output and the LSE of rows at ``place``: 0 and -inf where a row saw no key."""
    value_dim = tl.arange(0, DV_PAD)
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse + place, tl.where(some, (top * scale_log2 + tl.log2(total)) * LN2, float("-inf")), mask=row_mask)
    acc *= (1.0 / total)[:, None]
    mask = row_mask[:, None] & (value_dim < DV)[None, :]
    tl.store(out + place[:, None] * DV + value_dim[None, :], acc.to(out.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["tq", "most"])
def tile_attention(
    q, k, v, seen, low, base, members, count, whole, out, lse, k_copy, v_copy,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    hk, tq, most, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECT: tl.constexpr, SUBS: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr, BY_QUERY: tl.constexpr, MASKED: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Output and LSE over the common blocks of a tile, those first that all of it see whole.

    Grid: (tiles, lanes, row tiles). With BY_QUERY a tile that shares nothing is left to ``query_attention``, output and
    all.
    """
    tile, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = lane // hk, lane % hk
    tile_at = lane * tl.num_programs(0) + tile
    blocks = tl.load(count + tile_at)
    if BY_QUERY and blocks == 0:
        return
    # A step that reaches past its block is masked, hence none of them whole.
    steps, wholes = blocks * SUBS, tl.load(whole + tile_at) * SUBS if SELECT % KEYS == 0 else 0
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
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    offset = tl.arange(0, KEYS).to(OFFSET)
    k_at = offset[:, None] * stride_kt + dim[None, :].to(OFFSET) * stride_kd
    v_at = offset[:, None] * stride_vt + value_dim[None, :].to(OFFSET) * stride_vd
    scale_log2 = tl.maximum(scale * LOG2E, 1e-30)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    base += tile_at * most
    members += tile_at * most
    batch, head, bit = batch.to(tl.int32), head.to(tl.int32), (1 << member)
    ahead = tl.load(base)
    for step in tl.range(0, wholes, num_stages=STAGES):
        part = ahead + (step % SUBS) * KEYS
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(base + tl.minimum((step + 1) // SUBS, most - 1))
        last = tl.load(members + step // SUBS) & bit
        top, total, acc = visit(
            q_tile, k, v, k_copy, v_copy, k_at, v_at, batch, head, part, last, last, 0, top, total, acc,
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED, True, COPY,
        )  # fmt: skip
    last_seen = tl.load(seen + lane * tq + query, mask=row_mask, other=-1)
    first_seen = tl.load(low + lane * tq + query, mask=row_mask, other=0) if MASKED else last_seen
    limit = tl.max(last_seen, axis=0) + 1
    for step in tl.range(wholes, steps, num_stages=1 if COPY else STAGES):
        first = tl.load(base + step // SUBS)
        part = first + (step % SUBS) * KEYS
        end = tl.minimum(last_seen + 1, first + SELECT)
        last = tl.where((tl.load(members + step // SUBS) & bit) != 0, end - part, 0)
        top, total, acc = visit(
            q_tile, k, v, k_copy, v_copy, k_at, v_at, batch, head, part, first_seen, last,
            tl.minimum(limit, first + SELECT), top, total, acc,
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED, False, COPY,
        )  # fmt: skip
    place = (lane * G + member_head) * tq + query
    finish(out, lse, place, row_mask, top, total, acc, scale_log2, DV, DV_PAD)


@Kernel
@triton.jit(do_not_specialize=["tq", "tiles"])
def query_attention(
    q, k, v, seen, low, base, base_count, count, out, lse, k_copy, v_copy,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    hk, tq, tiles, scale,
    QUERIES: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SELECT: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """Output and LSE over what is left to a query, added to what its tile wrote. Grid: (queries, lanes, head tiles)."""
    query, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.load(base_count + lane * tq + query)
    begun = tl.load(count + lane * tiles + query // QUERIES) > 0
    if begun and blocks == 0:
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
    start = tl.load(low + lane * tq + query) if MASKED else 0
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    base += (lane * tq + query) * N
    offset = tl.arange(0, KEYS).to(OFFSET)
    k_at = offset[:, None] * stride_kt + dim[None, :].to(OFFSET) * stride_kd
    v_at = offset[:, None] * stride_vt + value_dim[None, :].to(OFFSET) * stride_vd
    scale_log2 = tl.maximum(scale * LOG2E, 1e-30)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    place = (lane * G + row) * tq + query
    if begun:
        top = tl.load(lse + place, mask=row_mask, other=float("-inf")) * (LOG2E / scale_log2)
        mask = row_mask[:, None] & (value_dim < DV)[None, :]
        acc = tl.load(out + place[:, None] * DV + value_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    wholes = 0
    if SELECT % KEYS == 0:
        slot = tl.arange(0, N_PAD)
        every = tl.load(base + slot, mask=slot < blocks, other=-1)
        whole = (every >= start) & (every >= 0) & (every + SELECT <= limit)
        wholes = tl.min(tl.where(whole, N_PAD, slot), axis=0) * SUBS
    batch, head, all_rows = batch.to(tl.int32), head.to(tl.int32), tl.full([ROWS], 1, tl.int32)
    ahead = tl.load(base)
    for step in tl.range(0, wholes, num_stages=STAGES):
        part = ahead + (step % SUBS) * KEYS
        ahead = tl.load(base + tl.minimum((step + 1) // SUBS, N - 1))
        top, total, acc = visit(
            q_tile, k, v, k_copy, v_copy, k_at, v_at, batch, head, part, all_rows, all_rows, 0, top, total, acc,
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED, True, COPY,
        )  # fmt: skip
    for step in tl.range(wholes, blocks * SUBS, num_stages=1):
        first = tl.load(base + step // SUBS)
        part = first + (step % SUBS) * KEYS
        # Read by pointers: of these blocks the copy engine would fetch also what the query does not see.
        end = tl.where(first < 0, first, tl.minimum(first + SELECT, limit))
        top, total, acc = visit(
            q_tile, k, v, k_copy, v_copy, k_at, v_at, batch, head, part, all_rows * start, all_rows * (end - part), end,
            top, total, acc,
            stride_kt, stride_vt, scale_log2, D, DV, KEYS, D_PAD, DV_PAD, PRECISION, MASKED, False, False,
        )  # fmt: skip
    finish(out, lse, place, row_mask, top, total, acc, scale_log2, DV, DV_PAD)
