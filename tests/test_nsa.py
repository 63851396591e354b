"""The whole functional API against the oracle: values, every gradient, causality, NaN, slices of queries, replay."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from conftest import Case, Inputs, assert_as_accurate, assert_close, cases, gradients, part
from flexnsa import (
    BranchKV,
    MeanPool,
    MLPCompressor,
    NSAConfig,
    Selection,
    compressed_attention,
    dense,
    documents_from_lengths,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
STAGES = ("compressed", "selected", "window")


def own_selection(case: Case, x: Inputs) -> Selection:
    """What `native_sparse_attention` selects on compressed tokens: the stages one after the other."""
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing).lse
    keywords = {"num_tokens": case.tokens, "impl": "reference", **case.placing}
    return select_blocks(x.q, x.k_cmp, lse, case.config, **keywords)


def first_row(case: Case) -> Case:
    positions, documents = case.positions, case.documents
    return replace(
        case,
        batch=1,
        positions=positions[0] if positions is not None and positions.ndim == 2 else positions,
        documents=None if documents is None else documents[:1],
    )


def starts(case: Case) -> Tensor | None:
    if case.documents is None:
        return None
    return torch.tensor(case.where.starts(), dtype=torch.int64).view(case.batch, case.where.num_compressed)


def mlp(case: Case) -> MLPCompressor:
    torch.manual_seed(case.seed)
    return MLPCompressor(case.config, num_kv_heads=case.kv_heads, head_dim=case.dim, value_dim=case.value_dim).double()


@given(case=cases(), scale=st.sampled_from((None, 0.3)))
def test_reference_equals_the_oracle_on_compressed_tokens(case: Case, scale: float | None):
    x = case.inputs(grad=True)
    found = native_sparse_attention(
        x.q, x.kv, x.gates, case.config, None, scale=scale, impl="reference", **case.placing
    )
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, scale=scale, **case.placing).lse
    chosen = select_blocks(
        x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, scale=scale, impl="reference", **case.placing
    )
    expected = oracle.native_sparse_attention(x.q, x.pairs, x.gates, case.where, scale, chosen.indices)
    assert_close([found], [expected])
    assert_close(gradients([found], x), gradients([expected], x))


@pytest.mark.parametrize("make", (lambda case: MeanPool(case.config), mlp), ids=("mean", "mlp"))
@given(case=cases(values=("normal",)))
@part(2)
def test_reference_equals_the_oracle_on_raw_tokens(make: Callable[[Case], torch.nn.Module], case: Case):
    """Gradients reach the raw tokens and the compressor's parameters through the compressed branch."""
    x, compressor = case.inputs(grad=True, raw=True), make(case)
    found = native_sparse_attention(x.q, x.kv, x.gates, case.config, compressor, impl="reference", **case.placing)
    k_cmp, v_cmp = compressor(x.k_cmp, x.v_cmp, starts=starts(case))
    chosen = own_selection(case, x._replace(k_cmp=k_cmp, v_cmp=v_cmp)).indices
    pairs = ((k_cmp, v_cmp), *x.pairs[1:])
    expected = oracle.native_sparse_attention(x.q, pairs, x.gates, case.where, None, chosen)
    leaves = [*x, *compressor.parameters()]
    assert_close([found], [expected])
    assert_close(gradients([found], leaves), gradients([expected], leaves))


@given(case=cases(values=("normal",)))
def test_reference_equals_the_oracle_with_a_selection_of_the_oracles_own(case: Case):
    """Nothing handed over: compression, scoring, selection and attention on either side. Random scores do not tie."""
    x = case.inputs(raw=True)
    found = native_sparse_attention(
        x.q, x.kv, x.gates, case.config, MeanPool(case.config), impl="reference", **case.placing
    )
    where = case.where
    compressed = (oracle.mean_pool(x.k_cmp, where), oracle.mean_pool(x.v_cmp, where))
    assert_close([found], [oracle.native_sparse_attention(x.q, (compressed, *x.pairs[1:]), x.gates, where)])


@given(case=cases(values=("normal", "hot", "flat")))
@part(2)
def test_flex_equals_reference(case: Case):
    x = case.inputs(torch.float32)
    chosen = own_selection(case, x)

    def run(inputs: Inputs, impl: str) -> Tensor:
        return native_sparse_attention(
            inputs.q, inputs.kv, inputs.gates, case.config, None, selection=chosen, impl=impl, **case.placing
        )

    assert_as_accurate(run(x, "flex"), run(x, "reference"), run(x.to(torch.float64), "reference"), case.logits)


