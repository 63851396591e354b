"""The compressed branch: attention to one key per compression block (paper, section 3.3.1)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, engines, flash, flex, reference
from flexnsa.config import NSAConfig
from flexnsa.layout import query_table
from flexnsa.types import AttentionOutput, Positions
from flexnsa_masks import MaskMod, ScoreMod


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    config: NSAConfig,
    *,
    scale: float | None = None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    lse_grad: bool = True,
    impl: engines.Impl = "auto",
) -> AttentionOutput:
    """Attention of each query to the compressed tokens all of whose tokens it sees.

    Compressed token i is visible to the query at position t iff ``i * stride + l - 1 <= t``.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k_cmp: compressed keys ``[b, hk, c, d]``; ``hq`` is a multiple of ``hk``.
        v_cmp: compressed values ``[b, hk, c, dv]``.
        config: the geometry.
        scale: softmax scale, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, absolute positions of the queries, None for ``0 .. tq-1``.
        documents: int ``[b, tk]``, document of each KV token, -1 for padding.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: FlexAttention score mod over absolute token numbers and query heads; a compressed token stands
            where its last token does.
        lse_grad: whether the LSE is differentiable. False takes its gradient away, on every engine, and lets FLASH's
            kernels run, which have none.
        impl: the engine.

    Returns:
        ``AttentionOutput(out, lse)``; out is 0 and lse -inf for a query that sees no compressed token.

    Raises:
        ValueError: the arguments do not fit one another.
        NotImplementedError: the engine asked for cannot run this call.
    """
    checks.check_qkv(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"), k_axis="c")
    checks.check_score_mod(score_mod)
    scale = checks.resolve_scale(scale, q.shape[-1])
    table = query_table(q, config, num_tokens=None, positions=positions, documents=documents, mask_mod=mask_mod)
    _check_count(q, k_cmp, config, positions, documents)
    choice = engines.choose(
        impl,
        "compressed",
        q,
        k_cmp,
        v_cmp,
        mods=score_mod is not None,
        mask_mod=mask_mod,
        static=positions is None and documents is None,
        lse_grad=lse_grad,
    )
    if choice.engine == "flash":
        return flash.compressed_attention(q, k_cmp, v_cmp, table, config, scale=scale)
    engine = flex if choice.engine == "flex" else reference
    out, lse = engine.compressed_attention(q, k_cmp, v_cmp, table, config, scale=scale, score_mod=score_mod)
    return AttentionOutput(out, lse if lse_grad else lse.detach())


def _check_count(
    q: Tensor, k_cmp: Tensor, config: NSAConfig, positions: Positions | None, documents: Tensor | None
) -> None:
    """As many compressed tokens as the KV tokens make, wherever the call says how many those are."""
    if documents is None and positions is not None:
        return
    tokens = q.shape[2] if documents is None else documents.shape[1]
    if k_cmp.shape[2] != config.num_compressed(tokens):
        raise ValueError(
            f"k_cmp must hold {config.num_compressed(tokens)} compressed tokens for {tokens} KV tokens, got "
            f"{k_cmp.shape[2]}; compress with the same config, or pass positions="
        )
