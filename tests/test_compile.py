"""torch.compile takes the layer whole: no graph break, and eager's outputs and gradients to rounding."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flexnsa import (
    CompressedBranch,
    ImportanceBias,
    ImportanceSelector,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    SelectedBranch,
    Selection,
    SigmoidGate,
    SparseAttention,
    WindowBranch,
    compressed_attention,
    documents_from_lengths,
    selected_attention,
    window_attention,
)
from flexnsa.compression import compress
from flexnsa_masks import and_masks, causal, dilated, prefix

CONFIG = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=10)
LENGTHS = (65, 100, 128, 333, 512, 1000, 2048, 4097, 9999, 20000)


def layer_on(device: str, impl: str = "auto", **changes: object) -> NativeSparseAttention:
    torch.manual_seed(0)
    sizes = {
        "dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "config": CONFIG,
        "rope_theta": 1e4,
    } | changes
    return NativeSparseAttention(**sizes, impl=impl).to(device)


class Transformer(nn.Module):
    """A block around the layer, as users have it."""

    def __init__(self, device: str, impl: str = "auto", **changes: object):
        super().__init__()
        self.attention = layer_on(device, impl, qk_norm=True, **changes)
        self.norms = nn.ModuleList(nn.RMSNorm(64, device=device) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(device)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def outputs_and_gradients(layer, x, **options):
    x = x.detach().requires_grad_()
    # With symbols of batch and length in one size, Inductor of torch 2.11 fails on the dense engine's reductions.
    torch._dynamo.mark_static(x, 0)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def assert_alike(compiled, eager, x, **options):
    found, expected = (outputs_and_gradients(f, x, **options) for f in (compiled, eager))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_the_graph_is_whole_on_a_cpu():
    layer = layer_on("cpu", qk_norm=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 50, 64)
    documents = documents_from_lengths([[20, 1, 29], [30]], 50)
    for ids in (None, documents):
        torch.testing.assert_close(compiled(x, documents=ids), layer(x, documents=ids))


def test_flex_is_captured_whole_on_a_cpu():
    """Forward only, as FlexAttention is there; what the composition notes between branches must survive the capture."""
    layer = layer_on("cpu", "flex", qk_norm=True)
    x = torch.randn(2, 65, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_one_graph_for_many_lengths_on_a_cpu():
    """As the front end that CUDA has too captures it; then a length below every block, which takes another one."""
    torch._dynamo.reset()
    counters.clear()
    layer = layer_on("cpu", head_dim=8)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (65, 66, 100, 127):
        x = torch.randn(1, tokens, 64)
        for a, b in zip(*(outputs_and_gradients(f, x) for f in (compiled, layer)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert graphs() == 1
    x = torch.randn(1, 1, 64)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_last_block_that_is_not_whole_is_compiled_on_a_cpu():
    """Not fused: beside other loops Inductor does not cut those that it cuts wrongly."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 65, 8) for heads in (2, 1, 1))
    own = torch.arange(65)[:, None] // CONFIG.select_block
    scores = torch.rand(1, 1, 65, 5).masked_fill(torch.arange(5) > own, -torch.inf)
    selection = Selection.from_scores(scores, CONFIG.num_selected)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selected_attention(q, k, v, selection, CONFIG, impl="reference").out

    with torch.no_grad(), torch._inductor.config.patch(max_fusion_size=1):
        found = torch.compile(attend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_masks_read_their_tables_from_memory(packed: bool):
    """Inductor would compute other tables anew inside of its kernel, and some of them wrong."""
    captured = set()

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.flex_attention:
                captured.update(str(table.target) for table in node.args[-1])
        return graph

    def run(q, k, v, indices, documents):
        options = {"documents": documents, "impl": "flex"}
        k_cmp, v_cmp = compress(MeanPool(CONFIG), k, v, CONFIG, documents=documents)
        outputs = (
            compressed_attention(q, k_cmp, v_cmp, CONFIG, **options),
            selected_attention(q, k, v, Selection(indices), CONFIG, **options),
            window_attention(q, k, v, CONFIG, **options),
        )
        return [output.out for output in outputs]

    q, k, v = (torch.randn(1, heads, 50, 8) for heads in (4, 2, 2))
    indices = torch.zeros(1, 2, 50, 1, dtype=torch.int32)
    documents = documents_from_lengths([20, 29], 50) if packed else None
    with torch.no_grad():
        torch.compile(run, fullgraph=True, backend=backend)(q, k, v, indices, documents)
    constant = str(torch.full)  # the number of blocks: of a constant there is nothing to read
    assert captured == {"flexnsa_masks.in_memory.default", constant}


class ReadsValues:
    """A branch in which a Python `if` depends on what the queries hold."""

    def attend(self, q, k, v, context):
        if q.sum() > 0:
            q = -q
        return window_attention(q, k, v, CONFIG, **context.options)


def test_what_cannot_be_traced_names_the_branch():
    branches = {"window": WindowBranch(CONFIG), "mine": ReadsValues()}
    attention = SparseAttention(branches, gate=SigmoidGate(dim=32, num_heads=4, num_branches=2))
    q, k, x = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 50, 32)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match='in branch "mine"') as raised:
        compiled(q, dict.fromkeys(branches, (k, k)), x)
    assert 'branch "window"' not in str(raised.value)


