"""Where each query stands: its position, its document, and so the interval of keys that each branch lets it see.

NSA's visibility is always one interval of keys a query, with packed documents too. Every engine builds its masks from
the tables made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexnsa.checks import check_mask_mod, values_are_checked
from flexnsa.config import NSAConfig
from flexnsa.kept import kept, unobserved
from flexnsa.types import Positions
from flexnsa_masks import MaskMod, and_masks, document, interval_of
from flexnsa_masks.geometry import name_of

_LONGEST_KEPT = 2**20  # queries; 16 MiB
_LOOKED_AT = 8  # queries for which a mask mod is compared with its interval

# Each stage of a call is public and is given the same ids: their values are read by the first, and again once changed.
_SOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class KeyRange(NamedTuple):
    """The keys ``first .. last`` (inclusive) that a query sees, int64 ``[b|1, tq]``; empty where last < first."""

    first: Int64[Tensor, "b tq"]
    last: Int64[Tensor, "b tq"]


class QueryTable(NamedTuple):
    """What the masks need to know of each query, int64 ``[b|1, tq]``.

    Attributes:
        position: absolute token number, -1 for a query that is padding.
        start: first token of the query's document, 0 without documents.
        offset: index of that document's first compressed token, 0 without documents.
        documents: document of each KV token, or None.
        visible: mask mod over absolute token numbers that replaces causality, documents included, or None.
        num_tokens: KV tokens tk, or None where the caller cannot know it.
        mask_mod: the call's mask mod, documents not included, or None.
        end: last token of the query's document; None without documents, or without a mask mod.
        first: where query 0 stands, if query t of each row stands t tokens after it; None where the host cannot know.
    """

    position: Int64[Tensor, "b tq"]
    start: Int64[Tensor, "b tq"]
    offset: Int64[Tensor, "b tq"]
    documents: Int[Tensor, "b tk"] | None = None
    visible: MaskMod | None = None
    num_tokens: int | None = None
    mask_mod: MaskMod | None = None
    end: Int64[Tensor, "b tq"] | None = None
    first: int | None = None

    @property
    def packed(self) -> bool:
        """Whether documents were given, so that start and offset may differ from 0."""
        return self.documents is not None

    def causal_range(self) -> KeyRange:
        """Tokens of the query's document up to itself."""
        return KeyRange(self.start, self.position)

    def masked_range(self, batch: int) -> KeyRange | None:
        """Tokens that the mask mod lets each query see, where it says that they are an interval; else None.

        Raises:
            ValueError: it says otherwise than it does; some queries are looked at, on a CPU or inside ``debug()``.
        """
        interval = None if self.mask_mod is None else interval_of(self.mask_mod)
        if interval is None:
            return None
        row, query = torch.arange(batch, device=self.position.device)[:, None], self.position.clamp(min=0)
        last = interval.last(row, query)
        first = torch.zeros_like(last) if interval.first is None else interval.first(row, query)
        if self.num_tokens is not None and values_are_checked(query):
            _check_interval(self.mask_mod, row, query, first, last, self.num_tokens)
        first = torch.maximum(first, self.start)
        if self.end is not None:
            last = torch.minimum(last, self.end)
        elif self.num_tokens is not None:
            last = last.clamp(max=self.num_tokens - 1)
        first, last, position = torch.broadcast_tensors(first, last, self.position)
        return KeyRange(first.contiguous(), last.masked_fill((position < 0) | (last < first), -1))

    def window_range(self, config: NSAConfig, seen: KeyRange | None = None) -> KeyRange:
        """The last ``window`` tokens, the query's own included; of those in ``seen`` where that is given."""
        first = torch.maximum(self.start, self.position - config.window + 1)
        if seen is None:
            return KeyRange(first, self.position)
        return KeyRange(torch.maximum(first, seen.first), torch.minimum(self.position, seen.last))

    def compressed_range(self, config: NSAConfig, seen: KeyRange | None = None) -> KeyRange:
        """Compressed tokens all of whose tokens are visible: up to the query, or in ``seen`` where that is given."""
        first, last = self.causal_range() if seen is None else seen
        complete = (last - self.start + 1 - config.compress_block) // config.compress_stride + 1
        hidden = (first - self.start + config.compress_stride - 1) // config.compress_stride
        return KeyRange(self.offset + hidden, self.offset + complete.clamp(min=0) - 1)

    def slice(self, queries: slice) -> QueryTable:
        """The table of some of the queries."""
        return self._replace(
            position=self.position[:, queries],
            start=self.start[:, queries],
            offset=self.offset[:, queries],
            end=None if self.end is None else self.end[:, queries],
            first=None if self.first is None else self.first + (queries.start or 0),
        )


