"""What a twin has been through, and how long it took."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch


class Clock:
    """A stopwatch that started: on a GPU by the device's time, for which nothing waits while it runs."""

    def __init__(self, device: torch.device):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self.times = [time.perf_counter()] * 2
        if self.events is not None:
            self.events[0].record()

    def stop(self) -> None:
        """The end."""
        self.times[1] = time.perf_counter()
        if self.events is not None:
            self.events[1].record()

    def seconds(self) -> float:
        """From start to end; waits for it."""
        if self.events is None:
            return self.times[1] - self.times[0]
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


@dataclass
class Progress:
    """What one twin has been through. Bits are per labelled token; `position_bits` is by position in the context.

    `norms` are those of each step's gradient. `insights` are what an NSA twin did inside at each validation.
    """

    tokens: int = 0
    seconds: float = 0.0
    train_bits: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    position_bits: list[float | None] = field(default_factory=list)
    insights: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """The latest validation bits per token."""
        return self.validation[-1][1] if self.validation else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Training speed, validation not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0
