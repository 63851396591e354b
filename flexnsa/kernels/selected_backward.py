"""Selected attention, backward: one pass over (block, query) pairs gives dK, dV and each pair's share of dQ.

A program owns a run of the queries that chose one block. Scores are recomputed once; dK and dV stay in registers.
What a pair owes to dQ goes to a place of its own: the share itself, or the gradients of its scores, to be multiplied by
K later. Either is summed in the order of the query's list. Blocks chosen by very many queries (block 0 by all) are
split over programs, whose dK and dV are summed in order afterwards.
"""

import torch
from torch import Tensor

from flexnsa.kernels.configs import BackwardPlan, backward_plan, padded, shared_memory
from flexnsa.kernels.inversion import invert_selection
from flexnsa.kernels.items import FIELDS, list_items
from flexnsa.kernels.launch import ceil_div
from flexnsa.kernels.selected_dkv import pair_gradients, row_statistics, settle, sum_split_bins
from flexnsa.kernels.selected_dq import SUM_ROWS, Gradients, multiply_scores, share_blocks, sum_query_pairs
from flexnsa.kernels.selected_forward import offset_type, precision
from flexnsa.kernels.spans import PARTIAL_BYTES, Span, spans

_ROWS_PER_ITEM = 4096
_SPLIT_ROWS = 8
_SETTLED = 2048

_PREPARED_BYTES = 32 << 20
"""Bytes of what is known of chunks before their pairs are gone through: a launch for several spares many."""

SUM_BYTES = 256 << 20
"""Bytes that the float32 sums of dK and dV may take."""


