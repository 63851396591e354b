"""The geometry of Native Sparse Attention: block sizes, strides, counts (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSAConfig:
    """Sizes, all in tokens or blocks, with the paper's values as defaults.

    >>> config = NSAConfig(window=128)
    >>> config.num_compressed(100), config.num_blocks(100)
    (5, 2)

    Args:
        compress_block: tokens summarised by one compressed token (the paper's l).
        compress_stride: tokens between the starts of two compressed tokens (d); divides both block sizes.
        select_block: tokens in a selection block (l'); at least ``compress_block``.
        num_selected: blocks that a query attends to in the selected branch (n), forced ones included.
        num_initial: forced blocks at the start of the document.
        num_local: forced blocks at the query, its own block included.
        window: keys in the sliding window, the query's own included (w).

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is out of range or does not fit another one.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_field(field.name, getattr(self, field.name))
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"compress_stride must divide {name}, got compress_stride={self.compress_stride} and "
                    f"{name}={getattr(self, name)}; choose {name} as a multiple of compress_stride"
                )
        if self.compress_block > self.select_block:
            raise ValueError(
                f"compress_block must be at most select_block, got compress_block={self.compress_block} and "
                f"select_block={self.select_block}; raise select_block or lower compress_block"
            )
        if self.num_initial + self.num_local > self.num_selected:
            raise ValueError(
                f"num_selected counts the forced blocks, so it must be at least num_initial + num_local, got "
                f"num_selected={self.num_selected}, num_initial={self.num_initial}, num_local={self.num_local}; "
                f"raise num_selected to {self.num_initial + self.num_local} or more"
            )

    @staticmethod
    def _check_field(name: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}; pass a whole number")
        least = 0 if name in ("num_initial", "num_local") else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}; raise it")

    def num_compressed(self, tokens: int) -> int:
        """Compressed tokens of a sequence of ``tokens`` tokens: the size of axis c."""
        return max(0, (tokens - self.compress_block) // self.compress_stride + 1)

    def num_blocks(self, tokens: int) -> int:
        """Selection blocks of a sequence of ``tokens`` tokens, the last one perhaps partly filled: axis s."""
        return -(-tokens // self.select_block)
