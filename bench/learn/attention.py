"""The attentions that a twin can be built with, by name: each maps [b, t, dim] to [b, t, dim], causally."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.learn.gates import RowsWithoutSelected, WithoutBranch
from flexnsa import MeanPool, NativeSparseAttention, NSAConfig, Selection, selected_attention


@dataclass(frozen=True)
class AttentionShape:
    """What every attention of a comparison shares; `nsa.window` is also the window of the window-only twin.

    Args:
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        rope_theta: base of the rotary embedding, restarting at position 0 of each row; None for none.
        nsa: NSA's geometry, in tokens.
        searches_first: whether NSA trains without its selected branch at first, and in some rows later on.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float | None
    nsa: NSAConfig
    searches_first: bool = False


def rotate(
    x: Float[Tensor, "b h t d"], theta: float, documents: Int64[Tensor, "b t"] | None = None
) -> Float[Tensor, "b h t d"]:
    """Rotary embedding (Su et al. 2021) of x at positions 0 .. t-1, halves paired; from 0 in each document."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device) / half)
    position = torch.arange(x.shape[-2], device=x.device)
    if documents is not None:
        begins = torch.searchsorted(documents.contiguous(), documents.contiguous())
        position = (position - begins)[:, None]
    angle = position[..., None] * frequency
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

    def forward(
        self, x: Float[Tensor, "b t dim"], *, documents: Int64[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t dim"]:
        """Attend and project back."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if self.shape.rope_theta is not None:
            q, k = (rotate(y, self.shape.rope_theta, documents) for y in (q, k))
        return self.output(self.attend(q, k, v, documents).transpose(1, 2).flatten(2))

    def attend(
        self,
        q: Float[Tensor, "b hq t d"],
        k: Float[Tensor, "b hk t d"],
        v: Float[Tensor, "b hk t d"],
        documents: Int64[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b hq t d"]:
        """Softmax attention to what each query sees."""
        if documents is not None:
            mask = banded(q.shape[2], self.window or q.shape[2], q.device)
            mask = mask & (documents[:, None, :, None] == documents[:, None, None])
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        if self.window is not None:
            return near_attention(q, k, v, self.window)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def near_attention(
    q: Float[Tensor, "b hq t d"], k: Float[Tensor, "b hk t d"], v: Float[Tensor, "b hk t d"], window: int
) -> Float[Tensor, "b hq t d"]:
    """Attention to the last `window` tokens, piece by piece: as many queries, over their own keys and those before."""
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    missing = -tokens % window
    k, v = (pad(x, (0, 0, window, missing)).repeat_interleave(group, dim=1) for x in (k, v))
    k, v = (x.unfold(2, 2 * window, window).transpose(-1, -2) for x in (k, v))
    q = pad(q, (0, 0, 0, missing)).unflatten(2, (-1, window))
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    seen = (column > row) & (column <= row + window)
    first = seen & (column >= window)
    mask = torch.cat([first[None], seen.expand(q.shape[2] - 1, -1, -1)])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # pieces stand where heads do: the first has a mask of its own
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(0, (batch, heads)).flatten(2, 3)[:, :, :tokens]


def banded(tokens: int, window: int, device: torch.device) -> Tensor:
    """Bool [t, t]: whether a query sees a key among the last `window` tokens, its own included."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


class MoBA(DenseAttention):
    """Mixture of block attention (Lu et al. 2025, arXiv 2502.13189): a query's own block and those whose mean keys it
    likes best, as many tokens in all as NSA selects. As everywhere here, the heads of a group choose together."""

    def __init__(self, shape: AttentionShape):
        super().__init__(shape)
        block = shape.nsa.select_block
        self.blocks = replace(shape.nsa, compress_block=block, compress_stride=block, num_initial=0, num_local=1)

    def attend(
        self,
        q: Float[Tensor, "b hq t d"],
        k: Float[Tensor, "b hk t d"],
        v: Float[Tensor, "b hk t d"],
        documents: Int64[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b hq t d"]:
        """Softmax attention to the selected blocks."""
        if documents is not None:
            raise ValueError("moba's blocks do not follow documents, got packed rows; leave out --packed")
        size = self.blocks.select_block
        means = pad(k, (0, 0, 0, -k.shape[2] % size)).unflatten(2, (-1, size)).mean(dim=3)
        scores = q.unflatten(1, (k.shape[1], -1)).sum(dim=2) @ means.mT
        own = torch.arange(q.shape[2], device=q.device)[:, None] // size
        block = torch.arange(means.shape[2], device=q.device)
        scores = scores.float().masked_fill(block == own, torch.inf).masked_fill(block > own, -torch.inf)
        chosen = Selection.from_scores(scores, self.blocks.num_selected)
        return selected_attention(q, k, v, chosen, self.blocks).out


def _nsa(
    shape: AttentionShape, *, without: str | None = None, mean_pooled: bool = False, shared_kv: bool = False
) -> NativeSparseAttention:
    layer = NativeSparseAttention(
        dim=shape.dim,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        config=shape.nsa,
        compressor=MeanPool(shape.nsa) if mean_pooled else None,
        shared_kv=shared_kv,
        rope_theta=shape.rope_theta,
    )
    if without is not None:
        layer.attention.gate = WithoutBranch(layer.attention.gate, without)
    if shape.searches_first and without in (None, "window"):
        layer.attention.gate = RowsWithoutSelected(layer.attention.gate)
    return layer


ATTENTIONS: Mapping[str, Callable[[AttentionShape], nn.Module]] = {
    "nsa": _nsa,
    "full": DenseAttention,
    "window": lambda shape: DenseAttention(shape, shape.nsa.window),
    "nsa-no-compressed": partial(_nsa, without="compressed"),
    "nsa-no-selected": partial(_nsa, without="selected"),
    "nsa-no-window": partial(_nsa, without="window"),
    "nsa-shared-kv": partial(_nsa, shared_kv=True),
    "nsa-mean-pool": partial(_nsa, mean_pooled=True),
    "moba": MoBA,
}
"""Every attention by name; what is left out of an ablated NSA keeps its projections, untrained."""

DEFAULT_ATTENTIONS = ("nsa", "full", "window")
