"""The dense engine: every stage as masked attention in plain torch, on any device, in any dtype, differentiable.

It stands beside the paper and is what the other engines are tested against. Queries are worked through in chunks, so
that no tensor of size tq x tk exists; a call with many scores recomputes each chunk in the backward. Heads are written
as ``hk g`` (KV head, head in its group); masks are bool and broadcast to ``[b, hk, g, tq, keys]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexnsa.config import NSAConfig
from flexnsa.layout import KeyRange, QueryTable
from flexnsa.types import AttentionOutput, Selection

CHUNK_SCORES = 2**24
"""Scores (batch x query heads x queries x keys) of one chunk: 64 MiB in float32."""

CHUNK_QUERIES = 128
"""Queries of one chunk at most: short chunks skip the keys that all of their queries are too early or too late for."""

RECOMPUTE_SCORES = 2**27
"""Scores of a call from which on the backward recomputes each chunk and keeps none of them."""

Visible = Callable[[slice, slice], Bool[Tensor, "b hk g tq keys"]]
"""Which of some keys some queries see."""

Reach = Callable[[slice], slice]
"""The keys that some queries can see at all, known from their place in the call alone."""

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside autocast: scores, importance and LSE keep float32."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    ordered: bool,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7)."""
    if k_cmp.shape[2] == 0:
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 1)) for x in (k_cmp, v_cmp))

    def reach(queries: slice) -> slice:
        return slice(0, max(1, config.num_compressed(queries.stop)))

    seen = table.compressed_range(config)
    return _attention(q, k_cmp, v_cmp, _in_range(seen), scale, reach if ordered else None)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    ordered: bool,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3)."""

    def reach(queries: slice) -> slice:
        return slice(max(0, queries.start - config.window + 1), queries.stop)

    seen = table.window_range(config)
    return _attention(q, k, v, _in_range(seen), scale, reach if ordered else None)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    selection: Selection,
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    ordered: bool,
) -> AttentionOutput:
    """Attention to the causal tokens of the selected blocks (Eq. 11 and 12)."""
    causal = _in_range(table.causal_range())
    num_blocks = config.num_blocks(k.shape[2])

    def visible(queries: slice, keys: slice) -> Tensor:
        chosen = _one_hot(selection.indices[:, :, queries], num_blocks)
        if table.packed:
            token = torch.arange(keys.start, keys.stop, device=q.device)
            block = (token - table.start[:, queries, None]) // config.select_block
            chosen = chosen.gather(-1, block.clamp(min=0)[:, None].expand(*chosen.shape[:2], -1, -1))
        else:
            chosen = chosen.repeat_interleave(config.select_block, -1)[..., keys]
        return chosen[:, :, None] & causal(queries, keys)

    return _attention(q, k, v, visible, scale, (lambda queries: slice(0, queries.stop)) if ordered else None)


@full_precision
def block_importance(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    lse: Float[Tensor, "b hq tq"],
    table: QueryTable,
    config: NSAConfig,
    *,
    num_blocks: int,
    scale: float,
) -> Float[Tensor, "b hk tq s"]:
    """The compressed branch's probabilities, counted by shared tokens, summed over the group (Eq. 8 to 10)."""
    heads, keys = k_cmp.shape[1:3]
    if keys == 0:
        return q.new_zeros(q.shape[0], heads, q.shape[2], num_blocks, dtype=_accumulator(q))
    visible = _in_range(table.compressed_range(config))(slice(None), slice(0, keys))
    scores = _scores(q.to(_accumulator(q)), k_cmp.to(_accumulator(q)), scale)
    p_cmp = scores.sub_(rearrange(lse, "b (hk g) t -> b hk g t 1", hk=heads)).exp_().where(visible, 0)
    if table.packed:
        p_cmp = _from_document_start(p_cmp, table.offset)
    blocks = _overlap_sum(p_cmp, config, num_blocks)
    # Added head by head in one fixed order, so that heads that tie exactly give sums that tie exactly.
    importance = blocks[:, :, 0]
    for head in range(1, blocks.shape[2]):
        importance = importance + blocks[:, :, head]
    return importance


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    lse: Float[Tensor, "b hq tq"],
    table: QueryTable,
    config: NSAConfig,
    *,
    num_blocks: int,
    scale: float,
) -> Selection:
    """The forced blocks and the most important others (Eq. 11), a chunk of queries at a time."""
    chunks = [
        top_blocks(
            block_importance(
                q[:, :, part], k_cmp, lse[:, :, part], table.slice(part), config, num_blocks=num_blocks, scale=scale
            ),
            table.slice(part),
            config,
        )
        for part in _chunks(q, k_cmp.shape[2] + num_blocks)
    ]
    return Selection(torch.cat(chunks, dim=2))


def top_blocks(
    importance: Float[Tensor, "b hk tq s"], table: QueryTable, config: NSAConfig
) -> Int32[Tensor, "b hk tq n"]:
    """Indices of the chosen blocks: by (importance descending, block ascending), NaN last, forced ones first."""
    num_blocks = importance.shape[-1]
    block = torch.arange(num_blocks, device=importance.device)
    own = ((table.position - table.start) // config.select_block)[:, None, :, None]
    candidate = block <= own
    forced = candidate & ((block < config.num_initial) | (block > own - config.num_local))
    # Importances are sums of probabilities, hence >= 0: -1 ranks NaN below them, -2 what is no candidate below NaN.
    rank = importance.masked_fill(importance.isnan(), -1).masked_fill(forced, torch.inf).masked_fill(~candidate, -2)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : config.num_selected]
    best = best.where(candidate.expand_as(rank).gather(-1, best), num_blocks).sort(dim=-1).values
    best = best.masked_fill(best == num_blocks, -1)
    return F.pad(best, (0, config.num_selected - best.shape[-1]), value=-1).int()