def documents_from_lengths(
    lengths: Sequence[int] | Sequence[Sequence[int]] | Int[Tensor, "*b n"], tokens: int
) -> Int64[Tensor, "b tk"]:
    """Document ids of packed rows.

    >>> documents_from_lengths([2, 3], 6)
    tensor([[ 0,  0,  1,  1,  1, -1]])

    Args:
        lengths: tokens of each document, one list for a single row or one list a row.
        tokens: tokens in a row. What the documents leave over is padding, id -1, on the right.

    Returns:
        int64 ``[b, tokens]``.

    Raises:
        ValueError: a length is below 1, or a row's lengths add up to more than ``tokens``.
    """
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    rows = [lengths] if not lengths or isinstance(lengths[0], int) else lengths
    return torch.stack([_document_row(list(row), tokens) for row in rows])  # type: ignore[arg-type]


def _document_row(lengths: list[int], tokens: int) -> Tensor:
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths must be at least 1, got {lengths}; leave empty documents out")
    if sum(lengths) > tokens:
        raise ValueError(f"lengths must add up to at most tokens={tokens}, got {lengths}, {sum(lengths)} in all")
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return F.pad(ids, (0, tokens - sum(lengths)), value=-1)


def query_table(
    q: Tensor,
    config: NSAConfig,
    *,
    num_tokens: int | None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
) -> QueryTable:
    """The table of the queries of ``q`` ``[b, hq, tq, d]``.

    Args:
        q: queries; only the shape and device are read.
        config: the geometry.
        num_tokens: tk, or None where the caller cannot know it (compressed keys alone do not fix it).
        positions: int64 ``[tq]`` or ``[b, tq]``, strictly increasing, in ``0 .. tk-1``; or a range of them; None for
            ``0 .. tk-1``.
        documents: int ``[b, tk]``, non-decreasing ids, -1 for padding on either side.
        mask_mod: FlexAttention mask mod over absolute token numbers, in place of causality.

    Raises:
        ValueError: positions, documents or mask_mod do not fit.
    """
    check_mask_mod(mask_mod, q)
    if documents is not None:
        num_tokens = documents.shape[-1] if num_tokens is None else num_tokens
        check_documents(documents, q, num_tokens)
    position = resolve_positions(positions, q, num_tokens)
    first = 0 if positions is None else positions.start if isinstance(positions, range) else None
    if documents is None:
        num_tokens = q.shape[2] if num_tokens is None and positions is None else num_tokens
        zero = torch.zeros_like(position) if first is None else _counted(q, first)[1]
        return QueryTable(position, zero, zero, None, mask_mod, num_tokens, mask_mod, None, first)
    # Indices out of range are refused above where values may be read; elsewhere they must at least stay in memory.
    at = position.clamp(0, documents.shape[1] - 1).expand(documents.shape[0], -1)
    real = documents.gather(1, at) >= 0
    start = document_starts(documents)
    begins = _complete_blocks(documents, start, config).long()
    offset = (begins.cumsum(1) - begins).gather(1, start)
    return QueryTable(
        position.masked_fill(~real, -1),
        start.gather(1, at),
        offset.gather(1, at),
        documents,
        None if mask_mod is None else and_masks(mask_mod, document(documents)),
        num_tokens,
        mask_mod,
        None if mask_mod is None else _document_ends(documents).gather(1, at),
        first,
    )


