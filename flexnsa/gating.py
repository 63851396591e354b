"""The gates that mix the branches (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexnsa.engines import kernel_runs
from flexnsa.types import AttentionOutput

KERNEL_NUMBERS = 2**22
"""Numbers of an output from which on an eager call on CUDA mixes the branches by a kernel, in one pass over memory."""


class Gated(NamedTuple):
    """A branch's output whose gate waits in the backward: what comes back to it there is the gradient of the sum.

    Attributes:
        out: the output, not yet times its gate.
        lse: its LSE.
    """

    out: Tensor
    lse: Tensor


class Deferred(NamedTuple):
    """A branch whose output is not kept: it is computed when it is mixed in, and once more in the backward.

    Attributes:
        attend: computes the output.
    """

    attend: Callable[[], AttentionOutput]


def check_recompute(recompute: Collection[str], branches: Sequence[str]) -> None:
    """The branches to compute again are the last ones: no other reads an output that is not kept.

    Raises:
        ValueError: they are not.
    """
    if set(recompute) != set(branches[len(branches) - len(recompute) :]):
        raise ValueError(
            f"recompute must name the last of the branches {tuple(branches)}, one or more of them, got "
            f"{tuple(recompute)}; name every branch after the first recomputed one"
        )


def note_gate(gate: Float[Tensor, "b hq tq"], output: AttentionOutput) -> AttentionOutput | Gated:
    """The output with its gate, for ``combine``: called right after a branch ran, it saves memory in the backward.

    Autograd goes through what was done last first. A gate that is noted before the next branch runs is multiplied in
    when the backward of the next branch is done and its gradients are freed; else all branches' gradients, each as
    large as an output, are made before the first is used. What does not run by the kernel is returned as it is.
    """
    if not _by_kernel(gate, output):
        return output
    out = output.out if output.out.stride(-1) == 1 else output.out.contiguous()
    if not torch.is_grad_enabled():
        return Gated(out, output.lse)
    return Gated(_Weigh.apply(gate, out, output.lse), output.lse)


def combine(
    gates: Float[Tensor, "b hq tq branches"], outputs: Sequence[AttentionOutput | Gated | Deferred]
) -> Float[Tensor, "b hq tq dv"]:
    """``sum over branches c of g_c * out_c``, in the order of ``outputs``, the deferred ones last.

    A branch in which a query sees nothing adds 0 whatever its gate, so that a padding query outputs 0 though its gate
    may be NaN.

    >>> ones, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> outputs = [AttentionOutput(ones, lse), AttentionOutput(2 * ones, lse)]
    >>> combine(torch.tensor([0.25, 0.5]).reshape(1, 1, 1, 2), outputs)
    tensor([[[[1.2500, 1.2500]]]])
    """
    if not torch.is_grad_enabled():
        outputs = [output.attend() if isinstance(output, Deferred) else output for output in outputs]
    kept = [output for output in outputs if not isinstance(output, Deferred)]
    if len(kept) == len(outputs):
        return _mixed(gates, kept)
    # Summed outside of the checkpoints, which keep what they are given.
    parts = [_mixed(gates[..., : len(kept)], kept)] if kept else []
    for gate, output in zip(gates.split(1, dim=-1), outputs, strict=True):
        if isinstance(output, Deferred):
            attend = output.attend
            parts.append(checkpoint(_attend_gated, gate, attend, use_reentrant=False, preserve_rng_state=False))
    return sum(parts[1:], start=parts[0])


def _attend_gated(gate: Tensor, attend: Callable[[], AttentionOutput]) -> Tensor:
    return _mixed(gate, [attend()])


def _by_kernel(gate: Tensor, output: AttentionOutput) -> bool:
    out = output.out
    return kernel_runs(gate, out) and out.numel() >= KERNEL_NUMBERS and gate.dtype == out.dtype


def _mixed(gates: Tensor, outputs: Sequence[AttentionOutput | Gated]) -> Tensor:
    noted = [
        note_gate(gate, output) if isinstance(output, AttentionOutput) else output
        for gate, output in zip(gates.unbind(-1), outputs, strict=True)
    ]
    outs, lses = zip(*noted, strict=True)
    if not isinstance(noted[0], Gated):
        return _mix(gates, outs, lses)
    mixed: Tensor = _Sum.apply(gates.detach(), lses, *outs) if torch.is_grad_enabled() else _sum(gates, lses, outs)
    return mixed


def _mix(gates: Tensor, outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> Tensor:
    # Split, with an axis of length 1 that stays: of a gate's gradient, a sum whose strides it has yet to choose,
    # Inductor of torch 2.11 to 2.13 makes a view with other strides than it then chooses, and reads wrong numbers.
    first, *others = (
        gate.masked_fill((lse == -torch.inf).unsqueeze(-1), 0) * out
        for gate, out, lse in zip(gates.split(1, dim=-1), outs, lses, strict=True)
    )
    return sum(others, start=first)


def _sum(gates: Tensor, lses: Sequence[Tensor], outs: Sequence[Tensor]) -> Tensor:
    from flexnsa.kernels.gates import mix  # imports triton

    return mix(gates, outs, lses)


class _Weigh(torch.autograd.Function):
    """An output as it is; in the backward, the gradients of its gate and of itself from that of the weighted sum."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        ctx.save_for_backward(gate, out, lse)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from flexnsa.kernels.gates import weigh  # imports triton

        return *weigh(grad, *ctx.saved_tensors), None


class _Sum(torch.autograd.Function):
    """The weighted sum of outputs that went through ``_Weigh``, to each of which it hands its own gradient."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, lses: tuple[Tensor, ...], *outs: Tensor) -> Tensor:
        return _sum(gates, lses, outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return None, None, *(grad if needed else None for needed in ctx.needs_input_grad[2:])


class SigmoidGate(nn.Module):
    """A gate for each query head, token and branch: the sigmoid of a linear function of the layer's input.

    Args:
        dim: width of the layer's input.
        num_heads: query heads.
        num_branches: branches to mix.
    """

    def __init__(self, dim: int, num_heads: int, num_branches: int = 3):
        super().__init__()
        self.num_branches = num_branches
        self.proj = nn.Linear(dim, num_heads * num_branches)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b hq t branches"]:
        """Gate values in 0 .. 1, ``[b, hq, t, branches]``, for ``x [b, t, dim]``."""
        return self.proj(x).sigmoid().unflatten(-1, (-1, self.num_branches)).transpose(1, 2)
