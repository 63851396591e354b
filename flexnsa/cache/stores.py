"""Buffers of keys and values by position: of every position, or of the latest ones in a ring.

Positions are one for each new token and row, ``[b, n]``, or one range for all rows where the host knows it: what is
written and read are slices then, rather than scattered and gathered by index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flexnsa.types import KV

Places = Int64[Tensor, "b n"] | range
"""Positions of each row, or those of all rows, adjacent ones."""


class Store:
    """Keys and values of positions ``0 .. slots-1`` of each row, allocated once and written in place.

    There is one slot more than ``slots``: it takes what is not to be kept, so that a write has a fixed shape and needs
    no decision on the host.

    Args:
        slots: positions that fit.
        batch: rows b.
        heads: KV heads hk.
        dims: key dim d and value dim dv.
        options: dtype and device.
    """

    def __init__(self, slots: int, batch: int, heads: int, dims: tuple[int, int], **options: Any):
        self.slots = slots
        self.k, self.v = (torch.zeros(batch, heads, slots + 1, dim, **options) for dim in dims)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the slot for what is not kept included."""
        return self.k.nbytes + self.v.nbytes

    @property
    def whole(self) -> KV:
        """Keys and values of all slots, as they lie."""
        return self.k[:, :, : self.slots], self.v[:, :, : self.slots]

    def slot(self, position: Int64[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
        """Where a position is kept; one past the end is not."""
        return position.clamp(max=self.slots)

    def first(self, count: int) -> KV:
        """Keys and values of positions ``0 .. count-1``, 0 from ``slots`` on; a copy in grad mode."""
        # What autograd saves must not be written to by the next call.
        k, v = (x.clone() if torch.is_grad_enabled() else x for x in (self.k, self.v))
        return self._cut(k, count), self._cut(v, count)

    def put(self, position: Places, kv: KV, keep: Bool[Tensor, "b n"] | None = None) -> None:
        """Write keys and values of the given positions, of those where ``keep`` is true; all of a range, which fits."""
        if isinstance(position, range):
            first, *others = self._slices(position)
            for store, new in zip((self.k, self.v), kv, strict=True):
                new = new.detach() if new.requires_grad else new
                store[:, :, first.start : first.stop].copy_(new[:, :, : len(first)])
                for part in others:
                    store[:, :, part.start : part.stop].copy_(new[:, :, -len(part) :])
            return
        slot = self._kept(position, keep)
        for store, new in zip((self.k, self.v), kv, strict=True):
            store.scatter_(2, _rows_of(slot, new), new.detach())

    def extended(self, position: Places, kv: KV, keep: Bool[Tensor, "b n"] | None, count: int) -> KV:
        """``put``, then ``first``, through which gradients reach ``kv``. A range ends with position ``count - 1``."""
        if not torch.is_grad_enabled():
            self.put(position, kv, keep)
            return self.first(count)
        if isinstance(position, range):
            pairs = zip((self.k, self.v), kv, strict=True)
            k, v = (torch.cat((x[:, :, : position.start], new), dim=2) for x, new in pairs)
            self.put(position, kv)
            return k, v
        slot = self._kept(position, keep)
        k, v = (x.scatter(2, _rows_of(slot, new), new) for x, new in zip((self.k, self.v), kv, strict=True))
        self.put(position, kv, keep)
        return self._cut(k, count), self._cut(v, count)

    def erase(self, position: Int64[Tensor, "b n"], dropped: Bool[Tensor, "b n"]) -> None:
        """Set to 0 the given positions, of those where ``dropped`` is true."""
        slot = self._kept(position, dropped)
        for store in (self.k, self.v):
            store.scatter_(2, slot[:, None, :, None].expand(-1, store.shape[1], -1, store.shape[3]), 0)

    def clear(self) -> None:
        """Set all to 0."""
        self.k.zero_()
        self.v.zero_()

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace both buffers by ``function`` of them."""
        self.k, self.v = function(self.k), function(self.v)

    def _slices(self, position: range) -> list[range]:
        """The slots of some adjacent positions, as runs of adjacent slots."""
        return [position]

    def _kept(self, position: Tensor, keep: Tensor | None) -> Tensor:
        slot = self.slot(position)
        return slot if keep is None else slot.where(keep, self.slots)

    def _cut(self, x: Tensor, count: int) -> Tensor:
        x = x[:, :, : min(self.slots, count)]
        return x if count <= self.slots else F.pad(x, (0, 0, 0, count - self.slots))


class Ring(Store):
    """Keys and values of the latest ``slots`` positions: position p is in slot ``p mod slots``."""

    def slot(self, position: Int64[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
        """Where a position is kept."""
        return position % self.slots

    def followed_by(
        self, kv: KV, lengths: Int64[Tensor, " b"], latest: int
    ) -> tuple[Float[Tensor, "b hk n d"], Float[Tensor, "b hk n dv"], Int64[Tensor, " b"]]:
        """The ``latest`` positions before ``lengths``, in order, and then ``kv``, whose first position is ``lengths``.

        A row that holds fewer than ``latest`` begins with its first position, and ends with what may be anything.

        Returns:
            Keys and values of ``latest + t`` positions, and the position of the first of them in each row.
        """
        if latest == 0:
            return *kv, lengths
        begin = (lengths - latest).clamp(min=0)
        tokens = kv[0].shape[2]
        position = begin[:, None] + torch.arange(latest + tokens, device=lengths.device)
        new = self.slots + 1 + (position - lengths[:, None]).clamp(max=tokens - 1)
        index = self.slot(position).where(position < lengths[:, None], new)
        k, v = (torch.cat(pair, dim=2) for pair in zip((self.k, self.v), kv, strict=True))
        return k.gather(2, _rows_of(index, k)), v.gather(2, _rows_of(index, v)), begin

    def before(self, kv: KV, position: range) -> KV:
        """Keys and values of some positions that all rows hold, and then ``kv``."""
        if not position:
            return kv
        parts = self._slices(position)
        k, v = (
            torch.cat([*(store[:, :, part.start : part.stop] for part in parts), new], dim=2)
            for store, new in zip((self.k, self.v), kv, strict=True)
        )
        return k, v

    def _slices(self, position: range) -> list[range]:
        first = position.start % self.slots
        wrapped = max(0, first + len(position) - self.slots)
        return [range(first, first + len(position) - wrapped), *([range(wrapped)] if wrapped else [])]


def _rows_of(index: Tensor, like: Tensor) -> Tensor:
    """``index [b, n]`` as an index along axis 2 of ``like [b, hk, n, d]``."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
