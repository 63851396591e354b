"""The sliding window branch (paper, section 3.3.3)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, engines, flash, flex, reference
from flexnsa.config import NSAConfig
from flexnsa.layout import query_table
from flexnsa.types import AttentionOutput, Positions
from flexnsa_masks import MaskMod, ScoreMod


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
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
    """Attention of the query at position t to keys ``t - window + 1 .. t``: exactly ``window`` keys, its own included.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k: keys ``[b, hk, tk, d]``; ``hq`` is a multiple of ``hk``.
        v: values ``[b, hk, tk, dv]``.
        config: the geometry.
        scale: softmax scale, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, absolute positions of the queries, None for ``0 .. tk-1``.
        documents: int ``[b, tk]``, document of each KV token, -1 for padding.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: FlexAttention score mod over absolute token numbers and query heads.
        lse_grad: whether the LSE is differentiable. False takes its gradient away, on every engine, and lets FLASH's
            kernels run, which have none.
        impl: the engine.

    Returns:
        ``AttentionOutput(out, lse)``.

    Raises:
        ValueError: the arguments do not fit one another.
        NotImplementedError: the engine asked for cannot run this call.
    """
    checks.check_qkv(q, k, v)
    checks.check_score_mod(score_mod)
    scale = checks.resolve_scale(scale, q.shape[-1])
    table = query_table(q, config, num_tokens=k.shape[2], positions=positions, documents=documents, mask_mod=mask_mod)
    choice = engines.choose(
        impl,
        "window",
        q,
        k,
        v,
        mods=score_mod is not None,
        mask_mod=mask_mod,
        static=positions is None and documents is None,
        lse_grad=lse_grad,
    )
    if choice.engine == "flash":
        return flash.window_attention(q, k, v, table, config, scale=scale)
    engine = flex if choice.engine == "flex" else reference
    out, lse = engine.window_attention(q, k, v, table, config, scale=scale, score_mod=score_mod)
    return AttentionOutput(out, lse if lse_grad else lse.detach())