def check_documents(documents: Int[Tensor, "b tk"], like: Tensor, num_tokens: int) -> None:
    """The ids fit ``num_tokens`` KV tokens, and the batch (first axis) and device of ``like``.

    Raises:
        ValueError: wrong dtype, shape or device, or ids out of order (read on a CPU, or inside ``debug()``).
    """
    if not isinstance(documents, Tensor):
        raise TypeError(f"documents must be a tensor [b, tk], got {type(documents).__name__}; use torch.tensor")
    if documents.is_floating_point() or not documents.dtype.is_signed:
        raise ValueError(f"documents must be signed integer ids, got {documents.dtype}; convert it with .long()")
    if documents.shape != (like.shape[0], num_tokens):
        raise ValueError(
            f"documents must be [b, tk] = {(like.shape[0], num_tokens)}, one id a KV token, got "
            f"{tuple(documents.shape)}; documents_from_lengths makes them"
        )
    if documents.device != like.device:
        raise ValueError(f"documents must be on {like.device}, got {documents.device}; move it with .to()")
    if values_are_checked(documents) and not _known_sound(documents):
        _check_document_values(documents)
        if not documents.is_inference():
            _SOUND[documents] = documents._version


def document_starts(documents: Int[Tensor, "b tk"]) -> Int64[Tensor, "b tk"]:
    """For each token the first token of its document."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(begins, index, 0).cummax(1).values


def _check_interval(
    mask_mod: MaskMod | None, row: Tensor, query: Tensor, first: Tensor, last: Tensor, num_tokens: int
) -> None:
    assert mask_mod is not None
    query, first, last = torch.broadcast_tensors(query, first, last)
    key, step = torch.arange(num_tokens, device=query.device), max(1, query.shape[1] // _LOOKED_AT)
    query, first, last = (x[:, ::step, None] for x in (query, first, last))
    told = (first <= key) & (key <= last)
    if (mask_mod(row[: len(query), :, None], torch.zeros_like(row[:1, :, None]), query, key) != told).any():
        raise ValueError(
            f"mask_mod {name_of(mask_mod)} sees other keys than its interval, first .. last, says; correct what was "
            f"given to with_interval, or leave it out"
        )


def _document_ends(documents: Tensor) -> Tensor:
    """For each token the last token of its document."""
    index = torch.arange(documents.shape[1], device=documents.device)
    ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    return torch.where(ends, index, documents.shape[1]).flip(1).cummin(1).values.flip(1)


def compressed_starts(documents: Int[Tensor, "b tk"] | None, config: NSAConfig) -> Int64[Tensor, "b c"] | None:
    """First token of each compressed token, packed left, -1 in the unused tail; None (i * stride) without documents."""
    if documents is None:
        return None
    batch, tokens = documents.shape
    begins = _complete_blocks(documents, document_starts(documents), config)
    count = config.num_compressed(tokens)
    # Tokens that begin no block are written to one slot past the end, which is then cut off.
    slot = torch.where(begins, begins.cumsum(1) - 1, count).clamp(max=count)
    index = torch.arange(tokens, device=documents.device).expand(batch, -1)
    starts = torch.full((batch, count + 1), -1, dtype=torch.int64, device=documents.device)
    return starts.scatter(1, slot, index)[:, :count]


def _complete_blocks(documents: Tensor, start: Tensor, config: NSAConfig) -> Tensor:
    """Which tokens begin a compression block that lies wholly in their document."""
    tokens = documents.shape[1]
    index = torch.arange(tokens, device=documents.device)
    end = index + config.compress_block - 1
    same = documents[:, end.clamp(max=tokens - 1)] == documents
    return same & (end < tokens) & (documents >= 0) & ((index - start) % config.compress_stride == 0)


def resolve_positions(positions: Positions | None, q: Tensor, num_tokens: int | None) -> Tensor:
    """Positions as int64 ``[b|1, tq]``, checked against the queries, and against tk where the caller knows it."""
    batch, queries = q.shape[0], q.shape[2]
    if positions is None:
        if num_tokens is not None and num_tokens != queries:
            raise ValueError(
                f"positions is None, which needs as many queries as KV tokens, got tq={queries} and tk={num_tokens}; "
                f"pass positions=, the absolute position of each query"
            )
        return _counted(q, 0)[0]
    if isinstance(positions, range):
        _check_range(positions, queries, num_tokens)
        return _counted(q, positions.start)[0]
    if not isinstance(positions, Tensor):
        raise TypeError(
            f"positions must be a tensor [tq] or [b, tq], or a range, got {type(positions).__name__}; use torch.tensor"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be int64, got {positions.dtype}; convert it with .long()")
    if positions.shape not in ((queries,), (1, queries), (batch, queries)):
        raise ValueError(
            f"positions must be [tq] = ({queries},) or [b, tq] = ({batch}, {queries}), got {tuple(positions.shape)}"
        )
    if positions.device != q.device:
        raise ValueError(f"positions must be on q's device {q.device}, got {positions.device}; move it with .to()")
    if values_are_checked(positions):
        _check_position_values(positions, num_tokens)
    return positions.reshape(-1, queries).long()


def _counted(q: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """``first .. first+tq-1`` and as many zeros, int64 ``[1, tq]``, for queries ``[b, hq, tq, d]``; only to be read.

    Kept between eager calls on CUDA.
    """
    queries, keep = q.shape[2], q.device.type == "cuda" and unobserved() and type(q) is Tensor
    # Kernels are compiled anew for tensors that begin between multiples of 16 bytes.
    keep = keep and first + queries <= _LONGEST_KEPT and first % 2 == 0
    return (_slice if keep else _count)(first, queries, q.device)


def _count(first: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    position = torch.arange(first, first + queries, device=device)[None]
    return position, torch.zeros(1, queries, dtype=torch.int64, device=device)


_kept_count = kept(8)(_count)


@kept(64)
def _slice(first: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # A power of two serves all chunks of a prompt, and lengths like it.
    position, zero = _kept_count(0, 1 << (first + queries - 1).bit_length(), device)
    return position[:, first : first + queries], zero[:, :queries]


def _check_range(positions: range, queries: int, num_tokens: int | None) -> None:
    if positions.step != 1 or len(positions) != queries:
        raise ValueError(f"positions must be a range of step 1 over tq={queries} tokens, got {positions}")
    if positions.start < 0 or (num_tokens is not None and positions.stop > num_tokens):
        raise ValueError(
            f"positions must lie in 0 .. {'tk-1' if num_tokens is None else num_tokens - 1}, got {positions}; every "
            f"query is one of the KV tokens"
        )


def _check_position_values(positions: Tensor, num_tokens: int | None) -> None:
    if (positions.diff(dim=-1) <= 0).any():
        raise ValueError("positions must be strictly increasing, got some that are not; sort the queries")
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or (num_tokens is not None and high >= num_tokens):
        raise ValueError(
            f"positions must lie in 0 .. {'tk-1' if num_tokens is None else num_tokens - 1}, got {low} .. {high}; "
            f"every query is one of the KV tokens"
        )


def _known_sound(documents: Tensor) -> bool:
    """Whether these very ids were checked before and not written to since; inference tensors do not count writes."""
    return not documents.is_inference() and _SOUND.get(documents) == documents._version


def _check_document_values(documents: Tensor) -> None:
    if (documents < -1).any():
        raise ValueError(f"documents must be ids >= 0, or -1 for padding, got {int(documents.min())}; renumber them")
    real = documents >= 0
    if ((real.int().diff(dim=1) == 1).sum(1) + real[:, 0] > 1).any():
        raise ValueError("documents has padding (-1) between documents, expected on either side only; pack it tightly")
    if (documents.masked_fill(~real, 0).diff(dim=1) < 0)[real[:, 1:] & real[:, :-1]].any():
        raise ValueError("documents must be non-decreasing within a row; sort the documents by id")
