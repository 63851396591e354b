"""The tensors of a case, and how alike neighbouring queries select."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from bench.speed.cases import Case

NEIGHBOURS = 8
"""Adjacent queries whose selections are compared."""

PERIOD = 96
"""Tokens over which correlated inputs drift from one random number to the next."""


class Tensors(NamedTuple):
    """What attention is given, and the gradient that comes back to its output."""

    q: Float[Tensor, "b hq t d"]
    k: Float[Tensor, "b hk t d"]
    v: Float[Tensor, "b hk t dv"]
    gates: Float[Tensor, "b hq t 3"]
    grad: Float[Tensor, "b hq t dv"]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors to differentiate by: q, k, v and the gates."""
        return self.q, self.k, self.v, self.gates


def tensors(case: Case, tokens: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Leaves of one call: q ``[b, hq, t, d]``, k and v with hk heads, gates in 0 .. 1, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        count = tokens if case.inputs == "random" else tokens // PERIOD + 2
        x = torch.randn(case.batch, heads, count, dim, device=device, dtype=dtype, generator=generator)
        return x if case.inputs == "random" else _drifting(x, tokens)

    q, k, v = draw(case.heads, case.dim), draw(case.kv_heads, case.dim), draw(case.kv_heads, case.value_dim)
    gates, grad = draw(case.heads, 3).sigmoid(), draw(case.heads, case.value_dim)
    q, k, v, gates = (x.requires_grad_() for x in (q, k, v, gates))
    return Tensors(q, k, v, gates, grad)


def _drifting(x: Tensor, tokens: int) -> Tensor:
    """Between random numbers ``PERIOD`` tokens apart, along a straight line, at a steady variance."""
    place = torch.arange(tokens, device=x.device) / PERIOD
    left, share = place.long(), (place % 1)[:, None].to(x.dtype)
    mixed = torch.lerp(x[:, :, left], x[:, :, left + 1], share)
    return mixed / (share**2 + (1 - share) ** 2).sqrt()


def shared_blocks(indices: Int32[Tensor, "b hk t n"]) -> float:
    """Blocks that all of ``NEIGHBOURS`` adjacent queries selected, on average over full selections.

    >>> shared_blocks(torch.tensor([[[[0, 1]] * 6 + [[0, 2]] * 2]], dtype=torch.int32))
    1.0
    """
    queries = indices.shape[2] // NEIGHBOURS * NEIGHBOURS
    tiles = indices[:, :, :queries].unflatten(2, (-1, NEIGHBOURS)).flatten(0, 2)
    tiles = tiles[(tiles >= 0).flatten(1).all(1)]
    if len(tiles) == 0:
        return float("nan")
    first = tiles[:, 0, :, None, None]
    return (first == tiles[:, None]).any(-1).all(-1).sum(-1).double().mean().item()
