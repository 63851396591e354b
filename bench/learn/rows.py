"""What the synthetic tasks share: seeded generators, and the cutting of rows into batches."""

import hashlib
from collections.abc import Iterator

import torch

from bench.learn.task import Batch


def row_generator(*seeds: int | str) -> torch.Generator:
    """A CPU generator that depends on ``seeds`` alone."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def cut(rows: Batch, size: int) -> Iterator[Batch]:
    """The rows in batches of at most ``size``."""
    return (Batch(*part) for part in zip(rows.inputs.split(size), rows.labels.split(size), strict=True))
