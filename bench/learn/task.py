"""What a task gives the trainer: seeded batches of tokens and labels."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from jaxtyping import Int64
from torch import Tensor

IGNORED = -100


class Batch(NamedTuple):
    """Tokens and the label to predict at each of them; `IGNORED` where nothing is asked.

    `documents` says to which document each token belongs, ascending within a row; None for one document a row.
    """

    inputs: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]
    documents: Int64[Tensor, "b t"] | None = None


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
