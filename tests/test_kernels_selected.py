"""The Triton selected-attention path against dense attention with an explicit mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexnsa.kernels.selected import selected_attention


def visible(indices: Tensor, position: Tensor, start: Tensor, tk: int, select_block: int) -> Tensor:
    """[b, hk, tq, tk]: which keys each query sees."""
    key = torch.arange(tk)
    block = (key - start[:, None, :, None]).div(select_block, rounding_mode="floor")
    chosen = (block[..., None] == indices[:, :, :, None, :]).any(-1) & (block >= 0)
    return chosen & (key >= start[:, None, :, None]) & (key <= position[:, None, :, None])


def dense(q, k, v, indices, position, start, *, select_block, scale):
    g = q.shape[1] // k.shape[1]
    mask = visible(indices, position, start, k.shape[2], select_block).repeat_interleave(g, 1)
    scores = q @ k.repeat_interleave(g, 1).mT * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ v.repeat_interleave(g, 1), lse


@st.composite
def problems(draw):
    b, hk = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    g = draw(st.sampled_from([1, 2, 3, 4, 16]))
    d, dv = draw(st.sampled_from([(16, 16), (8, 24), (20, 16)]))
    select_block = draw(st.sampled_from([16, 32, 7]))
    tk = draw(st.integers(1, 70))
    documents = draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    n = draw(st.integers(1, 5))
    return b, hk, g, d, dv, select_block, tk, documents, n, seed


def make(b, hk, g, d, dv, select_block, tk, documents, n, seed, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    tq = int(torch.randint(1, tk + 1, (), generator=rng))
    position = torch.stack([torch.randperm(tk, generator=rng)[:tq].sort().values for _ in range(b)])
    start = torch.zeros_like(position)
    if documents:
        cuts = torch.randperm(tk, generator=rng)[: tk // 8].sort().values
        cuts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
        start = cuts[torch.searchsorted(cuts, position, right=True) - 1]
        padding = torch.rand(b, tq, generator=rng) < 0.1
        position, start = position.where(~padding, -1), start.where(~padding, 0)
    blocks = (position - start) // select_block + 1
    scores = torch.rand(b, hk, tq, tk, generator=rng)
    scores[torch.arange(tk) >= blocks[:, None, :, None].expand(scores.shape)] = -1
    order = scores.argsort(-1, descending=True)[..., :n]
    kept = order.masked_fill(scores.gather(-1, order) < 0, tk).sort(-1).values
    indices = kept.masked_fill(kept == tk, -1).int()
    indices = torch.nn.functional.pad(indices, (0, n - indices.shape[-1]), value=-1)
    q = draw(b, tq, hk * g, d).transpose(1, 2)
    k, v = draw(b, hk, tk, d), draw(b, tk, hk, dv).transpose(1, 2)
    if b > 1 and seed % 2:
        position, start, indices = position[:1], start[:1], indices[:1].expand(b, hk, tq, n)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], indices, position, start


def gradients(out, lse, inputs, seed=0):
    rng = torch.Generator().manual_seed(seed)
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    loss = (out * torch.randn(out.shape, generator=rng).to(out)).sum()
    loss = loss + (finite * torch.randn(lse.shape, generator=rng).to(lse)).sum()
    return torch.autograd.grad(loss, inputs)


@settings(max_examples=12)
@given(problems())
def test_matches_dense_attention(problem):
    inputs, indices, position, start = make(*problem)
    options = {"select_block": problem[5], "scale": 0.3}
    out, lse = selected_attention(*inputs, indices, position, start, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out, want_lse = dense(*exact, indices, position, start, **options)
    torch.testing.assert_close(out, want_out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(out, lse, inputs), gradients(want_out, want_lse, exact), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    inputs, indices, position, start = make(1, 1, 4, 16, 16, 16, 64, True, 3, 5, dtype)
    options = {"select_block": 16, "scale": 0.3}
    out, lse = selected_attention(*inputs, indices, position, start, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out, want_lse = dense(*exact, indices, position, start, **options)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-2, atol=1e-2)
    for got, want in zip(gradients(out, lse, inputs), gradients(want_out, want_lse, exact), strict=True):
        assert (got.double() - want).norm() <= 2 * tolerance * want.norm()
