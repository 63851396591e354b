"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), pairing element i with element i + d/2."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Turns = tuple[Float[Tensor, "#b 1 t half"], Float[Tensor, "#b 1 t half"]]
"""Cosine and sine of the angles by which each position's pairs are turned."""


def turns(positions: Int64[Tensor, "#b t"], dim: int, theta: float, dtype: torch.dtype) -> Turns:
    """Of pair i at each position: ``position * theta ** (-2 i / dim)`` radians, in ``dtype``."""
    half = dim // 2
    frequency = theta ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    angle = positions[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def turned(x: Float[Tensor, "b h t d"], by: Turns) -> Float[Tensor, "b h t d"]:
    """``x [b, h, t, d]``, computed in the dtype of ``by``."""
    (cos, sin), half = by, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
