"""The model's cache, as transformers' ``generate`` handles it: one NSA cache for each layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flexnsa.cache import NSACache
from flexnsa.integrations.transformers.configuration import FlexNSAConfig
from flexnsa.layer import NativeSparseAttention


class FlexNSACache(Cache):
    """Keys and values of every layer, in buffers of a fixed size, allocated by the first tokens that come.

    ``generate`` makes one for as many tokens as it may reach. Make one yourself to go on from it:

    >>> cache = FlexNSACache(FlexNSAConfig(num_hidden_layers=2), max_tokens=1000)
    >>> cache.get_seq_length(), cache.get_max_length()
    (0, 1000)

    Args:
        config: the model's configuration.
        max_tokens: tokens that a row can hold; padding takes no room.
        max_rollback: how many of the latest tokens ``crop`` can drop.

    Attributes:
        settled: whether the rows' last column was a token in all of them, so that padding on the left has ended.
    """

    def __init__(self, config: FlexNSAConfig, max_tokens: int, max_rollback: int = 0):
        super().__init__(layers=[_Layer(max_tokens, max_rollback) for _ in range(config.num_hidden_layers)])
        self.settled = False

    def of_layer(self, layer: NativeSparseAttention, batch: int) -> NSACache:
        """The layer's own cache, allocated for ``batch`` rows when it is first asked for."""
        return self.layers[layer.layer_idx].made_by(layer, batch)

    def count(self, layer_idx: int, columns: int) -> None:
        """Say that a layer's cache has been given so many columns of the input."""
        self.layers[layer_idx].columns += columns

    def settle(self, documents: Int64[Tensor, "b t"] | None) -> None:
        """Take note of how the padding of the latest columns ends."""
        known = documents is None or not torch.compiler.is_compiling()
        self.settled = known and (documents is None or bool((documents[:, -1] >= 0).all()))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' buffers."""
        return sum(layer.nsa.nbytes for layer in self.layers if layer.nsa is not None)


class _Layer(CacheLayerMixin):
    """One layer's cache, and how many columns of the input it has seen, padding included."""

    is_croppable = True

    def __init__(self, max_tokens: int, max_rollback: int):
        super().__init__()
        self.max_tokens, self.max_rollback = max_tokens, max_rollback
        self.nsa: NSACache | None = None
        self.columns = 0

    def made_by(self, layer: NativeSparseAttention, batch: int) -> NSACache:
        if self.nsa is None:
            kind = layer.q_proj.weight.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self.nsa = layer.new_cache(batch, self.max_tokens, self.max_rollback, dtype=dtype)
            self.is_initialized = True
        return self.nsa

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an NSA cache is made by its layer; call the model with past_key_values=")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("an NSA cache is filled by its layer; call the model with past_key_values=")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return self.max_tokens

    def reset(self) -> None:
        self.columns = 0
        if self.nsa is not None:
            self.nsa.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every row: transformers counts them below zero."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or below, got {tokens_to_remove}; -2 drops two tokens")
        if self.nsa is not None:
            self.nsa.crop(-int(tokens_to_remove))
            self.columns += int(tokens_to_remove)

    def reorder_cache(self, beam_idx: Int64[Tensor, " b"]) -> None:
        if self.nsa is not None:
            self.nsa.reorder(beam_idx.to(self.nsa.device, torch.int64))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.nsa is not None:
            self.reorder_cache(torch.arange(self.nsa.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Int64[Tensor, " rows"]) -> None:
        self.reorder_cache(indices)
