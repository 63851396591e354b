"""The selected branch: attention to the tokens of the chosen blocks (paper, section 3.3.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, engines, flex, reference
from flexnsa.config import NSAConfig
from flexnsa.layout import query_table
from flexnsa.types import AttentionOutput, Positions, Selection
from flexnsa_masks import MaskMod, ScoreMod


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    selection: Selection,
    config: NSAConfig,
    *,
    scale: float | None = None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    impl: engines.Impl = "auto",
) -> AttentionOutput:
    """Attention of each query to the tokens of its selected blocks, up to itself.

    Args:
        q: queries ``[b, hq, tq, d]``.
        k: keys ``[b, hk, tk, d]``; ``hq`` is a multiple of ``hk``.
        v: values ``[b, hk, tk, dv]``.
        selection: the blocks of each query, one choice a KV head; any number of blocks.
        config: the geometry.
        scale: softmax scale, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, absolute positions of the queries, None for ``0 .. tk-1``.
        documents: int ``[b, tk]``, document of each KV token, -1 for padding; block ids count from its start.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        score_mod: FlexAttention score mod over absolute token numbers and query heads.
        impl: the engine.

    Returns:
        ``AttentionOutput(out, lse)``.

    Raises:
        ValueError: the arguments do not fit one another, or the indices break the contract of ``Selection``.
        NotImplementedError: the engine asked for cannot run this call.
    """
    checks.check_qkv(q, k, v)
    check_selection(selection, q, k, config)
    checks.check_score_mod(score_mod)
    scale = checks.resolve_scale(scale, q.shape[-1])
    table = query_table(q, config, num_tokens=k.shape[2], positions=positions, documents=documents, mask_mod=mask_mod)
    engine = engines.choose(impl, "selected", q, k, v, mods=score_mod is not None, mask_mod=mask_mod).engine
    if engine == "triton":
        from flexnsa.kernels.selected import selected_attention as kernel  # imports triton

        start = table.start if table.packed else table.start[:, :1]
        low, last = table.masked_range(q.shape[0]) or (None, table.position)
        where = (selection.indices, last, start)
        return AttentionOutput(*kernel(q, k, v, *where, select_block=config.select_block, scale=scale, low=low))
    if engine == "flex":
        return flex.selected_attention(q, k, v, selection, table, config, scale=scale, score_mod=score_mod)
    return reference.selected_attention(q, k, v, selection, table, config, scale=scale, score_mod=score_mod)


def check_selection(selection: Selection, q: Tensor, k: Tensor, config: NSAConfig) -> None:
    """The indices fit queries and keys; their values are read on a CPU, or inside ``debug()``."""
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}; wrap it, Selection(indices)")
    indices = selection.indices
    expected = (q.shape[0], k.shape[1], q.shape[2])
    if indices.ndim != 4 or indices.shape[:3] != expected or indices.shape[3] == 0:
        raise ValueError(f"selection.indices must be [b, hk, tq, n] = {(*expected, 'n')}, got {tuple(indices.shape)}")
    if indices.dtype != torch.int32:
        raise ValueError(f"selection.indices must be int32, got {indices.dtype}; convert it with .int()")
    if indices.device != q.device:
        raise ValueError(f"selection.indices must be on q's device {q.device}, got {indices.device}; move it")
    if checks.values_are_checked(indices):
        _check_index_values(indices, config.num_blocks(k.shape[2]))


def _check_index_values(indices: Tensor, num_blocks: int) -> None:
    if ((indices < -1) | (indices >= num_blocks)).any():
        raise ValueError(
            f"selection.indices must lie in 0 .. {num_blocks - 1}, or be -1 for padding, got "
            f"{int(indices.min())} .. {int(indices.max())}"
        )
    left, right = indices[..., :-1], indices[..., 1:]
    if not ((right == -1) | ((left >= 0) & (left < right))).all():
        raise ValueError("selection.indices must be ascending without repeats, with padding (-1) at the end; sort them")
