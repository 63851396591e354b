"""Defects found in existing implementations of NSA, each as a test of this one."""

import pytest
import torch
from torch import Tensor

import oracle
from conftest import Case, Inputs, assert_close, gradients
from flexnsa import (
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    Selection,
    block_importance,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=4)
engines = pytest.mark.parametrize("impl", ("reference", "flex"))
half = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))


@engines
@pytest.mark.parametrize("window", (1, 2, 8, 64, 512))
def test_window_is_exactly_w_keys(impl: str, window: int):
    """Found elsewhere: 513 keys for "window 512". With equal scores the mean of one-hot values counts the keys."""
    config = NSAConfig(window=window)
    tokens, at = 2 * window + 3, [0, window - 1, window, 2 * window + 2]
    q, k = torch.zeros(1, 1, len(set(at)), 2), torch.zeros(1, 1, tokens, 2)
    values = torch.eye(tokens)[None, None]
    places = torch.tensor(sorted(set(at)))
    out, lse = window_attention(q, k, values, config, positions=places, impl=impl)
    for weights, total, t in zip(out[0, 0], lse[0, 0], places.tolist(), strict=True):
        seen = weights.nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - window + 1), t + 1))
        assert total.exp().item() == pytest.approx(len(seen), rel=1e-5)


@engines
def test_one_query_at_a_time_equals_the_full_pass(impl: str):
    """Found elsewhere: prefill and decoding differ by one key."""
    case = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=19)
    x, compressor = case.inputs(raw=True), MeanPool(SMALL)
    full = native_sparse_attention(x.q, x.kv, x.gates, SMALL, compressor, impl=impl)
    for t in range(19):
        now = slice(t, t + 1)
        step = native_sparse_attention(
            x.q[:, :, now], x.kv, x.gates[:, :, now], SMALL, compressor, positions=torch.tensor([t]), impl=impl
        )
        assert_close([step], [full[:, :, now]])


@engines
def test_decoding_on_the_tokens_so_far_equals_the_full_pass(impl: str):
    """The same with K and V that end at the query, as a cache holds them: the geometry must not depend on tk."""
    case = Case(SMALL, kv_heads=2, group=2, tokens=19)
    x, compressor = case.inputs(raw=True), MeanPool(SMALL)
    full = native_sparse_attention(x.q, x.kv, x.gates, SMALL, compressor, impl=impl)
    for t in range(19):
        past = Inputs(*(y[:, :, : t + 1] for y in x))
        step = native_sparse_attention(
            past.q[:, :, -1:], past.kv, past.gates[:, :, -1:], SMALL, compressor, positions=torch.tensor([t]), impl=impl
        )
        assert_close([step], [full[:, :, t : t + 1]])


@pytest.mark.parametrize("count", (1, 3, 5, 6, 7))
def test_num_selected_that_is_no_power_of_two_has_right_gradients(count: int):
    """Found elsewhere: 40% wrong dK."""
    config = NSAConfig(
        compress_block=4, compress_stride=2, select_block=4, num_selected=count, num_initial=0, num_local=1, window=4
    )
    case = Case(config, kv_heads=2, group=2, value_dim=3, tokens=37)
    x = case.inputs(grad=True)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, config).lse
    chosen = select_blocks(x.q, x.k_cmp, lse, config, num_tokens=37)
    leaves = [x.q, x.k_slc, x.v_slc]
    found = selected_attention(*leaves, chosen, config, impl="reference")
    expected = oracle.selected_attention(*leaves, chosen.indices, case.where)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@engines
@pytest.mark.parametrize("group", (3, 16))
def test_every_head_of_a_group_scores(impl: str, group: int):
    """Found elsewhere: the first head alone decides. Here one head alone looks anywhere, any of them."""
    config = NSAConfig(
        compress_block=4, compress_stride=4, select_block=4, num_selected=1, num_initial=0, num_local=0, window=4
    )
    k_cmp = torch.eye(8)[None, None]
    for head in range(group):
        q = torch.zeros(1, group, 1, 8)
        q[0, head, 0, 5] = 20.0
        keywords = {"positions": torch.tensor([31]), "impl": impl}
        lse = compressed_attention(q, k_cmp, k_cmp, config, **keywords).lse
        chosen = select_blocks(q, k_cmp, lse, config, num_tokens=32, **keywords)
        assert chosen.indices.tolist() == [[[[5]]]]


