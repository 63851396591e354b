"""The importance bias: against loops over tokens, its gradients, and on both engines that take score mods."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from conftest import Case, assert_as_accurate, assert_close, cases, gradients, part
from flexnsa import (
    CompressedBranch,
    ImportanceBias,
    ImportanceSelector,
    MeanPool,
    NSAConfig,
    SelectedBranch,
    Selection,
    SparseAttention,
    bias,
    compressed_attention,
    dense,
    importance_bias,
    select_blocks,
    selected_attention,
)
from flexnsa_masks import causal as causality
from flexnsa_masks import or_masks, prefix

SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_local=1, window=4)


def chosen(x, case: Case) -> Selection:
    """The library's own choice."""
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing).lse
    return select_blocks(x.q, x.k_cmp, lse, case.config, num_tokens=case.tokens, impl="reference", **case.placing)


def biased(x, case: Case, selection: Selection, weight: float | Tensor, impl: str = "reference", **options):
    """Selected attention with the bias."""
    lse = compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, impl="reference", **case.placing, **options).lse
    mod = importance_bias(
        x.q,
        x.k_cmp,
        lse,
        case.config,
        selection=selection,
        num_tokens=case.tokens,
        weight=weight,
        **case.placing,
        **options,
    )
    return selected_attention(
        x.q, x.k_slc, x.v_slc, selection, case.config, score_mod=mod, impl=impl, **case.placing, **options
    )


