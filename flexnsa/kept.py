"""Small tensors that are the same in every call, kept between calls on CUDA, where to make them takes launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def unobserved() -> bool:
    """Whether operations just run: no trace, transform or mode (one that counts FLOPs, say) sees or replaces them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def kept(size: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Keep what ``make(*numbers, device)`` returns, for the ``size`` latest sets of arguments; it is only to be read.

    On CUDA, that is, by stream, since another stream would have to wait for it, and only real tensors: what a transform
    wraps, a mode replaces or a CUDA graph's capture will compute later is made anew.
    """

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        @functools.lru_cache(maxsize=size)
        def remembered(stream: int, *arguments: Any) -> Made:
            with torch.inference_mode(False):  # what a validation makes, training must be able to save for its backward
                return make(*arguments)

        @functools.wraps(make)
        def get(*arguments: Any) -> Made:
            stream = _stream(arguments[-1]) if unobserved() else None
            return make(*arguments) if stream is None else remembered(stream, *arguments)

        return get

    return decorate


def _stream(device: torch.device) -> int | None:
    """The current stream's number; None off CUDA, and while a CUDA graph is captured."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)  # to make a Stream takes longer than all else here