@half
def test_large_logits_stay_finite_in_half_precision(dtype: torch.dtype):
    """Found elsewhere: a constant softmax offset overflows in fp16 at a logit standard deviation of 9."""
    case = Case(SMALL, kv_heads=2, group=4, dim=16, value_dim=16, tokens=96)
    x = case.inputs(raw=True)
    x = x._replace(q=9 * x.q).to(dtype)
    exact = x.to(torch.float64)
    compressor = MeanPool(SMALL)
    k_cmp, v_cmp = compressor(*x.kv.compressed)
    lse = compressed_attention(x.q, k_cmp, v_cmp, SMALL).lse
    chosen = select_blocks(x.q, k_cmp, lse, SMALL, num_tokens=96)
    leaves = [y.requires_grad_() for y in x]
    found = native_sparse_attention(x.q, x.kv, x.gates, SMALL, compressor, selection=chosen, impl="reference")
    expected = native_sparse_attention(
        exact.q, exact.kv, exact.gates, SMALL, compressor, selection=chosen, impl="reference"
    )
    assert (found.double() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()
    assert all(dx.isfinite().all() for dx in gradients([found], leaves))


@engines
@pytest.mark.parametrize("factor", (100.0, 1e4))
def test_huge_logits_stay_finite_in_float32(impl: str, factor: float):
    case = Case(SMALL, kv_heads=2, group=2, tokens=40)
    x = case.inputs(torch.float32, raw=True)
    out = native_sparse_attention(factor * x.q, x.kv, x.gates, SMALL, MeanPool(SMALL), impl=impl)
    assert out.isfinite().all()


def test_layers_of_different_geometry_leave_each_other_alone():
    """Found elsewhere: class-level state lets one layer overwrite another's geometry."""
    wide = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=5, num_local=1, window=9)
    sizes = {"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    x = torch.randn(1, 33, 12, generator=torch.Generator().manual_seed(0))

    def build(config: NSAConfig) -> NativeSparseAttention:
        torch.manual_seed(3)
        return NativeSparseAttention(config=config, **sizes)

    first = build(SMALL)
    before = first(x)
    second = build(wide)
    expected = second(x)
    for _ in range(2):
        assert torch.equal(first(x), before)
        assert torch.equal(second(x), expected)


@half
def test_importance_is_float32_for_half_precision_inputs(dtype: torch.dtype):
    """Found elsewhere: bf16 scores change 0.1 to 2% of the selections. Here only the inputs are rounded."""
    config = NSAConfig(
        compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_initial=0, num_local=1, window=4
    )
    case = Case(config, kv_heads=2, group=4, dim=16, tokens=257)
    x = case.inputs(dtype)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, config).lse
    found = block_importance(x.q, x.k_cmp, lse, config, num_tokens=257)
    assert (lse.dtype, found.dtype) == (torch.float32, torch.float32)
    y = x.to(torch.float64)
    exact_lse = compressed_attention(y.q, y.k_cmp, y.v_cmp, config).lse
    assert_close(
        [select_blocks(x.q, x.k_cmp, lse, config, num_tokens=257).indices.double()],
        [select_blocks(y.q, y.k_cmp, exact_lse, config, num_tokens=257).indices.double()],
    )


@half
@pytest.mark.parametrize("group", (20, 24, 32))
def test_large_groups_in_half_precision(dtype: torch.dtype, group: int):
    """Found elsewhere: scores cubed into fp16 overflow for more than 20 heads a group."""
    case = Case(SMALL, kv_heads=1, group=group, dim=16, value_dim=16, tokens=40)
    x = case.inputs(dtype)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL).lse
    found = block_importance(x.q, x.k_cmp, lse, SMALL, num_tokens=40)
    exact = oracle.block_importance(x.q.double(), x.k_cmp.double(), case.where)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    out = native_sparse_attention(x.q, x.kv, x.gates, SMALL, None, impl="reference")
    assert out.isfinite().all()


