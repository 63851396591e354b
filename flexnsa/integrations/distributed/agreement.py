"""Every rank is asked what it holds before anything is sharded, so that a difference is an error and not a hang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flexnsa.layer import NativeSparseAttention

OPTIONS = ("num_heads", "num_kv_heads", "head_dim", "value_dim", "rope_theta", "compress_rotated")


def check_mesh(mesh: DeviceMesh) -> None:
    """``mesh`` has one axis.

    Raises:
        ValueError: it has several.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one axis, got {mesh.ndim}: {mesh.mesh_dim_names or tuple(mesh.shape)}; slice it by the "
            f"axis's name, as in mesh['tp']"
        )


def check_alike(what: str, mine: Mapping[str, Any], mesh: DeviceMesh) -> None:
    """Every rank of ``mesh`` holds the same facts: a collective, after which all ranks go on or none.

    Args:
        what: what the facts are about, for the message.
        mine: this rank's facts by name, small and picklable.
        mesh: of one axis.

    Raises:
        ValueError: some differ; raised on every rank, and the same everywhere.
    """
    every: list[Mapping[str, Any]] = [{}] * mesh.size()
    dist.all_gather_object(every, dict(mine), group=mesh.get_group())
    names = dict.fromkeys(name for facts in every for name in facts)
    differing = [name for name in names if any(facts.get(name) != every[0].get(name) for facts in every)]
    if not differing:
        return
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{facts.get(name)!r} on rank {rank}" for rank, facts in enumerate(every))
        for name in differing[:4]
    )
    raise ValueError(f"{what} must be alike on all {mesh.size()} ranks of the mesh, got {shown}; give each the same")


def facts_of(layer: nn.Module) -> dict[str, Any]:
    """What must be alike on all ranks about a layer: its type, geometry, sizes, parameters, and where they are."""
    facts: dict[str, Any] = {"type": type(layer).__name__}
    if isinstance(layer, NativeSparseAttention):
        facts |= {f"config.{name}": size for name, size in asdict(layer.config).items()}
        facts |= {name: getattr(layer, name) for name in OPTIONS}
        facts["impl"] = layer.attention.impl
        facts["compressor"] = type(layer.compressor).__name__
    return facts | {name: _outline(parameter) for name, parameter in layer.named_parameters()}


def check_layer(layer: nn.Module, mesh: DeviceMesh, options: Mapping[str, Any]) -> NativeSparseAttention:
    """``layer`` is a ``NativeSparseAttention``, the same on every rank of ``mesh``, and so are the ``options``.

    Raises:
        TypeError: it is another module.
        ValueError: the mesh has several axes, or the ranks' layers differ.
    """
    check_mesh(mesh)
    check_alike("the layer", facts_of(layer) | dict(options), mesh)
    if not isinstance(layer, NativeSparseAttention):
        raise TypeError(
            f"the layer must be a NativeSparseAttention, got {type(layer).__name__}; name the attention itself in the "
            f"plan, as in 'layers.*.attention'"
        )
    return layer


def _outline(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device.type}"
