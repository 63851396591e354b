"""Copying: a row of random tokens, a separator, and the same tokens again."""

from dataclasses import dataclass

import torch

from bench.learn.rows import CPU, DrawnRows
from bench.learn.task import IGNORED, Batch

SEPARATOR = 0


@dataclass(frozen=True)
class CopyTask(DrawnRows):
    """The copy task of Graves et al. 2014 (arXiv 1410.5401, section 4.1), over tokens.

    A row of t tokens holds ``t // 2`` random tokens, the separator and their copy, which alone is labelled. A token and
    its copy are half a row apart, so a window shorter than that sees nothing to copy.

    Args:
        vocabulary: tokens are drawn from ``[1, vocabulary)``; 0 separates.
        seed: of all rows.
        device: where training rows are drawn.
        curriculum: training steps and how many tokens a row has before each.
    """

    vocabulary: int = 64
    seed: int = 0
    device: torch.device = CPU
    curriculum: tuple[tuple[int, int], ...] = ()
    unit: str = "token"
    name: str = "copy"

    def rows(self, size: int, context: int, generator: torch.Generator) -> Batch:
        """``size`` rows of ``context`` tokens.

        Raises:
            ValueError: a row is too short to hold a token and its copy.
        """
        if context < 3:
            raise ValueError(f"context: expected at least 3 tokens, got {context}; lengthen --context")
        length, device = context // 2, generator.device
        told = torch.randint(1, self.vocabulary, (size, length), generator=generator, device=device)
        whole = torch.cat([told, torch.full((size, 1), SEPARATOR, device=device), told], dim=1)[:, : context + 1]
        labels = whole[:, 1:].clone()
        labels[:, :length] = IGNORED
        places = torch.arange(length, context, device=device).expand(size, -1)
        return Batch(whole[:, :-1], labels, places=places, sources=places - length)

    def decode(self, tokens: list[int]) -> str:
        """Token numbers, the separator as a bar."""
        return " ".join("|" if token == SEPARATOR else str(token) for token in tokens)

    def describe(self) -> dict[str, object]:
        """The generator's parameters."""
        return {"vocabulary": self.vocabulary}
