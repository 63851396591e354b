"""ALiBi: scores that fall with distance, at a rate of each head's own.

Definition: `score + slope[h] * (k - q)`. The paper's slopes are `2 ** (-8 * (i + 1) / heads)` where heads are a power
of two; otherwise its code takes those of the power of two below, then every other one of the power above. Source: Train
Short, Test Long (Press et al. 2022, arXiv 2108.12409), section 3.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import at_least
from flexnsa_masks.score import ScoreMod


def alibi(slopes: int | Tensor, *, device: torch.device | str = "cpu") -> ScoreMod:
    """Score mod: adds `slope[h] * (k - q)`, negative for keys in the past.

    Args:
        slopes: number of query heads, for the paper's slopes; or the slopes themselves, `[hq]`.
        device: where the paper's slopes go; slopes given as a tensor stay where they are.

    Raises:
        ValueError: fewer than 1 head, or slopes of another rank.

    >>> import torch
    >>> score_mod = alibi(2)
    >>> score_mod(torch.tensor(1.0), *torch.tensor([0, 0, 5, 3])).item()  # score, b, h, q_idx, kv_idx: 1 - 2 / 16
    0.875
    """
    table = slopes if isinstance(slopes, Tensor) else torch.tensor(alibi_slopes(slopes), device=device)
    if table.dim() != 1:
        raise ValueError(f"alibi: expected slopes of shape [hq], got {list(table.shape)}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[h] * (kv_idx - q_idx)

    score_mod.__name__ = f"alibi_{table.shape[0]}"
    return score_mod


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of Press et al. for any number of heads, largest first within each power of two.

    >>> alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    at_least("alibi", 1, heads=heads)
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4 * (i + 1) / below) for i in range(0, 2 * (heads - below), 2)]
