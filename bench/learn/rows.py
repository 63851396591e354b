"""What the synthetic tasks share: rows drawn from a seed, none of which training and validation have in common."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from bench.learn.task import Batch


def row_generator(*seeds: int | str) -> torch.Generator:
    """A CPU generator that depends on ``seeds`` alone."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def cut(rows: Batch, size: int) -> Iterator[Batch]:
    """The rows in batches of at most ``size``."""
    for inputs, labels in zip(rows.inputs.split(size), rows.labels.split(size), strict=True):
        yield Batch(inputs, labels)


class DrawnRows(ABC):
    """A task whose rows are drawn: what ``Task`` asks for, from ``rows`` alone."""

    seed: int

    @abstractmethod
    def rows(self, size: int, context: int, generator: torch.Generator) -> Batch:
        """``size`` rows of ``context`` tokens."""

    def training(self, step: int, size: int, context: int) -> Batch:
        """``size`` rows drawn from ``(seed, step)``."""
        return self.rows(size, context, row_generator(self.seed, "training", step))

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """``rows`` rows that no training step draws."""
        return cut(self.rows(rows, context, row_generator(0, "validation")), size)

    def prompt(self, tokens: int) -> Int64[Tensor, "1 t"]:
        """A row of no training step."""
        return self.rows(1, tokens, row_generator(self.seed, "prompt")).inputs

    def characters(self, tokens: list[int]) -> None:
        """None: tokens are no characters."""
        return None
