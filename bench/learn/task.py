"""What a task gives the trainer: seeded batches of tokens and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

from bench.parallel import Ranks

IGNORED = -100


class Batch(NamedTuple):
    """Tokens and the label to predict at each of them; `IGNORED` where nothing is asked.

    `documents` says to which document each token belongs, ascending within a row; None for one document a row. `places`
    holds every token at which something is asked, in no order and perhaps with others among them, None for all; and
    `sources`, where it is known, the token that tells the answer to each.
    """

    inputs: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]
    documents: Int64[Tensor, "b t"] | None = None
    places: Int64[Tensor, "b n"] | None = None
    sources: Int64[Tensor, "b n"] | None = None

    def share(self, ranks: Ranks) -> Batch:
        """A rank's rows; as many on each, the last filled up with rows in which nothing is asked."""
        documents, places, sources = (None if x is None else ranks.rows(x) for x in self[2:])
        return Batch(ranks.rows(self.inputs), ranks.rows(self.labels, IGNORED), documents, places, sources)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Each tensor changed."""
        return Batch(change(self.inputs), change(self.labels), *(None if x is None else change(x) for x in self[2:]))

    @property
    def asked(self) -> Int64[Tensor, "b n"]:
        """The labels at `places`."""
        return self.labels if self.places is None else self.labels.gather(1, self.places)


class Task(Protocol):
    """A source of batches. Batch `step` depends on the task's seed and on `step` alone, so every twin sees the same."""

    @property
    def name(self) -> str:
        """The task, as the command line calls it."""
        ...

    @property
    def unit(self) -> str:
        """What a label is: a byte, an answer."""
        ...

    @property
    def vocabulary(self) -> int:
        """Distinct tokens."""
        ...

    def training(self, step: int, size: int, context: int) -> Batch:
        """The training batch of one step, `size` rows of `context` tokens."""
        ...

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """`rows` validation rows, always the same ones, in batches of at most `size`."""
        ...

    def prompt(self, tokens: int) -> Int64[Tensor, "1 t"]:
        """A validation row to continue from and to look into."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Tokens as readable text."""
        ...

    def characters(self, tokens: list[int]) -> list[str] | None:
        """Tokens as one visible character each, None where they are no characters."""
        ...

    def describe(self) -> dict[str, object]:
        """What the data are, for the record: counts and a digest."""
        ...
