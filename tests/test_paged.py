"""The paged step and append: against the unpaged call, on every engine, whatever lies outside of a sequence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.cli import main
from bench.decode.cases import TARGETS
from bench.decode.report import chunked, ratios, table
from conftest import TOLERANCE, assert_close, geometries, part
from flexnsa import (
    BranchKV,
    MeanPool,
    MLPCompressor,
    NSAConfig,
    PagedKV,
    Pages,
    debug,
    native_sparse_attention,
    paged_append,
    paged_step,
    select_blocks,
    selected_attention,
    window_attention,
)
from flexnsa.compressed import compressed_attention
from flexnsa.gating import combine
from flexnsa.kernels import decode
from flexnsa.types import Selection

ROOT = Path(__file__).parent.parent

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=6)


class Sequences(NamedTuple):
    """Unpaged sequences: keys and values of every branch, a query and gates for the last token of each."""

    q: Tensor
    gates: Tensor
    kv: BranchKV
    lengths: Tensor

    def row(self, row: int) -> tuple[Tensor, BranchKV, Tensor]:
        length = int(self.lengths[row])
        pairs = (tuple(x[row : row + 1, :, :length] for x in pair) for pair in self.kv)
        return self.q[row : row + 1], BranchKV(*pairs), self.gates[row : row + 1]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; `pages` are the pages' sizes in units of a selection block, compressed ones first."""

    config: NSAConfig
    lengths: tuple[int, ...]
    hk: int = 1
    group: int = 2
    d: int = 4
    dv: int = 3
    pages: tuple[int, int, int] = (1, 1, 1)
    values: str = "normal"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def rows(self, *shape: int, salt: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        if self.values == "repeated":
            x = x[:, :, :2].round()[:, :, torch.arange(shape[2]) // 3 % min(2, shape[2])]
        return x.to(self.device, self.dtype)

    def sequences(self, spare: int = 0) -> Sequences:
        """Random sequences with room for `spare` more tokens."""
        b, tokens = len(self.lengths), max(self.lengths) + spare
        pairs = [tuple(self.rows(b, self.hk, tokens, dim, salt=2 * i + j) for j, dim in enumerate((self.d, self.dv)))
                 for i in range(3)]  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(b, self.hk * self.group, 1, self.d, dtype=torch.float64, generator=generator)
        q = {"normal": q, "hot": 50 * q, "flat": 0 * q, "repeated": q.round()}[self.values]
        gates = torch.rand(b, self.hk * self.group, 1, 3, dtype=torch.float64, generator=generator)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        return Sequences(*(x.to(self.device, self.dtype) for x in (q, gates)), BranchKV(*pairs), lengths)

    def empty_pages(self, tokens: int) -> PagedKV:
        """Pages that hold NaN, in random places, one table a branch, mapped as far as the sequences may grow."""
        parts = []
        for i, blocks in enumerate(self.pages):
            size = blocks * self.config.select_block // (self.config.compress_stride if i == 0 else 1)
            wide = -(-tokens // (blocks * self.config.select_block)) + 1
            count = len(self.lengths) * wide
            generator = torch.Generator().manual_seed(self.seed + i)
            table = torch.randperm(count + 2, generator=generator)[:count].view(len(self.lengths), wide).int()
            table[:, -1] = -1  # beyond what is needed
            k, v = (
                torch.full((count + 2, self.hk, size, dim), torch.nan, dtype=self.dtype, device=self.device)
                for dim in (self.d, self.dv)
            )
            parts.append(Pages(k, v, table.to(self.device)))
        return PagedKV(*parts)

    def recent(self) -> tuple[Tensor, Tensor]:
        """A ring of raw tokens that holds NaN."""
        size = (len(self.lengths), self.hk, self.config.compress_block)
        k, v = (torch.full((*size, dim), torch.nan, dtype=self.dtype, device=self.device) for dim in (self.d, self.dv))
        return k, v


def tail(x: Sequences, lengths: Tensor, tokens: int, counts: Tensor | None = None) -> BranchKV:
    """The last `tokens` tokens of sequences cut to `lengths`, NaN before the first, and before the last `counts`."""
    at = lengths.long()[:, None] - tokens + torch.arange(tokens, device=lengths.device)

    first = 0 if counts is None else (lengths - counts)[:, None]

    def cut(y: Tensor) -> Tensor:
        index = at.clamp(min=0)[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])
        return y.gather(2, index).masked_fill((at < first)[:, None, :, None], torch.nan)

    return BranchKV(*((cut(k), cut(v)) for k, v in x.kv))


def filled(shape: Shape, compressor=None, impl: str = "reference") -> tuple[Sequences, PagedKV]:
    """Sequences, and the same in pages, appended at once."""
    x = shape.sequences()
    pages = shape.empty_pages(max(shape.lengths))
    kv = tail(x, x.lengths, max(shape.lengths))
    compressor = compressor or MeanPool(shape.config)
    paged_append(kv, pages, x.lengths, shape.config, compressor=compressor, recent=shape.recent(), impl=impl)
    return x, pages


def assert_same_pages(actual: PagedKV, expected: PagedKV) -> None:
    """Equal to rounding, and unwritten in the same places."""
    for p, other in zip(actual, expected, strict=True):
        for y, z in zip(p[:2], other[:2], strict=True):
            torch.testing.assert_close(y, z, equal_nan=True, **TOLERANCE[z.dtype])


def unpaged(x: Sequences, config: NSAConfig, compressor=None, indices: Tensor | None = None) -> Tensor:
    """The step by `native_sparse_attention`, row by row; 0 for an empty row."""
    outs = []
    for row, length in enumerate(x.lengths.tolist()):
        q, kv, gates = x.row(row)
        if length == 0:
            outs.append(q.new_zeros(*q.shape[:3], x.kv.selected[1].shape[3]))
            continue
        outs.append(
            native_sparse_attention(
                q,
                kv,
                gates,
                config,
                compressor or MeanPool(config),
                positions=x.lengths.long()[row : row + 1] - 1,
                selection=None if indices is None else Selection(indices[row : row + 1]),
                impl="reference",
            )
        )
    return torch.cat(outs)


def chosen(x: Sequences, config: NSAConfig, compressor=None) -> Tensor:
    """The unpaged call's selection, -1 for an empty row."""
    rows = []
    for row, length in enumerate(x.lengths.tolist()):
        q, kv, _ = x.row(row)
        if length == 0:
            shape = (1, kv.selected[0].shape[1], 1, config.num_selected)
            rows.append(torch.full(shape, -1, dtype=torch.int32, device=q.device))
            continue
        k_cmp, v_cmp = (compressor or MeanPool(config))(*kv.compressed)
        placed = {"positions": x.lengths.long()[row : row + 1] - 1, "impl": "reference"}
        lse = compressed_attention(q, k_cmp, v_cmp, config, **placed).lse
        rows.append(select_blocks(q, k_cmp, lse, config, num_tokens=length, **placed).indices)
    return torch.cat(rows)


@st.composite
def shapes(draw: st.DrawFn, longest: int = 40, config: st.SearchStrategy[NSAConfig] | None = None) -> Shape:
    """Ragged sequences, empty ones too, and pages of one to three blocks."""
    return Shape(
        config=draw(config or geometries()),
        lengths=tuple(draw(st.lists(st.integers(0, longest), min_size=1, max_size=3).filter(any))),
        hk=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        pages=draw(st.tuples(*(st.integers(1, 3),) * 3)),
        values=draw(st.sampled_from(("normal", "hot", "flat", "repeated"))),
        seed=draw(st.integers(0, 99)),
    )


@given(shape=shapes())
@part(2)
def test_a_step_equals_the_unpaged_call(shape: Shape):
    x, pages = filled(shape)
    found = paged_step(x.q, x.gates, pages, x.lengths, shape.config)
    assert_close([found.out], [unpaged(x, shape.config)])
    assert torch.equal(found.selection.indices, chosen(x, shape.config))


@given(shape=shapes(longest=24), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
@part(4)
def test_appending_in_any_pieces_fills_the_same_pages(shape: Shape, cuts: Sequence[int]):
    """Each row grows at its own pace, some by nothing."""
    torch.manual_seed(0)
    compressor = MLPCompressor(shape.config, num_kv_heads=shape.hk, head_dim=shape.d, value_dim=shape.dv).double()
    x, whole = filled(shape, compressor)
    pages, recent, done = shape.empty_pages(max(shape.lengths)), shape.recent(), torch.zeros_like(x.lengths)
    for piece in (*cuts, max(shape.lengths)):
        paces = torch.tensor([piece, piece // 2, 2])[: len(done)].clamp(max=piece)
        counts = torch.minimum(paces if piece < max(shape.lengths) else x.lengths, x.lengths - done)
        done = done + counts
        kv = tail(x, done, piece, counts)
        paged_append(kv, pages, done, shape.config, counts=counts, compressor=compressor, recent=recent)
    assert_same_pages(pages, whole)


@given(shape=shapes(longest=24))
@part(4)
def test_compressed_tokens_may_be_handed_in(shape: Shape):
    x, pooled = filled(shape)
    pages, most = shape.empty_pages(max(shape.lengths)), max(shape.lengths)
    kv = tail(x, x.lengths, most)
    k_cmp, v_cmp = (torch.full_like(y, torch.nan) for y in kv.compressed)
    for row, length in enumerate(shape.lengths):
        for i, (k, v) in enumerate(zip(*(y[0].movedim(1, 0) for y in MeanPool(shape.config)(*x.row(row)[1].compressed)),
                                       strict=True)):  # fmt: skip
            end = most - length + i * shape.config.compress_stride + shape.config.compress_block - 1
            k_cmp[row, :, end], v_cmp[row, :, end] = k, v
    paged_append(kv._replace(compressed=(k_cmp, v_cmp)), pages, x.lengths, shape.config)
    assert_same_pages(pages, pooled)


def test_sequences_share_the_pages_of_a_common_prefix():
    """The second sequence's first two pages, compressed ones too, are the first one's: nothing else is written."""
    shape = Shape(SMALL, (16, 16), hk=2, pages=(1, 1, 1))
    x = shape.sequences(spare=11)
    for k, v in x.kv:
        k[1, :, :16], v[1, :, :16] = k[0, :, :16], v[0, :, :16]
    pages, recent = shape.empty_pages(27), shape.recent()
    lengths = torch.tensor([16, 0], dtype=torch.int32)
    compress = {"compressor": MeanPool(SMALL), "recent": recent}
    paged_append(tail(x, lengths, 16), pages, lengths, SMALL, **compress)
    for part_ in pages:
        part_.table[1, :2] = part_.table[0, :2]
    for ring in recent:
        ring[1] = ring[0]
    lengths = torch.tensor([27, 27], dtype=torch.int32)
    paged_append(tail(x, lengths, 11), pages, lengths, SMALL, **compress)
    x = x._replace(lengths=lengths)
    found = paged_step(x.q, x.gates, pages, lengths, SMALL)
    assert_close([found.out], [unpaged(x, SMALL)])


def test_a_window_page_may_go_once_the_window_has_left_it():
    shape = Shape(SMALL, (30, 9))
    x, pages = filled(shape)
    expected = paged_step(x.q, x.gates, pages, x.lengths, SMALL)
    pages.window.table[0, :3] = -1
    pages.window.k[0] = torch.nan
    found = paged_step(x.q, x.gates, pages, x.lengths, SMALL)
    assert_close([found.out], [expected.out])


def test_one_pair_of_raw_pages_serves_two_branches():
    """Pages in the layout of most engines, [pages, page, hk, d], as a view."""
    shape = Shape(SMALL, (21, 13), hk=2)
    x, pages = filled(shape)
    x = x._replace(kv=x.kv._replace(window=x.kv.selected))
    k, v = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in pages.selected[:2])
    shared = Pages(k, v, pages.selected.table)
    found = paged_step(x.q, x.gates, pages._replace(selected=shared, window=shared), x.lengths, SMALL)
    assert_close([found.out], [unpaged(x, SMALL)])


def test_the_output_goes_where_it_is_asked_to():
    x, pages = filled(Shape(SMALL, (21, 0)))
    expected = paged_step(
        x.q, x.gates.masked_fill(x.lengths[:, None, None, None] == 0, torch.nan), pages, x.lengths, SMALL
    )
    out = torch.full((2, 1, 2, 3), torch.nan, dtype=torch.float64).transpose(1, 2)
    found = paged_step(x.q, x.gates, pages, x.lengths.long(), SMALL, out=out)
    assert found.out is out
    assert torch.equal(out, expected.out)
    assert not out[1].any() and (found.selection.indices[1] == -1).all()


# The Triton path, in its interpreter where there is no GPU.

KERNEL_SHAPES = {
    "plain": Shape(SMALL, (45, 0, 3), hk=1, group=3, d=16, dv=8),
    "pages of a tile": Shape(SMALL, (140,), group=2, d=8, dv=20, pages=(16, 2, 3)),
    "no overlap": Shape(NSAConfig(4, 4, 8, 4, 0, 1, 9), (61,), hk=2, group=1, pages=(1, 2, 1)),
    "wide overlap, odd ratio": Shape(NSAConfig(6, 2, 6, 4, 0, 0, 4), (39, 38), group=2, pages=(2, 1, 1)),
    "ties": Shape(NSAConfig(4, 2, 8, 4, 0, 0, 5), (77,), group=3, values="repeated"),
    "ties between tiles": Shape(NSAConfig(4, 2, 8, 5, 0, 0, 5), (301, 155), group=3, values="repeated"),
    "all alike": Shape(NSAConfig(4, 2, 8, 3, 0, 0, 5), (64,), group=1, values="flat"),
    "hot": Shape(SMALL, (50,), group=2, values="hot"),
    "one block a query": Shape(NSAConfig(2, 1, 2, 1, 0, 1, 1), (33,), group=2),
}


def on_kernels(shape: Shape, dtype: torch.dtype) -> tuple[Sequences, PagedKV]:
    """In `dtype` with exactly the reference's values."""
    x, pages = filled(shape)
    x = Sequences(x.q.to(dtype), x.gates.to(dtype), x.kv, x.lengths)
    return x, PagedKV(*(Pages(p.k.to(dtype), p.v.to(dtype), p.table) for p in pages))


@pytest.mark.parametrize("lanes", (1, 4, 64, 100, 128, 200, 256, 395, 512, 1024, 1585, 100_000))
def test_a_step_fills_its_waves(lanes: int):
    programs = lanes * decode._filling(lanes)
    assert programs >= lanes
    assert programs > (0.85 if lanes <= 1024 else 0.75) * -(-programs // decode.WAVE) * decode.WAVE


@pytest.mark.parametrize(
    ("lanes", "blocks", "alone"), [(4, 8192, True), (4, 8193, False), (32, 8192, True), (33, 128, False)]
)
def test_each_program_chooses_where_lanes_are_few(lanes: int, blocks: int, alone: bool):
    assert decode.plan_step(lanes, blocks, PAPER, 512, 16, 227 << 10).alone == alone


@pytest.mark.parametrize("blocks", (1, 7, 100, 1000, 8192))
def test_who_reads_values_reads_those_of_whole_programs(blocks: int):
    """Programs of one number modulo `values` scored what one program reads the values of."""
    for lanes in range(1, decode.FEW_LANES + 1):
        plan = decode.plan_step(lanes, blocks, PAPER, 512, 16, 227 << 10)
        assert plan.alone and plan.compressed % plan.values == 0, (lanes, plan)
        assert plan.run & (plan.run - 1) == 0, (lanes, plan)


DIVISIONS = {
    "alone": {"split": False},
    "merged by the last": {"split": True},
    "merged by a launch": {"split": True, "FEW_PARTS": 1},
    "each chooses": {"split": True, "FEW_LANES": 1000},
    "one chooses and attends": {"split": False, "FEW_LANES": 1000},
    "each chooses, of a few sums each": {"split": True, "FEW_LANES": 1000, "SUMMED": 64},
}
"""How a step's work is divided over programs."""


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", KERNEL_SHAPES)
def test_triton_equals_reference(name: str, division: str, monkeypatch):
    plan, limits = decode.plan_step, {"FEW_LANES": 0} | DIVISIONS[division]
    split = limits.pop("split")

    def small(*args):
        found = plan(*args)
        if not split:
            return found._replace(compressed=1, values=1, window=1, selected=1, rows=2)
        parts = min(found.compressed, 2), min(found.window, 2), min(args[2].num_selected, 2)
        return found._replace(compressed=parts[0], values=1, window=parts[1], selected=parts[2], rows=2)

    monkeypatch.setattr(decode, "plan_step", small)
    for limit, value in limits.items():
        monkeypatch.setattr(decode, limit, value)
    shape = KERNEL_SHAPES[name]
    x, pages = on_kernels(shape, torch.float32)
    expected = paged_step(x.q, x.gates, pages, x.lengths, shape.config, scale=0.3, impl="reference")
    found = paged_step(x.q, x.gates, pages, x.lengths, shape.config, scale=0.3, impl="triton")
    assert torch.equal(found.selection.indices, expected.selection.indices)
    torch.testing.assert_close(found.out, expected.out, **TOLERANCE[torch.float32])


def test_triton_in_half_precision():
    shape = Shape(SMALL, (45,), group=2, d=16, dv=16)
    x, pages = on_kernels(shape, torch.bfloat16)
    found = paged_step(x.q, x.gates, pages, x.lengths, SMALL, impl="triton")
    exact = [Pages(p.k.double(), p.v.double(), p.table) for p in pages]
    expected = paged_step(x.q.double(), x.gates.double(), PagedKV(*exact), x.lengths, SMALL)
    assert torch.equal(found.selection.indices, expected.selection.indices)
    assert (found.out.double() - expected.out).norm() <= 2**-7 * expected.out.norm()


def test_triton_reads_nothing_through_garbage_tables():
    """Unmapped pages and lengths past the tables on a device where they are not checked: 0 in place of keys."""
    x, pages = on_kernels(Shape(SMALL, (45,), group=2), torch.float32)
    for p in pages:
        p.table[:, 2] = 2**31 - 1
        p.table[:, 3] = -7
    lengths = torch.tensor([2**31 - 1], dtype=torch.int32)
    out = torch.empty(1, 2, 1, 3)
    indices = decode.paged_step(x.q, x.gates, pages, lengths, out, SMALL, scale=0.3)
    blocks = SMALL.num_blocks(pages.capacity(SMALL))
    assert ((indices >= 0) & (indices < blocks)).all()


def test_triton_writes_what_reference_writes():
    shape = Shape(SMALL, (29, 0, 12), hk=2, dtype=torch.float32)
    x, expected = filled(shape)
    pages, recent, done = shape.empty_pages(29), shape.recent(), torch.zeros_like(x.lengths)
    for piece, impl in ((20, "reference"), (9, "triton")):
        counts = (x.lengths - done).clamp(max=piece)
        done = done + counts
        compress = {"compressor": MeanPool(SMALL), "recent": recent}
        paged_append(tail(x, done, piece, counts), pages, done, SMALL, counts=counts, **compress, impl=impl)
    assert_same_pages(pages, expected)


def test_the_operator_is_registered_as_torch_expects():
    x, pages = on_kernels(Shape(SMALL, (13,), group=1), torch.float32)
    geometry = [4, 2, 8, 3, 1, 2, 6]
    tensors = [y for p in pages for y in p]
    out = torch.empty(1, 1, 1, 3)
    torch.library.opcheck(decode._paged_step, (x.q, x.gates, *tensors, x.lengths, out, geometry, [32, 0, 0], 0.3))


def test_a_step_compiles_whole():
    x, pages = filled(Shape(SMALL, (29, 4)))

    def step(q, gates, lengths):
        return paged_step(q, gates, pages, lengths, SMALL).out

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert_close([compiled(x.q, x.gates, x.lengths)], [step(x.q, x.gates, x.lengths)])


# Bad input.


def snapshot(pages: PagedKV) -> list[Tensor]:
    return [y.nan_to_num(7).clone() for p in pages for y in p[:2]]


@pytest.mark.parametrize(("branch", "page"), [("compressed", 1), ("selected", 0), ("window", 3)])
def test_an_unmapped_page_is_refused(branch: str, page: int):
    x, pages = filled(Shape(SMALL, (29,)))
    getattr(pages, branch).table[0, page] = -1
    with pytest.raises(ValueError, match=rf"pages\.{branch}\.table must map logical page {page} of sequence 0"):
        paged_step(x.q, x.gates, pages, x.lengths, SMALL)


@pytest.mark.parametrize("branch", BranchKV._fields)
def test_nothing_is_written_when_a_page_is_unmapped(branch: str):
    shape = Shape(SMALL, (29, 29))
    x, pages = shape.sequences(), shape.empty_pages(29)
    getattr(pages, branch).table[1, 2] = 99
    before, recent = snapshot(pages), shape.recent()
    with pytest.raises(ValueError, match=rf"pages\.{branch}\.table must map logical page 2 of sequence 1"):
        paged_append(tail(x, x.lengths, 29), pages, x.lengths, SMALL, compressor=MeanPool(SMALL), recent=recent)
    assert all(torch.equal(y, z) for y, z in zip(before, snapshot(pages), strict=True))
    assert all(ring.isnan().all() for ring in recent)


def test_bad_input_is_refused():
    x, pages = filled(Shape(SMALL, (29,)))
    good = {"q": x.q, "gates": x.gates, "pages": pages, "lengths": x.lengths, "config": SMALL}

    def step(**new):
        return paged_step(**{**good, **new})

    with pytest.raises(ValueError, match=r"lengths must lie in 0 \.\. 40, got 99 \.\. 99; the block tables"):
        step(lengths=torch.tensor([99]))
    with pytest.raises(ValueError, match=r"lengths must be int32 or int64 \[b\] = \(1,\)"):
        step(lengths=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="one query a sequence, tq = 1, got tq=2"):
        step(q=x.q.expand(-1, -1, 2, -1), gates=x.gates.expand(-1, -1, 2, -1))
    with pytest.raises(TypeError, match="pages must be a PagedKV"):
        step(pages=tuple(pages))
    with pytest.raises(ValueError, match=r"pages\.window must hold a multiple of 8 tokens a page"):
        k, v, table = pages.window
        step(pages=pages._replace(window=Pages(k[:, :, :7], v[:, :, :7], table)))
    with pytest.raises(ValueError, match=r"pages\.compressed\.table must be int32 or int64"):
        step(pages=pages._replace(compressed=pages.compressed._replace(table=pages.compressed.table.double())))
    with pytest.raises(ValueError, match=r"pages\.selected\.k must have the dtype of q"):
        step(pages=pages._replace(selected=pages.selected._replace(k=pages.selected.k.float())))
    with pytest.raises(ValueError, match="keys of q's dim 2, got 4"):
        step(q=x.q[..., :2])
    with pytest.raises(ValueError, match=r"out must be \[b, hq, 1, dv\] = \(1, 2, 1, 3\)"):
        step(out=x.q)
    with pytest.raises(NotImplementedError, match="flex.* has no paged step"):
        step(impl="flex")
    with pytest.raises(NotImplementedError, match="float64"):
        step(impl="triton")
    with debug(), pytest.raises(ValueError, match="scale must be finite"):
        step(scale=float("nan"))


def test_bad_input_to_append_is_refused():
    shape = Shape(SMALL, (29,))
    x, pages = filled(shape)
    kv, before = tail(x, x.lengths, 1), snapshot(pages)
    good = {"kv": kv, "pages": pages, "lengths": x.lengths, "config": SMALL}

    def append(**new):
        return paged_append(**{**good, **new})

    with pytest.raises(ValueError, match="compressor is given without recent"):
        append(compressor=MeanPool(SMALL))
    with pytest.raises(ValueError, match="recent is given without compressor"):
        append(recent=shape.recent())
    with pytest.raises(ValueError, match=r"recent\[0\] must be .* = \(1, 1, 4, 4\), got \(1, 1, 3, 4\)"):
        append(compressor=MeanPool(SMALL), recent=tuple(y[:, :, 1:] for y in shape.recent()))
    with pytest.raises(ValueError, match="compressor was made for compress_block=8"):
        append(compressor=MeanPool(NSAConfig(8, 2, 8)), recent=shape.recent())
    with pytest.raises(ValueError, match="compressor must return keys of shape"):
        append(compressor=lambda k, v, starts: (k, v), recent=shape.recent())
    with pytest.raises(ValueError, match=r"kv\.window\[0\] must be \[b, hk, t, dim\] = \(1, 1, 1, 4\)"):
        append(kv=kv._replace(window=(kv.window[1], kv.window[1])))
    with pytest.raises(TypeError, match="kv must be a BranchKV"):
        append(kv=tuple(kv))
    with pytest.raises(ValueError, match=r"counts must lie in 0 \.\. 1, got 2 \.\. 2"):
        append(counts=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"lengths must lie in 0 \.\. 40"):
        append(lengths=torch.tensor([41]))
    assert all(torch.equal(y, z) for y, z in zip(before, snapshot(pages), strict=True))


# On a GPU.

PAPER = NSAConfig()


def exact_step(x: Sequences, pages: PagedKV, config: NSAConfig, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The step in float64 given a selection, and the selection that float64 would have made."""
    wide = PagedKV(*(Pages(p.k.double(), p.v.double(), p.table) for p in pages))
    q, gates = x.q.double(), x.gates.double()
    own = paged_step(q, gates, wide, x.lengths, config, impl="reference").selection.indices
    kv = BranchKV(*(tuple(unpage(y, p.table) for y in p[:2]) for p in wide))
    outs = []
    for row, length in enumerate(x.lengths.tolist()):
        if length == 0:
            outs.append(torch.zeros_like(q[row : row + 1, ..., :1]).expand(-1, -1, -1, kv.selected[1].shape[3]))
            continue
        placed = {"positions": torch.tensor([length - 1], device=q.device), "impl": "reference"}
        before = config.compress_block // config.compress_stride - 1
        ends = slice(before, before + config.num_compressed(length))
        one, pick = q[row : row + 1], lambda y, cut, row=row: y[row : row + 1, :, cut].nan_to_num()
        c = compressed_attention(one, *(pick(y, ends) for y in kv.compressed), config, **placed)
        raw = slice(0, length)
        s = selected_attention(
            one, *(pick(y, raw) for y in kv.selected), Selection(indices[row : row + 1]), config, **placed
        )
        w = window_attention(one, *(pick(y, raw) for y in kv.window), config, **placed)
        outs.append(combine(gates[row : row + 1], (c, s, w)))
    return torch.cat(outs), own


def unpage(y: Tensor, table: Tensor) -> Tensor:
    return y[table.clamp(min=0).long()].movedim(2, 1).flatten(2, 3)


GPU_SHAPES = {
    "64/4/128": Shape(PAPER, (2048, 0, 17, 1983, 700), hk=4, group=16, d=128, dv=128, pages=(16, 1, 2)),
    "small pages": Shape(PAPER, (2048, 31, 1030), hk=2, group=4, d=64, dv=64),
    "192, 128": Shape(PAPER, (1500, 640), hk=4, group=8, d=192, dv=128, pages=(4, 4, 4), dtype=torch.float16),
    "one lane": Shape(PAPER, (8100,), hk=1, group=5, d=128, dv=128, pages=(16, 1, 1)),
    "float32": Shape(NSAConfig(16, 16, 32, 7, 1, 1, 100), (999, 1000), hk=2, group=8, d=64, dv=80,
                     dtype=torch.float32),
    "odd": Shape(NSAConfig(48, 16, 96, 5, 0, 1, 77), (1111, 96, 47), hk=1, group=24, d=128, dv=128, pages=(1, 2, 1)),
    "two parts": Shape(PAPER, tuple(range(500, 5300, 300)), hk=4, group=16, d=128, dv=128, pages=(16, 1, 1)),
    "many lanes": Shape(PAPER, tuple(range(100, 2100, 37)), hk=4, group=16, d=128, dv=128, pages=(16, 1, 1)),
    "several tiles": Shape(PAPER, (70_000,), hk=4, group=16, d=32, dv=32, pages=(16, 1, 1), dtype=torch.float32),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_kernels_on_a_gpu(name: str):
    shape = GPU_SHAPES[name]
    dtype = torch.bfloat16 if shape.dtype == torch.float64 else shape.dtype
    shape = replace(shape, dtype=dtype, device="cuda")
    x, pages = filled(shape, impl="triton")
    found = paged_step(x.q, x.gates, pages, x.lengths, shape.config)
    expected, own = exact_step(x, pages, shape.config, found.selection.indices)
    error = (found.out.double() - expected).norm() / expected.norm()
    differing = (own != found.selection.indices).any(-1).double().mean()
    print(f"{name}: error {error:.2e}, lanes that select differently {differing:.3f}")
    assert error <= {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}[dtype]
    assert differing <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("few", [0, 1000], ids=("one chooses", "each chooses"))
@pytest.mark.parametrize("group", [3, 16])
def test_ties_go_to_the_lowest_block_on_a_gpu(group: int, few: int, monkeypatch):
    """Repeated tokens in blocks at the end of a tile and in others, whose importances must be the same bits."""
    monkeypatch.setattr(decode, "FEW_LANES", few)
    for seed in range(8):
        shape = Shape(NSAConfig(4, 2, 8, 5, 0, 0, 5), (1301, 955), group=group, d=16, values="repeated", seed=seed)
        x, pages = on_kernels(shape, torch.float32)
        expected = paged_step(x.q, x.gates, pages, x.lengths, shape.config, scale=0.3, impl="reference")
        moved = PagedKV(*(Pages(*(y.cuda() for y in p)) for p in pages))
        q, gates, lengths = (y.cuda() for y in (x.q, x.gates, x.lengths))
        found = paged_step(q, gates, moved, lengths, shape.config, scale=0.3, impl="triton")
        assert torch.equal(found.selection.indices.cpu(), expected.selection.indices)


@pytest.mark.gpu
def test_a_captured_graph_serves_growing_lengths():
    """Append and step in one graph, replayed; no host synchronisation while it is recorded or run."""
    shape = Shape(
        PAPER, (40, 0, 1000), hk=2, group=16, d=64, dv=64, dtype=torch.float32, device="cuda", pages=(16, 1, 1)
    )
    x = shape.sequences(spare=70)
    pages, recent, compressor = shape.empty_pages(1070), shape.recent(), MeanPool(PAPER)
    paged_append(tail(x, x.lengths, 1000), pages, x.lengths, PAPER, compressor=compressor, recent=recent)
    lengths, kv, out = x.lengths.clone(), tail(x, x.lengths, 1), torch.empty_like(x.q)
    start = [y.clone() for p in pages for y in p[:2]] + [y.clone() for y in recent]
    state = [y for p in pages for y in p[:2]] + list(recent)

    def step() -> Tensor:
        lengths.add_(1)
        paged_append(kv, pages, lengths, PAPER, compressor=compressor, recent=recent)
        return paged_step(x.q, x.gates, pages, lengths, PAPER, out=out).selection.indices

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            indices = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for y, first in zip(state, start, strict=True):
        y.copy_(first)
    lengths.copy_(x.lengths)
    for token in range(1, 71):
        for pair, new in zip(kv, tail(x, x.lengths + token, 1), strict=True):
            for y, z in zip(pair, new, strict=True):
                y.copy_(z)
        graph.replay()
        if token in (1, 24, 32, 63, 64, 65, 70):
            now = x._replace(lengths=x.lengths + token)
            assert torch.equal(indices, chosen(now, PAPER))
            torch.testing.assert_close(out, unpaged(now, PAPER), rtol=1e-4, atol=1e-5)


# The benchmark.


def test_the_benchmark_writes_a_row_for_each_engine(tmp_path, capsys):
    main(["decode", "--device", "cpu", "--tokens", "512", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "decode.json").read_text())
    assert {"device", "torch", "triton", "date", "commit"} <= result.keys()
    assert [(row["engine"], row["tokens"]) for row in result["rows"]] == [("nsa", 512), ("math", 512)]
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in result["rows"])
    assert "times math" in capsys.readouterr().out


def test_the_benchmark_of_a_prompt_in_chunks(tmp_path, capsys):
    main(["decode", "--device", "cpu", "--tokens", "1024", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["case"], row["engine"], row["chunk"]) for row in rows] == [
        ("prefill", "whole", 256),
        ("prefill", "chunks", 256),
    ]
    assert chunked(rows)[1] == rows[1]["us"] / rows[0]["us"]
    assert "1024 tokens in calls of 256" in capsys.readouterr().out


def test_the_benchmark_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit):
        main(["decode", "--device", "cpu", "--engine", "cudnn"])


def test_the_recorded_result_says_what_the_docs_show():
    rows = json.loads((ROOT / "bench/results/decode/h200.json").read_text())["rows"]
    assert {(row["case"], row["tokens"]) for row, *_ in ratios(rows)} == set(TARGETS)
    assert table(rows).count("\n") == 1 + len(TARGETS)