def differentiate(work: Gradients, select_block: int, scale: float) -> None:
    """Write dQ, dK and dV of selected attention, given the gradients of its output and LSE.

    dK and dV are summed over all queries in float32. Where the sums of all keys would be larger than ``SUM_BYTES``, the
    queries are gone through again for each run of keys that are not.
    """
    q, k, v, blocks = work.q, work.k, work.v, work.blocks
    group, dv = q.shape[1] // k.shape[1], v.shape[-1]
    plan = backward_plan(q.element_size(), q.shape[-1], dv, select_block, group, shared_memory(q.device))
    parts, split = ceil_div(select_block, plan.tile.keys), _pairs_per_item(group)
    item_bytes = parts * plan.tile.keys * (q.shape[-1] + dv) * 4
    pair_bytes = group * parts * _width(plan, q) * q.element_size() + 2 * item_bytes // split
    key_bytes = (q.shape[-1] + dv) * 4
    summed = min(k.shape[2], max(select_block, SUM_BYTES // key_bytes))
    other_bytes = summed * key_bytes + blocks.base.nbytes
    lanes, tq, n = blocks.base.shape
    most_bytes = max(PARTIAL_BYTES // 4, PARTIAL_BYTES - other_bytes)
    todo = list(spans(lanes, tq, n, pair_bytes, most_bytes, multiple=4 * plan.queries))
    sums = k.new_empty(todo[0].at_once * summed * (q.shape[-1] + dv), dtype=torch.float32)
    for key in range(0, k.shape[2], summed):
        for span in todo:
            _differentiate_span(work, sums, key, summed, span, plan, select_block, scale)


def _pairs_per_item(group: int) -> int:
    return ceil_div(_ROWS_PER_ITEM, group)


def _width(plan: BackwardPlan, q: Tensor) -> int:
    """Numbers that a pair leaves for each head and part of its block."""
    return plan.tile.keys if plan.keep_scores else q.shape[-1]


def _differentiate_span(
    work: Gradients, sums: Tensor, key: int, summed: int, span: Span, plan: BackwardPlan, select_block: int,
    scale: float,
) -> None:  # fmt: skip
    """Add one span's share to the sums of ``summed`` keys from ``key`` on, write dK and dV after a lane's last queries,
    and, with the first keys, dQ of its queries."""
    (hq, tq, d), (hk, tk, dv), n = work.q.shape[1:], work.v.shape[1:], work.blocks.base.shape[-1]
    group, tile, blocks = hq // hk, plan.tile, work.blocks
    parts, split = ceil_div(select_block, tile.keys), _pairs_per_item(group)
    found = invert_selection(blocks.base, blocks.rank, span, tk, select_block, split)
    listed = list_items(found, blocks, span, select_block, split)
    bins, items, split_bins = found.first_pair.shape[-1] - 1, found.item_bin.shape[-1], found.split_bin.shape[-1]
    sum_dk, sum_dv = sums.split([span.at_once * summed * x for x in (d, dv)])
    split_items = max(1, 2 * span.queries * n // split)
    prepared = max(1, min(span.chunks, _PREPARED_BYTES // (span.queries * (8 * group + 12 * n)))) * span.queries
    statistics = work.lse.new_empty(span.at_once, prepared, group, 2)
    part_dq = work.q.new_empty(span.at_once, span.queries * n * parts * group, _width(plan, work.q))
    part_dk = sums.new_empty(span.at_once, split_items, parts * tile.keys, d)
    part_dv = sums.new_empty(span.at_once, split_items, parts * tile.keys, dv)
    dims = {"D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv)}
    shape = {"N": n, "SELECT": select_block, "SUBS": parts, "KEYS": tile.keys}
    row_tiles = ceil_div(parts * tile.keys, _SPLIT_ROWS)
    query_tiles = ceil_div(span.queries * group, SUM_ROWS)
    for lane, count, chunk in span.steps():
        first_lane = span.lane + lane
        if span.query == 0 and chunk == 0:
            sums.zero_()
        segment = lane * span.chunks + chunk
        place = (first_lane, span.query + chunk * span.queries, span.queries)
        here = chunk * span.queries % prepared
        if here == 0:
            row_statistics[(ceil_div(prepared * group, SUM_ROWS), count)](
                work.out, work.dout, work.lse, work.dlse, statistics, *work.dout.stride(), *work.dlse.stride(),
                *place[:2], prepared, hk, tq, G=group, DV=dv, DV_PAD=padded(dv), ROWS=SUM_ROWS,
            )  # fmt: skip
            sharing = None  # what there was goes before what follows is made
            if plan.keep_scores and key == 0:
                sharing = share_blocks(blocks.base, (*place[:2], prepared), count, plan)
        pair_gradients[(items, count, parts)](
            *work[:4], statistics[:, here : here + span.queries], blocks.seen, blocks.low, found.pairs, listed,
            part_dq, part_dk, part_dv, sum_dk, sum_dv,
            *work.q.stride(), *work.k.stride(), *work.v.stride(), *work.dout.stride(),
            *place, segment, span.chunks, hk, tq, key, summed, split_items, scale,
            **shape, **dims, G=group, ROWS=tile.rows, PRECISION=precision(work.q), STAGES=tile.stages,
            OFFSET=offset_type(group, work.q, work.dout), KEEP_SCORES=plan.keep_scores, MASKED=blocks.masked,
            FIELDS=FIELDS, num_warps=tile.warps,
        )  # fmt: skip
        sum_split_bins[(split_bins, count, row_tiles)](
            blocks.base, blocks.reach, found.pairs, found.first_pair, found.first_split, found.split_bin,
            part_dk, part_dv, sum_dk, sum_dv,
            *place, segment, span.chunks, tq, key, summed, bins, split_bins, split_items,
            **shape, **dims, ROWS=_SPLIT_ROWS, UNROLL=8,
        )  # fmt: skip
        if sharing:
            multiply_scores(work, part_dq, sharing, here, place, count, plan, select_block, scale)
        elif not plan.keep_scores and key == 0:
            sum_query_pairs[(query_tiles, count)](
                part_dq, blocks.base, work.dq, *place, tq,
                N=n, G=group, D=d, D_PAD=padded(d), SUBS=parts, ROWS=SUM_ROWS,
            )  # fmt: skip
        if place[1] + span.queries >= tq:
            settle[(ceil_div(summed * max(d, dv), _SETTLED), count)](
                sum_dk, sum_dv, work.dk, work.dv, first_lane, key, summed, tk, D=d, DV=dv, BLOCK=_SETTLED
            )
