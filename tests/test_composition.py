"""SparseAttention: NSA as three branches, and branches and selectors of one's own."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Case, Inputs, assert_close, cases, gradients, part
from flexnsa import (
    AttentionContext,
    AttentionOutput,
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    MLPCompressor,
    NSAConfig,
    SelectedBranch,
    Selection,
    SigmoidGate,
    SparseAttention,
    WindowBranch,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from flexnsa_masks import and_masks, causal, or_masks, prefix

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=4)


def constant(gates: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: gates


def compose(config: NSAConfig, compressor: nn.Module | None, gate: Callable[[Tensor], Tensor], **options):
    branches = {
        "compressed": CompressedBranch(config, compressor, **options),
        "selected": SelectedBranch(config, **options),
        "window": WindowBranch(config, **options),
    }
    selector = ImportanceSelector(config)
    return SparseAttention(branches, gate, selector=selector, impl="reference")


def nothing(case: Case) -> Tensor:
    """The layer's input, where the gate does not read it."""
    return torch.zeros(case.batch, case.queries, 1)


class Own:
    """A selector of one's own: each query's own block."""

    def select(self, q: Tensor, context: AttentionContext) -> Selection:
        own = torch.arange(q.shape[2], dtype=torch.int32) // CONFIG.select_block
        return Selection(own[None, None, :, None].expand(q.shape[0], 2, -1, 1).contiguous())


