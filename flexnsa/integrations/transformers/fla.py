"""Weights of the NSA models of flash-linear-attention (model type ``nsa``): their geometry and names, in ours.

Known from its source: one key and value projection for all branches; keys are compressed by their mean after the
rotary embedding; compressed blocks do not overlap and are the selection blocks; the first block and the last two are
forced; gates are the sigmoid of a linear map without a bias, in the order compressed, selected, window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa.integrations.transformers.configuration import FlexNSAConfig
from flexnsa.integrations.transformers.conversion import assemble
from flexnsa.integrations.transformers.modeling import FlexNSAForCausalLM

DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 64, "num_kv_heads": 4},
    **{"head_dim": 32, "qkv_bias": False, "block_size": 64, "block_counts": 16, "window_size": 512},
    **{"rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_ratio": 4, "intermediate_size": None},
    **{"hidden_act": "swish", "initializer_range": 0.02, "norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}
"""What a field has that its configuration leaves out."""

RENAMED = (
    (r"\bembeddings\.", "embed_tokens."),
    (r"\battn_norm\.", "input_layernorm."),
    (r"\bmlp_norm\.", "post_attention_layernorm."),
    (r"\battn\.", "self_attn."),
    (r"\b([kv]_proj)\.", r"\1.shared."),
    (r"\bg_proj\.", "attention.gate.proj."),
)


def from_fla(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> FlexNSAForCausalLM:
    """The language model with the weights of an ``NSAForCausalLM`` of flash-linear-attention.

    Args:
        config: what its ``config.json`` holds.
        weights: what its ``model.safetensors`` hold; they become the model's own.

    Raises:
        ValueError: a field that has no counterpart here, or weights that do not fit.
    """
    return assemble(fla_config(config), fla_weights(weights))


def fla_config(config: Mapping[str, Any]) -> FlexNSAConfig:
    """The configuration with the fields of ``config.json``.

    >>> config = fla_config({"num_heads": 32, "block_size": 32})
    >>> config.num_attention_heads, config.geometry.compress_stride
    (32, 32)

    Raises:
        ValueError: another model type, or no window.
    """
    if config.get("model_type", "nsa") != "nsa":
        raise ValueError(f'config must be of model_type "nsa", got {config["model_type"]!r}')
    field = DEFAULTS | {name: config[name] for name in DEFAULTS if name in config}
    return FlexNSAConfig(
        **{name: field[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")},
        **{name: field[name] for name in ("max_position_embeddings", "initializer_range", "tie_word_embeddings")},
        **{name: field[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        num_attention_heads=field["num_heads"],
        num_key_value_heads=field["num_kv_heads"],
        intermediate_size=field["intermediate_size"] or _intermediate(field["hidden_size"], field["hidden_ratio"]),
        hidden_act="silu" if field["hidden_act"] == "swish" else field["hidden_act"],
        rms_norm_eps=field["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": field["rope_theta"]},
        attention_bias=field["qkv_bias"],
        attention_out_bias=False,
        nsa=fla_geometry(field["block_size"], field["block_counts"], field["window_size"]),
        compressor="mean",
        compress_rotated=True,
        shared_kv=True,
    )


def fla_geometry(block_size: int = 64, block_counts: int = 16, window_size: int = 512) -> NSAConfig:
    """The geometry with which that library computes.

    Raises:
        TypeError: a number of blocks for each query, where one for all is expected.
        ValueError: no window, or fewer blocks than the three that are forced.
    """
    return NSAConfig(
        compress_block=block_size,
        compress_stride=block_size,
        select_block=block_size,
        num_selected=block_counts,
        num_initial=1,
        num_local=2,
        window=window_size,
    )


def fla_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names, of a model or of its layer; gates get the bias 0 that they do not have there.

    >>> sorted(fla_weights({"attn.k_proj.weight": torch.zeros(2, 4), "attn.g_proj.weight": torch.zeros(6, 4)}))
    ['self_attn.attention.gate.proj.bias', 'self_attn.attention.gate.proj.weight', 'self_attn.k_proj.shared.weight']
    """
    renamed = {_renamed(name): weight for name, weight in weights.items() if not name.endswith("rotary.inv_freq")}
    gates = {name: weight for name, weight in renamed.items() if name.endswith("gate.proj.weight")}
    biases = {name.removesuffix("weight") + "bias": torch.zeros_like(weight[:, 0]) for name, weight in gates.items()}
    return renamed | biases


def _renamed(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _intermediate(hidden: int, ratio: int | None) -> int:
    """Two thirds of ``ratio`` times ``hidden``, up to the next multiple of 256."""
    return 256 * -(-int(hidden * (ratio or 4) * 2 / 3) // 256)
