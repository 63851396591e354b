"""The ways to spread a layer over ranks, each given the whole input and telling which part of it a rank holds."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from flexnsa import NativeSparseAttention
from flexnsa.integrations.distributed import ContextParallel, KVGroupParallel, shard_sequence

Part = Callable[[Tensor], Tensor]
"""This rank's part of a tensor ``[b, t, dim]``."""


def _alone(layer: NativeSparseAttention, mesh: DeviceMesh) -> Part:
    return lambda x: x


def _context(layer: NativeSparseAttention, mesh: DeviceMesh, *, balanced: bool, sharded: bool) -> Part:
    parallelize_module(layer, mesh, ContextParallel(balanced=balanced))
    if sharded:
        fully_shard(layer, mesh=mesh)
    return partial(shard_sequence, mesh=mesh, balanced=balanced)


def _tensor(layer: NativeSparseAttention, mesh: DeviceMesh) -> Part:
    parallelize_module(layer, mesh, KVGroupParallel())
    return lambda x: x


WAYS: Mapping[str, Callable[[NativeSparseAttention, DeviceMesh], Part]] = {
    "one": _alone,
    "context": partial(_context, balanced=True, sharded=False),
    "context-contiguous": partial(_context, balanced=False, sharded=False),
    "context-fsdp": partial(_context, balanced=True, sharded=True),
    "tensor": _tensor,
}
"""``one`` is the whole layer on every rank, each for itself: what the others are compared with."""
