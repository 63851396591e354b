"""NSA's stages one by one, each given what the one before it made: where the time goes."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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


def stages(case: Case, x: Tensors) -> Iterator[Stage]:
    """The stages in their order, uncompiled, by the engines that ``impl="auto"`` takes."""
    config, pool, tokens = case.config, MeanPool(case.config), x.q.shape[2]
    yield Stage("compression", lambda: torch.cat(compress(pool, x.k, x.v, config), -1), (x.k, x.v))
    with torch.no_grad():
        k_cmp, v_cmp = (y.requires_grad_() for y in compress(pool, x.k, x.v, config))
    yield Stage("compressed", lambda: compressed_attention(x.q, k_cmp, v_cmp, config).out, (x.q, k_cmp, v_cmp))
    with torch.no_grad():
        compressed = compressed_attention(x.q, k_cmp, v_cmp, config)

    def choose() -> Tensor:
        return select_blocks(x.q, k_cmp, compressed.lse, config, num_tokens=tokens).indices

    yield Stage("selection", choose, ())
    selection = Selection(choose())
    yield Stage("selected", lambda: selected_attention(x.q, x.k, x.v, selection, config).out, (x.q, x.k, x.v))
    yield Stage("window", lambda: window_attention(x.q, x.k, x.v, config).out, (x.q, x.k, x.v))
    outs = [torch.randn_like(x.grad).requires_grad_() for _ in range(3)]
    outputs = [AttentionOutput(out, compressed.lse) for out in outs]
    yield Stage("gates", lambda: combine(x.gates, outputs), (x.gates, *outs))
