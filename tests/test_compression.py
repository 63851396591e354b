"""Compressors: what each block becomes, with documents or without, and its gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from conftest import Case, assert_close, cases, gradients
from flexnsa import BlockCompressor, MeanPool, MLPCompressor, NSAConfig, compression
from flexnsa.compression import GatedPool, LinearCompressor

Make = Callable[[Case], BlockCompressor]


def learned(kind: type[BlockCompressor]) -> Make:
    def make(case: Case) -> BlockCompressor:
        torch.manual_seed(case.seed)
        compressor = kind(case.config, num_kv_heads=case.kv_heads, head_dim=case.dim, value_dim=case.value_dim)
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return compressor.double()

    return make


COMPRESSORS = {
    "mean": lambda case: MeanPool(case.config),
    "mlp": learned(MLPCompressor),
    "gated": learned(GatedPool),
    "linear": learned(LinearCompressor),
}
every_compressor = pytest.mark.parametrize("make", COMPRESSORS.values(), ids=COMPRESSORS.keys())
SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=4)


def starts(case: Case) -> Tensor | None:
    if case.documents is None:
        return None
    return torch.tensor(case.where.starts(), dtype=torch.int64).view(case.batch, case.where.num_compressed)


def by_hand(compressor: BlockCompressor, k: Tensor, v: Tensor, where: oracle.Layout) -> tuple[Tensor, Tensor]:
    """`pool` on one block at a time, zeros in the unused tail."""
    k_cmp, v_cmp = (torch.zeros(*x.shape[:2], where.num_compressed, x.shape[3], dtype=x.dtype) for x in (k, v))
    for b in range(len(k)):
        for i, tokens in enumerate(where.compressed_tokens(b)):
            pooled = compressor.pool(k[b : b + 1, :, None, tokens], v[b : b + 1, :, None, tokens])
            k_cmp[b, :, i], v_cmp[b, :, i] = (x[0, :, 0] for x in pooled)
    return k_cmp, v_cmp


@given(case=cases(positions=False, values=("normal",)))
def test_mean_pool_equals_the_oracle(case: Case):
    x = case.inputs(grad=True)
    found = MeanPool(case.config)(x.k_slc, x.v_slc, starts=starts(case))
    expected = [oracle.mean_pool(x.k_slc, case.where), oracle.mean_pool(x.v_slc, case.where)]
    assert_close(found, expected)
    leaves = [x.k_slc, x.v_slc]
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@every_compressor
@given(case=cases(positions=False, values=("normal",), groups=(1,)))
def test_forward_pools_each_block_by_itself(make: Make, case: Case):
    compressor, x = make(case), case.inputs(grad=True)
    found = compressor(x.k_slc, x.v_slc, starts=starts(case))
    expected = by_hand(compressor, x.k_slc, x.v_slc, case.where)
    assert_close(found, expected)
    leaves = [x.k_slc, x.v_slc, *compressor.parameters()]
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@every_compressor
def test_gradcheck(make: Make):
    case = Case(SMALL, kv_heads=2, dim=2, value_dim=3, tokens=9, documents=torch.tensor([[-1] + [0] * 4 + [1] * 4]))
    compressor, x = make(case), case.inputs(grad=True)
    names, values = zip(*compressor.named_parameters(), strict=True) if list(compressor.parameters()) else ((), ())

    def forward(k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        by_name = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(compressor, by_name, (k, v), {"starts": starts(case)})

    assert torch.autograd.gradcheck(forward, (x.k_slc, x.v_slc, *values))


@every_compressor
@pytest.mark.parametrize("tokens", (1, 3, 4, 5, 6, 7, 8, 9))
def test_sizes(make: Make, tokens: int):
    case = Case(SMALL, batch=2, kv_heads=3, dim=5, value_dim=2, tokens=tokens)
    x = case.inputs()
    k_cmp, v_cmp = make(case)(x.k_slc, x.v_slc)
    expected = max(0, (tokens - 4) // 2 + 1)
    assert k_cmp.shape == (2, 3, expected, 5)
    assert v_cmp.shape == (2, 3, expected, 2)


@every_compressor
def test_starts_of_the_plain_grid_change_nothing(make: Make):
    case = Case(SMALL, batch=2, kv_heads=2, tokens=11)
    x, compressor = case.inputs(), make(case)
    grid = torch.arange(0, 8, 2).expand(2, -1)
    assert_close(compressor(x.k_slc, x.v_slc, starts=grid), compressor(x.k_slc, x.v_slc))


@every_compressor
def test_padding_may_hold_nan(make: Make):
    case = Case(SMALL, kv_heads=2, tokens=14, documents=torch.tensor([[-1] * 3 + [0] * 8 + [-1] * 3]))
    compressor, x = make(case), case.inputs()
    padding = case.documents[0] < 0
    results = []
    for filler in (0.0, torch.nan):
        k, v = (y.clone().masked_fill(padding[:, None], filler).requires_grad_() for y in (x.k_slc, x.v_slc))
        found = compressor(k, v, starts=starts(case))
        results.append([*found, *gradients(found, [k, v, *compressor.parameters()])])
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))
    assert all(y.isfinite().all() for y in results[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [MLPCompressor, GatedPool, LinearCompressor])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_what_is_not_finite_is_nan_where_values_are_not_read(monkeypatch, bad, kind, packed):
    """As on a GPU; without gradients as with them."""
    monkeypatch.setattr(compression, "known_finite", lambda x: False)
    documents = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3]) if packed else None
    case = Case(SMALL, kv_heads=2, tokens=20, documents=documents)
    compressor, x = learned(kind)(case), case.inputs()
    k, v = x.k_slc.clone(), x.v_slc.clone()
    k[0, 0, 5, 1] = v[0, 1, 12, 0] = bad
    found = compressor(k, v, starts=starts(case))
    with torch.no_grad():
        torch.testing.assert_close(compressor(k, v, starts=starts(case)), found, equal_nan=True)
    clean = compressor(x.k_slc, x.v_slc, starts=starts(case))
    for pooled, expected, (head, token) in zip(found, clean, ((0, 5), (1, 12)), strict=True):
        hit = torch.zeros(pooled.shape[:3], dtype=torch.bool)
        for block, tokens in enumerate(case.where.compressed_tokens(0)):
            hit[0, head, block] = token in tokens
        assert hit.any() and pooled[hit].isnan().all()
        torch.testing.assert_close(pooled[~hit], expected[~hit])


def test_mlp_knows_the_place_in_the_block_and_the_mean_does_not():
    case = Case(SMALL, kv_heads=2, tokens=4)
    x = case.inputs()
    order = torch.tensor([3, 1, 0, 2])
    for name, same in (("mean", True), ("mlp", False), ("gated", False), ("linear", False)):
        compressor = COMPRESSORS[name](case)
        k_cmp, _ = compressor(x.k_slc, x.v_slc)
        shuffled, _ = compressor(x.k_slc[:, :, order], x.v_slc[:, :, order])
        assert torch.allclose(k_cmp, shuffled) == same, name


def test_mlp_adds_its_position_embedding_to_each_place():
    """One vector for each of the l places: with identical tokens the output still depends on every one of them."""
    case = Case(SMALL, kv_heads=2, tokens=4)
    compressor, x = COMPRESSORS["mlp"](case), case.inputs()
    found = compressor(x.k_slc[:, :, :1].expand(-1, -1, 4, -1), x.v_slc)
    grad = torch.autograd.grad(found[0].square().sum(), [compressor.k_pool.position])[0]
    assert grad.shape == (2, 1, 4, case.dim)
    assert (grad != 0).all()


@pytest.mark.parametrize("name", ("mlp", "gated", "linear"))
def test_each_kv_head_and_keys_and_values_have_parameters_of_their_own(name: str):
    case = Case(SMALL, kv_heads=2, tokens=6)
    compressor, x = COMPRESSORS[name](case), case.inputs()
    k_cmp, v_cmp = compressor(x.k_slc, x.v_slc)
    parameters = list(compressor.parameters())
    for output, others in ((k_cmp, "v_pool"), (v_cmp, "k_pool")):
        found = torch.autograd.grad(output[:, 0].sum(), parameters, allow_unused=True, retain_graph=True)
        for (key, _), grad in zip(compressor.named_parameters(), found, strict=True):
            assert (grad is None) == key.startswith(others), key
            assert grad is None or (grad[1] == 0).all(), key


@pytest.mark.parametrize("kind", (GatedPool, LinearCompressor))
def test_weighted_pools_start_as_the_mean(kind: type[BlockCompressor]):
    case = Case(SMALL, kv_heads=2, tokens=9, value_dim=3)
    compressor = kind(SMALL, num_kv_heads=2, head_dim=case.dim, value_dim=3)
    x = case.inputs(torch.float32)
    assert_close(compressor(x.k_slc, x.v_slc), MeanPool(SMALL)(x.k_slc, x.v_slc))


def test_a_compressor_of_ones_own_is_one_method():
    class LastToken(BlockCompressor):
        def pool(self, k_blocks: Tensor, v_blocks: Tensor) -> tuple[Tensor, Tensor]:
            return k_blocks[..., -1, :], v_blocks[..., -1, :]

    case = Case(SMALL, tokens=10, documents=torch.tensor([[0] * 5 + [1] * 4 + [-1]]))
    x = case.inputs()
    k_cmp, v_cmp = LastToken(SMALL)(x.k_slc, x.v_slc, starts=starts(case))
    assert torch.equal(k_cmp[:, :, :2], x.k_slc[:, :, [3, 8]])
    assert torch.equal(v_cmp[:, :, :2], x.v_slc[:, :, [3, 8]])
    assert not k_cmp[:, :, 2:].any()


def test_a_compressor_without_pool_says_what_to_write():
    with pytest.raises(NotImplementedError, match="pool"):
        BlockCompressor(SMALL)(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2))
