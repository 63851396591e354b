"""Small tensors that are the same in every call, kept between calls on CUDA, where to make them takes launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def kept(size: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Keep what ``make(*numbers, device)`` returns, for the ``size`` latest arguments; it is only to be read.

    On CUDA, that is, and by stream, since another one would have to wait for it. Calls of a CUDA graph's capture, which
    compute nothing yet, make it anew.
    """

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        @functools.lru_cache(maxsize=size)
        def remembered(stream: int, *arguments: object) -> Made:
            with torch.inference_mode(False):  # what a validation makes, training must be able to save for its backward
                return make(*arguments)

        @functools.wraps(make)
        def get(*arguments: object) -> Made:
            device = arguments[-1]
            assert isinstance(device, torch.device)
            if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                return make(*arguments)
            # The stream's number, since to make a Stream takes longer than all else here.
            return remembered(torch._C._cuda_getCurrentRawStream(device.index), *arguments)

        return get

    return decorate
