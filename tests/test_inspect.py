"""A look inside: weights that reproduce the outputs, what was chosen, and pictures."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from torch import Tensor

from conftest import Case, assert_close, cases, part
from flexnsa import (
    AttentionOutput,
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    SelectedBranch,
    Selection,
    SigmoidGate,
    SparseAttention,
    WindowBranch,
    documents_from_lengths,
    window_attention,
)
from flexnsa.inspect import (
    Look,
    draw_branches,
    draw_query,
    draw_selection,
    draw_text,
    look,
    look_at_attention,
    look_at_layer,
)
from flexnsa_masks import alibi, causal, or_masks, prefix

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_local=1, window=5)
PACKED = documents_from_lengths([9, 1, 18], 30)


def layer(**changes) -> NativeSparseAttention:
    torch.manual_seed(0)
    sizes = {"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "value_dim": 3, "rope_theta": 1e4}
    return NativeSparseAttention(**(sizes | changes), config=SMALL).double()


def composition(case: Case, **options) -> SparseAttention:
    parts = {
        "compressed": CompressedBranch(case.config, MeanPool(case.config), **options),
        "selected": SelectedBranch(case.config, **options),
        "window": WindowBranch(case.config, **options),
    }
    gate = SigmoidGate(1, case.heads).double()
    return SparseAttention(parts, gate, selector=ImportanceSelector(case.config))


@given(case=cases(values=("normal",), groups=(1, 3)))
@part(4)
def test_weights_times_values_are_the_outputs(case: Case):
    """For mean pooling too: an equal share of a compressed token's weight times each of its values."""
    x = case.inputs(raw=True)
    attention = composition(case, scale=0.7)
    h = torch.ones(case.batch, case.queries, 1, dtype=torch.float64)
    found = look_at_attention(attention, x.q, x.kv._asdict(), h, **case.placing)
    context = attention.attend(x.q, x.kv._asdict(), h, **case.placing)
    for (name, weights), (_, v) in zip(found.weights.items(), x.pairs, strict=True):
        assert_close([weights @ v.repeat_interleave(case.group, 1)], [context.outputs[name].out])
    assert torch.equal(found.selection.indices, context.selection.indices)
    assert_close([found.importance], [attention.selector.importance(x.q, context)])
    for b in range(case.batch):
        for t in range(case.queries):
            forced = found.forced.expand(case.batch, -1, -1, -1)[b, 0, t].nonzero().flatten().tolist()
            assert set(forced) == case.where.forced(b, t)
    assert not (found.forced & ~found.chosen).any()


@pytest.mark.parametrize("options", ({}, {"documents": PACKED}, {"mask_mod": or_masks(causal(), prefix(7))}))
def test_a_layer_is_looked_into_as_it_is_called(options):
    model, x = layer(), torch.randn(1, 30, 12, dtype=torch.float64)
    found = look_at_layer(model, x, **options)
    _, kv = model.project(x, documents=options.get("documents"))
    mixed = torch.zeros(1, 4, 30, 3, dtype=torch.float64)
    for index, (name, (_, v)) in enumerate(kv._asdict().items()):
        if name == "compressed":  # the layer's compressor is no mean: its tokens' shares are of weights alone
            out = model.attention.attend(*project(model, x, options), **options).outputs[name].out
        else:
            out = found.weights[name] @ v.repeat_interleave(2, 1)
        mixed = mixed + found.gates[..., index, None] * out
    expected = model.o_proj(mixed.transpose(1, 2).flatten(2))
    assert_close([expected], [model(x, **options)])
    sums = found.weights["compressed"].sum(-1)
    assert_close([sums], [(sums > 0.5).double()])


def project(model, x, options):
    q, kv = model.project(x, documents=options.get("documents"))
    return q, kv._asdict(), x


@pytest.mark.parametrize("documents", (None, PACKED), ids=("one", "packed"))
def test_some_queries_are_rows_of_all(documents, monkeypatch):
    model, x = layer(), torch.randn(1, 30, 12, dtype=torch.float64)
    everything = look_at_layer(model, x, documents=documents)
    monkeypatch.setattr(look, "COLUMNS", 7)
    rows = [0, 9, 17, 29]
    some = look_at_layer(model, x, queries=rows, documents=documents)
    assert_close(some.weights.values(), [weights[:, :, rows] for weights in everything.weights.values()])
    assert_close([some.gates, some.importance], [everything.gates[:, :, rows], everything.importance[:, :, rows]])
    assert torch.equal(some.selection.indices, everything.selection.indices[:, :, rows])
    assert torch.equal(some.chosen, everything.chosen[:, :, rows])
    assert torch.equal(some.forced, everything.forced[:, :, rows])
    assert_close([some.mixed], [everything.mixed[:, :, rows]])
    assert not some.mixed.requires_grad


