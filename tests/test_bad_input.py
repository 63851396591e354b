"""Bad input is refused before any work: the error names the argument, what was expected and what came."""

import pytest
import torch

import flexnsa
from flexnsa import (
    BranchKV,
    MeanPool,
    MLPCompressor,
    NativeSparseAttention,
    NSAConfig,
    Selection,
    SigmoidGate,
    SparseAttention,
    WindowBranch,
    compressed_attention,
    documents_from_lengths,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=6)


def inputs(tokens=20, *, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float32):
    q = torch.randn(1, heads, tokens, dim, dtype=dtype)
    k, v = (torch.randn(1, kv_heads, tokens, d, dtype=dtype) for d in (dim, value_dim))
    return q, k, v, torch.rand(1, heads, tokens, 3, dtype=dtype)


def attend(q, k, v, gates, config=CONFIG, compressor=None, **options):
    return native_sparse_attention(q, BranchKV.shared(k, v), gates, config, compressor or MeanPool(config), **options)


CONFIGS = [
    (dict(compress_stride=0), ValueError, "compress_stride must be at least 1, got 0"),
    (dict(num_initial=-1), ValueError, "num_initial must be at least 0"),
    (dict(window=0), ValueError, "window must be at least 1"),
    (dict(window=1.5), TypeError, "window must be an int"),
    (dict(num_selected=True), TypeError, "num_selected must be an int"),
    (dict(compress_block=24), ValueError, "compress_stride must divide compress_block"),
    (dict(select_block=72), ValueError, "compress_stride must divide select_block"),
    (dict(compress_block=128), ValueError, "compress_block must be at most select_block"),
    (dict(num_selected=2), ValueError, "num_selected counts the forced blocks.*raise num_selected to 3"),
]


@pytest.mark.parametrize(("fields", "error", "message"), CONFIGS)
def test_config(fields, error, message):
    with pytest.raises(error, match=message):
        NSAConfig(**fields)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        CONFIG.window = 3


def test_wrong_rank():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match=r"q must have the axes \[b hq tq d\]"):
        attend(q[0], k, v, gates)
    with pytest.raises(ValueError, match="v must have the axes"):
        window_attention(q, k, v[0], CONFIG)
    with pytest.raises(TypeError, match="q must be a tensor"):
        window_attention([1.0], k, v, CONFIG)


def test_heads_that_do_not_divide():
    q, k, v, gates = inputs(heads=5)
    with pytest.raises(ValueError, match="5 query heads and 2 KV heads"):
        attend(q, k, v, gates)


def test_key_dims_that_differ():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match=r"kv.compressed\[0\] must have q's key dim 8, got 7"):
        attend(q, k[..., :7], v, gates)


def test_values_that_do_not_fit_keys():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="v must share its first three axes"):
        window_attention(q, k, v[:, :, :-1], CONFIG)


def test_batches_that_differ():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="k must have q's batch 2, got 1"):
        window_attention(q.expand(2, -1, -1, -1), k, v, CONFIG)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_gates_of_the_wrong_width(width):
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match=r"gates must be \[b, hq, tq, 3\]"):
        attend(q, k, v, gates[..., :1].expand(-1, -1, -1, width))


def test_branches_whose_values_differ():
    q, k, v, gates = inputs()
    kv = BranchKV(compressed=(k, v), selected=(k, v), window=(k, v[..., :4]))
    with pytest.raises(ValueError, match="value dims must agree"):
        native_sparse_attention(q, kv, gates, CONFIG, MeanPool(CONFIG))


def test_a_config_that_does_not_fit_the_compressor():
    q, k, v, gates = inputs()
    other = NSAConfig(compress_block=8, compress_stride=2, select_block=8, num_selected=3)
    with pytest.raises(ValueError, match="compressor was made for compress_block=8, but config has compress_block=4"):
        attend(q, k, v, gates, compressor=MeanPool(other))
    with pytest.raises(ValueError, match="compressor was made for"):
        layer = NativeSparseAttention(
            dim=8, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG, compressor=MeanPool(other)
        )
        layer(torch.randn(1, 20, 8))


def test_a_compressor_that_returns_the_wrong_number():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match="compressor must return keys of shape"):
        attend(q, k, v, gates, compressor=lambda k, v, starts=None: (k, v))


def test_a_compressor_without_pool():
    _, k, v, _ = inputs()
    with pytest.raises(NotImplementedError, match="must define pool"):
        flexnsa.BlockCompressor(CONFIG)(k, v)


def test_compressor_sizes():
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1"):
        MLPCompressor(CONFIG, num_kv_heads=0, head_dim=8)