class Average:
    """A branch of one's own, no module: the mean of all values so far."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
        count = torch.arange(1, v.shape[2] + 1, dtype=v.dtype)
        mean = (v.cumsum(2) / count[:, None]).repeat_interleave(q.shape[1] // v.shape[1], 1)
        return AttentionOutput(mean, count.log().expand(q.shape[:3]))


@given(case=cases(values=("normal", "hot")), scale=st.sampled_from((None, 0.3)))
@part(2)
def test_three_branches_are_native_sparse_attention(case: Case, scale: float | None):
    torch.manual_seed(case.seed)
    x = case.inputs(grad=True, raw=True)
    compressor = MLPCompressor(
        case.config, num_kv_heads=case.kv_heads, head_dim=case.dim, value_dim=case.value_dim
    ).double()
    composed = compose(case.config, compressor, constant(x.gates), scale=scale)
    found = composed(x.q, x.kv._asdict(), nothing(case), **case.placing)
    expected = native_sparse_attention(
        x.q, x.kv, x.gates, case.config, compressor, scale=scale, impl="reference", **case.placing
    )
    leaves = [*x, *compressor.parameters()]
    assert torch.equal(found, expected)
    assert_close(gradients([found], leaves), gradients([expected], leaves))


def test_padding_may_hold_nan():
    documents = torch.tensor([[-1] * 3 + [0] * 9 + [-1]])
    case = Case(CONFIG, kv_heads=2, group=2, tokens=13, documents=documents)
    padding = (documents < 0)[:, None, :, None]
    x = Inputs(*(y.masked_fill(padding, torch.nan) for y in case.inputs(raw=True)))
    compressor = MLPCompressor(CONFIG, num_kv_heads=2, head_dim=4).double()
    out = compose(CONFIG, compressor, constant(x.gates))(x.q, x.kv._asdict(), nothing(case), documents=documents)
    assert out.isfinite().all()
    assert not out.masked_select(padding).any()


def test_a_branch_of_ones_own():
    case = Case(CONFIG, batch=2, kv_heads=2, group=3, value_dim=3, tokens=11)
    x = case.inputs()
    composed = SparseAttention(
        {"average": Average(), "window": WindowBranch(CONFIG)}, constant(x.gates[..., :2]), impl="reference"
    )
    found = composed(x.q, {"average": (x.k_slc, x.v_slc), "window": (x.k_win, x.v_win)}, nothing(case))
    mean = Average().attend(x.q, x.k_slc, x.v_slc, None).out
    window = window_attention(x.q, x.k_win, x.v_win, CONFIG).out
    assert_close([found], [x.gates[..., :1] * mean + x.gates[..., 1:2] * window])


def test_a_selector_of_ones_own():
    case = Case(CONFIG, batch=2, kv_heads=2, group=3, value_dim=3, tokens=11)
    x = case.inputs()
    composed = SparseAttention(
        {"chosen": SelectedBranch(CONFIG)}, constant(x.gates[..., :1]), selector=Own(), impl="reference"
    )
    found = composed(x.q, {"chosen": (x.k_slc, x.v_slc)}, nothing(case))
    chosen = Own().select(x.q, None)
    expected = selected_attention(x.q, x.k_slc, x.v_slc, chosen, CONFIG, impl="reference").out
    assert_close([found], [x.gates[..., :1] * expected])


def test_branches_and_selectors_see_the_context():
    """Positions, documents, the engine, and what earlier branches returned and attended to, by name."""
    documents = torch.tensor([[0] * 6 + [1] * 5] * 2)
    case = Case(CONFIG, batch=2, kv_heads=2, group=2, tokens=11, positions=torch.tensor([2, 7, 9]), documents=documents)
    x, seen = case.inputs(), {}

    class Spy:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
            window, output = context.earlier("window")
            seen.update(context=context, k=window.k, v=window.v, selection=context.selection)
            return AttentionOutput(2 * output.out, output.lse)

    class Nothing:
        def select(self, q: Tensor, context: AttentionContext) -> Selection:
            seen["asked"] = seen.get("asked", 0) + 1
            return Selection(torch.full((2, 2, 3, 1), -1, dtype=torch.int32))

    composed = SparseAttention(
        {"window": WindowBranch(CONFIG), "spy": Spy(), "chosen": SelectedBranch(CONFIG)},
        constant(torch.ones_like(x.gates)),
        selector=Nothing(),
        impl="reference",
    )
    pairs = {"window": (x.k_win, x.v_win), "spy": (x.k_slc, x.v_slc), "chosen": (x.k_slc, x.v_slc)}
    found = composed(x.q, pairs, nothing(case), **case.placing)
    expected = window_attention(x.q, x.k_win, x.v_win, CONFIG, **case.placing).out
    assert_close([found], [3 * expected])
    assert seen["k"] is x.k_win and seen["v"] is x.v_win
    assert seen["asked"] == 1
    context = seen["context"]
    assert context.positions is case.positions and context.documents is case.documents
    assert context.impl == "reference" and context.num_tokens == 11
    assert list(context.outputs) == ["window", "spy", "chosen"]


def test_importance_can_come_from_a_branch_of_another_name():
    case = Case(CONFIG, kv_heads=2, group=2, tokens=21)
    x = case.inputs()
    branches = {"coarse": CompressedBranch(CONFIG), "fine": SelectedBranch(CONFIG), "near": WindowBranch(CONFIG)}
    selector = ImportanceSelector(CONFIG, branch="coarse")
    composed = SparseAttention(branches, constant(x.gates), selector=selector, impl="reference")
    found = composed(x.q, dict(zip(branches, x.pairs, strict=True)), nothing(case))
    assert torch.equal(found, native_sparse_attention(x.q, x.kv, x.gates, CONFIG, None, impl="reference"))


def test_parameters_of_branches_gate_and_selector_are_found():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
            out, lse = window_attention(q, k, v, CONFIG, **context.options)
            return AttentionOutput(self.factor * out, lse)

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()))

        def select(self, q: Tensor, context: AttentionContext) -> Selection:
            raise AssertionError("no branch asks for a selection")

    compressor = MLPCompressor(CONFIG, num_kv_heads=1, head_dim=4)
    branches = {"compressed": CompressedBranch(CONFIG, compressor), "scaled": Scaled(), "average": Average()}
    composed = SparseAttention(branches, SigmoidGate(6, 2, 3), selector=Learned())
    found = {id(p) for p in composed.parameters()}
    modules = (compressor, branches["scaled"], composed.gate, composed.selector)
    assert found == {id(p) for module in modules for p in module.parameters()}
    x, q, kv = torch.randn(1, 9, 6), torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4)
    composed(q, dict.fromkeys(branches, (kv, kv)), x).sum().backward()
    assert branches["scaled"].factor.grad != 0


@pytest.mark.parametrize(
    ("branches", "selector", "named"),
    (
        ({"chosen": SelectedBranch(CONFIG)}, None, "selector"),
        (
            {"chosen": SelectedBranch(CONFIG), "compressed": CompressedBranch(CONFIG)},
            ImportanceSelector(CONFIG),
            "order",
        ),
    ),
)
def test_a_selection_that_cannot_be_made(branches: dict, selector: ImportanceSelector | None, named: str):
    case = Case(CONFIG, kv_heads=2, group=2, tokens=21)
    x = case.inputs()
    pairs = {"chosen": x.pairs[1], "compressed": x.pairs[0]}
    composed = SparseAttention(branches, constant(x.gates[..., : len(branches)]), selector=selector)
    with pytest.raises(ValueError, match=named):
        composed(x.q, {name: pairs[name] for name in branches}, nothing(case))


def test_sigmoid_gate():
    """One gate for each head, token and branch: the sigmoid of a linear function of the input."""
    gate, x = SigmoidGate(6, 4, 3).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    found = gate(x)
    assert found.shape == (2, 4, 5, 3)
    logits = x @ gate.proj.weight.T + gate.proj.bias
    assert_close([found[1, 2, 3]], [logits[1, 3].view(4, 3)[2].sigmoid()])


def test_a_replaced_branch_module_is_the_one_that_runs():
    attention = SparseAttention({"near": WindowBranch(NSAConfig(window=8))}, gate=SigmoidGate(8, 2, 1))
    q, k, x = torch.randn(1, 2, 20, 4), torch.randn(1, 1, 20, 4), torch.randn(1, 20, 8)
    before = attention(q, {"near": (k, k)}, x)
    attention.branch_modules["near"] = WindowBranch(NSAConfig(window=1))
    assert not torch.equal(attention(q, {"near": (k, k)}, x), before)


def test_scores_are_those_of_the_branch_that_is_read():
    """A scale and a score mod of the compressed branch reach the selector, which has none of its own."""
    case = Case(CONFIG, kv_heads=2, group=2, tokens=41)
    x, options = case.inputs(), {"scale": 1.7, "score_mod": lambda s, b, h, i, j: -s}
    composed = SparseAttention(
        {"compressed": CompressedBranch(CONFIG, **options), "selected": SelectedBranch(CONFIG)},
        constant(x.gates[..., :2]),
        selector=ImportanceSelector(CONFIG),
    )
    context = composed.attend(x.q, {"compressed": x.pairs[0], "selected": x.pairs[1]}, nothing(case))
    lse = context.outputs["compressed"].lse
    expected, others = (
        select_blocks(x.q, x.k_cmp, lse, CONFIG, num_tokens=41, **chosen) for chosen in (options, {"scale": 1.7})
    )
    assert torch.equal(context.selection.indices, expected.indices)
    assert not torch.equal(expected.indices, others.indices)


def test_the_halves_of_a_call_and_a_replayed_selection():
    """Between them stand the outputs and the selection, which another call takes instead of its selector's."""
    case = Case(CONFIG, batch=2, kv_heads=2, group=2, tokens=30)
    x = case.inputs(raw=True)
    composed = compose(CONFIG, MeanPool(CONFIG), constant(x.gates))
    context = composed.attend(x.q, x.kv._asdict(), nothing(case))
    out = composed.mix(context)
    assert torch.equal(out, composed(x.q, x.kv._asdict(), nothing(case)))
    alone = SparseAttention({"selected": SelectedBranch(CONFIG)}, constant(torch.ones_like(x.gates[..., :1])))
    replayed = alone(x.q, {"selected": x.pairs[1]}, nothing(case), selection=context.selection)
    assert torch.equal(replayed, context.outputs["selected"].out)
    own = Own().select(x.q, None)
    changed = composed.attend(x.q, x.kv._asdict(), nothing(case), selection=own)
    assert changed.selection is own
    assert not torch.equal(composed.mix(changed), out)


