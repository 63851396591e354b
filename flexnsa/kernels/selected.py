"""Selected attention as an opaque operator: compiles without a graph break, has a gradient, and counts its FLOPs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flexnsa.kernels.blocks import locate_blocks
from flexnsa.kernels.launch import computable, is_watched
from flexnsa.kernels.selected_backward import differentiate
from flexnsa.kernels.selected_dq import Gradients
from flexnsa.kernels.selected_forward import attend
from flexnsa.kernels.spans import lane_groups

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    indices: Int32[Tensor, "b hk tq n"],
    position: Int[Tensor, "#b tq"],
    start: Int[Tensor, "#b #tq"],
    *,
    select_block: int,
    scale: float,
    low: Int[Tensor, "#b tq"] | None = None,
) -> tuple[Float[Tensor, "b hq tq dv"], Float[Tensor, "b hq tq"]]:
    """Attention of each query to the tokens of its selected blocks, up to itself.

    Query t sees key j iff ``low[t] <= j <= position[t]`` and ``(j - start[t]) // select_block`` is in its list.

    Args:
        q: queries ``[b, hq, tq, d]``, float16, bfloat16 or float32, of any strides like k and v.
        k: keys ``[b, hk, tk, d]``; ``hq`` is a multiple of ``hk``.
        v: values ``[b, hk, tk, dv]``.
        indices: int32 ``[b, hk, tq, n]``, block ids local to the query's document, ascending, left-packed, padded
            with -1. What points outside of the visible keys is skipped; nothing outside of k and v is ever read.
        position: int64 ``[b, tq]`` or ``[1, tq]``, the last key that each query may see, -1 for padding. That is the
            query's own position where attention is causal; a prefix that all see makes it larger. Non-decreasing,
            unless ``low`` is given.
        start: int64 ``[b, tq]`` or ``[1, tq]``, first token of the query's document, non-decreasing; or ``[b, 1]`` or
            ``[1, 1]`` where a row is one document, which spares work.
        select_block: tokens of a block.
        scale: softmax scale.
        low: int64 ``[b, tq]`` or ``[1, tq]``, the first key that each query may see, not before ``start``; None for
            ``start``.

    Returns:
        ``(out, lse)``: ``[b, hq, tq, dv]`` in q's dtype and float32 ``[b, hq, tq]``, natural log. 0 and -inf where a
        query sees nothing. Both are differentiable, with respect to q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit one another.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, indices, position, start, low, select_block)
    run = _selected_attention if is_watched(q, k, v) else _attend
    out, lse = run(q, k, v, indices, position, start, select_block, scale, low)
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    low: Tensor | None,
    select_block: int,
) -> None:
    (b, hq, tq, d), (hk, tk) = q.shape, k.shape[1:3]
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share one dtype of float16, bfloat16, float32, got {q.dtype}, {k.dtype}, {v.dtype}; "
            f"convert them with .to()"
        )
    if k.shape != (b, hk, tk, d) or v.shape[:3] != (b, hk, tk) or hk == 0 or hq % hk:
        raise ValueError(
            f"q, k, v must be [b, hq, tq, d], [b, hk, tk, d], [b, hk, tk, dv] with hq a multiple of hk, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if indices.dtype != torch.int32 or indices.shape[:3] != (b, hk, tq):
        raise ValueError(f"indices must be int32 [{b}, {hk}, {tq}, n], got {indices.dtype} {tuple(indices.shape)}")
    for name, x in (("position", position), ("low", position if low is None else low)):
        if x.dtype != torch.int64 or x.shape not in ((b, tq), (1, tq)):
            raise ValueError(f"{name} must be int64 [{b}, {tq}] or [1, {tq}], got {x.dtype} {tuple(x.shape)}")
    if start.dtype != torch.int64 or start.shape not in ((b, tq), (1, tq), (b, 1), (1, 1)):
        raise ValueError(
            f"start must be int64 [{b}, {tq}], [1, {tq}], [{b}, 1] or [1, 1], got {start.dtype} {tuple(start.shape)}"
        )
    if len({x.device for x in (q, k, v, indices, position, start, low) if x is not None}) > 1:
        raise ValueError("q, k, v, indices, position, start, low must be on one device; move them with .to()")
    if select_block < 1:
        raise ValueError(f"select_block must be at least 1, got {select_block}")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    select_block: int,
    scale: float,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0 or indices.shape[-1] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        return out, q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    wide, wide_k, wide_v = (computable(x) for x in (q, k, v))
    out, lse = wide.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if scale < 0:
        wide, scale = -wide, -scale
    with torch.cuda.device_of(q):
        for of in _lane_groups(k, indices, 4):
            where = of.rows(position), of.rows(start), None if low is None else of.rows(low)
            attend(of(wide), of(wide_k), of(wide_v), of(indices), *where, of(out), of(lse), select_block, scale)
    return out.to(q.dtype), lse


_selected_attention = torch.library.custom_op("flexnsa::selected_attention", _attend, mutates_args=())


class _Lanes(NamedTuple):
    """Some batch elements and KV heads: what is worked on at once.

    Attributes:
        batch: the batch elements.
        heads: the KV heads.
        whole: whether these are all.
        num_heads: KV heads in all.
    """

    batch: slice
    heads: slice
    whole: bool
    num_heads: int

    def __call__(self, x: Tensor) -> Tensor:
        """Their part of ``x`` ``[b, hq or hk, ...]``."""
        if self.whole:
            return x
        group = x.shape[1] // self.num_heads
        return x[self.batch, self.heads.start * group : self.heads.stop * group]

    def rows(self, x: Tensor) -> Tensor:
        """Their part of ``x`` ``[b or 1, ...]``."""
        return x if self.whole or x.shape[0] == 1 else x[self.batch]


def _lane_groups(k: Tensor, indices: Tensor, tables: int) -> Iterator[_Lanes]:
    """Lanes of whose queries so many tables as large as ``indices`` can be held at once."""
    batch, heads = k.shape[:2]
    lane_bytes = tables * 4 * indices.shape[2] * indices.shape[3]
    for rows, columns in lane_groups(batch, heads, lane_bytes):
        whole = rows.stop - rows.start >= batch and columns.stop - columns.start >= heads
        yield _Lanes(rows, columns, whole, heads)


@_selected_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    select_block: int,
    scale: float,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flexnsa::selected_attention_backward", mutates_args=())
def _selected_attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    select_block: int,
    scale: float,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0 or indices.shape[-1] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dout, wide_q, wide_k, wide_v, out = (computable(x) for x in (dout, q, k, v, out.contiguous()))
    lse = lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (wide_q, wide_k, wide_v))
    with torch.cuda.device_of(q):
        for of in _lane_groups(k, indices, 2):
            where = of(indices), of.rows(position), of.rows(start)
            below = None if low is None else of.rows(low)
            blocks = locate_blocks(*where, k.shape[2], select_block, ranks=True, low=below)
            given = of(wide_q), of(wide_k), of(wide_v), of(dout), of(dlse), of(out), of(lse)
            differentiate(Gradients(*given, blocks, of(dq), of(dk), of(dv)), select_block, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_selected_attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    position: Tensor,
    start: Tensor,
    select_block: int,
    scale: float,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.select_block, ctx.scale, low = inputs
    ctx.save_for_backward(*tensors, low, *output)


def _backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, indices, position, start, low, out, lse = ctx.saved_tensors
    dout = out.new_zeros(out.shape) if dout is None else dout
    dlse = lse.new_zeros(lse.shape) if dlse is None else dlse
    grads = _selected_attention_backward(
        dout, dlse, q, k, v, out, lse, indices, position, start, ctx.select_block, ctx.scale, low
    )
    return *grads, None, None, None, None, None, None


_selected_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.flexnsa.selected_attention)
def _flops(q, k, v, indices, position, start, select_block, scale, low=None, *, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 2 * _pairs(q, k, indices, select_block) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.flexnsa.selected_attention_backward)
def _backward_flops(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, out, lse, indices, position, start, select_block, scale, low=None, *, out_shape=None, **_
):
    return 2 * _pairs(q, k, indices, select_block) * (3 * q[-1] + 2 * v[-1])


def _pairs(q: torch.Size, k: torch.Size, indices: torch.Size, select_block: int) -> int:
    """Query-key pairs if every list were full: values are not known where FLOPs are counted."""
    b, hq, tq, _ = q
    return b * hq * tq * min(indices[-1] * select_block, k[2])
