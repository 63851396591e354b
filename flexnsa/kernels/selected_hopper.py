"""Selected attention by queries on Hopper, in Gluon: one warp fetches, a warpgroup of four works on what has come.

A program owns four adjacent queries of 16 heads. The blocks that several of them chose are visited by the warpgroup as
one tile of 64 rows; what is left to each query, as many whole blocks to one as to another, by its own warp of the four,
without leaving the registers in between. All of it comes through one ring of shared memory, filled by the copy engine
as far ahead as there is room, so that nobody waits for a memory access that he could have asked for earlier.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexnsa.kernels.launch import Kernel

QUERIES = gl.constexpr(4)
HEADS = gl.constexpr(16)
ROWS = gl.constexpr(64)
BLOCK = gl.constexpr(64)
HALF = gl.constexpr(64)
PART = gl.constexpr(16)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
"""How half of a block lies in shared memory."""

LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""How 64 rows of half the dims lie in registers where they come from memory or go there."""

# Triton 3.6 and later versions name these differently.
_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier
_fetch: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _fetch_block(copy, full, left, right, slot, batch, head, token):
    """Keys or values of a block, both halves of their dims, for all queries."""
    bar = full.index(slot)
    mbarrier.expect(bar, BLOCK * 2 * HALF * 2)
    _fetch(copy, [batch, head, token, 0], bar, left.index(slot))
    _fetch(copy, [batch, head, token, HALF], bar, right.index(slot))


@gluon.jit
def _fetch_part(copy, bar, left, right, batch, head, token, member: gl.constexpr):
    """A few keys or values for one query."""
    _fetch(copy, [batch, head, token, 0], bar, left.slice(member * PART, PART, 2))
    _fetch(copy, [batch, head, token, HALF], bar, right.slice(member * PART, PART, 2))


@gluon.jit
def _fetch_parts(copy, full, x0, x1, slot, batch, head, first, second, third, fourth, offset):
    """Of each query's own block the part from ``offset`` on."""
    bar, left, right = full.index(slot), x0.index(slot), x1.index(slot)
    mbarrier.expect(bar, QUERIES * PART * 2 * HALF * 2)
    _fetch_part(copy, bar, left, right, batch, head, first + offset, 0)
    _fetch_part(copy, bar, left, right, batch, head, second + offset, 1)
    _fetch_part(copy, bar, left, right, batch, head, third + offset, 2)
    _fetch_part(copy, bar, left, right, batch, head, fourth + offset, 3)


