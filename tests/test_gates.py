"""The kernels that mix the branches: the sum and the gradients of plain torch, and when each gradient is made."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import part
from flexnsa import (
    AttentionOutput,
    BranchKV,
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    NSAConfig,
    SelectedBranch,
    SparseAttention,
    WindowBranch,
    gating,
    native_sparse_attention,
)
from flexnsa.gating import Gated, combine, note_gate
from flexnsa.kernels import gates as kernels

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)


@pytest.fixture
def by_kernel(monkeypatch):
    """Every eager call mixes by the kernels, in Triton's interpreter."""
    monkeypatch.setattr(gating, "_by_kernel", lambda gate, output: not torch.compiler.is_compiling())


def problem(
    branches: int, batch: int, tokens: int, dim: int, turned: bool, seed: int = 0
) -> tuple[Tensor, list[AttentionOutput], Tensor]:
    """Gates, outputs and the sum's gradient; some rows see nothing in some branch and have a NaN for its gate."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    gates, outputs = torch.rand(batch, 3, tokens, branches, generator=generator), []
    for branch in range(branches):
        shape = (batch, tokens, 3, dim) if turned else (batch, 3, tokens, dim)
        out = draw(*shape).transpose(1, 2) if turned else draw(*shape)
        blind = torch.rand(batch, 3, tokens, generator=generator) < 0.2
        gates[..., branch] = gates[..., branch].masked_fill(blind, torch.nan)
        lse = draw(batch, 3, tokens).masked_fill(blind, -torch.inf)
        outputs.append(AttentionOutput(out.masked_fill(blind[..., None], 0).requires_grad_(), lse))
    return gates.requires_grad_(), outputs, draw(batch, 3, tokens, dim)


def mixed(gates: Tensor, outputs: list[AttentionOutput], grad: Tensor) -> list[Tensor]:
    total = combine(gates, outputs)
    return [total, *torch.autograd.grad(total, [gates, *(output.out for output in outputs)], grad)]


@given(
    branches=st.integers(1, 6),
    batch=st.integers(1, 2),
    tokens=st.sampled_from((1, 31, 32, 70)),
    dim=st.sampled_from((1, 8, 20)),
    turned=st.booleans(),
    seed=st.integers(0, 2**20),
)
@part(8)
def test_the_kernels_mix_as_plain_torch_does(branches, batch, tokens, dim, turned, seed):
    gates, outputs, grad = problem(branches, batch, tokens, dim, turned, seed)
    expected = mixed(gates, outputs, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gating, "_by_kernel", lambda gate, output: True)
        found = mixed(gates, outputs, grad)
        with torch.no_grad():
            torch.testing.assert_close(combine(gates, outputs), found[0], rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_asked_for_are_left_out(by_kernel):
    gates, outputs, grad = problem(3, 1, 20, 8, turned=False)
    total = combine(gates.detach(), [outputs[0], *(AttentionOutput(x.out.detach(), x.lse) for x in outputs[1:])])
    (found,) = torch.autograd.grad(total, outputs[0].out, grad)
    gate = gates.detach()[..., :1].masked_fill((outputs[0].lse == -torch.inf)[..., None], 0)
    torch.testing.assert_close(found, gate * grad)


class Note(torch.autograd.Function):
    """Notes when the backward passes."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, order: list[str]) -> Tensor:
        ctx.name, ctx.order = name, order
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.order.append(ctx.name)
        return grad, None, None


class Noted(nn.Module):
    """A branch that notes when its backward runs; the gate's part in it is noted by ``weigh``."""

    def __init__(self, name: str, branch: nn.Module, order: list[str]):
        super().__init__()
        self.name, self.branch, self.order, self.differentiates_lse = name, branch, order, False

    def attend(self, q, k, v, context):
        out, lse = self.branch.attend(q, k, v, context)
        return AttentionOutput(Note.apply(out, self.name, self.order), lse)


def test_a_branchs_gradient_is_made_when_its_turn_comes(by_kernel, monkeypatch):
    """Not all of them before the first is used: each is as large as an output."""
    order: list[str] = []
    weigh = kernels.weigh
    monkeypatch.setattr(kernels, "weigh", lambda *tensors: order.append("gate") or weigh(*tensors))
    branches = {
        "compressed": CompressedBranch(CONFIG, MeanPool(CONFIG)),
        "selected": SelectedBranch(CONFIG),
        "window": WindowBranch(CONFIG),
    }
    attention = SparseAttention(
        {name: Noted(name, branch, order) for name, branch in branches.items()},
        gate=lambda x: x,
        selector=ImportanceSelector(CONFIG),
    )
    q, k = torch.randn(1, 4, 40, 8, requires_grad=True), torch.randn(1, 2, 40, 8)
    attention(q, dict.fromkeys(branches, (k, k)), torch.rand(1, 4, 40, 3)).sum().backward()
    assert order == ["gate", "window", "gate", "selected", "gate", "compressed"]


@pytest.mark.parametrize("recompute", [(), ("window",), ("selected", "window")])
def test_whole_nsa_by_the_kernels_is_the_plain_one(monkeypatch, recompute):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8).requires_grad_() for heads in (4, 2, 2))
    gates, grad = torch.rand(2, 4, 40, 3).requires_grad_(), torch.randn(2, 4, 40, 8)
    documents = torch.tensor([[0] * 25 + [1] * 15, [-1] * 3 + [0] * 37])
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr(gating, "_by_kernel", lambda gate, output, answer=by_kernel: answer)
        kv, pool = BranchKV.shared(k, v), MeanPool(CONFIG)
        out = native_sparse_attention(q, kv, gates, CONFIG, pool, documents=documents, recompute=recompute)
        found.append([out, *torch.autograd.grad(out, (q, k, v, gates), grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_left_as_it_is():
    """On a CPU, the small, and gates of another dtype."""
    output = AttentionOutput(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    assert note_gate(torch.zeros(1, 2, 3), output) is output


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
def test_big_outputs_are_mixed_by_the_kernels_on_cuda(turned: bool):
    gates, outputs, grad = problem(3, 2, 11000, 64, turned)
    exact = mixed(gates.double(), [AttentionOutput(x.out.double(), x.lse) for x in outputs], grad.double())
    to = {"device": "cuda", "dtype": torch.bfloat16}
    leaves = [x.out.detach().to(**to).requires_grad_() for x in outputs]
    on_cuda = [AttentionOutput(out, x.lse.cuda()) for out, x in zip(leaves, outputs, strict=True)]
    gates = gates.detach().to(**to).requires_grad_()
    assert isinstance(note_gate(gates[..., 0], on_cuda[0]), Gated)
    for found, expected in zip(mixed(gates, on_cuda, grad.to(**to)), exact, strict=True):
        assert (found.cpu() - expected).norm() <= 1e-2 * expected.norm()
