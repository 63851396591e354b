"""The gates that mix the branches (paper, Eq. 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flexnsa.engines import COMPILATIONS, TRITON_INSTALLED
from flexnsa.types import AttentionOutput

FUSED_NUMBERS = 2**22
"""Numbers of an output from which on an eager call on CUDA mixes the branches in one compiled pass over memory."""


def combine(
    gates: Float[Tensor, "b hq tq branches"], outputs: Sequence[AttentionOutput]
) -> Float[Tensor, "b hq tq dv"]:
    """``sum over branches c of g_c * out_c``, in the order of ``outputs``.

    A branch in which a query sees nothing adds 0 whatever its gate, so that a padding query outputs 0 though its gate
    may be NaN.

    >>> ones, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> outputs = [AttentionOutput(ones, lse), AttentionOutput(2 * ones, lse)]
    >>> combine(torch.tensor([0.25, 0.5]).reshape(1, 1, 1, 2), outputs)
    tensor([[[[1.2500, 1.2500]]]])
    """
    outs, lses = zip(*outputs, strict=True)
    fused = TRITON_INSTALLED and outs[0].device.type == "cuda" and not torch.compiler.is_compiling()
    if fused and outs[0].numel() >= FUSED_NUMBERS:
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            return _fused_mix()(gates, outs, lses)
    return _mix(gates, outs, lses)


def _mix(gates: Tensor, outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> Tensor:
    first, *others = (
        gate.masked_fill(lse == -torch.inf, 0).unsqueeze(-1) * out
        for gate, out, lse in zip(gates.unbind(-1), outs, lses, strict=True)
    )
    return sum(others, start=first)


@functools.cache
def _fused_mix() -> Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]:
    # At the first call, not on import: torch.compile loads triton and takes a second.
    return torch.compile(_mix, dynamic=True, fullgraph=True)


class SigmoidGate(nn.Module):
    """A gate for each query head, token and branch: the sigmoid of a linear function of the layer's input.

    Args:
        dim: width of the layer's input.
        num_heads: query heads.
        num_branches: branches to mix.
    """

    def __init__(self, dim: int, num_heads: int, num_branches: int = 3):
        super().__init__()
        self.num_branches = num_branches
        self.proj = nn.Linear(dim, num_heads * num_branches)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b hq t branches"]:
        """Gate values in 0 .. 1, ``[b, hq, t, branches]``, for ``x [b, t, dim]``."""
        return rearrange(self.proj(x), "b t (h branches) -> b h t branches", branches=self.num_branches).sigmoid()
