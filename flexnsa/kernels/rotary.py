"""The rotary embedding in one pass over memory: cosines and sines are made where they are used."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.launch import Kernel, ceil_div, next_power

TOKENS = 16
"""Tokens of a program."""

HEADS = 8
"""Heads of a program, which share the token's angles."""


@Kernel
@triton.jit(do_not_specialize=["heads", "tokens", "first", "step"])
def turn_pairs(
    x, positions, frequency, out,
    stride_xb, stride_xh, stride_xt, stride_pb, stride_pt, stride_ob, stride_oh, stride_ot,
    heads, tokens, first, step,
    HALF: tl.constexpr, PAD: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Turn element i with element i + HALF. With STEPS token t stands at ``first + step * t``, and no table is read.

    Grid: (token tiles, head tiles, batch).
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    rows, batch = token < tokens, tl.program_id(2).to(tl.int64)
    if STEPS:
        position = first + step * token
    else:
        position = tl.load(positions + batch * stride_pb + token * stride_pt, mask=rows, other=0)
    dim = tl.arange(0, PAD)
    mask = rows[:, None] & (dim < HALF)[None, :]
    angle = position.to(tl.float32)[:, None] * tl.load(frequency + dim, mask=dim < HALF, other=0.0)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    begin = tl.program_id(1) * HEADS
    head = begin.to(tl.int64)
    at = x + batch * stride_xb + head * stride_xh + token[:, None] * stride_xt + dim[None, :]
    to = out + batch * stride_ob + head * stride_oh + token[:, None] * stride_ot + dim[None, :]
    for _ in range(begin, tl.minimum(begin + HEADS, heads)):
        one = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(to, (one * cos - two * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(to + HALF, (two * cos + one * sin).to(out.dtype.element_ty), mask=mask)
        at += stride_xh
        to += stride_oh


def turn(x: Tensor, positions: Tensor | range, frequency: Tensor, *, back: bool = False) -> Tensor:
    """``x [b, h, t, d]``, its last axis contiguous, turned by ``position * frequency``; ``back``, the other way.

    ``positions`` are integers ``[b|1, t]``, or a range that all rows share; ``frequency`` is float32 ``[d / 2]``. The
    products are rounded as plain torch rounds them. Contiguous.
    """
    b, h, t, d = x.shape
    out = torch.empty(b, h, t, d, dtype=x.dtype, device=x.device)
    if isinstance(positions, range):
        table, strides, places = frequency, (0, 0), (positions.start, positions.step)
    else:
        table, places = positions, (0, 0)
        strides = (0 if table.shape[0] == 1 else table.stride(0), table.stride(1))
    with torch.cuda.device_of(out):
        turn_pairs[(ceil_div(t, TOKENS), ceil_div(h, HEADS), b)](
            x, table, frequency, out, *x.stride()[:3], *strides, *out.stride()[:3], h, t, *places,
            HALF=d // 2, PAD=next_power(d // 2), TOKENS=TOKENS, HEADS=HEADS, STEPS=isinstance(positions, range),
            BACK=back, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
