"""Passkey retrieval: a few digits hidden in noise at some depth, asked for at the end of the row."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bench.learn.rows import CPU, DrawnRows, cut, row_generator
from bench.learn.task import IGNORED, Batch

KEY, QUESTION, FIRST_DIGIT, FIRST_FILLER = 0, 1, 2, 12


@dataclass(frozen=True)
class PasskeyTask(DrawnRows):
    """Passkey retrieval of Mohtashami and Jaggi 2023 (arXiv 2305.16300), over tokens.

    A row is noise, ``KEY`` and the digits at a depth, noise, and at the end ``QUESTION`` and the digits again, which
    alone are labelled. Noise is random, so that nothing but attention to the key finds the digits.

    Args:
        digits: length of the passkey.
        vocabulary: noise comes from ``[12, vocabulary)``; below that are the two markers and the ten digits.
        seed: of all rows.
        device: where training rows are drawn.
        curriculum: training steps and how many tokens a row has before each.
    """

    digits: int = 5
    vocabulary: int = 256
    seed: int = 0
    device: torch.device = CPU
    curriculum: tuple[tuple[int, int], ...] = ()
    unit: str = "digit"
    name: str = "passkey"

    def rows(self, size: int, context: int, generator: torch.Generator) -> Batch:
        """``size`` rows, depths uniform."""
        return self.at_depths(torch.rand(size, generator=generator, device=generator.device), context, generator)

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """``rows`` rows that no training step draws, depths evenly spaced."""
        return cut(self.at_depths(torch.linspace(0, 1, rows), context, row_generator(0, "validation")), size)

    def at_depths(self, depths: Float[Tensor, "b"], context: int, generator: torch.Generator) -> Batch:
        """A row of ``context`` tokens for each depth: 0 its start, 1 right before the question.

        Raises:
            ValueError: a row is too short for the key and the question.
        """
        noise = context - 2 * self.digits - 1
        if noise < 0:
            raise ValueError(
                f"context: expected at least {2 * self.digits + 1} tokens for key and question, got {context}; "
                "lengthen --context"
            )
        size, device = len(depths), generator.device
        digits = torch.randint(FIRST_DIGIT, FIRST_FILLER, (size, self.digits), generator=generator, device=device)
        whole = torch.randint(FIRST_FILLER, self.vocabulary, (size, context + 1), generator=generator, device=device)
        key = torch.cat([torch.full((size, 1), KEY, device=device), digits], dim=1)
        told = (depths.double() * noise).round().long()[:, None] + torch.arange(self.digits + 1, device=device)
        whole.scatter_(1, told, key)
        whole[:, -self.digits - 1], whole[:, -self.digits :] = QUESTION, digits
        labels = torch.full((size, context), IGNORED, device=device)
        labels[:, -self.digits :] = digits
        places = torch.arange(context - self.digits, context, device=device).expand(size, -1)
        return Batch(whole[:, :-1], labels, places=places, sources=told[:, 1:])

    def prompt(self, tokens: int) -> Int64[Tensor, "1 t"]:
        """A row of no training step, the key in its middle."""
        return self.at_depths(torch.tensor([0.5]), tokens, row_generator(self.seed, "prompt")).inputs

    def decode(self, tokens: list[int]) -> str:
        """Digits as digits, the markers as words, noise as a dot."""
        words = {KEY: "key", QUESTION: "?"} | {FIRST_DIGIT + digit: str(digit) for digit in range(10)}
        return " ".join(words.get(token, ".") for token in tokens)

    def describe(self) -> dict[str, object]:
        """The generator's parameters."""
        return {"digits": self.digits, "vocabulary": self.vocabulary}
