"""The gates that mix the branches (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def combine(
    gates: Float[Tensor, "b hq tq branches"], outputs: Sequence[Float[Tensor, "b hq tq dv"]]
) -> Float[Tensor, "b hq tq dv"]:
    """``sum over branches c of g_c * out_c``, in the order of ``outputs``.

    >>> import torch
    >>> ones = torch.ones(1, 1, 1, 2)
    >>> combine(torch.tensor([0.25, 0.5]).reshape(1, 1, 1, 2), [ones, 2 * ones])
    tensor([[[[1.2500, 1.2500]]]])
    """
    first, *others = (gate.unsqueeze(-1) * out for gate, out in zip(gates.unbind(-1), outputs, strict=True))
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
