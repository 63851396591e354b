"""Sparse attention as a composition: named branches, a selector that reads their scores, and a gate that mixes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from flexnsa import checks
from flexnsa.compressed import compressed_attention
from flexnsa.compression import Compressor, compress
from flexnsa.config import NSAConfig
from flexnsa.engines import Impl
from flexnsa.gating import combine
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import KV, AttentionOutput, Selection
from flexnsa.window import window_attention
from flexnsa_masks import MaskMod, ScoreMod


@dataclass
class AttentionContext:
    """What a branch or a selector may read beside its own queries, keys and values.

    Attributes:
        q: queries ``[b, hq, tq, d]``.
        x: the layer's input, from which the gate is made.
        num_tokens: KV tokens tk: the longest of the branches' sequences.
        positions: absolute positions of the queries, or None.
        documents: document of each KV token, or None.
        mask_mod: what replaces causality in every branch, or None.
        impl: the engine asked for.
        selector: makes the selection when it is first asked for.
        outputs: what the branches before this one returned, by name.
        attended: the keys and values they attended to, by name; a branch that transforms its own puts them here.
        branch: name of the branch that is being computed.
    """

    q: Float[Tensor, "b hq tq d"]
    x: Float[Tensor, "b tq dim"]
    num_tokens: int
    positions: Int[Tensor, "*b tq"] | None
    documents: Int[Tensor, "b tk"] | None
    mask_mod: MaskMod | None
    impl: Impl
    selector: Selector | None
    outputs: dict[str, AttentionOutput] = field(default_factory=dict)
    attended: dict[str, KV] = field(default_factory=dict)
    branch: str = ""
    _selection: Selection | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every stage function takes: positions, documents, mask_mod and impl."""
        return {
            "positions": self.positions,
            "documents": self.documents,
            "mask_mod": self.mask_mod,
            "impl": self.impl,
        }

    @property
    def selection(self) -> Selection:
        """The selector's choice, made once, from the branches computed so far.

        Raises:
            ValueError: the composition has no selector.
        """
        if self._selection is None:
            if self.selector is None:
                raise ValueError(f'branch "{self.branch}" reads the selection, but selector is None; pass selector=')
            self._selection = self.selector.select(self.q, self)
        return self._selection

    def earlier(self, name: str) -> tuple[KV, AttentionOutput]:
        """Keys and values, and the output, of a branch before this one.

        Raises:
            ValueError: no such branch was computed before.
        """
        if name not in self.outputs:
            raise ValueError(
                f'branch "{self.branch}" needs branch "{name}" before it, got {list(self.outputs)}; order the branches'
            )
        return self.attended[name], self.outputs[name]


class Branch(Protocol):
    """One way to attend. Any object with this method is a branch; an ``nn.Module`` has its parameters registered."""

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """``AttentionOutput(out [b, hq, tq, dv], lse [b, hq, tq])`` of queries ``q [b, hq, tq, d]``."""
        ...


