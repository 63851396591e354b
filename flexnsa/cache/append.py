"""The tokens of one call on their way into a cache: where they go, what they attend to, and when they count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from flexnsa.cache.cache import NSACache
from flexnsa.cache.stores import Places
from flexnsa.checks import values_are_checked
from flexnsa.config import NSAConfig
from flexnsa.types import KV, BranchKV, Positions


class Blocks(NamedTuple):
    """Raw tokens that hold the compression blocks which a call completes.

    Attributes:
        k: keys ``[b, hk, n, d]``, as the compressor takes them.
        v: values ``[b, hk, n, dv]``.
        starts: int64 ``[b, c]``, first token of each block among them, -1 where a row completes fewer; None where the
            rows are alike: block i then begins with token ``i * compress_stride``.
        number: which compressed token of its row each block is, int64 ``[b, c]`` or one range for all rows.
    """

    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n dv"]
    starts: Int64[Tensor, "b c"] | None
    number: Places

    @property
    def complete(self) -> Bool[Tensor, "b c"] | None:
        """Which blocks there are; None where all."""
        return None if self.starts is None else self.starts >= 0

    def ends(self, config: NSAConfig) -> Places:
        """Position of the last token of each block."""
        number, stride, last = self.number, config.compress_stride, config.compress_block - 1
        if isinstance(number, range):
            return range(number.start * stride + last, number.stop * stride + last, stride)
        return number * stride + last


class Append:
    """One call's tokens. Until ``commit`` the cache's rows are what they were.

    Where the host knows that all rows hold equally many tokens and gain as many, it knows what goes where, and nothing
    is looked up by index on the device.

    A row's real tokens are put first and its padding last, so that token i takes position ``length + i``. Padding then
    does no harm: no real token sees a later position, and what padding computes is thrown away.

    Args:
        cache: what the tokens are added to.
        tokens: tokens of each row t, padding included.
        documents: int ``[b, t]``, checked but for its ids: 0 for a token and -1 for padding. None where there is none.

    Raises:
        ValueError: other ids, or the cache cannot hold the tokens.
    """

    def __init__(self, cache: NSACache, tokens: int, documents: Int[Tensor, "b t"] | None = None):
        self.cache, self.tokens = cache, tokens
        self.count: Tensor | int = tokens
        self.real, self.column = None, None
        if documents is not None:
            _check_padding(documents)
            self.count = (documents >= 0).sum(1)
            self.real = torch.arange(tokens, device=cache.device) < self.count[:, None]
            self.column = (documents < 0).int().argsort(dim=1, stable=True)
        self.growth = cache.fill.growth(self.count, tokens)
        self.held = cache.fill.held(self.growth)
        alike = documents is None and self.growth is not None and len(set(self.growth.before.lengths)) == 1
        self.span = range(self.held, self.held + tokens) if alike else None
        if self.span is None:
            self.position = cache.lengths[:, None] + torch.arange(tokens, device=cache.device)

    @property
    def places(self) -> Places:
        """Positions of the tokens."""
        return self.position if self.span is None else self.span

    @property
    def num_tokens(self) -> int:
        """Tokens to attend to, tk. Only padding can reach past the last one that fits."""
        most = self.held + self.tokens
        return most if self.real is not None else min(self.cache.max_tokens, most)

    def pack(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        """The input with each row's padding last."""
        return x if self.column is None else x.take_along_dim(self.column[..., None], 1)

    def unpack(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        """The output in the input's order, padding 0."""
        if self.column is None or self.real is None:
            return x
        return x.masked_fill(~self.real[..., None], 0).take_along_dim(self.column.argsort(1)[..., None], 1)

    def blocks(self, raw: KV) -> Blocks | None:
        """What to feed the compressor: each block once, when its last token comes. None where none is completed.

        ``raw`` holds the call's keys and values as the compressor takes them.
        """
        cache, config = self.cache, self.cache.config
        most = self._most_completed()
        if most == 0:
            return None
        if self.span is not None:
            first = config.num_compressed(self.held)
            k, v = cache.raw.before(raw, range(first * config.compress_stride, self.held))
            return Blocks(k, v, None, range(first, first + most))
        k, v, begin = cache.raw.followed_by(raw, cache.lengths, min(config.compress_block - 1, self.held))
        index = cache.num_compressed(cache.lengths)[:, None] + torch.arange(most, device=cache.device)
        complete = index < cache.num_compressed(cache.lengths + self.count)[:, None]
        return Blocks(k, v, (index * config.compress_stride - begin[:, None]).where(complete, -1), index)

    def extend(self, blocks: Blocks | None, compressed: KV | None, selected: KV, window: KV) -> BranchKV:
        """What the tokens attend to. Keys and values are written past the rows' ends, which stay where they are.

        In grad mode the result is a copy, through which gradients reach the call's own keys and values.

        Args:
            blocks: the blocks that the call completes, or None.
            compressed: their compressed keys and values, or None.
            selected: the call's keys and values of the selected branch.
            window: those of the window branch.
        """
        cache = self.cache
        count = cache.config.num_compressed(self.num_tokens)
        if blocks is None or compressed is None:
            all_compressed = cache.compressed.first(count)
        else:
            all_compressed = cache.compressed.extended(blocks.number, compressed, blocks.complete, count)
        all_selected = cache.selected.extended(self.places, selected, self.real, self.num_tokens)
        if self.span is None:
            k, v, _ = cache.window.followed_by(window, cache.lengths, self._window_reach())
        else:
            k, v = cache.window.before(window, range(self.held - self._window_reach(), self.held))
        return BranchKV(all_compressed, all_selected, (k, v))

    def store(self, blocks: Blocks | None, compressed: KV | None, selected: KV) -> None:
        """``extend`` for those that read the cache themselves: the window's keys and values come with ``commit``."""
        if blocks is not None and compressed is not None:
            self.cache.compressed.put(blocks.number, compressed, blocks.complete)
        self.cache.selected.put(self.places, selected, self.real)

    def positions(self) -> dict[str, Positions] | None:
        """Where the tokens stand among the keys of each branch, by its name; None where they are those very tokens."""
        if self.held == 0:
            return None
        reach = self._window_reach()
        if self.span is not None:
            return {"compressed": self.span, "selected": self.span, "window": range(reach, reach + self.tokens)}
        begin = (self.cache.lengths - reach).clamp(min=0)
        return {"compressed": self.position, "selected": self.position, "window": self.position - begin[:, None]}

    def commit(self, raw: KV, window: KV) -> None:
        """Let the tokens count: the rings and the lengths move on."""
        cache = self.cache
        for ring, (k, v) in ((cache.raw, raw), (cache.window, window)):
            latest = slice(max(0, self.tokens - ring.slots), None)
            if self.span is not None:
                ring.put(self.span[latest], (k[:, :, latest], v[:, :, latest]))
            elif self.real is None:
                ring.put(self.position[:, latest], (k[:, :, latest], v[:, :, latest]))
            else:
                length = cache.lengths + self.count
                ring.put(self.position, (k, v), self.real & (self.position >= length[:, None] - ring.slots))
        cache.fill.grow(self.count, self.tokens, self.growth)

    def _most_completed(self) -> int:
        """Compressed tokens that any row completes: exactly where the host knows the lengths, else at most."""
        if self.growth is None:
            return -(-self.tokens // self.cache.config.compress_stride)
        pairs = zip(self.growth.before.lengths, self.growth.after.lengths, strict=True)
        num_compressed = self.cache.config.num_compressed
        return max(num_compressed(after) - num_compressed(before) for before, after in pairs)

    def _window_reach(self) -> int:
        """Tokens before the call that its first one may see in the window, and one more for whole tiles."""
        return min(self.cache.config.window, self.held)


def _check_padding(documents: Tensor) -> None:
    if values_are_checked(documents) and (documents > 0).any():
        raise ValueError(
            f"documents must be 0, or -1 for padding, where a cache is given, got ids up to {int(documents.max())}; "
            f"each row of a cache holds one document"
        )
