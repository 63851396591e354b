"""Pieces of the decoding kernels: rows of pages, one step of a running softmax, and merging what programs left.

A running softmax here is kept relative to a whole power of two. Rescaling it is then exact: probabilities that are
equal stay equal whichever program or tile found them, and ties between blocks go to the lowest, as they must.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2.0**100))  # a running maximum before anything was seen; finite, so that differences are
UNSEEN = tl.constexpr(-(2.0**101))  # the score of what is not seen
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # floats from here on have no fraction
NO_PAGE = tl.constexpr(-(2**31))  # what no table holds

SIZES = ["capacity", "num_pages", "win_num_pages", "table_row", "win_table_row", "imp_programs", "cmp_programs",
         "val_programs", "win_programs", "slc_programs"]  # fmt: skip
"""Arguments on whose divisibility the decoding kernels are not specialized."""


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
def rows_from(pages, within, by_place, by_dim, D_PAD: tl.constexpr):
    """Pointers [rows, D_PAD] to some places of page 0, which a loop moves as a whole."""
    return pages + within.to(tl.int64)[:, None] * by_place + tl.arange(0, D_PAD)[None, :] * by_dim


@triton.jit
def load_rows(rows, page, begin, inside, by_page, by_place, D: tl.constexpr, D_PAD: tl.constexpr):
    """[rows, D_PAD] of `rows_from`, moved to a page and by `begin` places; 0 where not `inside` and past D.

    The page is one for all rows or one for each; so is `begin`.
    """
    moved = page.to(tl.int64) * by_page + begin.to(tl.int64) * by_place
    at = rows + moved if moved.numel == 1 else rows + moved[:, None]
    if D == D_PAD:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (tl.arange(0, D_PAD) < D)[None, :], other=0.0)


@triton.jit
def load_queries(q, by_head, by_dim, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """[HEADS, D_PAD] of the query heads of a group, 0 past them."""
    head, dim = tl.arange(0, HEADS), tl.arange(0, D_PAD)
    inside = (head < G)[:, None] & (dim < D)[None, :]
    return tl.load(q + head.to(tl.int64)[:, None] * by_head + dim[None, :] * by_dim, mask=inside, other=0.0)


@triton.jit
def tile_slots(RATIO: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr):
    """Slots of a tile's rows from its first on: a row is a block and a residue, the first RATIO of RESIDUES."""
    row = tl.arange(0, BLOCKS * RESIDUES)
    return (row // RESIDUES) * RATIO + row % RESIDUES


@triton.jit
def compressed_tile(
    table, tile, count, num_pages, RATIO: tl.constexpr, OVERLAP: tl.constexpr, PAGE: tl.constexpr,
    BEHIND: tl.constexpr, BLOCKS: tl.constexpr, RESIDUES: tl.constexpr,
):  # fmt: skip
    """(inside, page, begin, mapped) of a tile's compressed tokens: of those that end in BLOCKS adjacent blocks.

    `inside` is which of the `count` tokens there are, `mapped` which of them have a page. A row's place in its page is
    `begin` and its `tile_slots`, a token BEHIND places before its slot.
    """
    first, within = tile * (BLOCKS * RATIO), tile_slots(RATIO, BLOCKS, RESIDUES)
    # Before the first token, as unsigned: past the last.
    token = (first + within - (OVERLAP - 1)).to(tl.uint32)
    inside = token < count.to(tl.uint32)
    if RESIDUES != RATIO:
        inside = inside & (tl.arange(0, BLOCKS * RESIDUES) % RESIDUES < RATIO)
    if PAGE % (BLOCKS * RATIO) == 0:
        page = tl.load(table + first // PAGE)
        begin = first % PAGE - BEHIND
        mapped = token < tl.where((page >= 0) & (page < num_pages), count, 0).to(tl.uint32)
        if RESIDUES != RATIO:
            mapped = mapped & inside
    else:
        page = locate(table, first + within, inside, num_pages, PAGE)
        begin = (first + within) % PAGE - within - BEHIND
        mapped = page >= 0
    return inside, page, begin, mapped


@triton.jit
def scored(q, k, inside, scale_log2, PRECISION: tl.constexpr):
    """Scores of some keys for the heads of a group, to base 2."""
    score = tl.where(inside[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2, UNSEEN)
    return tl.maximum(score, UNSEEN, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weighed(score, whole, peak):
    """2 ** (score - peak), given the floor of the score, and a whole peak."""
    return tl.exp2(score - whole) * power_of_two(whole - peak)


@triton.jit
def attend(q, k, v, inside, scale_log2, peak, total, out, PRECISION: tl.constexpr):
    """One step of the running softmax: (weights over 2 ** peak, peak, total, out); total is summed at the end."""
    score = scored(q, k, inside, scale_log2, PRECISION)
    whole = tl.floor(score)
    new_peak = tl.maximum(peak, tl.max(whole, axis=1))
    weights = weighed(score, whole, new_peak[:, None])
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
    k_at = rows_from(k, row * 0 if RING > 0 else row, k_place, k_dim, D_PAD)
    v_at = rows_from(v, row * 0 if RING > 0 else row, v_place, v_dim, DV_PAD)
    for item in tl.range(first, last, num_stages=STAGES):
        block = pick(blocks + 1, item // SUBS, COUNT) - 1
        page = pick(pages + 1, item // SUBS, COUNT) - 1
        start = (item % SUBS) * KEYS
        within, token = start + row, block * SELECT_BLOCK + start + row
        inside = (within < tl.where(block >= 0, SELECT_BLOCK, 0)) & (token >= low) & (token < length)
        mapped = inside & (within < tl.where(page >= 0, SELECT_BLOCK, 0))
        begin = token % RING if RING > 0 else block * SELECT_BLOCK % PAGE + start
        k_rows = load_rows(k_at, page, begin, mapped, k_page, k_place, D, D_PAD)
        v_rows = load_rows(v_at, page, begin, mapped, v_page, v_place, DV, DV_PAD)
        _, peak, total, out = attend(q_rows, k_rows, v_rows, inside, scale_log2, peak, total, out, PRECISION)
    return peak, tl.sum(total, axis=1), out


@triton.jit
def store_part(
    part, peaks, totals, lane, program, programs, peak, total, out,
    G: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Leave a program's running softmax: part [lanes, G, programs, DV], peaks and totals [lanes, G, programs]."""
    head = tl.arange(0, HEADS)
    at = (lane * G + head) * programs + program
    tl.store(peaks + at, peak, mask=head < G)
    tl.store(totals + at, total, mask=head < G)
    store_value(part, lane, program, programs, out, G, HEADS, DV, DV_PAD)


@triton.jit
def store_value(
    part, lane, program, programs, out, G: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr
):
    """Leave a program's [HEADS, DV_PAD] in part [lanes, G, programs, DV]."""
    head, dim = tl.arange(0, HEADS), tl.arange(0, DV_PAD)
    at = (lane * G + head) * programs + program
    tl.store(part + at[:, None] * DV + dim[None, :], out, mask=(head < G)[:, None] & (dim < DV)[None, :])


@triton.jit
def attend_window(
    q_rows, k, v, table, part, peaks, totals, lane, program, programs, length, scale_log2,
    k_page, k_place, k_dim, v_page, v_place, v_dim, num_pages,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    SELECT_BLOCK: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, BLOCKS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention to a program's part of the window, of at most BLOCKS blocks; `k`, `v` and `table` are the lane's."""
    low = tl.maximum(length - WINDOW, 0)
    first, last = share(window_tiles(length, WINDOW, SELECT_BLOCK, KEYS), programs, program)
    if first < last:
        blocks = low // SELECT_BLOCK + tl.arange(0, BLOCKS)
        at = blocks * SELECT_BLOCK
        found = locate(table, at, at < length, num_pages, PAGE)
        peak, total, out = attend_blocks(
            q_rows, k, v, blocks, found, first, last, low, length, scale_log2,
            k_page, k_place, k_dim, v_page, v_place, v_dim,
            BLOCKS, HEADS, D, DV, D_PAD, DV_PAD, SELECT_BLOCK, PAGE, RING, KEYS, STAGES, PRECISION,
        )  # fmt: skip
        store_part(part, peaks, totals, lane, program, programs, peak, total, out, G, HEADS, DV, DV_PAD)


@triton.jit
def load_peaks(peaks, at, inside, used, programs, MOST: tl.constexpr):
    """[rows, MOST] peaks of the parts of some rows (row `at` of lanes * G)."""
    part = tl.arange(0, MOST)
    mask = inside[:, None] & (part < used)[None, :]
    return tl.load(peaks + at[:, None] * programs + part[None, :], mask=mask, other=NOTHING)


@triton.jit
def load_totals(peaks, totals, at, inside, used, programs, MOST: tl.constexpr):
    """(peaks, totals) [rows, MOST] of the parts of some rows."""
    part = tl.arange(0, MOST)
    mask = inside[:, None] & (part < used)[None, :]
    found = tl.load(totals + at[:, None] * programs + part[None, :], mask=mask, other=0.0)
    return load_peaks(peaks, at, inside, used, programs, MOST), found


@triton.jit
def load_values(part, at, inside, used, programs, MOST: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, column=0):
    """[rows, MOST, WIDTH] of the parts of some rows, from a column on."""
    index, dim = tl.arange(0, MOST), column + tl.arange(0, WIDTH)
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
def store_output(out, value, by_head, by_dim, head, G: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, column=0):
    """Write WIDTH columns, from one on, of some heads of a lane's output."""
    dim = column + tl.arange(0, WIDTH)
    mask = (head < G)[:, None] & (dim < DV)[None, :]
    tl.store(out + head.to(tl.int64)[:, None] * by_head + dim[None, :] * by_dim, value.to(out.dtype.element_ty), mask)