def test_a_layer_is_still_copied_and_pickled():
    layer, x = layer_on("cpu"), torch.randn(1, 40, 64)
    for found in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(found(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["reference", "flex", "triton"])
def test_compiled_equals_eager_on_cuda(impl: str, packed: bool):
    torch._dynamo.reset()
    layer = layer_on("cuda", impl, head_dim=32, qk_norm=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (65, 300, 1000):
        x = torch.randn(2, tokens, 64, device="cuda")
        lengths = [[tokens // 3, 1, tokens // 2], [tokens - 7]]
        documents = documents_from_lengths(lengths, tokens).cuda() if packed else None
        assert_alike(compiled, layer, x, documents=documents)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "name"), [("triton", "prefix"), ("flex", "prefix"), ("auto", "dilated")])
def test_masks_compile_on_cuda(impl: str, name: str):
    # Both let a window hold several keys: of a softmax over one the gradients are mere rounding.
    mask = dilated(3, 4) if name == "dilated" else and_masks(causal(), prefix(200))
    torch._dynamo.reset()
    layer = layer_on("cuda", impl, head_dim=32)
    compiled = torch.compile(layer, fullgraph=True)
    assert_alike(compiled, layer, torch.randn(2, 300, 64, device="cuda"), mask_mod=mask)


class Biased(nn.Module):
    """A composition whose selected branch adds the blocks' importance to its scores."""

    def __init__(self):
        super().__init__()
        selected = SelectedBranch(CONFIG, bias=ImportanceBias(CONFIG))
        branches = {"compressed": CompressedBranch(CONFIG, MeanPool(CONFIG)), "selected": selected}
        self.attention = SparseAttention(branches, gate=SigmoidGate(64, 4, 2), selector=ImportanceSelector(CONFIG))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in (x, x[..., :32]))
        return self.attention(q, dict.fromkeys(self.attention.branches, (k, k)), x)


@pytest.mark.gpu
def test_a_bias_from_importance_compiles_on_cuda():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Biased().cuda()
    assert_alike(torch.compile(model, fullgraph=True), model, torch.randn(2, 300, 64, device="cuda"))


@pytest.mark.gpu
def test_two_compilations_for_ten_lengths_on_cuda():
    torch._dynamo.reset()
    counters.clear()
    model = Transformer("cuda", head_dim=32)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in LENGTHS:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = outputs_and_gradients(compiled, torch.randn(1, tokens, 64, device="cuda"))
        assert all(x.isfinite().all() for x in found)
    assert graphs() <= 2, f"{graphs()} graphs"
    for tokens in (1, 7):
        assert compiled(torch.randn(1, tokens, 64, device="cuda")).isfinite().all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch records one to hold its memory pool
@pytest.mark.parametrize(("impl", "mode"), [("flex", "default"), ("triton", "default"), ("triton", "reduce-overhead")])
def test_autocast_in_training_on_cuda(impl, mode):
    torch._dynamo.reset()
    model = Transformer("cuda", impl, head_dim=32)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    x = torch.randn(2, 512, 64, device="cuda")
    target = F.normalize(x.roll(1, 1), dim=-1)
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (compiled(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_an_eager_call_takes_the_same_way_as_a_compiled_one():
    """Big enough that the branches are mixed in one compiled pass; the gradients pass through it too."""
    layer = layer_on("cuda", head_dim=32, num_heads=16).to(torch.bfloat16)
    x = torch.randn(1, 8192, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(*(outputs_and_gradients(f, x) for f in (compiled, layer)), strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
