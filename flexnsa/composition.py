"""Sparse attention as a composition: named branches, a selector that reads their scores, and a gate that mixes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from flexnsa import checks
from flexnsa.context import Attended, AttentionContext, Branch, Placing, Selector
from flexnsa.engines import Impl
from flexnsa.frames import Frames
from flexnsa.gating import Deferred, Gated, check_recompute, combine, note_gate
from flexnsa.types import KV, AttentionOutput, Positions, Selection
from flexnsa_masks import MaskMod


class SparseAttention(nn.Module):
    """Named branches over queries, keys and values, mixed by a gate; no projections of its own.

    NSA is the composition of a compressed, a selected and a window branch with an importance selector.

    >>> import torch
    >>> from flexnsa import CompressedBranch, MeanPool, NSAConfig, SigmoidGate, WindowBranch
    >>> config = NSAConfig(window=16)
    >>> attention = SparseAttention(
    ...     {"compressed": CompressedBranch(config, MeanPool(config)), "window": WindowBranch(config)},
    ...     gate=SigmoidGate(dim=32, num_heads=4, num_branches=2),
    ... )
    >>> q, k, x = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 50, 32)
    >>> attention(q, {"compressed": (k, k), "window": (k, k)}, x).shape
    torch.Size([1, 4, 50, 8])

    Args:
        branches: the branches by name, computed in this order.
        gate: ``gate(x) -> [b, hq, tq, branches]``, values in the order of the branches.
        selector: makes the selection when the first branch asks for it; None where none does.
        recompute: the last branches, by name, whose outputs are not kept for the backward but computed again there.
        impl: the engine of every stage.

    Raises:
        ValueError: no branches, a name that cannot be an attribute, or ``recompute`` names others than the last ones.
    """

    def __init__(
        self,
        branches: Mapping[str, Branch],
        gate: Callable[[Tensor], Tensor],
        *,
        selector: Selector | None = None,
        recompute: Collection[str] = (),
        impl: Impl = "auto",
    ):
        super().__init__()
        if not branches:
            raise ValueError("branches is empty; pass at least one branch by name")
        for name in branches:
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"branches has the name {name!r}, which cannot name a submodule; choose another one")
        self._order, self._frames = tuple(branches), Frames(branches)
        self.branch_modules = nn.ModuleDict({n: b for n, b in branches.items() if isinstance(b, nn.Module)})
        self._other_branches = {n: b for n, b in branches.items() if not isinstance(b, nn.Module)}
        check_recompute(recompute, self._order)
        self.recompute = self._order[len(self._order) - len(recompute) :]
        self.gate, self.selector, self.impl = gate, selector, impl

    @property
    def branches(self) -> dict[str, Branch]:
        """The branches by name, in the order in which they are computed."""
        found: dict[str, Any] = {**self._other_branches, **dict(self.branch_modules.items())}
        return {name: found[name] for name in self._order}

    def forward(
        self,
        q: Float[Tensor, "b hq tq d"],
        kv: Mapping[str, KV],
        x: Float[Tensor, "b tq dim"],
        *,
        positions: Positions | Mapping[str, Positions] | None = None,
        documents: Int[Tensor, "b tk"] | None = None,
        mask_mod: MaskMod | None = None,
        selection: Selection | None = None,
    ) -> Float[Tensor, "b hq tq dv"]:
        """Attend with every branch and mix.

        Args:
            q: queries ``[b, hq, tq, d]``.
            kv: for each branch its ``(k, v)``.
            x: what the gate is made from, ``[b, tq, dim]``.
            positions: int64 ``[tq]`` or ``[b, tq]`` or a range, None where ``tq == tk``; or one for each branch by
                name, where a branch holds a part of the tokens and counts from the first of them.
            documents: int ``[b, tk]``, -1 for padding.
            mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality, held by
                every branch: a compressed token is visible iff all its tokens are, a block is a candidate iff any is.
            selection: blocks to attend to instead of the selector's: replays a choice, another layer's perhaps.

        Returns:
            ``[b, hq, tq, dv]``.

        Raises:
            ValueError: the names, shapes or outputs do not fit.
            NotImplementedError: a branch does not hold what the call asks for, or its engine cannot.
        """
        kept = self._order[: len(self._order) - len(self.recompute)]
        placing = Placing(None, documents, mask_mod)
        noted: list[AttentionOutput | Gated] = []
        self._check(q, kv, positions, mask_mod)
        gates = self._gates(q, x)
        by_branch = dict(zip(self._order, gates.unbind(-1), strict=True))

        def note(name: str, output: AttentionOutput) -> None:
            noted.append(note_gate(by_branch[name], output))

        lse_grad = self._differentiates_lse()
        context = self._attend(kept, q, kv, x, placing, positions, selection, lse_grad=lse_grad, note=note)
        if self.recompute and self.selector is not None:
            context.given = context.selection  # made here, so that it is kept
        return combine(gates, [*noted, *(self._deferred(context, name, positions) for name in self.recompute)])

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        kv: Mapping[str, KV],
        x: Float[Tensor, "b tq dim"],
        *,
        positions: Positions | Mapping[str, Positions] | None = None,
        documents: Int[Tensor, "b tk"] | None = None,
        mask_mod: MaskMod | None = None,
        selection: Selection | None = None,
    ) -> AttentionContext:
        """The first half of a call: every branch's output, by name, in ``context.outputs``, and the selection.

        ``forward`` is ``mix(attend(...))`` and takes the same arguments; ``recompute`` is heeded by ``forward`` alone.
        """
        self._check(q, kv, positions, mask_mod)
        return self._attend(self._order, q, kv, x, Placing(None, documents, mask_mod), positions, selection)

    def mix(self, context: AttentionContext) -> Float[Tensor, "b hq tq dv"]:
        """The second half: the branches' outputs, each times its gate, summed to ``[b, hq, tq, dv]``."""
        return combine(self._gates(context.q, context.x), list(context.outputs.values()))

    def _attend(
        self,
        names: Sequence[str],
        q: Tensor,
        kv: Mapping[str, KV],
        x: Tensor,
        placing: Placing,
        positions: Positions | Mapping[str, Positions] | None,
        selection: Selection | None,
        lse_grad: bool = True,
        note: Callable[[str, AttentionOutput], None] = lambda name, output: None,
    ) -> AttentionContext:
        num_tokens = max(k.shape[2] for k, _ in kv.values())
        context = AttentionContext(q, x, kv, num_tokens, placing, self.impl, self.selector, lse_grad, given=selection)
        for name in names:
            # A new one, since Dynamo of torch 2.13 loses what is assigned to an older object after FlexAttention ran.
            context = replace(context, branch=name, read=set(), placing=_placed(placing, positions, name))
            output = self._output(context)
            if name not in context.attended:
                context.attended[name] = Attended(*kv[name])
            context.outputs[name] = output
            note(name, output)
        return context

    def _differentiates_lse(self) -> bool:
        """Whether a branch or the selector may differentiate a branch's LSE; ``mix`` does not."""
        parts = [*self.branches.values(), *([] if self.selector is None else [self.selector])]
        return any(getattr(part, "differentiates_lse", True) for part in parts)

    def _deferred(
        self, context: AttentionContext, name: str, positions: Positions | Mapping[str, Positions] | None
    ) -> Deferred:
        placing = _placed(context.placing, positions, name)

        def attend() -> AttentionOutput:
            return self._output(
                replace(context, branch=name, read=set(), attended=dict(context.attended), placing=placing)
            )

        return Deferred(attend)

    def _output(self, context: AttentionContext) -> AttentionOutput:
        name, (k, v) = context.branch, context.kv[context.branch]
        output = self._frames[name](self.branches[name], context.q, k, v, context)
        _check_obedience(context)
        return _checked(output, name, context.q, v.shape[-1])

    def _gates(self, q: Tensor, x: Tensor) -> Tensor:
        gates = self.gate(x).to(q.dtype)
        checks.check_gates(gates, q, branches=len(self._order))
        return gates

    def _check(
        self,
        q: Tensor,
        kv: Mapping[str, KV],
        positions: Positions | Mapping[str, Positions] | None,
        mask_mod: MaskMod | None,
    ) -> None:
        named = {"kv": kv} | ({"positions": positions} if isinstance(positions, Mapping) else {})
        for argument, by_name in named.items():
            if set(by_name) != set(self._order):
                raise ValueError(
                    f"{argument} must have the branches' names {sorted(self._order)}, got {sorted(by_name)}; give each "
                    f"branch its own"
                )
        checks.check_value_dims({name: v.shape[-1] for name, (_, v) in kv.items()})
        checks.check_tensor("q", q, "b hq tq d")
        checks.check_mask_mod(mask_mod, q)


