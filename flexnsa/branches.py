"""NSA's three branches and its selector, as the parts of a composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from flexnsa.bias import importance_bias
from flexnsa.compressed import compressed_attention
from flexnsa.compression import Compressor, compress
from flexnsa.config import NSAConfig
from flexnsa.context import Attended, AttentionContext
from flexnsa.importance import block_importance
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import AttentionOutput, Selection
from flexnsa.window import window_attention
from flexnsa_masks import ScoreMod, compose_score_mods

MakeScoreMod = Callable[[Tensor, AttentionContext], ScoreMod]
"""Makes a score mod of the queries and of what the branches before this one did."""


class _Part(nn.Module):
    """What says of itself whether it differentiates an LSE. A class derived from it may, unless it says so again."""

    differentiates_lse: bool = True

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "differentiates_lse" not in vars(cls):
            cls.differentiates_lse = True


class CompressedBranch(_Part):
    """Attention to compressed tokens, made here by ``compressor``, or given where that is None.

    Args:
        config: the geometry.
        compressor: makes the compressed tokens; None where the branch is given compressed ones.
        scale: softmax scale, None for ``d ** -0.5``.
        score_mod: FlexAttention score mod over absolute token numbers and query heads.
    """

    differentiates_lse = False

    def __init__(
        self,
        config: NSAConfig,
        compressor: Compressor | None = None,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
    ):
        super().__init__()
        self.config, self.compressor, self.scale, self.score_mod = config, compressor, scale, score_mod

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``compressed_attention``."""
        k, v = compress(self.compressor, k, v, self.config, documents=context.documents)
        context.attended[context.branch] = Attended(k, v, self.scale, self.score_mod)
        return compressed_attention(
            q,
            k,
            v,
            self.config,
            scale=self.scale,
            score_mod=self.score_mod,
            lse_grad=context.lse_grad,
            **context.options,
        )


class SelectedBranch(_Part):
    """Attention to the blocks that the composition's selector chose.

    Args:
        config: the geometry.
        scale: softmax scale, None for ``d ** -0.5``.
        score_mod: FlexAttention score mod over absolute token numbers and query heads.
        bias: ``bias(q, context)`` makes one more score mod in each call, applied after ``score_mod``; such as
            ``ImportanceBias``.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        bias: MakeScoreMod | None = None,
    ):
        super().__init__()
        self.config, self.scale, self.score_mod, self.bias = config, scale, score_mod, bias

    @property
    def differentiates_lse(self) -> bool:  # type: ignore[override]
        """Whether the bias may: importance is made of the compressed branch's LSE."""
        return self.bias is not None

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``selected_attention``."""
        score_mod = self.score_mod
        if self.bias is not None:
            made = self.bias(q, context)
            score_mod = made if score_mod is None else compose_score_mods(score_mod, made)
        context.attended[context.branch] = Attended(k, v, self.scale, score_mod)
        return selected_attention(
            q, k, v, context.selection, self.config, scale=self.scale, score_mod=score_mod, **context.options
        )


class WindowBranch(_Part):
    """Attention to the last ``config.window`` keys.

    Args:
        config: the geometry.
        scale: softmax scale, None for ``d ** -0.5``.
        score_mod: FlexAttention score mod over absolute token numbers and query heads.
    """

    differentiates_lse = False

    def __init__(self, config: NSAConfig, *, scale: float | None = None, score_mod: ScoreMod | None = None):
        super().__init__()
        self.config, self.scale, self.score_mod = config, scale, score_mod

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``window_attention``."""
        context.attended[context.branch] = Attended(k, v, self.scale, self.score_mod)
        return window_attention(
            q,
            k,
            v,
            self.config,
            scale=self.scale,
            score_mod=self.score_mod,
            lse_grad=context.lse_grad,
            **context.options,
        )


class ImportanceSelector(_Part):
    """NSA's selector: the blocks to which the compressed branch gives most of its probability.

    Scale and score mod are those of the branch that it reads.

    Args:
        config: the geometry.
        branch: name of the compressed branch, which must come before the first branch that reads the selection.
    """

    differentiates_lse = False

    def __init__(self, config: NSAConfig, *, branch: str = "compressed"):
        super().__init__()
        self.config, self.branch = config, branch

    def select(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> Selection:
        """See ``select_blocks``."""
        return select_blocks(**_scoring(q, self.branch, self.config, context), impl=context.impl)

    def importance(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> Float[Tensor, "b hk tq s"]:
        """The whole table ``[b, hk, tq, s]``, see ``block_importance``: what a selector of one's own may start from."""
        return block_importance(**_scoring(q, self.branch, self.config, context))


class ImportanceBias(nn.Module):
    """A bias on the selected branch's scores by the importance of their block: a gradient path to the selector.

    See ``importance_bias`` for the formula. NSA as published has no such path: what the selected branch gains from a
    block never reaches the scores that chose it.

    Args:
        config: the geometry.
        weight: 0 for NSA as published; an ``nn.Parameter`` is learned.
        eps: added to each importance, so that its logarithm is finite.
        branch: name of the compressed branch from which importance comes.
    """

    def __init__(
        self, config: NSAConfig, weight: float | nn.Parameter = 1.0, *, eps: float = 1e-6, branch: str = "compressed"
    ):
        super().__init__()
        self.config, self.weight, self.eps, self.branch = config, weight, eps, branch

    def forward(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> ScoreMod:
        """See ``importance_bias``."""
        scoring = _scoring(q, self.branch, self.config, context)
        return importance_bias(**scoring, selection=context.selection, weight=self.weight, eps=self.eps)


def _scoring(q: Tensor, branch: str, config: NSAConfig, context: AttentionContext) -> dict[str, Any]:
    """What scoring takes, scale and score mod being those of the branch whose scores they are."""
    attended, output = context.earlier(branch)
    return {
        "q": q,
        "k_cmp": attended.k,
        "lse": output.lse,
        "config": config,
        "num_tokens": context.num_tokens,
        "scale": attended.scale,
        "score_mod": attended.score_mod,
        "positions": context.positions,
        "documents": context.documents,
        "mask_mod": context.mask_mod,
    }
