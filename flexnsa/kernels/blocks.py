"""Which tokens a selection names: block ids, counted from each document's start, become first tokens."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.launch import Kernel, ceil_div, next_power

_QUERIES = 64
_SCAN = 1024


class Blocks(NamedTuple):
    """The selection by lane (one batch element and KV head); small beside K and V, contiguous, and simple to address.

    Attributes:
        base: int32 ``[lanes, tq, n]``, first token of each selected block, -1 where the query sees none of it: padding,
            the future, or garbage.
        seen: int32 ``[lanes, tq]``, last key that the query may see, -1 for a padding query.
        low: int32 ``[lanes, tq]``, first key that it may see; not read, and ``seen``, unless ``masked``.
        reach: int32 ``[lanes, tq]``, last key that it or a query before it may see; ``seen`` unless ``masked``.
        rank: int32 ``[lanes, tq]``, number of documents that begin before the query's, the first one not counted; None
            where all queries are of one document, or where nobody asked.
    """

    base: Tensor
    seen: Tensor
    low: Tensor
    reach: Tensor
    rank: Tensor | None

    @property
    def masked(self) -> bool:
        """Whether a query may see less than its document up to ``seen``, and less than a query before it."""
        return self.low is not self.seen


def locate_blocks(
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    num_keys: int,
    select_block: int,
    *,
    ranks: bool,
    low: Tensor | None = None,
) -> Blocks:
    """First tokens of the selected blocks.

    Args:
        indices: int32 ``[b, hk, tq, n]``.
        position: int64 ``[b, tq]`` or ``[1, tq]``, -1 for a padding query.
        start: int64, likewise, first token of the query's document; or ``[b, 1]`` or ``[1, 1]`` for one document a row.
        num_keys: tk.
        select_block: tokens of a block.
        ranks: whether documents are numbered.
        low: int64 ``[b, tq]`` or ``[1, tq]``, first key that each query may see; None for its document's first.

    Returns:
        Tables that name no token outside of ``0 .. tk - 1``, whatever the arguments hold.
    """
    b, hk, tq, n = indices.shape
    packed = ranks and start.shape[1] > 1
    indices = indices.contiguous()
    base, seen = indices.new_empty(b * hk, tq, n), indices.new_empty(b * hk, tq)
    rank = torch.empty_like(seen) if packed else None
    # One more row of programs numbers the documents: a batch element each.
    grid = max(ceil_div(tq, _QUERIES), b), b * hk + packed
    _locate[grid](
        indices, position, start, base, seen, seen if rank is None else rank,
        _stride(position, 0), _stride(position, 1), _stride(start, 0), _stride(start, 1), b, hk, tq, num_keys,
        N=n, N_PAD=next_power(n), SELECT=select_block, QUERIES=_QUERIES, SCAN=_SCAN, PACKED=packed,
    )  # fmt: skip
    if low is None:
        return Blocks(base, seen, seen, seen, rank)
    reach = position.clamp(-1, num_keys - 1).cummax(-1).values
    low, reach = (x.to(torch.int32).expand(b, tq).repeat_interleave(hk, 0) for x in (low.clamp(0, num_keys), reach))
    return Blocks(base, seen, low, reach, rank)


def _stride(x: Tensor, axis: int) -> int:
    """Of an axis that is repeated where its length is 1."""
    return 0 if x.shape[axis] == 1 else x.stride(axis)


@Kernel
@triton.jit(do_not_specialize=["b", "hk", "tq", "num_keys"])
def _locate(
    indices, position, start, base, seen, rank,
    position_row, position_token, start_row, start_token, b, hk, tq, num_keys,
    N: tl.constexpr, N_PAD: tl.constexpr, SELECT: tl.constexpr, QUERIES: tl.constexpr, SCAN: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1)
    if PACKED and lane == b * hk:
        row = tl.program_id(0)
        if row < b:
            _number_documents(
                position + row.to(tl.int64) * position_row, start + row.to(tl.int64) * start_row,
                rank + row.to(tl.int64) * hk * tq, position_token, start_token, hk, tq, SCAN,
            )  # fmt: skip
    else:
        batch = (lane // hk).to(tl.int64)
        query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        inside = query < tq
        at = query.to(tl.int64)
        last = tl.load(position + batch * position_row + at * position_token, mask=inside, other=-1)
        first = tl.load(start + batch * start_row + at * start_token, mask=inside, other=0)
        first = tl.where(last >= 0, first, 0)
        last = tl.minimum(tl.maximum(last, -1), num_keys - 1)
        at += lane.to(tl.int64) * tq
        slot = tl.arange(0, N_PAD)
        place = at[:, None] * N + slot[None, :]
        mask = inside[:, None] & (slot < N)[None, :]
        index = tl.load(indices + place, mask=mask, other=-1)
        token = first[:, None] + index.to(tl.int64) * SELECT
        visible = (index >= 0) & (first >= 0)[:, None] & (token <= last[:, None])
        tl.store(base + place, tl.where(visible, token, -1).to(tl.int32), mask=mask)
        tl.store(seen + at, last.to(tl.int32), mask=inside)


@triton.jit
def _number_documents(
    position, start, rank, position_token, start_token, hk, tq, SCAN: tl.constexpr
):  # fmt: skip
    """The number of documents that begin before each query's, written for every head of a row."""
    latest = tl.full([], 0, tl.int64)
    number = tl.full([], 0, tl.int32)
    for begin in range(0, tq, SCAN):
        query = begin + tl.arange(0, SCAN).to(tl.int64)
        first = _first_token(position, start, query, position_token, start_token, tq)
        before = _first_token(position, start, query - 1, position_token, start_token, tq)
        before = tl.maximum(tl.associative_scan(before, 0, _larger), latest)
        begins = ((query > 0) & (first > before)).to(tl.int32)
        counted = number + tl.cumsum(begins, axis=0)
        for head in range(hk):
            tl.store(rank + head * tq + query, counted, mask=query < tq)
        number += tl.sum(begins, axis=0)
        latest = tl.maximum(latest, tl.max(first, axis=0))


@triton.jit
def _first_token(position, start, query, position_token, start_token, tq):
    """First token of the query's document, 0 for padding and outside of the row."""
    inside = (query >= 0) & (query < tq)
    here = tl.load(position + query * position_token, mask=inside, other=-1)
    first = tl.load(start + query * start_token, mask=inside, other=0)
    return tl.where(here >= 0, first, 0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)
