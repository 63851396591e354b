"""Multi-query associative recall: key-value pairs first, then some of the keys again, each asking for its value."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import pad

from bench.learn.rows import CPU, DrawnRows
from bench.learn.task import IGNORED, Batch


@dataclass(frozen=True)
class MQARTask(DrawnRows):
    """MQAR of Arora et al. 2023 (arXiv 2312.04927), all pairs asked once, filler 0 between the questions.

    A row is ``k1 v1 ... kK vK``, two fillers, and then, in every second place, a key with its value for a label, or
    filler. How far behind the pairs a key is asked follows a power law: place ``i`` has probability proportional to
    ``i ** (a - 1)``. The fillers after the pairs are this task's own: a model that mixes each token with the one before
    would else see one question in each row, the first, mixed with a value.

    Args:
        pairs: K, key-value pairs of a row; a row needs ``4 * pairs + 2`` tokens.
        vocabulary: V; keys come from ``[1, V / 2)``, values from ``[V / 2, V)``.
        power: a.
        seed: of all rows.
        device: where training rows are drawn.
        curriculum: training steps and how many pairs a row has before each.
    """

    pairs: int
    vocabulary: int = 8192
    power: float = 0.01
    seed: int = 0
    device: torch.device = CPU
    curriculum: tuple[tuple[int, int], ...] = ()
    unit: str = "answer"
    name: str = "mqar"

    def __post_init__(self) -> None:
        if not 1 <= self.pairs < self.vocabulary // 2:
            raise ValueError(
                f"pairs: expected 1 to {self.vocabulary // 2 - 1} distinct keys of a vocabulary of {self.vocabulary}, "
                f"got {self.pairs}; lower --pairs"
            )

    def rows(self, size: int, context: int, generator: torch.Generator) -> Batch:
        """``size`` rows of ``context`` tokens.

        Raises:
            ValueError: the pairs and their questions do not fit into a row.
        """
        told = 2 * self.pairs
        begin = told + 2
        places = (context - begin) // 2
        if places < self.pairs:
            raise ValueError(
                f"context: expected at least {4 * self.pairs + 2} tokens for {self.pairs} pairs and their questions, "
                f"got {context}; lengthen --context or lower --pairs"
            )
        half, device = self.vocabulary // 2, generator.device
        keys = 1 + torch.rand(size, half - 1, generator=generator, device=device).topk(self.pairs).indices
        values = half + torch.rand(size, half, generator=generator, device=device).topk(self.pairs).indices
        inputs = torch.zeros(size, context, dtype=torch.int64, device=device)
        inputs[:, 0:told:2], inputs[:, 1:told:2] = keys, values
        asked = begin + 2 * self._gaps(size, places, generator)
        labels = torch.full_like(inputs, IGNORED).scatter_(1, asked, values)
        sources = 1 + 2 * torch.arange(self.pairs, device=device).expand(size, -1)
        return Batch(inputs.scatter_(1, asked, keys), labels, places=asked, sources=sources)

    def smaller_rows(self, smaller: int, size: int, context: int, generator: torch.Generator) -> Batch:
        """Rows of as many tokens with ``smaller`` pairs; places are filled up with token 0, which has no label."""
        batch = replace(self, pairs=smaller).rows(size, context, generator)
        places, sources = (None if x is None else pad(x, (0, self.pairs - smaller)) for x in batch[3:])
        return batch._replace(places=places, sources=sources)

    def _gaps(self, size: int, places: int, generator: torch.Generator) -> Int64[Tensor, "b pairs"]:
        """Distinct places by the power law, for pair 1 .. K: the largest of Gumbel-perturbed log-probabilities."""
        device = generator.device
        log_probability = (self.power - 1) * torch.arange(1, places + 1, device=device).log()
        noise = -torch.empty(size, places, device=device).exponential_(generator=generator).log()
        return (log_probability + noise).topk(self.pairs).indices

    def decode(self, tokens: list[int]) -> str:
        """Token numbers, filler as a dot."""
        return " ".join(str(token) if token else "." for token in tokens)

    def describe(self) -> dict[str, object]:
        """The generator's parameters."""
        return {"pairs": self.pairs, "vocabulary": self.vocabulary, "power": self.power}
