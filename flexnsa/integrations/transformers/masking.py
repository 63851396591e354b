"""The mask function of ``attn_implementation="flexnsa"``: padding and packing without a mask of size tq x tk."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import add_offsets_to_mask_function, and_masks, causal_mask_function

from flexnsa.integrations.transformers.padding import documents_from_breaks, documents_from_mask
from flexnsa_masks import MaskMod

NAME = "flexnsa"
"""What to pass as ``attn_implementation``."""


class Visibility(NamedTuple):
    """What the mask function tells the attention function, in place of a mask of size tq x tk.

    Attributes:
        documents: int64 ``[b, tk]``, 0 for a token and -1 for padding; None without padding.
        positions: int64 ``[tq]``, the queries' places among the keys; None where they are all of the keys.
        mask_mod: what replaces causality, packed rows for instance; None for causality.
        window: keys that a layer with a sliding window of its own sees; None for a layer that sees all.
    """

    documents: Int[Tensor, "b tk"] | None = None
    positions: Int[Tensor, " tq"] | None = None
    mask_mod: MaskMod | None = None
    window: int | None = None

    def contiguous(self) -> NoReturn:
        """Asked of masks that are made ahead of the model, which ``generate`` does for static caches alone.

        Raises:
            NotImplementedError: always.
        """
        _refuse_static_cache()

    @property
    def ndim(self) -> NoReturn:
        """Asked of such masks by other versions of transformers."""
        _refuse_static_cache()


def _refuse_static_cache() -> NoReturn:
    raise NotImplementedError(
        f'attn_implementation="{NAME}" has no static cache; leave cache_implementation out, or convert the model: its '
        f"own cache is static"
    )


def flexnsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskMod = causal_mask_function,
    attention_mask: Bool[Tensor, "b columns"] | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility:
    """The mask function, called by transformers once a forward.

    Raises:
        NotImplementedError: the model's layers attend in chunks.
    """
    if local_size is not None and local_size == getattr(kwargs.get("config"), "attention_chunk_size", None):
        raise NotImplementedError(f'attn_implementation="{NAME}" has no chunked attention (Llama 4); use "sdpa"')
    positions = None if q_length == kv_length else torch.arange(q_length, device=device) + (q_offset - kv_offset)
    documents = documents_from_mask(None if attention_mask is None else attention_mask[:, kv_offset:])
    if mask_function is causal_mask_function:
        return Visibility(documents, positions, None, local_size)
    # Conditions that all hold, and none of them the user's own, are causality, packing and a sliding window.
    if mask_function.__code__ is and_masks().__code__ and not kwargs.get("use_vmap"):
        packed = _packed(mask_function, batch_size, q_length, device) if positions is None else None
        return Visibility(packed if documents is None else documents, positions, None, local_size)
    mask_mod = add_offsets_to_mask_function(mask_function, kv_offset, kv_offset)
    return Visibility(documents, positions, mask_mod, local_size)


def _packed(mask_function: MaskMod, batch: int, tokens: int, device: torch.device | str) -> Tensor | None:
    """Documents of packed rows: one ends where a token does not see the token before it."""
    rows, token = torch.arange(batch, device=device)[:, None], torch.arange(1, tokens, device=device)[None]
    follows = mask_function(rows, torch.zeros_like(rows), token, token - 1)
    return documents_from_breaks(~follows.expand(batch, -1))
