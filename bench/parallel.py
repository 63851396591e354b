"""Several processes of one run: parameters sharded by FSDP2, a batch's rows shared out, sums where they meet.

One process is the case of one rank: nothing is sharded and nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad

from flexnsa.integrations.distributed.agreement import check_alike

PATIENCE = timedelta(minutes=5)
"""A rank that waits longer than this for the others gives up, with an error."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: this process, from 0.
        count: all of them.
        mesh: the axis over which parameters are sharded; None for a single process that nobody started as one of many.
    """

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def agree(self, facts: Mapping[str, Any]) -> None:
        """All processes were given the same.

        Raises:
            ValueError: they were not; on every rank.
        """
        if self.mesh is not None:
            check_alike("the run", facts, self.mesh)

    def shard(self, *modules: nn.Module) -> None:
        """Shard each in turn, inner ones first. Whole parameters are freed after the backward only: they are few."""
        if self.mesh is not None:
            for module in modules:
                fully_shard(module, mesh=self.mesh, reshard_after_forward=False)

    def rows(self, x: Tensor, filler: int = 0) -> Tensor:
        """This rank's rows of ``x [b, t]``; as many on each rank, the last filled up with rows of ``filler``."""
        missing = -len(x) % self.count
        return pad(x, (0, 0, 0, missing), value=filler).chunk(self.count)[self.rank]

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        if self.mesh is None:
            return x
        summed = x.clone()
        dist.all_reduce(summed, group=self.mesh.get_group())
        return summed

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` holds on any rank: where it ends a loop, all ranks leave it at once."""
        return flag if self.mesh is None else bool(self.total(torch.tensor(float(flag), device=device)))


ALONE = Ranks()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: where ``torchrun`` started several, the GPU of its number on this machine.

    Raises:
        ValueError: they were all given one GPU.
    """
    if device.type != "cuda" or not dist.is_torchelastic_launched():
        return device
    if device.index is not None:
        raise ValueError(f"--device must be cuda where torchrun gives each process a GPU of its own, got {device}")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes of this run while the block lasts: joined by gloo on CPUs, NCCL on GPUs."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    yield Ranks(dist.get_rank(), dist.get_world_size(), mesh)
    # After an error the group is left as it is: saying goodbye would wait for ranks that may never come.
    dist.destroy_process_group()
