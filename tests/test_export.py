"""torch.export of the layer on a CPU: one graph for inference, at any length."""

import pytest
import torch
from torch.export import Dim, export

from flexnsa import NativeSparseAttention, NSAConfig

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=6)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    layer = NativeSparseAttention(dim=16, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG, rope_theta=1e4)
    return layer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(layer):
    return export(layer, (torch.randn(2, 40, 16),), dynamic_shapes={"x": {1: Dim.DYNAMIC}})


@pytest.mark.parametrize("tokens", [40, 24, 100, 41, 39, 103])
def test_an_exported_layer_is_the_layer(layer, exported, tokens):
    x = torch.randn(2, tokens, 16)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_the_graph_is_plain_torch(exported):
    """Nothing in it that another runtime would have to bring along but PyTorch's own operators."""
    own = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [target for target in own if "flexnsa" in target]


class Step(torch.nn.Module):
    """The layer with a cache of its own."""

    def __init__(self, layer: NativeSparseAttention):
        super().__init__()
        self.layer, self.cache = layer, layer.new_cache(batch=2, max_tokens=20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, cache=self.cache)


def test_a_decoding_step_works_on_the_cache_that_it_was_exported_with(layer):
    step, x = Step(layer), torch.randn(2, 15, 16)
    exported = export(step, (x[:, :1],)).module()
    step.cache.reset()
    out = torch.cat([exported(token) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(out, layer(x))
    assert step.cache.lengths.tolist() == [15, 15]
