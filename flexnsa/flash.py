"""FlexAttention's FLASH backend: the branches with static masks on the CuTe kernels of the package flash-attn-4.

What it cannot do, ``flexnsa.engines`` knows: it is asked for nothing else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexnsa.compiled import call_compiled
from flexnsa.config import NSAConfig
from flexnsa.dense import full_precision
from flexnsa.engines import FLASH_MENDED
from flexnsa.layout import QueryTable
from flexnsa.static_masks import TILE, static_mask
from flexnsa.types import AttentionOutput


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7), its LSE without a gradient."""
    count = k_cmp.shape[2]
    # Whole tiles, of which there is one at least: the mask hides what is added.
    added = max(1, -(-count // TILE)) * TILE - count
    k_cmp, v_cmp = (F.pad(x, (0, 0, 0, added)) for x in (k_cmp, v_cmp))
    sizes = (config.compress_block, config.compress_stride)
    mask = static_mask("compressed", sizes, table.position, k_cmp.shape[2], for_flash=True)
    return _attend(q, k_cmp, v_cmp, mask, scale)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3), its LSE without a gradient."""
    mask = static_mask("sliding_window", (config.window,), table.position, k.shape[2], for_flash=True)
    return _attend(q, k, v, mask, scale)


@full_precision
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> AttentionOutput:
    if torch.compiler.is_compiling():
        return AttentionOutput(*_graph(q, k, v, mask, scale))
    return AttentionOutput(*call_compiled(_graph, q, k, v, mask, scale))


def _graph(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    out, aux = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"BACKEND": "FLASH"},
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    # Here and not by the caller: an LSE that leaves the graph with a gradient makes the backward's lowering fail.
    lse = aux.lse.detach()
    # Before 2.13 torch multiplies it by ln 2, as it must the LSE of its own kernels, which is a logarithm to base 2.
    return out, lse if FLASH_MENDED else lse / math.log(2)
