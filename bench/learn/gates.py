"""Gates that leave a branch out of NSA: always, or in some rows of a training step."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flexnsa import BranchKV


class WithoutBranch(nn.Module):
    """A gate that is 0 for one branch: it adds nothing to the output, but its scores still choose the blocks."""

    kept: Tensor

    def __init__(self, gate: Callable[[Tensor], Tensor], branch: str):
        super().__init__()
        self.gate = gate
        self.register_buffer("kept", _all_but(branch), persistent=False)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b h t branches"]:
        """The gate's values, one of them replaced."""
        return self.gate(x) * self.kept


class RowsWithoutSelected(nn.Module):
    """A gate that is 0 for the selected branch in the first rows of a batch while ``dropping`` is set.

    In those rows the compressed branch has to answer, which only an attention that finds the right block can: so the
    scores that choose the blocks go on learning where the selected branch would otherwise answer in their place.

    Attributes:
        dropping: whether to leave it out at all; validation does not.
        share: of the rows; may change between replays of a CUDA graph.
    """

    kept: Tensor
    share: Tensor

    def __init__(self, gate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate = gate
        self.dropping = False
        self.register_buffer("kept", _all_but("selected"), persistent=False)
        self.register_buffer("share", torch.zeros(()), persistent=False)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b h t branches"]:
        """The gate's values, some of them replaced."""
        gates = self.gate(x)
        if not self.dropping:
            return gates
        first = torch.arange(len(gates), device=gates.device) < self.share * len(gates)
        return torch.where(first[:, None, None, None], gates * self.kept, gates)


def _all_but(branch: str) -> Tensor:
    """1 for each branch, 0 for this one."""
    return torch.tensor([float(name != branch) for name in BranchKV._fields])