@gluon.jit
def _produce(
    k_copy, v_copy, k_part, v_part, k_full, v_full, k_free, v_free, k0, k1, v0, v1,
    base, rest, count, rest_count, batch, head, N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Fill the ring: the common blocks, then the parts of the others, each as soon as its slot is free."""
    blocks, left, ahead = gl.load(count), gl.load(rest_count), gl.load(base)
    for step in range(blocks):
        token = ahead
        ahead = gl.load(base + gl.minimum(step + 1, blocks - 1))
        slot, turn = step % SLOTS, (step // SLOTS) & 1 ^ 1
        mbarrier.wait(k_free.index(slot), turn)
        _fetch_block(k_copy, k_full, k0, k1, slot, batch, head, token)
        mbarrier.wait(v_free.index(slot), turn)
        _fetch_block(v_copy, v_full, v0, v1, slot, batch, head, token)
    for number in range(left):
        first, second = gl.load(rest + number), gl.load(rest + N + number)
        third, fourth = gl.load(rest + 2 * N + number), gl.load(rest + 3 * N + number)
        for part in range(BLOCK // PART):
            step = blocks + number * (BLOCK // PART) + part
            slot, turn = step % SLOTS, step // SLOTS & 1 ^ 1
            mbarrier.wait(k_free.index(slot), turn)
            _fetch_parts(
                k_part, k_full, k0, k1, slot, batch, head, first, second, third, fourth, part * PART
            )  # fmt: skip
            mbarrier.wait(v_free.index(slot), turn)
            _fetch_parts(
                v_part, v_full, v0, v1, slot, batch, head, first, second, third, fourth, part * PART
            )  # fmt: skip


@gluon.jit
def _multiply(a0, a1, x0, x1, slot, zero):
    """Products of queries and the keys of a slot, under way."""
    x0, x1 = x0.index(slot).reshape((BLOCK, HALF)), x1.index(slot).reshape((BLOCK, HALF))
    under_way = hopper.warpgroup_mma(a0, x0.permute((1, 0)), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(a1, x1.permute((1, 0)), under_way, is_async=True)


@gluon.jit
def _soften(scores, step, wholes, base, members, bit, last_seen, top, total, scale_log2, like):
    """Weights of a block, an operand like ``like``; what is kept of what was before; the new maximum and sum."""
    mine = gl.load(members + step) & bit
    if step >= wholes:
        key = gl.load(base + step) + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= last_seen[:, None], scores, float("-inf"))
    highest = gl.where(mine != 0, gl.max(scores, axis=1), float("-inf"))
    higher = gl.maximum(top, highest)
    anchor = gl.where(higher == float("-inf"), 0.0, higher) * scale_log2
    # Of a row that did not choose the block the weights are 0.
    below = gl.where(mine != 0, anchor, float("inf"))
    weights = gl.exp2(scores * scale_log2 - below[:, None])
    kept = gl.exp2(top * scale_log2 - anchor)
    total = total * kept + gl.sum(weights, axis=1)
    return gl.convert_layout(weights.to(like.dtype), like.type.layout), kept, higher, total


@gluon.jit
def _last(seen, present):
    """The last key that any query of the tile sees."""
    last = -1
    for member in gl.static_range(QUERIES):
        last = gl.maximum(last, gl.load(seen + member, mask=member < present, other=-1))
    return last


@gluon.jit
def _clear(v0, v1, slot, first, limit, layout: gl.constexpr):
    """Zero the values that no query of the tile sees: what weighs nothing must be a number all the same."""
    seen = (first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout)) < limit)[:, None]
    v0, v1 = v0.index(slot).reshape((BLOCK, HALF)), v1.index(slot).reshape((BLOCK, HALF))
    v0.store(gl.where(seen, v0.load(layout), 0.0))
    v1.store(gl.where(seen, v1.load(layout), 0.0))
    hopper.fence_async_shared()
    _barrier()


@gluon.jit
def _visit_common(
    q0, q1, k0, k1, v0, v1, k_full, v_full, k_free, v_free, base, members, seen, blocks, wholes, present, top, total,
    acc0, acc1, scale_log2, SLOTS: gl.constexpr,
):  # fmt: skip
    """All rows visit each common block: its softmax is taken while the last one's weights meet their values."""
    layout: gl.constexpr = acc0.type.layout
    member = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) // HEADS
    last_seen = gl.load(seen + member, mask=member < present, other=-1)
    limit = _last(seen, present) + 1
    bit = 1 << member
    zero = gl.zeros((ROWS, BLOCK), gl.float32, layout)
    mbarrier.wait(k_full.index(0), 0)
    under_way = _multiply(q0, q1, k0, k1, 0, zero)
    scores = hopper.warpgroup_mma_wait(0, deps=(under_way,))
    _barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    weights, kept, top, total = _soften(scores, 0, wholes, base, members, bit, last_seen, top, total, scale_log2, q0)
    mbarrier.wait(v_full.index(0), 0)
    for step in range(blocks - 1):
        slot, after = step % SLOTS, (step + 1) % SLOTS
        mbarrier.wait(k_full.index(after), (step + 1) // SLOTS & 1)
        under_way = _multiply(q0, q1, k0, k1, after, zero)
        if step >= wholes:
            _clear(v0, v1, slot, gl.load(base + step), limit, LINES)
        sum0 = hopper.warpgroup_mma(weights, v0.index(slot).reshape((BLOCK, HALF)), acc0, is_async=True)
        sum1 = hopper.warpgroup_mma(weights, v1.index(slot).reshape((BLOCK, HALF)), acc1, is_async=True)
        scores = hopper.warpgroup_mma_wait(2, deps=(under_way,))
        _barrier()
        mbarrier.arrive(k_free.index(after), count=1)
        later, kept, top, total = _soften(
            scores, step + 1, wholes, base, members, bit, last_seen, top, total, scale_log2, q0
        )  # fmt: skip
        # A wait of this kind, which ends in a branch, keeps ptxas from moving the softmax behind that for the products.
        mbarrier.wait(v_full.index(after), (step + 1) // SLOTS & 1)
        acc0, acc1, weights, later = hopper.warpgroup_mma_wait(0, deps=(sum0, sum1, weights, later))
        _barrier()
        mbarrier.arrive(v_free.index(slot), count=1)
        acc0 *= kept[:, None]
        acc1 *= kept[:, None]
        weights = later
    end = blocks - 1
    last_slot = end % SLOTS
    if end >= wholes:
        _clear(v0, v1, last_slot, gl.load(base + end), limit, LINES)
    sum0 = hopper.warpgroup_mma(weights, v0.index(last_slot).reshape((BLOCK, HALF)), acc0, is_async=True)
    sum1 = hopper.warpgroup_mma(weights, v1.index(last_slot).reshape((BLOCK, HALF)), acc1, is_async=True)
    acc0, acc1, weights = hopper.warpgroup_mma_wait(0, deps=(sum0, sum1, weights))
    _barrier()
    mbarrier.arrive(v_free.index(last_slot), count=1)
    return top, total, acc0, acc1


@gluon.jit
def _visit_rest(
    q0, q1, k0, k1, v0, v1, k_full, v_full, k_free, v_free, blocks, left, top, total, acc0, acc1,
    scale_log2, SLOTS: gl.constexpr,
):  # fmt: skip
    """Each warp, which holds one query's heads, visits what is left to it, a part of a block a step."""
    layout: gl.constexpr = acc0.type.layout
    given: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    zero = gl.zeros((QUERIES, HEADS, PART), gl.float32, layout)
    shape: gl.constexpr = (QUERIES, PART, HALF)
    for step in range(blocks, blocks + left * (BLOCK // PART)):
        slot, turn = step % SLOTS, step // SLOTS & 1
        # Before the copy engine writes to a slot again, what was read of it must have arrived. A barrier alone does not
        # say so, the fence does; behind the products that need it, it waits for little.
        if step > blocks:
            hopper.fence_async_shared()
            _barrier()
            mbarrier.arrive(v_free.index((step - 1) % SLOTS), count=1)
        mbarrier.wait(k_full.index(slot), turn)
        # Two sums of half the length: a product waits for the one that it adds to.
        scores = hopper.mma_v2(q0, k0.index(slot).reshape(shape).permute((0, 2, 1)).load(given), zero)
        scores += hopper.mma_v2(q1, k1.index(slot).reshape(shape).permute((0, 2, 1)).load(given), zero)
        mbarrier.wait(v_full.index(slot), turn)
        hopper.fence_async_shared()
        _barrier()
        mbarrier.arrive(k_free.index(slot), count=1)
        v_left, v_right = v0.index(slot).reshape(shape).load(given), v1.index(slot).reshape(shape).load(given)
        higher = gl.maximum(top, gl.max(scores, axis=2))
        weights = gl.exp2(scores * scale_log2 - (higher * scale_log2).expand_dims(2))
        kept = gl.exp2((top - higher) * scale_log2)
        total = total * kept + gl.sum(weights, axis=2)
        top = higher
        weights = gl.convert_layout(weights.to(q0.dtype), q0.type.layout)
        acc0 = hopper.mma_v2(weights, v_left, acc0 * kept.expand_dims(2))
        acc1 = hopper.mma_v2(weights, v_right, acc1 * kept.expand_dims(2))
    return top, total, acc0, acc1


@gluon.jit
def _finish(out, lse, lane, first, present, tq, top, total, acc0, acc1, scale_log2):
    """Write the output and the LSE of a tile's queries: 0 and -inf where one saw no key."""
    layout: gl.constexpr = acc0.type.layout
    member = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout))).expand_dims(1)
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))).expand_dims(0)
    some = total > 0
    total = gl.where(some, total, 1.0)
    value = gl.where(some, (top * scale_log2 + gl.log2(total)) * LN2, float("-inf"))
    place = (lane * HEADS + head).to(gl.int64) * tq + first + member
    gl.store(lse + place, value, mask=(member < present) & (head >= 0))
    acc0 = (acc0 * (1.0 / total).expand_dims(2)).to(out.dtype.element_ty)
    acc1 = (acc1 * (1.0 / total).expand_dims(2)).to(out.dtype.element_ty)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LINES))
    dim = gl.arange(0, HALF, layout=gl.SliceLayout(0, LINES))
    place = (lane * HEADS + row % HEADS).to(gl.int64) * tq + first + row // HEADS
    out_at = out + (place[:, None] * (2 * HALF) + dim[None, :])
    mask = (row // HEADS < present)[:, None] & (dim >= 0)[None, :]
    gl.store(out_at, gl.convert_layout(acc0.reshape((ROWS, HALF)), LINES), mask=mask)
    gl.store(out_at + HALF, gl.convert_layout(acc1.reshape((ROWS, HALF)), LINES), mask=mask)


@gluon.jit
def _consume(
    q, out, lse, k_full, v_full, k_free, v_free, k0, k1, v0, v1, base, members, seen, count, whole, rest_count,
    present, stride_qh, stride_qt, lane, first, tq, scale, SLOTS: gl.constexpr,
):  # fmt: skip
    """Go through what the ring brings, and write what comes of it."""
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_query: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LINES))
    dim = gl.arange(0, HALF, layout=gl.SliceLayout(0, LINES))
    q_at = gl.minimum(first + row // HEADS, tq - 1).to(gl.int64) * stride_qt + (row % HEADS).to(gl.int64) * stride_qh
    q_at = q + (q_at[:, None] + dim[None, :])
    q0, q1 = gl.load(q_at), gl.load(q_at + HALF)
    blocks, wholes, left = gl.load(count), gl.load(whole), gl.load(rest_count)
    q0 = gl.convert_layout(q0, gl.DotOperandLayout(0, tile, 2))
    q1 = gl.convert_layout(q1, gl.DotOperandLayout(0, tile, 2))
    scale_log2 = gl.maximum(scale * LOG2E, 1e-30)
    top = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, tile))
    total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, tile))
    acc0, acc1 = gl.zeros((ROWS, HALF), gl.float32, tile), gl.zeros((ROWS, HALF), gl.float32, tile)
    if blocks > 0:
        top, total, acc0, acc1 = _visit_common(
            q0, q1, k0, k1, v0, v1, k_full, v_full, k_free, v_free, base, members, seen, blocks, wholes, present,
            top, total, acc0, acc1, scale_log2, SLOTS,
        )  # fmt: skip
    # A warp holds the same rows in both layouts: nothing moves.
    shape: gl.constexpr = (QUERIES, HEADS, HALF)
    q0 = gl.convert_layout(q0.reshape(shape), gl.DotOperandLayout(0, by_query, 2))
    q1 = gl.convert_layout(q1.reshape(shape), gl.DotOperandLayout(0, by_query, 2))
    top = gl.convert_layout(top.reshape((QUERIES, HEADS)), gl.SliceLayout(2, by_query))
    total = gl.convert_layout(total.reshape((QUERIES, HEADS)), gl.SliceLayout(2, by_query))
    acc0 = gl.convert_layout(acc0.reshape(shape), by_query)
    acc1 = gl.convert_layout(acc1.reshape(shape), by_query)
    top, total, acc0, acc1 = _visit_rest(
        q0, q1, k0, k1, v0, v1, k_full, v_full, k_free, v_free, blocks, left, top, total, acc0, acc1,
        scale_log2, SLOTS,
    )  # fmt: skip
    _finish(out, lse, lane, first, present, tq, top, total, acc0, acc1, scale_log2)


