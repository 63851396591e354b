"""Scoring: the importance of every block to every query group, in bounded chunks of queries, then the top-n.

A program owns R neighbouring queries of one KV group. Their g * R query rows are the columns of one tile, head-major,
so that the sum over heads stays inside a thread; compressed keys are its rows. The l' / stride compressed tokens that
begin in a block are taken one residue at a time (rows j * ratio + residue for a run of blocks j), which turns the
overlap sum into scalar weights: nothing is exchanged between rows except, for l > stride, one shift by a block.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from flexnsa.kernels.configs import shared_memory
from flexnsa.kernels.launch import Kernel, ceil_div, computable, is_watched, next_power
from flexnsa.kernels.topn import Table, hidden_count, split_tile, top_blocks, touched_blocks, visible_count

LOG2E = tl.constexpr(1.4426950408889634)
TEMPORARY_BYTES = 384 << 20
PROGRAMS = 2048  # what fills a large device several times over
LEAST_SPAN = 4  # tiles of blocks that a program takes at least
NOWHERE = tl.constexpr(1 << 62)


class ScoreTile(NamedTuple):
    """What one program computes at a time, blocks by query rows (heads * queries), and how it is scheduled.

    Attributes:
        blocks: blocks, one compressed token of each.
        heads: query heads of the group, a power of two; larger groups take several passes.
        queries: neighbouring queries, a power of two.
        warps: warps of a program.
        stages: tiles of keys in flight.
        registers: limit on the registers of a thread, None for none.
    """

    blocks: int
    heads: int
    queries: int
    warps: int
    stages: int
    registers: int | None


@triton.jit
def _load_rows(rows, mask, dim_stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of some rows of q or k, zero past D."""
    dim = FIRST + tl.arange(0, WIDTH)
    at = rows[:, None] + dim[None, :] * dim_stride
    if FIRST + WIDTH <= D:
        return tl.load(at, mask=mask[:, None], other=0.0)
    else:
        return tl.load(at, mask=mask[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def _slow_logits(
    q_rows, q_mask, q_dim, k_rows, step, k_mask, k_dim, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Full float32 products, a few of the dim at a time: they run outside the matrix units, from registers."""
    logits = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for first in range(0, D, WIDTH):
        dim = first + tl.arange(0, WIDTH)
        inside = (dim < D)[None, :]
        k = tl.load((k_rows + step)[:, None] + dim[None, :] * k_dim, mask=k_mask[:, None] & inside, other=0.0)
        q = tl.load(q_rows[:, None] + dim[None, :] * q_dim, mask=q_mask[:, None] & inside, other=0.0)
        logits = tl.dot(k, tl.trans(q), logits, input_precision="ieee")
    return logits


@Kernel
@triton.jit(
    do_not_specialize=["first_tile", "rows", "heads", "tq", "num_blocks", "num_tokens", "first_head", "group", "span"]
)
def _score(
    q, k_cmp, lse, position, start, offset, low, high, importance, scale_log2,
    first_tile, rows, heads, tq, num_blocks, pitch, num_tokens,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, lse_batch, lse_head, lse_token,
    position_row, start_row, offset_row, low_row, high_row, first_head, group, span,
    COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    BLOCKS: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = HEADS * R
    RATIO: tl.constexpr = SELECT_BLOCK // COMPRESS_STRIDE
    OVERLAP: tl.constexpr = COMPRESS_BLOCK // COMPRESS_STRIDE
    tile = tl.program_id(0)
    bh, query_tile = split_tile(first_tile + tile, rows, tq, R)
    batch, kv_head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)

    query = query_tile * R + tl.arange(0, R)
    is_query = query < tq
    at = tl.load(position + batch * position_row + query, mask=is_query, other=-1)
    origin = tl.load(start + batch * start_row + query, mask=is_query, other=0)
    first_token = tl.load(offset + batch * offset_row + query, mask=is_query, other=0)
    last = tl.load(high + batch * high_row + query, mask=is_query, other=-1) if MASKED else at
    count = visible_count(last - origin, COMPRESS_BLOCK, COMPRESS_STRIDE)
    count = tl.minimum(tl.where((at >= 0) & (first_token >= 0), count, 0), num_tokens - first_token)
    if MASKED:
        hidden = hidden_count(tl.load(low + batch * low_row + query, mask=is_query, other=0) - origin, COMPRESS_STRIDE)
        count = tl.where(hidden < count, count, 0)

    column = tl.arange(0, COLUMNS)
    head_in_group = first_head + column // R
    column_query = query_tile * R + column % R
    is_column = (head_in_group < group) & (column_query < tq)
    head = kv_head * group + head_in_group
    q_rows = q + batch * q_batch + head * q_head + column_query.to(tl.int64) * q_token
    lse_at = lse + batch * lse_batch + head * lse_head + column_query.to(tl.int64) * lse_token
    # Columns that are not queries have p = exp2(0 - inf) = 0. The others' p is scaled by 2**64, which changes no order:
    # the hardware's exp2 flushes subnormal results, and so blocks of probability 1e-45 still compare.
    shift = 64.0 - tl.load(lse_at, mask=is_column, other=float("inf")) * LOG2E
    if not EXACT:
        q_tile = _load_rows(q_rows, is_column, q_dim, D, 0, WIDTH)
        if REST > 0:
            q_rest = _load_rows(q_rows, is_column, q_dim, D, WIDTH, REST)

    row = tl.arange(0, BLOCKS)
    previous_row = (row[:, None] + tl.zeros([1, R], tl.int32) + (BLOCKS - 1)) % BLOCKS
    # Where a token reaches into several blocks, those cut on the left and on the right add the same numbers in another
    # order. In float64 multiples of one probability are exact, and such blocks tie as they should.
    SUM: tl.constexpr = tl.float64 if OVERLAP > 2 else tl.float32
    zero = tl.zeros([BLOCKS, R], SUM)
    first_run = tl.program_id(1) * span
    into = importance + (tile.to(tl.int64) * R + tl.arange(0, R)) * pitch

    # Queries of one document share their compressed tokens; a tile that straddles documents takes them one by one.
    document = tl.min(tl.where(count > 0, first_token, NOWHERE), axis=0)
    while document < NOWHERE:
        seen = tl.where((first_token == document) & (count > 0), count, 0).to(tl.int32)
        most = tl.max(seen, axis=0)
        touched = tl.minimum(touched_blocks(seen, RATIO, OVERLAP), num_blocks)
        k_rows = k_cmp + batch * k_batch + kv_head * k_head + (document + row * RATIO) * k_token
        own = zero  # by the tokens that begin in the block
        into_next = zero  # by those that reach into the next block
        before = zero
        last_run = tl.minimum((tl.max(touched, axis=0) + BLOCKS - 1) // BLOCKS, first_run + span)
        # What reaches into the first block is found again by the run of blocks before it.
        begin = tl.maximum(first_run - 1, 0) if OVERLAP > 1 else first_run
        for step in range(begin * RATIO, tl.where(first_run < last_run, last_run, begin) * RATIO):
            residue = step % RATIO
            first_block = step // RATIO * BLOCKS
            token = (first_block + row) * RATIO + residue
            ahead = (first_block * RATIO + residue).to(tl.int64) * k_token
            if EXACT:
                logits = _slow_logits(
                    q_rows, is_column, q_dim, k_rows, ahead, token < most, k_dim, D, WIDTH, BLOCKS, COLUMNS
                )
            else:
                k_tile = _load_rows(k_rows + ahead, token < most, k_dim, D, 0, WIDTH)
                logits = tl.dot(k_tile, tl.trans(q_tile))
                if REST > 0:
                    k_rest = _load_rows(k_rows + ahead, token < most, k_dim, D, WIDTH, REST)
                    logits = tl.dot(k_rest, tl.trans(q_rest), logits)
            p = tl.exp2(tl.fma(logits, scale_log2, shift[None, :]))
            p = tl.sum(tl.reshape(p, [BLOCKS, HEADS, R]), axis=1)
            p = tl.where(token[:, None] < seen[None, :], p, 0.0)
            if MASKED:
                p = tl.where(token[:, None] >= hidden[None, :], p, 0.0)
            p = p.to(SUM)
            own += p * tl.minimum(RATIO - residue, OVERLAP).to(SUM)
            if OVERLAP > 1:
                reach = OVERLAP - RATIO + residue
                into_next += tl.where(reach > 0, p * reach.to(SUM), 0.0)
            if residue == RATIO - 1:
                if OVERLAP > 1:
                    # The last row's place holds the last block of the tile before.
                    shifted = tl.where(row[:, None] == BLOCKS - 1, before, into_next)
                    own += tl.gather(shifted, previous_row, axis=0)
                    before = into_next
                    into_next = zero
                block = first_block + row[:, None]
                at_block = into[None, :] + block
                wanted = (block < touched[None, :]) & (block >= first_run * BLOCKS)
                if ADD:
                    own += tl.load(at_block, mask=wanted, other=0.0)
                tl.store(at_block, own.to(tl.float32), mask=wanted)
                own = zero
        document = tl.min(tl.where((count > 0) & (first_token > document), first_token, NOWHERE), axis=0)


def split_dim(dim: int) -> tuple[int, int]:
    """A head dim as one or two widths that the matrix units take, so that 80, 96 and 192 are not padded to a power."""
    width = max(16, 1 << (dim.bit_length() - 1))
    rest = max(0, dim - width)
    return width, 0 if rest == 0 else max(16, next_power(rest))


def score_tile(dim: int, dtype: torch.dtype, group: int, shared_bytes: int) -> ScoreTile:
    """The tile for a head dim and group size on a chip that gives a program `shared_bytes` of shared memory."""
    if dtype == torch.float32:
        blocks, columns = 32, 64
    else:
        blocks, columns = 64, 128 if dim <= 128 or shared_bytes > 160 << 10 else 64
    heads = min(next_power(group), columns)
    queries = columns // heads
    # Few queries leave room in the registers for a third program on a Hopper multiprocessor, which then hides the
    # exponentials of one behind the products of another; otherwise two programs load further ahead.
    three = dtype != torch.float32 and dim <= 128 and queries <= 8 and shared_bytes > 200 << 10
    deep = not three and dim <= 128 and shared_bytes > 160 << 10
    return ScoreTile(blocks, heads, queries, 4, 3 if deep else 2, 168 if three else None)


def choose_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    offset: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    *,
    num_blocks: int,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
) -> torch.Tensor:
    """Indices of the blocks each query group attends to: scoring and top-n in Triton (paper, Eq. 8 to 12).

    Args:
        q: queries [b, hq, tq, d], float16, bfloat16 or float32, any strides.
        k_cmp: compressed keys [b, hk, c, d] of q's dtype, any strides; hk divides hq.
        lse: float32 [b, hq, tq], natural log, of the compressed attention; -inf where nothing is visible.
        position: int64 [b or 1, tq], absolute position of each query, -1 for padding.
        start: int64 [b or 1, tq], first token of the query's document.
        offset: int64 [b or 1, tq], first compressed token of the query's document.
        low: int64 [b or 1, tq], first token that each query may see, of its document; None for `start`.
        high: int64 [b or 1, tq], last token that it may see; None, as `low` then, for `position`.
        num_blocks: selection blocks s of one row of tk tokens.
        compress_block, compress_stride, select_block, num_selected, num_initial, num_local: as in NSAConfig.
        scale: softmax scale of the compressed attention.

    Returns:
        int32 [b, hk, tq, num_selected], block ids counted from the document's start, ascending, padded with -1.

    Raises:
        ValueError: a shape, dtype or size does not fit.
    """
    table = Table(position, start, offset, low, high)
    _check(q, k_cmp, lse, table, num_blocks, num_selected)
    batch, query_heads, tq, dim = q.shape
    heads = k_cmp.shape[1]
    indices = torch.empty(batch, heads, tq, num_selected, dtype=torch.int32, device=q.device)
    if indices.numel() == 0:
        return indices
    q, k_cmp = computable(q), computable(k_cmp)
    group = query_heads // heads
    tile = score_tile(dim, q.dtype, group, shared_memory(q.device))
    tiles = batch * heads * ceil_div(tq, tile.queries)
    pitch = ceil_div(num_blocks, 16) * 16
    chunk = min(tiles, max(1, TEMPORARY_BYTES // (4 * tile.queries * pitch)))
    importance = torch.empty(chunk * tile.queries, pitch, dtype=torch.float32, device=q.device)
    geometry = {"COMPRESS_BLOCK": compress_block, "COMPRESS_STRIDE": compress_stride, "SELECT_BLOCK": select_block}
    forced = {"NUM_INITIAL": num_initial, "NUM_LOCAL": num_local}
    with torch.cuda.device_of(q):
        for first in range(0, tiles, chunk):
            part = range(first, min(first + chunk, tiles))
            for first_head in range(0, group, tile.heads):
                _score_blocks(q, k_cmp, lse, table, importance, num_blocks, part, first_head, tile, scale, geometry)
            top_blocks(importance, table, indices, part, tile.queries, num_blocks, k_cmp.shape[2], **geometry, **forced)
    return indices


_select_blocks = torch.library.custom_op("flexnsa::select_blocks", choose_blocks, mutates_args=())
"""``choose_blocks`` as an opaque operator: compiles without a graph break, and counts its FLOPs."""


def select_blocks(q: torch.Tensor, k_cmp: torch.Tensor, *others: Any, **geometry: Any) -> torch.Tensor:
    """``choose_blocks``, by its operator where someone watches."""
    run = _select_blocks if is_watched(q, k_cmp) else choose_blocks
    indices: torch.Tensor = run(q, k_cmp, *others, **geometry)
    return indices


def _score_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    table: Table,
    importance: torch.Tensor,
    num_blocks: int,
    tiles: range,
    first_head: int,
    tile: ScoreTile,
    scale: float,
    geometry: dict[str, int],
) -> None:
    """Write, or for later passes over the heads of a large group add to, the importances of the queries of `tiles`."""
    batch, heads, num_tokens, dim = k_cmp.shape
    exact = q.dtype == torch.float32
    width, rest = (16, 0) if exact else split_dim(dim)
    # Few queries (decoding) or very long rows, hence small chunks: the blocks are divided over programs too.
    runs = ceil_div(num_blocks, tile.blocks)
    splits = max(1, min(PROGRAMS // len(tiles), ceil_div(runs, LEAST_SPAN)))
    span = ceil_div(runs, splits)
    _score[(len(tiles), splits)](
        q, k_cmp, lse, *table.columns, importance, scale * LOG2E.value, tiles.start, batch * heads, heads, q.shape[2],
        num_blocks, importance.stride(0), num_tokens, *q.stride(), *k_cmp.stride(), *lse.stride(),
        *table.strides, first_head, q.shape[1] // heads, span,
        D=dim, WIDTH=width, REST=rest, HEADS=tile.heads, R=tile.queries, BLOCKS=tile.blocks, EXACT=exact,
        ADD=first_head > 0, MASKED=table.masked, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        **geometry,
    )  # fmt: skip


@_select_blocks.register_fake
def _(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    offset: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    *,
    num_blocks: int,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], num_selected, dtype=torch.int32)


@register_flop_formula(torch.ops.flexnsa.select_blocks)
def _flops(q_shape: torch.Size, k_cmp_shape: torch.Size, *_: object, **__: object) -> int:
    """Of the products q . k_cmp, all of them, as torch counts dense attention: causality is not taken off."""
    return 2 * q_shape.numel() * k_cmp_shape[2]


def _check(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    table: Table,
    num_blocks: int,
    num_selected: int,
) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or k_cmp.dtype != q.dtype:
        raise ValueError(
            f"q and k_cmp must share float16, bfloat16 or float32, got {q.dtype} and {k_cmp.dtype}; convert "
            f"them, or use impl='reference'"
        )
    batch, heads, tq, dim = q.shape
    if k_cmp.ndim != 4 or k_cmp.shape[0] != batch or k_cmp.shape[3] != dim or heads % k_cmp.shape[1]:
        raise ValueError(
            f"k_cmp must be [b, hk, c, d] with b={batch}, d={dim} and hk dividing {heads}, got {tuple(k_cmp.shape)}"
        )
    if dim > 256:
        raise ValueError(f"q must have a head dim of at most 256, got {dim}; use impl='reference'")
    if lse.shape != (batch, heads, tq) or lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32 {(batch, heads, tq)}, got {lse.dtype} {tuple(lse.shape)}")
    if (table.low is None) != (table.high is None):
        raise ValueError("low and high must be given together, got one of them; they are an interval's ends")
    for name, column in table._asdict().items():
        if column is not None and (
            column.dtype != torch.int64
            or column.shape not in ((batch, tq), (1, tq))
            or (tq > 1 and column.stride(1) != 1)
        ):
            raise ValueError(
                f"{name} must be int64 {(batch, tq)} or {(1, tq)} with unit stride along tq, got {column.dtype} "
                f"{tuple(column.shape)}; call .contiguous()"
            )
    if not 1 <= num_selected <= 64:
        raise ValueError(f"num_selected must be 1 to 64, got {num_selected}; use impl='reference'")
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}; it is ceil(tk / select_block)")
