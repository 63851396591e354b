"""Score mods: what they are, and one after another.

A *score mod* is FlexAttention's: a function of (score, batch, head, query index, key index) that returns the score that
enters the softmax. Source: FlexAttention (Dong et al. 2024, arXiv 2412.05496).
"""

from collections.abc import Callable

from torch import Tensor

from flexnsa_masks.geometry import name_of

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def compose_score_mods(*score_mods: ScoreMod) -> ScoreMod:
    """Score mod that applies one or more score mods, the first first.

    Raises:
        ValueError: called with no score mod.

    >>> from flexnsa_masks import alibi, soft_cap
    >>> compose_score_mods(soft_cap(50.0), alibi(8)).__name__
    'compose_score_mods(soft_cap_50, alibi_8)'
    """
    if not score_mods:
        raise ValueError("compose_score_mods: expected one or more score mods, got none")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in score_mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    score_mod.__name__ = f"compose_score_mods({', '.join(name_of(mod) for mod in score_mods)})"
    return score_mod
