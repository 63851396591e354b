"""Packed documents and padding: a packed row equals every document run alone, and padding does not exist."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from conftest import Case, Inputs, assert_close, cases, gradients, part
from flexnsa import (
    MLPCompressor,
    NativeSparseAttention,
    NSAConfig,
    block_importance,
    compressed_attention,
    documents_from_lengths,
    layout,
    native_sparse_attention,
    select_blocks,
)

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
engines = pytest.mark.parametrize("impl", ("reference", "flex"))


def mlp(case: Case, dtype: torch.dtype = torch.float64) -> MLPCompressor:
    torch.manual_seed(case.seed)
    compressor = MLPCompressor(case.config, num_kv_heads=case.kv_heads, head_dim=case.dim, value_dim=case.value_dim)
    return compressor.to(dtype)


def each_document(documents: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, tokens) of every document."""
    for b, row in enumerate(documents.tolist()):
        for owner in sorted(set(row) - {-1}):
            first = row.index(owner)
            yield b, slice(first, first + row.count(owner))


def one(x: Inputs, row: int, tokens: slice) -> Inputs:
    return Inputs(*(y[row : row + 1, :, tokens] for y in x))


def attend(x: Inputs, case: Case, compressor: MLPCompressor, documents: Tensor | None, impl: str) -> Tensor:
    with torch.set_grad_enabled(impl == "reference"):
        return native_sparse_attention(x.q, x.kv, x.gates, case.config, compressor, documents=documents, impl=impl)


@engines
@given(case=cases(positions=False, values=("normal",)))
@part(2)
def test_a_packed_row_equals_every_document_alone(impl: str, case: Case):
    """Outputs, gradients of all inputs, and gradients of the compressor, which sees each document from its start."""
    assume(case.documents is not None)
    x, compressor = case.inputs(grad=True, raw=True), mlp(case)
    packed = attend(x, case, compressor, case.documents, impl)
    alone = torch.zeros_like(packed)
    for b, tokens in each_document(case.documents):
        alone[b : b + 1, :, tokens] = attend(one(x, b, tokens), case, compressor, None, impl)
    assert_close([packed], [alone])
    if impl == "reference":
        leaves = [*x, *compressor.parameters()]
        assert_close(gradients([packed], leaves), gradients([alone], leaves))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of what the interpreter then masks