@given(case=cases(values=("flat",)))
@part(4)
def test_own_block_counts_from_the_document(case: Case):
    x, seen = case.inputs(), []

    class Asks:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
            seen.append(context.own_block(case.config))
            return window_attention(q, k, v, case.config, **context.options)

    SparseAttention({"asks": Asks()}, constant(x.gates[..., :1]))(
        x.q, {"asks": x.pairs[2]}, nothing(case), **case.placing
    )
    found = seen[0].expand(case.batch, 1, case.queries, 1)
    for b in range(case.batch):
        for t in range(case.queries):
            document = case.where.document(b, t)
            place = document.index(case.where.positions[b][t]) if document else -1
            assert found[b, 0, t, 0] == (place // case.config.select_block if document else -1)


def test_a_narrowed_mask_is_a_further_one():
    case = Case(CONFIG, kv_heads=2, group=2, tokens=21)
    x = case.inputs()

    class Even:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
            options = context.narrowed(lambda b, h, i, j: j % 2 == 0)
            return window_attention(q, k, v, NSAConfig(window=21), **options)

    composed = SparseAttention({"even": Even()}, constant(torch.ones_like(x.gates[..., :1])))
    for mask in (None, or_masks(causal(), prefix(8))):
        found = composed(x.q, {"even": x.pairs[2]}, nothing(case), mask_mod=mask)
        both = and_masks(mask or causal(), lambda b, h, i, j: j % 2 == 0)
        expected = window_attention(x.q, *x.pairs[2], NSAConfig(window=21), mask_mod=both).out
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("documents", torch.zeros(2, 11, dtype=torch.int64)),
        ("positions", torch.arange(11)),
        ("mask_mod", causal()),
    ),
)
def test_a_branch_that_cannot_hold_what_the_call_asks_for(name: str, value: object):
    """It never looked: the output would be that of another question."""
    case = Case(CONFIG, batch=2, kv_heads=2, group=3, tokens=11)
    x = case.inputs()
    branches = {"window": WindowBranch(CONFIG), "average": Average()}
    composed = SparseAttention(branches, constant(x.gates[..., :2]))
    pairs = {"average": x.pairs[1], "window": x.pairs[2]}
    with pytest.raises(NotImplementedError, match=f'branch "average" was given {name} and never read context.{name}'):
        composed(x.q, pairs, nothing(case), **{name: value})


def test_a_selector_does_not_read_for_its_branch():
    """A branch that asks for the selection alone has not seen the documents, though the selector has."""
    case = Case(CONFIG, kv_heads=2, group=2, tokens=11, documents=torch.zeros(1, 11, dtype=torch.int64))
    x = case.inputs()

    class Reads:
        def select(self, q: Tensor, context: AttentionContext) -> Selection:
            assert context.documents is case.documents
            return Selection(torch.zeros(1, 2, 11, 1, dtype=torch.int32))

    class Gathers:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
            return AttentionOutput(q * context.selection.indices.sum(), q[..., 0])

    composed = SparseAttention({"own": Gathers()}, constant(x.gates[..., :1]), selector=Reads())
    with pytest.raises(NotImplementedError, match="never read context.documents"):
        composed(x.q, {"own": x.pairs[1]}, nothing(case), documents=case.documents)
