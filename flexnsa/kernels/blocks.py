"""Which tokens a selection names: block ids, counted from each document's start, become first tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 1024
_SCAN = 256


class Blocks(NamedTuple):
    """The selection by lane (one batch element and KV head); small beside K and V, contiguous, and simple to address.

    Attributes:
        base: int32 ``[lanes, tq, n]``, first token of each selected block, -1 where the query sees none of it: padding,
            the future, or garbage.
        seen: int32 ``[lanes, tq]``, last key that the query may see, -1 for a padding query.
        rank: int32 ``[lanes, tq]``, number of documents that begin before the query's, the first one not counted.
    """

    base: Tensor
    seen: Tensor
    rank: Tensor


def locate_blocks(indices: Tensor, position: Tensor, start: Tensor, num_keys: int, select_block: int) -> Blocks:
    """First tokens of the selected blocks.

    Args:
        indices: int32 ``[b, hk, tq, n]``.
        position: int64 ``[b, tq]`` or ``[1, tq]``, -1 for a padding query.
        start: int64, likewise, first token of the query's document.
        num_keys: tk.
        select_block: tokens of a block.

    Returns:
        Tables that name no token outside of ``0 .. tk - 1``, whatever the arguments hold.
    """
    b, hk, tq, n = indices.shape
    seen = position.clamp(-1, num_keys - 1).to(torch.int32)
    first = start.where(position >= 0, 0)
    begins = torch.zeros(first.shape, dtype=torch.int32, device=first.device)
    begins[:, 1:] = _running(first, torch.maximum, lambda x: x.cummax(-1).values).diff(dim=-1) > 0
    rank = _running(begins, torch.add, lambda x: x.cumsum(-1, dtype=torch.int32))
    seen, rank, first = (x.expand(b, tq)[:, None].expand(b, hk, tq).reshape(b * hk, tq) for x in (seen, rank, first))
    base = indices.reshape(b * hk, tq, n).contiguous()
    base, indices = torch.empty_like(base), base
    _locate[(triton.cdiv(base.numel(), _BLOCK),)](
        indices, seen.contiguous(), first.contiguous(), base, base.numel(), num_keys,
        N=n, SELECT=select_block, BLOCK=_BLOCK,
    )  # fmt: skip
    return Blocks(base, seen.contiguous(), rank.contiguous())


def _running(x: Tensor, join: Callable[[Tensor, Tensor], Tensor], scan: Callable[[Tensor], Tensor]) -> Tensor:
    """``scan`` of [b, tq] non-negative integers along tq, in two levels: torch gives one thread block a whole row."""
    rows, length = x.shape
    parts = triton.cdiv(length, _SCAN)
    within = scan(pad(x, (0, parts * _SCAN - length)).view(rows, parts, _SCAN))
    before = pad(scan(within[..., -1]), (1, 0))[:, :-1]
    return join(within, before[..., None]).flatten(1)[:, :length]


@triton.jit(do_not_specialize=["total", "num_keys"])
def _locate(indices, seen, start, base, total, num_keys, N: tl.constexpr, SELECT: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < total
    index = tl.load(indices + entry, mask=inside, other=-1)
    last = tl.load(seen + entry // N, mask=inside, other=-1)
    first = tl.load(start + entry // N, mask=inside, other=-1)
    token = first + index.to(tl.int64) * SELECT
    visible = (index >= 0) & (first >= 0) & (token <= last)
    tl.store(base + entry, tl.where(visible, token, -1).to(tl.int32), mask=inside)
