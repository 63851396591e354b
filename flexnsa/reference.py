"""The dense engine: every stage as masked attention in plain torch, on any device, in any dtype, differentiable.

It stands beside the paper and is what the other engines are tested against. Heads are written as ``hk g``: KV head,
head in its group. Masks are bool and broadcast to ``[b, hk, g, tq, keys]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa.dense import Modify, Reach, Visible, attention, chunks, dot_products, full_precision
from flexnsa.layout import KeyRange, QueryTable, compressed_starts, document_starts
from flexnsa.types import AttentionOutput, Selection, accumulator
from flexnsa.visibility import at_last_token, candidate_mask, compressed_mask
from flexnsa_masks import MaskMod, ScoreMod


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7)."""
    visible = _visible_compressed(q, k_cmp, table, config)
    if k_cmp.shape[2] == 0:
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 1)) for x in (k_cmp, v_cmp))
        visible, score_mod = _in_range(table.compressed_range(config)), None

    reach = _reach(table, lambda _, end: slice(0, min(k_cmp.shape[2], max(1, config.num_compressed(end)))))
    modify = _modifier(_moved(score_mod, table, config), q, k_cmp, table)
    return attention(q, k_cmp, v_cmp, visible, modify, scale, reach if table.visible is None else None)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3)."""
    reach = _reach(table, lambda begin, end: slice(max(0, begin - config.window + 1), end))
    visible = _both(_in_range(table.window_range(config)), _visible_tokens(q, k, table))
    return attention(q, k, v, visible, _modifier(score_mod, q, k, table), scale, reach)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    selection: Selection,
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the visible tokens of the selected blocks (Eq. 11 and 12)."""
    if table.visible is None and score_mod is None and _few(selection, q, k, v, config):
        return _gathered_attention(q, k, v, selection, table, config, scale)
    num_blocks = config.num_blocks(k.shape[2])

    def chosen(queries: slice, keys: slice) -> Tensor:
        some = Selection(selection.indices[:, :, queries])
        if not table.packed:
            return _tokens_of(some, keys.stop, config)[:, :, None, :, keys]
        token = torch.arange(keys.start, keys.stop, device=q.device)
        block = (token - table.start[:, queries, None]) // config.select_block
        inside = (block >= 0) & (block < num_blocks)
        member = some.to_mask(num_blocks)
        index = block.where(inside, 0)[:, None].expand(*member.shape[:2], -1, -1)
        return (member.gather(-1, index) & inside[:, None])[:, :, None]

    reach = _reach(table, lambda _, end: slice(0, end))
    visible = _both(chosen, _visible_tokens(q, k, table))
    modify = _modifier(score_mod, q, k, table)
    return attention(q, k, v, visible, modify, scale, reach if table.visible is None else None)


def _tokens_of(selection: Selection, num_tokens: int, config: NSAConfig) -> Bool[Tensor, "b hk tq tk"]:
    """Whether each of the first tokens lies in a block that the query selects.

    Compiled, each token is written by itself. A table of blocks read for token ``// select_block`` comes out wrong:
    Inductor of torch 2.11 to 2.13 on a CPU cuts that loop into whole blocks and skips the tokens that are left over.
    """
    if not torch.compiler.is_compiling():
        member = selection.to_mask(config.num_blocks(num_tokens))
        return member.repeat_interleave(config.select_block, -1)[..., :num_tokens]
    block = selection.indices.long()[..., None]
    token = block * config.select_block + torch.arange(config.select_block, device=block.device)
    # Padding, and what the last block lacks, is written to one slot past the end, which is then cut off.
    slot = token.masked_fill((block < 0) | (token >= num_tokens), num_tokens).flatten(3)
    table = torch.zeros(*slot.shape[:3], num_tokens + 1, dtype=torch.bool, device=slot.device)
    return table.scatter(-1, slot, True)[..., :num_tokens]


