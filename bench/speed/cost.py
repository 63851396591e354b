"""What a case must cost by arithmetic, and what its measured times say: the linear and the quadratic term over t."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.speed.cases import Case

BACKWARD = 2.5
"""FLOPs of attention's backward over its forward's: five matrix products for two."""


class Cost(NamedTuple):
    """Forward FLOPs ``linear * t + quadratic * t**2`` of one row of the batch."""

    linear: float
    quadratic: float

    def at(self, tokens: int) -> float:
        """FLOPs at a length."""
        return self.linear * tokens + self.quadratic * tokens**2

    def quadratic_share(self, tokens: int) -> float:
        """How much of the cost at a length is the quadratic term's, 0 .. 1."""
        return self.quadratic * tokens**2 / self.at(tokens) if self.at(tokens) else 0.0


def costs(case: Case) -> Mapping[str, Cost]:
    """Forward FLOPs of dense causal attention and of each of NSA's stages, one multiply-add counted as two.

    A query sees half of the compressed tokens on average, and always ``num_selected`` blocks and ``window`` keys: what
    the first of them see less is left out, as is what is not a matrix product.
    """
    config, pair = case.config, 2 * case.heads * (case.dim + case.value_dim)
    stages = {
        "compressed": Cost(0, pair / (2 * config.compress_stride)),
        "selection": Cost(0, 2 * case.heads * case.dim / (2 * config.compress_stride)),
        "selected": Cost(pair * config.num_selected * config.select_block, 0),
        "window": Cost(pair * config.window, 0),
    }
    whole = Cost(sum(x.linear for x in stages.values()), sum(x.quadratic for x in stages.values()))
    return {"dense": Cost(0, pair / 2), **stages, "whole": whole}


def flops(case: Case, stage: str, tokens: int, *, backward: bool) -> float:
    """FLOPs of a stage, forward or backward; 0 where they are not counted: other stages, and rows of many documents.

    Selection has no backward.
    """
    known = costs(case)
    if stage not in known or case.documents > 1:
        return 0.0
    once = case.batch * known[stage].at(tokens)
    if not backward:
        return once
    return BACKWARD * (once - (case.batch * known["selection"].at(tokens) if stage in ("whole", "selection") else 0.0))


class Fit(NamedTuple):
    """Milliseconds ``constant + linear * t + quadratic * t**2``, and the largest relative error of that."""

    constant: float
    linear: float
    quadratic: float
    error: float

    def quadratic_share(self, tokens: int) -> float:
        """How much of the fitted time at a length is the quadratic term's, 0 .. 1."""
        return self.quadratic * tokens**2 / (self.constant + self.linear * tokens + self.quadratic * tokens**2)


def fit(tokens: Sequence[int], milliseconds: Sequence[float]) -> Fit:
    """The terms, none of them negative, that come closest to the times in relative error.

    >>> [round(x, 9) for x in fit([1000, 2000, 4000, 8000], [5.0, 14.0, 44.0, 152.0])[:3]]
    [0.0, 0.003, 2e-06]

    Raises:
        ValueError: fewer than three lengths.
    """
    if len(tokens) < 3:
        raise ValueError(f"a fit needs three lengths or more, got {list(tokens)}")
    t, times = np.array(tokens, dtype=float), np.array(milliseconds, dtype=float)
    terms = np.stack([np.ones_like(t), t, t**2], axis=1) / times[:, None]
    best, best_error = np.zeros(3), np.inf
    for used in range(1, 8):  # every choice of terms: the best of those without a negative one is the optimum
        columns = [i for i in range(3) if used >> i & 1]
        scale = terms[:, columns].max(axis=0)
        found = np.linalg.lstsq(terms[:, columns] / scale, np.ones_like(t), rcond=None)[0] / scale
        error = float(np.square(terms[:, columns] @ found - 1).sum())
        if (found >= 0).all() and error < best_error:
            best, best_error = np.zeros(3), error
            best[columns] = found
    constant, linear, quadratic = best.tolist()
    return Fit(constant, linear, quadratic, error=float(np.abs(terms @ best - 1).max()))
