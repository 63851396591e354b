"""One decoding step over paged keys and values, for serving engines that own their memory.

Everything is a tensor of fixed shape: pages, block tables, lengths. Nothing waits for the host, so that one captured
CUDA graph serves every length up to the tables' capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexnsa import checks, engines, paged_reference
from flexnsa.compression import Compressor, check_geometry
from flexnsa.config import NSAConfig
from flexnsa.pages import PagedKV, check_append, check_out, check_step
from flexnsa.types import KV, BranchKV, Selection


class StepOutput(NamedTuple):
    """What one decoding step returns.

    Attributes:
        out: ``[b, hq, 1, dv]``, 0 for a sequence of length 0.
        selection: the blocks that each KV group attended to, indices int32 ``[b, hk, 1, n]``.
    """

    out: Float[Tensor, "b hq 1 dv"]
    selection: Selection


@torch.no_grad()
def paged_step(
    q: Float[Tensor, "b hq 1 d"],
    gates: Float[Tensor, "b hq 1 3"],
    pages: PagedKV,
    lengths: Int[Tensor, " b"],
    config: NSAConfig,
    *,
    scale: float | None = None,
    out: Float[Tensor, "b hq 1 dv"] | None = None,
    impl: engines.Impl = "auto",
) -> StepOutput:
    """Attention of one query a sequence, that of its last token, to the keys and values in its pages. No gradient.

    What lies outside of a sequence (unmapped pages, the unwritten rest of its last page) may hold NaN. A sequence may
    be shorter than its table; a window's pages may be unmapped as soon as the window has left them.

    Args:
        q: the query of each sequence's last token ``[b, hq, 1, d]``.
        gates: ``[b, hq, 1, 3]``, values, not logits, in the order compressed, selected, window.
        pages: keys and values of the three branches, the last token's included.
        lengths: int32 or int64 ``[b]``, tokens of each sequence, the query's own included; 0 outputs 0.
        config: the geometry.
        scale: softmax scale of every branch, None for ``d ** -0.5``.
        out: where to write the output, ``[b, hq, 1, dv]`` of q's dtype; None for a new tensor.
        impl: ``"triton"``, ``"reference"`` (which gathers the pages), or ``"auto"``: triton on CUDA where it can run.

    Returns:
        ``StepOutput(out, selection)``.

    Raises:
        ValueError: the arguments do not fit one another; or, read on a CPU and inside ``debug()``, a length exceeds
            the table's capacity or a page within it is unmapped.
        NotImplementedError: the engine asked for cannot run this call.
    """
    check_step(q, gates, pages, lengths, config)
    scale = checks.resolve_scale(scale, q.shape[-1])
    if out is None:
        out = q.new_empty(*q.shape[:3], pages.selected.v.shape[-1])
    check_out(out, q, pages)
    if _engine(impl, q, pages, config.num_selected) == "triton":
        from flexnsa.kernels.decode import paged_step as kernel  # imports triton

        return StepOutput(out, Selection(kernel(q, gates, pages, lengths, out, config, scale=scale)))
    found, selection = paged_reference.paged_step(q, gates, pages, lengths, config, scale=scale)
    return StepOutput(out.copy_(found), selection)


@torch.no_grad()
def paged_append(
    kv: BranchKV,
    pages: PagedKV,
    lengths: Int[Tensor, " b"],
    config: NSAConfig,
    *,
    counts: Int[Tensor, " b"] | None = None,
    compressor: Compressor | None = None,
    recent: KV | None = None,
    impl: engines.Impl = "auto",
) -> None:
    """Write the last ``t`` tokens of each sequence into its pages, and each compressed token that they complete.

    Args:
        kv: keys ``[b, hk, t, d]`` and values ``[b, hk, t, dv]`` of the tokens ``length - t .. length - 1`` of each
            sequence. ``kv.compressed`` holds raw tokens for ``compressor``; without one, the compressed token of the
            block that ends with each token, read only where one ends.
        pages: written in place. A page shared by several sequences must be full already.
        lengths: int32 or int64 ``[b]``, tokens of each sequence, the new ones included.
        config: the geometry.
        counts: int32 or int64 ``[b]``, how many of the ``t`` tokens are new, the last ones; the others are not read.
            None: all, but for those before a sequence's first token.
        compressor: makes the compressed tokens; called with fixed shapes, at every step.
        recent: with ``compressor``, ``(k, v)`` of the last ``compress_block`` raw tokens, ``[b, hk, l, d]`` and
            ``[b, hk, l, dv]``, token p in place ``p % l``; updated in place.
        impl: as for ``paged_step``.

    Raises:
        ValueError: the arguments do not fit one another; or, read on a CPU and inside ``debug()``, a length exceeds
            the table's capacity or a page that is written is unmapped. Nothing has been written then.
        NotImplementedError: the engine asked for cannot run this call.
    """
    check_append(kv, pages, lengths, config, counts, compressor is not None, recent)
    arrival = paged_reference.Arrival.of(kv.selected[0].shape[2], lengths, counts)
    if compressor is not None and recent is not None:
        check_geometry(compressor, config)
        compressed = paged_reference.pooled_entries(compressor, kv.compressed, recent, arrival, config)
        paged_reference.remember(kv.compressed, recent, arrival)
    else:
        compressed = paged_reference.ending_entries(kv.compressed, arrival, config)
    tokens = (paged_reference.token_entries(pair, arrival) for pair in (kv.selected, kv.window))
    write = paged_reference.write
    if _engine(impl, kv.selected[0], pages) == "triton":
        from flexnsa.kernels.decode_append import write  # imports triton
    for entries, part in zip((compressed, *tokens), pages, strict=True):
        write(entries, part)


def _engine(impl: engines.Impl, like: Tensor, pages: PagedKV, num_selected: int = 1) -> engines.Engine:
    """The engine that runs a call; flex has no paged step."""
    if impl == "flex":
        raise NotImplementedError('impl="flex" has no paged step; use impl="triton", "reference" or "auto"')
    tensors = (like, pages.selected.k, pages.selected.v)
    if impl != "auto":
        return engines.choose(impl, "selection", *tensors, num_selected=num_selected).engine
    if like.device.type != "cuda":
        return "reference"
    try:
        return engines.choose("triton", "selection", *tensors, num_selected=num_selected).engine
    except NotImplementedError:
        return "reference"
