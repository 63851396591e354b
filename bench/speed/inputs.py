"""The tensors of a case, and how alike neighbouring queries select."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from bench.speed.cases import Case
from flexnsa import documents_from_lengths

NEIGHBOURS = 8
"""Adjacent queries whose selections are compared."""

PERIOD = 96
"""Tokens over which correlated inputs drift from one random number to the next.

At the paper's geometry 8 neighbours then share 14.3 of 16 blocks on average over 65,536 tokens; more over fewer.
"""

MIXED = 64
"""How many times longer than the shortest document of a packed row the longest is."""


class Tensors(NamedTuple):
    """What attention is given, and the gradient that comes back to its output; ``documents`` where rows are packed."""

    q: Float[Tensor, "b hq t d"]
    k: Float[Tensor, "b hk t d"]
    v: Float[Tensor, "b hk t dv"]
    gates: Float[Tensor, "b hq t 3"]
    grad: Float[Tensor, "b hq t dv"]
    documents: Int64[Tensor, "b t"] | None = None

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
    if case.documents == 1:
        return Tensors(q, k, v, gates, grad)
    ids = documents_from_lengths([mixed_lengths(case.documents, tokens)] * case.batch, tokens)
    return Tensors(q, k, v, gates, grad, ids.to(device))


def mixed_lengths(documents: int, tokens: int) -> list[int]:
    """Lengths that fill ``tokens``, each the same factor longer than the one before, long and short ones in turn.

    >>> mixed_lengths(4, 1000)
    [11, 188, 47, 754]
    """
    shares = [MIXED ** (i / max(1, documents - 1)) for i in range(documents)]
    lengths = [max(1, int(tokens * share / sum(shares))) for share in shares]
    lengths[-1] += tokens - sum(lengths)
    half = (documents + 1) // 2
    return [lengths[i // 2 + (i % 2) * half] for i in range(documents)]


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
