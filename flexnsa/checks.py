"""Bad input is refused here, before any work is done: the argument, what was expected, what came, the remedy."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from flexnsa.types import accumulator
from flexnsa_masks import MaskMod, ScoreMod

_debug = contextvars.ContextVar("flexnsa_debug", default=False)


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """Check values (positions, documents, indices) on CUDA tensors too, at the price of a synchronisation each.

    On CPU tensors they are always checked. Shapes, dtypes and devices are checked everywhere.

    >>> with debug():
    ...     pass
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` may be read: never while tracing or mapping, on CUDA only inside ``debug()``."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or _debug.get()


def known_finite(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read and are all finite; a sum that overflows leaves it unknown."""
    return values_are_checked(x) and math.isfinite(x.detach().sum(dtype=accumulator(x)).item())


def check_tensor(name: str, x: object, axes: str) -> None:
    """``x`` is a floating-point tensor with the named axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [{axes.replace(' ', ', ')}], got {type(x).__name__}")
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name} must have the axes [{axes}], got shape {tuple(x.shape)}; reshape it")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it, e.g. {name}.float()")


def check_not_empty(name: str, x: Tensor, axes: str) -> None:
    """No axis of ``x`` has length 0."""
    for axis, size in zip(axes.split(), x.shape, strict=True):
        if size == 0:
            raise ValueError(f"{name} is empty along {axis}, got shape {tuple(x.shape)}; pass at least one element")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` has the dtype and device of ``other``."""
    for what in ("dtype", "device"):
        if getattr(x, what) != getattr(other, what):
            raise ValueError(
                f"{name} must have the {what} of {other_name}, {getattr(other, what)}, got {getattr(x, what)}; "
                f"convert one of them with .to()"
            )


def check_qk(q: Tensor, k: Tensor, k_name: str = "k", *, k_axis: str = "tk") -> None:
    """Queries and keys fit each other: rank, dtype, device, batch, heads, key dim."""
    check_tensor("q", q, "b hq tq d")
    check_not_empty("q", q, "b hq tq d")
    check_tensor(k_name, k, f"b hk {k_axis} d")
    check_like(k_name, k, "q", q)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{k_name} must have q's batch {q.shape[0]}, got {k.shape[0]}; expand or slice it")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q's heads must be a multiple of {k_name}'s, got {q.shape[1]} query heads and {k.shape[1]} KV heads; "
            f"change the head counts"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{k_name} must have q's key dim {q.shape[3]}, got {k.shape[3]}; project both to one size")


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str] = ("k", "v"), *, k_axis: Literal["tk", "c"] = "tk"
) -> None:
    """Queries, keys and values fit one another. Raw tokens (axis tk) are never empty; compressed ones (c) may be."""
    k_name, v_name = names
    check_qk(q, k, k_name, k_axis=k_axis)
    if k_axis == "tk":
        check_not_empty(k_name, k, "b hk tk d")
    check_tensor(v_name, v, f"b hk {k_axis} dv")
    check_like(v_name, v, "q", q)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{v_name} must share its first three axes with {k_name}, {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}; "
            f"every key needs one value"
        )
    if v.shape[3] == 0:
        raise ValueError(f"{v_name} is empty along dv, got shape {tuple(v.shape)}; pass at least one element")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """The compressed branch's LSE fits the queries."""
    check_tensor("lse", lse, "b hq tq")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have q's shape [b, hq, tq] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if lse.dtype != accumulator(q):
        raise ValueError(f"lse must be {accumulator(q)} for q of {q.dtype}, got {lse.dtype}; pass the branch's own LSE")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device {q.device}, got {lse.device}; move it with .to()")


def check_value_dims(dims: Mapping[str, int]) -> None:
    """The branches' values, by name of the branch, are of one size."""
    if len(set(dims.values())) > 1:
        raise ValueError(f"the branches' value dims must agree, got {dims}; their outputs are summed")


def check_gates(gates: Tensor, q: Tensor, branches: int) -> None:
    """One gate for each query head, token and branch."""
    check_tensor("gates", gates, "b hq tq branches")
    expected = (*q.shape[:3], branches)
    if tuple(gates.shape) != expected:
        raise ValueError(f"gates must be [b, hq, tq, {branches}] = {expected}, got {tuple(gates.shape)}")
    check_like("gates", gates, "q", q)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale: ``head_dim ** -0.5`` for None. Zero is a value; NaN and infinity are not."""
    if scale is None:
        return float(head_dim**-0.5)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}; pass a Python number")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; pass None for head_dim ** -0.5")
    return float(scale)


def check_mask_mod(mask_mod: MaskMod | None, like: Tensor) -> None:
    """``mask_mod`` takes the four arguments of a FlexAttention mask mod, on the device of ``like``, and says yes or no.

    Raises:
        TypeError: it cannot be called so, or returns something else than one bool a pair.
    """
    if mask_mod is None or torch.compiler.is_compiling():
        return
    _check_arity("mask_mod", mask_mod, ("b", "h", "q_idx", "kv_idx"))
    first = torch.zeros((), dtype=torch.int64, device=like.device)
    seen = mask_mod(first, first, first, first)
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.ndim != 0:
        got = f"{seen.dtype} {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(
            f"mask_mod must return a bool tensor, one value for each pair, got {got}; compare, do not score"
        )


def check_score_mod(score_mod: ScoreMod | None) -> None:
    """``score_mod`` takes the five arguments of a FlexAttention score mod.

    Raises:
        TypeError: it cannot be called so.
    """
    if score_mod is not None:
        _check_arity("score_mod", score_mod, ("score", "b", "h", "q_idx", "kv_idx"))


def _check_arity(name: str, mod: Callable[..., Tensor], arguments: tuple[str, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    try:
        inspect.signature(mod).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must be callable as {name}({', '.join(arguments)}): {error}") from None
