"""The Triton selected-attention path on a GPU: drawn cases at real sizes, long rows, memory, determinism, capture."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import assert_as_accurate
from flexnsa import (
    BranchKV,
    MeanPool,
    NSAConfig,
    Selection,
    compressed_attention,
    documents_from_lengths,
    native_sparse_attention,
    select_blocks,
)
from flexnsa.compression import compress
from flexnsa.kernels import selected, selected_backward, selected_forward
from flexnsa.kernels.selected import selected_attention
from flexnsa_masks import causal, or_masks, prefix, sliding_window, with_interval

pytestmark = pytest.mark.gpu

KINDS = ("random", "alike", "everyone", "alone")
"""How queries select: independently, 8 neighbours mostly alike, all the same blocks, or each one block of its own."""

PRECISION = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-17}


@pytest.fixture(autouse=True)
def _room_for_the_next() -> Iterator[None]:
    """Tests run in several processes on one GPU: what one process keeps for later is missing to the others."""
    yield
    torch.cuda.empty_cache()


class Config(NamedTuple):
    """What kernels are compiled for."""

    group: int
    dim: int
    value_dim: int
    select_block: int
    num_selected: int
    dtype: torch.dtype


CONFIGS = [
    Config(2, 256, 256, 128, 4, torch.float32), Config(1, 128, 128, 32, 8, torch.float16),
    Config(1, 16, 16, 16, 5, torch.float32), Config(1, 192, 128, 64, 7, torch.bfloat16),
    Config(2, 64, 64, 16, 12, torch.bfloat16), Config(2, 128, 128, 64, 16, torch.bfloat16),
    Config(2, 80, 96, 32, 3, torch.float16), Config(1, 64, 64, 64, 16, torch.bfloat16),
    Config(3, 64, 64, 64, 7, torch.bfloat16), Config(3, 128, 64, 32, 16, torch.float16),
    Config(3, 48, 48, 16, 9, torch.float32), Config(4, 128, 128, 64, 16, torch.bfloat16),
    Config(4, 128, 128, 64, 16, torch.float16), Config(4, 128, 128, 32, 64, torch.bfloat16),
    Config(4, 256, 256, 64, 4, torch.bfloat16), Config(4, 64, 80, 128, 3, torch.float32),
    Config(4, 192, 128, 128, 6, torch.bfloat16), Config(4, 16, 16, 16, 1, torch.float16),
    Config(6, 96, 96, 64, 10, torch.bfloat16), Config(6, 64, 64, 32, 5, torch.float32),
    Config(6, 128, 128, 128, 4, torch.float16), Config(8, 64, 64, 64, 16, torch.bfloat16),
    Config(8, 128, 128, 64, 16, torch.bfloat16), Config(8, 80, 80, 16, 24, torch.float16),
    Config(8, 192, 128, 32, 8, torch.bfloat16), Config(8, 64, 32, 128, 3, torch.float32),
    Config(16, 128, 128, 64, 16, torch.bfloat16), Config(16, 128, 128, 64, 16, torch.float16),
    Config(16, 128, 128, 16, 33, torch.bfloat16), Config(16, 192, 128, 64, 16, torch.bfloat16),
    Config(16, 256, 256, 64, 8, torch.bfloat16), Config(16, 80, 96, 128, 4, torch.float16),
    Config(16, 64, 64, 32, 6, torch.float32), Config(32, 128, 128, 64, 16, torch.bfloat16),
    Config(32, 64, 64, 32, 8, torch.float16), Config(32, 96, 80, 64, 5, torch.bfloat16),
    Config(64, 64, 64, 64, 16, torch.bfloat16), Config(64, 128, 128, 32, 11, torch.float16),
    Config(64, 16, 32, 16, 4, torch.float32), Config(64, 192, 192, 64, 3, torch.bfloat16),
]  # fmt: skip


class Problem(NamedTuple):
    """One call, and the gradients of its outputs."""

    inputs: list[Tensor]
    indices: Tensor
    position: Tensor
    start: Tensor
    config: Config
    dout: Tensor
    dlse: Tensor

    def run(self) -> list[Tensor]:
        """out, lse, dq, dk, dv."""
        c = self.config
        out, lse = selected_attention(
            *self.inputs, self.indices, self.position, self.start, select_block=c.select_block, scale=c.dim**-0.5
        )
        return [out, lse, *torch.autograd.grad([out, lse], self.inputs, [self.dout, self.dlse])]


def select(kind: str, hk: int, position: Tensor, start: Tensor, config: Config, rng: torch.Generator) -> Tensor:
    """int32 [b, hk, tq, n], the block of the query and others that it can see."""
    b, tq = position.shape
    block, n = config.select_block, config.num_selected
    own = (position - start).clamp(min=-1).div(block, rounding_mode="floor")
    blocks = max(1, int(position.max()) // block + 1)
    out = torch.full((b, hk, tq, n), -1, dtype=torch.int32, device=position.device)
    for first in range(0, tq, 4096):
        at = own[:, None, first : first + 4096, None]
        j = torch.arange(blocks, device=position.device)
        shape = (b, hk, at.shape[2], blocks)
        score = torch.rand(shape, generator=rng, device=position.device)
        if kind == "alike":
            near = torch.rand(b, hk, -(-shape[2] // 8), blocks, generator=rng, device=position.device)
            best = near.topk(min(blocks, n - n // 8), -1).indices
            near = torch.zeros_like(near).scatter_(-1, best, 2.0)
            score += near.repeat_interleave(8, 2)[:, :, : shape[2]]
        if kind == "everyone":
            score = (-j.float()).expand(shape).clone()
        if kind == "alone":
            score = -((j - torch.arange(first, first + shape[2], device=j.device)[:, None]) % blocks).float()
            score = score.expand(shape).masked_fill(score < -(n - 1) // 4, -torch.inf)
        score = score.masked_fill(j == at, torch.inf).masked_fill(j > at, -torch.inf)
        best, which = score.topk(min(n, blocks), -1)
        which = which.masked_fill(best == -torch.inf, blocks).sort(-1).values
        out[:, :, first : first + 4096, : which.shape[-1]] = which.masked_fill(which == blocks, -1).int()
    return out


def draw(config: Config, seed: int) -> Problem:
    """A case of moderate size: batch, documents with padding, positions, strides and kind vary with the seed."""
    rng = torch.Generator("cuda").manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng, device="cuda"))  # noqa: E731
    b, hk = number(1, 2), 1 + (config.num_selected + 1) % 2  # one number of KV heads is compiled for a configuration
    tk = number(1, 400) if seed % 5 else number(1, 20)
    tq = tk if seed % 2 else number(1, tk)
    position = torch.stack([torch.randperm(tk, generator=rng, device="cuda")[:tq].sort().values for _ in range(b)])
    start = torch.zeros_like(position)
    if seed % 3 == 0:
        cuts = torch.randint(0, tk, (b, 4), generator=rng, device="cuda").sort(-1).values
        cuts[:, 0] = 0
        start = cuts.gather(1, torch.searchsorted(cuts, position, right=True) - 1)
        padding = torch.rand(b, tq, generator=rng, device="cuda") < 0.05
        position, start = position.where(~padding, -1), start.where(~padding, 0)
    indices = select(KINDS[number(0, 3)], hk, position, start, config, rng)
    return problem(b, hk, tq, tk, config, indices, position, start, rng, transposed=bool(seed % 4 // 2))


def problem(
    b: int, hk: int, tq: int, tk: int, config: Config, indices: Tensor, position: Tensor, start: Tensor,
    rng: torch.Generator, transposed: bool = False,
) -> Problem:  # fmt: skip
    def leaf(heads: int, tokens: int, dim: int) -> Tensor:
        shape = (b, tokens, heads, dim) if transposed else (b, heads, tokens, dim)
        x = torch.randn(shape, generator=rng, device="cuda", dtype=config.dtype)
        return (x.transpose(1, 2) if transposed else x).requires_grad_()

    hq = hk * config.group
    inputs = [leaf(hq, tq, config.dim), leaf(hk, tk, config.dim), leaf(hk, tk, config.value_dim)]
    dout = leaf(hq, tq, config.value_dim).detach()
    dlse = torch.randn(b, hq, tq, generator=rng, device="cuda")
    return Problem(inputs, indices, position, start, config, dout, dlse)


def dense(p: Problem) -> list[Tensor]:
    """What ``run`` should give, in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in p.inputs)
    key, block = torch.arange(k.shape[2], device="cuda"), p.config.select_block
    local = key - p.start[..., None]
    chosen = torch.zeros(*p.indices.shape[:3], k.shape[2], dtype=torch.bool, device="cuda")
    for slot in range(p.indices.shape[-1]):
        index = p.indices[..., slot, None]
        chosen |= (local[:, None] // block == index) & (index >= 0)
    seen = chosen & ((local >= 0) & (key <= p.position[..., None]))[:, None]
    seen = seen.repeat_interleave(p.config.group, 1)
    k_all, v_all = (x.repeat_interleave(p.config.group, 1) for x in (k, v))
    scores = (q @ k_all.mT * p.config.dim**-0.5).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v_all
    visible = lse != -torch.inf
    dlse = p.dlse.double().where(visible, 0)
    return [out, lse, *torch.autograd.grad([out, lse.where(visible, 0)], [q, k, v], [p.dout.double(), dlse])]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, what: object) -> None:
    """Error by root mean square and at most, both against the precision of ``dtype``; infinities are the same."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), what
    if not finite.any():
        return
    error, size = (got.double() - want)[finite], want[finite]
    eps = PRECISION[dtype]
    assert error.norm() <= eps * (size.norm() + 0.5 * size.numel() ** 0.5), (what, error.norm() / size.norm())
    assert error.abs().max() <= 8 * eps * (1 + size.abs().max()), (what, error.abs().max(), size.abs().max())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_drawn_cases(config):
    """25 a configuration, 1,000 in all."""
    for seed in range(25):
        p = draw(config, seed)
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), p.run(), dense(p), strict=True):
            assert_close(got, want, config.dtype, (config, seed, name))


PAPER = Config(16, 128, 128, 64, 16, torch.bfloat16)
SMALL_GROUP = PAPER._replace(group=4)


def long(tokens: int, config: Config, kind: str, kv_heads: int = 4) -> Problem:
    """Causal, one row."""
    rng = torch.Generator("cuda").manual_seed(tokens)
    position = torch.arange(tokens, device="cuda")[None]
    indices = select(kind, kv_heads, position, position * 0, config, rng)
    return problem(1, kv_heads, tokens, tokens, config, indices, position, position * 0, rng)


def at_samples(p: Problem, rows: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """``run`` at a few queries, from gathered blocks, in plain torch."""
    all_q, *kv = p.inputs
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (all_q[:, :, rows], *kv))
    index = p.indices[0][:, rows].long()
    token = (index[..., None] * p.config.select_block + torch.arange(p.config.select_block, device="cuda")).flatten(-2)
    seen = (index >= 0).repeat_interleave(p.config.select_block, -1) & (token <= p.position[0, rows][:, None])
    token, head = token.clamp(0, k.shape[2] - 1), torch.arange(k.shape[1], device="cuda")[:, None, None]
    some_q = q[0].unflatten(0, (k.shape[1], -1))
    scores = torch.einsum("hgrd,hrmd->hgrm", some_q, k[0][head, token]) * p.config.dim**-0.5
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgrm,hrmd->hgrd", (scores - lse[..., None]).exp(), v[0][head, token]).flatten(0, 1)
    lse = lse.flatten(0, 1)
    grads = torch.autograd.grad(
        [out, lse], [q, k, v], [p.dout[0][:, rows].to(out.dtype), p.dlse[0][:, rows].to(lse.dtype)]
    )
    return [out, lse, grads[0][0], *grads[1:]]


@pytest.mark.parametrize("tokens", [65536, 131072])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP], ids=["group16", "group4"])
def test_long_rows(config, kind, tokens):
    """Sampled queries against float32; only they have gradients, so that dK and dV are theirs alone. Bounded memory."""
    p = long(tokens, config, kind)
    rows = torch.randint(0, tokens, (96,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    rows = torch.cat([rows, torch.tensor([0, 63, 64, 1023, tokens - 1], device="cuda")]).unique()
    asked = torch.zeros(tokens, dtype=torch.bool, device="cuda").index_fill_(0, rows, True)
    p = p._replace(dout=p.dout * asked[:, None], dlse=p.dlse * asked)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = p.run()
    assert torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results) <= 512 << 20
    out, lse, dq, dk, dv = results
    assert not torch.linalg.vector_norm(dq, torch.inf, dim=(0, 1, 3))[~asked].any()  # which makes no copy
    found = [out[0][:, rows], lse[0][:, rows], dq[0][:, rows], dk, dv]
    exact, plain = (at_samples(p, rows, dtype) for dtype in (torch.float32, config.dtype))
    for name, got, want, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, exact, plain, strict=True):
        error, plain_error = ((x.float() - want).norm() / want.norm() for x in (got, theirs))
        assert error <= 2 * plain_error + 2**-9, (name, error, plain_error)


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP, PAPER._replace(group=1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_run(config, kind):
    p = long(4096, config, kind)
    first = p.run()
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(p.run(), first, strict=True))


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP, Config(2, 80, 96, 32, 5, torch.float32)], ids=str)
def test_nothing_depends_on_what_memory_held_before(config):
    p = draw(config, 3)
    first = p.run()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, and with the largest integer
    try:
        poisoned = p.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(poisoned, first, strict=True))


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP], ids=["group16", "group4"])
def test_never_waits_for_the_device(config):
    p = long(4096, config, "random")
    p.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP], ids=["group16", "group4"])
def test_runs_in_a_cuda_graph(config):
    """Captured for one selection, replayed for another."""
    p, other = long(3000, config, "random"), long(3000, config, "alike")
    want = [x.clone() for x in other.run()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        p.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = p.run()
    with torch.no_grad():
        for mine, theirs in zip([*p.inputs, *p[1:4], *p[5:]], [*other.inputs, *other[1:4], *other[5:]], strict=True):
            mine.copy_(theirs)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP], ids=["group16", "group4"])
def test_a_packed_row_equals_its_documents_alone(config):
    lengths = torch.tensor([1000, 31, 700, 5, 64, 300])
    first = (lengths.cumsum(0) - lengths).cuda()
    start = first.repeat_interleave(lengths.cuda())[None]
    position, rng = torch.arange(2100, device="cuda")[None], torch.Generator("cuda").manual_seed(0)
    indices = select("random", 2, position, start, config, rng)
    p = problem(1, 2, 2100, 2100, config, indices, position, start, rng)
    packed = p.run()
    for begin, length in zip(first.tolist(), lengths.tolist(), strict=True):
        rows = slice(begin, begin + length)
        alone = Problem(
            [x.detach()[:, :, rows].clone().requires_grad_() for x in p.inputs], indices[:, :, rows],
            position[:, :length], start[:, :length] * 0, config, p.dout[:, :, rows], p.dlse[:, :, rows],
        )  # fmt: skip
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), packed, alone.run(), strict=True):
            assert_close(got[:, :, rows], want.double(), config.dtype, name)


MASKS = {
    "prefix": or_masks(causal(), prefix(700)),
    "window": sliding_window(400),
    "sentences": with_interval(lambda b, h, i, j: j // 37 <= i // 37, last=lambda b, i: i // 37 * 37 + 36),
}


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("group", [16, 4])
def test_masks_that_are_intervals(group, kind, packed):
    """The whole and its gradients beside reference, in the same precision and in float64, for one selection."""
    config, tokens, rng = NSAConfig(), 1500, torch.Generator("cuda").manual_seed(group)
    shapes = [(1, heads, tokens, 64) for heads in (2 * group, 2, 2)] + [(1, 2 * group, tokens, 3)]
    leaves = [torch.randn(s, generator=rng, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    documents = documents_from_lengths([900, 31, 560], tokens).cuda() if packed else None
    placing = {"mask_mod": MASKS[kind], "documents": documents}
    dout = torch.randn(shapes[0], generator=rng, device="cuda", dtype=torch.bfloat16)

    def run(impl: str, dtype: torch.dtype, selection: Selection) -> list[Tensor]:
        q, k, v, gates = (x.detach().to(dtype).requires_grad_() for x in leaves)
        out = native_sparse_attention(
            q, BranchKV.shared(k, v), gates, config, MeanPool(config), selection=selection, impl=impl, **placing
        )
        return [out, *torch.autograd.grad(out, [q, k, v, gates], dout.to(dtype))]

    with torch.no_grad():
        q, k, v, _ = leaves
        k_cmp, v_cmp = compress(MeanPool(config), k, v, config, documents=documents)
        lse = compressed_attention(q, k_cmp, v_cmp, config, impl="triton", **placing).lse
        chosen, others = (
            select_blocks(q, k_cmp, lse, config, num_tokens=tokens, impl=impl, **placing)
            for impl in ("triton", "reference")
        )
    assert (chosen.indices != others.indices).any(-1).float().mean() < 0.05
    found, plain, exact = (
        run(impl, dtype, chosen)
        for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64))
    )
    for got, baseline, want in zip(found, plain, exact, strict=True):
        assert_as_accurate(got, baseline, want)


@pytest.mark.parametrize("config", [PAPER, SMALL_GROUP], ids=["group16", "group4"])
def test_garbage_indices_are_harmless(config):
    p = long(1000, config, "random")
    rng = torch.Generator("cuda").manual_seed(0)
    wild = torch.randint(-(2**31), 2**31 - 1, p.indices.shape, generator=rng, device="cuda").int()
    wild = wild.where(torch.rand(wild.shape, generator=rng, device="cuda") < 0.5, p.indices)
    assert all(x.isfinite().all() for x in p._replace(indices=wild).run()[2:])


@pytest.mark.parametrize("config", [PAPER, PAPER._replace(dtype=torch.float16), SMALL_GROUP], ids=str)
def test_what_no_query_sees_may_be_anything(config):
    """Keys and values past the last query, which lie within blocks that are read."""
    tokens, beyond = 1003, 70
    p = long(tokens, config, "alike")
    q, *kv = (x.detach() for x in p.inputs)
    zeros, garbage = (
        [torch.cat([x, torch.full_like(x[:, :, :beyond], fill)], 2).requires_grad_() for x in kv]
        for fill in (0.0, torch.nan)
    )
    want, found = (p._replace(inputs=[q.requires_grad_(), *x]).run() for x in (zeros, garbage))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 61, 66, 1003])
def test_kernels_of_one_shape_agree(tokens, monkeypatch):
    """The kernel for Hopper alone, and those for any chip and for strides that the copy engine does not take."""
    p = long(tokens, PAPER, "alike" if tokens > 100 else "everyone")
    found = p.run()
    monkeypatch.setattr(selected_forward, "hopper_plan", lambda *shape: None)
    for got, want in zip(found, p.run(), strict=True):
        assert_close(got, want.double(), PAPER.dtype, tokens)
    monkeypatch.undo()
    wide = [torch.cat([x.detach(), x.detach()], -1)[..., 1::2] for x in p.inputs]
    odd = [x.copy_(y.detach()).requires_grad_() for x, y in zip(wide, p.inputs, strict=True)]
    for got, want in zip(p._replace(inputs=odd).run(), found, strict=True):
        assert_close(got, want.double(), PAPER.dtype, tokens)


def test_compiles_for_any_length_without_a_break():
    def loss(p: Problem) -> Tensor:
        out, lse = selected_attention(*p.inputs, *p[1:4], select_block=64, scale=0.1)
        return (out.float() ** 2).sum() + lse.where(lse > -torch.inf, 0).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for tokens in (700, 2000, 1024, 3, 5000):
        p = long(tokens, SMALL_GROUP, "random")
        with torch._dynamo.config.patch(error_on_recompile=tokens not in (700, 2000)):
            found = torch.autograd.grad(compiled(p), p.inputs)
        for got, want in zip(found, torch.autograd.grad(loss(p), p.inputs), strict=True):
            torch.testing.assert_close(got, want)


def test_operator_is_registered_as_torch_expects():
    for transposed in (False, True):
        rng = torch.Generator("cuda").manual_seed(0)
        position = torch.arange(130, device="cuda")[None]
        indices = select("random", 2, position, position * 0, SMALL_GROUP, rng)
        p = problem(1, 2, 130, 130, SMALL_GROUP, indices, position, position * 0, rng, transposed)
        torch.library.opcheck(selected._selected_attention, (*p.inputs, *p[1:4], 64, 0.1))


def test_flops_are_counted():
    p = long(1024, PAPER, "random")
    with FlopCounterMode(display=False) as counter:
        p.run()
    products = 2 * 64 * 1024 * 1024 * 128  # two operations, 64 heads, 1,024 queries of up to 16 * 64 keys
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.flexnsa.selected_attention] == 2 * products
    assert counts[torch.ops.flexnsa.selected_attention_backward] == 5 * products


def test_a_million_tokens_take_bounded_memory(monkeypatch):
    """dK and dV are summed by runs of keys there, and are what they are in one run."""
    tokens, config = 1 << 20, Config(8, 128, 128, 64, 16, torch.bfloat16)
    position = torch.arange(tokens, device="cuda")[None]
    own, slot = position[0, :, None] // 64, torch.arange(16, device="cuda")
    spread = torch.where(own >= 15, own * slot // 15, torch.where(slot <= own, slot, -1)).int()
    rng = torch.Generator("cuda").manual_seed(0)
    p = problem(1, 2, tokens, tokens, config, spread.expand(1, 2, -1, -1), position, position[:, :1] * 0, rng)
    p = p._replace(indices=p.indices.contiguous())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = p.run()
    assert torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results) <= 512 << 20
    monkeypatch.setattr(selected_backward, "SUM_BYTES", 1 << 40)
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results, p.run(), strict=True):
        assert (got.float() - want.float()).norm() <= 2**-8 * want.float().norm(), name


def test_addresses_past_two_billion():
    """q of 2**31 elements and more: the last queries are still the right ones."""
    tokens = (1 << 31) // (64 * 128) + 64
    rng = torch.Generator("cuda").manual_seed(0)
    position = torch.arange(tokens, device="cuda")[None]
    indices = torch.full((1, 1, tokens, 2), -1, dtype=torch.int32, device="cuda")
    indices[..., 0] = (position // 64).int()
    config = Config(64, 128, 128, 64, 2, torch.bfloat16)
    p = problem(1, 1, tokens, tokens, config, indices, position, position * 0, rng)
    rows = torch.arange(tokens - 40, tokens, device="cuda")
    asked = torch.zeros(tokens, dtype=torch.bool, device="cuda").index_fill_(0, rows, True)
    p = p._replace(dout=p.dout * asked[:, None], dlse=p.dlse * asked)
    out, lse, dq, dk, dv = p.run()
    found = [out[0][:, rows], lse[0][:, rows], dq[0][:, rows], dk, dv]
    for name, got, want in zip(
        ("out", "lse", "dq", "dk", "dv"), found, at_samples(p, rows, torch.float32), strict=True
    ):
        assert (got.float() - want).norm() / want.norm() < 2**-7, name


if os.environ.get("TRITON_INTERPRET") == "1":
    pytestmark = [pytest.mark.gpu, pytest.mark.skip(reason="needs compiled kernels")]
