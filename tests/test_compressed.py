"""The compressed branch against the oracle, and FlexAttention against the dense engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from conftest import Case, assert_as_accurate, assert_close, cases, gradients
from flexnsa import NSAConfig, compressed_attention

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
scales = st.sampled_from((None, 0.0, 0.3, -0.7))


@given(case=cases(), scale=scales)
def test_reference_equals_the_oracle(case: Case, scale: float | None):
    x = case.inputs(grad=True)
    leaves = [x.q, x.k_cmp, x.v_cmp]
    found = compressed_attention(*leaves, case.config, scale=scale, impl="reference", **case.placing)
    expected = oracle.compressed_attention(*leaves, case.where, scale)
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@given(case=cases())
def test_flex_equals_reference(case: Case):
    x = case.inputs(torch.float32)
    tensors = (x.q, x.k_cmp, x.v_cmp)
    found = compressed_attention(*tensors, case.config, impl="flex", **case.placing)
    plain = compressed_attention(*tensors, case.config, impl="reference", **case.placing)
    exact = compressed_attention(*(y.double() for y in tensors), case.config, impl="reference", **case.placing)
    for name, values in zip(("out", "lse"), zip(found, plain, exact, strict=True), strict=True):
        assert values[0].dtype == torch.float32, name
        assert_as_accurate(*values, logits=case.logits)


@pytest.mark.parametrize("documents", (None, torch.tensor([[-1] * 2 + [0] * 7 + [1] * 5])))
def test_gradcheck(documents: Tensor | None):
    case = Case(SMALL, kv_heads=2, group=2, dim=2, value_dim=3, tokens=14, documents=documents)
    x = case.inputs(grad=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = compressed_attention(q, k, v, SMALL, documents=documents, impl="reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(forward, (x.q, x.k_cmp, x.v_cmp))


def test_a_query_that_sees_nothing_gets_zero_and_gives_zero():
    case = Case(SMALL, kv_heads=2, group=2, tokens=12)
    x = case.inputs(grad=True)
    out, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, impl="reference")
    assert not out[:, :, :3].any()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), (x.q, x.k_cmp, x.v_cmp))
    assert not dq[:, :, :3].any()
    assert all(y.isfinite().all() for y in (dq, dk, dv))


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("tokens", (1, 3))
def test_fewer_tokens_than_a_block(impl: str, tokens: int):
    case = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=tokens)
    x = case.inputs(torch.float32)
    assert x.k_cmp.shape[2] == 0
    out, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, impl=impl)
    assert torch.equal(out, torch.zeros(2, 6, tokens, 3))
    assert torch.equal(lse, torch.full((2, 6, tokens), -torch.inf))


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)),
)
def test_dtypes(dtype: torch.dtype, lse_dtype: torch.dtype):
    x = Case(SMALL, kv_heads=2, group=2, tokens=12).inputs(dtype)
    out, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, impl="reference")
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype)


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("documents", (None, torch.zeros(1, 9, dtype=torch.int64)), ids=("row", "packed"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_a_count_of_compressed_tokens_that_the_sequence_does_not_make(impl: str, documents: Tensor | None, count: int):
    """9 tokens make 3 compressed ones."""
    q, k_cmp = torch.zeros(1, 2, 9, 4), torch.zeros(1, 1, count, 4)
    with pytest.raises(ValueError, match="k_cmp must hold 3 compressed tokens for 9"):
        compressed_attention(q, k_cmp, k_cmp, SMALL, documents=documents, impl=impl)
