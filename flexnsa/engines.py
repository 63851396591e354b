"""Which engine runs a call: decided from device, dtype and shapes, never from values, and never overruled silently."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Impl = Literal["auto", "triton", "flex", "reference"]
"""The values of ``impl``."""

Engine = Literal["triton", "flex", "reference"]

Stage = Literal["compressed", "selection", "selected", "window"]

ENGINES: tuple[Engine, ...] = ("triton", "flex", "reference")

AUTO: tuple[Engine, ...] = ("triton", "flex", "reference")
"""What ``impl="auto"`` tries, in order."""

# Read once: torch.compile traces through the choice of an engine, but not through a search of the path.
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MAX_HEAD_DIM = 256
"""Largest key or value dim of the Triton kernels."""

MAX_SELECTED = 64
"""Most blocks that the Triton top-n selects."""

COMPILATIONS = 64
"""Variants (head counts and dims, dtypes, with or without gradients) that an eager process may compile of one function.

Dynamo's own limit of 8 is soon reached by a process with several models, and ends in an error or in the slow path.
"""


class Choice(NamedTuple):
    """The engine that a stage takes, and why.

    Attributes:
        stage: ``compressed``, ``selection``, ``selected`` or ``window``.
        engine: ``triton``, ``flex`` or ``reference``.
        reason: what ruled out the engines before it, or that it was asked for.
    """

    stage: Stage
    engine: Engine
    reason: str


def choose(impl: Impl, stage: Stage, *tensors: Tensor, mods: bool = False, num_selected: int = 1) -> Choice:
    """The engine of one stage for inputs like ``tensors``; ``mods`` where a mask mod or a score mod changes it.

    ``num_selected`` is how many blocks the stage selects, where it does.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: the engine asked for cannot run this call; the message says why and what can.
    """
    if impl == "auto":
        obstacles: list[str] = []
        for candidate in AUTO:
            obstacle = _auto_obstacle(candidate, tensors, mods, num_selected)
            if obstacle is None:
                return Choice(stage, *_part(candidate, stage, tensors[0], "; ".join(obstacles) or "the fastest"))
            obstacles.append(f"{candidate}: {obstacle}")
    if impl not in ENGINES:
        raise ValueError(f'impl must be one of "auto", {", ".join(map(repr, ENGINES))}, got {impl!r}')
    obstacle = _obstacle(impl, tensors, mods, num_selected)
    if obstacle is not None:
        raise NotImplementedError(
            f'impl="{impl}" cannot run the {stage} stage: {obstacle}; use impl="auto" or impl="reference"'
        )
    return Choice(stage, *_part(impl, stage, tensors[0], "asked for"))


def explain(
    *tensors: Float[Tensor, "b heads tokens dim"], impl: Impl = "auto", mods: bool = False, num_selected: int = 1
) -> list[Choice]:
    """Which engine each stage takes for inputs like ``tensors`` (q, and k, v where at hand), and why.

    ``mods`` says that a mask mod or a score mod is given, ``num_selected`` how many blocks are selected.

    >>> for choice in explain(torch.zeros(1, 2, 8, 16)):
    ...     print(choice.stage, choice.engine)
    compressed reference
    selection reference
    selected reference
    window reference

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: ``impl`` names an engine that cannot run such a call.
    """
    if not tensors:
        raise ValueError("explain needs tensors like those of the call, got none; pass q, and k and v where at hand")
    stages: tuple[Stage, ...] = ("compressed", "selection", "selected", "window")
    return [
        choose(impl, stage, *tensors, mods=mods, num_selected=num_selected if stage == "selection" else 1)
        for stage in stages
    ]


def _part(engine: Engine, stage: Stage, q: Tensor, reason: str) -> tuple[Engine, str]:
    """What runs a stage when ``engine`` runs the call: not every engine has every stage."""
    if engine == "flex" and stage == "selection":
        return "reference", f"{reason}; flex scores in plain torch, a chunk of queries at a time"
    if engine == "triton" and stage in ("compressed", "window"):
        part: Engine = "flex" if q.device.type == "cuda" else "reference"
        return part, f"{reason}; triton leaves static masks to {part}"
    return engine, reason


def _auto_obstacle(engine: Engine, tensors: tuple[Tensor, ...], mods: bool, num_selected: int) -> str | None:
    if engine != "reference" and tensors[0].device.type != "cuda":
        return f"not chosen on {tensors[0].device.type}"
    return _obstacle(engine, tensors, mods, num_selected)


def _obstacle(engine: Engine, tensors: tuple[Tensor, ...], mods: bool, num_selected: int) -> str | None:
    """Why ``engine`` cannot run the call, or None."""
    if engine == "reference":
        return None
    if engine == "triton" and mods:
        return "its kernels take no mask_mod or score_mod"
    if engine == "triton" and num_selected > MAX_SELECTED:
        return f"its top-n selects up to {MAX_SELECTED} blocks, got num_selected={num_selected}"
    return _flex_obstacle(tensors) if engine == "flex" else _triton_obstacle(tensors)


def _triton_obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device != "cuda" and not (device == "cpu" and TRITON_INTERPRETED):
        return (
            f"its kernels need CUDA, got {device}; on a CPU they run only in Triton's interpreter, TRITON_INTERPRET=1"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, got {dtype}"
    widest = max(x.shape[-1] for x in tensors)
    return None if widest <= MAX_HEAD_DIM else f"its kernels take head dims up to {MAX_HEAD_DIM}, got {widest}"


def _flex_obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "cuda":
        return None if dtype != torch.float64 else "FlexAttention has no float64 kernel on CUDA"
    if device != "cpu":
        return f"FlexAttention runs on cuda and cpu, not on {device}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "FlexAttention has no backward on a CPU (call it under torch.no_grad() for the forward)"
    return None
