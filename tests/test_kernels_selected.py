"""The Triton selected-attention path against dense attention with an explicit mask."""

import ast

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.compiler import CompilationError

from flexnsa.kernels import selected, selected_backward, selected_forward, spans
from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.configs import hopper_plan
from flexnsa.kernels.selected import selected_attention
from flexnsa.kernels.sharing import share_selection


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
    g = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    d, dv = draw(st.sampled_from([(16, 16), (8, 24), (20, 16)]))
    select_block = draw(st.sampled_from([16, 32, 7]))
    tk = draw(st.integers(1, 50))
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


def check(inputs, indices, position, start, tolerance=1e-4, **options):
    out, lse = selected_attention(*inputs, indices, position, start, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out, want_lse = dense(*exact, indices, position, start, **options)
    torch.testing.assert_close(out, want_out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(out, lse, inputs), gradients(want_out, want_lse, exact), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=tolerance, atol=tolerance)


@settings(max_examples=6)
@given(problems())
def test_matches_dense_attention(problem):
    inputs, indices, position, start = make(*problem)
    check(inputs, indices, position, start, select_block=problem[5], scale=0.3)


@pytest.mark.thorough
@settings(max_examples=300)
@given(problems())
def test_matches_dense_attention_thoroughly(problem):
    inputs, indices, position, start = make(*problem)
    check(inputs, indices, position, start, select_block=problem[5], scale=0.3)


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


@pytest.mark.parametrize("group", [3, 8])
def test_neighbours_that_select_alike(group):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 16, 64, False, 3, 7)
    block = position // 16
    shared = torch.stack([torch.zeros_like(block), block], -1).int()
    indices = shared.masked_fill((shared == 0) & (torch.arange(2) == 1), -1)[:, None]
    check(inputs, indices, position, start, select_block=16, scale=0.3)


def test_queries_go_on_from_what_their_tile_began():
    inputs, indices, position, start = make(1, 1, 8, 16, 16, 8, 60, False, 3, 7)
    own = torch.arange(position.shape[1]) % 4 + 1
    indices = torch.stack([torch.zeros_like(own), own], -1).int()[None, None]
    base = (indices[0] * 8).where(indices[0] * 8 <= position[..., None], -1)
    found = share_selection(base, 4, 1, 0.6, otherwise=2, rest=True)
    assert (found.common[0] == 1).any() and (found.rest_count[0] == 1).any()
    check(inputs, indices, position, start, select_block=8, scale=0.3)


@pytest.mark.parametrize("group", [4, 8])
def test_chips_without_a_copy_engine(group, monkeypatch):
    monkeypatch.setattr(selected_forward, "generation", lambda device: 8)
    inputs, indices, position, start = make(1, 1, group, 20, 16, 16, 50, True, 3, 8)
    check(inputs, indices, position, start, select_block=16, scale=0.3)


def test_the_kernel_for_hopper_is_for_one_shape():
    shape = (2, 128, 128, 64, 16)
    assert hopper_plan(*shape) is not None
    for place in range(len(shape)):
        assert hopper_plan(*(2 * x if place == i else x for i, x in enumerate(shape))) is None


def test_a_triton_that_does_not_compile_the_kernel_for_hopper(monkeypatch):
    """The other kernels run instead, and it is not tried again."""

    class Unknown:
        QUERIES = tl.constexpr(4)
        copies = staticmethod(lambda k, v: [None] * 4)

        @property
        def fetched_attention(self):
            raise CompilationError("", ast.parse("0").body[0], "no such name")

    monkeypatch.setattr(selected_forward, "selected_hopper", Unknown())
    monkeypatch.setattr(selected_forward, "_refused", [])
    monkeypatch.setattr(selected_forward, "_has_hopper_kernel", lambda device: not selected_forward._refused)
    inputs, *where = make(1, 1, 16, 128, 128, 64, 6, False, 1, 3, torch.float16)
    options = {"select_block": 64, "scale": 0.1}
    with pytest.warns(UserWarning, match="did not compile"):
        out, lse = selected_attention(*inputs, *where, **options)
    again, _ = selected_attention(*inputs, *where, **options)
    want, want_lse = dense(*(x.detach().double() for x in inputs), *where, **options)
    torch.testing.assert_close(out.double(), want, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=1e-3)
    assert torch.equal(out, again)


