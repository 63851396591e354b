"""How many tokens each row of a cache holds: on the device, and as far as the host knows without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from flexnsa.checks import values_are_checked


class Rows(NamedTuple):
    """Tokens that each row holds, and the most that it has held."""

    lengths: list[int]
    peaks: list[int]


class Growth(NamedTuple):
    """The rows before and after a call."""

    before: Rows
    after: Rows


class Fill:
    """Lengths of a cache's rows, and their peaks: the most that each has held, from which a rollback is counted.

    On a CPU the values are read. On CUDA the host reckons along, and reads them only where it has lost count and the
    cache might be full. A call that is traced or captured in a CUDA graph neither reads nor reckons, and as its graph
    may run at any time, the host trusts its own reckoning no more.

    Args:
        batch: rows b.
        max_tokens: tokens that a row can hold.
        max_rollback: how many of the latest tokens can be dropped.
        device: where the lengths are.
    """

    def __init__(self, batch: int, max_tokens: int, max_rollback: int, device: torch.device):
        self.max_tokens, self.max_rollback = max_tokens, max_rollback
        self.state = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._known: Rows | None = Rows([0] * batch, [0] * batch)
        self._most = 0
        self._reckons = True

    @property
    def lengths(self) -> Int64[Tensor, " b"]:
        """Tokens that each row holds."""
        return self.state[0]

    def growth(self, count: Int64[Tensor, " b"] | int, tokens: int) -> Growth | None:
        """What adding ``count`` tokens comes to, a tensor of at most ``tokens`` each; None where the host cannot know.

        Raises:
            ValueError: they do not fit.
        """
        if self._blind():
            return None
        before = self._on_host()
        readable = isinstance(count, int) or values_are_checked(count)
        if (before is None or not readable) and self._most + tokens <= self.max_tokens:
            return None
        if before is None:  # Only a look can tell whether the tokens fit.
            before = _read(self.state)
        added = [count] * len(before.lengths) if isinstance(count, int) else count.tolist()
        self._check_room(before.lengths, added)
        lengths = [length + more for length, more in zip(before.lengths, added, strict=True)]
        return Growth(before, Rows(lengths, list(map(max, lengths, before.peaks))))

    def held(self, growth: Growth | None) -> int:
        """Tokens in the fullest row before a call, or a bound on them."""
        if self._blind():
            return self.max_tokens
        return self._most if growth is None else max(growth.before.lengths)

    def grow(self, count: Int64[Tensor, " b"] | int, tokens: int, growth: Growth | None) -> None:
        """Add ``count`` tokens, at most ``tokens``, to each row."""
        most = min(self.max_tokens, self.held(growth) + tokens)
        self.lengths.add_(count)
        self.state[1].clamp_(min=self.lengths)
        self._reckon(None if growth is None else growth.after, most)

    def shrunk(self, tokens: int | Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The lengths once ``tokens`` tokens are dropped.

        Raises:
            TypeError: ``tokens`` is neither an int nor a tensor.
            ValueError: more than can be dropped, or a tensor that does not fit.
        """
        if isinstance(tokens, Tensor):
            self.check_index("tokens", tokens)
            if tokens.shape != self.lengths.shape:
                raise ValueError(
                    f"tokens must be an int or [b] = {tuple(self.lengths.shape)}, got {tuple(tokens.shape)}; one for "
                    f"each row"
                )
        elif not isinstance(tokens, int) or isinstance(tokens, bool):
            raise TypeError(f"tokens must be an int or an int64 tensor [b], got {type(tokens).__name__}")
        drop = self._per_row(tokens)
        if drop is not None:
            self._check_drop(drop)
        return (self.lengths - tokens).clamp(min=0)

    def shrink(self, lengths: Int64[Tensor, " b"], tokens: int | Int64[Tensor, " b"]) -> None:
        """Take over the lengths that ``shrunk`` gave for ``tokens``."""
        known, drop = self._on_host(), self._per_row(tokens)
        self.lengths.copy_(lengths)
        if known is not None and drop is not None:
            known = known._replace(lengths=[length - less for length, less in zip(known.lengths, drop, strict=True)])
        self._reckon(None if drop is None else known, self._most)

    def reorder(self, rows: Int64[Tensor, " rows"]) -> None:
        """Make row i what row ``rows[i]`` was."""
        known = self._on_host()
        self.state = rearranged(self.state, rows, 1)
        if known is not None and values_are_checked(rows):
            known = Rows(*([kept[row] for row in rows.tolist()] for kept in known))
        elif known is not None:  # Rows that are alike stay so, whichever they are.
            alike = all(len(set(kept)) == 1 for kept in known)
            known = Rows(*(kept[:1] * len(rows) for kept in known)) if alike else None
        self._reckon(known, self._most)

    def reset(self) -> None:
        """No tokens in any row."""
        self.state.zero_()
        batch = self.state.shape[1]
        self._reckon(Rows([0] * batch, [0] * batch), 0)

    def check_index(self, name: str, index: object) -> None:
        """``index`` is an int64 tensor with one axis on the cache's device."""
        if not isinstance(index, Tensor):
            raise TypeError(f"{name} must be an int64 tensor, got {type(index).__name__}; use torch.tensor")
        if index.dtype != torch.int64 or index.ndim != 1 or index.shape[0] == 0:
            raise ValueError(f"{name} must be int64 with one axis, got {index.dtype} {tuple(index.shape)}; reshape it")
        if index.device != self.state.device:
            raise ValueError(
                f"{name} must be on the cache's device {self.state.device}, got {index.device}; move it with .to()"
            )

    def _blind(self) -> bool:
        """Whether the call is being recorded, to be run again with other values."""
        return torch.compiler.is_compiling() or (
            self.state.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        )

    def _on_host(self) -> Rows | None:
        """Lengths and peaks, as far as that takes no waiting for the device."""
        if self._blind():
            return None
        return _read(self.state) if values_are_checked(self.state) else self._known

    def _per_row(self, tokens: int | Tensor) -> list[int] | None:
        if isinstance(tokens, int):
            return [tokens] * self.state.shape[1]
        return tokens.tolist() if values_are_checked(tokens) else None

    def _reckon(self, rows: Rows | None, most: int) -> None:
        if self._blind():
            self._reckons, self._known, self._most = False, None, self.max_tokens
        elif self._reckons:
            self._known, self._most = rows, most if rows is None else max(rows.lengths)

    def _check_room(self, lengths: list[int], added: list[int]) -> None:
        for row, (length, more) in enumerate(zip(lengths, added, strict=True)):
            if length + more > self.max_tokens:
                raise ValueError(
                    f"cache is full: row {row} holds {length} of max_tokens={self.max_tokens} tokens, so that "
                    f"{self.max_tokens - length} more fit, got {more}; make one with a larger max_tokens"
                )

    def _check_drop(self, drop: list[int]) -> None:
        known = self._on_host()
        for row, less in enumerate(drop):
            limit = self.max_rollback
            if known is not None:
                limit = known.lengths[row] - max(0, known.peaks[row] - self.max_rollback)
            if not 0 <= less <= limit:
                raise ValueError(
                    f"tokens must be in 0 .. {limit} for row {row}, got {less}: a row can go back by "
                    f"max_rollback={self.max_rollback} tokens from the most that it held; make a cache with a larger "
                    f"max_rollback"
                )


def rearranged(x: Tensor, rows: Int64[Tensor, " rows"], dim: int) -> Tensor:
    """``x`` with the given rows along ``dim``, in its own memory where it has as many."""
    chosen = x.index_select(dim, rows)
    return x.copy_(chosen) if chosen.shape == x.shape else chosen


def _read(state: Tensor) -> Rows:
    return Rows(*state.tolist())
