"""A small causal transformer whose attention is swapped by name: RMSNorm, rotary attention, gated MLP."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from bench.learn.attention import ATTENTIONS, AttentionShape
from bench.learn.matching import start_matching
from flexnsa import NativeSparseAttention, NSACache

HIDDEN_STEP = 8


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one twin.

    Args:
        attention: sizes of the attention, its `dim` being the model's.
        layers: transformer blocks.
        hidden: inner width of the gated MLP.
        vocabulary: distinct tokens.
        convolution: tokens of a causal depthwise convolution after the embedding, 0 for none.
        embedding_std: standard deviation of the embedding's first values.
        matching: whether attention starts by looking for what is like the query (``start_matching``), and the
            convolution as the sum of a token and the one before.
    """

    attention: AttentionShape
    layers: int
    hidden: int
    vocabulary: int
    convolution: int = 0
    embedding_std: float = 0.02
    matching: bool = False


class GatedMLP(nn.Module):
    """silu(x W_gate) * (x W_up) W_down (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        """Token by token."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class CausalConvolution(nn.Module):
    """x plus a learned mix of each channel's last `width` values: the order of near tokens, without a position."""

    def __init__(self, dim: int, width: int, only_last: bool = False):
        super().__init__()
        weight = torch.randn(width, dim) * width**-0.5
        if only_last:
            weight = torch.zeros_like(weight).index_fill(0, torch.tensor(1), 1.0)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        """Channel by channel."""
        past = (pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in range(len(self.weight)))
        return sum((shifted * weight for shifted, weight in zip(past, self.weight, strict=True)), start=x)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, shape: ModelShape, attention: str):
        super().__init__()
        dim = shape.attention.dim
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = ATTENTIONS[attention](shape.attention)
        if shape.matching:
            start_matching(self.attention, shape.attention.heads, shape.attention.kv_heads)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = GatedMLP(dim, shape.hidden)

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        cache: NSACache | None = None,
        documents: Int64[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """One layer, of tokens that continue those of the cache, or that belong to several documents."""
        given = {name: value for name, value in (("cache", cache), ("documents", documents)) if value is not None}
        x = x + self.attention(self.attention_norm(x), **given)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens to next-token logits; the embedding is tied to the output."""

    def __init__(self, shape: ModelShape, attention: str):
        super().__init__()
        dim = shape.attention.dim
        self.embedding = nn.Embedding(shape.vocabulary, dim)
        self.convolution = (
            CausalConvolution(dim, shape.convolution, only_last=shape.matching) if shape.convolution else None
        )
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, shape.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=shape.embedding_std)

    def forward(
        self,
        tokens: Int64[Tensor, "b t"],
        caches: Sequence[NSACache] | None = None,
        documents: Int64[Tensor, "b t"] | None = None,
        places: Int64[Tensor, "b n"] | None = None,
        blocks: Sequence[Callable[..., Tensor]] | None = None,
    ) -> Float[Tensor, "b n vocabulary"]:
        """Logits of the token after each, or after those at `places`.

        With caches the tokens continue those of earlier calls. `blocks` are run instead of the model's own: the same,
        compiled.
        """
        x = self.embedding(tokens)
        if self.convolution is not None:
            x = self.convolution(x)
        chosen: Iterable[Callable[..., Tensor]] = self.blocks if blocks is None else blocks
        for number, block in enumerate(chosen):
            x = block(x, None if caches is None else caches[number], documents)
        if places is not None:
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        return self.head(self.norm(x))

    def new_caches(self, batch: int, max_tokens: int) -> list[NSACache] | None:
        """An empty cache for each layer, None where the attention or the convolution has none."""
        if self.convolution is not None:
            return None
        attentions = [block.attention for block in self.blocks]
        caches = [
            layer.new_cache(batch, max_tokens) for layer in attentions if isinstance(layer, NativeSparseAttention)
        ]
        return caches if len(caches) == len(attentions) else None


def count_parameters(model: nn.Module) -> int:
    """Trained numbers, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
