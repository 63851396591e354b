"""The gates that mix the branches (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexnsa.compiled import call_compiled
from flexnsa.engines import TRITON_INSTALLED
from flexnsa.types import AttentionOutput

FUSED_NUMBERS = 2**22
"""Numbers of an output from which on an eager call on CUDA mixes the branches in one compiled pass over memory."""


class Deferred(NamedTuple):
    """A branch whose output is not kept: it is computed when it is mixed in, and once more in the backward.

    Attributes:
        attend: computes the output.
    """

    attend: Callable[[], AttentionOutput]


def check_recompute(recompute: Collection[str], branches: Sequence[str]) -> None:
    """The branches to compute again are the last ones: no other reads an output that is not kept.

    Raises:
        ValueError: they are not.
    """
    if set(recompute) != set(branches[len(branches) - len(recompute) :]):
        raise ValueError(
            f"recompute must name the last of the branches {tuple(branches)}, one or more of them, got "
            f"{tuple(recompute)}; name every branch after the first recomputed one"
        )


def combine(
    gates: Float[Tensor, "b hq tq branches"], outputs: Sequence[AttentionOutput | Deferred]
) -> Float[Tensor, "b hq tq dv"]:
    """``sum over branches c of g_c * out_c``, in the order of ``outputs``, the deferred ones last.

    A branch in which a query sees nothing adds 0 whatever its gate, so that a padding query outputs 0 though its gate
    may be NaN.

    >>> ones, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> outputs = [AttentionOutput(ones, lse), AttentionOutput(2 * ones, lse)]
    >>> combine(torch.tensor([0.25, 0.5]).reshape(1, 1, 1, 2), outputs)
    tensor([[[[1.2500, 1.2500]]]])
    """
    if not torch.is_grad_enabled():
        outputs = [output.attend() if isinstance(output, Deferred) else output for output in outputs]
    kept = [output for output in outputs if isinstance(output, AttentionOutput)]
    if len(kept) == len(outputs):
        return _gated(gates, kept)
    # Summed outside of the checkpoints, which keep what they are given.
    parts = [_gated(gates[..., : len(kept)], kept)] if kept else []
    for gate, output in zip(gates.split(1, dim=-1), outputs, strict=True):
        if isinstance(output, Deferred):
            attend = output.attend
            parts.append(checkpoint(_attend_gated, gate, attend, use_reentrant=False, preserve_rng_state=False))
    return sum(parts[1:], start=parts[0])


def _attend_gated(gate: Tensor, attend: Callable[[], AttentionOutput]) -> Tensor:
    return _gated(gate, [attend()])


def _gated(gates: Tensor, outputs: Sequence[AttentionOutput]) -> Tensor:
    outs, lses = zip(*outputs, strict=True)
    fused = TRITON_INSTALLED and outs[0].device.type == "cuda" and not torch.compiler.is_compiling()
    if fused and outs[0].numel() >= FUSED_NUMBERS:
        mixed: Tensor = call_compiled(_mix, gates, outs, lses)
        return mixed
    return _mix(gates, outs, lses)


def _mix(gates: Tensor, outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> Tensor:
    first, *others = (
        gate.masked_fill(lse == -torch.inf, 0).unsqueeze(-1) * out
        for gate, out, lse in zip(gates.unbind(-1), outs, lses, strict=True)
    )
    return sum(others, start=first)


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
