"""Which engine runs a call: decided from device, dtype and shapes, never from values, and never overruled silently."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "flex", "reference"]
"""The values of ``impl``."""

Stage = Literal["compressed", "selection", "selected", "window"]

ENGINES: tuple[Literal["triton", "flex", "reference"], ...] = ("triton", "flex", "reference")
"""In the order in which ``impl="auto"`` tries them."""


class Choice(NamedTuple):
    """The engine that a stage takes, and why.

    Attributes:
        stage: ``compressed``, ``selection``, ``selected`` or ``window``.
        engine: ``triton``, ``flex`` or ``reference``.
        reason: what ruled out the engines before it, or that it was asked for.
    """

    stage: Stage
    engine: Literal["triton", "flex", "reference"]
    reason: str


def choose(impl: Impl, stage: Stage, *tensors: Tensor) -> Choice:
    """The engine of one stage for inputs like ``tensors``.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: the engine asked for cannot run this call; the message says why and what can.
    """
    if impl == "auto":
        reasons: list[str] = []
        for engine in ENGINES:
            obstacle = _auto_obstacle(engine, stage, tensors)
            if obstacle is None:
                return Choice(stage, engine, "; ".join(reasons) or "the fastest engine runs this call")
            reasons.append(f"{engine}: {obstacle}")
    if impl not in ENGINES:
        raise ValueError(f'impl must be one of "auto", {", ".join(map(repr, ENGINES))}, got {impl!r}')
    obstacle = _obstacle(impl, stage, tensors)
    if obstacle is not None:
        raise NotImplementedError(
            f'impl="{impl}" cannot run the {stage} stage: {obstacle}; use impl="auto" or impl="reference"'
        )
    return Choice(stage, impl, "asked for")


def explain(*tensors: Tensor, impl: Impl = "auto") -> list[Choice]:
    """Which engine each stage takes for inputs like ``tensors`` (q, and k, v where at hand), and why.

    >>> for choice in explain(torch.zeros(1, 2, 8, 16)):
    ...     print(choice.stage, choice.engine)
    compressed reference
    selection reference
    selected reference
    window reference

    Raises:
        NotImplementedError: ``impl`` names an engine that cannot run such a call.
    """
    stages: tuple[Stage, ...] = ("compressed", "selection", "selected", "window")
    return [choose(impl, stage, *tensors) for stage in stages]


def _auto_obstacle(engine: str, stage: Stage, tensors: tuple[Tensor, ...]) -> str | None:
    if engine != "reference" and tensors[0].device.type != "cuda":
        return f"not chosen on {tensors[0].device.type}"
    return _obstacle(engine, stage, tensors)


def _obstacle(engine: str, stage: Stage, tensors: tuple[Tensor, ...]) -> str | None:
    """Why ``engine`` cannot run the stage, or None."""
    if engine == "reference":
        return None
    return _flex_obstacle(tensors) if engine == "flex" else _triton_obstacle()


def _triton_obstacle() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return "its kernels are not part of this version"


def _flex_obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "cuda":
        return None if dtype != torch.float64 else "FlexAttention has no float64 kernel on CUDA"
    if device != "cpu":
        return f"FlexAttention runs on cuda and cpu, not on {device}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "FlexAttention has no backward on a CPU (call it under torch.no_grad() for the forward)"
    return None