@pytest.mark.parametrize("documents", (None, torch.tensor([[-1] * 2 + [0] * 7 + [1] * 5])))
def test_gradcheck(documents: Tensor | None):
    case = Case(SMALL, kv_heads=2, group=2, dim=2, value_dim=2, tokens=14, documents=documents)
    x, compressor = case.inputs(grad=True, raw=True), mlp(case)
    names, parameters = zip(*compressor.named_parameters(), strict=True)

    class Functional(MLPCompressor):
        """The same compressor with its parameters as arguments, since gradcheck perturbs arguments."""

        def __init__(self, values: tuple[Tensor, ...]):
            torch.nn.Module.__init__(self)
            self.config, self.values = SMALL, dict(zip(names, values, strict=True))

        def forward(self, k: Tensor, v: Tensor, *, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(compressor, self.values, (k, v), {"starts": starts})

    def forward(*tensors: Tensor) -> Tensor:
        y = Inputs(*tensors[: len(x)])
        functional = Functional(tensors[len(x) :])
        return native_sparse_attention(y.q, y.kv, y.gates, SMALL, functional, documents=documents, impl="reference")

    assert torch.autograd.gradcheck(forward, (*x, *parameters), fast_mode=True)


def test_the_papers_geometry_over_several_chunks():
    case = Case(NSAConfig(num_selected=4, window=50), kv_heads=1, group=2, dim=4, value_dim=3, tokens=300)
    x = case.inputs(grad=True)
    found = native_sparse_attention(x.q, x.kv, x.gates, case.config, None, impl="reference")
    expected = oracle.native_sparse_attention(x.q, x.pairs, x.gates, case.where)
    assert_close([found], [expected])
    assert_close(gradients([found], x), gradients([expected], x))


@given(case=cases(values=("normal", "hot")), size=st.integers(1, 9), recompute=st.booleans(), careful=st.booleans())
@part(2)
def test_chunks_change_nothing(case: Case, size: int, recompute: bool, careful: bool):
    """The dense engine cuts the queries into chunks, and recomputes them in the backward of a large call.

    It takes more care where a number may not be finite.
    """
    x = case.inputs(grad=True)

    def run() -> list[Tensor]:
        out = native_sparse_attention(x.q, x.kv, x.gates, case.config, None, impl="reference", **case.placing)
        return [out, *gradients([out], x)]

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "CHUNK_QUERIES", size)
        if recompute:
            patch.setattr(dense, "RECOMPUTE_SCORES", 0)
        if careful:
            patch.setattr(dense, "_tame", lambda *_: False)
        chunked = run()
    assert_close(chunked, whole)


def test_vmap_maps_the_whole():
    """Over tensors whose values nobody can read."""
    case = Case(SMALL, batch=3, kv_heads=2, group=2, tokens=20)
    x = case.inputs()

    def attend(*leaves: Tensor) -> Tensor:
        y = Inputs(*leaves)
        return native_sparse_attention(y.q, y.kv, y.gates, case.config, None, impl="reference")

    assert_close([torch.func.vmap(attend)(*(y[:, None] for y in x))[:, 0]], [attend(*x)])


@pytest.mark.parametrize("impl", ("reference", "flex"))
@given(case=cases(positions=False), data=st.data())
@part(2)
def test_the_future_changes_no_past_output(impl: str, case: Case, data: st.DataObject):
    """Every token after t replaced, queries and gates included: the outputs up to t keep their bits."""
    x, t = case.inputs(raw=True), data.draw(st.integers(0, case.tokens - 1))
    changed = Inputs(*(torch.cat((y[:, :, : t + 1], 7 - 3 * y[:, :, t + 1 :].flip(2)), 2) for y in x))
    before, after = (
        native_sparse_attention(
            y.q, y.kv, y.gates, case.config, MeanPool(case.config), documents=case.documents, impl=impl
        )
        for y in (x, changed)
    )
    assert torch.equal(before[:, :, : t + 1], after[:, :, : t + 1])


@given(case=cases(positions=False, values=("normal",)), data=st.data())
def test_the_past_sends_no_gradient_to_the_future(case: Case, data: st.DataObject):
    x, t = case.inputs(grad=True, raw=True), data.draw(st.integers(0, case.tokens - 1))
    out = native_sparse_attention(
        x.q, x.kv, x.gates, case.config, MeanPool(case.config), documents=case.documents, impl="reference"
    )
    for dx in gradients([out[:, :, : t + 1]], x):
        assert not dx[:, :, t + 1 :].any()


