"""Mask mods against Python predicates, block masks against the pairs they must cover, FlexAttention against softmax."""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

import flexnsa_masks as masks

Twin = Callable[[int, int, int, int], bool]
GROUPS = st.sampled_from([1, 3, 4, 16])
LENGTHS = st.one_of(st.integers(1, 9), st.integers(10, 37))
TILES = st.sampled_from([(4, 4), (8, 4), (4, 16), (7, 5), (16, 16), (64, 64)])


class Example(NamedTuple):
    """A mask mod, its twin as a predicate of (b, h, q, k), and the sizes to try it on."""

    mask_mod: masks.MaskMod
    twin: Twin
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    # Tiles are known exactly, so that torch's own block mask has the same tables.
    exact: bool = True


def causal(draw: Any) -> Example:
    return Example(masks.causal(), lambda b, h, q, k: k <= q, draw(LENGTHS), draw(LENGTHS))


def sliding_window(draw: Any) -> Example:
    w = draw(st.integers(1, 40))
    return Example(masks.sliding_window(w), lambda b, h, q, k: q - w + 1 <= k <= q, draw(LENGTHS), draw(LENGTHS))


def compressed(draw: Any) -> Example:
    block, stride = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    mod = masks.compressed(block, stride)
    return Example(
        mod, lambda b, h, q, k: max(range(k * stride, k * stride + block)) <= q, draw(LENGTHS), draw(LENGTHS)
    )


def sink(draw: Any) -> Example:
    n = draw(st.integers(0, 20))
    return Example(masks.sink(n), lambda b, h, q, k: k < n and k <= q, draw(LENGTHS), draw(LENGTHS))


def dilated(draw: Any) -> Example:
    w, step = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    twin = lambda b, h, q, k: k in [q - i * step for i in range(w)]  # noqa: E731
    return Example(masks.dilated(w, step), twin, draw(LENGTHS), draw(LENGTHS), exact=step == 1)


def prefix(draw: Any) -> Example:
    batch = draw(st.integers(1, 3))
    n = draw(st.lists(st.integers(0, 20), min_size=batch, max_size=batch))
    if draw(st.booleans()):
        return Example(masks.prefix(n[0]), lambda b, h, q, k: k < n[0], draw(LENGTHS), draw(LENGTHS))
    return Example(masks.prefix(torch.tensor(n)), lambda b, h, q, k: k < n[b], draw(LENGTHS), draw(LENGTHS), batch)


def document(draw: Any) -> Example:
    batch, tokens, ordered = draw(st.integers(1, 2)), draw(LENGTHS), draw(st.booleans())
    ids = [draw(st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens)) for _ in range(batch)]
    ids = [sorted(row) if ordered else row for row in ids]
    twin = lambda b, h, q, k: ids[b][q] == ids[b][k] != -1  # noqa: E731
    return Example(masks.document(torch.tensor(ids)), twin, tokens, tokens, batch, exact=False)


def cross_document(draw: Any) -> Example:
    queries, keys = (draw(st.lists(st.integers(-1, 2), min_size=1, max_size=20)) for _ in range(2))
    mod = masks.document(torch.tensor(queries), torch.tensor(keys))
    return Example(mod, lambda b, h, q, k: queries[q] == keys[k] >= 0, len(queries), len(keys), exact=False)


