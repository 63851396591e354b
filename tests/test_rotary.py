"""The rotary kernel turns as plain torch does, there and back, wherever tokens stand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import part
from flexnsa import MeanPool, NativeSparseAttention, NSAConfig, rotary
from flexnsa.rotary import rotation, tabulated, turned, turns

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)


@pytest.fixture
def by_kernel(monkeypatch):
    """Every eager call rotates by the kernel, in Triton's interpreter."""
    monkeypatch.setattr(rotary, "kernel_runs", lambda like: like.dtype != torch.float64)


def plain(x: Tensor, positions: Tensor | range) -> Tensor:
    return turned(x, turns(tabulated(positions, x.device), x.shape[-1], 1e4, torch.float32))


@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from((1, 8, 11)),
    tokens=st.sampled_from((1, 16, 37)),
    dim=st.sampled_from((2, 12, 32)),
    step=st.sampled_from((1, 16)),
    table=st.sampled_from((None, "shared", "by row")),
    side_by_side=st.booleans(),
    seed=st.integers(0, 2**20),
)
@part(8)
def test_the_kernel_turns_as_plain_torch_does(batch, heads, tokens, dim, step, table, side_by_side, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim) if side_by_side else (batch, tokens, heads, dim)
    x = torch.randn(shape, generator=generator)
    x = (x if side_by_side else x.transpose(1, 2)).requires_grad_()
    positions: Tensor | range = range(seed, seed + tokens * step, step)
    if table is not None:
        positions = torch.randint(0, 2**20, (1 if table == "shared" else batch, tokens), generator=generator)
    grad = torch.randn(batch, heads, tokens, dim, generator=generator)
    found = []
    for answer in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rotary, "kernel_runs", lambda like, answer=answer: answer)
            out = rotation(positions, dim, 1e4, x)(x)
            found.append((out, *torch.autograd.grad(out, x, grad)))
            with torch.no_grad():
                assert torch.equal(rotation(positions, dim, 1e4, x)(x), out)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_sixteen_bits_are_turned_in_float32(by_kernel):
    x = torch.randn(1, 2, 20, 8, dtype=torch.float16)
    assert torch.equal(rotation(range(20), 8, 1e4, x)(x), plain(x, range(20)))


def test_numbers_that_do_not_lie_side_by_side_are_turned(by_kernel):
    x = torch.randn(1, 2, 8, 20).transpose(2, 3)
    torch.testing.assert_close(rotation(range(20), 8, 1e4, x)(x), plain(x, range(20)))


def test_the_gradient_is_differentiable(by_kernel):
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = rotation(range(5, 8), 4, 1e4, x)(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))  # a rotation keeps lengths: sum of x * x


@pytest.mark.parametrize("compress_rotated", [False, True])
def test_a_layer_by_the_kernel_is_the_plain_one_cached_and_not(monkeypatch, compress_rotated):
    torch.manual_seed(0)
    layer = NativeSparseAttention(
        dim=12, num_heads=4, num_kv_heads=2, head_dim=4, config=CONFIG, compressor=MeanPool(CONFIG), rope_theta=1e4,
        compress_rotated=compress_rotated,
    )  # fmt: skip
    x, documents = torch.randn(2, 26, 12), torch.tensor([[0] * 10 + [1] * 16, [-1] * 3 + [0] * 23])
    positions = torch.arange(3, 26)
    found = []
    for answer in (False, True):
        monkeypatch.setattr(rotary, "kernel_runs", lambda like, answer=answer: answer)
        outs = [layer(x), layer(x, documents=documents)]
        outs += [torch.autograd.grad(outs[0].square().sum(), layer.q_proj.weight)[0]]
        rest = layer.forward_part(x[:, 3:], positions=positions, gather=lambda k: torch.cat((k[:, :, :3], k), 2))
        with torch.no_grad():
            cache = layer.new_cache(2, 26)
            outs += [rest, *(layer(part, cache=cache) for part in x.split((7, 18, 1), 1))]
        found.append(outs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_cpu_and_float64_are_left_to_torch():
    assert not rotary.kernel_runs(torch.zeros(1))
    assert not rotary.kernel_runs(torch.zeros(1, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_turns_to_the_same_bits(dtype: torch.dtype):
    x = torch.randn(2, 300, 12 * 128, device="cuda", dtype=dtype).unflatten(-1, (12, 128)).transpose(1, 2)
    for positions in (range(61440, 61740), range(31, 31 + 300 * 16, 16), torch.randint(0, 2**17, (2, 300)).cuda()):
        found, expected = rotation(positions, 128, 1e4, x)(x), plain(x, positions)
        assert torch.equal(found, expected)
        assert found.is_contiguous()
