"""Selection: the contract of the indices, ties, NaN, and the choice itself."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from conftest import Case, cases
from flexnsa import NSAConfig, block_importance, compressed_attention, select_blocks

engines = pytest.mark.parametrize("impl", ("reference", "flex"))
SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=4)


def select(case: Case, dtype: torch.dtype = torch.float64, impl: str = "reference") -> tuple[Tensor, Tensor]:
    """The library's indices and the library's importance."""
    x = case.inputs(dtype)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing).lse
    keywords = {"num_tokens": case.tokens, **case.placing}
    selection = select_blocks(x.q, x.k_cmp, lse, case.config, impl=impl, **keywords)
    return selection.indices, block_importance(x.q, x.k_cmp, lse, case.config, **keywords)


def each_choice(indices: Tensor):
    """((batch, KV head, query), the chosen blocks) without the padding."""
    for b, heads in enumerate(indices.tolist()):
        for h, queries in enumerate(heads):
            for t, chosen in enumerate(queries):
                yield (b, h, t), [j for j in chosen if j >= 0]


@engines
@given(case=cases())
def test_indices_keep_the_contract(impl: str, case: Case):
    indices, _ = select(case, impl=impl)
    where = case.where
    assert indices.dtype == torch.int32
    assert indices.shape == (case.batch, case.kv_heads, case.queries, case.config.num_selected)
    for (b, h, t), chosen in each_choice(indices):
        padding = case.config.num_selected - len(chosen)
        candidates = where.candidates(b, t)
        assert indices[b, h, t].tolist() == chosen + [-1] * padding
        assert all(i < j for i, j in pairwise(chosen))
        assert where.forced(b, t) <= set(chosen) <= set(candidates)
        assert len(chosen) == min(case.config.num_selected, len(candidates))


@engines
@given(case=cases())
def test_chooses_the_most_important(impl: str, case: Case):
    """Two correct choices may differ only among blocks whose importances differ by rounding."""
    x = case.inputs()
    indices, _ = select(case, impl=impl)
    exact = oracle.block_importance(x.q, x.k_cmp, case.where)
    best = oracle.select_blocks(exact, case.where)
    for (b, h, t), chosen in each_choice(indices):
        ours, theirs = (sorted(exact[b, h, t, j].item() for j in x if j >= 0) for x in (chosen, best[b, h, t].tolist()))
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@given(case=cases())
def test_is_the_sorting_of_its_own_importance_index_by_index(dtype: torch.dtype, case: Case):
    indices, importance = select(case, dtype)
    assert torch.equal(indices, oracle.select_blocks(importance, case.where))


@engines
@given(case=cases(values=("flat",), documents=False))
def test_ties_go_to_the_earlier_block(impl: str, case: Case):
    """q = 0: importance is the number of visible shared tokens, so blocks tie exactly and the index decides."""
    indices, _ = select(case, impl=impl)
    shared = torch.zeros(case.batch, case.kv_heads, case.queries, case.where.num_blocks)
    for b in range(case.batch):
        for t in range(case.queries):
            for j, weights in enumerate(case.where.block_weights(b, t)):
                shared[b, :, t, j] = sum(weights)
    assert torch.equal(indices, oracle.select_blocks(shared, case.where))


@engines
def test_repeated_keys_tie(impl: str):
    """All compressed keys equal, so the scores are equal and not zero."""
    case = Case(SMALL, batch=2, kv_heads=2, group=3, tokens=41)
    x = case.inputs()
    k_cmp = x.k_cmp[:, :, :1].expand_as(x.k_cmp).contiguous()
    lse = compressed_attention(x.q, k_cmp, x.v_cmp, SMALL).lse
    found = select_blocks(x.q, k_cmp, lse, SMALL, num_tokens=41, impl=impl).indices
    # Interior blocks share 1 + 2 + 1 strides with their compressed tokens, the first 2 + 1.
    assert found[:, :, 40].eq(torch.tensor([0, 1, 10])).all()
    assert found[:, :, 27].eq(torch.tensor([0, 1, 6])).all()


@engines
def test_nan_ranks_below_every_number(impl: str):
    """NaN in one head's compressed keys: the indices stay valid, and the other head's choice stays what it was."""
    case = Case(SMALL, batch=1, kv_heads=2, group=2, tokens=33)
    x = case.inputs()
    clean, _ = select(case, impl=impl)
    k_cmp = x.k_cmp.clone()
    k_cmp[:, 0, 5] = torch.nan
    lse = compressed_attention(x.q, k_cmp, x.v_cmp, SMALL, impl="reference").lse
    found = select_blocks(x.q, k_cmp, lse, SMALL, num_tokens=33, impl=impl).indices
    assert torch.equal(found[:, 1], clean[:, 1])
    assert torch.equal(found[:, 0, :13], clean[:, 0, :13])
    for (b, _, t), chosen in each_choice(found):
        assert len(chosen) == len(set(chosen)) == min(3, t // 4 + 1)
        assert set(chosen) <= set(case.where.candidates(b, t))


def test_a_nan_importance_loses_to_a_zero_one():
    """With an LSE of its own, one block is NaN and the others 0 or more: it is taken last."""
    config = NSAConfig(compress_block=4, compress_stride=4, select_block=4, num_selected=3, num_initial=0, num_local=0)
    q, k_cmp = torch.ones(1, 1, 1, 1), torch.tensor([0.0, torch.nan, -torch.inf, 1.0]).view(1, 1, 4, 1)
    lse = torch.zeros(1, 1, 1)
    found = select_blocks(q, k_cmp, lse, config, num_tokens=16, positions=torch.tensor([15])).indices
    assert found.tolist() == [[[[0, 2, 3]]]]


def test_selection_carries_no_gradient():
    x = Case(SMALL, kv_heads=2, group=2, tokens=20).inputs(grad=True)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL).lse
    assert not select_blocks(x.q, x.k_cmp, lse, SMALL, num_tokens=20).indices.requires_grad


@engines
def test_more_slots_than_blocks(impl: str):
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=9, window=4)
    indices, _ = select(Case(config, kv_heads=2, tokens=10), impl=impl)
    assert indices[0, 0, 9].tolist() == [0, 1, 2] + [-1] * 6
    assert indices[0, 1, 0].tolist() == [0] + [-1] * 8


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@given(case=cases(values=("normal", "hot")))
def test_both_engines_choose_alike(dtype: torch.dtype, case: Case):
    """Compared by importance: in low precision scores may tie to rounding."""
    indices, importance = select(case, dtype, "flex")
    best, _ = select(case, dtype)
    scores = importance.nan_to_num()
    for ours, theirs in zip(each_choice(indices), each_choice(best), strict=True):
        assert ours[0] == theirs[0]
        a, b = (sorted(scores[ours[0]][j].item() for j in x) for x in (ours[1], theirs[1]))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
