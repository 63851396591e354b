"""A start that every attention can have: it looks for what is like the query, and hands on what it finds."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from bench.learn.attention import DenseAttention
from flexnsa import MLPCompressor, NativeSparseAttention

LINEAR = 1.0
"""Where gelu is taken: its slope there is about 1 for small differences."""


@torch.no_grad()
def start_matching(attention: nn.Module, heads: int, kv_heads: int) -> None:
    """Give each query head the key projection of its KV head, one for all branches, and the output projection the
    transpose of the values', likewise one for all branches; an MLP that compresses starts near the mean of its block.
    From there each is trained on its own.

    Args:
        attention: one of ``ATTENTIONS``.
        heads: its query heads.
        kv_heads: its KV heads.
    """
    query, keys, values, output = _projections(attention)
    for same in (keys, values):
        for projection in same[1:]:
            projection.weight.copy_(same[0].weight)
    query.weight.copy_(_for_each_head(keys[0].weight, heads, kv_heads))
    output.weight.copy_(_for_each_head(values[0].weight, heads, kv_heads).T)
    if isinstance(attention, NativeSparseAttention) and isinstance(attention.compressor, MLPCompressor):
        for pool in attention.compressor.children():
            _start_as_mean(pool)


def _start_as_mean(pool: nn.Module) -> None:
    """The mean times the root of the block's length, so that a compressed key is about as long as a key."""
    up, down, up_bias, down_bias = (pool.get_parameter(name) for name in ("up", "down", "up_bias", "down_bias"))
    _, _, length, dim = pool.get_parameter("position").shape
    same = torch.eye(dim, device=up.device)
    up.copy_(same.repeat(length, 1) * length**-0.5)
    down.copy_(same)
    up_bias.fill_(LINEAR)
    down_bias.copy_(-gelu(up_bias))


def _projections(attention: nn.Module) -> tuple[nn.Linear, list[nn.Linear], list[nn.Linear], nn.Linear]:
    """Those of queries, of keys and of values, each branch's, and of the output."""
    if isinstance(attention, NativeSparseAttention):
        keys, values = (
            [cast(nn.Linear, x) for x in projections.children()] for projections in (attention.k_proj, attention.v_proj)
        )
        return attention.q_proj, keys, values, attention.o_proj
    assert isinstance(attention, DenseAttention)
    return attention.query, [attention.key], [attention.value], attention.output


def _for_each_head(weight: Float[Tensor, "rows dim"], heads: int, kv_heads: int) -> Float[Tensor, "more_rows dim"]:
    """The rows of each KV head, once for each query head of its group."""
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)
