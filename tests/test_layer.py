"""The layer equals the functional API with its projections written out, and trains all that it has."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import assert_close, gradients
from flexnsa import (
    BranchKV,
    GatedPool,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    documents_from_lengths,
    native_sparse_attention,
)

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)
BRANCHES = ("compressed", "selected", "window")
SIZES = {"dim": 12, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "value_dim": 3}
PACKED = documents_from_lengths([[9, 14], [23]], 26)
variants = pytest.mark.parametrize(
    "options",
    (
        {},
        {"shared_kv": True},
        {"rope_theta": 100.0},
        {"qk_norm": True},
        {"shared_kv": True, "rope_theta": 100.0, "qk_norm": True},
        {"compressor": MeanPool(CONFIG), "rope_theta": 100.0},
    ),
    ids=lambda options: "+".join(options) or "plain",
)


def build(**options) -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(**{"config": CONFIG, **SIZES, **options}).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def sequence(batch: int = 2, tokens: int = 26) -> Tensor:
    return torch.randn(batch, tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rotated(x: Tensor, places: list[list[int]], theta: float | None) -> Tensor:
    """Elements i and i + d/2 as one complex number, turned by place * theta ** (-2 i / d)."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    turn = [[[math.e ** (1j * place * theta ** (-i / half)) for i in range(half)] for place in row] for row in places]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.tensor(turn, dtype=torch.complex128)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
    if not hasattr(norm, "weight"):
        return x
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def by_hand(layer: NativeSparseAttention, x: Tensor, documents: Tensor | None, rope_theta: float | None) -> Tensor:
    """The layer's formula, token by token where the layer has tables."""
    rows = documents.tolist() if documents is not None else [[0] * x.shape[1]] * len(x)
    place = [[t - row.index(owner) if owner >= 0 else 0 for t, owner in enumerate(row)] for row in rows]
    grids = []
    for row in rows:
        grid = []
        for owner in sorted(set(row) - {-1}):
            first, size = row.index(owner), row.count(owner)
            grid += [(first + i, i + 3) for i in range(0, size - 3, 2)]
        grids.append(grid + [(-1, 0)] * ((x.shape[1] - 4) // 2 + 1 - len(grid)))
    starts = torch.tensor([[start for start, _ in grid] for grid in grids])
    ends = [[end for _, end in grid] for grid in grids]

    def heads(y: Tensor, projection: torch.nn.Linear, dim: int) -> Tensor:
        return F.linear(y, projection.weight).unflatten(-1, (-1, dim)).transpose(1, 2)

    pairs = []
    for name in BRANCHES:
        key = "shared" if "shared" in layer.k_proj else name
        k, v = heads(x, layer.k_proj[key], 4), heads(x, layer.v_proj[key], 3)
        if name == "compressed":
            k, v = layer.compressor(k, v, starts=starts)
        k = rotated(normed(k, layer.k_norm[name]), ends if name == "compressed" else place, rope_theta)
        pairs.append((k, v))
    q = rotated(normed(heads(x, layer.q_proj, 4), layer.q_norm), place, rope_theta)
    gate = layer.attention.gate.proj
    gates = F.linear(x, gate.weight, gate.bias).sigmoid().unflatten(-1, (6, 3)).transpose(1, 2)
    out = native_sparse_attention(q, BranchKV(*pairs), gates, CONFIG, None, documents=documents, impl="reference")
    return F.linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight)


@variants
@pytest.mark.parametrize("documents", (None, PACKED), ids=("row", "packed"))
def test_equals_the_functional_api_by_hand(options: dict, documents: Tensor | None):
    layer, x = build(**options), sequence().requires_grad_()
    found = layer(x, documents=documents)
    expected = by_hand(layer, x, documents, options.get("rope_theta"))
    leaves = [x, *layer.parameters()]
    assert_close([found], [expected])
    assert_close(gradients([found], leaves), gradients([expected], leaves))


@variants
def test_gradients_reach_every_parameter(options: dict):
    layer, x = build(**options), sequence().requires_grad_()
    found = gradients([layer(x)], [x, *layer.parameters()])
    for (name, _), dx in zip([("x", x), *layer.named_parameters()], found, strict=True):
        assert dx.isfinite().all(), name
        # Of the position embeddings and biases too: no slice of any parameter is left out.
        assert (dx.flatten(1) if dx.ndim > 1 else dx[:, None]).any(1).all(), name


@variants
def test_causality_bit_for_bit(options: dict):
    layer, x = build(**options), sequence()
    changed = torch.cat((x[:, :11], -2 * x[:, 11:]), 1)
    assert torch.equal(layer(x)[:, :11], layer(changed)[:, :11])


@variants
def test_a_packed_row_equals_every_document_alone(options: dict):
    layer, x = build(**options), sequence().requires_grad_()
    packed = layer(x, documents=PACKED)
    alone = torch.zeros_like(packed)
    for row, tokens in ((0, slice(0, 9)), (0, slice(9, 23)), (1, slice(0, 23))):
        alone[row : row + 1, tokens] = layer(x[row : row + 1, tokens])
    leaves = [x, *layer.parameters()]
    assert_close([packed], [alone])
    assert_close(gradients([packed], leaves), gradients([alone], leaves))


@variants
def test_padding_may_hold_nan(options: dict):
    layer = build(**options)
    documents = torch.tensor([[-1] * 3 + [0] * 20 + [-1] * 3, [1] * 26])
    results = []
    for filler in (0.0, torch.nan):
        x = sequence().masked_fill(documents[..., None] < 0, filler).requires_grad_()
        out = layer(x, documents=documents)
        assert not out[documents < 0].any()
        results.append([out, *gradients([out], [x, *layer.parameters()])])
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))


