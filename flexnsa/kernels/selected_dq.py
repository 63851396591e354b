"""Selected attention, dQ: what each (block, query) pair left for it, summed in the order of the query's list.

That is the pair's share of dQ, or the gradients of its scores, which are multiplied by K here: by tiles of neighbouring
queries where these share blocks, else query by query.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.configs import BackwardPlan, padded
from flexnsa.kernels.launch import Kernel, ceil_div
from flexnsa.kernels.selected_forward import precision
from flexnsa.kernels.sharing import Sharing, share_selection

SUM_ROWS = 16
"""Rows of a program that goes over rows alone."""

PLACE = ["lane0", "query0", "queries", "chunk", "chunks", "tq"]
"""Arguments that say where a chunk is; kernels are not compiled anew for their values."""


@Kernel
@triton.jit(do_not_specialize=PLACE)
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


@Kernel
@triton.jit(do_not_specialize=PLACE)
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
    k_tile_at = k + offset.to(tl.int64)[:, None] * stride_kt + dim[None, :] * stride_kd
    part_scores += local_lane * queries * (N * SUBS * G * KEYS)
    dq_tile = tl.zeros([ROWS, D_PAD], tl.float32)
    base += tile_at * most
    slots += tile_at * most
    ahead, slots_ahead = tl.load(base), tl.load(slots)
    for step in tl.range(0, steps, num_stages=STAGES):
        first, slots_here = ahead, slots_ahead
        # A step ahead, so that the loads that depend on it wait for nothing.
        ahead = tl.load(base + (step + 1) // SUBS, mask=step + 1 < steps, other=ahead)
        slots_ahead = tl.load(slots + (step + 1) // SUBS, mask=step + 1 < steps, other=slots_ahead)
        slot = (slots_here >> (member * 8).to(tl.int64)).to(tl.int32) & 255
        part = first + step % SUBS * KEYS
        inside = part + offset < tl.minimum(limit, first + SELECT)
        k_at = k_tile_at + part.to(tl.int64) * stride_kt
        k_tile = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
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


@Kernel
@triton.jit(do_not_specialize=PLACE)
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
    k_tile_at = k + offset.to(tl.int64)[:, None] * stride_kt + dim[None, :] * stride_kd
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
        k_at = k_tile_at + part.to(tl.int64) * stride_kt
        k_tile = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
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


def share_blocks(base: Tensor, place: tuple[int, int, int], lanes: int, plan: BackwardPlan) -> Sharing:
    """What tiles of neighbouring queries have in common: of ``lanes`` from a place's lane on, and of its queries."""
    lane, query, queries = place
    # Several lanes are worked on at once only where a chunk holds all queries: the slice is always contiguous.
    here = base[lane : lane + lanes, query : query + queries]
    return share_selection(here, plan.queries, 1, plan.worth, slots=True, rest=False)


def multiply_scores(
    work: Gradients, part_scores: Tensor, sharing: Sharing, first: int, place: tuple[int, int, int], lanes: int,
    plan: BackwardPlan, select_block: int, scale: float,
) -> None:  # fmt: skip
    """dQ of a chunk's queries from the gradients of their scores: by tiles that share blocks, else by query.

    ``first`` is the chunk's first query among those that ``sharing`` is of.
    """
    (hq, tq, d), hk, queries = work.q.shape[1:], work.k.shape[1], place[2]
    group, base = hq // hk, work.blocks.base
    tile = first // plan.queries
    here = slice(tile, tile + ceil_div(queries, plan.queries))
    common_base, slots, common = (x[:, here] for x in (sharing.base, sharing.slots, sharing.common))
    tiles, most = common_base.shape[1:]
    shape = {
        "QUERIES": plan.queries, "N": base.shape[-1], "G": group, "D": d, "D_PAD": padded(d), "SELECT": select_block,
        "SUBS": ceil_div(select_block, plan.tile.keys), "KEYS": plan.tile.keys, "PRECISION": precision(work.q),
    }  # fmt: skip
    rows = min(64, padded(plan.queries * group))
    tile_gradients[(tiles, lanes, ceil_div(plan.queries * group, rows))](
        work.k, part_scores, common_base, slots, common, work.blocks.seen, work.dq, *work.k.stride(),
        *place, hk, tq, most, scale, **shape, ROWS=rows, STAGES=3, num_warps=4,
    )  # fmt: skip
    rows = min(64, padded(group))
    query_gradients[(queries, lanes, ceil_div(group, rows))](
        work.k, part_scores, base, common, work.blocks.seen, work.dq, *work.k.stride(),
        *place, hk, tq, tiles, scale, **shape, ROWS=rows, STAGES=3, num_warps=max(2, rows // 16),
    )  # fmt: skip
