"""Native Sparse Attention as one function: the paper's section 3 on a screen."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks
from flexnsa.compressed import compressed_attention
from flexnsa.compression import Compressor, compress
from flexnsa.config import NSAConfig
from flexnsa.engines import Impl
from flexnsa.gating import Deferred, Gated, check_recompute, combine, note_gate
from flexnsa.layout import check_documents, resolve_positions
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import AttentionOutput, BranchKV, Positions, Selection
from flexnsa.window import window_attention
from flexnsa_masks import MaskMod


def native_sparse_attention(
    q: Float[Tensor, "b hq tq d"],
    kv: BranchKV,
    gates: Float[Tensor, "b hq tq 3"],
    config: NSAConfig,
    compressor: Compressor | None,
    *,
    scale: float | None = None,
    positions: Positions | None = None,
    documents: Int[Tensor, "b tk"] | None = None,
    selection: Selection | None = None,
    mask_mod: MaskMod | None = None,
    recompute: Collection[str] = (),
    impl: Impl = "auto",
) -> Float[Tensor, "b hq tq dv"]:
    """Compressed, selected and window attention, mixed by gates.

    >>> import torch
    >>> from flexnsa import MeanPool
    >>> config = NSAConfig()
    >>> q, k, v = torch.randn(1, 8, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
    >>> gates = torch.rand(1, 8, 100, 3)
    >>> native_sparse_attention(q, BranchKV.shared(k, v), gates, config, MeanPool(config)).shape
    torch.Size([1, 8, 100, 64])

    Args:
        q: queries ``[b, hq, tq, d]``.
        kv: keys ``[b, hk, tk, d]`` and values ``[b, hk, tk, dv]`` of each branch; ``hq`` is a multiple of ``hk``.
        gates: ``[b, hq, tq, 3]``, values, not logits, in the order compressed, selected, window.
        config: the geometry.
        compressor: makes compressed tokens of ``kv.compressed``; None where that holds compressed tokens already.
        scale: softmax scale of every branch, None for ``d ** -0.5``.
        positions: int64 ``[tq]`` or ``[b, tq]`` or a range, strictly increasing absolute positions of the queries among
            the KV tokens; None where ``tq == tk``.
        documents: int ``[b, tk]``, non-decreasing document ids of packed rows, -1 for padding, which outputs 0.
        selection: blocks to attend to instead of the most important ones: replays a choice.
        mask_mod: FlexAttention mask mod over absolute token numbers and query heads, in place of causality.
        recompute: ``("window",)`` or ``("selected", "window")``: branches whose output ``[b, hq, tq, dv]`` is not kept
            for the backward but computed again there, with the same selection.
        impl: ``"auto"``, ``"flash"``, ``"triton"``, ``"flex"`` or ``"reference"``.

    Returns:
        ``[b, hq, tq, dv]`` in q's dtype.

    Raises:
        ValueError: the arguments do not fit one another.
        NotImplementedError: the engine asked for cannot run this call.
    """
    _check(q, kv, gates, compressor, documents)
    check_recompute(recompute, ("selected", "window"))
    options: dict[str, Any] = {
        "scale": scale,
        "positions": positions,
        "documents": documents,
        "mask_mod": mask_mod,
        "impl": impl,
    }
    num_tokens = kv.selected[0].shape[2]
    resolve_positions(positions, q, num_tokens)  # refused here, since compressed tokens alone do not tell tk

    gate, *by_branch = gates.unbind(-1)
    k_cmp, v_cmp = compress(compressor, *kv.compressed, config, documents=documents)
    compressed = compressed_attention(q, k_cmp, v_cmp, config, lse_grad=False, **options)
    if selection is None:
        selection = select_blocks(q, k_cmp, compressed.lse, config, num_tokens=num_tokens, **options)
    attend = {
        "selected": partial(selected_attention, q, *kv.selected, selection, config, **options),
        "window": partial(window_attention, q, *kv.window, config, lse_grad=False, **options),
    }
    outputs: list[AttentionOutput | Gated | Deferred] = [note_gate(gate, compressed)]
    for name, gate in zip(attend, by_branch, strict=True):
        outputs.append(Deferred(attend[name]) if name in recompute else note_gate(gate, attend[name]()))
    return combine(gates, outputs)


def _check(q: Tensor, kv: BranchKV, gates: Tensor, compressor: Compressor | None, documents: Tensor | None) -> None:
    if not isinstance(kv, BranchKV):
        raise TypeError(f"kv must be a BranchKV, got {type(kv).__name__}; BranchKV.shared(k, v) makes one of one pair")
    for name, (k, v) in kv._asdict().items():
        axis: Literal["c", "tk"] = "c" if name == "compressed" and compressor is None else "tk"
        checks.check_qkv(q, k, v, (f"kv.{name}[0]", f"kv.{name}[1]"), k_axis=axis)
    checks.check_gates(gates, q, branches=3)
    if documents is not None:
        check_documents(documents, q, kv.selected[0].shape[2])
    if kv.window[0].shape[2] != kv.selected[0].shape[2]:
        raise ValueError(
            f"kv.window and kv.selected must have as many tokens, got {kv.window[0].shape[2]} and "
            f"{kv.selected[0].shape[2]}; project both from the same sequence"
        )
    checks.check_value_dims({name: v.shape[3] for name, (_, v) in kv._asdict().items()})
