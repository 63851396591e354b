"""Masks and score mods of the user's own, over every branch: against the oracle, and the engines against reference."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask

import oracle
from conftest import Case, assert_as_accurate, assert_close, cases, geometries, gradients
from flexnsa import (
    NativeSparseAttention,
    NSAConfig,
    Selection,
    SigmoidGate,
    SparseAttention,
    WindowBranch,
    block_importance,
    compressed_attention,
    documents_from_lengths,
    engines,
    explain,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from flexnsa.visibility import compressed_mask
from flexnsa_masks import (
    Grid,
    MaskMod,
    alibi,
    and_masks,
    at_positions,
    causal,
    compressed,
    document,
    interval_of,
    or_masks,
    prefix,
    sink,
    sliding_window,
    soft_cap,
    streaming_llm,
    tiles_of,
    with_interval,
    with_tiles,
)

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=5)


@dataclass(frozen=True)
class Masked(oracle.Layout):
    """The oracle's layout with a table [tk, tk] in place of causality."""

    mask: Tensor

    def seen(self, b: int, t: int) -> set[int]:
        return {k for k in self.document(b, t) if self.mask[self.positions[b][t], k]}

    def forced(self, b: int, t: int) -> set[int]:
        tokens = self.document(b, t)
        if not tokens:
            return set()
        own = tokens.index(self.positions[b][t]) // self.config.select_block
        local = range(own - self.config.num_local + 1, own + 1)
        return {j for j in self.candidates(b, t) if j < self.config.num_initial or j in local}


def table_of(kind: str, case: Case) -> Tensor:
    query, key = torch.arange(case.tokens)[:, None], torch.arange(case.tokens)
    if kind == "random":
        return case.randn(case.tokens, case.tokens, salt=9) > -0.5
    if kind == "prefix":
        return (key <= query) | (key < case.tokens // 2)
    return (key <= query) & ((query - key) % 3 < 2)


def lookup(table: Tensor):
    return lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]


@settings(max_examples=40)
@given(case=cases(values=("normal",)), kind=st.sampled_from(("random", "prefix", "strided")))
def test_a_mask_holds_in_every_branch(case: Case, kind: str):
    table = table_of(kind, case)
    where = Masked(case.where.config, case.where.positions, case.where.documents, table)
    x, keywords = case.inputs(grad=True), {"mask_mod": lookup(table), "impl": "reference", **case.placing}
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, **keywords).lse
    chosen = select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, **keywords)
    found = native_sparse_attention(x.q, x.kv, x.gates, case.config, None, **keywords)
    expected = oracle.native_sparse_attention(x.q, x.pairs, x.gates, where, None, chosen.indices)
    assert_close([found], [expected])
    assert_close(gradients([found], x), gradients([expected], x))

    importance = oracle.block_importance(x.q, x.k_cmp, where)
    best = oracle.select_blocks(importance, where)
    for ours, theirs, scores in zip(
        chosen.indices.flatten(0, 2), best.flatten(0, 2), importance.flatten(0, 2), strict=True
    ):
        assert (ours >= 0).sum() == (theirs >= 0).sum()
        totals = [scores[index[index >= 0].long()].sum() for index in (ours, theirs)]
        torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(case=cases(values=("normal",)), kind=st.sampled_from(("random", "prefix")))
def test_flex_equals_reference_under_a_mask(case: Case, kind: str):
    x, table = case.inputs(torch.float32), table_of(kind, case)
    keywords = {"mask_mod": lookup(table), **case.placing}
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, **keywords).lse
    chosen = select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, **keywords)
    exact = x.to(torch.float64)
    values = (
        native_sparse_attention(y.q, y.kv, y.gates, case.config, None, selection=chosen, impl=impl, **keywords)
        for y, impl in ((x, "flex"), (x, "reference"), (exact, "reference"))
    )
    assert_as_accurate(*values)


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_causality_as_a_mask_is_the_default(impl: str):
    case = Case(SMALL, batch=2, kv_heads=2, group=3, tokens=21)
    x = case.inputs(torch.float32)
    plain, masked = (
        native_sparse_attention(x.q, x.kv, x.gates, SMALL, None, mask_mod=mod, impl=impl) for mod in (None, causal())
    )
    torch.testing.assert_close(masked, plain)


