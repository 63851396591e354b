"""Look into a trained NSA model: its gates, its selections, and the attention of each branch over tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bench.learn.model import Transformer
from flexnsa import (
    BranchKV,
    NativeSparseAttention,
    NSAConfig,
    Selection,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

BRANCHES = BranchKV._fields


@dataclass(frozen=True)
class Look:
    """What every layer did with one row of tokens, averaged over the query heads of each KV head.

    Args:
        weights: attention of each branch over tokens; a compressed token's weight is spread evenly over its tokens.
        gates: gate of each branch.
        selected: whether a query attends to a block.
        forced: whether it has to, for being the first or a local one.
        block: tokens of a selection block.
    """

    weights: Float[Tensor, "layers branches hk t t"]
    gates: Float[Tensor, "layers branches hk t"]
    selected: Bool[Tensor, "layers hk t s"]
    forced: Bool[Tensor, "t s"]
    block: int


@dataclass(frozen=True)
class Query:
    """One query of a `Look`: where it is, what it attends to, how its branches are mixed, which blocks it selected."""

    layer: int
    head: int
    position: int
    weights: Float[Tensor, "branches t"]
    gates: Float[Tensor, "branches"]
    blocks: list[int]


@torch.no_grad()
def look_into(model: Transformer, tokens: Int64[Tensor, "1 t"]) -> Look:
    """Run one row and keep what each layer's branches did; on the CPU afterwards."""
    layers = _layers(model, tokens)
    config = layers[0][0].config
    found = [_attention_of(layer, x) for layer, x in layers]
    selected = torch.stack([_chosen(selection, config.num_blocks(tokens.shape[1])) for _, _, selection in found])
    return Look(
        weights=torch.stack([weights for weights, _, _ in found]).float().cpu(),
        gates=torch.stack([gates for _, gates, _ in found]).float().cpu(),
        selected=selected.cpu(),
        forced=_forced(tokens.shape[1], config),
        block=config.select_block,
    )


@torch.no_grad()
def gate_means(model: Transformer, tokens: Int64[Tensor, "1 t"]) -> Float[Tensor, "layers hq branches"]:
    """Mean over the tokens of each layer's gates."""
    return torch.stack([layer.attention.gate(x)[0].mean(dim=1) for layer, x in _layers(model, tokens)]).float().cpu()


def telling_query(look: Look) -> Query:
    """The query, in the later half, whose selected branch adds most from blocks that it was free to choose or not."""
    free = ~look.forced.repeat_interleave(look.block, dim=1)[:, : look.weights.shape[-1]]
    branch = BRANCHES.index("selected")
    chosen = look.gates[:, branch] * (look.weights[:, branch] * free).sum(-1)
    half = chosen.shape[-1] // 2
    layer, head, position = (int(i) for i in torch.unravel_index(chosen[..., half:].argmax(), chosen[..., half:].shape))
    position += half
    return Query(
        layer=layer,
        head=head,
        position=position,
        weights=look.weights[layer, :, head, position],
        gates=look.gates[layer, :, head, position],
        blocks=look.selected[layer, head, position].nonzero().flatten().tolist(),
    )


def _layers(model: Transformer, tokens: Tensor) -> list[tuple[NativeSparseAttention, Tensor]]:
    """Each attention layer with its input."""
    found: list[tuple[NativeSparseAttention, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda layer, args: found.append((layer, args[0])))
        for module in model.modules()
        if isinstance(module, NativeSparseAttention)
    ]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _attention_of(layer: NativeSparseAttention, x: Tensor) -> tuple[Tensor, Tensor, Selection]:
    """Weights [branches, hk, t, t], gates [branches, hk, t] and selection of one layer, row 0.

    A branch's output is its weights times the values; with the identity for values it is the weights themselves.
    """
    config = layer.config
    q, kv = layer.project(x)
    (k_cmp, _), (k_selected, _), (k_window, _) = kv
    token = _identity(k_selected)
    compressed = compressed_attention(q, k_cmp, _spread(k_cmp, config, x.shape[1]), config, impl="reference")
    selection = select_blocks(q, k_cmp, compressed.lse, config, num_tokens=x.shape[1], impl="reference")
    selected = selected_attention(q, k_selected, token, selection, config, impl="reference")
    window = window_attention(q, k_window, token, config, impl="reference")
    weights = torch.stack([output.out[0] for output in (compressed, selected, window)])
    gates = layer.attention.gate(x)[0].movedim(-1, 0)
    groups = (layer.num_kv_heads, -1)
    return weights.unflatten(1, groups).mean(2), gates.unflatten(1, groups).mean(2), selection


def _identity(k: Float[Tensor, "b hk t d"]) -> Float[Tensor, "b hk t t"]:
    return torch.eye(k.shape[2], device=k.device, dtype=k.dtype).expand(*k.shape[:2], -1, -1)


def _spread(k_cmp: Float[Tensor, "b hk c d"], config: NSAConfig, tokens: int) -> Float[Tensor, "b hk c t"]:
    """For each compressed token, an equal share of 1 at each token that it summarises."""
    start = torch.arange(k_cmp.shape[2], device=k_cmp.device)[:, None] * config.compress_stride
    distance = torch.arange(tokens, device=k_cmp.device) - start
    inside = (distance >= 0) & (distance < config.compress_block)
    return (inside / config.compress_block).to(k_cmp.dtype).expand(*k_cmp.shape[:2], -1, -1)


def _chosen(selection: Selection, blocks: int) -> Bool[Tensor, "hk t s"]:
    return (selection.indices[0][..., None] == torch.arange(blocks, device=selection.indices.device)).any(dim=-2)


def _forced(tokens: int, config: NSAConfig) -> Bool[Tensor, "t s"]:
    block = torch.arange(config.num_blocks(tokens))
    own = torch.arange(tokens)[:, None] // config.select_block
    return (block <= own) & ((block < config.num_initial) | (block > own - config.num_local))
