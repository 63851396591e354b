"""Look into a trained NSA model: what each of its layers did with one row, and the query that tells most."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bench.learn.model import Transformer
from flexnsa import BranchKV, NativeSparseAttention
from flexnsa.inspect import Look, look_at_layer

BRANCHES = BranchKV._fields


class Query(NamedTuple):
    """One query of a model: its layer, KV head and position."""

    layer: int
    head: int
    position: int


def look_into(model: Transformer, tokens: Int64[Tensor, "1 t"]) -> list[Look]:
    """Run one row and look at all of its queries in each layer."""
    return [look_at_layer(layer, x) for layer, x in attention_layers(model, tokens)]


@torch.no_grad()
def gate_means(model: Transformer, tokens: Int64[Tensor, "b t"]) -> Float[Tensor, "layers hq branches"]:
    """Mean over the tokens of each layer's gates."""
    layers = attention_layers(model, tokens)
    return torch.stack([layer.attention.gate(x).mean(dim=(0, 2)) for layer, x in layers]).float().cpu()


def telling_query(looks: Sequence[Look]) -> Query:
    """The query, in the later half, whose selected branch adds most from blocks that it was free to choose or not."""
    gains = torch.stack([_chosen_freely(look) for look in looks])
    half = gains.shape[-1] // 2
    layer, head, position = (int(i) for i in torch.unravel_index(gains[..., half:].argmax(), gains[..., half:].shape))
    return Query(layer, head, position + half)


def _chosen_freely(look: Look) -> Float[Tensor, "hk t"]:
    """Gated weight of the selected branch outside of forced blocks, the mean over the heads of a group."""
    assert look.config is not None
    free = ~look.forced[0, 0].repeat_interleave(look.config.select_block, dim=1)[:, : look.num_tokens]
    gain = look.gates[0, ..., BRANCHES.index("selected")] * (look.weights["selected"][0] * free).sum(-1)
    return gain.unflatten(0, (look.num_kv_heads, -1)).float().mean(1)


def attention_layers(model: Transformer, tokens: Tensor) -> list[tuple[NativeSparseAttention, Tensor]]:
    """Each attention layer with its input."""
    found: list[tuple[NativeSparseAttention, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda layer, args: found.append((layer, args[0])))
        for module in model.modules()
        if isinstance(module, NativeSparseAttention)
    ]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found