def _reach(table: QueryTable, keys: Callable[[int, int], slice]) -> Reach | None:
    """``keys(begin, end)`` of queries by where they stand, asked about rows; None where that is not known."""
    first = table.first
    return None if first is None else lambda queries: keys(first + queries.start, first + queries.stop)


def _few(selection: Selection, q: Tensor, k: Tensor, v: Tensor, config: NSAConfig) -> bool:
    """Whether copies of every query's blocks are fewer keys than there are. Not where gradients would be summed."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    return q.shape[2] * selection.indices.shape[3] * config.select_block < k.shape[2]


def _gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, table: QueryTable, config: NSAConfig, scale: float
) -> AttentionOutput:
    """Selected attention of a few queries to copies of their blocks: work that does not grow with tk.

    Each query of a KV head is made a head of its own, which has the query's blocks for keys.
    """
    start, position = (x[:, None, :, None, None] for x in (table.start, table.position))
    block = selection.indices.long()[..., None]
    token = start + block * config.select_block + torch.arange(config.select_block, device=q.device)
    visible = ((block >= 0) & (token <= position)).flatten(3).flatten(1, 2)[:, :, None, None]
    index = token.clamp(0, k.shape[2] - 1).flatten(2)[..., None]

    def of_query(x: Tensor) -> Tensor:
        return x.take_along_dim(index, 2).unflatten(2, (q.shape[2], -1)).flatten(1, 2)

    rows = rearrange(q, "b (hk g) t d -> b (hk t g) 1 d", hk=k.shape[1])
    out, lse = attention(rows, of_query(k), of_query(v), lambda *_: visible, None, scale, None)
    heads = {"hk": k.shape[1], "t": q.shape[2]}
    return AttentionOutput(
        rearrange(out, "b (hk t g) 1 d -> b (hk g) t d", **heads),
        rearrange(lse, "b (hk t g) 1 -> b (hk g) t", **heads),
    )


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
    score_mod: ScoreMod | None = None,
) -> Float[Tensor, "b hk tq s"]:
    """The compressed branch's probabilities, counted by shared tokens, summed over the group (Eq. 8 to 10)."""
    heads, keys = k_cmp.shape[1:3]
    if keys == 0:
        return q.new_zeros(q.shape[0], heads, q.shape[2], num_blocks, dtype=accumulator(q))
    visible = _visible_compressed(q, k_cmp, table, config)(slice(0, q.shape[2]), slice(0, keys))
    scores = dot_products(q.to(accumulator(q)), k_cmp.to(accumulator(q)), scale)
    modify = _modifier(_moved(score_mod, table, config), q, k_cmp, table)
    if modify is not None:
        scores = modify(scores, slice(0, q.shape[2]), slice(0, keys))
        visible = visible & (scores != -torch.inf)
    logits = scores - rearrange(lse, "b (hk g) t -> b hk g t 1", hk=heads)
    # By powers of 2: a CPU takes ten times as long for e ** -inf.
    p_cmp = logits.mul_(math.log2(math.e)).masked_fill_(~visible, -torch.inf).exp2_()
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
    num_tokens: int,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> Selection:
    """The forced blocks and the most important others (Eq. 11), a chunk of queries at a time."""
    num_blocks = config.num_blocks(num_tokens)

    def choose(part: slice) -> Tensor:
        some, where = q[:, :, part], table.slice(part)
        importance = block_importance(
            some, k_cmp, lse[:, :, part], where, config, num_blocks=num_blocks, scale=scale, score_mod=score_mod
        )
        return top_blocks(importance, candidates(some, k_cmp, where, config, num_blocks, num_tokens), where, config)

    return Selection(torch.cat([choose(part) for part in chunks(q, k_cmp.shape[2] + num_blocks)], dim=2))


