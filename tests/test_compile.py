"""torch.compile takes the layer whole: no graph break, and eager's outputs and gradients to rounding."""

import pytest
import torch

from flexnsa import NativeSparseAttention, NSAConfig, documents_from_lengths

CONFIG = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=10)


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


def outputs_and_gradients(layer, x, documents):
    x = x.detach().requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x, documents=documents)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def test_the_graph_is_whole_on_a_cpu():
    layer = layer_on("cpu", qk_norm=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 50, 64)
    documents = documents_from_lengths([[20, 1, 29], [30]], 50)
    for ids in (None, documents):
        torch.testing.assert_close(compiled(x, documents=ids), layer(x, documents=ids))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "flex", "triton"])
def test_compiled_equals_eager_on_cuda(impl):
    torch._dynamo.reset()
    layer = layer_on("cuda", impl, head_dim=32, qk_norm=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (65, 300, 1000):
        x = torch.randn(2, tokens, 64, device="cuda")
        lengths = [[tokens // 3, 1, tokens // 2], [tokens - 7]]
        for ids in (None, documents_from_lengths(lengths, tokens).cuda()):
            found, expected = (outputs_and_gradients(f, x, ids) for f in (compiled, layer))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flex", "triton"])
def test_autocast_in_training_on_cuda(impl):
    torch._dynamo.reset()
    layer = layer_on("cuda", impl, head_dim=32, qk_norm=True)
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    x = torch.randn(2, 512, 64, device="cuda")
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
