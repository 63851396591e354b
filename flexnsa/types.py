"""The values that pass between the stages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

KV = tuple[Float[Tensor, "b hk tk d"], Float[Tensor, "b hk tk dv"]]
"""A key tensor [b, hk, tk, d] and a value tensor [b, hk, tk, dv]."""

Positions = Int[Tensor, "*b tq"] | range
"""Absolute positions of the queries: int64 [tq] or [b, tq], or a range where they are adjacent and alike in each row.

A range is known without a look at the device: masks then follow from the lengths, and are kept between calls.
"""


class AttentionOutput(NamedTuple):
    """What one branch returns.

    Attributes:
        out: ``[b, hq, tq, dv]``, 0 where the query sees nothing.
        lse: ``[b, hq, tq]``, natural log of the sum of exponentials, -inf where the query sees nothing.
            float32, or float64 for float64 inputs. Differentiable.
    """

    out: Float[Tensor, "b hq tq dv"]
    lse: Float[Tensor, "b hq tq"]


class Selection(NamedTuple):
    """The blocks that each query of a KV group attends to (paper, Eq. 11).

    Attributes:
        indices: int32 ``[b, hk, tq, n]``, block ids local to the query's document, ascending, left-packed, padded
            with -1.
    """

    indices: Int32[Tensor, "b hk tq n"]

    @classmethod
    def from_scores(cls, scores: Float[Tensor, "b hk tq s"], num_selected: int) -> Selection:
        """The ``num_selected`` blocks of highest score, each query's own: what most selectors end with.

        >>> Selection.from_scores(torch.tensor([[[[0.1, 0.7, -torch.inf, 0.3]]]]), 2).indices
        tensor([[[[1, 3]]]], dtype=torch.int32)

        Args:
            scores: ``[b, hk, tq, s]``. -inf is never chosen, inf first of all; ties go to the earlier block, and NaN
                ranks below every number.
            num_selected: blocks to choose at most; fewer chosen ones are padded with -1.

        Returns:
            indices ``[b, hk, tq, num_selected]``, without a gradient.

        Raises:
            ValueError: scores of another rank or dtype, or ``num_selected`` below 1.
        """
        _check_table("scores", scores, num_selected, floating=True)
        blocks = scores.shape[-1]
        rank = scores.detach().nan_to_num(torch.finfo(scores.dtype).min, torch.inf, -torch.inf)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
        best = best.where(rank.gather(-1, best) != -torch.inf, blocks).sort(dim=-1).values
        best = best.masked_fill(best == blocks, -1)
        return cls(F.pad(best, (0, num_selected - best.shape[-1]), value=-1).int())

    @classmethod
    def from_mask(cls, chosen: Bool[Tensor, "b hk tq s"], num_selected: int) -> Selection:
        """The blocks that a table says are chosen; of a query with more than ``num_selected`` the first ones.

        >>> Selection.from_mask(torch.tensor([[[[True, False, True]]]]), 3).indices
        tensor([[[[ 0,  2, -1]]]], dtype=torch.int32)

        Args:
            chosen: ``[b, hk, tq, s]``.
            num_selected: blocks to keep at most; fewer chosen ones are padded with -1.

        Returns:
            indices ``[b, hk, tq, num_selected]``.

        Raises:
            ValueError: a table of another rank or dtype, or ``num_selected`` below 1.
        """
        _check_table("chosen", chosen, num_selected, floating=False)
        return cls.from_scores(
            torch.zeros(chosen.shape, device=chosen.device).masked_fill(~chosen, -torch.inf), num_selected
        )

    def to_mask(self, num_blocks: int) -> Bool[Tensor, "b hk tq s"]:
        """Whether each query attends to each of ``num_blocks`` blocks; the inverse of ``from_mask``.

        >>> Selection(torch.tensor([[[[0, 2, -1]]]], dtype=torch.int32)).to_mask(4).int()
        tensor([[[[1, 0, 1, 0]]]], dtype=torch.int32)
        """
        # Padding, and what is no block, is written to one slot past the end, which is then cut off.
        slot = self.indices.long().where((self.indices >= 0) & (self.indices < num_blocks), num_blocks)
        table = torch.zeros(*slot.shape[:-1], num_blocks + 1, dtype=torch.bool, device=slot.device)
        return table.scatter(-1, slot, True)[..., :num_blocks]


def _check_table(name: str, table: Tensor, num_selected: int, *, floating: bool) -> None:
    kind = "floating point" if floating else "bool"
    if table.ndim != 4 or (not table.is_floating_point() if floating else table.dtype != torch.bool):
        raise ValueError(
            f"{name} must be {kind} [b, hk, tq, s], a number for each block, got {table.dtype} {tuple(table.shape)}; "
            f"convert or reshape it"
        )
    if num_selected < 1:
        raise ValueError(f"num_selected must be at least 1, got {num_selected}; raise it")


class BranchKV(NamedTuple):
    """Keys and values of the three branches: each has projections of its own (paper, section 3.3.3).

    Attributes:
        compressed: ``(k, v)`` of raw tokens, or of compressed tokens where no compressor is given.
        selected: ``(k, v)``, each ``[b, hk, tk, d]`` or ``[b, hk, tk, dv]``.
        window: ``(k, v)``, likewise.
    """

    compressed: KV
    selected: KV
    window: KV

    @classmethod
    def shared(cls, k: Float[Tensor, "b hk tk d"], v: Float[Tensor, "b hk tk dv"]) -> BranchKV:
        """One pair for all three branches."""
        return cls(compressed=(k, v), selected=(k, v), window=(k, v))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which scores, importance and LSE are computed: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
