"""The designs of docs/compose.md, as the page has them: short, equal to dense masked attention, compiled, trained."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

import oracle
from conftest import assert_close, gradients
from flexnsa import (
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    NSAConfig,
    SelectedBranch,
    SigmoidGate,
    SparseAttention,
    documents_from_lengths,
)
from flexnsa_masks import power_attention

PAGE = (Path(__file__).parent.parent / "docs/compose.md").read_text()
EXAMPLES = dict(re.findall(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_local=1, window=5)
B, HQ, HK, T, D, DIM = 2, 4, 2, 29, 4, 6
PACKED = documents_from_lengths([[13, 1, 10], [29]], T)


def code_lines(source: str) -> list[str]:
    """Its lines without imports and blank ones."""
    return [line for line in source.splitlines() if line.strip() and not line.startswith(("import ", "from "))]


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """The names that the page's examples define, over what the page imports."""
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    imports = [node for node in ast.parse(blocks).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, object] = {}
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for source in EXAMPLES.values():
        exec(source, names)
    return SimpleNamespace(**names)


def test_each_is_at_most_ten_lines():
    assert {"sinks", "windows", "pattern", "infllm", "moba", "threshold", "shared"} <= EXAMPLES.keys()
    assert {name: len(code_lines(source)) for name, source in EXAMPLES.items() if len(code_lines(source)) > 10} == {}


class Problem:
    """Leaves in float64: queries, one pair of keys and values a branch, and the layer's input."""

    def __init__(self, branches: tuple[str, ...]):
        random = torch.Generator().manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=random, requires_grad=True)

        self.q, self.x = leaf(B, HQ, T, D), leaf(B, T, DIM)
        self.kv = {name: (leaf(B, HK, T, D), leaf(B, HK, T, D)) for name in branches}
        self.leaves = [self.q, self.x, *(tensor for pair in self.kv.values() for tensor in pair)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention under a mask that broadcasts to [b, hq, tq, tk]; 0 where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    mask = mask.expand(scores.shape)
    weights = scores.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0).softmax(-1)
    return (weights * mask) @ v.repeat_interleave(group, 1)


def causal(documents: Tensor | None) -> Tensor:
    """[b|1, 1, tq, tk]"""
    token = torch.arange(T)
    mask = (token <= token[:, None])[None]
    return (mask if documents is None else mask & same(documents))[:, None]


def same(documents: Tensor) -> Tensor:
    return (documents[:, :, None] == documents[:, None]) & (documents[:, :, None] >= 0)


def in_document(documents: Tensor | None) -> Tensor:
    """Token number in its document, [b|1, t]."""
    if documents is None:
        return torch.arange(T)[None]
    before = (documents[:, None] == documents[:, :, None]) & (torch.arange(T) < torch.arange(T)[:, None])
    return before.sum(-1)


