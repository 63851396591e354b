"""The values that pass between the stages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

KV = tuple[Float[Tensor, "b hk tk d"], Float[Tensor, "b hk tk dv"]]
"""A key tensor [b, hk, tk, d] and a value tensor [b, hk, tk, dv]."""


class AttentionOutput(NamedTuple):
    """What one branch returns.

    Attributes:
        out: ``[b, hq, tq, dv]``, 0 where the query sees nothing.
        lse: ``[b, hq, tq]``, natural log of the sum of exponentials, -inf where the query sees nothing.
            float32, or float64 for float64 inputs. Differentiable.
    """

    out: Float[Tensor, "b hq tq dv"]
    lse: Float[Tensor, "b hq tq"]


class Selection(NamedTuple):
    """The blocks that each query of a KV group attends to (paper, Eq. 11).

    Attributes:
        indices: int32 ``[b, hk, tq, n]``, block ids local to the query's document, ascending, left-packed, padded
            with -1.
    """

    indices: Int32[Tensor, "b hk tq n"]


class BranchKV(NamedTuple):
    """Keys and values of the three branches: each has projections of its own (paper, section 3.3.3).

    Attributes:
        compressed: ``(k, v)`` of raw tokens, or of compressed tokens where no compressor is given.
        selected: ``(k, v)``, each ``[b, hk, tk, d]`` or ``[b, hk, tk, dv]``.
        window: ``(k, v)``, likewise.
    """

    compressed: KV
    selected: KV
    window: KV

    @classmethod
    def shared(cls, k: Float[Tensor, "b hk tk d"], v: Float[Tensor, "b hk tk dv"]) -> BranchKV:
        """One pair for all three branches."""
        return cls(compressed=(k, v), selected=(k, v), window=(k, v))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which scores, importance and LSE are computed: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
