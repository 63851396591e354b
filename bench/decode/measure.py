"""Time of a step: on CUDA in a captured graph, with the L2 cache emptied before each step; on a CPU as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

STEPS = 10
"""Steps of a graph."""

REPLAYS = 9
"""Replays, of which the median is taken, after one that is not counted."""

CALLS = 5
"""Calls of eager work, likewise."""

FLUSHED = 256 << 20
"""Bytes read between steps: several times any L2 cache."""


class Time(NamedTuple):
    """Microseconds of a step: median, smallest and largest."""

    median: float
    least: float
    most: float


class Stopwatch:
    """Times steps on one device.

    On CUDA a graph holds ``STEPS`` times a read of ``FLUSHED`` bytes and a step. The time of a graph of the reads
    alone, replayed just before it, is taken off: they take longer than a short step, so a drift of theirs would count.
    A read leaves the cache full of lines that need not be written back.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self._filler = torch.zeros(FLUSHED // 4, device=device)
            self._sum = torch.zeros((), device=device)
            self._reads = _capture(self._flush)

    def time(self, step: Callable[[], object]) -> Time:
        """Microseconds of one step."""
        if self.device.type != "cuda":
            found = Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=0.2)
            return Time(*(1e6 * x for x in (found.median, min(found.times), max(found.times))))
        step()
        torch.cuda.synchronize()

        def cold() -> None:
            self._flush()
            step()

        graph = _capture(cold)
        pairs = [(_replay(self._reads), _replay(graph)) for _ in range(REPLAYS + 1)][1:]
        times = [both - reads for reads, both in pairs]
        return Time(*(1e3 * x / STEPS for x in (statistics.median(times), min(times), max(times))))

    def wall(self, work: Callable[[], object]) -> Time:
        """Microseconds of eager work as its caller waits for them, after one call that is not counted."""
        times = []
        for _ in range(CALLS + 1):
            self._wait()
            begin = time.perf_counter()
            work()
            self._wait()
            times.append(1e6 * (time.perf_counter() - begin))
        return Time(statistics.median(times[1:]), min(times[1:]), max(times[1:]))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _flush(self) -> None:
        torch.sum(self._filler, 0, out=self._sum)


def _capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            work()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