class Selector(Protocol):
    """One way to choose blocks. Any object with this method is a selector."""

    def select(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> Selection:
        """The blocks of each query, by the contract of ``Selection``."""
        ...


class CompressedBranch(nn.Module):
    """Attention to compressed tokens, made here by ``compressor``, or given where that is None."""

    def __init__(
        self,
        config: NSAConfig,
        compressor: Compressor | None = None,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
    ):
        super().__init__()
        self.config, self.compressor, self.scale, self.score_mod = config, compressor, scale, score_mod

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``compressed_attention``."""
        k, v = compress(self.compressor, k, v, self.config, documents=context.documents)
        context.attended[context.branch] = (k, v)
        return compressed_attention(q, k, v, self.config, scale=self.scale, score_mod=self.score_mod, **context.options)


class SelectedBranch(nn.Module):
    """Attention to the blocks that the composition's selector chose."""

    def __init__(self, config: NSAConfig, *, scale: float | None = None, score_mod: ScoreMod | None = None):
        super().__init__()
        self.config, self.scale, self.score_mod = config, scale, score_mod

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``selected_attention``."""
        return selected_attention(
            q, k, v, context.selection, self.config, scale=self.scale, score_mod=self.score_mod, **context.options
        )


class WindowBranch(nn.Module):
    """Attention to the last ``config.window`` keys."""

    def __init__(self, config: NSAConfig, *, scale: float | None = None, score_mod: ScoreMod | None = None):
        super().__init__()
        self.config, self.scale, self.score_mod = config, scale, score_mod

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """See ``window_attention``."""
        return window_attention(q, k, v, self.config, scale=self.scale, score_mod=self.score_mod, **context.options)


class ImportanceSelector(nn.Module):
    """NSA's selector: the blocks to which the compressed branch gives most of its probability.

    Args:
        config: the geometry.
        branch: name of the compressed branch, which must come before the first branch that reads the selection.
        scale: that branch's softmax scale.
        score_mod: that branch's score mod.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        branch: str = "compressed",
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
    ):
        super().__init__()
        self.config, self.branch, self.scale, self.score_mod = config, branch, scale, score_mod

    def select(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> Selection:
        """See ``select_blocks``."""
        (k_cmp, _), output = context.earlier(self.branch)
        return select_blocks(
            q,
            k_cmp,
            output.lse,
            self.config,
            num_tokens=context.num_tokens,
            scale=self.scale,
            score_mod=self.score_mod,
            **context.options,
        )


class SparseAttention(nn.Module):
    """Named branches over queries, keys and values, mixed by a gate; no projections of its own.

    NSA is the composition of a compressed, a selected and a window branch with an importance selector.

    >>> import torch
    >>> from flexnsa import MeanPool, SigmoidGate
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
        impl: the engine of every stage.

    Raises:
        ValueError: no branches, or a name that cannot be an attribute.
    """

    def __init__(
        self,
        branches: Mapping[str, Branch],
        gate: Callable[[Tensor], Tensor],
        *,
        selector: Selector | None = None,
        impl: Impl = "auto",
    ):
        super().__init__()
        if not branches:
            raise ValueError("branches is empty; pass at least one branch by name")
        for name in branches:
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"branches has the name {name!r}, which cannot name a submodule; choose another one")
        self._order = tuple(branches)
        self.branch_modules = nn.ModuleDict({n: b for n, b in branches.items() if isinstance(b, nn.Module)})
        self._other_branches = {n: b for n, b in branches.items() if not isinstance(b, nn.Module)}
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
        positions: Int[Tensor, "*b tq"] | None = None,
        documents: Int[Tensor, "b tk"] | None = None,
        mask_mod: MaskMod | None = None,
    ) -> Float[Tensor, "b hq tq dv"]:
        """Attend with every branch and mix.

        Args:
            q: queries ``[b, hq, tq, d]``.
            kv: for each branch its ``(k, v)``.
            x: what the gate is made from, ``[b, tq, dim]``.
            positions: int64 ``[tq]`` or ``[b, tq]``, None where ``tq == tk``.
            documents: int ``[b, tk]``, -1 for padding.
            mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality, held by
                every branch: a compressed token is visible iff all its tokens are, a block is a candidate iff any is.

        Returns:
            ``[b, hq, tq, dv]``.

        Raises:
            ValueError: the names, shapes or outputs do not fit.
        """
        if set(kv) != set(self._order):
            raise ValueError(f"kv must have the branches' names {sorted(self._order)}, got {sorted(kv)}")
        dims = {name: v.shape[-1] for name, (_, v) in kv.items()}
        checks.check_value_dims(dims)
        checks.check_tensor("q", q, "b hq tq d")
        num_tokens = max(k.shape[2] for k, _ in kv.values())
        context = AttentionContext(q, x, num_tokens, positions, documents, mask_mod, self.impl, self.selector)
        for name, branch in self.branches.items():
            context.branch = name
            output = branch.attend(q, *kv[name], context)
            context.attended.setdefault(name, kv[name])
            context.outputs[name] = _checked(output, name, q, dims[name])
        gates = self.gate(x).to(q.dtype)
        checks.check_gates(gates, q, branches=len(self._order))
        return combine(gates, list(context.outputs.values()))


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
