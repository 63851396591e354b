"""The FlexAttention engine: every branch is a block mask built from geometry, or from the selection's indices.

On CUDA the call is compiled, once for the process; on a CPU FlexAttention runs eagerly and forward only, for parity.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, FlexKernelOptions, flex_attention

from flexnsa.config import NSAConfig
from flexnsa.dense import full_precision
from flexnsa.layout import QueryTable, compressed_starts
from flexnsa.types import AttentionOutput, Selection
from flexnsa.visibility import at_last_token, compressed_mask
from flexnsa_masks import MaskMod, ScoreMod, and_masks, at_positions, block_mask, key_range, selected

# The membership lookup is pipelined with K and V: at the three stages of FlexAttention the backward is 1 KiB too
# large for an H200's shared memory (bf16, d = 128).
SELECTED_OPTIONS = cast(FlexKernelOptions, {"bwd_num_stages": 2})


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7)."""
    if k_cmp.shape[2] == 0:  # FlexAttention cannot index keys of length 0: one that nobody sees stands in.
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 1)) for x in (k_cmp, v_cmp))
        table, score_mod = table._replace(visible=None), None
    if table.visible is None:
        mask_mod = key_range(*table.compressed_range(config))
    else:
        starts = compressed_starts(table.documents, config)
        mask_mod = at_positions(compressed_mask(table.visible, starts, config), table.position)
    if score_mod is not None:
        starts = compressed_starts(table.documents, config)
        score_mod = _placed(at_last_token(score_mod, starts, config), table, group=1)
    return _attend(q, k_cmp, v_cmp, mask_mod, score_mod, scale)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3)."""
    mask_mod = key_range(*table.window_range(config))
    if table.visible is not None:
        mask_mod = and_masks(mask_mod, at_positions(table.visible, table.position))
    return _attend(q, k, v, mask_mod, None if score_mod is None else _placed(score_mod, table, group=1), scale)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    selection: Selection,
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the visible tokens of the selected blocks (Eq. 11 and 12).

    The heads of a group share their blocks, so they are folded into the query axis (row = token * g + head): a tile of
    rows then spans few tokens, and the union of their blocks stays small.
    """
    group = q.shape[1] // k.shape[1]
    member = selected(
        selection.indices,
        config.select_block,
        num_blocks=config.num_blocks(k.shape[2]),
        start=table.start if table.packed else None,
        group=group,
    )
    if table.visible is None:
        seen = key_range(*table.causal_range(), group=group)
    else:
        seen = _placed_mask(table.visible, table, group)
    if score_mod is not None:
        score_mod = _placed(score_mod, table, group)
    rows = rearrange(q, "b (hk g) t d -> b hk (t g) d", g=group)
    mask_mod, (batch, heads) = and_masks(member, seen), k.shape[:2]
    out, lse = _attend(rows, k, v, mask_mod, score_mod, scale, batch=batch, heads=heads, options=SELECTED_OPTIONS)
    return AttentionOutput(
        rearrange(out, "b hk (t g) d -> b (hk g) t d", g=group), rearrange(lse, "b hk (t g) -> b (hk g) t", g=group)
    )


def _place(table: QueryTable, group: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(b, h, row) -> (query head, position)`` where the heads of a group are folded into the query axis."""
    shared = table.position.shape[0] == 1

    def place(b: Tensor, h: Tensor, q_idx: Tensor) -> tuple[Tensor, Tensor]:
        row = q_idx.to(torch.int64)
        return h * group + row % group, table.position[torch.zeros_like(b) if shared else b, row // group]

    return place


def _placed_mask(mask_mod: MaskMod, table: QueryTable, group: int) -> MaskMod:
    """A mask mod over query heads and positions, asked about folded rows. It carries no geometry."""
    place = _place(table, group)

    def placed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head, position = place(b, h, q_idx)
        return (position >= 0) & mask_mod(b, head, position.clamp(min=0), kv_idx)

    return placed


def _placed(score_mod: ScoreMod, table: QueryTable, group: int) -> ScoreMod:
    """A score mod over query heads and positions, asked about folded rows."""
    place = _place(table, group)

    def placed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head, position = place(b, h, q_idx)
        return score_mod(score, b, head, position.clamp(min=0), kv_idx)

    return placed


@full_precision
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod,
    score_mod: ScoreMod | None,
    scale: float,
    *,
    batch: int | None = None,
    heads: int | None = None,
    options: FlexKernelOptions | None = None,
) -> AttentionOutput:
    mask = block_mask(mask_mod, q_len=q.shape[2], kv_len=k.shape[2], batch=batch, heads=heads, device=q.device)
    if not torch.is_grad_enabled():  # On a CPU FlexAttention refuses tensors that require grad even then.
        q, k, v = q.detach(), k.detach(), v.detach()
    out, aux = _attention_function(q)(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return AttentionOutput(out, aux.lse)


def _attention_function(q: Tensor) -> Callable[..., tuple[Tensor, AuxOutput]]:
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled_flex_attention() if q.device.type == "cuda" else _eager_flex_attention


@functools.cache
def _compiled_flex_attention() -> Callable[..., tuple[Tensor, AuxOutput]]:
    # At the first call, not on import: torch.compile loads triton and takes a second.
    return torch.compile(flex_attention, dynamic=True)


def _eager_flex_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, AuxOutput]:
    with warnings.catch_warnings():  # It says on each call that it is slow, which is why "auto" avoids it here.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)