def test_strides_that_the_copy_engine_does_not_take():
    inputs, indices, position, start = make(1, 1, 8, 16, 16, 16, 40, False, 3, 9)
    q, k, v = (x.detach() for x in inputs)
    k = k.mT.contiguous().mT
    v = torch.cat([v, v[..., :1]], -1)[..., :16]
    assert not any(selected_forward._copyable(x) for x in (k, v))
    check([x.requires_grad_() for x in (q, k, v)], indices, position, start, select_block=16, scale=0.3)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 3), st.integers(0, 2**20), st.booleans(), st.booleans())
def test_tiles_take_what_is_worth_sharing(queries, n, otherwise, seed, masked, even):
    rng = torch.Generator().manual_seed(seed)
    tq, least, worth = 11, 1, 0.7
    seen = torch.randint(-1, 60, (1, tq), generator=rng).int()
    low = torch.randint(0, 30, (1, tq), generator=rng).int() if masked else seen
    base = torch.stack([torch.randperm(5, generator=rng)[:n].sort().values * 16 for _ in range(tq)])[None].int()
    base = base.masked_fill(base > seen[..., None], -1)
    found = share_selection(
        base, queries, least, worth, otherwise=otherwise, even=even, rest=True,
        blocks=Blocks(base, seen, low, seen, None), select_block=16,
    )  # fmt: skip
    for tile, first in enumerate(range(0, tq, queries)):
        mine = [set(x.tolist()) - {-1} for x in base[0, first : first + queries]]
        choosers = {x: [r for r, own in enumerate(mine) if x in own] for x in sorted(set().union(*mine))}
        worthy = len(choosers) <= worth * sum(map(len, mine))
        sight = [(int(low[0, t]) if masked else 0, int(seen[0, t])) for t in range(first, first + len(mine))]
        least_here = least if worthy else otherwise
        alone = [sorted(x for x in own if len(choosers[x]) < least_here) for own in mine]
        if even:
            alone = [[x for x in own if len(choosers[x]) == 1] for own in alone]
            alone = [[x for x in own if a <= x and x + 15 <= b] for own, (a, b) in zip(alone, sight, strict=True)]
            fewest = min(map(len, alone)) if len(mine) == queries else 0
            alone = [own[:fewest] for own in alone]
        shared = set(choosers).difference(*alone)
        listed = found.base[0, tile, : found.common[0, tile]].tolist()
        assert sorted(listed) == sorted(shared)
        bits = found.members[0, tile, : len(listed)].tolist()
        assert bits == [sum(1 << r for r in choosers[x]) for x in listed]
        whole = {x for x in shared if all(a <= x and x + 15 <= b for a, b in sight if b >= 0)}
        assert set(listed[: found.whole[0, tile]]) == whole
        for r, own in enumerate(alone):
            assert found.rest[0, first + r, : found.rest_count[0, first + r]].tolist() == own


@pytest.mark.parametrize("group", [2, 8])
def test_blocks_of_many_items_and_chunks(group, monkeypatch):
    monkeypatch.setattr(selected_backward, "_ROWS_PER_ITEM", 4 * group)
    for module in (selected_forward, selected_backward):
        monkeypatch.setattr(module, "PARTIAL_BYTES", 16 * 2 * group * 16 * 4)
    monkeypatch.setattr(spans, "_SORTED_PAIRS", 1)
    inputs, indices, position, start = make(1, 2, group, 16, 16, 16, 60, False, 2, 0)
    check(inputs, indices, position, start, select_block=16, scale=0.3)


@pytest.mark.parametrize(("group", "documents"), [(2, True), (8, False)])
def test_lanes_and_keys_that_do_not_fit_at_once(group, documents, monkeypatch):
    monkeypatch.setattr(spans, "TABLE_BYTES", 1)
    monkeypatch.setattr(selected_backward, "SUM_BYTES", 20 * 32 * 4)
    inputs, indices, position, start = make(2, 2, group, 16, 16, 16, 60, documents, 3, 0)
    check(inputs, indices, position, start, select_block=16, scale=0.3)


