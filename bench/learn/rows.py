"""What the synthetic tasks share: rows drawn from a seed, none of which training and validation have in common."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from bench.learn.task import Batch

CPU = torch.device("cpu")


def row_generator(*seeds: int | str, device: torch.device = CPU) -> torch.Generator:
    """A generator that depends on ``seeds`` and the kind of ``device`` alone."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def cut(rows: Batch, size: int) -> Iterator[Batch]:
    """The rows in batches of at most ``size``."""
    for first in range(0, len(rows.inputs), size):
        part = slice(first, first + size)
        yield rows.map(lambda x, part=part: x[part])  # type: ignore[misc]


class DrawnRows(ABC):
    """A task whose rows are drawn: what ``Task`` asks for, from ``rows`` alone.

    Training rows are drawn on ``device``, and kinds of device draw differently; all others on the CPU.
    ``curriculum`` holds steps and sizes, both ascending: before that step, training rows are of that size.
    """

    seed: int
    device: torch.device
    curriculum: tuple[tuple[int, int], ...]

    @abstractmethod
    def rows(self, size: int, context: int, generator: torch.Generator) -> Batch:
        """``size`` rows of ``context`` tokens, on the generator's device."""

    def training(self, step: int, size: int, context: int) -> Batch:
        """``size`` rows drawn from ``(seed, step)``, or smaller ones while the curriculum says so."""
        generator = row_generator(self.seed, "training", step, device=self.device)
        smaller = next((small for until, small in self.curriculum if step < until), None)
        if smaller is None:
            return self.rows(size, context, generator)
        return self.smaller_rows(smaller, size, context, generator)

    def smaller_rows(self, smaller: int, size: int, context: int, generator: torch.Generator) -> Batch:
        """As many tokens in rows of ``smaller`` tokens each."""
        return self.rows(size * context // smaller, smaller, generator)

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """``rows`` rows that no training step draws."""
        return cut(self.rows(rows, context, row_generator(0, "validation")), size)

    def prompt(self, tokens: int) -> Int64[Tensor, "1 t"]:
        """A row of no training step."""
        return self.rows(1, tokens, row_generator(self.seed, "prompt")).inputs

    def characters(self, tokens: list[int]) -> None:
        """None: tokens are no characters."""
        return None
