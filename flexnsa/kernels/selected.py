"""Selected attention as an opaque operator: compiles without a graph break, has a gradient, and counts its FLOPs."""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flexnsa.kernels.blocks import locate_blocks
from flexnsa.kernels.selected_backward import differentiate
from flexnsa.kernels.selected_forward import attend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    indices: Int32[Tensor, "b hk tq n"],
    position: Int[Tensor, "#b tq"],
    start: Int[Tensor, "#b tq"],
    *,
    select_block: int,
    scale: float,
) -> tuple[Float[Tensor, "b hq tq dv"], Float[Tensor, "b hq tq"]]:
    """Attention of each query to the tokens of its selected blocks, up to itself.

    Query t sees key j iff ``start[t] <= j <= position[t]`` and ``(j - start[t]) // select_block`` is in its list.

    Args:
        q: queries ``[b, hq, tq, d]``, float16, bfloat16 or float32, of any strides like k and v.
        k: keys ``[b, hk, tk, d]``; ``hq`` is a multiple of ``hk``.
        v: values ``[b, hk, tk, dv]``.
        indices: int32 ``[b, hk, tq, n]``, block ids local to the query's document, ascending, left-packed, padded
            with -1. What points outside of the visible keys is skipped; nothing outside of k and v is ever read.
        position: int64 ``[b, tq]`` or ``[1, tq]``, the last key that each query may see, non-decreasing, -1 for
            padding. That is the query's own position where attention is causal; a prefix that all see makes it larger.
        start: int64 ``[b, tq]`` or ``[1, tq]``, first token of the query's document, non-decreasing.
        select_block: tokens of a block.
        scale: softmax scale.

    Returns:
        ``(out, lse)``: ``[b, hq, tq, dv]`` in q's dtype and float32 ``[b, hq, tq]``, natural log. 0 and -inf where a
        query sees nothing. Both are differentiable, with respect to q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit one another.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, indices, position, start, select_block)
    out, lse = _selected_attention(q, k, v, indices, position, start, select_block, scale)
    return out, lse


def _check(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, position: Tensor, start: Tensor, select_block: int
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
    for name, x in (("position", position), ("start", start)):
        if x.dtype != torch.int64 or x.shape not in ((b, tq), (1, tq)):
            raise ValueError(f"{name} must be int64 [{b}, {tq}] or [1, {tq}], got {x.dtype} {tuple(x.shape)}")
    if len({x.device for x in (q, k, v, indices, position, start)}) > 1:
        raise ValueError("q, k, v, indices, position, start must be on one device; move them with .to()")
    if select_block < 1:
        raise ValueError(f"select_block must be at least 1, got {select_block}")


def _computable(x: Tensor) -> Tensor:
    """``x``, widened on a CPU: Triton's interpreter multiplies bfloat16 matrices as integers."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


@torch.library.custom_op("flexnsa::selected_attention", mutates_args=())
def _selected_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, position: Tensor, start: Tensor, select_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0 or indices.shape[-1] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        return out, q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    blocks = locate_blocks(indices, position, start, k.shape[2], select_block)
    out, lse = attend(_computable(q), _computable(k), _computable(v), blocks, select_block, scale)
    return out.to(q.dtype), lse


@_selected_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, position: Tensor, start: Tensor, select_block: int, scale: float
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
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0 or indices.shape[-1] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    blocks = locate_blocks(indices, position, start, k.shape[2], select_block)
    dout, wide_q, wide_k, wide_v, out = (_computable(x) for x in (dout, q, k, v, out.contiguous()))
    rest = (out, lse.contiguous(), blocks, select_block, scale)
    dq, dk, dv = differentiate(dout, dlse, wide_q, wide_k, wide_v, *rest)
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
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.select_block, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, indices, position, start, out, lse = ctx.saved_tensors
    dout = out.new_zeros(out.shape) if dout is None else dout
    dlse = lse.new_zeros(lse.shape) if dlse is None else dlse
    grads = _selected_attention_backward(
        dout, dlse, q, k, v, out, lse, indices, position, start, ctx.select_block, ctx.scale
    )
    return *grads, None, None, None, None, None


_selected_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.flexnsa.selected_attention)
def _flops(q, k, v, indices, position, start, select_block, scale, *, out_shape=None, **_):  # type: ignore[no-untyped-def]
    return 2 * _pairs(q, k, indices, select_block) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.flexnsa.selected_attention_backward)
def _backward_flops(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, out, lse, indices, position, start, select_block, scale, *, out_shape=None, **_
):
    return 2 * _pairs(q, k, indices, select_block) * (3 * q[-1] + 2 * v[-1])


def _pairs(q: torch.Size, k: torch.Size, indices: torch.Size, select_block: int) -> int:
    """Query-key pairs if every list were full: values are not known where FLOPs are counted."""
    b, hq, tq, _ = q
    return b * hq * tq * min(indices[-1] * select_block, k[2])
