"""torch.compile behind an eager call: once for the process and for all lengths, at little cost a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexnsa.engines import COMPILATIONS


def call_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, compiled.

    It must be a function of torch's or of this library's own, and find all that may change in its arguments: whether
    its module's globals are what they were is not checked, those of functions that it is given are.
    """
    compiled, config = _compile(function), torch._dynamo.config
    # By hand: config.patch makes a class in every call, which takes the host 100 us.
    limit = config.recompile_limit
    config.recompile_limit = max(limit, COMPILATIONS)
    try:
        return compiled(*args, **kwargs)
    finally:
        config.recompile_limit = limit


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # At the first call, not on import: torch.compile loads triton and takes a second.
    return torch.compile(function, dynamic=True, fullgraph=True, options={"guard_filter_fn": _needed})


def _needed(guards: Sequence[Any]) -> list[bool]:
    """All checks but those that torch's modules and functions are still the same, which are half of them, and slow."""
    return [not guard.is_global or _is_foreign(guard.name) for guard in guards]


def _is_foreign(name: str) -> bool:
    """Whether a guard's name begins with the globals of a module that is neither torch's nor the function's own."""
    imported = "___unnamed_scope" in name or "__import_" in name
    return imported and not any(known in name for known in ("__import_torch_dot_", "__import_typing"))
