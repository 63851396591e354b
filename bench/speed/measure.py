"""Times and memory of one call on one device."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import benchmark

LEAST_RUNS = 3
MOST_RUNS = 30
GIB = 2**30


class Times(NamedTuple):
    """Milliseconds of several runs: the median, and the middle 60% of them."""

    median: float
    low: float
    high: float


def spread(milliseconds: Sequence[float]) -> Times:
    """Median and the range of the middle 60%.

    >>> spread([3.0, 1.0, 2.0, 9.0, 4.0])
    Times(median=3.0, low=2.0, high=4.0)
    """
    ordered = sorted(milliseconds)
    cut = len(ordered) // 5
    return Times(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def time_call(call: Callable[[], object], device: torch.device, budget: float) -> Times:
    """Times of ``call`` after a warm-up, for about ``budget`` milliseconds of runs, three at least."""
    return _time_on_cuda(call, budget) if device.type == "cuda" else _time_on_cpu(call, budget)


def _time_on_cuda(call: Callable[[], object], budget: float) -> Times:
    """With events, as triton.testing.do_bench does, which however runs a call of seconds eight times at least."""
    call()
    first = _events(call, 1)
    runs = max(LEAST_RUNS, min(MOST_RUNS, int(budget / first[0])))
    # The first counts where there are few: a call of seconds is not made once more for nothing.
    return spread(_events(call, runs) if runs > LEAST_RUNS else first + _events(call, runs - 1))


def _events(call: Callable[[], object], runs: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _time_on_cpu(call: Callable[[], object], budget: float) -> Times:
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    first = 1e3 * timer.timeit(1).median
    runs = max(LEAST_RUNS, min(MOST_RUNS, int(budget / first)))
    return spread([1e3 * timer.timeit(1).median for _ in range(runs)])


class Memory(NamedTuple):
    """GiB beyond what was allocated before a forward and its backward.

    Attributes:
        held: between the two, the output included.
        peak: at most, output and gradients included.
    """

    held: float
    peak: float


def memory_beyond(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Sequence[Tensor]], device: torch.device
) -> Memory | None:
    """What a forward and the backward of its output take; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    held = torch.cuda.memory_allocated() - before
    grads = backward(out)
    torch.cuda.synchronize()
    del out, grads
    return Memory(held / GIB, (torch.cuda.max_memory_allocated() - before) / GIB)


def matrix_product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on random numbers: the ceiling that shares are given of."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_call(lambda: a @ b, device, budget=200).median / 1e9
