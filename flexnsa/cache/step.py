"""One token a row by the decoding kernels, which read a cache's stores as they lie."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flexnsa import checks, engines
from flexnsa.branches import CompressedBranch, ImportanceSelector, SelectedBranch, WindowBranch
from flexnsa.cache.cache import NSACache
from flexnsa.composition import SparseAttention
from flexnsa.config import NSAConfig
from flexnsa.types import BranchKV


def takes_kernels(attention: SparseAttention, q: Float[Tensor, "b hq tq d"], cache: NSACache) -> bool:
    """Whether the decoding kernels compute this call: one token a row, no gradients, NSA as published, on triton.

    Raises:
        ValueError, NotImplementedError: as ``engines.choose``.
    """
    if q.shape[2] != 1 or torch.is_grad_enabled() or attention.impl not in ("auto", "triton"):
        return False
    if not _is_published(attention, cache.config):
        return False
    tensors = (q, cache.selected.k, cache.selected.v)
    choice = engines.choose(attention.impl, "selection", *tensors, num_selected=cache.config.num_selected)
    return choice.engine == "triton"


def attend_to_cache(
    q: Float[Tensor, "b hq 1 d"], gates: Float[Tensor, "b hq 1 3"], cache: NSACache
) -> Float[Tensor, "b hq 1 dv"]:
    """The output of each row's last token, whose keys and values the cache holds already."""
    from flexnsa.kernels.decode import cached_step  # imports triton

    checks.check_gates(gates, q, branches=3)
    out = q.new_empty(*q.shape[:3], cache.selected.v.shape[3])
    compressed, selected, window = (store.whole for store in (cache.compressed, cache.selected, cache.window))
    kv = BranchKV(compressed, selected, window)
    cached_step(q, gates, kv, cache.lengths, out, cache.config, max_tokens=cache.max_tokens)
    return out


def _is_published(attention: SparseAttention, config: NSAConfig) -> bool:
    """NSA's own branches and selector, without mods, biases or scales."""
    branches, selector = attention.branches, attention.selector
    if type(attention) is not SparseAttention or tuple(branches) != BranchKV._fields:
        return False
    compressed, selected, window = branches.values()
    return (
        type(compressed) is CompressedBranch
        and type(selected) is SelectedBranch
        and type(window) is WindowBranch
        and type(selector) is ImportanceSelector
        and compressed.compressor is None
        and selected.bias is None
        and all(x.scale is None and x.score_mod is None for x in (compressed, selected, window))
        and all(x.config == config for x in (compressed, selected, window, selector))
        and selector.branch == "compressed"
    )