def by_hand(x, case: Case, selection: Selection, weight: float, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Query by query: scores, the bias of each token's block, a softmax."""
    where, config = case.where, case.config
    importance = oracle.block_importance(x.q, x.k_cmp, where)
    outs, lses = [], []
    for b, heads in enumerate(selection.indices.tolist()):
        for head in range(case.heads):
            h = head // case.group
            for t in range(case.queries):
                blocks = [j for j in heads[h][t] if j >= 0]
                document = where.document(b, t)
                own = document.index(where.positions[b][t]) // config.select_block if document else 0
                free = [j for j in blocks if config.num_initial <= j <= own - config.num_local or j > own]
                share = {j: importance[b, h, t, j] + eps for j in free}
                total = sum(share.values())
                logits, values = [], []
                for j in blocks:
                    for token in where.selected_tokens(b, t, [j]):
                        score = x.q[b, head, t] @ x.k_slc[b, h, token] * case.dim**-0.5
                        logits.append(score + weight * (len(free) * share[j] / total).log() if j in share else score)
                        values.append(x.v_slc[b, h, token])
                if not logits:
                    outs.append(x.v_slc.new_zeros(case.value_dim))
                    lses.append(x.q.new_tensor(-math.inf))
                    continue
                outs.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                lses.append(torch.stack(logits).logsumexp(0))
    shape = (case.batch, case.heads, case.queries)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


@given(case=cases(values=("normal",), groups=(1, 3)), weight=st.sampled_from((0.5, 1.0, -2.0)))
@part(3)
def test_the_bias_is_its_formula(case: Case, weight: float):
    x = case.inputs(grad=True)
    selection = chosen(x, case)
    found, expected = biased(x, case, selection, weight), by_hand(x, case, selection, weight)
    assert_close(found, expected)
    assert_close(gradients(found, x), gradients(expected, x))


@given(case=cases(values=("normal", "repeated")), weight=st.sampled_from((0.5, -2.0)))
@part(3)
def test_flex_equals_reference(case: Case, weight: float):
    x = case.inputs(torch.float32)
    selection, exact = chosen(x, case), x.to(torch.float64)
    outs = (
        biased(y, case, selection, weight, impl) for y, impl in ((x, "flex"), (x, "reference"), (exact, "reference"))
    )
    assert_as_accurate(*(out for out, _ in outs))


def small(**changes) -> Case:
    return Case(SMALL, **{"kv_heads": 2, "group": 2, "tokens": 30, **changes})


def test_gradients_are_right():
    case = Case(SMALL, kv_heads=1, group=2, tokens=26, positions=torch.tensor([3, 17, 25]))
    x, weight = case.inputs(grad=True), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    selection = chosen(x, case)

    def out(q: Tensor, k_cmp: Tensor, weight: Tensor) -> Tensor:
        return biased(x._replace(q=q, k_cmp=k_cmp), case, selection, weight).out

    assert torch.autograd.gradcheck(out, (x.q, x.k_cmp, weight))


def test_chunks_are_recomputed_in_the_backward(monkeypatch):
    case = small()
    x = case.inputs(grad=True)
    selection = chosen(x, case)
    expected = gradients(biased(x, case, selection, 0.5), x)
    monkeypatch.setattr(dense, "CHUNK_QUERIES", 7)
    assert_close(gradients(biased(x, case, selection, 0.5), x), expected)


def test_only_the_bias_carries_a_gradient_to_the_selector():
    case = small()
    x = case.inputs(grad=True)
    selection = chosen(x, case)
    for weight, reaches in ((0.0, False), (0.5, True)):
        (grad,) = torch.autograd.grad(biased(x, case, selection, weight).out.square().sum(), x.k_cmp)
        assert bool(grad.abs().sum() > 0) == reaches
    plain = selected_attention(x.q, x.k_slc, x.v_slc, selection, SMALL)
    assert_close(biased(x, case, selection, 0.0), plain)


def test_blocks_of_equal_importance_and_forced_ones_are_left_alone():
    """Keys alike, and queries far enough in: every block between the first and the local one is as important."""
    case = small(positions=torch.tensor([22, 27, 29]))
    x = case.inputs()
    x = x._replace(k_cmp=x.k_cmp[:, :, :1].expand_as(x.k_cmp))
    inner = torch.tensor([0, 1, 3, 4], dtype=torch.int32).expand(1, 2, 3, 4).contiguous()
    plain = selected_attention(x.q, x.k_slc, x.v_slc, Selection(inner), SMALL, **case.placing)
    assert_close(biased(x, case, Selection(inner), 3.0), plain)
    other = case.inputs()
    assert not torch.allclose(biased(other, case, Selection(inner), 3.0).out, plain.out)


def test_more_than_a_word_of_blocks():
    """Slots are counted in words of 32 blocks."""
    config = NSAConfig(compress_block=2, compress_stride=2, select_block=2, num_selected=40, num_local=1, window=4)
    case = Case(config, tokens=150, positions=torch.tensor([63, 64, 129, 149]))
    x = case.inputs(grad=True)
    selection = chosen(x, case)
    found, expected = biased(x, case, selection, 1.0), by_hand(x, case, selection, 1.0)
    assert_close(found, expected)
    assert_close(gradients(found, x), gradients(expected, x))


def test_bits_are_counted():
    words = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    assert bias.count_bits(words.int()).tolist() == [(word & 0xFFFFFFFF).bit_count() for word in words.tolist()]


def composition(impl: str = "auto", weight: float | nn.Parameter = 0.5, **options) -> SparseAttention:
    parts = {
        "compressed": CompressedBranch(SMALL, MeanPool(SMALL), **options),
        "selected": SelectedBranch(SMALL, bias=ImportanceBias(SMALL, weight), **options),
    }
    gate = lambda x: x.new_ones(1, 4, x.shape[1], 2)  # noqa: E731
    return SparseAttention(parts, gate, selector=ImportanceSelector(SMALL), impl=impl)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
    x = small().inputs(dtype, raw=True)
    return x.q, {"compressed": (x.k_cmp, x.v_cmp), "selected": (x.k_slc, x.v_slc)}, x.q.new_zeros(1, 30, 1)


def test_a_branch_takes_the_scale_and_score_mod_of_the_branch_it_reads():
    """Beside a score mod of its own, which is applied first."""
    q, kv, x = problem()
    options = {"scale": 0.9, "score_mod": lambda s, b, h, i, j: 3 * (s / 3).tanh()}
    found = composition(**options)(q, kv, x)
    k_cmp, v_cmp = MeanPool(SMALL)(*kv["compressed"])
    compressed = compressed_attention(q, k_cmp, v_cmp, SMALL, **options)
    selection = select_blocks(q, k_cmp, compressed.lse, SMALL, num_tokens=30, **options)
    mod = importance_bias(q, k_cmp, compressed.lse, SMALL, selection=selection, num_tokens=30, weight=0.5, **options)
    selected = selected_attention(
        q,
        *kv["selected"],
        selection,
        SMALL,
        scale=0.9,
        score_mod=lambda s, b, h, i, j: mod(options["score_mod"](s, b, h, i, j), b, h, i, j),
    )
    assert_close([found], [compressed.out + selected.out])


def test_a_mask_holds_in_the_bias():
    q, kv, x = problem(torch.float32)
    mask = or_masks(causality(), prefix(13))
    with torch.no_grad():
        found, expected = (composition(impl)(q, kv, x, mask_mod=mask) for impl in ("flex", "reference"))
    assert_close([found], [expected])
    assert not torch.allclose(expected, composition()(q, kv, x))


def test_a_learned_weight_is_a_parameter():
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    attention = composition(weight=weight)
    assert [parameter is weight for parameter in attention.parameters()] == [True]
    attention(*problem()).square().sum().backward()
    assert weight.grad.abs() > 0


def test_the_graph_is_whole():
    torch._dynamo.reset()
    attention = composition()
    torch.testing.assert_close(
        torch.compile(attention, fullgraph=True, backend="eager")(*problem()), attention(*problem())
    )


def test_what_cannot_be():
    q, kv, x = problem(torch.float32)
    with pytest.raises(NotImplementedError, match="take no score_mod"):
        composition("triton")(q, kv, x)
    case = small()
    y = case.inputs()
    lse = compressed_attention(y.q, y.k_cmp, y.v_cmp, SMALL).lse
    with pytest.raises(ValueError, match="eps must be above 0"):
        importance_bias(y.q, y.k_cmp, lse, SMALL, selection=chosen(y, case), num_tokens=30, eps=0.0)


@pytest.mark.gpu
def test_flex_gradients_on_cuda():
    case = Case(NSAConfig(num_selected=4, window=16), kv_heads=2, group=4, dim=32, value_dim=32, tokens=700)
    x = case.inputs(torch.float32).to(torch.float32)
    x = type(x)(*(y.cuda().requires_grad_() for y in x))
    selection = chosen(x, case)
    weight = torch.tensor(0.5, device="cuda", requires_grad=True)
    found, expected = (biased(x, case, selection, weight, impl) for impl in ("flex", "reference"))
    leaves = [*x, weight]
    for ours, theirs in zip(
        [*found, *gradients(found, leaves)], [*expected, *gradients(expected, leaves)], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * max(1.0, theirs.abs().max().item()))