POSITIONS = [
    (torch.arange(-1, 19), "must lie in 0 .. 19"),
    (torch.arange(1, 21), "must lie in 0 .. 19"),
    (torch.arange(19, -1, -1), "strictly increasing"),
    (torch.zeros(20, dtype=torch.int64), "strictly increasing"),
    (torch.arange(20.0), "must be int64"),
    (torch.arange(19), r"must be \[tq\]"),
    (torch.arange(20)[None].expand(3, -1), r"must be \[tq\]"),
    (range(1, 21), "must lie in 0 .. 19"),
    (range(19), "must be a range of step 1 over tq=20 tokens"),
    (range(0, 40, 2), "must be a range of step 1 over tq=20 tokens"),
]


@pytest.mark.parametrize(("positions", "message"), POSITIONS)
def test_positions(positions, message):
    with pytest.raises(ValueError, match=f"positions .*{message}"):
        attend(*inputs(), positions=positions)


def test_fewer_queries_without_positions():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match="positions is None.*tq=4 and tk=20"):
        attend(q[:, :, :4], k, v, gates[:, :, :4])


DOCUMENTS = [
    (torch.zeros(1, 19, dtype=torch.int64), r"documents must be \[b, tk\]"),
    (torch.zeros(20, dtype=torch.int64), r"documents must be \[b, tk\]"),
    (torch.zeros(1, 20), "documents must be signed integer"),
    (torch.arange(19, -1, -1)[None], "non-decreasing"),
    (torch.tensor([[0] * 8 + [1] * 6 + [0] * 6]), "non-decreasing"),
    (torch.tensor([[0] * 5 + [-1] * 5 + [1] * 10]), "padding"),
    (torch.full((1, 20), -2), "-1 for padding"),
]


@pytest.mark.parametrize(("documents", "message"), DOCUMENTS)
def test_documents(documents, message):
    with pytest.raises(ValueError, match=message):
        attend(*inputs(), documents=documents)


@pytest.mark.parametrize(
    ("lengths", "message"), [([3, 0], "at least 1"), ([30], "at most tokens=20"), ([[3], [-1]], "at least 1")]
)
def test_document_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        documents_from_lengths(lengths, 20)


@pytest.mark.parametrize("empty", ["queries", "keys", "both"])
def test_empty_sequences(empty):
    q, k, v, gates = inputs()
    if empty != "keys":
        q, gates = q[:, :, :0], gates[:, :, :0]
    if empty != "queries":
        k, v = k[:, :, :0], v[:, :, :0]
    with pytest.raises(ValueError, match="is empty along t"):
        attend(q, k, v, gates, positions=torch.arange(q.shape[2]))
    with pytest.raises(ValueError, match="x is empty along t"):
        NativeSparseAttention(dim=8, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG)(torch.randn(1, 0, 8))


def test_dtypes():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match="q must be floating point, got torch.int64"):
        attend(q.long(), k, v, gates)
    with pytest.raises(ValueError, match=r"\[0\] must have the dtype of q"):
        attend(q, k.double(), v, gates)
    with pytest.raises(ValueError, match=r"\[1\] must have the dtype of q"):
        attend(q, k, v.half(), gates)
    with pytest.raises(ValueError, match="gates must have the dtype of q"):
        attend(q, k, v, gates.half())


def test_devices():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="v must have the device of q, cpu, got meta"):
        window_attention(q, k, v.to("meta"), CONFIG)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale(scale):
    with pytest.raises(ValueError, match="scale must be finite"):
        attend(*inputs(), scale=scale)


def test_scale_zero_is_a_value():
    q, k, v, _ = inputs()
    zero, tiny = (window_attention(q, k, v, CONFIG, scale=scale).out for scale in (0.0, 1e-30))
    torch.testing.assert_close(zero, tiny)


def test_impl():
    with pytest.raises(ValueError, match="impl must be one of"):
        attend(*inputs(), impl="fastest")
    q, k, v, gates = inputs()
    with pytest.raises(NotImplementedError, match='impl="flex" cannot run .* no backward on a CPU'):
        attend(q.requires_grad_(), k, v, gates, impl="flex")


INDICES = [
    (torch.zeros(1, 2, 20, 3), "must be int32"),
    (torch.zeros(1, 4, 20, 1, dtype=torch.int32), r"must be \[b, hk, tq, n\]"),
    (torch.zeros(1, 2, 20, 0, dtype=torch.int32), r"must be \[b, hk, tq, n\]"),
    (torch.full((1, 2, 20, 1), 3, dtype=torch.int32), "must lie in 0 .. 2"),
    (torch.full((1, 2, 20, 1), -2, dtype=torch.int32), "must lie in 0 .. 2"),
    (torch.tensor([1, 0], dtype=torch.int32).expand(1, 2, 20, 2), "ascending"),
    (torch.tensor([1, 1], dtype=torch.int32).expand(1, 2, 20, 2), "ascending"),
    (torch.tensor([-1, 1], dtype=torch.int32).expand(1, 2, 20, 2), "ascending"),
]