@pytest.mark.parametrize(("group", "scale"), [(2, -0.3), (8, -0.3), (8, 0.0)])
def test_any_scale(group, scale):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 16, 20, False, 2, 3)
    check(inputs, indices, position, start, select_block=16, scale=scale)


@pytest.mark.parametrize("group", [2, 8])
def test_a_prefix_that_all_queries_see(group):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 16, 30, False, 2, 3)
    check(inputs, indices, position.clamp(min=20), start, select_block=16, scale=0.3)


def test_a_block_larger_than_a_tile():
    inputs, indices, position, start = make(1, 1, 2, 16, 16, 150, 200, False, 2, 5)
    check(inputs, indices, position, start, select_block=150, scale=0.3)


def test_garbage_indices_read_nothing_outside():
    inputs, indices, position, start = make(1, 1, 4, 16, 16, 16, 40, False, 3, 1)
    wild = torch.tensor([-7, 2**31 - 1, 1000], dtype=torch.int32).expand_as(indices)
    out, lse = selected_attention(*inputs, wild, position, start, select_block=16, scale=1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in gradients(out, lse, inputs))


@pytest.mark.parametrize("group", [1, 8])
def test_what_no_query_sees_may_hold_nan(group):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 16, 40, False, 3, 2)
    clean = selected_attention(*inputs, indices, position, start, select_block=16, scale=1.0)
    last = int(position.max())
    k, v = (torch.cat([x.detach()[:, :, : last + 1], torch.full((1, 1, 9, 16), torch.nan)], 2) for x in inputs[1:])
    leaves = [inputs[0], k.requires_grad_(), v.requires_grad_()]
    found = selected_attention(*leaves, indices, position, start, select_block=16, scale=1.0)
    assert torch.equal(found[0], clean[0])
    assert all(x.isfinite().all() for x in gradients(*found, leaves))


def test_bad_input_is_refused():
    inputs, indices, position, start = make(1, 1, 4, 16, 16, 16, 40, False, 3, 1)
    options = {"select_block": 16, "scale": 1.0}
    with pytest.raises(ValueError, match="indices must be int32"):
        selected_attention(*inputs, indices.long(), position, start, **options)
    with pytest.raises(ValueError, match="position must be int64"):
        selected_attention(*inputs, indices, position.int(), start, **options)
    with pytest.raises(ValueError, match="low must be int64"):
        selected_attention(*inputs, indices, position, start, low=start[:, :1], **options)
    with pytest.raises(ValueError, match="share one dtype"):
        selected_attention(*(x.double() for x in inputs), indices, position, start, **options)
    with pytest.raises(ValueError, match="multiple of hk"):
        selected_attention(
            inputs[0], *(x.expand(-1, 3, -1, -1) for x in inputs[1:]), indices, position, start, **options
        )


def test_operator_is_registered_as_torch_expects():
    inputs, indices, position, start = make(1, 1, 2, 16, 16, 16, 12, True, 2, 4)
    for low in (None, start):
        torch.library.opcheck(selected._selected_attention, (*inputs, indices, position, start, 16, 0.3, low))


def test_compiles_without_a_break_or_a_recompilation():
    def loss(q, k, v, indices, position, start):
        out, lse = selected_attention(q, k, v, indices, position, start, select_block=16, scale=0.3)
        return (out * out).sum() + torch.where(lse == -torch.inf, 0.0, lse).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (20, 33):
            inputs, *table = make(1, 2, 2, 16, 16, 16, tokens, False, 2, 5)
            found = torch.autograd.grad(compiled(*inputs, *table), inputs)
            for got, want in zip(found, torch.autograd.grad(loss(*inputs, *table), inputs), strict=True):
                torch.testing.assert_close(got, want)


def test_flops_are_counted():
    inputs, indices, position, start = make(1, 1, 4, 16, 16, 16, 64, False, 2, 5)
    with FlopCounterMode(display=False) as counter:
        out, lse = selected_attention(*inputs, indices, position, start, select_block=16, scale=0.3)
        gradients(out, lse, inputs)
    pairs = 4 * position.numel() * 32
    assert counter.get_flop_counts()["Global"][torch.ops.flexnsa.selected_attention] == 2 * pairs * 32
    assert counter.get_flop_counts()["Global"][torch.ops.flexnsa.selected_attention_backward] == 2 * pairs * 80
