"""Which blocks each query group attends to (paper, Eq. 11)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, engines, reference
from flexnsa.config import NSAConfig
from flexnsa.importance import check_scoring
from flexnsa.layout import query_table
from flexnsa.types import Positions, Selection
from flexnsa_masks import MaskMod, ScoreMod


def select_blocks(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    lse: Float[Tensor, "b hq tq"],
    config: NSAConfig,
    *,
    num_tokens: int,
    scale: float | None = None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    impl: engines.Impl = "auto",
) -> Selection:
    """The forced blocks and the most important others, one choice for all heads of a KV group.

    Forced are the first ``num_initial`` and the last ``num_local`` blocks. The others follow by importance descending,
    then block index ascending; NaN ranks last. A block that starts after the query is never chosen. No gradient.

    Importance is a sum in float32. Where compressed tokens have one and the same probability, blocks that share equally
    many tokens with them tie, on every engine. Sums of unlike probabilities may differ between engines in their last
    bits, and with them which of two nearly equal blocks is chosen.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k_cmp: compressed keys ``[b, hk, c, d]``.
        lse: the compressed branch's LSE ``[b, hq, tq]``.
        config: the geometry.
        num_tokens: KV tokens tk.
        scale: softmax scale of the compressed branch, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, None for ``0 .. tk-1``.
        documents: int ``[b, tk]``, -1 for padding; block ids then count from the document's start.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: FlexAttention score mod over absolute token numbers and query heads, that of the compressed
            branch.
        impl: the engine; ``flex`` scores in plain torch, a chunk of queries at a time, as ``reference`` does.

    Returns:
        ``Selection(indices)``, int32 ``[b, hk, tq, num_selected]``, ascending, left-packed, padded with -1.

    Raises:
        ValueError: the arguments do not fit one another.
        NotImplementedError: the engine asked for cannot run this call.
    """
    check_scoring(q, k_cmp, lse, config, num_tokens)
    checks.check_score_mod(score_mod)
    scale = checks.resolve_scale(scale, q.shape[-1])
    table = query_table(q, config, num_tokens=num_tokens, positions=positions, documents=documents, mask_mod=mask_mod)
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    mods, most = score_mod is not None, config.num_selected
    choice = engines.choose(impl, "selection", q, k_cmp, mods=mods, mask_mod=mask_mod, num_selected=most)
    if choice.engine == "triton":
        from flexnsa.kernels.scoring import select_blocks as kernel  # imports triton

        indices = kernel(
            q,
            k_cmp,
            lse,
            table.position,
            table.start,
            table.offset,
            *(table.masked_range(q.shape[0]) or ()),
            num_blocks=config.num_blocks(num_tokens),
            compress_block=config.compress_block,
            compress_stride=config.compress_stride,
            select_block=config.select_block,
            num_selected=config.num_selected,
            num_initial=config.num_initial,
            num_local=config.num_local,
            scale=scale,
        )
        return Selection(indices)
    return reference.select_blocks(
        q, k_cmp, lse, table, config, num_tokens=num_tokens, scale=scale, score_mod=score_mod
    )
