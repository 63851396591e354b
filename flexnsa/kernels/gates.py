"""The branches' outputs times their gates: summed in one pass over them, and taken apart branch by branch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.kernels.launch import Kernel, ceil_div, next_power

MOST = 4
"""Most branches that one pass sums."""

ROWS = 32
"""Rows of a program."""


@triton.jit
def _rows(heads, tokens, ROWS: tl.constexpr):
    """Batch element, head, tokens of this program's rows, and which of them are there. Grid: row tiles of lanes."""
    tiles = tl.cdiv(tokens, ROWS)
    lane = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return lane // heads, lane % heads, token, token < tokens


@triton.jit
def _gate(gate, lse, rows):
    """0 where a query sees nothing, whatever its gate."""
    sees = tl.load(lse, mask=rows, other=float("-inf")) != float("-inf")
    return tl.where(sees, tl.load(gate, mask=rows, other=0.0).to(tl.float32), 0.0), sees


@triton.jit
def _weighed(
    out, lse, gate, b, h, t, dim, rows, mask, stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt
):  # fmt: skip
    weight, _ = _gate(gate, lse + b * stride_lb + h * stride_lh + t * stride_lt, rows)
    place = b * stride_ob + h * stride_oh + t * stride_ot
    return weight[:, None] * tl.load(out + place[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@Kernel
@triton.jit
def mix_branches(
    out0, out1, out2, out3, lse0, lse1, lse2, lse3, gates, mixed,
    o0b, o0h, o0t, o1b, o1h, o1t, o2b, o2h, o2t, o3b, o3h, o3t,
    l0b, l0h, l0t, l1b, l1h, l1t, l2b, l2h, l2t, l3b, l3h, l3t,
    stride_gb, stride_gh, stride_gt, stride_gn, stride_mb, stride_mh, stride_mt, heads, tokens,
    N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The sum over N branches of gate times output. Strides of outputs and LSEs by branch."""
    b, h, t, rows = _rows(heads, tokens, ROWS)
    dim = tl.arange(0, D_PAD)
    mask = rows[:, None] & (dim < D)[None, :]
    gate = gates + b * stride_gb + h * stride_gh + t * stride_gt
    total = _weighed(out0, lse0, gate, b, h, t, dim, rows, mask, o0b, o0h, o0t, l0b, l0h, l0t)
    if N > 1:
        total += _weighed(out1, lse1, gate + stride_gn, b, h, t, dim, rows, mask, o1b, o1h, o1t, l1b, l1h, l1t)
    if N > 2:
        total += _weighed(out2, lse2, gate + 2 * stride_gn, b, h, t, dim, rows, mask, o2b, o2h, o2t, l2b, l2h, l2t)
    if N > 3:
        total += _weighed(out3, lse3, gate + 3 * stride_gn, b, h, t, dim, rows, mask, o3b, o3h, o3t, l3b, l3h, l3t)
    place = b * stride_mb + h * stride_mh + t * stride_mt
    tl.store(mixed + place[:, None] + dim[None, :], total.to(mixed.dtype.element_ty), mask=mask)


@Kernel
@triton.jit
def weigh_gradient(
    out, lse, gate, d_mixed, d_out, d_gate, stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt,
    stride_gb, stride_gh, stride_gt, stride_mb, stride_mh, stride_mt, stride_db, stride_dh, stride_dt, heads, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Gradients of one branch's output, and of its gate ``[b, h, t]``, contiguous."""
    b, h, t, rows = _rows(heads, tokens, ROWS)
    dim = tl.arange(0, D_PAD)
    mask = rows[:, None] & (dim < D)[None, :]
    weight, sees = _gate(
        gate + b * stride_gb + h * stride_gh + t * stride_gt, lse + b * stride_lb + h * stride_lh + t * stride_lt, rows
    )
    place = b * stride_mb + h * stride_mh + t * stride_mt
    grad = tl.load(d_mixed + place[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    place = b * stride_ob + h * stride_oh + t * stride_ot
    value = tl.load(out + place[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    place = b * stride_db + h * stride_dh + t * stride_dt
    tl.store(d_out + place[:, None] + dim[None, :], (weight[:, None] * grad).to(d_out.dtype.element_ty), mask=mask)
    of_gate = tl.where(sees, tl.sum(value * grad, axis=1), 0.0)
    tl.store(d_gate + (b * heads + h) * tokens + t, of_gate.to(d_gate.dtype.element_ty), mask=rows)


def mix(gates: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """``sum over c of gates[..., c] * outs[c]``, ``[b, h, t, dv]``, ``MOST`` branches in one pass.

    Gates ``[b, h, t, branches]`` of any strides; outputs ``[b, h, t, dv]`` with a last axis that is contiguous.
    """
    if len(outs) > MOST:
        parts = (slice(0, MOST), slice(MOST, None))
        first, rest = (mix(gates[..., part], outs[part], lses[part]) for part in parts)
        return first + rest
    b, h, t, d = outs[0].shape
    mixed = outs[0].new_empty(b, t, h, d).transpose(1, 2)  # so that a projection finds a token's heads side by side
    spare = MOST - len(outs)
    outs, lses = [*outs, *[outs[0]] * spare], [*lses, *[lses[0]] * spare]
    strides = [stride for out in outs for stride in out.stride()[:3]] + [s for lse in lses for s in lse.stride()]
    with torch.cuda.device_of(mixed):
        mix_branches[(b * h * ceil_div(t, ROWS),)](
            *outs, *lses, gates, mixed, *strides, *gates.stride(), *mixed.stride()[:3], h, t,
            N=MOST - spare, D=d, ROWS=ROWS, D_PAD=next_power(d), num_warps=4,
        )  # fmt: skip
    return mixed


def weigh(d_mixed: Tensor, gate: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a branch's gate ``[b, h, t]`` and output ``[b, h, t, dv]``, from that of what ``mix`` returned."""
    b, h, t, d = out.shape
    d_out, d_gate = torch.empty_like(out), torch.empty(b, h, t, dtype=gate.dtype, device=gate.device)
    strides = (*out.stride()[:3], *lse.stride(), *gate.stride(), *d_mixed.stride()[:3], *d_out.stride()[:3])
    with torch.cuda.device_of(d_out):
        weigh_gradient[(b * h * ceil_div(t, ROWS),)](
            out, lse, gate, d_mixed, d_out, d_gate, *strides, h, t,
            D=d, ROWS=ROWS, D_PAD=next_power(d), num_warps=4,
        )  # fmt: skip
    return d_gate, d_out
