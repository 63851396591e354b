"""From transformers' words for padding and packing, attention masks and position ids, to the library's: documents."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from flexnsa.checks import values_are_checked


def documents_from_mask(attention_mask: Shaped[Tensor, "b t"] | None) -> Int64[Tensor, "b t"] | None:
    """Document ids of a padded batch: 0 for a token, -1 for padding; None where nothing is padding.

    >>> documents_from_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    tensor([[-1,  0,  0],
            [ 0,  0,  0]])

    Raises:
        ValueError: a row has padding between its tokens (read on a CPU, or inside ``debug()``).
    """
    if attention_mask is None:
        return None
    real = attention_mask != 0
    # As transformers itself does for SDPA: one look at the mask, outside a compiled graph, for a simpler problem.
    if not torch.compiler.is_compiling() and real.all():
        return None
    if values_are_checked(real) and ((real.int().diff(dim=1) == 1).sum(1) + real[:, 0] > 1).any():
        raise ValueError(
            "attention_mask has zeros between ones, expected padding on either side only; pad the rows on the left, or "
            "pass the mask that the tokenizer made"
        )
    return real.long() - 1


def documents_from_positions(position_ids: Int[Tensor, "#b t"], batch: int) -> Int64[Tensor, "b t"] | None:
    """Document ids of packed rows: a document begins where the positions do not go on by one. None where none does.

    >>> documents_from_positions(torch.tensor([[0, 1, 2, 0, 1]]), 1)
    tensor([[0, 0, 0, 1, 1]])
    """
    return documents_from_breaks((position_ids.diff(dim=-1) != 1).expand(batch, -1))


def documents_from_breaks(breaks: Bool[Tensor, "b t-1"]) -> Int64[Tensor, "b t"] | None:
    """Document ids, one more after each break between two tokens; None where there is no break."""
    if not torch.compiler.is_compiling() and not breaks.any():
        return None
    return torch.nn.functional.pad(breaks.long(), (1, 0)).cumsum(-1)