def _overlap_sum(p_cmp: Tensor, config: NSAConfig, num_blocks: int) -> Tensor:
    """Probability that falls into each block, in units of ``compress_stride`` tokens.

    Compressed token i shares ``overlap`` tokens with block j, which depends on ``i - j * (l' / stride)`` alone. This is
    Eq. 9 counted from the geometry: the printed indices are 1-based.
    """
    length, stride, block = config.compress_block, config.compress_stride, config.select_block
    step, before = block // stride, length // stride - 1
    padded = F.pad(p_cmp, (before, max(0, num_blocks * step - p_cmp.shape[-1])))
    zero = torch.zeros_like(p_cmp[..., :1]).expand(*p_cmp.shape[:-1], num_blocks)
    # By overlap, so that a block cut on its left and one cut on its right tie exactly where their probabilities do.
    by_overlap: dict[int, Tensor] = {}
    for shift in range(-before, step):
        overlap = min(shift * stride + length, block) - max(shift * stride, 0)
        part = padded[..., shift + before :: step][..., :num_blocks]
        by_overlap[overlap] = by_overlap.get(overlap, zero) + part
    return sum((part * (overlap / stride) for overlap, part in by_overlap.items()), start=zero)


def _from_document_start(p_cmp: Tensor, offset: Tensor) -> Tensor:
    """Shift each query's compressed tokens so that its document's first one is number 0; 0 past the end."""
    keys = p_cmp.shape[-1]
    index = (offset[..., None] + torch.arange(keys, device=p_cmp.device))[:, None, None]
    local = p_cmp.gather(-1, index.clamp(max=keys - 1).expand_as(p_cmp))
    return local.where(index < keys, 0)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, reach: Reach | None) -> AttentionOutput:
    """Masked softmax attention, chunked over the queries."""
    dtype = _accumulator(q)
    (k, k_bad), (v, v_bad) = _quarantine(k.to(dtype)), _quarantine(v.to(dtype))
    k_poison = torch.zeros_like(k[..., 0]).masked_fill(k_bad, torch.nan)
    recompute = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > RECOMPUTE_SCORES and torch.is_grad_enabled()

    def attend(queries: slice) -> tuple[Tensor, Tensor]:
        keys = slice(0, k.shape[2]) if reach is None else reach(queries)
        mask = visible(queries, keys)
        part = q[:, :, queries].to(dtype)
        return _attend(part, k[:, :, keys], v[:, :, keys], mask, k_poison[:, :, keys], v_bad[:, :, keys], scale)

    outs, lses = zip(
        *(
            checkpoint(attend, part, use_reentrant=False, preserve_rng_state=False) if recompute else attend(part)
            for part in _chunks(q, k.shape[2])
        ),
        strict=True,
    )
    return AttentionOutput(torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2))


@full_precision
def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, k_poison: Tensor, v_bad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The softmax written out, so that a row that sees nothing is 0 with LSE -inf, not 0 / 0.

    In place, since on a CPU a fresh tensor for each step would cost as much as the step.
    """
    q, q_bad = _quarantine(q)
    scores = _scores(q, k, scale).add_(torch.where(visible, k_poison[:, :, None, None], -torch.inf))
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    q_poison = q_bad.unflatten(1, weights.shape[1:3])[..., None] & ~nothing
    v_poison = (visible & v_bad[:, :, None, None]).any(-1, keepdim=True)
    out = (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4]) / total
    out = out.masked_fill(q_poison | v_poison, torch.nan)
    lse = (total.log() + highest).masked_fill(nothing, -torch.inf).masked_fill(q_poison, torch.nan)
    return out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled dot products ``[b, hk, g, tq, keys]``. The group shares its keys, so it folds into the rows."""
    rows = rearrange(q * scale, "b (hk g) t d -> b hk (g t) d", hk=k.shape[1])
    return (rows @ k.mT).unflatten(2, (-1, q.shape[2]))


def _quarantine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are not finite set to 0, and which rows they were.

    0 * NaN is NaN, so a NaN must not enter a product with rows that do not see it; those that do see it are set to NaN
    afterwards.
    """
    bad = ~x.isfinite().all(-1)
    return x.masked_fill(bad[..., None], 0), bad


def _in_range(seen: KeyRange) -> Visible:
    def visible(queries: slice, keys: slice) -> Tensor:
        key = torch.arange(keys.start, keys.stop, device=seen.first.device)
        inside = (seen.first[:, queries, None] <= key) & (key <= seen.last[:, queries, None])
        return inside[:, None, None]

    return visible


def _one_hot(indices: Tensor, num_blocks: int) -> Tensor:
    """Bool ``[..., num_blocks]``, true at the indices; -1 is written to a slot past the end."""
    slot = indices.long().where(indices >= 0, num_blocks)
    table = torch.zeros(*slot.shape[:-1], num_blocks + 1, dtype=torch.bool, device=slot.device)
    return table.scatter(-1, slot, True)[..., :num_blocks]


def _chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Query ranges of at most ``CHUNK_SCORES`` scores. One range under compile, whose graph would grow by the chunk."""
    queries = q.shape[2]
    if torch.compiler.is_compiling():
        yield slice(0, queries)
        return
    size = max(1, min(CHUNK_QUERIES, CHUNK_SCORES // (q.shape[0] * q.shape[1] * max(1, keys))))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
