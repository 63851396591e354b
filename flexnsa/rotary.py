"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), pairing element i with element i + d/2."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexnsa.types import accumulator


def rotate(x: Float[Tensor, "b h t d"], positions: Int64[Tensor, "b t"], theta: float) -> Float[Tensor, "b h t d"]:
    """``x [b, h, t, d]`` turned by its positions: pair i by ``position * theta ** (-2 i / d)`` radians.

    Angles are computed in float32, or float64 for float64 inputs. ``positions`` is ``[b|1, t]``.
    """
    half = x.shape[-1] // 2
    dtype = accumulator(x)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions[:, None, :, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