def test_branches_and_selections_of_ones_own():
    """A branch that is no class of the library, a selection that is given, and a composition without any."""
    case = Case(SMALL, kv_heads=2, group=2, tokens=30)
    x, h = case.inputs(), torch.zeros(1, 30, 1, dtype=torch.float64)

    class Slanted:
        def attend(self, q, k, v, context) -> AttentionOutput:
            return window_attention(q, k, v, SMALL, score_mod=alibi(4), **context.options)

    plain = SparseAttention({"slanted": Slanted()}, SigmoidGate(1, 4, 1).double())
    found = look_at_attention(plain, x.q, {"slanted": x.pairs[2]}, h)
    expected = window_attention(x.q, *x.pairs[2], SMALL, score_mod=alibi(4)).out
    assert_close([found.weights["slanted"] @ x.v_win.repeat_interleave(2, 1)], [expected])
    assert found.selection is None and found.importance is None
    with pytest.raises(ValueError, match="holds no selection"):
        _ = found.chosen
    replayed = SparseAttention({"selected": SelectedBranch(SMALL)}, SigmoidGate(1, 4, 1).double())
    first = Selection(torch.zeros(1, 2, 30, 1, dtype=torch.int32))
    found = look_at_attention(replayed, x.q, {"selected": x.pairs[1]}, h, queries=[3, 20], selection=first)
    assert found.chosen.sum() == 4 and not found.weights["selected"][..., 4:].any()


def test_a_branch_that_takes_no_positions_is_looked_at_as_a_whole():
    class Average:
        def attend(self, q, k, v, context) -> AttentionOutput:
            count = torch.arange(1, v.shape[2] + 1, dtype=v.dtype)[:, None]
            return AttentionOutput((v.cumsum(2) / count).repeat_interleave(2, 1), q.new_zeros(q.shape[:3]))

    x, h = Case(SMALL, kv_heads=2, group=2, tokens=9).inputs(), torch.zeros(1, 9, 1, dtype=torch.float64)
    attention = SparseAttention({"average": Average()}, SigmoidGate(1, 4, 1).double())
    weights = look_at_attention(attention, x.q, {"average": x.pairs[2]}, h).weights["average"]
    expected = torch.ones(9, 9).double().tril() / torch.arange(1, 10)[:, None]
    assert_close([weights], [expected.expand(1, 4, 9, 9)])
    with pytest.raises(NotImplementedError, match="never read context.positions"):
        look_at_attention(attention, x.q, {"average": x.pairs[2]}, h, queries=[3])


def picture_of(found: Look):
    text = list("def f(x):\n    return x\n\nprint(f(3))")[:30]
    return {
        "branches": lambda: draw_branches(found, head=1),
        "query": lambda: draw_query(found, 1, head=1),
        "selection": lambda: draw_selection(found),
        "text": lambda: draw_text(found, text, 1),
    }


@pytest.mark.parametrize("documents", (None, PACKED), ids=("one", "packed"))
@pytest.mark.parametrize("name", ("branches", "query", "selection", "text"))
def test_pictures_are_drawn(name, documents, tmp_path):
    found = look_at_layer(
        layer(), torch.randn(1, 30, 12, dtype=torch.float64), queries=[4, 20, 27], documents=documents
    )
    figure = picture_of(found)[name]()
    figure.savefig(tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 5_000
    titles = " ".join(axes.get_title() + axes.get_title(loc="left") for axes in figure.axes)
    expected = {"selection": ("KV head 0", "KV head 1"), "query": ("importance", "window (gate")}
    assert all(word in titles for word in expected.get(name, ("compressed (gate", "all, each times its gate")))


def test_the_bars_of_a_query_are_its_numbers():
    found = look_at_layer(layer(), torch.randn(1, 30, 12, dtype=torch.float64), queries=[4, 27], documents=PACKED)
    importance, compressed, selected, window, mixed = draw_query(found, 1, head=1).axes
    heights = [bar.get_height() for bar in importance.patches]
    torch.testing.assert_close(torch.tensor(heights).double(), found.importance[0, 1, 1])
    assert [bar.get_x() for bar in importance.patches][:2] == [10, 14]  # the document's first blocks
    for axes, weights in zip(
        (compressed, selected, window, mixed), (*found.weights.values(), found.mixed), strict=True
    ):
        expected = weights[0, 2:4, 1].mean(0)
        torch.testing.assert_close(torch.tensor([bar.get_height() for bar in axes.patches]).double(), expected)


def test_looking_needs_torch_alone():
    code = "import sys, flexnsa.inspect; print([m for m in ('triton', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = look_at_layer(layer(), torch.randn(1, 30, 12, dtype=torch.float64))
    with pytest.raises(ImportError, match=r"flexnsa\[viz\]"):
        draw_selection(found)


def test_queries_that_are_not_there():
    x: Tensor = torch.randn(1, 30, 12, dtype=torch.float64)
    with pytest.raises(IndexError):
        look_at_layer(layer(), x, queries=[30])
    with pytest.raises(ValueError, match="strictly increasing"):
        look_at_layer(layer(), x, queries=[7, 3])