def tokens_of(blocks: Tensor, size: int) -> Tensor:
    """[b, hq, tq, tk] of chosen blocks [b, hk, tq, s], in one document."""
    return blocks.repeat_interleave(size, -1)[..., :T].repeat_interleave(HQ // HK, 1)


def check(
    attention: nn.Module, problem: Problem, twin: Callable[[Tensor | None], Tensor], documents: Tensor | None = None
) -> None:
    """Output and all gradients are the twin's, compiled too, and a step along them lowers a loss."""
    placing = {} if documents is None else {"documents": documents}
    leaves = [leaf for leaf in (*problem.leaves, *attention.parameters()) if leaf.requires_grad]
    expected = twin(documents)
    expected_gradients = gradients([expected], leaves)
    torch._dynamo.reset()  # compositions share their code, and few graphs of one code are kept
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for run in (attention, compiled):
        out = run(problem.q, problem.kv, problem.x, **placing)
        assert_close([out], [expected])
        assert_close(gradients([out], leaves), expected_gradients)
    target = torch.ones_like(out)

    def loss() -> Tensor:
        return (compiled(problem.q, problem.kv, problem.x, **placing) - target).square().mean()

    before = loss()
    before.backward()
    torch.optim.SGD(leaves, lr=1e-3).step()
    assert loss() < before


def gated(gate: nn.Module, x: Tensor, *outputs: Tensor) -> Tensor:
    return sum(g[..., None] * out for g, out in zip(gate(x).unbind(-1), outputs, strict=True))


@pytest.mark.parametrize("documents", (None, PACKED), ids=("one", "packed"))
def test_sink_tokens_as_a_fourth_branch(page, documents):
    problem = Problem(("compressed", "selected", "window", "sinks"))
    nsa = {
        "compressed": CompressedBranch(CONFIG, MeanPool(CONFIG)),
        "selected": SelectedBranch(CONFIG),
        "window": page.WindowBranch(CONFIG),
    }
    selector, gate = ImportanceSelector(CONFIG), SigmoidGate(DIM, HQ, 4).double()
    four = SparseAttention({**nsa, "sinks": page.SinkBranch()}, gate, selector=selector)
    others = SparseAttention(nsa, lambda x: gate(x)[..., :3], selector=selector)

    def twin(documents: Tensor | None) -> Tensor:
        kv = {name: problem.kv[name] for name in nsa}
        mask = causal(documents) & (in_document(documents) < 4)[:, None, None]
        sinks = dense(problem.q, *problem.kv["sinks"], mask)
        return others(problem.q, kv, problem.x, documents=documents) + gate(problem.x)[..., 3:] * sinks

    check(four, problem, twin, documents)


@pytest.mark.parametrize("documents", (None, PACKED), ids=("one", "packed"))
def test_a_window_for_each_head(page, documents):
    problem, widths = Problem(("window",)), (1, 3, 8, 40)
    gate = SigmoidGate(DIM, HQ, 1).double()
    attention = SparseAttention({"window": page.HeadWindows(list(widths))}, gate)

    def twin(documents: Tensor | None) -> Tensor:
        token = torch.arange(T)
        near = token[:, None] - token < torch.tensor(widths)[:, None, None]
        return gated(gate, problem.x, dense(problem.q, *problem.kv["window"], causal(documents) & near))

    check(attention, problem, twin, documents)


@pytest.mark.parametrize("documents", (None, PACKED), ids=("one", "packed"))
def test_any_causal_pattern(page, documents):
    problem, pattern = Problem(("pattern",)), power_attention(2, sinks=1)
    attention = SparseAttention({"pattern": page.PatternBranch(pattern)}, page.ungated(HQ, 1))
    mask = create_mask(pattern, 1, 1, T, T, device="cpu")
    check(
        attention,
        problem,
        lambda documents: dense(problem.q, *problem.kv["pattern"], causal(documents) & mask),
        documents,
    )


def shared_pair(problem: Problem) -> None:
    """One K and V for all branches."""
    pair = next(iter(problem.kv.values()))
    problem.kv = dict.fromkeys(problem.kv, pair)
    problem.leaves = [problem.q, *pair]


def test_scores_without_an_output(page):
    """InfLLM-V2's zero-parameter form: dense attention to what the mean-pooled keys choose."""
    problem = Problem(("compressed", "selected"))
    shared_pair(problem)
    attention = page.parameter_free(CONFIG, HQ)
    assert not list(attention.parameters())
    where = oracle.layout(CONFIG, B, T)
    k, v = problem.kv["selected"]
    with torch.no_grad():
        importance = oracle.block_importance(problem.q, oracle.mean_pool(k, where), where)
    chosen = oracle.select_blocks(importance, where)
    blocks = torch.stack([(chosen == block).any(-1) for block in range(where.num_blocks)], -1)
    check(attention, problem, lambda _: dense(problem.q, k, v, causal(None) & tokens_of(blocks, 4)))


def test_moba(page):
    """Mean keys, the own block forced, the best of those before it; chosen head by head, as each has its own keys."""
    problem, block, top = Problem(("compressed", "selected")), 4, 3
    problem.q = problem.q.detach()[:, :HK].requires_grad_()
    shared_pair(problem)
    k, v = problem.kv["selected"]
    count = -(-T // block)
    own = torch.arange(T)[:, None] // block
    means = torch.stack([k[:, :, i * block : (i + 1) * block].mean(2) for i in range(count)], 2)
    score = (problem.q @ means.mT).masked_fill(torch.arange(count) > own, -torch.inf)
    score = score.masked_fill(torch.arange(count) == own, torch.inf)
    best, index = score.topk(top)
    blocks = torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, best > -torch.inf)
    mask = causal(None) & blocks.repeat_interleave(block, -1)[..., :T]
    check(page.moba(block, top, HK), problem, lambda _: dense(problem.q, k, v, mask))


def test_all_blocks_above_a_share(page):
    problem = Problem(("compressed", "selected"))
    k_cmp, v_cmp = (x[:, :, : CONFIG.num_compressed(T)].detach() for x in problem.kv["compressed"])
    problem.kv["compressed"] = (2 * k_cmp, v_cmp)
    problem.leaves = [problem.q, *problem.kv["selected"]]
    gate = SigmoidGate(DIM, HQ, 2).double()
    gate.proj.bias.data.view(HQ, 2)[:, 0] = -torch.inf  # the selected branch alone, through the same gates
    gate.requires_grad_(False)
    attention = SparseAttention(
        {"compressed": CompressedBranch(CONFIG), "selected": SelectedBranch(CONFIG)},
        gate,
        selector=page.ThresholdSelector(CONFIG),
    )
    where = oracle.layout(CONFIG, B, T)
    importance = oracle.block_importance(problem.q.detach(), problem.kv["compressed"][0], where)
    own = torch.arange(where.num_blocks) == torch.arange(T)[:, None] // 4
    blocks = own | (importance > 0.05 * importance.sum(-1, keepdim=True))
    assert 2 < blocks.sum(-1).float().mean() < where.num_blocks - 1 and blocks.sum(-1).max() <= 8

    def twin(_: Tensor | None) -> Tensor:
        chosen = dense(problem.q, *problem.kv["selected"], causal(None) & tokens_of(blocks, 4))
        return gate(problem.x)[..., 1:] * chosen

    problem.leaves = [problem.q, *problem.kv["selected"]]
    check(attention, problem, twin)


def test_one_selection_for_two_layers(page):
    problem = Problem(("compressed", "selected"))
    problem.x = problem.x.detach().repeat(1, 1, 3)[..., : HQ * D].requires_grad_()
    problem.leaves[1] = problem.x
    first = SparseAttention(
        {"compressed": CompressedBranch(CONFIG, MeanPool(CONFIG)), "selected": SelectedBranch(CONFIG)},
        SigmoidGate(HQ * D, HQ, 2).double(),
        selector=ImportanceSelector(CONFIG),
    )
    second = SparseAttention({"selected": SelectedBranch(CONFIG)}, SigmoidGate(HQ * D, HQ, 1).double())

    def twin(_: Tensor | None) -> Tensor:
        x = problem.x + first(problem.q, problem.kv, problem.x).transpose(1, 2).flatten(2)
        blocks = first.attend(problem.q, problem.kv, problem.x).selection.to_mask(CONFIG.num_blocks(T))
        again = dense(problem.q, *problem.kv["selected"], causal(None) & tokens_of(blocks, 4))
        return gated(second.gate, x, again)

    check(page.TwoLayers(first, second), problem, twin)


def test_the_forced_sinks_of_the_page_hold_the_masks_of_the_call(page):
    """A mask mod narrows the branches of the page like any other."""
    problem = Problem(("sinks", "window"))
    attention = SparseAttention(
        {"sinks": page.SinkBranch(), "window": page.HeadWindows([3, 3, 9, 9])}, page.ungated(HQ, 2)
    )
    token = torch.arange(T)
    table = ((token[:, None] + token) % 3 > 0) & (token <= token[:, None])
    near = token[:, None] - token < torch.tensor([3, 3, 9, 9])[:, None, None]
    expected = dense(problem.q, *problem.kv["sinks"], table & (token < 4)) + dense(
        problem.q, *problem.kv["window"], table & near
    )
    found = attention(problem.q, problem.kv, problem.x, mask_mod=lambda b, h, i, j: table[i, j])
    assert_close([found], [expected])
