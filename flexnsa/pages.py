"""Keys and values in pages, as serving engines keep them, and what must hold of them.

A page holds some tokens of one sequence at a place of the engine's choosing; a block table names the physical page of
each logical one. Pages of raw tokens hold a multiple of ``select_block`` tokens. Compressed tokens lie by where they
**end**: slot j of a sequence is for the one whose block ends with token ``(j + 1) * stride - 1``, which is compressed
token ``j - l // stride + 1``. So what a full page holds depends on no later token, and sequences with a common prefix
share its compressed pages as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexnsa import checks
from flexnsa.config import NSAConfig
from flexnsa.types import KV, BranchKV


class Pages(NamedTuple):
    """One branch's keys and values.

    Attributes:
        k: ``[pages, hk, page, d]``, of any strides; ``page`` is the branch's own.
        v: ``[pages, hk, page, dv]``, likewise.
        table: int32 or int64 ``[b, m]``, physical page of each logical page of each sequence, -1 where unmapped.
    """

    k: Float[Tensor, "pages hk page d"]
    v: Float[Tensor, "pages hk page dv"]
    table: Int[Tensor, "b m"]


class PagedKV(NamedTuple):
    """Keys and values of the three branches in pages; branches may share pages, tables, or both.

    Attributes:
        compressed: compressed tokens, ``select_block // compress_stride`` to a page or a multiple of it. Multiples of
            64 are read fastest.
        selected: raw tokens, ``select_block`` to a page or a multiple of it.
        window: raw tokens, likewise.
    """

    compressed: Pages
    selected: Pages
    window: Pages

    def capacity(self, config: NSAConfig) -> int:
        """Tokens of one sequence that all three block tables can name."""
        strides = (config.compress_stride, 1, 1)
        return min(part.table.shape[1] * part.k.shape[2] * x for part, x in zip(self, strides, strict=True))


class Entries(NamedTuple):
    """Keys and values on their way into pages.

    Attributes:
        k: ``[b, hk, n, d]``.
        v: ``[b, hk, n, dv]``.
        slots: int64 ``[b, n]``, place of each in its sequence, -1 for what is not written.
    """

    k: Tensor
    v: Tensor
    slots: Int64[Tensor, "b n"]


def check_step(q: Tensor, gates: Tensor, pages: PagedKV, lengths: Tensor, config: NSAConfig) -> None:
    """Queries, gates, pages and lengths fit one another; every page that the step may read is mapped."""
    checks.check_tensor("q", q, "b hq tq d")
    checks.check_not_empty("q", q, "b hq tq d")
    if q.shape[2] != 1:
        raise ValueError(f"q must hold one query a sequence, tq = 1, got tq={q.shape[2]}; call once for each token")
    checks.check_gates(gates, q, branches=3)
    _check_pages(pages, q, "q", q.shape[0], config)
    heads, dim = pages.selected.k.shape[1], pages.selected.k.shape[3]
    if q.shape[1] % heads:
        raise ValueError(f"q's heads must be a multiple of the pages' {heads} KV heads, got {q.shape[1]}")
    if dim != q.shape[3]:
        raise ValueError(f"pages must hold keys of q's dim {q.shape[3]}, got {dim}; project both to one size")
    _check_lengths("lengths", lengths, q)
    if checks.values_are_checked(lengths):
        _check_length_values("lengths", lengths, pages.capacity(config))
        for name, first, last in _slots_read(lengths, config):
            _check_mapped(name, getattr(pages, name), first, last)


def check_out(out: Tensor, q: Tensor, pages: PagedKV) -> None:
    """The output's place fits."""
    checks.check_tensor("out", out, "b hq tq dv")
    expected = (*q.shape[:3], pages.selected.v.shape[-1])
    if out.shape != expected:
        raise ValueError(f"out must be [b, hq, 1, dv] = {expected}, got {tuple(out.shape)}")
    checks.check_like("out", out, "q", q)


def check_append(
    kv: BranchKV,
    pages: PagedKV,
    lengths: Tensor,
    config: NSAConfig,
    counts: Tensor | None,
    raw: bool,
    recent: KV | None,
) -> None:
    """New tokens, pages, ring and lengths fit one another; every page that is written is mapped."""
    if not isinstance(kv, BranchKV):
        raise TypeError(f"kv must be a BranchKV, got {type(kv).__name__}; BranchKV.shared(k, v) makes one of one pair")
    for name, (k, v) in kv._asdict().items():
        checks.check_tensor(f"kv.{name}[0]", k, "b hk t d")
        checks.check_tensor(f"kv.{name}[1]", v, "b hk t dv")
    k, v = kv.selected
    checks.check_not_empty("kv.selected[0]", k, "b hk t d")
    _check_pages(pages, k, "kv.selected[0]", k.shape[0], config)
    for name, pair in kv._asdict().items():
        for i, x in enumerate(pair):
            checks.check_like(f"kv.{name}[{i}]", x, "kv.selected[0]", k)
            page = getattr(pages, name)[i]
            expected = (k.shape[0], page.shape[1], k.shape[2], page.shape[3])
            if x.shape != expected:
                raise ValueError(f"kv.{name}[{i}] must be [b, hk, t, dim] = {expected}, got {tuple(x.shape)}")
    _check_recent(kv, recent, raw, config)
    _check_lengths("lengths", lengths, k)
    if counts is not None:
        _check_lengths("counts", counts, k)
    if checks.values_are_checked(lengths):
        _check_length_values("lengths", lengths, pages.capacity(config))
        new = k.shape[2] if counts is None else counts.long()
        if counts is not None:
            _check_length_values("counts", counts, k.shape[2])
        first, last = (lengths.long() - new).clamp(min=0), lengths.long()
        for name in ("selected", "window"):
            _check_mapped(name, getattr(pages, name), first, last)
        over = config.compress_block // config.compress_stride - 1
        first, last = first // config.compress_stride, last // config.compress_stride
        _check_mapped("compressed", pages.compressed, first.clamp(min=over), last)


