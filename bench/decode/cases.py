"""What is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass

from flexnsa import NSAConfig

CEILING = 4.3e12
"""Bytes that an H200 copies in a second, read and written, as measured."""

DENSE_BYTES = 4 << 30
"""Keys and values of the dense baseline, of all sequences together, in the cases named `batch`."""


PAPER = NSAConfig()


@dataclass(frozen=True)
class Case:
    """One step of some sequences of one length.

    Attributes:
        name: `batch`, as many sequences as fill ``DENSE_BYTES``, or `single`, one.
        tokens: tokens of each sequence, the query's own included.
        batch: sequences.
        heads: query heads.
        kv_heads: KV heads.
        dim: key and value dim.
        compressed_page: compressed tokens of a page.
        page: raw tokens of a page.
        config: the geometry.
    """

    name: str
    tokens: int
    batch: int
    heads: int = 64
    kv_heads: int = 4
    dim: int = 128
    compressed_page: int = 64
    page: int = 64
    config: NSAConfig = PAPER

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in bfloat16, all KV heads."""
        return 2 * 2 * self.kv_heads * self.dim

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values that dense attention reads."""
        return self.batch * self.tokens * self.token_bytes

    @property
    def sparse_bytes(self) -> int:
        """Bytes of keys and values that NSA reads: compressed tokens, selected blocks, window."""
        config = self.config
        selected = min(self.tokens, config.num_selected * config.select_block)
        read = config.num_compressed(self.tokens) + selected + min(self.tokens, config.window)
        return self.batch * read * self.token_bytes


def _filling(tokens: int) -> Case:
    one = Case("batch", tokens, 1)
    return Case("batch", tokens, DENSE_BYTES // one.dense_bytes)


LENGTHS = (8192, 32768, 65536, 131072)

LARGE = (*map(_filling, LENGTHS), *(Case("single", tokens, 1) for tokens in LENGTHS[-2:]))

SMALL = tuple(Case("batch", tokens, 2, heads=8, kv_heads=2, dim=32) for tokens in (512, 2048))

TARGETS = {("batch", 8192): 2.8, ("batch", 32768): 5.6, ("batch", 65536): 7.0, ("batch", 131072): 8.0,
           ("single", 65536): 2.0, ("single", 131072): 3.5}  # fmt: skip
"""Times the best dense step's time over ours that the kernels were built to reach, by case and tokens."""


@dataclass(frozen=True)
class Prefill:
    """A prompt through a layer with an empty cache, in one call or in calls of ``chunk`` tokens.

    Attributes:
        tokens: tokens of the prompt.
        chunk: tokens of a call.
        dim: width of the layer.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: key and value dim.
        config: the geometry.
    """

    tokens: int
    chunk: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    config: NSAConfig = PAPER


PREFILLS = {"cuda": Prefill(65536, 4096, 2048, 64, 4, 128), "cpu": Prefill(1024, 256, 64, 8, 2, 16)}

CHUNKED = 1.25
"""Times the one call's time that the chunks' may come to."""
