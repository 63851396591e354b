"""The paged step in plain torch: the pages are gathered, and the dense engine does the rest. Any device, any dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from flexnsa import reference
from flexnsa.compression import Compressor
from flexnsa.config import NSAConfig
from flexnsa.gating import combine
from flexnsa.layout import QueryTable
from flexnsa.pages import Entries, PagedKV, Pages
from flexnsa.types import KV, Selection


def paged_step(
    q: Tensor, gates: Tensor, pages: PagedKV, lengths: Tensor, config: NSAConfig, *, scale: float
) -> tuple[Tensor, Selection]:
    """Output ``[b, hq, 1, dv]`` and selection of the last token's query of each sequence."""
    capacity = pages.capacity(config)
    tokens = lengths.long().clamp(0, capacity)[:, None]
    zero = torch.zeros_like(tokens)
    table = QueryTable(tokens - 1, zero, zero)
    before = config.compress_block // config.compress_stride - 1
    ends = slice(before, before + config.num_compressed(capacity))
    k_cmp, v_cmp = (x[:, :, ends] for x in _gather(pages.compressed, tokens // config.compress_stride))
    compressed = reference.compressed_attention(q, k_cmp, v_cmp, table, config, scale=scale)
    selection = reference.select_blocks(q, k_cmp, compressed.lse, table, config, num_tokens=capacity, scale=scale)
    kv = _gather(pages.selected, tokens)
    selected = reference.selected_attention(q, *kv, selection, table, config, scale=scale)
    kv = _gather(pages.window, tokens)
    window = reference.window_attention(q, *kv, table, config, scale=scale)
    return combine(gates, (compressed, selected, window)), selection


def _gather(part: Pages, used: Tensor) -> KV:
    """Keys and values by slot of their sequence, 0 from slot ``used`` on and where no page is mapped."""
    size = part.k.shape[2]
    slot = torch.arange(part.table.shape[1] * size, device=used.device)
    mapped = (part.table >= 0) & (part.table < part.k.shape[0])
    kept = mapped.repeat_interleave(size, 1) & (slot < used)
    page = part.table.long().where(mapped, 0)
    k, v = (x[page].movedim(2, 1).flatten(2, 3).where(kept[:, None, :, None], 0) for x in (part.k, part.v))
    return k, v


class Arrival(NamedTuple):
    """Which tokens arrive in a call: the last ones of each sequence.

    Attributes:
        begin: int64 ``[b, 1]``, position of the first token of the call's ``t``, below 0 where a sequence is shorter.
        first: int64 ``[b, 1]``, position of the first one that is new.
        end: int64 ``[b, 1]``, tokens of the sequence.
    """

    begin: Int64[Tensor, "b 1"]
    first: Int64[Tensor, "b 1"]
    end: Int64[Tensor, "b 1"]

    @classmethod
    def of(cls, tokens: int, lengths: Tensor, counts: Tensor | None) -> Arrival:
        """The last ``tokens`` of each sequence, of which ``counts`` are new, or all."""
        end = lengths.long()[:, None]
        fresh = end - tokens if counts is None else end - counts.long().clamp(0, tokens)[:, None]
        return cls(end - tokens, fresh.clamp(min=0), end)

    def new(self, position: Tensor) -> Tensor:
        """Which positions are new."""
        return (position >= self.first) & (position < self.end)


def token_entries(kv: KV, arrival: Arrival) -> Entries:
    """The new tokens."""
    position = arrival.begin + torch.arange(kv[0].shape[2], device=arrival.end.device)
    return Entries(*kv, position.where(arrival.new(position), -1))


def ending_entries(kv: KV, arrival: Arrival, config: NSAConfig) -> Entries:
    """Compressed tokens handed in with the token that their block ends with; the others are not written."""
    ends = arrival.begin + torch.arange(kv[0].shape[2], device=arrival.end.device)
    return Entries(*kv, _compressed_slots(ends, arrival, config))


def pooled_entries(compressor: Compressor, kv: KV, recent: KV, arrival: Arrival, config: NSAConfig) -> Entries:
    """Compressed tokens of the blocks that end in new raw tokens ``kv``, whose forerunners are in the ring."""
    length, stride, tokens = config.compress_block, config.compress_stride, kv[0].shape[2]
    position = arrival.begin - length + torch.arange(length + tokens, device=arrival.end.device)
    known = arrival.new(position)[:, None, :, None]
    k, v = (
        F.pad(x, (0, 0, length, 0)).where(known, _at(ring, position % length))
        for x, ring in zip(kv, recent, strict=True)
    )
    end = (arrival.begin + stride) // stride * stride - 1
    ends = end + stride * torch.arange(-(-tokens // stride), device=end.device)
    slots = _compressed_slots(ends, arrival, config)
    k_cmp, v_cmp = compressor(k, v, starts=(ends + 1 - arrival.begin).where(slots >= 0, -1))
    for name, x, raw in (("keys", k_cmp, k), ("values", v_cmp, v)):
        expected = (*raw.shape[:2], slots.shape[1], raw.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"compressor must return {name} of shape {expected}, one for each start, got {tuple(x.shape)}"
            )
    return Entries(k_cmp, v_cmp, slots)


def remember(kv: KV, recent: KV, arrival: Arrival) -> None:
    """Put the new raw tokens into the ring: each place takes the latest one that belongs there."""
    length = recent[0].shape[2]
    last = arrival.end - 1
    position = last - (last - torch.arange(length, device=last.device)) % length
    new = arrival.new(position)[:, None, :, None]
    for ring, x in zip(recent, kv, strict=True):
        ring.copy_(_at(x, (position - arrival.begin).clamp(min=0)).where(new, ring))


def write(entries: Entries, part: Pages) -> None:
    """Write entries into their pages. Whatever the values, nothing waits for the host and nothing is written twice.

    Entries that are not written repeat the first one that is: same place, same value. Where none is, a place is written
    with what it holds.
    """
    size = part.k.shape[2]
    logical = (entries.slots.clamp(min=0) // size).clamp(max=part.table.shape[1] - 1)
    page = part.table.long().gather(1, logical)
    inside = entries.slots < part.table.shape[1] * size
    wanted = ((entries.slots >= 0) & inside & (page >= 0) & (page < part.k.shape[0])).flatten()
    place = (page * size + entries.slots.clamp(min=0) % size).flatten().where(wanted, 0)
    first = wanted.int().argmax(keepdim=True)
    place = place.where(wanted, place.index_select(0, first))
    for pages, x in ((part.k, entries.k), (part.v, entries.v)):
        rows = x.transpose(1, 2).flatten(0, 1)
        rows = rows.where(wanted[:, None, None], rows.index_select(0, first))
        at = (place // size, slice(None), place % size)
        pages[at] = rows.where(wanted.any(), pages[at])


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [b, hk, t, d]`` by ``index [b, n]``: ``[b, hk, n, d]``."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _compressed_slots(ends: Tensor, arrival: Arrival, config: NSAConfig) -> Tensor:
    """Slot of the compressed token whose block ends with token ``ends``, -1 where none does."""
    whole = ((ends + 1) % config.compress_stride == 0) & (ends + 1 >= config.compress_block)
    return ((ends + 1) // config.compress_stride - 1).where(whole & arrival.new(ends), -1)