@engines
def test_indices_past_64k_tokens(impl: str):
    """Found elsewhere: int32 overflow past 64k. The last queries of 70,000 tokens, block 1,090 of 1,094."""
    config = NSAConfig(num_selected=3, num_local=1, window=100)
    tokens, places = 70_000, torch.tensor([5, 65_600, 69_999])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator) for n in (3, tokens, tokens))
    indices = torch.tensor([[[0, -1, -1], [0, 1000, 1025], [7, 1090, 1093]]] * 2, dtype=torch.int32)[None]
    found = selected_attention(q, k, v, Selection(indices), config, positions=places, impl=impl)
    rows = [
        [*range(6)],
        [*range(64), *range(64_000, 64_064), 65_600],
        [*range(448, 512), *range(69_760, 69_824), *range(69_952, 70_000)],
    ]
    expected = oracle.attention(q, k, v, lambda b, h, t: rows[t])
    assert_close(found, expected)
    found = window_attention(q, k, v, config, positions=places, impl=impl)
    expected = oracle.attention(q, k, v, lambda b, h, t: list(range(max(0, places[t] - 99), places[t] + 1)))
    assert_close(found, expected)


def test_scores_past_64k_tokens():
    """One compressed key that every query looks for, far out: its block is chosen, and first of two that tie."""
    config = NSAConfig(compress_block=32, compress_stride=32, num_selected=1, num_initial=0, num_local=0)
    tokens, count = 70_000, 2187
    k_cmp = torch.zeros(1, 1, count, 2)
    k_cmp[0, 0, 2100, 0] = k_cmp[0, 0, 2150, 0] = 60.0
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2).contiguous()
    places = torch.tensor([67_500, 69_999])
    lse = compressed_attention(q, k_cmp, k_cmp, config, positions=places).lse
    chosen = select_blocks(q, k_cmp, lse, config, num_tokens=tokens, positions=places)
    assert chosen.indices.flatten().tolist() == [1050, 1050]


def test_the_same_inputs_give_the_same_bits():
    """Found elsewhere: dK and dV from float atomics are not reproducible."""
    case = Case(SMALL, batch=2, kv_heads=2, group=4, tokens=150)
    x = case.inputs(torch.float32, grad=True, raw=True)

    def run() -> list[Tensor]:
        out = native_sparse_attention(x.q, x.kv, x.gates, SMALL, MeanPool(SMALL), impl="reference")
        return [out, *gradients([out], x)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("strided", ("transposed", "expanded"))
@engines
def test_strides_do_not_matter(impl: str, strided: str):
    """Projections give b t h d memory, and a shared head an expanded one."""
    case = Case(SMALL, batch=2, kv_heads=2, group=2, tokens=21)
    x = case.inputs(torch.float32)
    lay = {
        "transposed": lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda y: y[:, :1].expand_as(y),
    }[strided]
    odd = Inputs(*(lay(y) for y in x))
    plain = Inputs(*(y.contiguous() for y in odd))
    found, expected = (native_sparse_attention(y.q, y.kv, y.gates, SMALL, None, impl=impl) for y in (odd, plain))
    assert_close([found], [expected])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_a_product_that_overflows_stays_with_the_queries_that_see_it(impl: str, dtype: torch.dtype):
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=6)
    q, k, v = (torch.randn(1, heads, 40, 8).to(dtype) for heads in (4, 2, 2))
    huge = k.clone()
    huge[:, :, -1] = torch.finfo(dtype).max
    before, after = (window_attention(q, keys, v, config, impl=impl).out[:, :, :39] for keys in (k, huge))
    assert torch.equal(after, before)


def test_huge_padding_sends_no_nan_backward():
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=6)
    documents = torch.tensor([[0] * 30 + [-1] * 10])
    leaves = [torch.randn(1, heads, 40, 8) for heads in (4, 2, 2)]
    for leaf in leaves:
        leaf[:, :, 30:] = 1e25
        leaf.requires_grad_()
    window_attention(*leaves, config, documents=documents).out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
