"""The window branch against the oracle, and FlexAttention against the dense engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from conftest import Case, assert_as_accurate, assert_close, cases, gradients
from flexnsa import NSAConfig, window_attention

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
scales = st.sampled_from((None, 0.0, 0.3, -0.7))


@given(case=cases(), scale=scales)
def test_reference_equals_the_oracle(case: Case, scale: float | None):
    x = case.inputs(grad=True)
    leaves = [x.q, x.k_win, x.v_win]
    found = window_attention(*leaves, case.config, scale=scale, impl="reference", **case.placing)
    expected = oracle.window_attention(*leaves, case.where, scale)
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@given(case=cases())
def test_flex_equals_reference(case: Case):
    x = case.inputs(torch.float32)
    tensors = (x.q, x.k_win, x.v_win)
    found = window_attention(*tensors, case.config, impl="flex", **case.placing)
    plain = window_attention(*tensors, case.config, impl="reference", **case.placing)
    exact = window_attention(*(y.double() for y in tensors), case.config, impl="reference", **case.placing)
    for name, values in zip(("out", "lse"), zip(found, plain, exact, strict=True), strict=True):
        assert values[0].dtype == torch.float32, name
        assert_as_accurate(*values, logits=case.logits)


@pytest.mark.parametrize("documents", (None, torch.tensor([[-1] * 2 + [0] * 5 + [1] * 3])))
def test_gradcheck(documents: Tensor | None):
    case = Case(SMALL, kv_heads=2, group=2, dim=2, value_dim=3, tokens=10, documents=documents)
    x = case.inputs(grad=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = window_attention(q, k, v, SMALL, documents=documents, impl="reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(forward, (x.q, x.k_win, x.v_win))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_the_first_query_returns_its_own_value(impl: str):
    x = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=5).inputs(torch.float32)
    out, lse = window_attention(x.q, x.k_win, x.v_win, SMALL, impl=impl)
    torch.testing.assert_close(out[:, :, 0], x.v_win[:, :, 0].repeat_interleave(3, 1))
    logits = (x.q[:, :, 0] * x.k_win[:, :, 0].repeat_interleave(3, 1)).sum(-1) / 2
    torch.testing.assert_close(lse[:, :, 0], logits)


def test_a_window_as_long_as_the_sequence_is_causal_attention():
    config = NSAConfig(window=33)
    x = Case(config, batch=2, kv_heads=2, group=3, value_dim=3, tokens=33).inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(x.q, x.k_win, x.v_win, is_causal=True, enable_gqa=True)
    assert_close([window_attention(x.q, x.k_win, x.v_win, config, impl="reference").out], [expected])
