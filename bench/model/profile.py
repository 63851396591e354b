"""Where the time of a training step goes, by the names of its kernels."""

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pkgutil import iter_modules
from typing import Any, NamedTuple

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flexnsa import kernels
from flexnsa.engines import TRITON_INSTALLED

KINDS: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"flash|fmha|sdpa|triton_tem"),
    "matrix products": re.compile(r"gemm|nvjet|cutlass|xmma|splitK|cublas"),
    "optimizer": re.compile(r"multi_tensor_apply|adam", re.IGNORECASE),
}
"""Of kernels' names. Unasked, Inductor has templates for FlexAttention alone."""

MOST_KERNELS = 25


class Spent(NamedTuple):
    """Milliseconds of a step on the GPU.

    Attributes:
        kinds: by kind of kernel, ``other`` for pointwise work, norms, copies and the rest.
        kernels: of the longest kernels, by name.
    """

    kinds: Mapping[str, float]
    kernels: Mapping[str, float]

    @property
    def attention_share(self) -> float:
        """Attention's kernels over all, 0 .. 1."""
        return self.kinds["attention"] / sum(self.kinds.values())


def profiled(step: Callable[[], Any]) -> Spent:
    """One step's kernels. What is fused with other work, such as rotations and gates, counts as other."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        step()
    times: Counter[str] = Counter()
    for event in found.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3
    return spent(times)


def spent(times: Mapping[str, float]) -> Spent:
    """Kernels' times by kind.

    >>> spent({"cudnn_generated_fort_native_sdpa_sm90_flash_fprop": 3.0, "nvjet_tst_128x256": 1.0}).attention_share
    0.75
    """
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, time in times.items():
        kinds[kind_of(name)] += time
    longest = sorted(times, key=lambda name: -times[name])[:MOST_KERNELS]
    return Spent(kinds, {name: times[name] for name in longest})


def kind_of(kernel: str) -> str:
    """The first kind whose pattern is found in the name; attention for flexnsa's own kernels."""
    if kernel in own_kernels():
        return "attention"
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), "other")


@functools.cache
def own_kernels() -> frozenset[str]:
    """Names of flexnsa's Triton kernels."""
    if not TRITON_INSTALLED:
        return frozenset()
    from triton.runtime.jit import KernelInterface

    modules = (importlib.import_module(f"{kernels.__name__}.{info.name}") for info in iter_modules(kernels.__path__))
    return frozenset(name for module in modules for name, x in vars(module).items() if isinstance(x, KernelInterface))
