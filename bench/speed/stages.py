"""NSA's stages one by one, each given what the one before it made: where the time goes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.speed.cases import Case
from bench.speed.inputs import Tensors
from flexnsa import (
    AttentionOutput,
    MeanPool,
    Selection,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from flexnsa.compression import compress
from flexnsa.gating import combine


class Stage(NamedTuple):
    """One stage as a call, and what its output is differentiated by.

    Attributes:
        name: as in ``flexnsa.explain``, and ``compression`` and ``gates``.
        call: runs it.
        leaves: the tensors that get a gradient; none for the selection.
    """

    name: str
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]


def select(case: Case, x: Tensors) -> Tensor:
    """The blocks ``[b, hk, t, n]`` that whole NSA selects."""
    config, tokens = case.config, x.q.shape[2]
    packing: dict[str, Any] = {"documents": x.documents}
    with torch.no_grad():
        k_cmp, v_cmp = compress(MeanPool(config), x.k, x.v, config, **packing)
        lse = compressed_attention(x.q, k_cmp, v_cmp, config, **packing).lse
        return select_blocks(x.q, k_cmp, lse, config, num_tokens=tokens, **packing).indices


def stages(case: Case, x: Tensors) -> Iterator[Stage]:
    """The stages in their order, uncompiled, by the engines that ``impl="auto"`` takes."""
    config, pool, tokens = case.config, MeanPool(case.config), x.q.shape[2]
    packing: dict[str, Any] = {"documents": x.documents}
    yield Stage("compression", lambda: torch.cat(compress(pool, x.k, x.v, config, **packing), -1), (x.k, x.v))
    with torch.no_grad():
        k_cmp, v_cmp = (y.requires_grad_() for y in compress(pool, x.k, x.v, config, **packing))

    def compressed() -> AttentionOutput:
        return compressed_attention(x.q, k_cmp, v_cmp, config, lse_grad=False, **packing)

    yield Stage("compressed", lambda: compressed().out, (x.q, k_cmp, v_cmp))
    with torch.no_grad():
        lse = compressed().lse

    def choose() -> Tensor:
        return select_blocks(x.q, k_cmp, lse, config, num_tokens=tokens, **packing).indices

    yield Stage("selection", choose, ())
    selection = Selection(choose())
    raw = (x.q, x.k, x.v)
    yield Stage("selected", lambda: selected_attention(*raw, selection, config, **packing).out, raw)
    yield Stage("window", lambda: window_attention(*raw, config, lse_grad=False, **packing).out, raw)
    outs = [torch.randn_like(x.grad).requires_grad_() for _ in range(3)]
    outputs = [AttentionOutput(out, lse) for out in outs]
    yield Stage("gates", lambda: combine(x.gates, outputs), (x.gates, *outs))
