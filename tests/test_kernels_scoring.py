"""Scoring and top-n in Triton against a dense float64 oracle: by the chosen sets' scores, and exact ties by index."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Case, cases
from flexnsa import NSAConfig, compressed_attention, select_blocks
from flexnsa.layout import QueryTable, query_table

triton = pytest.importorskip("triton")
from flexnsa.kernels import scoring  # noqa: E402

# Triton's interpreter evaluates compressed tokens that the query does not see, in numpy, before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem(NamedTuple):
    """What `select_blocks` takes, and the importances it must rank."""

    q: Tensor
    k_cmp: Tensor
    lse: Tensor
    table: QueryTable
    config: NSAConfig
    tokens: int
    importance: Tensor

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        names = (
            "compress_block", "compress_stride", "select_block", "num_selected", "num_initial", "num_local"
        )  # fmt: skip
        geometry = {name: getattr(self.config, name) for name in names}
        tensors = (self.q, self.k_cmp, self.lse, *self.table[:3])
        more = {"num_blocks": self.config.num_blocks(self.tokens), "scale": self.q.shape[-1] ** -0.5}
        return tuple(x.to(DEVICE) for x in tensors), geometry | more

    def select(self) -> Tensor:
        tensors, keywords = self.arguments
        return scoring.select_blocks(*tensors, **keywords).cpu()


def visible(table: QueryTable, config: NSAConfig, compressed: int) -> Tensor:
    """[b, tq, c]: compressed token i lies in the query's document and ends at or before the query."""
    index = torch.arange(compressed)
    end = (index - table.offset[..., None]) * config.compress_stride + config.compress_block - 1
    return (index >= table.offset[..., None]) & (end <= (table.position - table.start)[..., None])


def overlaps(config: NSAConfig, compressed: int, blocks: int) -> Tensor:
    """[c, s]: tokens shared by compressed token i and block j, in strides."""
    begin, block = torch.arange(compressed) * config.compress_stride, torch.arange(blocks) * config.select_block
    last = torch.minimum((begin + config.compress_block)[:, None], (block + config.select_block)[None])
    return (last - torch.maximum(begin[:, None], block[None])).clamp(min=0).double() / config.compress_stride