def key_range(draw: Any) -> Example:
    batch, tokens, group, kv_len = draw(st.integers(1, 2)), draw(LENGTHS), draw(GROUPS), draw(LENGTHS)
    ends = st.lists(st.integers(-1, kv_len), min_size=tokens, max_size=tokens)
    first, last = ([draw(ends) for _ in range(draw(st.sampled_from([1, batch])))] for _ in range(2))
    mod = masks.key_range(torch.tensor(first), torch.tensor(last), group=group)
    twin = lambda b, h, q, k: first[b % len(first)][q // group] <= k <= last[b % len(last)][q // group]  # noqa: E731
    return Example(mod, twin, tokens * group, kv_len, max(len(first), len(last)), exact=False)


def selected(draw: Any) -> Example:
    batch, heads, tokens, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 12)),
        draw(GROUPS),
    )
    size, blocks, n = (
        draw(st.integers(1, 9)),
        draw(st.one_of(st.integers(1, 6), st.integers(30, 70))),
        draw(st.integers(1, 5)),
    )
    # Now and then the keys go beyond the last block, as padded keys do, or end inside it.
    kv_len = min(draw(st.integers(max(1, (blocks - 1) * size + 1), blocks * size + 5)), 80)
    lists = st.lists(st.integers(0, blocks - 1), max_size=n, unique=True).map(sorted)
    chosen = {(b, h, t): draw(lists) for b in range(batch) for h in range(heads) for t in range(tokens)}
    padded = [
        [[(c := chosen[b, h, t]) + [-1] * (n - len(c)) for t in range(tokens)] for h in range(heads)]
        for b in range(batch)
    ]
    starts = None
    if draw(st.booleans()):
        row = st.lists(st.integers(0, kv_len), min_size=tokens, max_size=tokens)
        starts = [draw(row) for _ in range(draw(st.sampled_from([1, batch])))]

    def twin(b: int, h: int, q: int, k: int) -> bool:
        local = k - starts[b % len(starts)][q // group] if starts else k
        return any(j * size <= local < (j + 1) * size for j in chosen[b, h, q // group])

    start = None if starts is None else torch.tensor(starts)
    mod = masks.selected(torch.tensor(padded, dtype=torch.int32), size, num_blocks=blocks, start=start, group=group)
    return Example(mod, twin, tokens * group, kv_len, batch, heads, exact=False)


def positioned(draw: Any) -> Example:
    group = draw(GROUPS)
    inner = draw(st.sampled_from([causal, sliding_window, compressed, sink, dilated, prefix]))(draw)
    tokens = draw(st.integers(1, 12))
    at = [draw(st.lists(st.integers(-1, 45), min_size=tokens, max_size=tokens)) for _ in range(inner.batch)]
    mod = masks.at_positions(inner.mask_mod, torch.tensor(at), group=group)
    twin = lambda b, h, q, k: at[b][q // group] >= 0 and inner.twin(b, h, at[b][q // group], k)  # noqa: E731
    return Example(mod, twin, tokens * group, inner.kv_len, inner.batch, exact=False)


def positioned_table(draw: Any) -> Example:
    inner = draw(st.sampled_from([document, key_range, selected, positioned]))(draw)
    at = draw(st.lists(st.integers(-1, inner.q_len - 1), min_size=1, max_size=9))
    mod = masks.at_positions(inner.mask_mod, torch.tensor(at))
    twin = lambda b, h, q, k: at[q] >= 0 and inner.twin(b, h, at[q], k)  # noqa: E731
    return Example(mod, twin, len(at), inner.kv_len, inner.batch, inner.heads, exact=False)


def composed(draw: Any) -> Example:
    base = draw(st.sampled_from([document, key_range, selected, prefix]))(draw)
    w, n = draw(st.integers(1, 20)), draw(st.integers(0, 5))
    foreign = draw(st.booleans())
    odd = lambda b, h, q, k: (q + k) % 2 == 0 if foreign else True  # noqa: E731
    reach = masks.or_masks(masks.sliding_window(w), masks.sink(n))
    mods = [base.mask_mod, reach, *([odd] if foreign else [])]
    both = lambda b, h, q, k: base.twin(b, h, q, k) and k <= q and (k > q - w or k < n) and odd(b, h, q, k)  # noqa: E731
    return base._replace(mask_mod=masks.and_masks(*mods), twin=both, exact=False)


def union(draw: Any) -> Example:
    base = draw(st.sampled_from([document, key_range, selected, causal]))(draw)
    n = draw(st.integers(0, 20))
    twin = lambda b, h, q, k: base.twin(b, h, q, k) or k < n  # noqa: E731
    return base._replace(mask_mod=masks.or_masks(base.mask_mod, masks.prefix(n)), twin=twin, exact=False)


PATTERNS = [causal, sliding_window, compressed, sink, dilated, prefix, document, cross_document, key_range, selected]
TRANSFORMED = [positioned, positioned_table, composed, union]
EVERY = pytest.mark.parametrize("pattern", PATTERNS + TRANSFORMED, ids=lambda pattern: pattern.__name__)


def dense(mask_mod: masks.MaskMod, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    return flex.create_mask(mask_mod, batch, heads, q_len, kv_len, device="cpu")


def by_hand(example: Example) -> Tensor:
    sizes = (example.batch, example.heads, example.q_len, example.kv_len)
    pairs = [example.twin(*where) for where in torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, 4).tolist()]
    return torch.tensor(pairs).view(sizes)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Tables back to bool, row by row, checking that what counts is ascending."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous() and indices.is_contiguous()
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for where in torch.cartesian_prod(*map(torch.arange, counts.shape)).reshape(-1, counts.dim()).tolist():
        columns = indices[tuple(where)][: counts[tuple(where)]].tolist()
        assert columns == sorted(set(columns))
        found[tuple(where)][columns] = True
    return found


def tile_share(visible: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which tiles hold any pair, and which hold only visible pairs and lie wholly inside."""
    (q_block, kv_block), (q_len, kv_len) = block_size, visible.shape[-2:]
    padded = torch.nn.functional.pad(visible, (0, -kv_len % kv_block, 0, -q_len % q_block))
    tiles = padded.unflatten(-1, (-1, kv_block)).unflatten(-3, (-1, q_block)).transpose(-2, -3).flatten(-2)
    return tiles.any(-1), tiles.all(-1)


@EVERY
@given(data=st.data())
def test_pattern_equals_its_dense_twin(pattern: Callable[[Any], Example], data: Any) -> None:
    example = pattern(data.draw)
    actual = dense(example.mask_mod, example.batch, example.heads, example.q_len, example.kv_len)
    assert torch.equal(actual, by_hand(example))


@EVERY
@given(data=st.data(), block_size=TILES)
def test_block_mask_covers_what_is_visible(
    pattern: Callable[[Any], Example], data: Any, block_size: tuple[int, int]
) -> None:
    example = pattern(data.draw)
    block = build(example, block_size)
    partial = listed(block.kv_num_blocks, block.kv_indices)
    full = torch.zeros_like(partial)
    if block.full_kv_num_blocks is not None:
        full = listed(block.full_kv_num_blocks, block.full_kv_indices)
        assert torch.equal(listed(block.full_q_num_blocks, block.full_q_indices), full.mT)
    some_truth, full_truth = tile_share(by_hand(example), block_size)
    assert not (partial & full).any()
    assert not (some_truth & ~(partial | full)).any()
    assert not (full & ~full_truth).any()
    if example.exact:
        assert torch.equal((partial | full).expand_as(some_truth), some_truth)
        assert torch.equal(full.expand_as(full_truth), full_truth)
    assert torch.equal(listed(block.q_num_blocks, block.q_indices), partial.mT)


def build(example: Example, block_size: tuple[int, int] = (128, 128)) -> BlockMask:
    return masks.block_mask(
        example.mask_mod,
        q_len=example.q_len,
        kv_len=example.kv_len,
        batch=example.batch,
        heads=example.heads,
        block_size=block_size,
    )


@given(data=st.data(), block_size=TILES)
def test_selected_tiles_are_exactly_the_union(data: Any, block_size: tuple[int, int]) -> None:
    example = selected(data.draw)
    block = build(example, block_size)
    truth, _ = tile_share(by_hand(example), block_size)
    assert torch.equal(listed(block.kv_num_blocks, block.kv_indices), truth)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    block_size=TILES,
)
def test_packed_documents_visit_no_tile_in_vain(
    lengths: list[int], padding: tuple[int, int], block_size: tuple[int, int]
) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = torch.nn.functional.pad(ids, padding, value=-1)
    block = masks.block_mask(masks.document(ids), q_len=len(ids), kv_len=len(ids), block_size=block_size)
    some, full = tile_share(((ids[:, None] == ids) & (ids >= 0))[None, None], block_size)
    partial = listed(block.kv_num_blocks, block.kv_indices)
    whole = listed(block.full_kv_num_blocks, block.full_kv_indices)
    assert torch.equal(partial | whole, some) and torch.equal(whole, full)


@pytest.mark.parametrize(
    "mod, q_len, kv_len, tiles",
    [
        (masks.key_range(torch.tensor([[0, 20, 39, 21]]), torch.tensor([[-1, 22, 38, 23]])), 4, 40, [[5]]),
        (masks.at_positions(masks.sliding_window(2), torch.tensor([-1, 20, 21, 22])), 4, 40, [[4, 5]]),
        (masks.at_positions(masks.prefix(5), torch.tensor([-1, -1, -1, -1, 0, -1])), 6, 40, [[], [0, 1]]),
        (masks.sliding_window(1), 8, 5, [[0], [1]]),
        (masks.key_range(torch.tensor([[0, 6]]), torch.tensor([[0, 8]]), group=4), 8, 6, [[0], []]),
    ],
    ids=["key_range", "window", "prefix", "no keys left", "first beyond the keys"],
)
def test_queries_that_see_nothing_do_not_widen_a_tile(
    mod: masks.MaskMod, q_len: int, kv_len: int, tiles: list[list[int]]
) -> None:
    block = masks.block_mask(mod, q_len=q_len, kv_len=kv_len, block_size=4)
    visited = listed(block.kv_num_blocks, block.kv_indices) | listed(block.full_kv_num_blocks, block.full_kv_indices)
    assert [row.nonzero().flatten().tolist() for row in visited[0, 0]] == tiles


def test_a_tile_with_a_padding_query_is_not_full() -> None:
    block = masks.block_mask(
        masks.at_positions(masks.prefix(8), torch.tensor([-1, 0, 1, 2])), q_len=4, kv_len=8, block_size=4
    )
    assert block.kv_num_blocks.tolist() == [[[2]]] and block.full_kv_num_blocks.tolist() == [[[0]]]


def test_padding_is_no_document_of_its_own_in_a_union() -> None:
    mod = masks.or_masks(masks.document(torch.full((8,), -1)), masks.prefix(1))
    block = masks.block_mask(mod, q_len=8, kv_len=8, block_size=4)
    assert block.kv_num_blocks.tolist() == [[[1, 1]]] and block.full_kv_num_blocks.sum() == 0


def test_same_tables_as_torch() -> None:
    mod = masks.and_masks(masks.causal(), masks.sliding_window(100))
    ours = masks.block_mask(mod, q_len=300, kv_len=333, block_size=32)
    theirs = flex.create_block_mask(mod, None, None, 300, 333, device="cpu", BLOCK_SIZE=32)
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE and ours.mask_mod is theirs.mask_mod
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                 "full_q_num_blocks", "full_q_indices"):  # fmt: skip
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_window_is_exactly_w_keys() -> None:
    keys = dense(masks.sliding_window(512), 1, 1, 600, 600)[0, 0].sum(-1)
    assert keys.tolist() == [min(t + 1, 512) for t in range(600)]


def test_selected_reads_every_bit_of_a_word() -> None:
    indices = torch.arange(64, dtype=torch.int32).view(1, 1, 2, 32)
    seen = dense(masks.selected(indices, 1, num_blocks=64), 1, 1, 2, 64)[0, 0]
    assert torch.equal(seen, torch.block_diag(torch.ones(1, 32), torch.ones(1, 32)).bool())


def test_selected_ids_outside_the_table_count_as_padding() -> None:
    indices = torch.tensor([[[[-7, 1, 2, 1 << 30]]]], dtype=torch.int32)
    mod = masks.selected(indices, 2, num_blocks=2)
    assert dense(mod, 1, 1, 1, 8)[0, 0, 0].tolist() == [False, False, True, True] + [False] * 4
    assert masks.block_mask(mod, q_len=1, kv_len=8, block_size=2).kv_num_blocks.tolist() == [[[1]]]


def test_composition_with_torch_keeps_the_mask() -> None:
    ours = masks.and_masks(masks.causal(), masks.sink(3))
    theirs = flex.and_masks(masks.causal(), masks.sink(3))
    assert torch.equal(dense(ours, 1, 1, 9, 9), dense(theirs, 1, 1, 9, 9))
    block = masks.block_mask(theirs, q_len=9, kv_len=9, block_size=4)
    assert block.kv_num_blocks.tolist() == [[[3, 3, 3]]] and block.full_kv_num_blocks is None


def test_names() -> None:
    tables = torch.zeros(1, 2, dtype=torch.int64)
    mods = [
        masks.causal(), masks.sliding_window(8), masks.compressed(32, 16), masks.prefix(3), masks.prefix(tables[0]),
        masks.sink(4), masks.dilated(3, 2), masks.document(tables), masks.key_range(tables, tables),
        masks.selected(tables[None, None].int(), 64, num_blocks=1), masks.at_positions(masks.causal(), tables),
        masks.alibi(2), masks.soft_cap(50),
    ]  # fmt: skip
    assert [mod.__name__ for mod in mods] == [
        "causal", "sliding_window_8", "compressed_32_16", "prefix_3", "prefix",
        "sink_4", "dilated_3_2", "document", "key_range",
        "selected_64", "at_positions(causal)",
        "alibi_2", "soft_cap_50",
    ]  # fmt: skip


def test_block_mask_of_128k_tokens_is_quick_and_small() -> None:
    tokens = 1 << 17
    before = time.perf_counter()
    block = masks.block_mask(masks.sliding_window(512), q_len=tokens, kv_len=tokens)
    assert time.perf_counter() - before < 1.0
    tables = [value for value in vars(block).values() if isinstance(value, Tensor)]
    assert sum(table.nbytes for table in tables) < 20e6
    # The window's two edges, and between them 3 tiles that need no masking.
    assert block.kv_num_blocks[0, 0, -1] == 2 and block.full_kv_num_blocks[0, 0, -1] == 3


def test_block_mask_traces_with_dynamic_lengths_as_one_graph() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=record)
    def tables(indices: Tensor, start: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        block = nsa_selected(indices, start, position)
        return block.kv_num_blocks, block.kv_indices, block.q_num_blocks, block.q_indices

    for tokens in (50, 77, 130):
        indices, start, position = nsa_tables(tokens)
        block = nsa_selected(indices, start, position)
        expected = block.kv_num_blocks, block.kv_indices, block.q_num_blocks, block.q_indices
        assert all(torch.equal(a, b) for a, b in zip(tables(indices, start, position), expected, strict=True))
    assert len(graphs) == 1


def nsa_tables(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    position = torch.arange(tokens).expand(2, -1).contiguous()
    start = torch.where(position < tokens // 3, 0, tokens // 3)
    indices = torch.rand(2, 2, tokens, -(-tokens // 16), generator=generator).argsort(-1)[..., :3].sort(-1).values
    return indices.int(), start, position


def nsa_selected(indices: Tensor, start: Tensor, position: Tensor, group: int = 3) -> BlockMask:
    """NSA's selected branch: listed blocks of the query's own document, up to the query."""
    tokens = position.shape[1]
    listed = masks.selected(indices, 16, num_blocks=-(-tokens // 16), start=start, group=group)
    mod = masks.and_masks(listed, masks.key_range(start, position, group=group))
    return masks.block_mask(mod, q_len=tokens * group, kv_len=tokens, batch=2, heads=2, block_size=32)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Callable[[Tensor], Tensor]) -> Tensor:
    """Dense attention; a query that sees nothing gets zero."""
    scores = bias(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).nan_to_num(0.0)
    return weights @ v


def problem(batch: int, heads: int, q_len: int, kv_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, 16) for length in (q_len, kv_len, kv_len)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def streaming() -> BlockMask:
    ids = torch.tensor([[0] * 100 + [1] * 60 + [-1] * 40, [-1] * 30 + [0] * 170])
    reach = masks.or_masks(masks.sliding_window(20), masks.sink(4))
    return masks.block_mask(masks.and_masks(reach, masks.document(ids)), q_len=200, kv_len=200, batch=2, block_size=32)


def chunk() -> BlockMask:
    mod = masks.at_positions(masks.compressed(8, 4), torch.tensor([0, 3, *range(60, 90)]))
    return masks.block_mask(mod, q_len=32, kv_len=40, block_size=32)


CALLS = {"streaming": streaming, "chunk": chunk, "nsa": lambda: nsa_selected(*nsa_tables(90))}


@pytest.mark.parametrize("name", CALLS)
def test_eager_flex_attention_is_masked_softmax(name: str) -> None:
    block = CALLS[name]()
    q, k, v = problem(2, 2, *block.shape[-2:], torch.float64)
    visible = dense(block.mask_mod, 2, 2, *block.shape[-2:])
    expected = softmax_attention(q, k, v, visible, lambda scores: scores)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=block), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["streaming", "nsa"])
def test_compiled_flex_attention_equals_eager(name: str) -> None:
    """Compiled kernels read the block tables, eager ones do not."""
    block = CALLS[name]()
    q, k, v = problem(2, 2, *block.shape[-2:], torch.float32)
    compiled = torch.compile(flex.flex_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, block_mask=block), flex.flex_attention(q, k, v, block_mask=block))


@pytest.mark.parametrize("heads, first", [(1, 2**-8), (2, 2**-4), (8, 0.5), (12, 0.5), (20, 2**-0.5)])
def test_alibi_slopes_fall_geometrically(heads: int, first: float) -> None:
    score_mod, at = masks.alibi(heads), torch.tensor
    slopes = [-score_mod(at(0.0), at(0), at(h), at(1), at(0)).item() for h in range(heads)]
    power = 2 ** int(math.log2(heads))
    assert slopes[0] == pytest.approx(first)
    assert [b / a for a, b in pairwise(slopes[:power])] == pytest.approx([slopes[0]] * (power - 1))
    finer = [(2 ** (-8 / (2 * power))) ** (i + 1) for i in range(2 * power)]
    assert slopes[power:] == pytest.approx(finer[0::2][: heads - power])


def test_score_mods_in_flex_attention() -> None:
    q, k, v = problem(1, 3, 9, 9, torch.float64)
    slopes, distance = torch.tensor([0.5, 0.1, 2.0]), torch.arange(9)[:, None] - torch.arange(9)
    score_mod = masks.compose_score_mods(masks.soft_cap(0.7), masks.alibi(slopes))
    block = masks.block_mask(masks.causal(), q_len=9, kv_len=9)
    expected = softmax_attention(
        q, k, v, distance >= 0, lambda s: 0.7 * torch.tanh(s / 0.7) - slopes[:, None, None] * distance
    )
    torch.testing.assert_close(flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=block), expected)


def square(mask_mod: masks.MaskMod, **options: Any) -> BlockMask:
    return masks.block_mask(mask_mod, q_len=4, kv_len=4, **options)


LONG, INT = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2, 4, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: masks.sliding_window(0), ValueError, "window >= 1, got 0"),
        (lambda: masks.compressed(4, 0), ValueError, "stride >= 1, got 0"),
        (lambda: masks.dilated(2, 0), ValueError, "dilation >= 1"),
        (lambda: masks.sink(-1), ValueError, "n >= 0"),
        (lambda: masks.prefix(-1), ValueError, "n >= 0"),
        (lambda: masks.prefix(LONG), ValueError, r"shape \[b\]"),
        (lambda: masks.document(INT), ValueError, "ids of shape"),
        (lambda: masks.document(LONG, INT), ValueError, "key_ids of shape"),
        (lambda: masks.key_range(LONG, LONG[:, 1:]), ValueError, "alike"),
        (lambda: masks.key_range(LONG.expand(2, -1), LONG.expand(3, -1)), ValueError, "alike"),
        (lambda: masks.key_range(LONG[0], LONG), ValueError, "first of shape"),
        (lambda: masks.key_range(LONG, LONG.int()), TypeError, "last in int64"),
        (lambda: masks.key_range(LONG, LONG, group=0), ValueError, "group >= 1"),
        (lambda: masks.selected(INT[0], 2, num_blocks=2), ValueError, "indices of shape"),
        (lambda: masks.selected(INT.long(), 2, num_blocks=2), TypeError, "indices in int32"),
        (lambda: masks.selected(INT, 0, num_blocks=2), ValueError, "select_block >= 1"),
        (lambda: masks.selected(INT, 2, num_blocks=0), ValueError, "num_blocks >= 1"),
        (lambda: masks.selected(INT, 2, num_blocks=2, start=LONG[:, 1:]), ValueError, "start of shape"),
        (lambda: masks.selected(INT, 2, num_blocks=2, start=LONG.int()), TypeError, "start in int64"),
        (lambda: masks.at_positions(masks.causal(), LONG.int()), TypeError, "int64 positions"),
        (lambda: masks.at_positions(masks.causal(), LONG[None]), ValueError, "positions of shape"),
        (lambda: masks.and_masks(), ValueError, "one or more"),
        (lambda: masks.compose_score_mods(), ValueError, "one or more"),
        (lambda: masks.alibi(0), ValueError, "heads >= 1"),
        (lambda: masks.alibi(LONG), ValueError, "slopes of shape"),
        (lambda: masks.soft_cap(0.0), ValueError, "cap > 0"),
        (lambda: masks.soft_cap(math.nan), ValueError, "cap > 0"),
        (lambda: masks.block_mask(masks.causal(), q_len=4, kv_len=0), ValueError, "kv_len >= 1"),
        (lambda: masks.block_mask(masks.key_range(LONG, LONG), q_len=5, kv_len=4), ValueError, "q_len=4.*asks for 5"),
        (lambda: masks.block_mask(masks.document(LONG), q_len=4, kv_len=5), ValueError, "kv_len=4.*asks for 5"),
        (lambda: square(masks.selected(INT, 2, num_blocks=2), heads=8), ValueError, "heads=8"),
        (lambda: square(masks.document(LONG.expand(2, -1)), batch=3), ValueError, "batch=3"),
        (lambda: square(masks.document(LONG), device="meta"), ValueError, "on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@settings(max_examples=20)
@given(data=st.data())
def test_a_mask_without_geometry_visits_every_tile(data: Any) -> None:
    q_len, kv_len = data.draw(LENGTHS), data.draw(LENGTHS)
    block = masks.block_mask(lambda b, h, q, k: k <= q, q_len=q_len, kv_len=kv_len, block_size=8)
    assert listed(block.kv_num_blocks, block.kv_indices).all() and block.full_kv_num_blocks is None


def test_masks_can_be_made_inside_a_compiled_function() -> None:
    def counts(index: torch.Tensor) -> torch.Tensor:
        own = masks.with_tiles(lambda b, h, q, k: q >= k, lambda grid: None, "own")
        mods = (masks.causal(), masks.and_masks(masks.causal(), masks.sliding_window(3)), own)
        return sum(mod(index, index, index[:, None], index).int() for mod in mods)

    index = torch.arange(5)
    assert torch.equal(torch.compile(counts, fullgraph=True, backend="eager")(index), counts(index))
