"""Which engine runs a call: decided from device, dtype and shapes, never from values, and never overruled silently."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flexnsa_masks import MaskMod, interval_of
from flexnsa_masks.geometry import name_of

Impl = Literal["auto", "flash", "triton", "flex", "reference"]
"""The values of ``impl``."""

Engine = Literal["flash", "triton", "flex", "reference"]

Stage = Literal["compressed", "selection", "selected", "window"]

STATIC: tuple[Stage, ...] = ("compressed", "window")
"""The stages whose masks follow from the lengths alone, unless documents, positions or mods change them."""

ENGINES: tuple[Engine, ...] = ("flash", "triton", "flex", "reference")

AUTO: tuple[Engine, ...] = ("flash", "triton", "flex", "reference")
"""What ``impl="auto"`` tries, in order."""


def _flash_installed() -> bool:
    """Whether flash-attn-4 and what it runs on are there. FlashAttention-2 is a ``flash_attn`` too, slow to import."""
    package = find_spec("flash_attn")
    folders = () if package is None else package.submodule_search_locations or ()
    found = any(Path(folder, "cute", "interface.py").exists() for folder in folders)
    return found and all(find_spec(name) is not None for name in ("cutlass", "quack", "tvm_ffi"))


# Read once: torch.compile traces through the choice of an engine, but not through a search of the path.
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLASH_INSTALLED = _flash_installed()

MAX_HEAD_DIM = 256
"""Largest key or value dim of the Triton kernels."""

MIN_FLEX_DIM = 16
"""Smallest key and value dim that FlexAttention compiles for on CUDA."""

MAX_SELECTED = 64
"""Most blocks that the Triton top-n selects."""

FLASH_HEAD_DIMS = (64, 96, 128)
"""Head dims of FLASH's kernels whose tiles fit the block masks', forward and backward."""

FLASH_NUMBERS = 2**26
"""Numbers in q (64 heads of 128, 8,192 queries) from which on ``"auto"`` takes FLASH: the host launches it slowly."""

COMPILATIONS = 64
"""Variants (head counts and dims, dtypes, with or without gradients) that an eager process may compile of one function.