@pytest.mark.parametrize("impl", ("reference", "flex", "triton"))
def test_any_lengths_on_every_engine_that_has_gradients(impl: str):
    """One token, shorter than a block, as long, longer than the window and than what is selected; gradients too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if impl == "flex" and device == "cpu":
        pytest.skip("FlexAttention has no backward on a CPU")
    lengths = (1, 3, 4, 1, 5, 18)
    documents = documents_from_lengths(lengths, sum(lengths) + 2).to(device)
    case = Case(SMALL, kv_heads=2, group=2, dim=16, value_dim=16, tokens=documents.shape[1])
    x = Inputs(*(y.to(device).requires_grad_() for y in case.inputs(torch.float32, raw=True)))
    compressor = mlp(case, torch.float32).to(device)
    packed = native_sparse_attention(x.q, x.kv, x.gates, SMALL, compressor, documents=documents, impl=impl)
    alone = [
        native_sparse_attention(y.q, y.kv, y.gates, SMALL, compressor, impl=impl)
        for y in (one(x, *place) for place in each_document(documents))
    ]
    alone = torch.nn.functional.pad(torch.cat(alone, dim=2), (0, 0, 0, 2))
    leaves = [*x, *compressor.parameters()]
    assert_close([packed], [alone])
    assert_close(gradients([packed], leaves), gradients([alone], leaves))


@given(case=cases(positions=False, values=("normal", "flat")))
@part(2)
def test_indices_are_local_to_the_document(case: Case):
    """Importance and indices of a document in a row are those of the document alone, in the row's wider tables."""
    assume(case.documents is not None)
    x, compressor, config = case.inputs(raw=True), mlp(case), case.config
    rows = [[first for first in row] for row in case.where.starts()]
    starts = torch.tensor(rows, dtype=torch.int64).view(case.batch, case.where.num_compressed)

    def choose(y: Inputs, starts: Tensor | None, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp = (z.detach() for z in compressor(y.k_cmp, y.v_cmp, starts=starts))
        lse = compressed_attention(y.q, k_cmp, v_cmp, config, documents=documents, impl="reference").lse
        keywords = {"num_tokens": y.q.shape[2], "documents": documents}
        importance = block_importance(y.q, k_cmp, lse, config, **keywords)
        return importance, select_blocks(y.q, k_cmp, lse, config, impl="reference", **keywords).indices

    importance, indices = choose(x, starts, case.documents)
    for b, tokens in each_document(case.documents):
        expected, chosen = choose(one(x, b, tokens), None, None)
        blocks = expected.shape[-1]
        assert torch.equal(indices[b : b + 1, :, tokens], chosen)
        assert_close([importance[b : b + 1, :, tokens, :blocks]], [expected])
        assert not importance[b : b + 1, :, tokens, blocks:].any()
    padding = case.documents < 0
    assert (indices.transpose(1, 2)[padding] == -1).all()
    assert not importance.transpose(1, 2)[padding].any()


@engines
@given(
    case=cases(positions=False, documents=False, values=("normal",)), left=st.integers(0, 9), right=st.integers(0, 9)
)
@part(2)
def test_a_padded_row_equals_the_unpadded_one(impl: str, case: Case, left: int, right: int):
    x, compressor = case.inputs(raw=True), mlp(case)
    padded = Inputs(*(torch.nn.functional.pad(y, (0, 0, left, right), value=3.0) for y in x))
    documents = torch.nn.functional.pad(torch.zeros(case.batch, case.tokens).long(), (left, right), value=-1)
    found = attend(padded, case, compressor, documents, impl)
    assert_close([found[:, :, left : left + case.tokens]], [attend(x, case, compressor, None, impl)])
    assert not found[:, :, :left].any()
    assert not found[:, :, left + case.tokens :].any()


@given(case=cases(positions=False, values=("normal",)))
@part(2)
def test_padding_may_hold_nan(case: Case):
    """In every input, gates included: the bits of the output and of its gradients stay, and padding outputs 0."""
    assume(case.documents is not None)
    compressor, padding = mlp(case), (case.documents < 0)[:, None, :, None]
    results = []
    for filler in (0.0, torch.nan):
        x = Inputs(*(y.masked_fill(padding, filler) for y in case.inputs(raw=True))).to(torch.float64, grad=True)
        out = attend(x, case, compressor, case.documents, "reference")
        assert not out.masked_select(padding).any()
        results.append([out, *gradients([out], [*x, *compressor.parameters()])])
    clean, poisoned, own = *results, 1 + len(x)
    assert all(torch.equal(a, b) for a, b in zip(clean[:own], poisoned[:own], strict=True))
    assert_close(clean[own:], poisoned[own:])  # sums over all tokens, added in an order that depends on their layout


@engines
@given(case=cases(positions=False, values=("normal", "hot")), data=st.data())
@part(2)
def test_another_documents_tokens_change_nothing(impl: str, case: Case, data: st.DataObject):
    """Bit for bit, earlier documents and later ones."""
    assume(case.documents is not None and (case.documents >= 0).any())
    x, compressor = case.inputs(raw=True), mlp(case)
    row, tokens = data.draw(st.sampled_from(list(each_document(case.documents))))
    changed = Inputs(*(y.clone() for y in x))
    for y in changed:
        y[row, :, tokens] = 7 - 3 * y[row, :, tokens]
    mine = torch.zeros(case.batch, case.tokens, dtype=torch.bool)
    mine[row, tokens] = True
    before, after = (attend(y, case, compressor, case.documents, impl) for y in (x, changed))
    assert torch.equal(before.transpose(1, 2)[~mine], after.transpose(1, 2)[~mine])


@given(case=cases(values=("normal",)), factor=st.integers(1, 9), shift=st.integers(0, 9))
@part(2)
def test_only_where_ids_change_matters(case: Case, factor: int, shift: int):
    assume(case.documents is not None)
    x = case.inputs()
    renumbered = torch.where(case.documents < 0, -1, case.documents * factor + shift)
    for dtype in (torch.int64, torch.int32):
        same = replace(case, documents=renumbered.to(dtype))
        found, expected = (
            native_sparse_attention(x.q, x.kv, x.gates, case.config, None, impl="reference", **each.placing)
            for each in (same, case)
        )
        assert torch.equal(found, expected)


@engines
def test_one_document_that_fills_the_row_changes_nothing(impl: str):
    case = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=15)
    x, compressor = case.inputs(raw=True), mlp(case)
    found = attend(x, case, compressor, torch.full((2, 15), 4), impl)
    assert_close([found], [attend(x, case, compressor, None, impl)])


@engines
def test_a_row_of_padding_alone_is_zero(impl: str):
    case = Case(SMALL, batch=2, kv_heads=2, group=3, value_dim=3, tokens=15)
    x, compressor = case.inputs(raw=True), mlp(case)
    found = attend(x, case, compressor, torch.tensor([[-1] * 15, [0] * 15]), impl)
    assert not found[0].any()
    assert_close([found[1:]], [attend(one(x, 1, slice(None)), case, compressor, None, impl)])


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    (
        ([2, 3], 5, [[0, 0, 1, 1, 1]]),
        ([2, 3], 7, [[0, 0, 1, 1, 1, -1, -1]]),
        ([[1, 2], [4]], 4, [[0, 1, 1, -1], [0, 0, 0, 0]]),
        ([[3], []], 3, [[0, 0, 0], [-1, -1, -1]]),
        ([], 2, [[-1, -1]]),
    ),
)
def test_documents_from_lengths(lengths: list, tokens: int, expected: list[list[int]]):
    found = documents_from_lengths(lengths, tokens)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(("lengths", "named"), (([3, 3], "tokens=5"), ([0, 3], "lengths"), ([[2], [9]], "tokens=5")))
def test_documents_from_lengths_refuses_what_does_not_fit(lengths: list, named: str):
    with pytest.raises(ValueError, match=named):
        documents_from_lengths(lengths, 5)


def test_ids_are_read_once_a_call_and_again_when_changed(monkeypatch):
    read = []
    check = layout._check_document_values
    monkeypatch.setattr(layout, "_check_document_values", lambda documents: (read.append(1), check(documents)))
    layer = NativeSparseAttention(dim=8, num_heads=2, num_kv_heads=1, head_dim=4, config=SMALL)
    x, documents = torch.randn(1, 15, 8), documents_from_lengths([7, 8], 15)
    layer(x, documents=documents)
    layer(x, documents=documents)
    assert len(read) == 1
    layer(x, documents=documents.clone())
    assert len(read) == 2
    documents[0, -1] = 0
    with pytest.raises(ValueError, match="non-decreasing"):
        layer(x, documents=documents)
    with torch.inference_mode():
        layer(x, documents=documents_from_lengths([7, 8], 15))
