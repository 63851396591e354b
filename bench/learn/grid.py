"""Whether a trained model finds the passkey, by how deep it lies and how long the row is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.learn.passkey import PasskeyTask
from bench.learn.rows import row_generator
from bench.learn.train import Twin

DEPTHS = tuple(i / 8 for i in range(9))
"""0 is the row's beginning, 1 right before the question."""

ROWS = 8
"""Rows of each length and depth, always the same ones."""

TOKENS = 65_536
"""Tokens of one batch, one row at least."""


@torch.no_grad()
def ask_everywhere(twin: Twin, task: PasskeyTask, lengths: Sequence[int]) -> list[dict[str, object]]:
    """Each length and depth: the share of digits found, and of rows with all of them found."""
    cells: list[dict[str, object]] = []
    for length in lengths:
        depths = torch.tensor(DEPTHS).repeat_interleave(ROWS)
        rows = task.at_depths(depths, length, row_generator(0, "grid", length)).to(twin.device)
        found = []
        for first in range(0, len(depths), max(1, TOKENS // length)):
            part = slice(first, first + max(1, TOKENS // length))
            batch = rows.map(lambda x, part=part: x[part])  # type: ignore[misc]
            found.append(twin.logits(batch).argmax(-1) == batch.asked)
        right = torch.cat(found).unflatten(0, (len(DEPTHS), ROWS)).cpu()
        cells += [
            {
                "tokens": length,
                "depth": depth,
                "digits": digits.double().mean().item(),
                "keys": digits.all(dim=1).double().mean().item(),
                "rows": ROWS,
            }
            for depth, digits in zip(DEPTHS, right, strict=True)
        ]
    return cells
