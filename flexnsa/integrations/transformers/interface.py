"""``attn_implementation="flexnsa"``: NSA without parameters in a model that stays as it is.

Keys are pooled by their mean, which makes a block's score the mean of its tokens' scores, and each query attends to the
blocks that score best. transformers hands over queries and keys after the rotary embedding and the cache; what it
knows of padding and packing comes through the mask function, which is registered under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from flexnsa.compressed import compressed_attention
from flexnsa.compression import MeanPool, compress
from flexnsa.config import NSAConfig
from flexnsa.integrations.transformers.configuration import check_context
from flexnsa.integrations.transformers.masking import NAME, Visibility, flexnsa_mask
from flexnsa.nsa import native_sparse_attention
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import BranchKV
from flexnsa.window import window_attention

SELECTED_ONLY = (0.0, 1.0, 0.0)

REFUSED = ("softcap", "s_aux", "position_bias")
"""What some models ask of an attention function that NSA's branches do not have."""


def flexnsa_attention(
    module: nn.Module,
    query: Float[Tensor, "b hq tq d"],
    key: Float[Tensor, "b hk tk d"],
    value: Float[Tensor, "b hk tk dv"],
    attention_mask: Visibility | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b tq hq dv"], None]:
    """The attention function, called by transformers once a layer.

    Raises:
        NotImplementedError: the model asks for what NSA has not: dropout, a mask of its own, attention to the future.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    seen = Visibility() if attention_mask is None else attention_mask
    if seen.positions is None and query.shape[2] != key.shape[2]:
        past = key.shape[2] - query.shape[2]
        seen = seen._replace(positions=torch.arange(query.shape[2], device=query.device) + past)
    geometry, dense_up_to, gates = _settings(module.config)
    options: dict[str, Any] = {"scale": scaling, **seen._asdict()}
    if (window := options.pop("window")) is not None:
        local = NSAConfig(**(asdict(geometry) | {"window": window}))
        out = window_attention(query, key, value, local, **options).out
    elif key.shape[2] <= dense_up_to:
        return sdpa_attention_forward(module, query, key, value, _dense_mask(query, key, seen), 0.0, scaling)
    elif gates == SELECTED_ONLY:
        out = _selected(query, key, value, geometry, options)
    else:
        shares = query.new_tensor(gates).expand(*query.shape[:3], 3)
        kv = BranchKV.shared(key, value)
        out = native_sparse_attention(query, kv, shares, geometry, MeanPool(geometry), **options)
    return out.transpose(1, 2).contiguous(), None


def _selected(q: Tensor, k: Tensor, v: Tensor, geometry: NSAConfig, options: dict[str, Any]) -> Tensor:
    """The selected branch; of the compressed one only the LSE is wanted, for which the values are of no account."""
    k_cmp, _ = compress(MeanPool(geometry), k, k, geometry, documents=options["documents"])
    lse = compressed_attention(q, k_cmp, k_cmp, geometry, **options).lse
    selection = select_blocks(q, k_cmp, lse, geometry, num_tokens=k.shape[2], **options)
    return selected_attention(q, k, v, selection, geometry, **options).out


def _dense_mask(query: Tensor, key: Tensor, seen: Visibility) -> Tensor | None:
    """What SDPA is to see, bool ``[b|1, 1, tq, tk]``; None for plain causality, for which it has faster kernels."""
    if seen.documents is None and seen.positions is None and seen.mask_mod is None:
        return None
    positions = torch.arange(query.shape[2], device=query.device) if seen.positions is None else seen.positions
    token = torch.arange(key.shape[2], device=key.device)
    mask = (token <= positions[:, None])[None, None]
    if seen.mask_mod is not None:
        batch = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
        mask = seen.mask_mod(batch, batch.new_zeros(()), positions[:, None], token)
    if seen.documents is None:
        return mask
    own = seen.documents[:, positions]
    return mask & ((own[..., None] == seen.documents[:, None]) & (own >= 0)[..., None])[:, None]


def _refuse(module: nn.Module, attention_mask: object, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and not isinstance(attention_mask, Visibility):
        raise NotImplementedError(
            f'attn_implementation="{NAME}" takes a mask [b, tk] of zeros and ones, got {type(attention_mask).__name__} '
            f"of shape {tuple(getattr(attention_mask, 'shape', ()))}; pass such a mask, or position_ids for packed rows"
        )
    if dropout:
        raise NotImplementedError(
            f'attn_implementation="{NAME}" has no dropout, got {dropout}; set config.attention_dropout to 0'
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f'attn_implementation="{NAME}" is causal, but {type(module).__name__} is not')
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'attn_implementation="{NAME}" has no {name}, which {type(module).__name__} uses')


def sparsify(
    model: PreTrainedModel,
    config: NSAConfig | None = None,
    *,
    dense_up_to: int | None = None,
    gates: Sequence[float] = SELECTED_ONLY,
) -> PreTrainedModel:
    """NSA for ``model``, in place, without a parameter more: dense for short contexts, sparse for long.

    Layers that have a sliding window keep it. The settings are saved with the model's configuration, as ``nsa``; a
    model loaded from it needs ``attn_implementation="flexnsa"`` once more.

    Args:
        model: any model whose attention goes through transformers' attention functions.
        config: the geometry, None for the paper's.
        dense_up_to: tokens up to which attention is dense; None for as many as a query selects in any case, 0 for
            always sparse.
        gates: fixed gates of the compressed, selected and window branch.

    Returns:
        The model.

    Raises:
        NotImplementedError: the model's class does its attention itself.
        ValueError: an argument does not fit, or the geometry is larger than the model's context.
    """
    geometry = NSAConfig() if config is None else config
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise NotImplementedError(
            f"model must be a transformers model that takes attention functions, such as Llama, Qwen3 or Mistral; got "
            f"{type(model).__name__}"
        )
    if len(gates) != 3:
        raise ValueError(f"gates must be three numbers, for the compressed, selected and window branch, got {gates}")
    if dense_up_to is not None and dense_up_to < 0:
        raise ValueError(f"dense_up_to must be at least 0 tokens, got {dense_up_to}; 0 is never dense")
    text = model.config.get_text_config(decoder=True)
    check_context(geometry, text.max_position_embeddings)
    text.nsa = asdict(geometry) | {"dense_up_to": dense_up_to, "gates": list(gates)}
    model.set_attn_implementation(NAME)
    return model


def _settings(config: Any) -> tuple[NSAConfig, int, tuple[float, ...]]:
    """Geometry, longest dense context and gates that the model's configuration holds, or the defaults."""
    settings = dict(getattr(config, "nsa", None) or {})
    dense_up_to, gates = settings.pop("dense_up_to", None), settings.pop("gates", SELECTED_ONLY)
    geometry = NSAConfig(**settings)
    if dense_up_to is None:
        dense_up_to = geometry.num_selected * geometry.select_block if tuple(gates) == SELECTED_ONLY else 0
    return geometry, dense_up_to, tuple(gates)


def register() -> None:
    """Make the name known to transformers: the attention function, and the mask function, so that padding counts."""
    AttentionInterface.register(NAME, flexnsa_attention)
    AttentionMaskInterface.register(NAME, flexnsa_mask)
