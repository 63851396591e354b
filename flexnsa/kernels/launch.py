"""Launches that spare the host what Triton does anew each time: bind, specialize and hash every argument.

That takes the host tens of microseconds for a kernel of 40 arguments, longer than many of these kernels run.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from flexnsa.kept import unobserved

_KEPT = 1024
"""Variants of a kernel that are remembered: exact strides are part of what tells them apart."""


def ceil_div(x: int, y: int) -> int:
    """``x / y`` rounded up. Triton's ``cdiv`` can be called in a kernel too, and takes microseconds for that."""
    return -(-x // y)


def next_power(x: int) -> int:
    """The least power of two from ``x >= 1`` on."""
    return 1 << (x - 1).bit_length()


def computable(x: Tensor) -> Tensor:
    """``x``, widened on a CPU: Triton's interpreter multiplies bfloat16 matrices as integers."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def is_watched(*tensors: Tensor) -> bool:
    """Whether a call has to go through the dispatcher, which takes the host as long as launching a kernel.

    Gradients need it, and whoever looks on: modes (those that count FLOPs, say), traces, transforms, subclasses.
    """
    return torch.is_grad_enabled() or not unobserved() or any(type(x) is not Tensor for x in tensors)


class Kernel:
    """A Triton kernel, launched as one, ``kernel[grid](*arguments, **constants)``.

    Arguments are the leading parameters in their order, tensors first; constants are all constexprs and Triton's
    options. What a launch was compiled to is remembered by all that Triton would look at: dtypes of tensors, whole
    numbers that it specializes on, and constants. Later launches of the kind go straight to the driver. Numbers that it
    was told not to specialize on must fit 32 bits.
    """

    def __init__(self, function: Any):
        self.function = function
        self._tensors = 0
        self._specialized: Callable[[tuple[Any, ...]], Any] | None = None
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """A call that launches a program for each point of the grid, on the device of the first tensor."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if not arguments[0].is_cuda:
            self.function[grid](*arguments, **constants)
            return
        if self._specialized is None:
            self._look_at(arguments)
        assert self._specialized is not None
        tensors, places, joined = arguments[: self._tensors], [], 0
        for x in tensors:
            places.append(place := x.data_ptr())
            joined |= place
        aligned = joined % 16 == 0
        device = tensors[0].get_device()
        key = (device, self._specialized(arguments), tuple(constants.items()), tuple([x.dtype for x in tensors]))
        known = self._compiled.get(key) if aligned else None
        if known is not None:
            compiled, rest = known
            compiled[(*grid, 1, 1)](*places, *arguments[self._tensors :], *rest)
            return
        compiled = self.function[grid](*arguments, **constants)
        if aligned and not hasattr(compiled, "result"):
            if len(self._compiled) >= _KEPT:
                self._compiled.clear()
            names = self.function.arg_names[len(arguments) :]
            self._compiled[key] = compiled, tuple(constants[name] for name in names)

    def _look_at(self, arguments: tuple[Any, ...]) -> None:
        """Which arguments are tensors, and which numbers Triton specializes on."""
        self._tensors = sum(isinstance(x, Tensor) for x in arguments)
        keyed = [
            place
            for place, (parameter, x) in enumerate(zip(self.function.params, arguments, strict=False))
            if isinstance(x, int) and not parameter.do_not_specialize
        ]
        # A getter of one item alone would return no tuple, and there is none of no item.
        self._specialized = itemgetter(*keyed) if len(keyed) > 1 else lambda x: tuple([x[i] for i in keyed])