@pytest.mark.parametrize(("indices", "message"), INDICES)
def test_selection_contract(indices, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=f"selection.indices .*{message}"):
        selected_attention(q, k, v, Selection(indices), CONFIG)


def test_scoring_arguments():
    q, k, v, _ = inputs()
    k_cmp, v_cmp = MeanPool(CONFIG)(k, v)
    lse = compressed_attention(q, k_cmp, v_cmp, CONFIG).lse
    with pytest.raises(ValueError, match="k_cmp must hold 9 compressed tokens for num_tokens=20, got 8"):
        select_blocks(q, k_cmp[:, :, :8], lse, CONFIG, num_tokens=20)
    with pytest.raises(ValueError, match="lse must have q's shape"):
        select_blocks(q, k_cmp, lse[:, :2], CONFIG, num_tokens=20)
    with pytest.raises(ValueError, match="num_tokens must be at least 1"):
        select_blocks(q, k_cmp, lse, CONFIG, num_tokens=0)


LAYERS = [
    (dict(num_heads=3), "num_heads must be a multiple of num_kv_heads"),
    (dict(dim=0), "dim must be at least 1"),
    (dict(head_dim=7, rope_theta=1e4), "head_dim must be even"),
    (dict(rope_theta=0.0), "rope_theta must be above 0"),
]


@pytest.mark.parametrize(("changes", "message"), LAYERS)
def test_layer_sizes(changes, message):
    sizes = dict(dim=8, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG) | changes
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(**sizes)


def test_layer_takes_no_dropout():
    with pytest.raises(TypeError, match="dropout"):
        NativeSparseAttention(dim=8, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG, dropout=0.1)


def test_layer_input():
    layer = NativeSparseAttention(dim=8, num_heads=4, num_kv_heads=2, head_dim=8, config=CONFIG)
    with pytest.raises(ValueError, match=r"x must have the axes \[b t dim\]"):
        layer(torch.randn(20, 8))
    with pytest.raises(ValueError, match="x must be .*dim=8"):
        layer(torch.randn(1, 20, 9))


class WrongShape:
    def attend(self, q, k, v, context):
        return flexnsa.AttentionOutput(q[:, :1], q[..., 0])


class NotAnOutput:
    def attend(self, q, k, v, context):
        return q


class ReadsSelection:
    def attend(self, q, k, v, context):
        return selected_attention(q, k, v, context.selection, CONFIG)


def compose(branch, *, names=("own",), selector=None, gate=None):
    return SparseAttention({name: branch for name in names}, gate or SigmoidGate(8, 4, len(names)), selector=selector)


COMPOSITIONS = [
    (WrongShape(), ValueError, 'branch "own" must return out of shape'),
    (NotAnOutput(), TypeError, 'branch "own" must return AttentionOutput'),
    (ReadsSelection(), ValueError, 'branch "own" reads the selection, but selector is None'),
]


@pytest.mark.parametrize(("branch", "error", "message"), COMPOSITIONS)
def test_branches(branch, error, message):
    q, k, v, _ = inputs()
    with pytest.raises(error, match=message):
        compose(branch)(q, {"own": (k, v)}, torch.randn(1, 20, 8))


def test_a_selector_before_its_branch():
    q, k, v, _ = inputs()
    attention = compose(ReadsSelection(), selector=flexnsa.ImportanceSelector(CONFIG))
    with pytest.raises(ValueError, match='needs branch "compressed" before it'):
        attention(q, {"own": (k, v)}, torch.randn(1, 20, 8))


@pytest.mark.parametrize("name", ["a.b", "", "forward", "keys"])
def test_branch_names(name):
    with pytest.raises(ValueError, match="cannot name a submodule"):
        compose(WindowBranch(CONFIG), names=(name,))


def test_composition_arguments():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="branches is empty"):
        SparseAttention({}, SigmoidGate(8, 4, 1))
    with pytest.raises(ValueError, match="kv must have the branches' names"):
        compose(WindowBranch(CONFIG))(q, {"other": (k, v)}, torch.randn(1, 20, 8))
    elsewhere = {"other": torch.arange(20)}
    with pytest.raises(ValueError, match="positions must have the branches' names"):
        compose(WindowBranch(CONFIG))(q, {"own": (k, v)}, torch.randn(1, 20, 8), positions=elsewhere)
    with pytest.raises(ValueError, match="gates must be"):
        compose(WindowBranch(CONFIG), gate=SigmoidGate(8, 4, 2))(q, {"own": (k, v)}, torch.randn(1, 20, 8))


