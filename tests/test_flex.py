"""FlexAttention as users run it: traced on a CPU, compiled on CUDA, against the dense engine.

On CUDA the yardstick is plain torch at the same precision: dense scores, a mask, a softmax, autograd. Its error against
float64 says what the precision allows, and FlexAttention's must be of that size, in the outputs and in every gradient.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import flexnsa_masks
from conftest import Case, Inputs, assert_as_accurate, gradients
from flexnsa import (
    MeanPool,
    NSAConfig,
    Selection,
    compressed_attention,
    flex,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    static_masks,
    window_attention,
)
from flexnsa.layout import query_table
from flexnsa.static_masks import static_mask
from flexnsa_masks import causal, or_masks, prefix

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)
PACKED = torch.tensor([[-1] * 2 + [0] * 9 + [1] * 10, [3] * 20 + [-1]])
STAGES = ("compressed", "selected", "window")
CASES = {
    "plain": Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=21),
    "positions": Case(SMALL, batch=2, kv_heads=2, group=3, tokens=21, positions=torch.tensor([[0, 7, 20], [3, 4, 5]])),
    "documents": Case(SMALL, batch=2, kv_heads=2, group=1, tokens=21, documents=PACKED),
    "short": Case(SMALL, batch=1, kv_heads=1, group=4, tokens=3),
}

gpu = pytest.mark.gpu
precisions = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
heads = pytest.mark.parametrize(("hq", "hk", "dim"), ((64, 4, 128), (6, 2, 64)), ids=("64-4-128", "6-2-64"))


def choose(x: Inputs, case: Case) -> Selection:
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing).lse
    keywords = {"num_tokens": case.tokens, "impl": "reference", **case.placing}
    return select_blocks(x.q, x.k_cmp, lse, case.config, **keywords)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_traced_flex_equals_reference(traced_flex: None, case: Case):
    x = case.inputs(torch.float32)
    chosen = choose(x, case)

    def run(y: Inputs, impl: str) -> Iterator[Tensor]:
        keywords = {"impl": impl, **case.placing}
        yield from compressed_attention(y.q, y.k_cmp, y.v_cmp, case.config, **keywords)
        yield from selected_attention(y.q, y.k_slc, y.v_slc, chosen, case.config, **keywords)
        yield from window_attention(y.q, y.k_win, y.v_win, case.config, **keywords)
        yield native_sparse_attention(y.q, y.kv, y.gates, case.config, None, selection=chosen, **keywords)

    exact = run(x.to(torch.float64), "reference")
    for values in zip(run(x, "flex"), run(x, "reference"), exact, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("mask_mod", (None, or_masks(causal(), prefix(90))), ids=("causal", "prefix"))
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("first", (0, None))
def test_the_heads_of_a_group_along_the_batch_change_nothing(first: int | None, batch: int, mask_mod):
    """The backward's fold of the compressed branch; on a CPU its forward can be compared."""
    case = Case(SMALL, batch=batch, kv_heads=2, group=3, tokens=300)
    x = case.inputs(torch.float32)
    table, pad = query_table(x.q, SMALL, num_tokens=300, mask_mod=mask_mod), -x.k_cmp.shape[2] % 128
    k, v = (F.pad(y, (0, 0, 0, pad)) for y in x.pairs[0])
    table = table._replace(first=first)
    found = flex._by_head(x.q, k, v, table, SMALL, table.masked_range(batch), scale=case.dim**-0.5)
    expected = compressed_attention(x.q, *x.pairs[0], SMALL, mask_mod=mask_mod, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", (0, 1, 300))
@pytest.mark.parametrize(("pattern", "sizes"), (("compressed", (32, 16)), ("sliding_window", (70,))))
def test_static_masks_are_those_of_the_gallery(pattern: str, sizes: tuple[int, ...], first: int):
    position = first + torch.arange(400)[None]
    mask = static_mask(pattern, sizes, position, 256, first=first)
    mod = flexnsa_masks.at_positions(getattr(flexnsa_masks, pattern)(*sizes), position)
    expected = flexnsa_masks.block_mask(mod, q_len=400, kv_len=256)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    dense = [create_mask(m, 1, 1, 400, 256, device="cpu") for m in (mask.mask_mod, mod)]
    assert torch.equal(*dense)


@pytest.mark.parametrize(("bound", "most"), (("KEPT_TILES", 20), ("KEPT_MASKS", 5)))
def test_static_masks_are_kept_for_the_next_call_and_not_without_bound(bound: str, most: int, monkeypatch):
    monkeypatch.setattr(static_masks, bound, most)
    position = torch.arange(200)[None]
    first, again = (static_mask("sliding_window", (5,), position, 200) for _ in range(2))
    assert first.kv_indices is again.kv_indices
    for window in range(6, 16):  # four tiles each
        static_mask("sliding_window", (window,), position, 200)
    assert len(static_masks._KEPT) == 5
    assert static_mask("sliding_window", (5,), position, 200).kv_indices is not first.kv_indices


def test_a_mask_built_without_gradients_serves_training():
    position = torch.arange(150)[None]
    with torch.inference_mode():
        mask = static_mask("compressed", (4, 2), position, 128)
    assert not mask.kv_indices.is_inference()


def test_the_opaque_operator_describes_its_tables():
    arguments = (torch.arange(300)[None], "compressed", [4, 2], 0, 256, 3)
    torch.library.opcheck(torch.ops.flexnsa.static_mask_tables.default, arguments)


def test_a_graphs_tables_are_copies_with_a_spare_row_and_column():
    """No axis of length 1, for which Dynamo would compile once more; and nothing that the graph may overwrite."""
    position = torch.arange(100)[None]
    kept = static_mask("sliding_window", (7,), position, 100)
    for _ in range(2):
        tables = torch.ops.flexnsa.static_mask_tables(position, "sliding_window", [7], 0, 100, 1)
        for name, table in zip(static_masks._TABLES, tables, strict=True):
            exact = getattr(kept, name)
            assert torch.equal(table[tuple(slice(size) for size in exact.shape)], exact)
            assert table.shape == (1, 1, *(size + 1 for size in exact.shape[2:]))
            table.fill_(9)


def test_no_grad_is_enough_on_a_cpu():
    x = CASES["plain"].inputs(torch.float32, grad=True)
    if x.q.device.type == "cpu":
        with pytest.raises(NotImplementedError, match="no_grad"):
            window_attention(x.q, x.k_win, x.v_win, SMALL, impl="flex")
    with torch.no_grad():
        out, _ = window_attention(x.q, x.k_win, x.v_win, SMALL, impl="flex")
    torch.testing.assert_close(out, window_attention(x.q, x.k_win, x.v_win, SMALL, impl="reference").out)


# --- CUDA -------------------------------------------------------------------------------------------------------------

TOKENS = 4096

# FlexAttention adds a key's gradient over tiles of so many query rows, in float32; wider for other dtypes.
BACKWARD_ROWS = 16


def on_cuda(hq: int, hk: int, dim: int, dtype: torch.dtype, tokens: int = TOKENS, config: NSAConfig | None = None):
    """Leaves of one call, and the selection that all engines are given."""
    config = config or NSAConfig()
    generator = torch.Generator("cuda").manual_seed(0)
    count = config.num_compressed(tokens)
    shapes = [(1, hq, tokens, dim), *[(1, hk, count, dim)] * 2, *[(1, hk, tokens, dim)] * 4, (1, hq, tokens, 3)]
    tensors = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    x = Inputs(*tensors[:-1], tensors[-1].sigmoid()).to(dtype)
    return x, choose(x, Case(config, kv_heads=hk, group=hq // hk, dim=dim, tokens=tokens))


def dense_masks(selection: Selection, config: NSAConfig, tokens: int) -> dict[str, Tensor]:
    """Bool `[1, hk|1, tq, keys]` of each branch."""
    query, key = torch.arange(tokens, device="cuda")[:, None], torch.arange(tokens, device="cuda")
    last = (
        torch.arange(config.num_compressed(tokens), device="cuda") * config.compress_stride + config.compress_block - 1
    )
    indices = selection.indices.long()
    blocks = torch.zeros(*indices.shape[:3], config.num_blocks(tokens) + 1, dtype=torch.bool, device="cuda")
    blocks = blocks.scatter(-1, indices.where(indices >= 0, blocks.shape[-1] - 1), True)[..., :-1]
    member = blocks.repeat_interleave(config.select_block, -1)[..., :tokens]
    causal = key <= query
    return {
        "compressed": (last <= query)[None, None],
        "selected": member & causal,
        "window": (causal & (key > query - config.window))[None, None],
    }


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention as anyone would write it, every product in the inputs' dtype, one KV head at a time."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(k.shape[1]):
        rows = q[:, head * group : (head + 1) * group]
        visible = mask[:, min(head, mask.shape[1] - 1)][:, None]
        logits = (rows @ k[:, head : head + 1].mT * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
        logits = logits.masked_fill(~visible, -torch.inf)
        weights = logits.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        outs.append(weights.to(q.dtype) @ v[:, head : head + 1])
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def attend(stage: str, selection: Selection, config: NSAConfig, impl: str) -> Callable[..., Sequence[Tensor]]:
    if stage == "selected":
        return lambda q, k, v: selected_attention(q, k, v, selection, config, impl=impl)
    function = compressed_attention if stage == "compressed" else window_attention
    return lambda q, k, v: function(q, k, v, config, impl=impl)


def with_gradients(run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a random function of the first, which is all that training differentiates."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    found = run(*leaves)
    return [x.detach() for x in (*found, *gradients(found[:1], leaves))]


def compare(
    found: Sequence[Tensor],
    baseline: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str],
    rows: int,
) -> None:
    """Each output and gradient as accurate as plain torch. `rows` is how many query rows share a KV head."""
    for name, *values in zip(names, found, baseline, exact, strict=True):
        try:
            assert_as_accurate(*values, terms=rows // BACKWARD_ROWS if name.startswith(("dk", "dv")) else 0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@gpu
@precisions
@heads
@pytest.mark.parametrize("stage", STAGES)
def test_each_branch_forward_and_backward(stage: str, hq: int, hk: int, dim: int, dtype: torch.dtype):
    x, chosen = on_cuda(hq, hk, dim, dtype)
    config = NSAConfig()
    leaves = [x.q, *dict(zip(STAGES, x.pairs, strict=True))[stage]]
    mask = dense_masks(chosen, config, TOKENS)[stage]
    found = with_gradients(attend(stage, chosen, config, "flex"), leaves)
    baseline = with_gradients(lambda q, k, v: plain(q, k, v, mask), leaves)
    exact = with_gradients(attend(stage, chosen, config, "reference"), [y.double() for y in leaves])
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    compare(found, baseline, exact, ("out", "lse", "dq", "dk", "dv"), hq // hk * TOKENS)


@gpu
@precisions
@heads
def test_the_whole_forward_and_backward(hq: int, hk: int, dim: int, dtype: torch.dtype):
    x, chosen = on_cuda(hq, hk, dim, dtype)
    masks = dense_masks(chosen, NSAConfig(), TOKENS)

    def run(impl: str) -> Callable[..., Sequence[Tensor]]:
        def whole(*tensors: Tensor) -> Sequence[Tensor]:
            y = Inputs(*tensors)
            return [native_sparse_attention(y.q, y.kv, y.gates, NSAConfig(), None, selection=chosen, impl=impl)]

        return whole

    def by_hand(*tensors: Tensor) -> Sequence[Tensor]:
        y = Inputs(*tensors)
        outs = [plain(y.q, *pair, mask)[0] for pair, mask in zip(y.pairs, masks.values(), strict=True)]
        return [sum(gate[..., None] * out for gate, out in zip(y.gates.unbind(-1), outs, strict=True))]

    found, baseline = with_gradients(run("flex"), x), with_gradients(by_hand, x)
    exact = with_gradients(run("reference"), x.to(torch.float64))
    compare(found, baseline, exact, ("out", *(f"d{name}" for name in Inputs._fields)), hq // hk * TOKENS)


@gpu
@precisions
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tokens", (1, 31, 33, 127, 129, 1000))
def test_odd_lengths(stage: str, tokens: int, dtype: torch.dtype):
    """Cut tiles, fewer tokens than a compression block, and rows that see nothing."""
    x, chosen = on_cuda(6, 2, 64, dtype, tokens)
    config = NSAConfig()
    leaves = [x.q, *dict(zip(STAGES, x.pairs, strict=True))[stage]]
    mask = dense_masks(chosen, config, tokens)[stage]
    found = with_gradients(attend(stage, chosen, config, "flex"), leaves)
    exact = with_gradients(attend(stage, chosen, config, "reference"), [y.double() for y in leaves])
    if leaves[1].shape[2] == 0:
        assert all(torch.equal(a.double(), b.double()) for a, b in zip(found, exact, strict=True))
        return
    baseline = with_gradients(lambda q, k, v: plain(q, k, v, mask), leaves)
    compare(found, baseline, exact, ("out", "lse", "dq", "dk", "dv"), 3 * tokens)


@gpu
@precisions
def test_documents_and_positions(dtype: torch.dtype):
    """A packed row with padding, half of its queries: against the dense engine at the same precision."""
    tokens, hq, hk, dim = 1000, 8, 2, 64
    x, _ = on_cuda(hq, hk, dim, dtype, tokens)
    documents = torch.tensor([[-1] * 10 + [0] * 300 + [2] * 650 + [-1] * 40], device="cuda")
    positions = torch.arange(0, tokens, 2, device="cuda")
    x = x._replace(q=x.q[:, :, ::2].contiguous(), gates=x.gates[:, :, ::2].contiguous())
    case = Case(NSAConfig(), kv_heads=hk, group=4, dim=dim, tokens=tokens, positions=positions, documents=documents)
    chosen = choose(x, case)

    def run(impl: str) -> Callable[..., Sequence[Tensor]]:
        def whole(*tensors: Tensor) -> Sequence[Tensor]:
            y = Inputs(*tensors)
            return [
                native_sparse_attention(
                    y.q, y.kv, y.gates, NSAConfig(), None, selection=chosen, impl=impl, **case.placing
                )
            ]

        return whole

    found = with_gradients(run("flex"), x)
    baseline, exact = with_gradients(run("reference"), x), with_gradients(run("reference"), x.to(torch.float64))
    # The dense engine works in float32 whatever the inputs, so this baseline is stricter than plain torch.
    compare(found, baseline, exact, ("out", *(f"d{name}" for name in Inputs._fields)), hq // hk * len(positions))


@gpu
def test_selection_past_46k_tokens():
    """A table of tq x tk indexed in int32 would be corrupt from 46k tokens on. The last queries of 128k."""
    tokens, config = 131_072, NSAConfig()
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 64, device="cuda", generator=generator) for h, n in ((8, 256), (2, tokens), (2, tokens))
    )
    positions = torch.arange(tokens - 256, tokens, device="cuda")
    blocks = torch.rand(1, 2, 256, 2040, device="cuda", generator=generator).topk(16).indices.sort().values.int()
    found, expected = (
        selected_attention(q, k, v, Selection(blocks), config, positions=positions, impl=impl)
        for impl in ("flex", "reference")
    )
    torch.testing.assert_close(found.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_nothing_waits_for_the_host(impl: str):
    """No .item(), no copy to the host: forward and backward only enqueue work, selection included."""
    x, _ = on_cuda(8, 2, 64, torch.float32, 1000)
    raw = x._replace(k_cmp=x.k_slc, v_cmp=x.v_slc)
    leaves = Inputs(*(y.detach().requires_grad_() for y in raw))
    compressor = MeanPool(NSAConfig())
    documents = torch.zeros(1, 1000, dtype=torch.int64, device="cuda")

    def step() -> None:
        out = native_sparse_attention(
            leaves.q, leaves.kv, leaves.gates, NSAConfig(), compressor, documents=documents, impl=impl
        )
        out.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_same_inputs_give_the_same_bits_on_cuda():
    x, chosen = on_cuda(16, 2, 64, torch.bfloat16, 1024)

    def whole(*tensors: Tensor) -> Sequence[Tensor]:
        y = Inputs(*tensors)
        return [native_sparse_attention(y.q, y.kv, y.gates, NSAConfig(), None, selection=chosen, impl="flex")]

    first = with_gradients(whole, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(whole, x), strict=True))


@gpu
def test_auto_is_the_first_engine_that_can():
    """On CUDA never the dense one for a plain bf16 call, and always for float64."""
    from flexnsa import explain

    x, _ = on_cuda(8, 2, 64, torch.bfloat16, 256)
    assert {choice.engine for choice in explain(x.q, x.k_slc, x.v_slc)} != {"reference"}
    y = x.to(torch.float64)
    assert {choice.engine for choice in explain(y.q, y.k_slc, y.v_slc)} == {"reference"}


def test_autocast_lowers_no_precision():
    x = CASES["plain"].inputs(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (window_attention(x.q, x.k_win, x.v_win, SMALL, impl=impl) for impl in ("flex", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
