"""Masked softmax attention in plain torch, chunked over the queries: on any device, in any dtype, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexnsa import checks
from flexnsa.types import AttentionOutput, accumulator

CHUNK_SCORES = 2**24
"""Scores (batch x query heads x queries x keys) of one chunk: 64 MiB in float32."""

CHUNK_QUERIES = 128
"""Queries of one chunk at most: short chunks skip the keys that all of their queries are too early or too late for."""

RECOMPUTE_SCORES = 2**27
"""Scores of a call from which on the backward recomputes each chunk and keeps none of them."""

Visible = Callable[[slice, slice], Bool[Tensor, "b hk g tq keys"]]
"""Which of some keys some queries see."""

Modify = Callable[[Float[Tensor, "b hk g tq keys"], slice, slice], Float[Tensor, "b hk g tq keys"]]
"""Changes the scores of some queries with some keys."""

Reach = Callable[[slice], slice]
"""The keys that some queries can see at all, known from their place in the call alone."""

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside autocast: scores, importance and LSE keep float32."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)  # leaving what is off takes the host longer than launching a kernel
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, modify: Modify | None, scale: float, reach: Reach | None
) -> AttentionOutput:
    """Softmax attention of ``q [b, hq, tq, d]`` to the keys that ``visible`` admits, chunked over the queries.

    ``modify`` changes the scores before the softmax; ``reach`` bounds the keys that a range of queries can see.
    """
    dtype = accumulator(q)
    tame = modify is None and _tame(q, k, v, scale)
    recompute = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > RECOMPUTE_SCORES and torch.is_grad_enabled()
    k, v = k.to(dtype), v.to(dtype)
    k, v, bad = (k, v, None) if tame else _quarantined(k, v)

    def attend(part: Tensor, queries: slice) -> tuple[Tensor, Tensor]:
        keys = slice(0, k.shape[2]) if reach is None else reach(queries)
        part, mask = part.to(dtype), visible(queries, keys)
        if bad is None:
            return _attend_tame(part, k[:, :, keys], v[:, :, keys], mask, scale)
        k_poison, v_bad = (x[:, :, keys] for x in bad)
        change = None if modify is None else lambda scores: modify(scores, queries, keys)
        return _attend(part, k[:, :, keys], v[:, :, keys], mask, k_poison, v_bad, scale, change)

    ranges = list(chunks(q, k.shape[2]))
    # Split, not sliced: the backward of a slice fills all of q.
    parts = zip(q.split([part.stop - part.start for part in ranges], dim=2), ranges, strict=True)
    outs, lses = zip(
        *(
            checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) if recompute else attend(*part)
            for part in parts
        ),
        strict=True,
    )
    return AttentionOutput(torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2))


def _tame(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether all is known to be finite, the products of pairs that are not visible too: by Cauchy and Schwarz."""
    if not all(map(checks.values_are_checked, (q, k, v))):
        return False
    q_norm, k_norm, v_norm = (torch.linalg.vector_norm(x.detach(), dtype=accumulator(x)).item() for x in (q, k, v))
    bound = abs(scale) * q_norm * max(1.0, k_norm)
    return math.isfinite(k_norm) and math.isfinite(v_norm) and bound <= torch.finfo(accumulator(q)).max


@full_precision
def _attend_tame(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``_attend`` where nothing has to be kept from spreading: the mask is added, which is the fastest way."""
    scores = dot_products(q, k, scale)
    nothing = ~visible.any(-1, keepdim=True)
    blind = bool(nothing.any())
    hidden = ~(visible | nothing) if blind else ~visible
    scores = scores + torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1)
    lse = _LSE.apply(scores, weights)
    out = (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])
    if blind:
        out, lse = out.masked_fill(nothing, 0), lse.masked_fill(nothing, -torch.inf)
    return out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)


@full_precision
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    k_poison: Tensor,
    v_bad: Tensor,
    scale: float,
    modify: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """One chunk. A row that sees nothing is a softmax over scores that are all kept, then set to 0 with LSE -inf."""
    q, q_bad = _quarantine(q)
    scores = dot_products(q, k, scale)
    if modify is not None:
        scores = modify(scores)
        visible = visible & (scores != -torch.inf)
    nothing = ~visible.any(-1, keepdim=True)
    floor = torch.zeros_like(nothing, dtype=q.dtype).masked_fill(~nothing, -torch.inf)
    # Chosen, not added: a product with a key that the query does not see may have overflowed.
    scores = torch.where(visible, scores + k_poison[:, :, None, None], floor)
    weights = scores.softmax(-1)
    lse = _LSE.apply(scores, weights)
    out = (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])
    q_poison = q_bad.unflatten(1, weights.shape[1:3])[..., None]
    v_poison = (visible & v_bad[:, :, None, None]).any(-1, keepdim=True)
    out = out.masked_fill(q_poison | v_poison, torch.nan).masked_fill(nothing, 0)
    lse = lse.masked_fill(q_poison, torch.nan).masked_fill(nothing, -torch.inf)
    return out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)


def _quarantined(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Keys and values to multiply with, NaN or 0 to add to each key's scores, and which values were bad."""
    (k, k_bad), (v, v_bad) = _quarantine(k), _quarantine(v)
    return k, v, (torch.zeros_like(k[..., 0]).masked_fill(k_bad, torch.nan), v_bad)


class _LSE(torch.autograd.Function):
    """LSE of scores whose softmax is at hand: no second pass of exponentials, and a gradient that is the softmax."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def forward(scores: Tensor, weights: Tensor) -> Tensor:
        # The largest weight is 1 / sum of exp(score - largest score).
        return scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return grads[0] * weights, None


def dot_products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled dot products ``[b, hk, g, tq, keys]``. The group shares its keys, so it folds into the rows."""
    rows = rearrange(q * scale, "b (hk g) t d -> b hk (g t) d", hk=k.shape[1])
    return (rows @ k.mT).unflatten(2, (-1, q.shape[2]))


def _quarantine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are not finite set to 0, and which rows they were.

    0 * NaN is NaN, so a NaN must not enter a product with rows that do not see it; those that do see it are set to NaN
    afterwards.
    """
    bad = (~x.isfinite()).any(-1)
    return x.masked_fill(bad[..., None], 0), bad


def chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Query ranges of at most ``CHUNK_SCORES`` scores. One range under compile, whose graph would grow by the chunk."""
    queries = q.shape[2]
    if torch.compiler.is_compiling():
        yield slice(0, queries)
        return
    size = max(1, min(CHUNK_QUERIES, CHUNK_SCORES // (q.shape[0] * q.shape[1] * max(1, keys))))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))
