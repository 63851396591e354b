"""The selection turned around: for each KV block the queries that chose it, in ascending order.

A *pair* is one query and one of its selected blocks. The kernels that own a KV block read the pairs of that block; the
pairs are numbered ``query * n + slot`` within a chunk of queries, so that what a pair produces has a place of its own
and sums are taken in the order of the slots, never by atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class Inversion(NamedTuple):
    """Pairs of each lane (one batch element and KV head) and chunk of queries, sorted by block, then by query.

    A *bin* is a block; an *item* is a run of at most ``split`` pairs of one bin, the work of one program. Bins of
    several items ("split" bins) are numbered too, and so are their items, which must be summed afterwards.

    Attributes:
        pairs: int32 ``[lanes, chunks, chunk * n]``, the pairs that see nothing last.
        first_pair: int32 ``[lanes, chunks, bins + 1]``, where each bin begins in ``pairs``.
        first_item: int32 ``[lanes, chunks, bins + 1]``, the number of items before each bin.
        item_bin: int32 ``[lanes, chunks, max_items]``, the bin of each item, ``bins`` past the last.
        first_split: int32 ``[lanes, chunks, bins + 1]``, the number of items of split bins before each bin.
        split_bin: int32 ``[lanes, chunks, max_split_bins]``, the split bins, ``bins`` past the last.
        split: most pairs of an item.
    """

    pairs: Tensor
    first_pair: Tensor
    first_item: Tensor
    item_bin: Tensor
    first_split: Tensor
    split_bin: Tensor
    split: int

    def of_lanes(self, first: int, count: int) -> "Inversion":
        """The inversion of some of the lanes."""
        return self._replace(**{name: getattr(self, name)[first : first + count] for name in self._fields[:-1]})


def invert_selection(
    base: Tensor, rank: Tensor, query: int, num_keys: int, select_block: int, chunk: int, chunks: int, split: int
) -> Inversion:
    """Sort pairs by block.

    Args:
        base: int32 ``[lanes, tq, n]``, first tokens of the selected blocks, -1 for none.
        rank: int32 ``[lanes, tq]``, as in ``Blocks``. Blocks of two documents can share ``base // select_block``;
            adding the rank within the chunk keeps every bin one block.
        query: first query of the first chunk.
        num_keys: tk.
        select_block: tokens of a block.
        chunk: queries of a chunk.
        chunks: number of chunks.
        split: most pairs of an item.

    Returns:
        The inversion, of O(chunks * chunk * n) memory.
    """
    lanes, tq, n = base.shape
    per_chunk = chunk * n
    bins = triton.cdiv(num_keys, select_block) + chunk
    keys = torch.empty(lanes, chunks, per_chunk, dtype=torch.int32, device=base.device)
    _pair_keys[(triton.cdiv(per_chunk, _BLOCK), chunks, lanes)](
        base, rank, keys, *base.stride()[:1], *rank.stride()[:1], query, tq, chunk, bins,
        SELECT=select_block, N=n, BLOCK=_BLOCK,
    )  # fmt: skip
    ordered, order = keys.flatten().sort(stable=True)
    pairs = order.remainder_(per_chunk).to(torch.int32).view(lanes, chunks, per_chunk)
    segment = torch.arange(lanes * chunks, dtype=torch.int32, device=keys.device).view(lanes, chunks, 1)
    edges = segment * (bins + 1) + torch.arange(bins + 1, dtype=torch.int32, device=keys.device)
    first_pair = torch.searchsorted(ordered.view_as(keys), edges, out_int32=True)
    count = first_pair.diff(dim=-1)
    items = (count + (split - 1)) // split
    first_item = _exclusive_sum(items)
    several = items > 1
    return Inversion(
        pairs=pairs,
        first_pair=first_pair,
        first_item=first_item,
        item_bin=_owner(first_item, min(bins, per_chunk) + per_chunk // split),
        first_split=_exclusive_sum(items * several),
        split_bin=_owner(_exclusive_sum(several), max(1, per_chunk // (split + 1))),
        split=split,
    )


def _exclusive_sum(counts: Tensor) -> Tensor:
    """[..., bins + 1] int32: the sum of ``counts`` [..., bins] before each bin, and the total."""
    total = torch.zeros(*counts.shape[:-1], counts.shape[-1] + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, -1, dtype=torch.int32, out=total[..., 1:])
    return total


def _owner(first: Tensor, most: int) -> Tensor:
    """[..., most] int32: the bin of each item, from the number of items before each bin."""
    item = torch.arange(most, dtype=torch.int32, device=first.device).expand(*first.shape[:-1], most)
    return torch.searchsorted(first[..., 1:].contiguous(), item.contiguous(), right=True, out_int32=True)


@triton.jit(do_not_specialize=["query", "tq", "chunk", "bins"])
def _pair_keys(
    base, rank, keys, stride_base, stride_rank, query, tq, chunk, bins,
    SELECT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(2).to(tl.int64)
    segment = lane * tl.num_programs(1) + tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = query + tl.program_id(1).to(tl.int64) * chunk
    token = first + pair // N
    inside = (pair < chunk * N) & (token < tq)
    begin = tl.load(base + lane * stride_base + token * N + pair % N, mask=inside, other=-1)
    earlier = tl.load(rank + lane * stride_rank + tl.minimum(first, tq - 1))
    key = (begin + SELECT - 1) // SELECT + tl.load(rank + lane * stride_rank + token, mask=inside, other=0) - earlier
    key = tl.where((begin >= 0) & (key >= 0) & (key < bins), key, bins)
    tl.store(keys + segment * (chunk * N) + pair, (segment * (bins + 1) + key).to(tl.int32), mask=pair < chunk * N)
