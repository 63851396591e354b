"""What a composition did for some of its queries: selection, importance, gates, and the attention of every branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from flexnsa.branches import CompressedBranch, ImportanceSelector, SelectedBranch
from flexnsa.composition import SparseAttention
from flexnsa.config import NSAConfig
from flexnsa.context import AttentionContext, Branch
from flexnsa.layer import NativeSparseAttention
from flexnsa.layout import compressed_starts, query_table
from flexnsa.types import KV, Selection
from flexnsa_masks import MaskMod

COLUMNS = 512
"""Tokens whose weights are computed at once: bounds the memory of the values that stand in for a branch's own."""


@dataclass(frozen=True)
class Look:
    """What was seen of some queries, detached, on the device of the call.

    Attributes:
        weights: for each branch, by name and in order, its attention over tokens ``[b, hq, tq, tk]``: rows sum to 1, or
            to 0 where a query sees nothing. A compressed token's weight is spread evenly over its tokens.
        gates: ``[b, hq, tq, branches]``, in the order of ``weights``.
        selection: the blocks of each query, or None where there are none.
        importance: ``[b, hk, tq, s]``, or None where the selector knows none.
        positions: int64 ``[b|1, tq]``, where each query stands; -1 for padding.
        starts: int64 ``[b|1, tq]``, first token of its document, from which its blocks count.
        config: the geometry of the selected blocks, or None.
        num_kv_heads: KV heads hk.
    """

    weights: Mapping[str, Float[Tensor, "b hq tq tk"]]
    gates: Float[Tensor, "b hq tq branches"]
    selection: Selection | None
    importance: Float[Tensor, "b hk tq s"] | None
    positions: Int64[Tensor, "b tq"]
    starts: Int64[Tensor, "b tq"]
    config: NSAConfig | None
    num_kv_heads: int

    @property
    def num_tokens(self) -> int:
        """KV tokens tk."""
        return next(iter(self.weights.values())).shape[-1]

    @property
    def mixed(self) -> Float[Tensor, "b hq tq tk"]:
        """The branches' weights, each times its gate, summed: what the output is made of."""
        return sum(
            (
                gate[..., None] * weights
                for gate, weights in zip(self.gates.unbind(-1), self.weights.values(), strict=True)
            ),
            start=torch.zeros_like(next(iter(self.weights.values()))),
        )

    @property
    def chosen(self) -> Bool[Tensor, "b hk tq s"]:
        """Whether each query attends to each block of its document.

        Raises:
            ValueError: nothing was selected.
        """
        selection, config = self._blocks()
        return selection.to_mask(config.num_blocks(self.num_tokens))

    @property
    def forced(self) -> Bool[Tensor, "#b 1 tq s"]:
        """Whether the geometry forces each block on each query: the first ones and the local ones.

        Raises:
            ValueError: nothing was selected.
        """
        _, config = self._blocks()
        block = torch.arange(config.num_blocks(self.num_tokens), device=self.positions.device)
        own = ((self.positions - self.starts) // config.select_block)[:, None, :, None]
        real = (self.positions >= 0)[:, None, :, None]
        return real & (block <= own) & ((block < config.num_initial) | (block > own - config.num_local))

    def _blocks(self) -> tuple[Selection, NSAConfig]:
        if self.selection is None or self.config is None:
            raise ValueError("this look holds no selection; look at a composition with a SelectedBranch")
        return self.selection, self.config


def look_at_layer(
    layer: NativeSparseAttention,
    x: Float[Tensor, "b t dim"],
    *,
    queries: Sequence[int] | Int[Tensor, " tq"] | None = None,
    documents: Int[Tensor, "b t"] | None = None,
    mask_mod: MaskMod | None = None,
) -> Look:
    """What ``layer(x)`` does for some of its tokens.

    Args:
        layer: the layer.
        x: its input ``[b, t, dim]``.
        queries: tokens to look at, ascending; None for all. Weights take ``hq * t`` numbers a query and branch.
        documents: int ``[b, t]``, as in the layer's call.
        mask_mod: as in the layer's call.

    Returns:
        The look.

    Raises:
        ValueError: the arguments do not fit.
    """
    with torch.no_grad():
        q, kv = layer.project(x, documents=documents)
    return look_at_attention(
        layer.attention, q, kv._asdict(), x, queries=queries, documents=documents, mask_mod=mask_mod
    )


@torch.no_grad()
def look_at_attention(
    attention: SparseAttention,
    q: Float[Tensor, "b hq tq d"],
    kv: Mapping[str, KV],
    x: Float[Tensor, "b tq dim"],
    *,
    queries: Sequence[int] | Int[Tensor, " n"] | None = None,
    positions: Int[Tensor, "*b tq"] | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
    selection: Selection | None = None,
) -> Look:
    """What ``attention(q, kv, x)`` does for some of its queries.

    Selection and gates are those of the composition's own engine. A branch's weights are what it returns, on the dense
    engine, for values that are the rows of an identity matrix; so a branch of one's own has to be linear in its values,
    and to take values of any width.

    Args:
        attention: the composition.
        q: queries ``[b, hq, tq, d]``.
        kv: for each branch its ``(k, v)``.
        x: what the gate is made from, ``[b, tq, dim]``.
        queries: rows of q to look at, ascending; None for all.
        positions: int64 ``[tq]`` or ``[b, tq]``, as in the composition's call, like those that follow.
        documents: int ``[b, tk]``, -1 for padding.
        mask_mod: FlexAttention mask mod in place of causality.
        selection: blocks to attend to instead of the selector's.

    Returns:
        The look.

    Raises:
        ValueError: the arguments do not fit.
    """
    if queries is not None:
        rows = torch.as_tensor(queries).to(q.device)
        positions = (torch.arange(q.shape[2], device=q.device) if positions is None else positions)[..., rows]
        q, x = q[:, :, rows], x[:, rows]
        selection = None if selection is None else Selection(selection.indices[:, :, rows])
    context = attention.attend(
        q, kv, x, positions=positions, documents=documents, mask_mod=mask_mod, selection=selection
    )
    config, tokens = _block_geometry(attention), context.num_tokens
    table = query_table(q, config or NSAConfig(), num_tokens=tokens, positions=positions, documents=documents)
    return Look(
        weights={name: _weights(name, branch, context) for name, branch in attention.branches.items()},
        gates=attention.gate(x),
        selection=context.given,
        importance=_importance(attention, context),
        positions=table.position,
        starts=table.start,
        config=config,
        num_kv_heads=next(iter(kv.values()))[0].shape[1],
    )


def _block_geometry(attention: SparseAttention) -> NSAConfig | None:
    for branch in attention.branches.values():
        if isinstance(branch, SelectedBranch):
            return branch.config
    return None


def _importance(attention: SparseAttention, context: AttentionContext) -> Tensor | None:
    selector = attention.selector
    if isinstance(selector, ImportanceSelector) and selector.branch in context.outputs:
        return selector.importance(context.q, context)
    return None


def _weights(name: str, branch: Branch, context: AttentionContext) -> Float[Tensor, "b hq tq tk"]:
    """What a branch returns for values that are rows of the identity, some columns at a time."""
    (k, v), tokens = context.kv[name], torch.arange(context.num_tokens, device=context.q.device)
    if isinstance(branch, CompressedBranch):
        k, v = context.attended[name].k, context.attended[name].v
        branch = CompressedBranch(branch.config, None, scale=branch.scale, score_mod=branch.score_mod)
        shares = _shares(branch.config, k.shape[2], context)
    else:
        shares = torch.eye(k.shape[2], device=k.device, dtype=v.dtype)[None]
    dense = replace(context, impl="reference", branch=name, read=set(), attended=dict(context.attended))
    parts = []
    for columns in tokens.split(COLUMNS):
        values = shares[..., columns][:, None].expand(k.shape[0], k.shape[1], -1, -1)
        parts.append(branch.attend(context.q, k, values, dense).out)
    return torch.cat(parts, dim=-1)


def _shares(config: NSAConfig, count: int, context: AttentionContext) -> Float[Tensor, "#b c tk"]:
    """For each compressed token, an equal share of 1 at each of the tokens that it summarises."""
    device = context.q.device
    starts = compressed_starts(context.documents, config)
    if starts is None:
        starts = torch.arange(count, device=device)[None] * config.compress_stride
    distance = torch.arange(context.num_tokens, device=device) - starts[..., None]
    inside = (distance >= 0) & (distance < config.compress_block) & (starts[..., None] >= 0)
    return inside.to(context.q.dtype) / config.compress_block
