"""Block importance: shared tokens counted one by one, every geometry, every head of the group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from conftest import Case, assert_close, cases
from flexnsa import NSAConfig, block_importance, compressed_attention

scales = st.sampled_from((None, 0.0, 0.3, -0.7))


def importance(case: Case, dtype: torch.dtype = torch.float64, scale: float | None = None) -> Tensor:
    x = case.inputs(dtype)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, scale=scale, impl="reference", **case.placing).lse
    return block_importance(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, scale=scale, **case.placing)


@given(case=cases(), scale=scales)
def test_equals_the_oracle(case: Case, scale: float | None):
    x = case.inputs()
    assert_close([importance(case, scale=scale)], [oracle.block_importance(x.q, x.k_cmp, case.where, scale)])


@given(case=cases())
def test_float32_is_as_good_as_float32(case: Case):
    x = case.inputs(torch.float32)
    found = importance(case, torch.float32)
    exact = oracle.block_importance(x.q.double(), x.k_cmp.double(), case.where)
    # A logit of size L is known to L * 2**-24 only, and so is, relative to itself, each probability.
    group = x.k_cmp.repeat_interleave(case.group, 1)
    logit = (x.q.double() @ group.double().mT * case.dim**-0.5).abs().amax().item() if group.numel() else 0.0
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= case.group * (8 + 8 * logit) * 2.0**-23 * max(1.0, exact.max().item())


@given(case=cases(values=("flat",)))
def test_flat_scores_share_out_the_visible_tokens(case: Case):
    """q = 0: every visible compressed token weighs the same, so the sum over blocks counts its tokens once a stride."""
    found = importance(case).sum(-1)
    per_head = case.config.compress_block / case.config.compress_stride
    for b in range(case.batch):
        for t in range(case.queries):
            expected = case.group * per_head if case.where.visible_compressed(b, t) else 0.0
            torch.testing.assert_close(found[b, :, t], torch.full_like(found[b, :, t], expected))


@pytest.mark.parametrize(
    ("block", "stride", "select", "weights"),
    (
        (32, 16, 64, {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}),
        (16, 16, 64, {0: 1, 1: 1, 2: 1, 3: 1}),
        (64, 16, 64, {-3: 1, -2: 2, -1: 3, 0: 4, 1: 3, 2: 2, 3: 1}),
        (32, 32, 32, {0: 1}),
        (64, 32, 64, {-1: 1, 0: 2, 1: 1}),
    ),
)
def test_weights_of_the_printed_geometries(block: int, stride: int, select: int, weights: dict[int, int]):
    """One visible compressed token with all the probability: its weight in each block."""
    config = NSAConfig(compress_block=block, compress_stride=stride, select_block=select)
    tokens, step = 6 * select, select // stride
    count = config.num_compressed(tokens)
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for i in range(count):
        k_cmp = torch.full((1, 1, count, 1), -1e4, dtype=torch.float64)
        k_cmp[0, 0, i] = 0.0
        lse = torch.zeros(1, 1, 1, dtype=torch.float64)
        found = block_importance(q, k_cmp, lse, config, num_tokens=tokens, positions=torch.tensor([tokens - 1]))
        assert found[0, 0, 0].tolist() == [weights.get(i - step * j, 0) for j in range(6)]


def test_every_head_of_the_group_counts():
    case = Case(NSAConfig(compress_block=4, compress_stride=2, select_block=4), kv_heads=2, group=4, tokens=21)
    x = case.inputs()
    _, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config)
    whole = block_importance(x.q, x.k_cmp, lse, case.config, num_tokens=21)
    heads = [block_importance(x.q[:, h::4], x.k_cmp, lse[:, h::4], case.config, num_tokens=21) for h in range(4)]
    assert_close([whole], [torch.stack(heads).sum(0)])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_float32_for_every_dtype_but_float64(dtype: torch.dtype):
    case = Case(NSAConfig(compress_block=4, compress_stride=2, select_block=4), kv_heads=2, group=2, tokens=21)
    x = case.inputs(dtype)
    _, lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config)
    found = block_importance(x.q, x.k_cmp, lse, case.config, num_tokens=21)
    exact = oracle.block_importance(x.q.double(), x.k_cmp.double(), case.where)
    assert found.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_its_gradient_is_finite_where_nothing_is_visible():
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=6)
    q, k_cmp = torch.randn(1, 4, 40, 8, requires_grad=True), torch.randn(1, 2, 19, 8)
    lse = compressed_attention(q, k_cmp, k_cmp, config).lse
    block_importance(q, k_cmp, lse.detach(), config, num_tokens=40)[..., 0].sum().backward()
    assert q.grad.isfinite().all()
