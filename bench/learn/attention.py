"""The attentions that a twin can be built with, by name: each maps [b, t, dim] to [b, t, dim], causally."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flexnsa import NativeSparseAttention, NSAConfig


@dataclass(frozen=True)
class AttentionShape:
    """What every attention of a comparison shares; `nsa.window` is also the window of the window-only twin.

    Args:
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        rope_theta: base of the rotary embedding, restarting at position 0 of each row.
        nsa: NSA's geometry, in tokens.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    nsa: NSAConfig


def rotate(x: Float[Tensor, "b h t d"], theta: float) -> Float[Tensor, "b h t d"]:
    """Rotary embedding (Su et al. 2021) of x at positions 0 .. t-1, halves paired."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class DenseAttention(nn.Module):
    """Grouped-query attention through PyTorch's SDPA, over the whole past or over the last `window` tokens.

    It owes nothing to flexnsa, so that a fault of the library cannot hide in both sides of a comparison.
    """

    def __init__(self, shape: AttentionShape, window: int | None = None):
        super().__init__()
        self.shape = shape
        self.window = window
        self.query = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.key = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.value = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        """Attend and project back."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = rotate(q, self.shape.rope_theta), rotate(k, self.shape.rope_theta)
        mask = None if self.window is None else banded(x.shape[1], self.window, x.device)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.output(out.transpose(1, 2).flatten(2))


def banded(tokens: int, window: int, device: torch.device) -> Tensor:
    """Bool [t, t]: whether a query sees a key among the last `window` tokens, its own included."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _nsa(shape: AttentionShape) -> nn.Module:
    return NativeSparseAttention(
        dim=shape.dim,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        config=shape.nsa,
        rope_theta=shape.rope_theta,
    )


ATTENTIONS: Mapping[str, Callable[[AttentionShape], nn.Module]] = {
    "nsa": _nsa,
    "full": DenseAttention,
    "window": lambda shape: DenseAttention(shape, shape.nsa.window),
}
