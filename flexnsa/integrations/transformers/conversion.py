"""From a pretrained dense model to NSA: old weights kept, outputs near the old ones to begin with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flexnsa.config import NSAConfig
from flexnsa.integrations.transformers.attention import FlexNSAAttention
from flexnsa.integrations.transformers.configuration import FlexNSAConfig
from flexnsa.integrations.transformers.modeling import FlexNSAForCausalLM
from flexnsa.types import BranchKV

CONVERTIBLE = (LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM)

KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Fields that a converted model takes over from the dense one's configuration, where that has them."""

BY_BRANCH = re.compile(r"(.*\.self_attn\.(k_proj|v_proj|k_norm))\.(\w+)")
"""Weights of which each branch gets its own."""


def convert(
    model: PreTrainedModel,
    config: NSAConfig | None = None,
    *,
    compressor: str = "linear",
    compress_rotated: bool = False,
    shared_kv: bool = False,
    others: float = 0.01,
) -> FlexNSAForCausalLM:
    """A dense causal language model with NSA for its attention, to be trained further.

    Every old weight is kept. Each branch's key and value projections begin as the old ones, the compressor as the mean
    of a block, and the gates at ``1 - 2 * others`` for the selected branch and ``others`` for the two others, whatever
    the input. Where a query selects every block, the selected branch alone is the dense attention; so the outputs begin
    near the dense model's up to ``num_selected * select_block`` tokens. A sliding window of the old model is given up.

    The new model shares the old one's memory; let go of the old one.

    Args:
        model: a ``LlamaForCausalLM``, ``Qwen3ForCausalLM`` or ``MistralForCausalLM``.
        config: the geometry, None for the paper's.
        compressor: ``"linear"``, ``"gated"`` or ``"mean"``, which begin as the mean, or ``"mlp"``, which does not.
        compress_rotated: compress keys after the rotary embedding instead of before it.
        shared_kv: keep one key and value projection for all branches.
        others: gate of the compressed and of the window branch to begin with.

    Returns:
        The model, on the old one's device, in its dtype.

    Raises:
        NotImplementedError: ``model`` is of another class, or has a rotary embedding or a dropout that NSA has not.
        ValueError: an argument does not fit, or the geometry is larger than the model's context.
    """
    if not isinstance(model, CONVERTIBLE):
        names = ", ".join(kind.__name__ for kind in CONVERTIBLE)
        raise NotImplementedError(
            f"model must be one of {names}, got {type(model).__name__}; load it with AutoModelForCausalLM, or use "
            f"sparsify for other models"
        )
    if not 0 < others < 0.5:
        raise ValueError(f"others must lie between 0 and 0.5, got {others}; the gates add up to 1")
    new_config = FlexNSAConfig(
        **_kept(model.config),
        nsa=config,
        compressor=compressor,
        compress_rotated=compress_rotated,
        shared_kv=shared_kv,
        qk_norm=isinstance(model, Qwen3ForCausalLM),
    )
    new = assemble(new_config, _by_branch(model.state_dict(), shared_kv))
    for attention in _attentions(new):
        _lean_on_selected(attention, others)
    new.generation_config = model.generation_config
    return new.train(model.training)


def _kept(config: PretrainedConfig) -> dict[str, Any]:
    return {name: deepcopy(getattr(config, name)) for name in KEPT if hasattr(config, name)}


def _by_branch(weights: Mapping[str, Tensor], shared_kv: bool) -> dict[str, Tensor]:
    """The dense model's weights by their new names: what is by branch, copied for each."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        found = BY_BRANCH.fullmatch(name)
        if found is None:
            renamed[name] = weight
            continue
        one_for_all = shared_kv and found[2] != "k_norm"
        for branch in ("shared",) if one_for_all else BranchKV._fields:
            renamed[f"{found[1]}.{branch}.{found[3]}"] = weight.clone()
    return renamed


def _attentions(model: FlexNSAForCausalLM) -> list[FlexNSAAttention]:
    return [cast(FlexNSAAttention, layer.self_attn) for layer in model.model.layers]


def _lean_on_selected(attention: FlexNSAAttention, others: float) -> None:
    """Gates of ``others``, ``1 - 2 * others``, ``others``, whatever the input."""
    gate = cast(Any, attention.attention.gate).proj
    values = gate.weight.new_tensor([others, 1 - 2 * others, others], dtype=torch.float64)
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(values.logit().repeat(len(gate.bias) // 3))


def assemble(config: FlexNSAConfig, weights: Mapping[str, Tensor]) -> FlexNSAForCausalLM:
    """The model with ``weights`` themselves for its parameters, and new compressors and gates where they have none.

    Raises:
        ValueError: a weight that the model has not, or lacks, or of another shape.
    """
    with torch.device("meta"):
        model = FlexNSAForCausalLM(config)
    _check_weights(model, weights)
    model.load_state_dict(weights, strict=False, assign=True)
    for attention in _attentions(model):
        like = attention.q_proj.weight
        attention.rotary = LlamaRotaryEmbedding(config).to(like.device)
        for module in attention.modules():
            own = dict(module.named_parameters(recurse=False))
            if any(parameter.is_meta for parameter in own.values()):
                module.to_empty(device=like.device, recurse=False).to(like.dtype)
                cast(Any, module).reset_parameters()
    model.tie_weights()
    return model


def _check_weights(model: FlexNSAForCausalLM, weights: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"weights has names that the model has not, {unknown[:3]} among {len(unknown)}")
    new = ("lm_head.", ".compressor.", ".attention.gate.")[0 if model.config.tie_word_embeddings else 1 :]
    missing = sorted(name for name in own.keys() - weights.keys() if not any(part in name for part in new))
    if missing:
        raise ValueError(f"weights lacks names that the model has, {missing[:3]} among {len(missing)}")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ValueError(f"weights[{name!r}] must be {tuple(own[name].shape)}, got {tuple(weight.shape)}")
