"""Selected attention, forward: the blocks that neighbours have in common by tiles, the rest by query or by block."""

import warnings
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompilationError
from triton.tools.tensor_descriptor import TensorDescriptor

from flexnsa.kernels.blocks import Blocks, locate_blocks
from flexnsa.kernels.configs import HopperPlan, Tile, forward_plan, generation, hopper_plan, padded, shared_memory
from flexnsa.kernels.inversion import invert_selection
from flexnsa.kernels.launch import ceil_div, next_power
from flexnsa.kernels.selected_pairs import merge_pairs, pair_attention
from flexnsa.kernels.selected_tiles import query_attention, tile_attention
from flexnsa.kernels.sharing import Sharing, share_selection
from flexnsa.kernels.spans import PARTIAL_BYTES, spans

selected_hopper: Any
try:
    from flexnsa.kernels import selected_hopper
except (ImportError, AttributeError):  # a Triton without Gluon, or with another
    selected_hopper = None

_ROWS_PER_ITEM = 1024
_MERGE_ROWS = 16


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, position: Tensor, start: Tensor, low: Tensor | None,
    out: Tensor, lse: Tensor, select_block: int, scale: float,
) -> None:  # fmt: skip
    """Write output [b, hq, tq, dv] and LSE [b, hq, tq], contiguous, of selected attention.

    q, k and v have any strides. ``scale`` is not negative: the kernels look for the highest product.
    """
    (batch, hq, tq, d), (_, hk, _, dv) = q.shape, v.shape
    hopper = hopper_plan(q.element_size(), d, dv, select_block, hq // hk) if low is None else None
    if (
        hopper
        and _has_hopper_kernel(q.device)
        and q.stride(-1) == 1
        and _copyable(k)
        and _copyable(v)
        and _attend_fetched(q, k, v, indices, position, start, out, lse, select_block, scale, hopper)
    ):
        return
    plan = forward_plan(q.element_size(), d, dv, select_block, hq // hk, shared_memory(q.device))
    blocks = locate_blocks(indices, position, start, k.shape[2], select_block, ranks=not plan.by_query, low=low)
    sharing = share_selection(
        blocks.base, plan.queries, plan.least, plan.worth,
        otherwise=plan.otherwise, rest=True, blocks=blocks, select_block=select_block,
    )  # fmt: skip
    shape: dict[str, Any] = {
        "G": hq // hk,
        "D": d,
        "DV": dv,
        "D_PAD": padded(d),
        "DV_PAD": padded(dv),
        "SELECT": select_block,
    }
    shape |= {"PRECISION": precision(q), "MASKED": blocks.masked}
    strides = (*q.stride(), *k.stride(), *v.stride())
    row_tiles = ceil_div(plan.queries * (hq // hk), plan.shared.rows)
    tables, near = (blocks.seen, blocks.low), block_offset_type(select_block, k, v)
    copy = generation(q.device) >= 9 and _copyable(k) and _copyable(v)
    tile_attention[(ceil_div(tq, plan.queries), batch * hk, row_tiles)](
        q, k, v, *tables, sharing.base, sharing.members, sharing.common, sharing.whole, out, lse,
        *_copies(k, v, plan.shared, copy), *strides,
        hk, tq, sharing.base.shape[-1], scale, **shape, **_tile(plan.shared, select_block), QUERIES=plan.queries,
        BY_QUERY=plan.by_query, OFFSET=near, COPY=copy,
    )  # fmt: skip
    if plan.by_query:
        query_attention[(tq, batch * hk, ceil_div(hq // hk, plan.rest.rows))](
            q, k, v, *tables, sharing.rest, sharing.rest_count, sharing.common, out, lse,
            *_copies(k, v, plan.rest, copy), *strides,
            hk, tq, sharing.common.shape[-1], scale, QUERIES=plan.queries, N=blocks.base.shape[-1],
            N_PAD=next_power(blocks.base.shape[-1]), OFFSET=near, COPY=copy, **shape,
            **_tile(plan.rest, select_block),
        )  # fmt: skip
    else:
        _attend_pairs(q, k, v, blocks, sharing, scale, shape, plan.rest, out, lse)


_refused: list[CompilationError] = []
"""Why Triton did not compile the kernel in Gluon, if it did not."""


def _has_hopper_kernel(device: torch.device) -> bool:
    """Whether the kernel in Gluon runs: its products are Hopper's alone."""
    return device.type == "cuda" and generation(device) == 9 and selected_hopper is not None and not _refused


def _attend_fetched(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, position: Tensor, start: Tensor, out: Tensor, lse: Tensor,
    select_block: int, scale: float, plan: HopperPlan,
) -> bool:  # fmt: skip
    """All of it by one kernel; False where this version of Triton does not compile that."""
    (batch, _, tq, _), hk, queries = q.shape, k.shape[1], selected_hopper.QUERIES.value
    blocks = locate_blocks(indices, position, start, k.shape[2], select_block, ranks=False)
    sharing = share_selection(
        blocks.base, queries, plan.least, 1.0, otherwise=plan.least, even=True, rest=True,
        blocks=blocks, select_block=select_block,
    )  # fmt: skip
    try:
        selected_hopper.fetched_attention[(ceil_div(tq, queries), batch * hk)](
            q, blocks.seen, sharing.base, sharing.members, sharing.common, sharing.whole, sharing.rest,
            sharing.rest_count, out, lse, *selected_hopper.copies(k, v), *q.stride()[:3], hk, tq,
            sharing.base.shape[-1], scale,
            N=blocks.base.shape[-1], SLOTS=plan.slots, num_warps=4, maxnreg=plan.registers,
        )  # fmt: skip
    except CompilationError as error:
        # Gluon is young, and what it calls things changes. The other kernels do the same.
        _refused.append(error)
        warnings.warn("triton did not compile flexnsa's kernel for Hopper: slower ones run", stacklevel=2)
    return not _refused


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine takes its strides: dims side by side, all else in steps of 16 bytes."""
    steps = [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])]
    return x.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def _copies(k: Tensor, v: Tensor, tile: Tile, copy: bool) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """What the copy engine needs to know of keys and values, to bring a tile's at a time."""
    if not copy:
        return None, None
    of = lambda x: TensorDescriptor(x, x.shape, x.stride(), [1, 1, tile.keys, padded(x.shape[-1])])  # noqa: E731
    return of(k), of(v)


def _tile(tile: Tile, select_block: int) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "SUBS": ceil_div(select_block, tile.keys),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def _attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, sharing: Sharing, scale: float, shape: dict, tile: Tile,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Add the remaining blocks of each query to ``out`` and ``lse``, block by block."""
    (lanes, tq, n), hk, (tk, dv), group = sharing.rest.shape, k.shape[1], v.shape[2:], shape["G"]
    options = _tile(tile, shape["SELECT"])
    parts, split = options["SUBS"], ceil_div(_ROWS_PER_ITEM, group)
    pair_bytes = parts * group * (dv * q.element_size() + 4)
    for span in spans(lanes, tq, n, pair_bytes, max(PARTIAL_BYTES // 4, PARTIAL_BYTES - 3 * sharing.rest.nbytes)):
        found = invert_selection(sharing.rest, blocks.rank, span, tk, shape["SELECT"], split)
        bins, items = found.first_pair.shape[-1] - 1, found.item_bin.shape[-1]
        part = q.new_empty(span.at_once, span.queries * n * parts * group, dv)
        part_lse = lse.new_empty(part.shape[:-1])
        for lane, count, chunk in span.steps():
            place = (span.lane + lane, span.query + chunk * span.queries, span.queries)
            pair_attention[(items, count, parts)](
                q, k, v, sharing.rest, *blocks[1:4], *found[:4], part, part_lse,
                *q.stride(), *k.stride(), *v.stride(),
                *place, lane * span.chunks + chunk, span.chunks, hk, tq, bins, items, split, scale,
                **shape, **options, N=n, OFFSET=offset_type(group, q),
            )  # fmt: skip
            merge_pairs[(ceil_div(span.queries * group, _MERGE_ROWS), count)](
                part, part_lse, sharing.rest_count, out, lse, *place, tq,
                N=n, G=group, DV=dv, DV_PAD=shape["DV_PAD"], SUBS=parts, ROWS=_MERGE_ROWS,
            )  # fmt: skip


def precision(x: Tensor) -> str:
    """How matrix products of ``x`` are taken: float32 must not be rounded to TensorFloat-32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def offset_type(group: int, *tensors: Tensor) -> tl.dtype:
    """The integer that addresses the heads of one KV group: 64 bits only where 32 do not reach, to save registers."""
    furthest = 0
    for x in tensors:
        _, by_head, by_token, by_dim = x.stride()
        furthest = max(furthest, group * by_head + x.shape[2] * by_token + x.shape[3] * by_dim)
    return tl.int32 if furthest < 2**31 else tl.int64


def block_offset_type(select_block: int, *tensors: Tensor) -> tl.dtype:
    """The integer that addresses the tokens of one block."""
    furthest = max(padded(select_block) * x.stride(2) + padded(x.shape[3]) * x.stride(3) for x in tensors)
    return tl.int32 if furthest < 2**31 else tl.int64