@pytest.mark.parametrize("stage", STAGES)
@given(case=cases(values=("normal", "hot")), data=st.data())
@part(2)
def test_nan_in_an_invisible_row_leaks_nowhere(stage: str, case: Case, data: st.DataObject):
    """One row of k or v of one head is NaN. Queries blind to it keep their bits, alone and beside those that see it."""
    case = first_row(case)
    x, where = case.inputs(), case.where
    chosen = own_selection(case, x)
    place = torch.arange(case.tokens) if case.positions is None else case.positions
    k, v = dict(zip(STAGES, x.pairs, strict=True))[stage]
    assume(k.shape[2] > 0)
    row, head = data.draw(st.integers(0, k.shape[2] - 1)), data.draw(st.integers(0, case.kv_heads - 1))

    def visible(t: int) -> list[int]:
        picked = chosen.indices[0, head, t].tolist()
        return {
            "compressed": lambda: where.visible_compressed(0, t),
            "selected": lambda: where.selected_tokens(0, t, picked),
            "window": lambda: where.window_tokens(0, t),
        }[stage]()

    blind = [t for t in range(case.queries) if row not in visible(t)]
    assume(blind)

    def run(k: Tensor, v: Tensor, queries: list[int]) -> list[Tensor]:
        keywords = {"positions": place[queries], "documents": case.documents, "impl": "reference"}
        leaves = [y.detach().clone().requires_grad_() for y in (x.q[:, :, queries], k, v)]
        if stage == "selected":
            found = selected_attention(*leaves, Selection(chosen.indices[:, :, queries]), case.config, **keywords)
        else:
            attend = compressed_attention if stage == "compressed" else window_attention
            found = attend(*leaves, case.config, **keywords)
        return [*found, *gradients(found, leaves)]

    everyone = list(range(case.queries))
    for poisoned in ("k", "v"):
        k_nan, v_nan = k.clone(), v.clone()
        (k_nan if poisoned == "k" else v_nan)[0, head, row] = torch.nan
        assert all(torch.equal(a, b) for a, b in zip(run(k, v, blind), run(k_nan, v_nan, blind), strict=True))
        for a, b in zip(run(k, v, everyone)[:2], run(k_nan, v_nan, everyone)[:2], strict=True):
            assert torch.equal(a[:, :, blind], b[:, :, blind])


@pytest.mark.parametrize("stage", ("compressed", "window"))
def test_nan_in_a_visible_row_is_seen(stage: str):
    """The other side: whoever sees a NaN says so."""
    case = Case(SMALL, kv_heads=1, group=2, tokens=12)
    x = case.inputs()
    rows = case.where.visible_compressed if stage == "compressed" else case.where.window_tokens
    attend = compressed_attention if stage == "compressed" else window_attention
    k, v = x.pairs[0] if stage == "compressed" else x.pairs[2]
    for poisoned in (0, 1):
        pair = [k.clone(), v.clone()]
        pair[poisoned][0, 0, 2, 0] = torch.nan
        out = attend(x.q, *pair, SMALL, impl="reference").out
        for t in range(12):
            assert out[0, :, t].isnan().any() == (2 in rows(0, t))


@given(case=cases(positions=False, documents=False, values=("normal",)), data=st.data())
def test_nan_after_the_last_query_leaks_nowhere(case: Case, data: st.DataObject):
    """The whole, on raw tokens and with a learned compressor: every tensor is NaN from the last query on."""
    x, compressor = case.inputs(raw=True), mlp(case)
    count = data.draw(st.integers(1, case.tokens))
    results = []
    for filler in (0.0, torch.nan):
        tail = torch.arange(case.tokens)[:, None] >= count
        filled = Inputs(*(y if y.shape[2] != case.tokens else y.masked_fill(tail, filler) for y in x))
        leaves = Inputs(*(y.detach()[:, :, :count] for y in (filled.q,)), *filled[1:-1], filled.gates[:, :, :count]).to(
            torch.float64, grad=True
        )
        out = native_sparse_attention(
            leaves.q, leaves.kv, leaves.gates, case.config, compressor, positions=torch.arange(count), impl="reference"
        )
        results.append([out, *gradients([out], [*leaves, *compressor.parameters()])])
    clean, poisoned, own = *results, 1 + len(leaves)
    assert all(torch.equal(a, b) for a, b in zip(clean[:own], poisoned[:own], strict=True))
    assert_close(clean[own:], poisoned[own:])  # sums over all tokens, added in an order that depends on their layout


