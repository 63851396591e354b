"""Tensor parallelism by KV group: each rank holds whole groups, so that a group's selection stays on one rank."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from flexnsa.gating import SigmoidGate
from flexnsa.integrations.distributed.agreement import check_layer
from flexnsa.layer import NativeSparseAttention
from flexnsa_masks import MaskMod

PLACEMENTS: dict[str, Placement] = {
    "q_proj.weight": Shard(0),
    "k_proj.*.weight": Shard(0),
    "v_proj.*.weight": Shard(0),
    "attention.gate.proj.*": Shard(0),
    "compressor.*": Shard(0),
    "q_norm.weight": Replicate(),
    "k_norm.*.weight": Replicate(),
    "o_proj.weight": Shard(1),
}
"""Where each parameter of the layer goes: q, k, v and gate columnwise, o rowwise, compressors by head."""


class KVGroupParallel(ParallelStyle):
    """Shards a ``NativeSparseAttention`` by KV group: a plan for ``torch.distributed.tensor.parallel``.

    ``parallelize_module(model, mesh["tp"], {"layers.*.attention": KVGroupParallel()})``

    A rank of degree r holds hk / r KV heads with the query heads, gates and compressor parameters that belong to them,
    as DTensors by ``PLACEMENTS``; it computes on its shards as plain tensors, so every engine runs as on one rank, and
    scores, selections and LSEs never leave it. There is one all-reduce of ``[b, t, dim]`` in the forward (the sum over
    heads in o) and one in the backward (the gradient of x), or all-gathers and reduce-scatters for a sharded layout.
    Afterwards ``num_heads`` and ``num_kv_heads`` of the layer count this rank's heads, as a cache of it must.

    Parameters start as those of the mesh's first rank. ``fully_shard`` comes after this, on the other axis of the mesh.

    Args:
        input_layout: how x lies on the mesh: ``Replicate()``, or ``Shard(1)`` for sequence parallelism around it.
        output_layout: how the output shall lie, likewise.
        use_local_output: return the local tensor; else a DTensor.

    Raises:
        TypeError: the module is no ``NativeSparseAttention``.
        ValueError: the degree does not divide the KV heads, the mesh has several axes, or the ranks' layers differ;
            on every rank.
        NotImplementedError: the layer has a parameter that ``PLACEMENTS`` does not know how to shard.
    """

    def __init__(
        self,
        *,
        input_layout: Placement | None = None,
        output_layout: Placement | None = None,
        use_local_output: bool = True,
    ):
        self.input_layout = Replicate() if input_layout is None else input_layout
        self.output_layout = Replicate() if output_layout is None else output_layout
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layouts = {"input_layout": str(self.input_layout), "output_layout": str(self.output_layout)}
        layer, degree = check_layer(module, device_mesh, layouts), device_mesh.size()
        if layer.num_kv_heads % degree:
            raise ValueError(
                f"the tensor-parallel degree must divide num_kv_heads={layer.num_kv_heads}, got a mesh of {degree} "
                f"ranks; a KV group cannot be split, so use a degree among {_divisors(layer.num_kv_heads)}"
            )
        placements = _placements(layer)
        owners = {name.rpartition(".")[0] for name in placements}
        for name, placement in placements.items():
            self._distribute(layer, name, placement, device_mesh)
        for path in owners:
            _compute_on_shards(layer.get_submodule(path))
        first_head = device_mesh.get_local_rank() * (layer.num_heads // degree)
        layer.num_heads, layer.num_kv_heads = layer.num_heads // degree, layer.num_kv_heads // degree
        if hasattr(layer.compressor, "num_kv_heads"):
            layer.compressor.num_kv_heads = layer.num_kv_heads
        layer.register_forward_pre_hook(partial(self._enter, device_mesh, first_head), with_kwargs=True)
        layer.register_forward_hook(partial(self._leave, device_mesh))
        return layer

    def _distribute(self, layer: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
        path, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(path)
        whole = owner.get_parameter(leaf)
        sharded = distribute_tensor(whole, mesh, [placement], src_data_rank=self.src_data_rank)
        owner.register_parameter(leaf, nn.Parameter(sharded, requires_grad=whole.requires_grad))

    def _enter(
        self, mesh: DeviceMesh, first_head: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """x whole on every rank, its gradient summed over the ranks' heads; a mask mod that sees the true head."""
        x, *others = args if args else (kwargs.pop("x"),)
        x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.input_layout])
        x = x if x.placements == (Replicate(),) else x.redistribute(placements=[Replicate()])
        x = x.to_local(grad_placements=[Partial()])
        if kwargs.get("mask_mod") is not None:
            kwargs["mask_mod"] = _from_head(kwargs["mask_mod"], first_head)
        return (x, *others), kwargs

    def _leave(self, mesh: DeviceMesh, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        summed = DTensor.from_local(out, mesh, [Partial()]).redistribute(placements=[self.output_layout])
        return summed.to_local() if self.use_local_output else summed


def _placements(layer: NativeSparseAttention) -> dict[str, Placement]:
    """The placement of each parameter by its name."""
    if not isinstance(layer.attention.gate, SigmoidGate):
        raise NotImplementedError(
            f"the gate must be a SigmoidGate to be sharded by head, got {type(layer.attention.gate).__name__}; "
            f"parallelize such a layer with a ParallelStyle of your own"
        )
    found: dict[str, Placement] = {}
    for name, parameter in layer.named_parameters():
        placement = next((place for pattern, place in PLACEMENTS.items() if fnmatch(name, pattern)), None)
        by_head = not name.startswith("compressor.") or parameter.shape[:1] == (layer.num_kv_heads,)
        if placement is None or not by_head:
            raise NotImplementedError(
                f"the parameter {name} of shape {tuple(parameter.shape)} has no known shard for each of the "
                f"{layer.num_kv_heads} KV heads; a compressor's parameters need KV heads as their first axis, and no "
                f"module but the layer's own can be sharded"
            )
        found[name] = placement
    return found


def _compute_on_shards(module: nn.Module) -> None:
    """Let the forward of ``module`` see this rank's shards as plain tensors.

    To all others its parameters are DTensors, as FSDP, optimizers and checkpoints need to know.
    """
    cls = type(module)

    def forward(self: nn.Module, *args: Any) -> Any:
        sharded = dict(self._parameters)
        self._parameters.update({name: None if x is None else _local(x) for name, x in sharded.items()})
        try:
            return cls.forward(self, *args)
        finally:
            self._parameters.update(sharded)

    module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _local(parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter.placements == (Replicate(),):
        # Each rank adds its own heads' part of the gradient.
        return parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return parameter.to_local()


def _from_head(mask_mod: MaskMod, first: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def counted_from_the_first(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h + first, q_idx, kv_idx)

    return counted_from_the_first


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