def problem(
    q: Tensor, k_cmp: Tensor, config: NSAConfig, tokens: int, lse: Tensor | None = None, **placing: Any
) -> Problem:
    table = query_table(q, config, num_tokens=tokens, **placing)
    (b, hq, tq, d), (hk, c) = q.shape, k_cmp.shape[1:3]
    seen = visible(table, config, c).expand(b, tq, c)[:, None, None]
    logits = torch.einsum("bhgtd,bhcd->bhgtc", q.double().reshape(b, hk, hq // hk, tq, d), k_cmp.double()) * d**-0.5
    lse64 = logits.where(seen, -torch.inf).logsumexp(-1) if lse is None else lse.double().reshape(b, hk, -1, tq)
    p = (logits - lse64[..., None]).exp().where(seen, 0).sum(2)
    local = torch.zeros_like(p)
    for row in range(b):
        for query in range(tq):
            first = int(table.offset[min(row, len(table.offset) - 1), query])
            local[row, :, query, : c - first] = p[row, :, query, first:]
    importance = local @ overlaps(config, c, config.num_blocks(tokens))
    return Problem(q, k_cmp, lse64.reshape(b, hq, tq).float(), table, config, tokens, importance)


def from_case(case: Case, dtype: torch.dtype, lse: Tensor | None = None) -> Problem:
    x = case.inputs(dtype)
    return problem(x.q, x.k_cmp, case.config, case.tokens, lse, **case.placing)


def kinds(p: Problem) -> tuple[Tensor, Tensor]:
    """(forced, other) candidates, [b or 1, 1, tq, s]."""
    block = torch.arange(p.config.num_blocks(p.tokens))
    own = ((p.table.position - p.table.start) // p.config.select_block)[:, None, :, None]
    own = own.where(p.table.position[:, None, :, None] >= 0, -1)
    forced = ((block < p.config.num_initial) | (block > own - p.config.num_local)) & (block <= own)
    return forced, (block <= own) & ~forced


def ranking(p: Problem) -> Tensor:
    forced, other = kinds(p)
    rank = p.importance.masked_fill(p.importance.isnan(), -1).masked_fill(forced, torch.inf)
    return rank.masked_fill(~(forced | other), -2)


def expected(p: Problem) -> Tensor:
    """The selection in float64, [b, hk, tq, n]."""
    rank = ranking(p)
    blocks = rank.shape[-1]
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : p.config.num_selected]
    best = best.where(rank.gather(-1, best) >= -1, blocks).sort(dim=-1).values
    best = best.where(best < blocks, -1)
    return torch.nn.functional.pad(best, (0, p.config.num_selected - best.shape[-1]), value=-1).int()


def assert_selects_best(indices: Tensor, p: Problem) -> None:
    """As many blocks as expected, ascending, left-packed, with the scores of the best ones to rounding."""
    best, rank = expected(p), ranking(p)
    assert indices.shape == best.shape and indices.dtype == torch.int32
    assert torch.equal(indices >= 0, best >= 0)
    assert ((indices.diff(dim=-1) > 0) | (indices[..., 1:] < 0)).all()
    scores = [
        rank.gather(-1, x.clamp(min=0).long()).masked_fill(x < 0, -3).sort(dim=-1).values for x in (indices, best)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-30)


def random_problem(
    config: NSAConfig, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, **kw: Any
) -> Problem:
    generator = torch.Generator().manual_seed(tokens * dim + heads)
    positions = kw.get("positions")
    queries = tokens if positions is None else positions.shape[-1]
    q = torch.randn(1, heads, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(1, kv_heads, config.num_compressed(tokens), dim, generator=generator, dtype=torch.float64).to(dtype)
    return problem(q, k, config, tokens, **kw)


SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_initial=1, num_local=1)


@settings(max_examples=25)
@given(cases(groups=(1, 2, 3, 4, 6, 16)), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_selects_the_best_blocks(case, dtype):
    p = from_case(case, dtype)
    assert_selects_best(p.select(), p)


@settings(max_examples=15)
@given(cases(values=("flat",)))
def test_exact_ties_go_to_the_lowest_index(case):
    # With q = 0 and lse = 0 every visible token has p = 1, and every score is a small integer.
    p = from_case(case, torch.float32, torch.zeros(case.batch, case.heads, case.queries))
    assert torch.equal(p.select(), expected(p))


@settings(max_examples=25)
@given(cases(values=("flat",), groups=(1, 3)))
def test_equal_probabilities_tie_as_in_the_reference(case):
    """With q = 0 a query's visible tokens have one p, no power of two: blocks tie wherever the ends cut them alike."""
    x = case.inputs(torch.float32)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing).lse
    p = from_case(case, torch.float32, lse.double())
    options = {"num_tokens": case.tokens, "impl": "reference", **case.placing}
    assert torch.equal(p.select(), select_blocks(x.q, x.k_cmp, lse, case.config, **options).indices)


@pytest.mark.parametrize("geometry", [(4, 1, 4), (9, 3, 12), (8, 2, 8), (3, 1, 5)])
def test_blocks_cut_on_either_side_tie(geometry):
    """The first block lacks what reaches in from the left, the last what begins past the query."""
    config = NSAConfig(*geometry, num_selected=1, num_initial=0, num_local=0)
    tokens = 3 * config.select_block
    q, k_cmp = torch.zeros(1, 1, tokens, 16), torch.zeros(1, 1, config.num_compressed(tokens), 16)
    for lse in (0.3, 1.0986123, 2.7):
        p = problem(q, k_cmp, config, tokens, torch.full((1, 1, tokens), lse))
        options = {"num_tokens": tokens, "impl": "reference"}
        assert torch.equal(p.select(), select_blocks(q, k_cmp, p.lse, config, **options).indices)


@pytest.mark.parametrize("dim", [5, 16, 24, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_head_dim(dim, dtype):
    p = random_problem(SMALL, 40, 4, 2, dim, dtype, positions=torch.tensor([3, 17, 38, 39]))
    assert_selects_best(p.select(), p)


@pytest.mark.parametrize("group", [64, 130])
def test_large_groups_take_several_passes(group):
    p = random_problem(SMALL, 40, group, 1, 16, torch.float16, positions=torch.tensor([5, 39]))
    assert_selects_best(p.select(), p)


@pytest.mark.parametrize("overlap", [1, 2])
def test_scores_carry_over_from_one_tile_of_blocks_to_the_next(overlap, monkeypatch):
    config = NSAConfig(compress_block=overlap, compress_stride=1, select_block=2, num_selected=7)
    p = random_problem(config, 300, 2, 1, 16, torch.float16, positions=torch.tensor([127, 128, 299]))
    whole = p.select()
    assert_selects_best(whole, p)
    monkeypatch.setattr(scoring, "LEAST_SPAN", 1)
    assert torch.equal(p.select(), whole)


def test_queries_come_in_chunks(monkeypatch):
    p = random_problem(SMALL, 70, 16, 2, 16, torch.float16, positions=torch.arange(40, 70))
    whole = p.select()
    monkeypatch.setattr(scoring, "TEMPORARY_BYTES", 1)
    assert torch.equal(p.select(), whole)


def test_strides_are_respected():
    p = random_problem(SMALL, 24, 4, 2, 16, torch.float16, positions=torch.tensor([1, 22, 23]))
    q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    far = p._replace(q=q, k_cmp=p.k_cmp.mT.contiguous().mT, lse=p.lse.mT.contiguous().mT)
    assert torch.equal(far.select(), p.select())


def test_nan_scores_rank_last_and_indices_stay_valid():
    p = random_problem(SMALL, 40, 2, 1, 16, torch.float32)
    k_cmp = p.k_cmp.clone()
    k_cmp[:, :, 5:9] = torch.nan
    p = problem(p.q, k_cmp, SMALL, 40, lse=p.lse)
    assert p.importance.isnan().any()
    assert_selects_best(p.select(), p)


def test_invisible_memory_may_hold_nan():
    p = random_problem(SMALL, 40, 2, 1, 16, torch.float16, positions=torch.tensor([9, 20]))
    poisoned = p.k_cmp.clone()
    poisoned[:, :, 9:] = torch.nan
    assert torch.equal(p._replace(k_cmp=poisoned).select(), p.select())


def test_garbage_tables_stay_in_memory():
    p = random_problem(SMALL, 24, 2, 1, 16, torch.float16)
    wild = torch.tensor([[-(1 << 40), 1 << 40, 7, -1] * 6])
    indices = p._replace(table=QueryTable(wild, wild.flip(1), wild.roll(1, 1))).select()
    assert indices.shape == (1, 1, 24, 4)
    assert ((indices >= -1) & (indices < 6)).all()


def test_no_compressed_token_at_all():
    p = random_problem(SMALL, 3, 2, 1, 16, torch.float32)
    assert p.k_cmp.shape[2] == 0
    assert torch.equal(p.select(), expected(p))


def test_the_op_is_well_formed():
    tensors, keywords = random_problem(SMALL, 12, 2, 1, 16, torch.float32).arguments
    for interval in ((), (tensors[4], tensors[3])):
        torch.library.opcheck(torch.ops.flexnsa.select_blocks.default, (*tensors, *interval), keywords)


def test_wrong_inputs_are_named():
    tensors, keywords = random_problem(SMALL, 12, 2, 1, 16, torch.float32).arguments
    for at, wrong, word in (
        (0, tensors[0].double(), "q and k_cmp"),
        (1, tensors[1][..., :8], "k_cmp"),
        (2, tensors[2].double(), "lse"),
        (3, tensors[3].int(), "position"),
    ):
        with pytest.raises(ValueError, match=word):
            scoring.select_blocks(*tensors[:at], wrong, *tensors[at + 1 :], **keywords)
    with pytest.raises(ValueError, match="low and high must be given together"):
        scoring.select_blocks(*tensors, tensors[3], **keywords)
    with pytest.raises(ValueError, match="num_selected"):
        scoring.select_blocks(*tensors, **keywords | {"num_selected": 65})


def on_the_gpu(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Problem, list[int]]:
    """A long problem; its oracle covers the sampled queries alone."""
    config, generator = NSAConfig(), torch.Generator("cuda").manual_seed(tokens)
    compressed = config.num_compressed(tokens)
    q, k = (
        torch.randn(1, h, t, dim, generator=generator, device="cuda", dtype=dtype)
        for h, t in ((heads, tokens), (kv_heads, compressed))
    )
    lse = torch.full((1, heads, tokens), 4.0, device="cuda")
    sample = sorted({0, 31, 63, 64, 1000, tokens // 2 + 5, tokens - 65, tokens - 1})
    oracle = problem(
        q[:, :, sample].cpu(), k.cpu(), config, tokens, lse[:, :, sample].cpu(), positions=torch.tensor(sample)
    )
    return oracle._replace(q=q, k_cmp=k, lse=lse), sample


def select_all(p: Problem) -> Tensor:
    """Every query of a long problem, on the GPU."""
    position = torch.arange(p.tokens, device="cuda")[None]
    table = QueryTable(position, position * 0, position * 0)
    tensors, keywords = p._replace(table=table).arguments
    return scoring.select_blocks(*tensors, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [65536, 131072])
@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 4), (16, 4)])
def test_long_sequences(tokens, heads, kv_heads):
    p, sample = on_the_gpu(tokens, heads, kv_heads, 128, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    indices = select_all(p)
    assert torch.cuda.max_memory_allocated() - before - indices.nbytes < 512 << 20
    assert_selects_best(indices[:, :, sample].cpu(), p)


@pytest.mark.gpu
def test_the_same_bits_every_run_whatever_memory_held_before():
    p, _ = on_the_gpu(8192, 16, 4, 128, torch.bfloat16)
    first = select_all(p)
    assert all(torch.equal(select_all(p), first) for _ in range(20))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    poisoned = select_all(p)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(poisoned, first)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    p, _ = on_the_gpu(4096, 16, 4, 64, torch.float16)
    first, graph = select_all(p), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = select_all(p)
    indices.zero_()
    graph.replay()
    assert torch.equal(indices, first)


@pytest.mark.gpu
def test_compiles_for_any_length_without_a_break():
    compiled = torch.compile(select_all, fullgraph=True, dynamic=True)
    for tokens in (1024, 2000):
        p, _ = on_the_gpu(tokens, 4, 2, 64, torch.float16)
        assert torch.equal(compiled(p), select_all(p))


@pytest.mark.gpu
def test_a_packed_row_equals_its_documents_alone():
    lengths = [1000, 31, 700, 5, 64, 300]
    documents = torch.arange(6).repeat_interleave(torch.tensor(lengths))[None]
    p, _ = on_the_gpu(2100, 16, 2, 64, torch.float16)
    table = query_table(p.q.cpu()[..., :1], p.config, num_tokens=2100, documents=documents)
    packed, first = p._replace(table=table).select(), 0
    for length in lengths:
        rows, offset = slice(first, first + length), int(table.offset[0, first])
        keys = slice(offset, offset + p.config.num_compressed(length))
        alone = p._replace(
            q=p.q[:, :, rows], k_cmp=p.k_cmp[:, :, keys], lse=p.lse[:, :, rows], tokens=length,
            table=QueryTable(torch.arange(length)[None], *torch.zeros(2, 1, length, dtype=torch.int64)),
        )  # fmt: skip
        assert torch.equal(alone.select(), packed[:, :, rows])
        first += length