def test_rotation_is_relative():
    """The same tokens further on in a row of their own document: angles restart, so nothing changes."""
    layer, x = build(rope_theta=10.0), sequence(1, 20)
    late = F.pad(x, (0, 0, 6, 0), value=1.0)
    documents = torch.tensor([[0] * 6 + [1] * 20])
    assert_close([layer(late, documents=documents)[:, 6:]], [layer(x)])


def test_branches_have_projections_of_their_own_unless_shared():
    apart, shared = build(), build(shared_kv=True)
    assert set(apart.k_proj) == set(apart.v_proj) == set(BRANCHES)
    assert len(shared.k_proj) == len(shared.v_proj) == 1
    assert apart.k_proj["selected"].weight.shape == (8, 12)
    assert apart.v_proj["window"].weight.shape == (6, 12)


@pytest.mark.parametrize("tokens", (1, 3, 4, 5))
def test_short_sequences(tokens: int):
    layer, x = build(rope_theta=10.0, qk_norm=True), sequence(2, tokens).requires_grad_()
    out = layer(x)
    assert out.shape == x.shape
    assert all(dx.isfinite().all() for dx in gradients([out], [x, *layer.parameters()]))


def test_value_dim_defaults_to_head_dim_and_the_compressor_to_an_mlp():
    layer = NativeSparseAttention(dim=8, num_heads=4, num_kv_heads=1, head_dim=6, config=CONFIG)
    assert layer.o_proj.weight.shape == (8, 24)
    assert type(layer.compressor).__name__ == "MLPCompressor"
    assert layer(torch.randn(1, 9, 8)).shape == (1, 9, 8)


def test_a_given_compressor_is_used_and_trained():
    compressor = GatedPool(CONFIG, num_kv_heads=2, head_dim=4, value_dim=3)
    layer = build(compressor=compressor)
    assert layer.compressor is compressor
    assert {id(p) for p in compressor.parameters()} <= {id(p) for p in layer.parameters()}


def test_every_parameter_is_listed_once_and_survives_saving_and_copying():
    layer, x = build(rope_theta=10.0, qk_norm=True), sequence()
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(layer.parameters()))
    fresh = NativeSparseAttention(config=CONFIG, **SIZES, rope_theta=10.0, qk_norm=True).double()
    fresh.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    expected = layer(x)
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        copied.compressor.k_pool.up.zero_()
        copied.attention.gate.proj.bias.fill_(3.0)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(copied(x), expected)


@pytest.mark.parametrize("options", ({}, {"rope_theta": 10.0, "qk_norm": True}), ids=("plain", "rope+qk_norm"))
def test_half_precision_layer(options: dict):
    """A bfloat16 layer, and a float32 one under autocast: both run and stay near the float64 one."""
    layer, x = build(**options), sequence()
    exact = layer(x)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(layer).float()(x.float())
    for found in (low, mixed):
        # Loose, since a selection may differ; what it shows is that dtypes fit throughout.
        assert (found.double() - exact).abs().mean() <= 0.1 * exact.abs().mean()


def test_flex_layer_equals_reference():
    layer, other = build(rope_theta=10.0).float(), build(rope_theta=10.0, impl="flex").float()
    x = sequence().float()
    with torch.no_grad():
        for documents in (None, PACKED):
            assert_close([other(x, documents=documents)], [layer(x, documents=documents)])


@pytest.mark.parametrize(
    ("backend", "packed"),
    (("eager", False), pytest.param("aot_eager", True, marks=pytest.mark.thorough)),
    ids=("forward", "packed-with-backward"),
)
def test_compiles_in_one_graph_and_keeps_it_when_the_length_changes(backend: str, packed: bool):
    torch._dynamo.reset()
    layer = build(rope_theta=10.0, qk_norm=True)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (26, 30, 41):
        x = sequence(2, tokens).requires_grad_()
        documents = documents_from_lengths([[9, 10], [tokens]], tokens) if packed else None
        for tensor in (x, documents) if packed else (x,):
            torch._dynamo.mark_dynamic(tensor, 1)
        found, expected = compiled(x, documents=documents), layer(x, documents=documents)
        leaves = [x, *layer.parameters()]
        assert_close([found], [expected])
        assert_close(gradients([found], leaves), gradients([expected], leaves))
        assert counter.frame_count == 1