@Kernel
@gluon.jit(do_not_specialize=["tq", "most"])
def fetched_attention(
    q, seen, base, members, count, whole, rest, rest_count, out, lse, k_copy, v_copy, k_part, v_part,
    stride_qb, stride_qh, stride_qt, hk, tq, most, scale, N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Output and LSE of four adjacent queries. Grid: (tiles, lanes)."""
    # A lane's first tiles have the fewest blocks: they come last, so that a launch's programs end together.
    tile, lane = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1)
    batch, head, first = lane // hk, lane % hk, tile * QUERIES
    present = gl.minimum(tq - first, QUERIES)
    tile_at = lane.to(gl.int64) * gl.num_programs(0) + tile
    query_at = lane.to(gl.int64) * tq + first
    count += tile_at
    whole += tile_at
    rest_count += query_at
    base += tile_at * most
    members += tile_at * most
    rest += query_at * N
    seen += query_at
    q += batch.to(gl.int64) * stride_qb + head.to(gl.int64) * HEADS * stride_qh
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k0 = gl.allocate_shared_memory(q.dtype.element_ty, (SLOTS, 1, 1, BLOCK, HALF), RING)
    k1 = gl.allocate_shared_memory(q.dtype.element_ty, (SLOTS, 1, 1, BLOCK, HALF), RING)
    v0 = gl.allocate_shared_memory(q.dtype.element_ty, (SLOTS, 1, 1, BLOCK, HALF), RING)
    v1 = gl.allocate_shared_memory(q.dtype.element_ty, (SLOTS, 1, 1, BLOCK, HALF), RING)
    k_full = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), bars)
    v_full = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), bars)
    k_free = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), bars)
    v_free = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), bars)
    # No barrier may be made and then not used: Triton would give its memory to others while it still is a barrier.
    for slot in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=1)
        mbarrier.init(v_free.index(slot), count=1)
    hopper.fence_async_shared()
    _barrier()
    gl.warp_specialize([
        (_consume, (
            q, out, lse, k_full, v_full, k_free, v_free, k0, k1, v0, v1, base, members, seen, count, whole,
            rest_count, present, stride_qh, stride_qt, lane, first, tq, scale, SLOTS,
        )),
        (_produce, (
            k_copy, v_copy, k_part, v_part, k_full, v_full, k_free, v_free, k0, k1, v0, v1,
            base, rest, count, rest_count, batch, head, N, SLOTS,
        )),
    ], [1], [24])  # fmt: skip


def copies(k: Tensor, v: Tensor) -> list[TensorDescriptor]:
    """What the copy engine needs to know of keys and values: to bring half of a block's, or of a part's, at a time."""
    return [
        TensorDescriptor(x, x.shape, x.stride(), [1, 1, tokens.value, HALF.value], RING.value)
        for tokens in (BLOCK, PART)
        for x in (k, v)
    ]
