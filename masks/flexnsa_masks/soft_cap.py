"""Soft cap: scores that cannot leave an interval.

Definition: `cap * tanh(score / cap)`, applied to the scaled score before the softmax. Source: Gemma 2 (2024, arXiv
2408.00118), section 2, which caps attention scores at 50.
"""

import torch
from torch import Tensor

from flexnsa_masks.score import ScoreMod


def soft_cap(cap: float) -> ScoreMod:
    """Score mod: squeezes scores into `(-cap, cap)`, hardly changing small ones.

    Args:
        cap: the bound, above 0 (ValueError otherwise).

    >>> import torch
    >>> at = torch.tensor(0)
    >>> round(soft_cap(50.0)(torch.tensor(1000.0), at, at, at, at).item(), 3)
    50.0
    """
    if not cap > 0:
        raise ValueError(f"soft_cap: expected cap > 0, got {cap}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    score_mod.__name__ = f"soft_cap_{cap:g}"
    return score_mod
