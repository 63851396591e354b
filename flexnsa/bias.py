"""Score mods generated from the selection: a bias by the importance of the block that a token is in."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexnsa import checks, reference
from flexnsa.config import NSAConfig
from flexnsa.dense import chunks
from flexnsa.importance import check_scoring
from flexnsa.layout import QueryTable, query_table
from flexnsa.types import Positions, Selection
from flexnsa_masks import MaskMod, ScoreMod
from flexnsa_masks.selected import WORD, block_bits


def importance_bias(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    lse: Float[Tensor, "b hq tq"],
    config: NSAConfig,
    *,
    selection: Selection,
    num_tokens: int,
    weight: float | Float[Tensor, ""] = 1.0,
    eps: float = 1e-6,
    scale: float | None = None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
) -> ScoreMod:
    """A score mod for ``selected_attention`` that adds to each score by the importance of the key's block.

    Among the m selected blocks of a query that were not forced let ``pi[j] = (p[j] + eps) / sum over them``, with p
    their importances. A key in such a block j gets ``weight * log(m * pi[j])``, one in a forced block 0. So the
    attention that a block gets is multiplied by the ratio of its share of the importance to an even share, to the power
    of ``weight``, before all is normalised; blocks of equal importance, and forced ones, of which importance says
    nothing, are left alone. Scaling all importances changes nothing but through ``eps``.

    The gradient reaches q, k_cmp and lse. With ``a[j]`` the attention that block j gets and ``u[j]`` its mean value
    under it, ``d out / d bias[j] = a[j] * (u[j] - out)``: a block whose values serve better than the average gains.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k_cmp: compressed keys ``[b, hk, c, d]``.
        lse: the compressed branch's LSE ``[b, hq, tq]``.
        config: the geometry.
        selection: the blocks of each query.
        num_tokens: KV tokens tk.
        weight: a number, or a tensor of one, which is then learned.
        eps: added to each importance, above 0.
        scale: softmax scale of the compressed branch, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, None for ``0 .. tk-1``.
        documents: int ``[b, tk]``, -1 for padding.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: score mod of the compressed branch.

    Returns:
        A score mod over absolute token numbers and query heads. Importance is computed in plain torch, a chunk of
        queries at a time, and kept for selected blocks alone.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_scoring(q, k_cmp, lse, config, num_tokens)
    checks.check_score_mod(score_mod)
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}; the logarithm of an importance of 0 needs it")
    table = query_table(q, config, num_tokens=num_tokens, positions=positions, documents=documents, mask_mod=mask_mod)
    scale = checks.resolve_scale(scale, q.shape[-1])
    importance = _selected_importance(q, k_cmp, lse, selection, table, config, num_tokens, scale, score_mod)
    bias = weight * _log_share(importance, _free(selection, table, config), eps)
    rows = None if positions is None else _rows(table, num_tokens)
    group = q.shape[1] // k_cmp.shape[1]
    return _by_block(bias, selection, config, num_tokens, table.start if table.packed else None, rows, group)


def _selected_importance(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    selection: Selection,
    table: QueryTable,
    config: NSAConfig,
    num_tokens: int,
    scale: float,
    score_mod: ScoreMod | None,
) -> Float[Tensor, "b hk tq n"]:
    """Importance of each selected block; the table over all blocks exists for one chunk of queries at a time."""
    num_blocks = config.num_blocks(num_tokens)

    def part(queries: slice) -> Tensor:
        some, where = q[:, :, queries], table.slice(queries)
        importance = reference.block_importance(
            some, k_cmp, lse[:, :, queries], where, config, num_blocks=num_blocks, scale=scale, score_mod=score_mod
        )
        return importance.gather(-1, selection.indices[:, :, queries].long().clamp(0, num_blocks - 1))

    parts = list(chunks(q, k_cmp.shape[2] + num_blocks))
    recompute = len(parts) > 1 and torch.is_grad_enabled()
    return torch.cat(
        [
            checkpoint(part, queries, use_reentrant=False, preserve_rng_state=False) if recompute else part(queries)
            for queries in parts
        ],
        dim=2,
    )


def _free(selection: Selection, table: QueryTable, config: NSAConfig) -> Tensor:
    """Which of the selected blocks were not forced, bool ``[b, hk, tq, n]``."""
    block = selection.indices
    own = ((table.position - table.start) // config.select_block)[:, None, :, None]
    local = (block > own - config.num_local) & (block <= own)
    return (block >= config.num_initial) & ~local & (block >= 0)


def _log_share(importance: Tensor, free: Tensor, eps: float) -> Tensor:
    """``log(m * pi)`` over the m free blocks of each query, 0 elsewhere."""
    share = (importance + eps).where(free, 0)
    mean = share.sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1)
    # Where no block is free the logarithms' arguments are 1, not 0: their gradients would be NaN.
    mean = mean.where(free.any(-1, keepdim=True), 1)
    return share.where(free, 1).log().sub(mean.log()).where(free, 0)


def _rows(table: QueryTable, num_tokens: int) -> Tensor:
    """Row of the query at each position, int64 ``[b|1, tk]``, 0 where there is none."""
    position = table.position
    row = torch.arange(position.shape[1], device=position.device).expand_as(position)
    rows = torch.zeros(position.shape[0], num_tokens + 1, dtype=torch.int64, device=position.device)
    # Padding is written to one slot past the end, which is then cut off.
    return rows.scatter(1, position.where(position >= 0, num_tokens), row)[:, :num_tokens]


def _by_block(
    bias: Tensor,
    selection: Selection,
    config: NSAConfig,
    num_tokens: int,
    start: Tensor | None,
    rows: Tensor | None,
    group: int,
) -> ScoreMod:
    """Score mod that adds ``bias [b, hk, tq, n]`` of the slot in which the key's block is listed.

    Indices ascend, so a block's slot is the number of selected blocks before it: a count of bits.
    """
    words = block_bits(selection.indices, config.num_blocks(num_tokens))
    counts = count_bits(words)
    before = counts.cumsum(-1, dtype=torch.int32) - counts
    size, slots = config.select_block, bias.shape[-1]
    last = torch.full((), config.num_blocks(num_tokens) - 1, dtype=torch.int64, device=bias.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        b, head, row, token = (index.to(torch.int64) for index in (b, h // group, q_idx, kv_idx))
        if rows is not None:
            row = rows[b if rows.shape[0] > 1 else torch.zeros_like(b), row]
        if start is not None:
            token = token - start[b if start.shape[0] > 1 else torch.zeros_like(b), row]
        block = torch.minimum((token // size).clamp(min=0), last)
        earlier = ~(torch.full_like(block, -1, dtype=torch.int32) << (block % WORD).to(torch.int32))
        word = block // WORD
        slot = before[b, head, row, word] + count_bits(words[b, head, row, word] & earlier)
        return score + bias[b, head, row, slot.clamp(max=slots - 1).to(torch.int64)]

    score_mod.__name__ = "importance_bias"
    return score_mod


def count_bits(words: Int[Tensor, "*words"]) -> Int[Tensor, "*words"]:
    """Number of bits that are set in each int32.

    >>> count_bits(torch.tensor([0, 5, -1, -(2**31)], dtype=torch.int32))
    tensor([ 0,  2, 32,  1], dtype=torch.int32)
    """
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return (sixteens + (sixteens >> 16)) & 0x3F
