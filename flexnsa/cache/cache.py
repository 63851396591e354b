"""What a layer keeps of the tokens that it has seen, so that the next ones need not see them again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flexnsa.cache.fill import Fill, rearranged
from flexnsa.cache.stores import Ring, Store
from flexnsa.checks import values_are_checked
from flexnsa.config import NSAConfig


class NSACache:
    """Keys and values of one layer for a batch of growing rows, each of a length of its own.

    Made by ``layer.new_cache`` and filled by ``layer(x, cache=cache)``. It keeps all tokens of the selected branch and
    all compressed tokens. The window branch and the compressor need only recent tokens, which are kept in rings. All is
    allocated at once and written in place.

    >>> from flexnsa import NativeSparseAttention, NSAConfig
    >>> layer = NativeSparseAttention(dim=64, num_heads=4, num_kv_heads=2, head_dim=16, config=NSAConfig())
    >>> cache = layer.new_cache(batch=2, max_tokens=1000)
    >>> with torch.no_grad():
    ...     prompt = layer(torch.randn(2, 100, 64), cache=cache)
    ...     token = layer(torch.randn(2, 1, 64), cache=cache)
    >>> cache.lengths
    tensor([101, 101])

    Args:
        config: the layer's geometry.
        batch: rows b.
        max_tokens: tokens that a row can hold.
        max_rollback: how many of the latest tokens ``crop`` can drop.
        num_kv_heads: KV heads hk.
        head_dim: key dim d.
        value_dim: value dim dv.
        device: of all buffers.
        dtype: of keys and values.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch: int,
        max_tokens: int,
        max_rollback: int = 0,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        for name, size in (("batch", batch), ("max_tokens", max_tokens)):
            _check_size(name, size, least=1)
        _check_size("max_rollback", max_rollback, least=0)
        self.config, self.max_tokens, self.max_rollback = config, max_tokens, max_rollback
        recent = (min(max_tokens, size + max_rollback) for size in (config.window, config.compress_block))
        rows: dict[str, Any] = {"batch": batch, "heads": num_kv_heads, "dims": (head_dim, value_dim)}
        rows |= {"device": device, "dtype": dtype}
        with torch.inference_mode(False):  # What is made in inference mode cannot be written outside it.
            self.selected = Store(max_tokens, **rows)
            self.compressed = Store(config.num_compressed(max_tokens), **rows)
            self.window, self.raw = (Ring(slots, **rows) for slots in recent)
            self.fill = Fill(batch, max_tokens, max_rollback, device)

    @property
    def lengths(self) -> Int64[Tensor, " b"]:
        """Tokens that each row holds, int64 ``[b]``, on the cache's device. Read only."""
        return self.fill.lengths

    @property
    def batch(self) -> int:
        """Rows b."""
        return self.fill.state.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.fill.state.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.selected.k.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers.

        ``b * hk * (d + dv) * itemsize * (T + C + W + L + 4) + 16 * b`` with ``T = max_tokens``,
        ``C = config.num_compressed(T)``, ``W = min(T, window + max_rollback)`` and
        ``L = min(T, compress_block + max_rollback)``.
        """
        return sum(store.nbytes for store in self._stores) + self.fill.state.nbytes

    def reset(self) -> None:
        """Forget all tokens."""
        for store in self._stores:
            store.clear()
        self.fill.reset()

    def crop(self, tokens: int | Int64[Tensor, " b"]) -> None:
        """Drop the last tokens of each row, as if they had never been.

        Args:
            tokens: how many, one number for all rows or int64 ``[b]``.

        Raises:
            TypeError: ``tokens`` is neither an int nor a tensor.
            ValueError: more than a row holds, or further back than ``max_rollback`` from the most that it ever held.
                On CUDA, where that takes reading the lengths, it is checked inside ``debug()`` only.
        """
        length = self.fill.shrunk(tokens)
        self._erase_after(length)
        self.fill.shrink(length, tokens)

    def reorder(self, rows: Int64[Tensor, " rows"]) -> None:
        """Make row i what row ``rows[i]`` was, as beam search does; another number of rows makes another batch.

        Args:
            rows: int64 ``[b']``, numbers of present rows, repeated or left out at will.

        Raises:
            TypeError: ``rows`` is not a tensor.
            ValueError: wrong dtype, shape or device, or no such row (read on a CPU, or inside ``debug()``).
        """
        self.fill.check_index("rows", rows)
        if values_are_checked(rows) and not ((rows >= 0) & (rows < self.batch)).all():
            raise ValueError(f"rows must lie in 0 .. {self.batch - 1}, got {int(rows.min())} .. {int(rows.max())}")
        with torch.inference_mode(False):
            for store in self._stores:
                store.transform(lambda x: rearranged(x, rows, 0))
            self.fill.reorder(rows)

    def to(self, device: torch.device | str | int) -> NSACache:
        """Move the buffers, in place.

        Returns:
            The cache itself.
        """
        with torch.inference_mode(False):
            for store in self._stores:
                store.transform(lambda x: x.to(device))
            self.fill.state = self.fill.state.to(device)
        return self

    def num_compressed(self, length: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Compressed tokens of rows of these lengths."""
        return ((length - self.config.compress_block) // self.config.compress_stride + 1).clamp(min=0)

    @property
    def _stores(self) -> tuple[Store, ...]:
        return self.selected, self.compressed, self.window, self.raw

    def _erase_after(self, length: Tensor) -> None:
        """Zeros in place of dropped tokens: some engines multiply what they mask by 0, which a NaN would survive."""
        place = torch.arange(self.max_rollback, device=self.device)
        for store in self._stores:
            begin, end = length, self.lengths
            if store is self.compressed:
                begin, end = self.num_compressed(begin), self.num_compressed(end)
            position = begin[:, None] + place
            store.erase(position, position < end[:, None])


def check_cache(cache: object, x: Tensor, config: NSAConfig, sizes: tuple[int, int, int]) -> None:
    """The cache was made for this geometry and these sizes (KV heads, key dim, value dim), and fits the input.

    Raises:
        TypeError: it is no cache.
        ValueError: it was made for others, or has another batch or device than ``x``.
    """
    if not isinstance(cache, NSACache):
        raise TypeError(f"cache must be an NSACache, got {type(cache).__name__}; layer.new_cache makes one")
    own, expected = (cache.config, *cache.selected.k.shape[1::2], cache.selected.v.shape[3]), (config, *sizes)
    if own != expected:
        raise ValueError(
            f"cache must be of the layer's geometry (config, num_kv_heads, head_dim, value_dim) = {expected}, got "
            f"{own}; make it with this layer's new_cache"
        )
    if cache.batch != x.shape[0]:
        raise ValueError(f"x must have the cache's batch {cache.batch}, got {x.shape[0]}; make a cache of that batch")
    if cache.device != x.device:
        raise ValueError(f"cache must be on x's device {x.device}, got {cache.device}; move it with .to()")


def check_cache_dtype(cache: NSACache, q: Tensor) -> None:
    """The cache holds keys and values of the dtype that the layer makes.

    Raises:
        ValueError: it does not.
    """
    if cache.dtype != q.dtype:
        raise ValueError(
            f"cache must hold the keys' dtype {q.dtype}, got {cache.dtype}; make it with "
            f"new_cache(..., dtype={q.dtype})"
        )


def _check_size(name: str, size: object, least: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {size!r} of type {type(size).__name__}; pass a whole number")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}; raise it")