@pytest.mark.parametrize("impl", ("reference", "flex"))
@given(case=cases(values=("normal",)))
@part(2)
def test_any_slice_of_the_queries_equals_the_full_pass(impl: str, case: Case):
    assume(case.positions is not None)
    whole = replace(case, positions=None)
    x, compressor = whole.inputs(raw=True), MeanPool(case.config)
    full = native_sparse_attention(x.q, x.kv, x.gates, case.config, compressor, documents=case.documents, impl=impl)
    at = case.positions.expand(case.batch, -1)[:, None, :, None]

    def pick(y: Tensor) -> Tensor:
        return y.gather(2, at.expand(-1, y.shape[1], -1, y.shape[3]))

    found = native_sparse_attention(pick(x.q), x.kv, pick(x.gates), case.config, compressor, impl=impl, **case.placing)
    assert_close([found], [pick(full)])


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("documents", (None, [40, 60]), ids=("one", "packed"))
def test_a_range_of_positions_equals_the_tensor(documents, impl):
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=20)
    documents = None if documents is None else documents_from_lengths([documents, documents], 100)
    place = range(37, 96)
    case = Case(config, batch=2, kv_heads=2, group=3, value_dim=3, tokens=100, positions=torch.tensor(list(place)))
    x = case.inputs(torch.float32)
    with torch.no_grad():
        found, expected = (
            native_sparse_attention(x.q, x.kv, x.gates, config, None, positions=p, documents=documents, impl=impl)
            for p in (place, case.positions)
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_scattered_positions():
    """Queries 0..15 and 80..95, as a context-parallel rank has them."""
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=3, num_local=1, window=10)
    scattered = torch.tensor([*range(16), *range(80, 96)])
    case = Case(config, batch=2, kv_heads=2, group=3, value_dim=3, tokens=96, positions=scattered)
    x = case.inputs(grad=True)
    found = native_sparse_attention(x.q, x.kv, x.gates, config, None, positions=scattered, impl="reference")
    expected = oracle.native_sparse_attention(x.q, x.pairs, x.gates, case.where)
    assert_close([found], [expected])
    assert_close(gradients([found], x), gradients([expected], x))


def test_gates_pick_the_branches():
    """A gate of one on a single branch gives that stage's own output, in the order compressed, selected, window."""
    case = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=13)
    x = case.inputs()
    chosen = own_selection(case, x)
    stages = (
        compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, impl="reference"),
        selected_attention(x.q, x.k_slc, x.v_slc, chosen, SMALL, impl="reference"),
        window_attention(x.q, x.k_win, x.v_win, SMALL, impl="reference"),
    )
    for branch, stage in enumerate(stages):
        gates = torch.zeros_like(x.gates)
        gates[..., branch] = 1
        found = native_sparse_attention(x.q, x.kv, gates, SMALL, None, impl="reference")
        assert torch.equal(found, stage.out)


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_a_given_selection_is_replayed(impl: str):
    case = Case(SMALL, kv_heads=2, group=2, tokens=24)
    x = case.inputs(torch.float32)
    own = torch.arange(24, dtype=torch.int32).div(4, rounding_mode="floor")
    only_own = Selection(own.expand(1, 2, 24)[..., None].contiguous())
    gates = torch.zeros_like(x.gates)
    gates[..., 1] = 1
    found = native_sparse_attention(x.q, x.kv, gates, SMALL, None, selection=only_own, impl=impl)
    expected, _ = selected_attention(x.q, x.k_slc, x.v_slc, only_own, SMALL, impl=impl)
    assert torch.equal(found, expected)
    chosen = own_selection(case, x)
    replayed, free = (
        native_sparse_attention(x.q, x.kv, x.gates, SMALL, None, selection=selection, impl="reference")
        for selection in (chosen, None)
    )
    assert torch.equal(replayed, free)


def test_shared_kv_gathers_the_gradients_of_all_branches():
    case = Case(SMALL, kv_heads=2, group=2, tokens=13)
    x = case.inputs(grad=True)
    compressor = MeanPool(SMALL)
    shared = native_sparse_attention(
        x.q, BranchKV.shared(x.k_slc, x.v_slc), x.gates, SMALL, compressor, impl="reference"
    )
    copies = [y.detach().clone().requires_grad_() for y in (x.k_slc, x.v_slc) * 3]
    apart = native_sparse_attention(
        x.q, BranchKV(*zip(copies[::2], copies[1::2], strict=True)), x.gates, SMALL, compressor, impl="reference"
    )
    assert torch.equal(shared, apart)
    dk, dv = gradients([shared], [x.k_slc, x.v_slc])
    each = gradients([apart], copies)
    assert_close([dk, dv], [each[0] + each[2] + each[4], each[1] + each[3] + each[5]])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@given(case=cases(values=("normal",)))
def test_half_precision_errs_by_its_own_rounding(dtype: torch.dtype, case: Case):
    x = case.inputs(dtype)
    chosen = own_selection(case, x)
    found, exact = (
        native_sparse_attention(
            y.q, y.kv, y.gates, case.config, None, selection=chosen, impl="reference", **case.placing
        )
        for y in (x, x.to(torch.float64))
    )
    assert found.dtype == dtype
    # Three branches of size up to |v|, each rounded once, and three products and two sums of theirs.
    limit = 8 * torch.finfo(dtype).eps * max(pair[1].abs().max().item() for pair in x.pairs if pair[1].numel())
    assert (found.double() - exact).abs().max() <= limit
