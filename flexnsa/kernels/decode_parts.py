"""Pieces of the decoding kernels: rows of pages, one step of a running softmax, and merging what programs left.

A running softmax here is kept relative to a whole power of two. Rescaling it is then exact: probabilities that are
equal stay equal whichever program or tile found them, and ties between blocks go to the lowest, as they must.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2.0**100))  # a running maximum before anything was seen; finite, so that differences are
UNSEEN = tl.constexpr(-(2.0**101))  # the score of what is not seen
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # floats from here on have no fraction


@triton.jit
def power_of_two(exponent):
    """Exactly 2 ** exponent for whole exponents up to 127; 0 below -126, and for NaN."""
    # The sum's last bits are the exponent's field; the rest of them is shifted out.
    return ((tl.maximum(exponent, -127.0) + (127.0 + _MAGIC)).to(tl.int32, bitcast=True) << 23).to(
        tl.float32, bitcast=True
    )


@triton.jit
def sequence_length(lengths, batch, capacity):
    """Tokens of a sequence, never more than its tables can name, whatever `lengths` holds."""
    length = tl.load(lengths + batch).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)


@triton.jit
def num_compressed(length, COMPRESS_BLOCK: tl.constexpr, COMPRESS_STRIDE: tl.constexpr):
    """Compressed tokens of a sequence."""
    return tl.where(length >= COMPRESS_BLOCK, (length - COMPRESS_BLOCK) // COMPRESS_STRIDE + 1, 0)


@triton.jit
def compressed_blocks(count, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """Leading selection blocks in which one of the first `count` compressed tokens ends."""
    return tl.where(count > 0, (count + OVERLAP + RATIO - 2) // RATIO, 0)


@triton.jit
def window_tiles(length, WINDOW: tl.constexpr, SELECT_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of the blocks that the window touches."""
    begin = tl.maximum(length - WINDOW, 0) // SELECT_BLOCK
    return ((length + SELECT_BLOCK - 1) // SELECT_BLOCK - begin) * ((SELECT_BLOCK + KEYS - 1) // KEYS)


@triton.jit
def share(items, programs, program):
    """(first item, one past the last) of a program; the first programs take all there is, evenly."""
    each = tl.maximum((items + programs - 1) // programs, 1)
    return program * each, tl.minimum(program * each + each, items)


@triton.jit
def programs_used(items, programs):
    """How many programs `share` gives an item to."""
    each = tl.maximum((items + programs - 1) // programs, 1)
    return (items + each - 1) // each


@triton.jit
def locate(table, slot, inside, num_pages, PAGE: tl.constexpr):
    """Physical pages, int32, of some slots of a sequence; -1 where there is none."""
    page = tl.load(table + slot // PAGE, mask=inside, other=-1)
    return tl.where((page >= 0) & (page < num_pages), page, -1).to(tl.int32)


@triton.jit
def load_rows(pages, page, place, inside, by_page, by_place, by_dim, D: tl.constexpr, D_PAD: tl.constexpr):
    """[rows, D_PAD] of some places in pages, 0 where not `inside` and past D."""
    dim = tl.arange(0, D_PAD)
    at = (page.to(tl.int64) * by_page + place * by_place)[:, None] + dim[None, :] * by_dim
    if D == D_PAD:
        return tl.load(pages + at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pages + at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def load_queries(q, by_head, by_dim, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """[HEADS, D_PAD] of the query heads of a group, 0 past them."""
    head, dim = tl.arange(0, HEADS), tl.arange(0, D_PAD)
    inside = (head < G)[:, None] & (dim < D)[None, :]
    return tl.load(q + head.to(tl.int64)[:, None] * by_head + dim[None, :] * by_dim, mask=inside, other=0.0)


@triton.jit
def attend(q, k, v, inside, scale_log2, peak, total, out, PRECISION: tl.constexpr):
    """One step of the running softmax: (weights over 2 ** peak, peak, total, out); total is summed at the end."""
    score = tl.where(inside[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2, UNSEEN)
    score = tl.maximum(score, UNSEEN, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(score)
    new_peak = tl.maximum(peak, tl.max(whole, axis=1))
    weights = tl.exp2(score - whole) * power_of_two(whole - new_peak[:, None])
    fade = power_of_two(peak - new_peak)[:, None]
    out = tl.dot(weights.to(v.dtype), v, out * fade, input_precision=PRECISION)
    return weights, new_peak, total * fade + weights, out


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """One of some non-negative numbers."""
    return tl.sum(tl.where(tl.arange(0, COUNT) == index, values, 0), axis=0)


@triton.jit
def attend_blocks(
    q_rows, k, v, blocks, pages, first, last, low, length, scale_log2,
    k_page, k_place, k_dim, v_page, v_place, v_dim,
    COUNT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, SELECT_BLOCK: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(peak, total, out) over the tokens `low .. length - 1` of tiles `first .. last - 1` of some blocks.

    `blocks` and `pages`, their physical pages, are [COUNT], -1 for none. They are looked up beforehand, so that no
    load in the loop waits for another. With a RING other than 0, a token's place is its number modulo RING.
    """
    SUBS: tl.constexpr = (SELECT_BLOCK + KEYS - 1) // KEYS
    peak = tl.full([HEADS], NOTHING, tl.float32)
    total = tl.zeros([HEADS, KEYS], tl.float32)
    out = tl.zeros([HEADS, DV_PAD], tl.float32)
    row = tl.arange(0, KEYS)
    for item in tl.range(first, last, num_stages=STAGES):
        block = pick(blocks + 1, item // SUBS, COUNT) - 1
        page = pick(pages + 1, item // SUBS, COUNT) - 1
        within = (item % SUBS) * KEYS + row
        token = block * SELECT_BLOCK + within
        inside = (within < tl.where(block >= 0, SELECT_BLOCK, 0)) & (token >= low) & (token < length)
        mapped = inside & (within < tl.where(page >= 0, SELECT_BLOCK, 0))
        place = token % RING if RING > 0 else block * SELECT_BLOCK % PAGE + within
        k_rows = load_rows(k, page, place, mapped, k_page, k_place, k_dim, D, D_PAD)
        v_rows = load_rows(v, page, place, mapped, v_page, v_place, v_dim, DV, DV_PAD)
        _, peak, total, out = attend(q_rows, k_rows, v_rows, inside, scale_log2, peak, total, out, PRECISION)
    return peak, tl.sum(total, axis=1), out


@triton.jit
def store_part(
    part, peaks, totals, lane, program, programs, peak, total, out,
    G: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Leave a program's running softmax: part [lanes, G, programs, DV], peaks and totals [lanes, G, programs]."""
    head, dim = tl.arange(0, HEADS), tl.arange(0, DV_PAD)
    at = (lane * G + head) * programs + program
    tl.store(peaks + at, peak, mask=head < G)
    tl.store(totals + at, total, mask=head < G)
    tl.store(part + at[:, None] * DV + dim[None, :], out, mask=(head < G)[:, None] & (dim < DV)[None, :])


@triton.jit
def load_totals(peaks, totals, at, inside, used, programs, MOST: tl.constexpr):
    """(peaks, totals) [rows, MOST] of the parts of some rows (row `at` of lanes * G)."""
    part = tl.arange(0, MOST)
    mask = inside[:, None] & (part < used)[None, :]
    peak = tl.load(peaks + at[:, None] * programs + part[None, :], mask=mask, other=NOTHING)
    return peak, tl.load(totals + at[:, None] * programs + part[None, :], mask=mask, other=0.0)


@triton.jit
def load_values(part, at, inside, used, programs, MOST: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """[rows, MOST, DV_PAD] of the parts of some rows."""
    index, dim = tl.arange(0, MOST), tl.arange(0, DV_PAD)
    mask = (inside[:, None] & (index < used)[None, :])[:, :, None] & (dim < DV)[None, None, :]
    row = at[:, None] * programs + index[None, :]
    return tl.load(part + row[:, :, None] * DV + dim[None, None, :], mask=mask, other=0.0)


@triton.jit
def softmax_of_parts(peak, total):
    """(peak, total) over all parts of some rows."""
    top = tl.max(peak, axis=1)
    return top, tl.sum(total * power_of_two(peak - top[:, None]), axis=1)


@triton.jit
def merge_parts(peak, total, values):
    """[rows, DV_PAD] attention of some rows from the parts that programs left."""
    top, whole = softmax_of_parts(peak, total)
    return divided(tl.sum(values * power_of_two(peak - top[:, None])[:, :, None], axis=1), whole)


@triton.jit
def divided(out, total):
    """A running softmax's output, 0 where nothing was seen."""
    seen = total != 0.0
    return out * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]


@triton.jit
def load_gates(gates, by_head, head, seen):
    """Gates of some heads as a column; 0 from head `seen` on, for the gate of what sees nothing may be NaN."""
    return tl.load(gates + head * by_head, mask=head < seen, other=0.0).to(tl.float32)[:, None]


@triton.jit
def store_output(out, value, by_head, by_dim, head, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """Write some heads of a lane's output."""
    dim = tl.arange(0, DV_PAD)
    mask = (head < G)[:, None] & (dim < DV)[None, :]
    tl.store(out + head.to(tl.int64)[:, None] * by_head + dim[None, :] * by_dim, value.to(out.dtype.element_ty), mask)
