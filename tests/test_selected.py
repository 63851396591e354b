"""The selected branch against the oracle, for any selection that keeps the contract."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from conftest import Case, assert_as_accurate, assert_close, cases, gradients
from flexnsa import NSAConfig, Selection, selected_attention

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
scales = st.sampled_from((None, 0.0, 0.3, -0.7))


def any_selection(case: Case) -> Selection:
    """Any candidates, none perhaps: the branch does not care how a selection came about."""
    chance = random.Random(case.seed)
    where, count = case.where, case.config.num_selected
    indices = torch.full((case.batch, case.kv_heads, case.queries, count), -1, dtype=torch.int32)
    for b in range(case.batch):
        for t in range(case.queries):
            candidates = where.candidates(b, t)
            for h in range(case.kv_heads):
                chosen = sorted(chance.sample(candidates, chance.randint(0, min(count, len(candidates)))))
                indices[b, h, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return Selection(indices)


@given(case=cases(), scale=scales)
def test_reference_equals_the_oracle(case: Case, scale: float | None):
    x, selection = case.inputs(grad=True), any_selection(case)
    leaves = [x.q, x.k_slc, x.v_slc]
    found = selected_attention(*leaves, selection, case.config, scale=scale, impl="reference", **case.placing)
    expected = oracle.selected_attention(*leaves, selection.indices, case.where, scale)
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@given(case=cases())
def test_flex_equals_reference(case: Case):
    x, selection = case.inputs(torch.float32), any_selection(case)
    tensors = (x.q, x.k_slc, x.v_slc)
    exact_tensors = tuple(y.double() for y in tensors)
    found = selected_attention(*tensors, selection, case.config, impl="flex", **case.placing)
    plain = selected_attention(*tensors, selection, case.config, impl="reference", **case.placing)
    exact = selected_attention(*exact_tensors, selection, case.config, impl="reference", **case.placing)
    for name, values in zip(("out", "lse"), zip(found, plain, exact, strict=True), strict=True):
        assert values[0].dtype == torch.float32, name
        assert_as_accurate(*values, logits=case.logits)


@pytest.mark.parametrize("documents", (None, torch.tensor([[-1] * 2 + [0] * 7 + [1] * 5])))
def test_gradcheck(documents: Tensor | None):
    case = Case(SMALL, kv_heads=2, group=2, dim=2, value_dim=3, tokens=14, documents=documents)
    x, selection = case.inputs(grad=True), any_selection(case)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = selected_attention(q, k, v, selection, SMALL, documents=documents, impl="reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(forward, (x.q, x.k_slc, x.v_slc))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_nothing_selected_is_zero(impl: str):
    x = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=9).inputs(torch.float32)
    nothing = Selection(torch.full((2, 2, 9, 3), -1, dtype=torch.int32))
    out, lse = selected_attention(x.q, x.k_slc, x.v_slc, nothing, SMALL, impl=impl)
    assert torch.equal(out, torch.zeros(2, 6, 9, 3))
    assert torch.equal(lse, torch.full((2, 6, 9), -torch.inf))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_a_token_of_the_own_block_after_the_query_is_masked(impl: str):
    x = Case(SMALL, kv_heads=2, group=2, tokens=8).inputs(torch.float32)
    own = torch.arange(8, dtype=torch.int32).div(4, rounding_mode="floor").expand(1, 2, 8)[..., None]
    out, _ = selected_attention(x.q, x.k_slc, x.v_slc, Selection(own.contiguous()), SMALL, impl=impl)
    for t in (0, 4):
        torch.testing.assert_close(out[:, :, t], x.v_slc[:, :, t].repeat_interleave(2, 1))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_all_blocks_selected_is_causal_attention(impl: str):
    x = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=11).inputs(torch.float32)
    candidates = torch.arange(3, dtype=torch.int32).expand(2, 2, 11, 3)
    own = torch.arange(11).div(4, rounding_mode="floor")[:, None]
    everything = Selection(candidates.masked_fill(candidates > own, -1))
    out, _ = selected_attention(x.q, x.k_slc, x.v_slc, everything, SMALL, impl=impl)
    expected = torch.nn.functional.scaled_dot_product_attention(x.q, x.k_slc, x.v_slc, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_width_of_the_selection_need_not_be_the_configs(impl: str):
    """A replayed selection may have been made with another num_selected."""
    case = Case(SMALL, kv_heads=2, group=2, tokens=14)
    x, selection = case.inputs(torch.float32), any_selection(case)
    wide = Selection(torch.nn.functional.pad(selection.indices, (0, 2), value=-1))
    for found, expected in zip(
        selected_attention(x.q, x.k_slc, x.v_slc, wide, SMALL, impl=impl),
        selected_attention(x.q, x.k_slc, x.v_slc, selection, SMALL, impl=impl),
        strict=True,
    ):
        assert torch.equal(found, expected)