def by_head(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & ((h % 2 == 0) | (kv_idx >= q_idx - 2))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_the_head_is_the_query_head(impl: str):
    x = Case(SMALL, batch=1, kv_heads=2, group=3, tokens=21).inputs(torch.float32)
    everything = Selection(torch.arange(6, dtype=torch.int32).expand(1, 2, 21, 6).contiguous())
    out, _ = selected_attention(x.q, x.k_slc, x.v_slc, everything, SMALL, mask_mod=by_head, impl=impl)
    for head in range(6):
        visible = NSAConfig(window=3 if head % 2 else 21)
        expected, _ = window_attention(x.q, x.k_slc, x.v_slc, visible, impl="reference")
        torch.testing.assert_close(out[:, head], expected[:, head], rtol=1e-4, atol=1e-5)


def dense_scores(q: Tensor, k: Tensor, mod, where: Tensor) -> Tensor:
    """Scores [b, hq, tq, keys] with a score mod, where each key stands at the token `where` says."""
    scores = torch.einsum("bhtd,bhjd->bhtj", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
    index = [torch.arange(n) for n in scores.shape[:3]]
    b, h, t, j = torch.meshgrid(*index, where, indexing="ij")
    return mod(scores, b, h, t, j)


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("mod", (alibi(6), soft_cap(2.0)), ids=("alibi", "soft_cap"))
def test_score_mods_change_each_branch(impl: str, mod):
    case = Case(SMALL, batch=2, kv_heads=2, group=3, tokens=21)
    x = case.inputs(torch.float32)
    query, key = torch.arange(21)[:, None], torch.arange(21)
    last = torch.arange(x.k_cmp.shape[2]) * 2 + 3
    window = (key <= query) & (key > query - 5)
    for function, k, v, where, visible in (
        (window_attention, x.k_win, x.v_win, key, window),
        (compressed_attention, x.k_cmp, x.v_cmp, last, last <= query),
    ):
        found = function(x.q, k, v, SMALL, score_mod=mod, impl=impl)
        scores = dense_scores(x.q, k, mod, where).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
        torch.testing.assert_close(found.out, weights @ v.repeat_interleave(3, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)


def test_importance_follows_the_score_mod():
    case = Case(SMALL, batch=1, kv_heads=1, group=2, tokens=21)
    x, mod = case.inputs(), alibi(2)
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, score_mod=mod).lse
    total = block_importance(x.q, x.k_cmp, lse, SMALL, num_tokens=21, score_mod=mod).sum(-1)
    # Two heads, and each compressed token counts l / stride = 2 strides of tokens, all of them inside blocks.
    torch.testing.assert_close(total[:, :, 3:], torch.full((1, 1, 18), 4.0, dtype=torch.float64))


def test_a_learned_bias_gets_its_gradient():
    case = Case(SMALL, batch=2, kv_heads=2, group=2, tokens=21)
    x, bias = case.inputs(), torch.zeros(4, 21, dtype=torch.float64, requires_grad=True)

    def relative(score, b, h, q_idx, kv_idx):
        return score + bias[h, (q_idx - kv_idx).clamp(0, 20)]

    assert torch.autograd.gradcheck(
        lambda _: window_attention(x.q, x.k_win, x.v_win, SMALL, score_mod=relative).out, (bias,)
    )


def test_a_composition_holds_the_mask_and_its_score_mods():
    case = Case(SMALL, batch=1, kv_heads=2, group=2, tokens=21)
    x, mask = case.inputs(torch.float32), or_masks(causal(), prefix(6))
    attention = SparseAttention({"near": WindowBranch(SMALL, score_mod=alibi(4))}, SigmoidGate(8, 4, 1))
    hidden = torch.randn(1, 21, 8)
    found = attention(x.q, {"near": (x.k_win, x.v_win)}, hidden, mask_mod=mask)
    out, _ = window_attention(x.q, x.k_win, x.v_win, SMALL, mask_mod=mask, score_mod=alibi(4))
    torch.testing.assert_close(found, attention.gate(hidden) * out)


@pytest.mark.parametrize("name", ("mask_mod", "score_mod"))
def test_mods_of_the_wrong_arity(name: str):
    x = Case(SMALL, tokens=9).inputs(torch.float32)
    with pytest.raises(TypeError, match=f"{name} must be callable as {name}"):
        window_attention(x.q, x.k_win, x.v_win, SMALL, **{name: lambda score, q_idx: score})


@pytest.mark.parametrize(
    "mask_mod",
    (
        lambda b, h, i, j: i - j,
        lambda b, h, i, j: (i - j).float(),
        lambda b, h, i, j: torch.ones(3, dtype=torch.bool),
        lambda b, h, i, j: True,
    ),
    ids=("integers", "scores", "rows", "no tensor"),
)
def test_masks_that_do_not_say_yes_or_no(mask_mod):
    x = Case(SMALL, tokens=9).inputs(torch.float32)
    for impl in ("reference", "flex"):
        with pytest.raises(TypeError, match="mask_mod must return a bool tensor"):
            window_attention(x.q, x.k_win, x.v_win, SMALL, mask_mod=mask_mod, impl=impl)


def test_a_mask_is_checked_before_any_branch_runs():
    class Never:
        def attend(self, q, k, v, context):
            raise AssertionError("it ran")

    x = Case(SMALL, tokens=9).inputs(torch.float32)
    attention = SparseAttention({"never": Never()}, SigmoidGate(8, 1, 1))
    with pytest.raises(TypeError, match="mask_mod must be callable as mask_mod"):
        attention(
            x.q, {"never": (x.k_win, x.v_win)}, torch.randn(1, 9, 8), mask_mod=lambda q_idx, kv_idx: q_idx > kv_idx
        )


# Masks that are one interval of keys a query, which triton takes. Its kernels run in Triton's interpreter here.

INTERVALS = ("causal", "window", "prefix", "prefix by row", "documents", "sinks", "own", "anywhere")


def interval_mask(kind: str, case: Case) -> MaskMod:
    """The promised interval of each kind, and for "own" and "anywhere" that of a mask of one's own."""
    draw = torch.Generator().manual_seed(case.seed)
    if kind == "own":  # sentences, each seen whole
        ends = torch.arange(case.tokens) // 7 * 7 + 6
        return with_interval(lambda b, h, i, j: j <= ends[i], last=lambda b, i: ends[i])
    if kind == "anywhere":
        first, last = torch.randint(-2, case.tokens + 2, (2, case.batch, case.tokens), generator=draw)
        return with_interval(
            lambda b, h, i, j: (first[b, i] <= j) & (j <= last[b, i]),
            last=lambda b, i: last[b, i],
            first=lambda b, i: first[b, i],
        )
    ids = torch.arange(case.tokens) // 9
    return {
        "causal": causal(),
        "window": sliding_window(1 + case.seed % 9),
        "prefix": or_masks(causal(), prefix(case.tokens // 2)),
        "prefix by row": or_masks(prefix(torch.arange(case.batch) * 5 + 2), causal()),
        "documents": and_masks(document(ids.where(ids != 2, -1), contiguous=True), causal()),
        "sinks": or_masks(sink(3), sink(case.tokens // 3)),
    }[kind]


@given(case=cases(values=("normal",)), kind=st.sampled_from(INTERVALS))
def test_an_interval_says_what_the_mask_does(case: Case, kind: str):
    mask = interval_mask(kind, case)
    b, query, key = torch.arange(case.batch)[:, None], torch.arange(case.tokens), torch.arange(case.tokens)
    told, seen = interval_of(mask), mask(b[..., None], torch.tensor(0), query[:, None], key)
    last = told.last(b, query[None])[..., None]
    expected = key <= last if told.first is None else (told.first(b, query[None])[..., None] <= key) & (key <= last)
    assert torch.equal(*torch.broadcast_tensors(seen, expected))


def test_masks_made_of_others_carry_an_interval_only_where_it_is_one():
    plain = lambda b, h, i, j: j <= i  # noqa: E731
    for mask in (
        plain,
        and_masks(causal(), plain),
        or_masks(prefix(3), plain),
        or_masks(sliding_window(4), sink(2)),
        document(torch.zeros(5, dtype=torch.int64)),
        streaming_llm(6, sinks=3),
    ):
        assert interval_of(mask) is None
    with pytest.raises(ValueError, match="contiguous=False with key_ids"):
        document(torch.zeros(5), torch.zeros(5), contiguous=True)


@settings(max_examples=12)
@given(case=cases(values=("normal", "repeated")), kind=st.sampled_from(INTERVALS))
def test_triton_selects_as_reference_does_under_an_interval(case: Case, kind: str):
    case = replace(case, kv_heads=1)
    x, keywords = case.inputs(torch.float32), {"mask_mod": interval_mask(kind, case), **case.placing}
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, **keywords).lse
    found, best = (
        select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, impl=impl, **keywords).indices
        for impl in ("triton", "reference")
    )
    importance = block_importance(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, **keywords)
    assert torch.equal(found >= 0, best >= 0)
    assert ((found.diff(dim=-1) > 0) | (found[..., 1:] < 0)).all()
    totals = [importance.gather(-1, i.clamp(min=0).long()).masked_fill(i < 0, 0).sum(-1) for i in (found, best)]
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)


@settings(max_examples=6)
@given(case=cases(values=("normal",), groups=(1, 3, 8)), kind=st.sampled_from(INTERVALS[1:]))
def test_triton_equals_reference_under_an_interval(case: Case, kind: str):
    """Outputs, LSEs and gradients of the selected branch, for the same selection."""
    tokens = min(case.tokens, 24)
    packed = documents_from_lengths([[tokens // 2, tokens // 3]] * case.batch, tokens) if tokens > 2 else None
    documents, queries = (packed, None) if case.seed % 2 else (None, torch.arange(case.seed % tokens, tokens))
    case = replace(case, kv_heads=1, tokens=tokens, positions=queries, documents=documents)
    x = case.inputs(torch.float32, grad=True)
    keywords = {"mask_mod": interval_mask(kind, case), **case.placing}
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, **keywords).lse
    chosen = select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, **keywords)
    attended = (x.q, x.k_slc, x.v_slc)
    found, expected = (
        selected_attention(*attended, chosen, case.config, impl=impl, **keywords) for impl in ("triton", "reference")
    )
    assert_close(found, expected)
    for got, want in zip(gradients(found, attended), gradients(expected, attended), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(case=cases(values=("normal",)), kind=st.sampled_from(INTERVALS))
def test_flex_makes_tables_of_an_interval(case: Case, kind: str):
    x, keywords = case.inputs(torch.float32), {"mask_mod": interval_mask(kind, case), **case.placing}
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, **keywords).lse
    chosen = select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, **keywords)
    found, expected = (
        native_sparse_attention(x.q, x.kv, x.gates, case.config, None, selection=chosen, impl=impl, **keywords)
        for impl in ("flex", "reference")
    )
    assert_close([found], [expected])


@pytest.mark.parametrize("tokens", (3, 21))
def test_an_interval_may_reach_past_the_last_token(tokens: int):
    """Compressed attention is not told how many tokens there are where positions are given."""
    x = Case(SMALL, batch=2, kv_heads=1, group=2, tokens=tokens).inputs(torch.float32)
    keywords = {"mask_mod": or_masks(causal(), prefix(100)), "positions": torch.arange(tokens)}
    found, expected = (
        compressed_attention(x.q, x.k_cmp, x.v_cmp, SMALL, impl=impl, **keywords) for impl in ("flex", "reference")
    )
    assert_close(found, expected)


def test_a_composition_and_a_layer_hold_an_interval_on_triton():
    x = torch.randn(1, 21, 16, requires_grad=True)
    documents = documents_from_lengths([12, 8], 21)
    mask = or_masks(causal(), prefix(9))
    layers = [
        NativeSparseAttention(dim=16, num_heads=2, num_kv_heads=1, head_dim=8, config=SMALL, impl=impl)
        for impl in ("triton", "reference")
    ]
    layers[0].load_state_dict(layers[1].state_dict())
    found, expected = ([y := layer(x, mask_mod=mask, documents=documents), *gradients([y], [x])] for layer in layers)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def triangle(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@pytest.mark.parametrize(
    "mask_mod", (triangle, and_masks(causal(), document(torch.zeros(9, dtype=torch.int64))), by_head)
)
def test_triton_refuses_masks_of_which_it_does_not_know_the_interval(mask_mod):
    x = Case(SMALL, tokens=9, group=2).inputs(torch.float32)
    with pytest.raises(NotImplementedError, match=f'impl="triton".*{re.escape(mask_mod.__name__)}.*impl="auto"'):
        native_sparse_attention(x.q, x.kv, x.gates, SMALL, None, mask_mod=mask_mod, impl="triton")


def test_triton_refuses_score_mods():
    x = Case(SMALL, tokens=9).inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="take no score_mod"):
        window_attention(x.q, x.k_win, x.v_win, SMALL, score_mod=alibi(1), impl="triton")


@pytest.mark.parametrize("impl", ("flex", "triton"))
def test_a_false_interval_is_refused(impl: str):
    x = Case(SMALL, tokens=9).inputs(torch.float32)
    wrong = with_interval(lambda b, h, i, j: j <= i, last=lambda b, i: i + 1)
    everything = Selection(torch.zeros(1, 1, 9, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="sees other keys than its interval"):
        selected_attention(x.q, x.k_slc, x.v_slc, everything, SMALL, mask_mod=wrong, impl=impl)


def test_auto_takes_triton_for_intervals_and_flex_for_other_masks(monkeypatch):
    monkeypatch.setattr(engines, "TRITON_INSTALLED", True)
    with FakeTensorMode():
        q = torch.empty(1, 4, 8, 64, device="cuda", dtype=torch.bfloat16)
        for mask, expected in (
            (or_masks(causal(), prefix(5)), ["flex", "triton", "triton", "flex"]),
            (triangle, ["flex", "reference", "flex", "flex"]),
        ):
            assert [choice.engine for choice in explain(q, mask_mod=mask)] == expected
        assert "triangle" in explain(q, mask_mod=triangle)[2].reason


def test_the_graph_is_whole_under_an_interval():
    """As a compiler's front end captures it, the kernels being operators."""
    case = Case(SMALL, kv_heads=1, group=1, tokens=6)
    x, mask = case.inputs(torch.float32, grad=True), or_masks(causal(), prefix(torch.tensor([5])))

    def call(q):
        return native_sparse_attention(q, x.kv, x.gates, SMALL, None, mask_mod=mask, impl="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.q), call(x.q))


def test_the_layer_passes_a_mask_on():
    layer = NativeSparseAttention(dim=16, num_heads=4, num_kv_heads=2, head_dim=8, config=SMALL)
    x = torch.randn(1, 21, 16)
    torch.testing.assert_close(layer(x, mask_mod=causal()), layer(x))
    assert not torch.allclose(layer(x, mask_mod=or_masks(causal(), prefix(9))), layer(x))


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_a_score_of_minus_infinity_hides_a_key(impl: str):
    x = Case(SMALL, batch=1, kv_heads=2, group=2, tokens=21).inputs(torch.float32)
    found = window_attention(
        x.q, x.k_win, x.v_win, SMALL, impl=impl, score_mod=lambda s, b, h, i, j: torch.where(j >= 5, s, -torch.inf)
    )
    expected = window_attention(
        x.q, x.k_win, x.v_win, SMALL, impl=impl, mask_mod=lambda b, h, i, j: (j <= i) & (j >= 5)
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(found.lse[:, :, :5], torch.full((1, 4, 5), -torch.inf))


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("documents", (None, torch.zeros(1, 3, dtype=torch.int64)))
def test_a_score_mod_is_not_asked_about_the_key_that_stands_in_for_none(impl: str, documents):
    x, table = Case(SMALL, tokens=3).inputs(torch.float32), torch.zeros(3)
    out, _ = compressed_attention(
        x.q,
        x.k_cmp,
        x.v_cmp,
        SMALL,
        documents=documents,
        impl=impl,
        score_mod=lambda s, b, h, i, j: s + table[j],
    )
    assert torch.equal(out, torch.zeros_like(out))


@given(
    config=geometries(),
    tokens=st.integers(1, 60),
    tile=st.sampled_from(((8, 4), (4, 8), (16, 1), (5, 3))),
    mod=st.sampled_from(
        (causal(), prefix(7), or_masks(causal(), prefix(20)), sliding_window(9), streaming_llm(6, sinks=3))
    ),
    first=st.integers(0, 3),
)
def test_the_geometry_of_a_lifted_mask_is_sound(config: NSAConfig, tokens: int, tile: tuple[int, int], mod, first: int):
    """No tile with a visible pair is skipped, none with an invisible one counts as full."""
    count = config.num_compressed(tokens)
    assume(count > 0)
    positions = torch.arange(min(first, tokens - 1), tokens)
    lifted = at_positions(compressed_mask(mod, None, config, tokens), positions)
    some, full = tiles_of(lifted, Grid(len(positions), count, *tile, torch.device("cpu")))
    pairs = create_mask(lifted, 1, 1, len(positions), count, device="cpu")[0, 0]
    for row in range(some.shape[-2]):
        for column in range(some.shape[-1]):
            inside = pairs[row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
            assert some[0, 0, row, column] or not inside.any()
            assert full is None or not full[0, 0, row, column] or inside.all()


def test_a_lifted_mask_visits_what_causality_would():
    config = NSAConfig()
    grid = Grid(4096, config.num_compressed(4096), 128, 128, torch.device("cpu"))
    lifted = compressed_mask(causal(), None, config, 4096)
    assert torch.equal(tiles_of(lifted, grid).some, tiles_of(compressed(32, 16), grid).some)


def test_flex_asks_a_mask_for_its_tiles_in_every_branch():
    """Compressed tokens included: a tile of theirs is as many strides of tokens."""
    asked, plain = [], causal()

    def tiles(grid: Grid):
        asked.append(grid.kv_block)
        return tiles_of(plain, grid)

    mask = with_tiles(lambda b, h, i, j: j <= i, tiles, "spied")
    x = Case(SMALL, kv_heads=2, group=2, tokens=300).inputs(torch.float32)
    native_sparse_attention(x.q, x.kv, x.gates, SMALL, None, mask_mod=mask, impl="flex")
    assert set(asked) == {128, 128 * SMALL.compress_stride}
