"""The library's layer with what a Llama or a Qwen3 has beyond it: scaled rotary embeddings, biases, norms' epsilon."""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from flexnsa.compression import BlockCompressor, MeanPool
from flexnsa.integrations.transformers.cache import FlexNSACache
from flexnsa.integrations.transformers.configuration import COMPRESSORS, FlexNSAConfig
from flexnsa.layer import NativeSparseAttention
from flexnsa.rotary import Rotate, tabulated


class FlexNSAAttention(NativeSparseAttention):
    """``NativeSparseAttention`` as a layer of the language model.

    Args:
        config: the model's configuration.
        layer_idx: number of the layer, by which it finds its place in the cache.
    """

    def __init__(self, config: FlexNSAConfig, layer_idx: int):
        heads, dim = config.num_key_value_heads, config.head_dim
        super().__init__(
            dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=heads,
            head_dim=dim,
            config=config.geometry,
            compressor=_compressor(config),
            shared_kv=config.shared_kv,
            rope_theta=config.rope_parameters["rope_theta"],
            qk_norm=config.qk_norm,
            compress_rotated=config.compress_rotated,
            impl=config.impl,
        )
        self.layer_idx = layer_idx
        self.rotary = LlamaRotaryEmbedding(config)
        for norm in (self.q_norm, *self.k_norm.values()):
            cast(Any, norm).eps = config.rms_norm_eps
        if config.attention_bias:
            self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * dim)
            for projections in (self.k_proj, self.v_proj):
                projections.update({name: nn.Linear(config.hidden_size, heads * dim) for name in projections})
        if config.attention_out_bias:
            self.o_proj = nn.Linear(config.num_attention_heads * dim, config.hidden_size)

    def attend(
        self, x: Float[Tensor, "b t dim"], documents: Int64[Tensor, "b t"] | None, past: FlexNSACache | None
    ) -> Float[Tensor, "b t dim"]:
        """``forward`` with this layer's part of the model's cache."""
        if past is None:
            return self(x, documents=documents)
        out: Tensor = self(x, documents=documents, cache=past.of_layer(self, x.shape[0]))
        past.count(self.layer_idx, x.shape[1])
        return out

    def _rotation(self, like: Tensor, positions: Int64[Tensor, "b t"] | range) -> Rotate:
        by = self.rotary(like, tabulated(positions, like.device))

        def rotate(x: Tensor) -> Tensor:
            cos, sin = (part[:, None].to(x.dtype) for part in by)
            return x * cos + rotate_half(x) * sin

        return rotate


def _compressor(config: FlexNSAConfig) -> BlockCompressor:
    kind = COMPRESSORS[config.compressor]
    if kind is MeanPool:
        return MeanPool(config.geometry)
    return kind(config.geometry, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim)  # type: ignore[call-arg]