Dynamo's own limit of 8 is soon reached by a process with several models, and ends in an error or in the slow path.
"""


def kernel_runs(*tensors: Tensor) -> bool:
    """Whether an eager call on these may run a Triton kernel that no operator stands for: on plain tensors on CUDA.

    Traced by torch.compile it may not: Inductor fuses such work with what is around it.
    """
    if torch.compiler.is_compiling() or not TRITON_INSTALLED:
        return False
    return all(
        x.device.type == "cuda"
        and type(x) is Tensor
        and x.dtype != torch.float64
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors
    )


class Choice(NamedTuple):
    """The engine that a stage takes, and why.

    Attributes:
        stage: ``compressed``, ``selection``, ``selected`` or ``window``.
        engine: ``flash``, ``triton``, ``flex`` or ``reference``.
        reason: what ruled out the engines before it, or that it was asked for.
    """

    stage: Stage
    engine: Engine
    reason: str


class _Call(NamedTuple):
    """What the choice is made from."""

    tensors: tuple[Tensor, ...]
    mods: bool
    mask_mod: MaskMod | None
    num_selected: int
    static: bool
    lse_grad: bool

    @property
    def device(self) -> str:
        return self.tensors[0].device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def differentiated(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)


def choose(
    impl: Impl,
    stage: Stage,
    *tensors: Tensor,
    mods: bool = False,
    mask_mod: MaskMod | None = None,
    num_selected: int = 1,
    static: bool = True,
    lse_grad: bool = False,
) -> Choice:
    """The engine of one stage for inputs like ``tensors``, with ``mask_mod``; ``mods`` where a score mod changes it.

    ``num_selected`` is how many blocks the stage selects, where it does. ``static`` says that neither positions nor
    documents are given, ``lse_grad`` that the stage's LSE has to be differentiable.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: the engine asked for cannot run this call; the message says why and what can.
    """
    call = _Call(tensors, mods, mask_mod, num_selected, static, lse_grad)
    if impl == "auto":
        obstacles: list[str] = []
        for candidate in AUTO:
            if candidate == "flash" and stage not in STATIC:
                continue
            obstacle = _auto_obstacle(candidate, stage, call)
            if obstacle is None:
                return Choice(stage, *_part(candidate, stage, call, "; ".join(obstacles) or "the fastest"))
            obstacles.append(f"{candidate}: {obstacle}")
    if impl not in ENGINES:
        raise ValueError(f'impl must be one of "auto", {", ".join(map(repr, ENGINES))}, got {impl!r}')
    obstacle = _obstacle(impl, stage, call)
    if obstacle is not None:
        raise NotImplementedError(
            f'impl="{impl}" cannot run the {stage} stage: {obstacle}; use impl="auto" or impl="reference"'
        )
    return Choice(stage, *_part(impl, stage, call, "asked for"))


def explain(
    *tensors: Float[Tensor, "b heads tokens dim"],
    impl: Impl = "auto",
    mods: bool = False,
    mask_mod: MaskMod | None = None,
    num_selected: int = 1,
    static: bool = True,
    lse_grad: bool = False,
) -> list[Choice]:
    """Which engine each stage takes for inputs like ``tensors`` (q, and k, v where at hand), and why.

    >>> for choice in explain(torch.zeros(1, 2, 8, 16)):
    ...     print(choice.stage, choice.engine)
    compressed reference
    selection reference
    selected reference
    window reference

    Args:
        tensors: like those of the call: device, dtype, head dim and ``requires_grad`` are read.
        impl: as in the call.
        mods: whether a score mod is given, or a mask mod of which nothing is known.
        mask_mod: the mask mod; triton takes those that are an interval of keys.
        num_selected: how many blocks are selected.
        static: whether neither documents nor positions are given.
        lse_grad: as in the call of a stage; False in the whole function and the layer, which do not differentiate it.

    Returns:
        A ``Choice`` for each stage.

    Raises:
        ValueError: ``impl`` is unknown, or no tensors.
        NotImplementedError: ``impl`` names an engine that cannot run such a call.
    """
    if not tensors:
        raise ValueError("explain needs tensors like those of the call, got none; pass q, and k and v where at hand")
    stages: tuple[Stage, ...] = ("compressed", "selection", "selected", "window")
    return [
        choose(
            impl,
            stage,
            *tensors,
            mods=mods,
            mask_mod=mask_mod,
            num_selected=num_selected if stage == "selection" else 1,
            static=static,
            lse_grad=lse_grad,
        )
        for stage in stages
    ]


def _part(engine: Engine, stage: Stage, call: _Call, reason: str) -> tuple[Engine, str]:
    """What runs a stage when ``engine`` runs the call: not every engine has every stage."""
    if engine == "flex" and stage == "selection":
        return "reference", f"{reason}; flex scores in plain torch, a chunk of queries at a time"
    if engine == "triton" and stage in STATIC:
        part: Engine = "flex" if call.device == "cuda" and _flex_obstacle(call) is None else "reference"
        return part, f"{reason}; triton leaves static masks to {part}"
    if engine == "flash" and stage not in STATIC:
        return "triton", f"{reason}; flash leaves the selection and what reads it to triton"
    return engine, reason


def _auto_obstacle(engine: Engine, stage: Stage, call: _Call) -> str | None:
    if engine != "reference" and call.device != "cuda":
        return f"not chosen on {call.device}"
    obstacle = _obstacle(engine, stage, call)
    if engine == "flash" and obstacle is None and call.tensors[0].numel() < FLASH_NUMBERS:
        # Without the number that came: in a graph of all lengths naming it would fix the length.
        return f"chosen from {FLASH_NUMBERS} numbers in q on, got fewer"
    return obstacle


def _obstacle(engine: Engine, stage: Stage, call: _Call) -> str | None:
    """Why ``engine`` cannot run the call, or None."""
    if engine == "reference":
        return None
    if engine == "flex":
        return _flex_obstacle(call)
    return _flash_obstacle(call) if engine == "flash" and stage in STATIC else _triton_obstacle(call)


def _triton_obstacle(call: _Call) -> str | None:
    device, dtype = call.device, call.dtype
    if call.mods:
        return "its kernels take no score_mod, and no mask_mod but intervals of keys"
    if call.mask_mod is not None and interval_of(call.mask_mod) is None:
        return (
            f"its kernels take a mask_mod that is one interval of keys a query, as flexnsa_masks.with_interval says, "
            f"got {name_of(call.mask_mod)}, which does not say so"
        )
    if call.num_selected > MAX_SELECTED:
        return f"its top-n selects up to {MAX_SELECTED} blocks, got num_selected={call.num_selected}"
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device != "cuda" and not (device == "cpu" and TRITON_INTERPRETED):
        return (
            f"its kernels need CUDA, got {device}; on a CPU they run only in Triton's interpreter, TRITON_INTERPRET=1"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, got {dtype}"
    widest = max(x.shape[-1] for x in call.tensors)
    return None if widest <= MAX_HEAD_DIM else f"its kernels take head dims up to {MAX_HEAD_DIM}, got {widest}"


def _flash_obstacle(call: _Call) -> str | None:
    if call.device != "cuda":
        return f"its kernels need CUDA, got {call.device}"
    if not FLASH_INSTALLED:
        return 'flash-attn-4 is not installed (pip install --pre "flexnsa[flash]")'
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic, and torch.use_deterministic_algorithms is on"
    major = torch.cuda.get_device_properties(call.tensors[0].device).major
    if major != 9:
        return f"its kernels are used on Hopper, compute capability 9, got {major}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take float16 and bfloat16, got {call.dtype}"
    dims = sorted({x.shape[-1] for x in call.tensors})
    if len(dims) > 1 or dims[0] not in FLASH_HEAD_DIMS:
        known, got = (", ".join(map(str, x)) for x in (FLASH_HEAD_DIMS, dims))
        return f"it takes one head dim for keys and values, one of {known}, got {got}"
    if call.mods or call.mask_mod is not None or not call.static:
        return "it takes no documents, positions, mask_mod or score_mod"
    return "it has no gradient of the LSE (lse_grad=True)" if call.lse_grad and call.differentiated else None


def _flex_obstacle(call: _Call) -> str | None:
    device, dtype = call.device, call.dtype
    if device == "cuda":
        if dtype == torch.float64:
            return "FlexAttention has no float64 kernel on CUDA"
        narrowest = min(x.shape[-1] for x in call.tensors)
        return None if narrowest >= MIN_FLEX_DIM else f"it takes head dims from {MIN_FLEX_DIM} on CUDA, got {narrowest}"
    if device != "cpu":
        return f"FlexAttention runs on cuda and cpu, not on {device}"
    if call.differentiated:
        return "FlexAttention has no backward on a CPU (call it under torch.no_grad() for the forward)"
    return None
