"""How important each selection block is to each query group (paper, Eq. 8 to 10)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, reference
from flexnsa.config import NSAConfig
from flexnsa.layout import query_table
from flexnsa.types import Positions
from flexnsa_masks import MaskMod, ScoreMod


def block_importance(
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
) -> Float[Tensor, "b hk tq s"]:
    """Importance of every block, for inspection and tests: the whole ``tq x s`` table, which selection never stores.

    Block j's importance is ``sum_i p_cmp[i] * overlap(i, j) / stride``, summed over the heads of the group, where
    overlap counts the tokens that compressed token i shares with block j.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k_cmp: compressed keys ``[b, hk, c, d]``.
        lse: the compressed branch's LSE ``[b, hq, tq]``.
        config: the geometry.
        num_tokens: KV tokens tk; ``s = ceil(tk / select_block)``.
        scale: softmax scale of the compressed branch, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, None for ``0 .. tk-1``.
        documents: int ``[b, tk]``, -1 for padding; block ids then count from the document's start.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: FlexAttention score mod over absolute token numbers and query heads, that of the compressed
            branch.

    Returns:
        ``[b, hk, tq, s]``, float32, or float64 for float64 inputs.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_scoring(q, k_cmp, lse, config, num_tokens)
    checks.check_score_mod(score_mod)
    table = query_table(q, config, num_tokens=num_tokens, positions=positions, documents=documents, mask_mod=mask_mod)
    return reference.block_importance(
        q,
        k_cmp,
        lse,
        table,
        config,
        num_blocks=config.num_blocks(num_tokens),
        scale=checks.resolve_scale(scale, q.shape[-1]),
        score_mod=score_mod,
    )


def check_scoring(q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, num_tokens: int) -> None:
    """Queries, compressed keys, LSE and the number of tokens fit one another."""
    checks.check_qk(q, k_cmp, "k_cmp", k_axis="c")
    checks.check_lse(lse, q)
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}; it is the number of KV tokens")
    if k_cmp.shape[2] != config.num_compressed(num_tokens):
        raise ValueError(
            f"k_cmp must hold {config.num_compressed(num_tokens)} compressed tokens for num_tokens={num_tokens}, got "
            f"{k_cmp.shape[2]}; compress with the same config"
        )
