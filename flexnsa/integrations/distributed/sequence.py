"""Which tokens of a sequence a rank holds, contiguous or balanced, and the way from the whole to the parts and back."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from flexnsa.integrations.distributed.agreement import check_mesh


def sequence_positions(
    tokens: int, mesh: DeviceMesh, *, balanced: bool = True, device: torch.device | None = None
) -> Int64[Tensor, " tq"]:
    """Where this rank's tokens stand in a sequence of ``tokens``, in increasing order.

    A late query sees more compressed tokens than an early one. Balanced shards even that out: the sequence is cut into
    two chunks a rank, and rank i of r holds the i-th from the start and the i-th from the end. Contiguous shards are
    r equal runs.

    Args:
        tokens: tokens of the whole sequence, a multiple of 2 r, or of r for contiguous shards.
        mesh: the ranks of the sequence, one axis.
        balanced: whether the shards are balanced (head and tail) or contiguous.
        device: of the result, None for the CPU.

    Returns:
        int64 ``[tokens / r]``.

    Raises:
        ValueError: the tokens cannot be cut evenly, or the mesh has several axes.
    """
    check_mesh(mesh)
    return _layout(tokens, mesh.size(), balanced, device)[mesh.get_local_rank()]


def shard_sequence(x: Tensor, mesh: DeviceMesh, *, dim: int = 1, balanced: bool = True) -> Tensor:
    """This rank's part of a tensor that every rank of ``mesh`` holds: of inputs, and of labels.

    Raises:
        ValueError: as ``sequence_positions``.
    """
    positions = sequence_positions(x.shape[dim], mesh, balanced=balanced, device=x.device)
    return x.index_select(dim, positions)


def gather_sequence(x: Tensor, mesh: DeviceMesh, *, dim: int = 1, balanced: bool = True) -> Tensor:
    """The whole of a tensor of which every rank holds its part, in the sequence's order.

    The gradient is reduce-scattered: a part gets the sum of what all ranks ask of it.

    Raises:
        ValueError: as ``sequence_positions``.
    """
    check_mesh(mesh)
    whole = DTensor.from_local(x, mesh, [Shard(dim)]).redistribute(placements=[Replicate()])
    gathered = whole.to_local(grad_placements=[Partial()])
    if not balanced:
        return gathered
    layout = _layout(gathered.shape[dim], mesh.size(), balanced, x.device)
    return gathered.index_select(dim, layout.flatten().argsort())


def _layout(tokens: int, ranks: int, balanced: bool, device: torch.device | None) -> Int64[Tensor, "r tq"]:
    """The positions that each rank holds."""
    parts = 2 * ranks if balanced else ranks
    if tokens < 1 or tokens % parts:
        kind = "balanced" if balanced else "contiguous"
        raise ValueError(
            f"a sequence in {kind} shards over {ranks} ranks must be a multiple of {parts} tokens, got {tokens}; pad "
            f"it on the right and mark the padding with documents=-1"
        )
    index = torch.arange(tokens, device=device).unflatten(0, (parts, -1))
    return torch.cat((index[:ranks], index[ranks:].flip(0)), 1) if balanced else index
