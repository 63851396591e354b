"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), pairing element i with element i + d/2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexnsa.engines import kernel_runs
from flexnsa.kept import kept
from flexnsa.types import accumulator

Turns = tuple[Float[Tensor, "#b 1 t half"], Float[Tensor, "#b 1 t half"]]
"""Cosine and sine of the angles by which each position's pairs are turned."""

Rotate = Callable[[Float[Tensor, "b h t d"]], Float[Tensor, "b h t d"]]
"""Rotates queries or keys of some tokens."""


def rotation(positions: Int64[Tensor, "#b t"] | range, dim: int, theta: float, like: Tensor) -> Rotate:
    """What rotates queries or keys ``[b, h, t, dim]`` that stand at ``positions``, one for each token.

    Eager calls on CUDA run one kernel, whose results and gradients are those of plain torch, to the last bit but for
    what cosine and sine differ in.

    Args:
        positions: int64 ``[b, t]`` or ``[1, t]``, or a range.
        dim: key dim d.
        theta: the base.
        like: of the device, and as exact, as what will be rotated.
    """
    if kernel_runs(like):
        frequency = _kept_frequency(dim, theta, like.device)
        return lambda x: _turned_by_kernel(x, positions, frequency)
    by = turns(tabulated(positions, like.device), dim, theta, accumulator(like))
    return lambda x: turned(x, by)


def steps(count: int, first: int, step: int, device: torch.device) -> Tensor | range:
    """``count`` positions from ``first`` on: a range, which the host knows; traced, ``[1, count]``, for all lengths."""
    if torch.compiler.is_compiling():
        return torch.arange(count, device=device)[None] * step + first
    return range(first, first + count * step, step)


def tabulated(positions: Int64[Tensor, "#b t"] | range, device: torch.device) -> Int64[Tensor, "#b t"]:
    """Positions as a tensor."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(positions.start, positions.stop, positions.step, device=device)[None]


def turns(positions: Int64[Tensor, "#b t"], dim: int, theta: float, dtype: torch.dtype) -> Turns:
    """Of pair i at each position: ``position * theta ** (-2 i / dim)`` radians, in ``dtype``."""
    angle = positions[:, None, :, None] * _frequency(dim, theta, positions.device, dtype)
    return angle.cos(), angle.sin()


def turned(x: Float[Tensor, "b h t d"], by: Turns) -> Float[Tensor, "b h t d"]:
    """``x [b, h, t, d]``, computed in the dtype of ``by``."""
    (cos, sin), half = by, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _frequency(dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    half = dim // 2
    return theta ** (-torch.arange(half, device=device, dtype=dtype) / half)


@kept(64)
def _kept_frequency(dim: int, theta: float, device: torch.device) -> Tensor:
    return _frequency(dim, theta, device, torch.float32)


def _turned_by_kernel(x: Tensor, positions: Tensor | range, frequency: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        turned: Tensor = _Turned.apply(x, positions, frequency, False)
        return turned
    return _turn(x, positions, frequency, False)


def _turn(x: Tensor, positions: Tensor | range, frequency: Tensor, back: bool) -> Tensor:
    from flexnsa.kernels.rotary import turn  # imports triton

    return turn(x if x.stride(-1) == 1 else x.contiguous(), positions, frequency, back=back)


class _Turned(torch.autograd.Function):
    """A rotation, whose gradient is one back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor | range, frequency: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(frequency, *([positions] if isinstance(positions, Tensor) else []))
        ctx.positions, ctx.back = None if isinstance(positions, Tensor) else positions, back
        return _turn(x, positions, frequency, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        frequency, *table = ctx.saved_tensors
        return _Turned.apply(grad, *(table or [ctx.positions]), frequency, not ctx.back), None, None, None
