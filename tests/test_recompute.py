"""Branches whose output is computed again in the backward: the same numbers, less kept, one selection."""

import contextlib
import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import flexnsa.nsa
from flexnsa import (
    BranchKV,
    ImportanceSelector,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    Selection,
    SparseAttention,
    WindowBranch,
    native_sparse_attention,
)

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)
TOKENS = 40
CHOICES = [("window",), ("selected", "window"), ("window", "selected")]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, TOKENS, 8, dtype=dtype)
    k, v = torch.randn(2, 2, TOKENS, 8, dtype=dtype), torch.randn(2, 2, TOKENS, 6, dtype=dtype)
    gates = torch.rand(2, 4, TOKENS, 3, dtype=dtype)
    return tuple(x.requires_grad_() for x in (q, k, v, gates))


def attend(x: tuple[Tensor, ...], **options: object) -> Tensor:
    q, k, v, gates = x
    return native_sparse_attention(q, BranchKV.shared(k, v), gates, CONFIG, MeanPool(CONFIG), **options)


def layer_of(recompute: tuple[str, ...]) -> NativeSparseAttention:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return NativeSparseAttention(**sizes, config=CONFIG, rope_theta=100.0, recompute=recompute)


@dataclass
class Kept:
    """Tensors that the backward keeps, as autograd is given them."""

    tensors: list[Tensor] = field(default_factory=list)

    def hooks(self) -> contextlib.AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        return x

    def outputs(self) -> int:
        """Distinct tensors as large as a branch's output."""
        return len({x.untyped_storage().data_ptr() for x in self.tensors if x.shape == (2, 4, TOKENS, 6)})


@pytest.mark.parametrize("recompute", CHOICES)
def test_the_output_and_the_gradients_are_the_same(recompute: tuple[str, ...]):
    x, grad = inputs(), torch.randn(2, 4, TOKENS, 6, dtype=torch.float64)
    documents = torch.tensor([[0] * 25 + [1] * 15, [-1] * 3 + [0] * 37])
    found = []
    for again in ((), recompute):
        out = attend(x, documents=documents, recompute=again)
        found.append((out, *torch.autograd.grad(out, x, grad)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recompute", CHOICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_trains_the_same(recompute: tuple[str, ...], autocast: bool):
    x, found = torch.randn(2, TOKENS, 16), []
    for again in ((), recompute):
        layer = layer_of(again)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x).square().mean().backward()
        found.append({name: p.grad for name, p in layer.named_parameters()})
    for name, expected in found[0].items():
        tolerance = {"rtol": 0.05, "atol": 1e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(found[1][name], expected, **tolerance, msg=name)


def test_each_recomputed_branch_keeps_one_output_less():
    x, outputs = inputs(), []
    for recompute in ((), ("window",), ("selected", "window")):
        kept = Kept()
        with kept.hooks():
            attend(x, recompute=recompute)
        outputs.append(kept.outputs())
    assert outputs[0] - outputs[1] >= 1 and outputs[1] - outputs[2] >= 1, outputs


def test_what_is_not_kept_is_freed():
    """Nothing else holds the outputs: not the checkpoint's arguments, not the context."""

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[weakref.ref] = []

        def attend(self, q, k, v, context):
            _ = context.options
            output = WindowBranch(CONFIG).attend(q, k, v, context)
            self.seen.append(weakref.ref(output.out))
            return output

    q, k, v, gates = inputs(torch.float32)
    alive = {}
    for recompute in ((), ("last",)):
        last = Watched()
        composed = SparseAttention(
            {"first": Watched(), "last": last}, gate=lambda x: gates[..., :2], recompute=recompute
        )
        out = composed(q, {"first": (k, v), "last": (k, v)}, torch.zeros(2, TOKENS, 1))
        gc.collect()
        alive[recompute] = last.seen[0]() is not None
        out.sum().backward()
        assert len(last.seen) == 1 + bool(recompute)
    assert alive == {(): True, ("last",): False}


def test_the_selection_is_made_once():
    class Counted(ImportanceSelector):
        calls = 0

        def select(self, q, context) -> Selection:
            Counted.calls += 1
            return super().select(q, context)

    layer = layer_of(("selected", "window"))
    layer.attention.selector = Counted(CONFIG)
    layer(torch.randn(1, TOKENS, 16)).sum().backward()
    assert Counted.calls == 1


def test_nothing_is_computed_twice_without_gradients(monkeypatch: pytest.MonkeyPatch):
    calls = []
    window = flexnsa.nsa.window_attention
    monkeypatch.setattr(flexnsa.nsa, "window_attention", lambda *x, **y: calls.append(1) or window(*x, **y))
    with torch.no_grad():
        attend(inputs(), recompute=("window",))
    assert len(calls) == 1
    attend(inputs(), recompute=("window",)).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("recompute", CHOICES)
def test_it_compiles_whole(recompute: tuple[str, ...]):
    x, layer = torch.randn(2, TOKENS, 16), layer_of(recompute)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for call in (layer, compiled):
        layer.zero_grad()
        out = call(x)
        out.sum().backward()
        found.append((out, *(p.grad for p in layer.parameters())))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [("selected",), ("compressed",), ("compressed", "selected", "window"), "window"])
def test_other_names_are_refused(recompute):
    with pytest.raises(ValueError, match="recompute must name the last"):
        attend(inputs(), recompute=recompute)
    with pytest.raises(ValueError, match="recompute must name the last"):
        layer_of(recompute)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", CHOICES[:2], ids="-".join)
def test_on_cuda_each_recomputed_branch_holds_an_output_less(recompute: tuple[str, ...], compiled: bool):
    """Big enough that an eager call mixes the branches in a compiled pass, inside the checkpoint too."""
    shape, config = (1, 16, 8192, 64), NSAConfig()
    torch.manual_seed(0)
    q, gates, grad = torch.randn(shape), torch.rand(*shape[:3], 3), torch.randn(shape)
    k, v = torch.randn(1, 1, 8192, 64), torch.randn(1, 1, 8192, 64)
    q, k, v, gates, grad = (x.to("cuda", torch.bfloat16) for x in (q, k, v, gates, grad))
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    found, held = [], []
    for again in ((), recompute):
        torch.compiler.reset()

        def call(again: tuple[str, ...] = again) -> Tensor:
            return native_sparse_attention(q, BranchKV.shared(k, v), gates, config, MeanPool(config), recompute=again)

        function = torch.compile(call, fullgraph=True) if compiled else call
        for _ in range(2):  # tables and workspaces that are kept between calls are not the second time's
            out = gradients = None
            gc.collect()  # what an earlier call left in cycles would be freed in between
            before = torch.cuda.memory_allocated()
            out = function()
            after = torch.cuda.memory_allocated()
            gradients = torch.autograd.grad(out, leaves, grad)
        held.append(after - before)
        found.append((out.detach(), *gradients))
        del out, gradients
    for expected, got in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-2 * expected.norm()
    output = q.numel() * q.element_size()
    assert held[0] - held[1] >= 0.95 * len(recompute) * output, [size / output for size in held]