def candidates(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    table: QueryTable,
    config: NSAConfig,
    num_blocks: int,
    num_tokens: int,
) -> Bool[Tensor, "#b #hk tq s"]:
    """Blocks any of whose tokens the query sees; with a mask by head, any head of the group."""
    block = torch.arange(num_blocks, device=q.device)
    if table.visible is None:
        return (block * config.select_block <= (table.position - table.start)[..., None])[:, None]
    starts = None if table.documents is None else document_starts(table.documents)
    mask_mod = candidate_mask(table.visible, starts, num_tokens, config)
    return _evaluate(mask_mod, q, k_cmp, table)(slice(0, q.shape[2]), slice(0, num_blocks)).any(2)


def top_blocks(
    importance: Float[Tensor, "b hk tq s"],
    candidate: Bool[Tensor, "#b #hk tq s"],
    table: QueryTable,
    config: NSAConfig,
) -> Int32[Tensor, "b hk tq n"]:
    """Indices of the chosen candidates: by (importance descending, block ascending), NaN last, forced ones first."""
    num_blocks = importance.shape[-1]
    block = torch.arange(num_blocks, device=importance.device)
    own = ((table.position - table.start) // config.select_block)[:, None, :, None]
    local = (block > own - config.num_local) & (block <= own)
    forced = candidate & ((block < config.num_initial) | local)
    rank = importance.masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)
    return Selection.from_scores(rank, config.num_selected).indices


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


def _in_range(seen: KeyRange) -> Visible:
    def visible(queries: slice, keys: slice) -> Tensor:
        key = torch.arange(keys.start, keys.stop, device=seen.first.device)
        inside = (seen.first[:, queries, None] <= key) & (key <= seen.last[:, queries, None])
        return inside[:, None, None]

    return visible


def _visible_tokens(q: Tensor, k: Tensor, table: QueryTable) -> Visible:
    return _in_range(table.causal_range()) if table.visible is None else _evaluate(table.visible, q, k, table)


def _visible_compressed(q: Tensor, k_cmp: Tensor, table: QueryTable, config: NSAConfig) -> Visible:
    if table.visible is None:
        return _in_range(table.compressed_range(config))
    return _evaluate(
        compressed_mask(table.visible, compressed_starts(table.documents, config), config), q, k_cmp, table
    )


def _moved(score_mod: ScoreMod | None, table: QueryTable, config: NSAConfig) -> ScoreMod | None:
    return None if score_mod is None else at_last_token(score_mod, compressed_starts(table.documents, config), config)


def _evaluate(mask_mod: MaskMod, q: Tensor, k: Tensor, table: QueryTable) -> Visible:
    """A mask mod over absolute positions, evaluated densely; a padding query sees nothing."""
    place = _places(q, k, table)

    def visible(queries: slice, keys: slice) -> Tensor:
        return mask_mod(*place(queries, keys)) & (table.position[:, None, None, queries, None] >= 0)

    return visible


def _modifier(score_mod: ScoreMod | None, q: Tensor, k: Tensor, table: QueryTable) -> Modify | None:
    """A score mod over absolute positions, applied to the scores of a chunk."""
    place = _places(q, k, table)
    return None if score_mod is None else lambda scores, queries, keys: score_mod(scores, *place(queries, keys))


def _places(q: Tensor, k: Tensor, table: QueryTable) -> Callable[[slice, slice], tuple[Tensor, ...]]:
    """Batch, query head, query position and key index, as tensors that broadcast to ``[b, hk, g, tq, keys]``."""
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None, None]
    head = torch.arange(q.shape[1], device=q.device).view(1, k.shape[1], -1, 1, 1)

    def place(queries: slice, keys: slice) -> tuple[Tensor, ...]:
        position = table.position.clamp(min=0)[:, None, None, queries, None]
        return batch, head, position, torch.arange(keys.start, keys.stop, device=q.device)

    return place


def _both(one: Visible, other: Visible) -> Visible:
    return lambda queries, keys: one(queries, keys) & other(queries, keys)