def _check_recent(kv: BranchKV, recent: KV | None, raw: bool, config: NSAConfig) -> None:
    if raw != (recent is not None):
        given, missing = ("compressor", "recent") if raw else ("recent", "compressor")
        raise ValueError(f"{given} is given without {missing}; pass both, or neither and compressed tokens in kv")
    for i, (x, ring) in enumerate(zip(kv.compressed, recent or (), strict=False)):
        checks.check_tensor(f"recent[{i}]", ring, "b hk l d")
        expected = (*x.shape[:2], config.compress_block, x.shape[3])
        if ring.shape != expected:
            raise ValueError(
                f"recent[{i}] must be [b, hk, compress_block, dim] = {expected}, got {tuple(ring.shape)}; it holds the "
                f"last compress_block raw tokens"
            )
        checks.check_like(f"recent[{i}]", ring, f"kv.compressed[{i}]", x)


def _check_pages(pages: PagedKV, like: Tensor, like_name: str, batch: int, config: NSAConfig) -> None:
    if not isinstance(pages, PagedKV):
        raise TypeError(f"pages must be a PagedKV, got {type(pages).__name__}; PagedKV(compressed, selected, window)")
    for name, part in pages._asdict().items():
        for x, field, axes in ((part.k, "k", "pages hk page d"), (part.v, "v", "pages hk page dv")):
            checks.check_tensor(f"pages.{name}.{field}", x, axes)
            checks.check_not_empty(f"pages.{name}.{field}", x, axes)
            checks.check_like(f"pages.{name}.{field}", x, like_name, like)
        if part.v.shape[:3] != part.k.shape[:3]:
            raise ValueError(f"pages.{name}.v must have k's [pages, hk, page], {tuple(part.k.shape[:3])}, got "
                             f"{tuple(part.v.shape[:3])}; every key needs one value")  # fmt: skip
        _check_table(f"pages.{name}.table", part.table, batch, like)
        unit = config.select_block // (config.compress_stride if name == "compressed" else 1)
        if part.k.shape[2] % unit:
            raise ValueError(
                f"pages.{name} must hold a multiple of {unit} tokens a page, those of a selection block, got "
                f"{part.k.shape[2]}"
            )
        expected = (pages.selected.k.shape[1], pages.selected.k.shape[3])
        if (part.k.shape[1], part.k.shape[3]) != expected:
            raise ValueError(
                f"pages.{name}.k must have [hk, d] = {expected} as pages.selected.k has, got "
                f"{(part.k.shape[1], part.k.shape[3])}; the branches' heads and dims agree"
            )
    checks.check_value_dims({name: part.v.shape[3] for name, part in pages._asdict().items()})


def _check_table(name: str, table: Tensor, batch: int, like: Tensor) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor [b, m], got {type(table).__name__}; use torch.tensor")
    if table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {table.dtype}; convert it with .int()")
    if table.ndim != 2 or table.shape[0] != batch or table.shape[1] == 0:
        raise ValueError(f"{name} must be [b, m] with b={batch} and m > 0, got {tuple(table.shape)}; pad it with -1")
    if table.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {table.device}; move it with .to()")


def _check_lengths(name: str, lengths: Tensor, like: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a tensor [b], got {type(lengths).__name__}; use torch.tensor")
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must be int32 or int64 [b] = {tuple(like.shape[:1])}, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if lengths.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {lengths.device}; move it with .to()")


def _check_length_values(name: str, lengths: Tensor, most: int) -> None:
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > most:
        remedy = "pass t tokens at most" if name == "counts" else "the block tables name no more tokens, widen them"
        raise ValueError(f"{name} must lie in 0 .. {most}, got {low} .. {high}; {remedy}")


def _slots_read(lengths: Tensor, config: NSAConfig) -> list[tuple[str, Tensor, Tensor]]:
    """First slot and one past the last that a step may read, by branch."""
    tokens = lengths.long()
    over = config.compress_block // config.compress_stride - 1
    return [
        ("compressed", torch.full_like(tokens, over), tokens // config.compress_stride),
        ("selected", torch.zeros_like(tokens), tokens),
        ("window", (tokens - config.window).clamp(min=0), tokens),
    ]


def _check_mapped(name: str, part: Pages, first: Tensor, last: Tensor) -> None:
    """Every page that holds one of the slots ``first .. last - 1`` of its sequence is mapped."""
    size, page = part.k.shape[2], torch.arange(part.table.shape[1], device=part.table.device)
    needed = (page >= (first // size)[:, None]) & (page * size < last[:, None]) & (first < last)[:, None]
    wrong = needed & ((part.table < 0) | (part.table >= part.k.shape[0]))
    if wrong.any():
        row, at = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"pages.{name}.table must map logical page {at} of sequence {row} to one of the {part.k.shape[0]} physical "
            f"pages, got {int(part.table[row, at])}; allocate a page before the step that needs it"
        )