def test_values_are_checked_on_cuda_only_when_asked():
    cuda_like = torch.empty(1, device="meta")
    assert not flexnsa.checks.values_are_checked(cuda_like)
    with flexnsa.debug():
        assert flexnsa.checks.values_are_checked(cuda_like)
    assert not flexnsa.checks.values_are_checked(cuda_like)


def test_config_takes_its_fields_by_position():
    assert NSAConfig(32, 16, 64, 16, 1, 2, 512) == NSAConfig()


def test_values_of_the_wrong_type():
    q, k, v, gates = inputs()
    with pytest.raises(TypeError, match="positions must be a tensor"):
        attend(q, k, v, gates, positions=list(range(20)))
    with pytest.raises(TypeError, match="documents must be a tensor"):
        attend(q, k, v, gates, documents=[[0] * 20])
    with pytest.raises(ValueError, match="signed integer ids"):
        attend(q, k, v, gates, documents=torch.zeros(1, 20, dtype=torch.uint8))
    with pytest.raises(TypeError, match="kv must be a BranchKV"):
        native_sparse_attention(q, ((k, v),) * 3, gates, CONFIG, MeanPool(CONFIG))
    with pytest.raises(TypeError, match="selection must be a Selection"):
        selected_attention(q, k, v, torch.zeros(1, 2, 20, 1, dtype=torch.int32), CONFIG)
    with pytest.raises(ValueError, match="explain needs tensors"):
        flexnsa.explain()


def test_a_compressor_for_other_heads():
    q, k, v, gates = inputs()
    with pytest.raises(ValueError, match="k must have the 1 KV heads that MLPCompressor was made for, got 2"):
        attend(q, k, v, gates, compressor=MLPCompressor(CONFIG, num_kv_heads=1, head_dim=8))


def test_an_lse_of_lower_precision():
    q, k, v, _ = inputs()
    k_cmp, v_cmp = MeanPool(CONFIG)(k, v)
    lse = compressed_attention(q, k_cmp, v_cmp, CONFIG).lse
    with pytest.raises(ValueError, match="lse must be torch.float32"):
        select_blocks(q, k_cmp, lse.bfloat16(), CONFIG, num_tokens=20)


class Chooses:
    """A selector that returns whatever it was given."""

    def __init__(self, selection):
        self.selection = selection

    def select(self, q, context):
        return self.selection


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (flexnsa.Selection(torch.tensor([2, 1], dtype=torch.int32).expand(1, 2, 20, 2)), ValueError, "ascending"),
        (flexnsa.Selection(torch.tensor([-1, 1], dtype=torch.int32).expand(1, 2, 20, 2)), ValueError, "ascending"),
        (flexnsa.Selection(torch.full((1, 2, 20, 1), 3, dtype=torch.int32)), ValueError, "must lie in 0 .. 2"),
        (flexnsa.Selection(torch.zeros(1, 4, 20, 1, dtype=torch.int32)), ValueError, r"\[b, hk, tq, n\]"),
        (torch.zeros(1, 2, 20, 1, dtype=torch.int32), TypeError, "selector must return Selection"),
    ],
)
def test_a_selector_that_breaks_the_contract(selection, error, message):
    q, k, v, _ = inputs()
    attention = compose(flexnsa.SelectedBranch(CONFIG), selector=Chooses(selection))
    with pytest.raises(error, match=message):
        attention(q, {"own": (k, v)}, torch.randn(1, 20, 8))


@pytest.mark.gpu
def test_a_selectors_contract_is_checked_on_cuda_in_debug_mode():
    q, k, v, _ = (x.cuda() for x in inputs(dim=16, value_dim=16))
    descending = torch.tensor([1, 0], dtype=torch.int32, device="cuda").expand(1, 2, 20, 2)
    attention = compose(flexnsa.SelectedBranch(CONFIG), selector=Chooses(flexnsa.Selection(descending))).cuda()
    x = torch.randn(1, 20, 8, device="cuda")
    attention(q, {"own": (k, v)}, x)
    with flexnsa.debug(), pytest.raises(ValueError, match="ascending"):
        attention(q, {"own": (k, v)}, x)


class NoLSE:
    def attend(self, q, k, v, context):
        return flexnsa.AttentionOutput(q, None)


def test_a_branch_without_an_lse():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match='branch "own" must return lse'):
        compose(NoLSE())(q, {"own": (k, v)}, torch.randn(1, 20, 8))


def test_documents_from_a_tensor_of_lengths():
    assert documents_from_lengths(torch.tensor([2, 3]), 6).tolist() == [[0, 0, 1, 1, 1, -1]]