def _placed(placing: Placing, positions: Positions | Mapping[str, Positions] | None, name: str) -> Placing:
    return placing._replace(positions=positions[name] if isinstance(positions, Mapping) else positions)


def _check_obedience(context: AttentionContext) -> None:
    """The branch has read whatever the call says about who sees whom; what it never read it cannot obey."""
    for name, value in context.placing._asdict().items():
        if value is not None and name not in context.read:
            raise NotImplementedError(
                f'branch "{context.branch}" was given {name} and never read context.{name}, so it cannot hold it; pass '
                f"**context.options on to a stage function, or read it and do as it says"
            )


def _checked(output: AttentionOutput, name: str, q: Tensor, value_dim: int) -> AttentionOutput:
    expected = (*q.shape[:3], value_dim)
    if not isinstance(output, AttentionOutput):
        raise TypeError(f'branch "{name}" must return AttentionOutput(out, lse), got {type(output).__name__}')
    if tuple(output.out.shape) != expected:
        raise ValueError(f'branch "{name}" must return out of shape {expected}, got {tuple(output.out.shape)}')
    if output.out.dtype != q.dtype:
        raise ValueError(f'branch "{name}" must return out of q\'s dtype {q.dtype}, got {output.out.dtype}')
    if not isinstance(output.lse, Tensor) or output.lse.shape != q.shape[:3]:
        got = tuple(output.lse.shape) if isinstance(output.lse, Tensor) else output.lse
        raise ValueError(f'branch "{name}" must return lse of shape {expected[:3]}, got {got}')
    return output
