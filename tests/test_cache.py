"""Whatever way a sequence is cut into calls, rolled back and continued, the cache gives what one full pass gives."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flexnsa.cache.append
import flexnsa.cache.cache
import flexnsa.cache.fill
import flexnsa.checks
import flexnsa.layer
import flexnsa.layout
from conftest import assert_as_accurate, assert_close, geometries, gradients, part
from flexnsa import MeanPool, NativeSparseAttention, NSACache, NSAConfig, Selection
from flexnsa.cache import takes_kernels
from flexnsa.cache.stores import Ring, Store

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, num_local=1, window=5)
SIZES = {"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "value_dim": 3}
ALL = {"rope_theta": 100.0, "qk_norm": True}


def build(config: NSAConfig = CONFIG, dtype: torch.dtype = torch.float64, **options) -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(**{"config": config, **SIZES, **options})
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype)


def tokens(batch: int, count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 12, dtype=torch.float64, generator=generator).to(dtype)


def fill_with_nan(cache: NSACache) -> NSACache:
    for store in (cache.selected, cache.compressed, cache.window, cache.raw):
        store.k.fill_(torch.nan)
        store.v.fill_(torch.nan)
    return cache


class Conversation:
    """A cache and, row by row, what it should hold: every call is remembered and checked against one full pass."""

    def __init__(self, layer: NativeSparseAttention, batch: int, max_tokens: int, max_rollback: int = 0):
        self.layer, self.dtype = layer, layer.q_proj.weight.dtype
        self.cache = layer.new_cache(batch, max_tokens, max_rollback)
        self.inputs: list[Tensor] = [tokens(1, 0, self.dtype)[0]] * batch
        self.outputs = list(self.inputs)
        self.calls = 0

    def say(self, counts: list[int], left: list[int] | None = None, width: int | None = None) -> None:
        """Add ``counts`` tokens to the rows; padding on the left, and on the right up to ``width``, holds NaN."""
        self.calls += 1
        left = [0] * len(counts) if left is None else left
        width = max(map(sum, zip(counts, left, strict=True))) if width is None else width
        x = tokens(len(counts), width, self.dtype, seed=self.calls)
        real = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row, (count, begin) in enumerate(zip(counts, left, strict=True)):
            real[row, begin : begin + count] = True
        documents = None if real.all() else real.long() - 1
        with torch.no_grad():
            out = self.layer(x.masked_fill(~real[..., None], torch.nan), cache=self.cache, documents=documents)
        assert not out[~real].any()
        for row in range(len(counts)):
            self.inputs[row] = torch.cat((self.inputs[row], x[row][real[row]]))
            self.outputs[row] = torch.cat((self.outputs[row], out[row][real[row]]))

    def crop(self, counts: list[int]) -> None:
        self.cache.crop(counts[0] if len(set(counts)) == 1 else torch.tensor(counts))
        for row, count in enumerate(counts):
            end = len(self.inputs[row]) - count
            self.inputs[row], self.outputs[row] = self.inputs[row][:end], self.outputs[row][:end]

    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder(torch.tensor(rows))
        self.inputs, self.outputs = ([kept[row] for row in rows] for kept in (self.inputs, self.outputs))

    def check(self) -> None:
        lengths = [len(row) for row in self.inputs]
        assert self.cache.lengths.tolist() == lengths
        assert self.cache.batch == len(lengths)
        for row, length in enumerate(lengths):
            if length:
                with torch.no_grad():
                    assert_close([self.outputs[row]], [self.layer(self.inputs[row][None])[0]])


OPTIONS = st.fixed_dictionaries(
    {
        "shared_kv": st.booleans(),
        "rope_theta": st.sampled_from((None, 100.0)),
        "qk_norm": st.booleans(),
        "compress_rotated": st.booleans(),
    }
)


@part(2)
@given(data=st.data(), config=geometries(), options=OPTIONS)
def test_any_cutting_equals_one_pass(data, config, options):
    total = data.draw(st.integers(1, 45))
    talk = Conversation(build(config, **options), 2, max_tokens=total)
    while (room := total - len(talk.inputs[0])) > 0:
        talk.say([data.draw(st.one_of(st.just(1), st.integers(1, room)))] * 2)
    talk.check()


@part(2)
@given(data=st.data(), config=geometries(), options=OPTIONS)
def test_ragged_rows_rollbacks_and_reordering_equal_one_pass(data, config, options):
    """Padding with NaN on either side of any call, any crop that fits, rows repeated and left out."""
    capacity, rollback, longest = data.draw(st.sampled_from((45, 20, 7))), data.draw(st.integers(0, 20)), [0, 0]
    talk = Conversation(build(config, **options), 2, capacity, rollback)
    if data.draw(st.booleans()):
        fill_with_nan(talk.cache)
    for _ in range(data.draw(st.integers(1, 8))):
        held = [len(row) for row in talk.inputs]
        action = data.draw(st.sampled_from(("say", "say", "step", "crop", "reorder")))
        if action == "say":
            counts = [data.draw(st.integers(0, min(20, capacity - length))) for length in held]
            left = [data.draw(st.integers(0, 3)) for _ in held]
            most = max(map(sum, zip(counts, left, strict=True)))
            talk.say(counts, left, max(1, most) + data.draw(st.integers(0, 3)))
        elif action == "step" and max(held) < capacity:
            talk.say([1] * len(held))
        elif action == "crop":
            depth = [length - max(0, peak - rollback) for length, peak in zip(held, longest, strict=True)]
            talk.crop([data.draw(st.integers(0, most)) for most in depth])
        elif action == "reorder":
            rows = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=3))
            talk.reorder(rows)
            longest = [longest[row] for row in rows]
        longest = [max(peak, len(row)) for peak, row in zip(longest, talk.inputs, strict=True)]
    talk.check()


def borders(config: NSAConfig) -> Iterator[int]:
    for size in (config.compress_block, config.compress_stride, config.select_block, config.window):
        for multiple in (1, 2):
            yield from (size * multiple + step for step in (-1, 0, 1) if size * multiple + step > 0)


@pytest.mark.parametrize("impl", ("reference", "flex"))
@pytest.mark.parametrize("cut", sorted(set(borders(CONFIG))))
def test_a_cut_at_a_border_and_one_token_around_it(cut, impl):
    dtype = torch.float64 if impl == "reference" else torch.float32
    talk = Conversation(build(dtype=dtype, impl=impl, **ALL), 1, max_tokens=48)
    for count in (cut, 1, 1, 48 - 2 - cut):
        talk.say([count])
    talk.check()


@pytest.mark.parametrize(
    "depth", (1, CONFIG.compress_stride, CONFIG.select_block, CONFIG.window + 1, 2 * CONFIG.select_block + 1)
)
@pytest.mark.parametrize("length", (17, 31, 32, 33))
def test_rolling_back_equals_never_having_gone_there(depth, length):
    talk = Conversation(build(**ALL), 2, max_tokens=64, max_rollback=depth)
    talk.say([length, length - 9], left=[0, 4])
    for _ in range(depth):
        talk.say([1, 1])
    talk.crop([depth, depth])
    talk.say([7, 5])
    talk.say([1, 1])
    talk.check()


@pytest.mark.parametrize("impl", ("reference", "flex"))
def test_dropped_tokens_that_were_nan_leave_no_trace(impl):
    """On the tiled engines too, which multiply what they mask by 0."""
    layer, x = build(dtype=torch.float32, impl=impl), tokens(2, 30, torch.float32)
    draft = x[:, 13:19].clone()
    draft[1] = torch.nan
    cache = layer.new_cache(2, 30, max_rollback=6)
    with torch.no_grad():
        layer(x[:, :13], cache=cache)
        layer(draft, cache=cache)
        cache.crop(torch.tensor([0, 6]))
        found = layer(x[:, 19:21], cache=cache)
        expected = layer(torch.cat((x[1:, :13], x[1:, 19:21]), dim=1))
        assert_close([found[1:]], [expected[:, 13:]])
        cache.reset()
        documents = torch.tensor([[0] * 30, [0] * 9 + [-1] * 21])
        assert_close([layer(x, cache=cache, documents=documents)], [layer(x, documents=documents)])


def test_a_reset_cache_is_as_new():
    layer = build(**ALL)
    talk, fresh = Conversation(layer, 2, 30, 4), Conversation(layer, 2, 30, 4)
    talk.say([20, 7])
    talk.cache.reset()
    talk = Conversation.__new__(Conversation)
    talk.__dict__.update(fresh.__dict__)
    talk.say([9, 12], left=[2, 0])
    talk.check()


def test_no_slot_is_written_twice_in_one_call(monkeypatch):
    """Not even by a call longer than the ring: which write would win differs by device."""
    kept = Ring._kept

    def checked(self, position, keep):
        slot = kept(self, position, keep)
        for row in slot.tolist():
            written = [place for place in row if place < self.slots]
            assert len(written) == len(set(written))
        return slot

    monkeypatch.setattr(Store, "_kept", checked)
    talk = Conversation(build(**ALL), 2, 40, 2)
    talk.say([30, 17], left=[0, 3])
    talk.say([9, 9])
    talk.check()


def test_rows_of_another_number_make_another_batch():
    talk = Conversation(build(**ALL), 1, 30)
    talk.say([11])
    talk.reorder([0, 0, 0])
    talk.say([3, 1, 2])
    talk.reorder([2, 0])
    talk.say([1, 1])
    talk.check()


class Recording(MeanPool):
    """Remembers every block that it is fed."""

    def __init__(self, config):
        super().__init__(config)
        self.fed, self.slots = [], 0

    def forward(self, k, v, *, starts=None):
        begins = torch.arange(CONFIG.num_compressed(k.shape[2]))[None] * 2 if starts is None else starts
        for row, row_begins in enumerate(begins.expand(k.shape[0], -1).tolist()):
            self.fed += [(row, k[row, :, start : start + 4].clone()) for start in row_begins if start >= 0]
        self.slots += begins.shape[1]
        return super().forward(k, v, starts=starts)


def test_the_compressor_is_fed_each_block_once():
    layer = build(compressor=Recording(CONFIG))
    x = tokens(2, 43)
    cache = layer.new_cache(2, 43)
    with torch.no_grad():
        for part_of_x in x.split([1, 9, *[1] * 20, 13], dim=1):
            layer(part_of_x, cache=cache)
    fed = layer.compressor.fed
    assert len(fed) == 2 * CONFIG.num_compressed(43)
    assert layer.compressor.slots == CONFIG.num_compressed(43)  # and no empty ones beside them
    raw = layer.k_proj["compressed"](x).unflatten(-1, (2, 4)).transpose(1, 2)
    for row in range(2):
        blocks = torch.stack([block for owner, block in fed if owner == row])
        assert_close([blocks], [raw[row].unfold(1, 4, 2).permute(1, 0, 3, 2)])


def test_the_compressor_is_fed_each_block_once_in_ragged_rows():
    layer = build(compressor=Recording(CONFIG))
    talk = Conversation(layer, 2, 43)
    talk.say([20, 7], left=[0, 2])
    for counts in ([1, 1], [0, 1], [1, 0], [12, 30], [1, 1]):
        talk.say(counts)
    lengths = [len(row) for row in talk.inputs]
    for row, length in enumerate(lengths):
        assert sum(owner == row for owner, _ in layer.compressor.fed) == CONFIG.num_compressed(length)


@pytest.mark.parametrize("options", ({}, {"shared_kv": True}), ids=("own", "shared"))
def test_a_step_costs_what_compressed_tokens_and_selected_blocks_require(options):
    """Compressed keys are multiplied twice, for the branch and for the scores, compressed values once; no more."""
    layer = build(dtype=torch.float32, **options)
    flops = {}
    for held in (100, 1000, 4000):
        cache = layer.new_cache(1, held + 1)
        with torch.no_grad():
            layer(tokens(1, held, torch.float32), cache=cache)
            with FlopCounterMode(display=False) as counter:
                layer(tokens(1, 1, torch.float32), cache=cache)
        flops[held] = counter.get_total_flops()
    a_compressed_token = 2 * SIZES["num_heads"] * (2 * SIZES["head_dim"] + SIZES["value_dim"])
    for held, count in flops.items():
        more = CONFIG.num_compressed(held + 1) - CONFIG.num_compressed(101)
        assert count - flops[100] == more * a_compressed_token


def test_gathered_blocks_equal_masked_ones():
    """Few queries take copies of their blocks, unless gradients are asked for."""
    from flexnsa import selected_attention

    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64, generator=generator) for h, n in ((4, 2), (2, 70), (2, 70)))
    documents = torch.tensor([[-1] * 3 + [0] * 30 + [4] * 37, [0] * 60 + [-1] * 10])
    positions = torch.tensor([[20, 50], [59, 65]])
    indices = torch.tensor([[[0, 2, -1], [0, 1, 2]], [[3, 6, 7], [0, -1, -1]]], dtype=torch.int32)
    selection = Selection(indices[:, None].repeat(1, 2, 1, 1))
    k[:, :, 61] = torch.nan
    for ids in (None, documents):
        call = {"positions": positions, "documents": ids, "impl": "reference"}
        few = selected_attention(q, k, v, selection, CONFIG, **call)
        masked = selected_attention(q.clone().requires_grad_(), k, v, selection, CONFIG, **call)
        assert_close([x.nan_to_num(7.0) for x in few], [x.detach().nan_to_num(7.0) for x in masked])
        assert few.out[0].isfinite().all()


PAPER = {"dim": 64, "num_heads": 64, "num_kv_heads": 4, "head_dim": 128, "config": NSAConfig()}


@pytest.mark.parametrize("shared_kv", (False, True))
@pytest.mark.parametrize("max_rollback", (0, 64))
def test_memory_at_64k(shared_kv, max_rollback):
    with torch.device("meta"):
        layer = NativeSparseAttention(**PAPER, shared_kv=shared_kv)
    batch, most, config = 3, 65_536, layer.config
    cache = layer.new_cache(batch, most, max_rollback, dtype=torch.bfloat16)
    window, raw = (size + max_rollback for size in (config.window, config.compress_block))
    slots = most + config.num_compressed(most) + window + raw + 4
    assert cache.nbytes == batch * 4 * (128 + 128) * 2 * slots + 16 * batch
    assert cache.nbytes <= 1.10 * batch * 4 * (128 + 128) * 2 * most


def test_nbytes_is_what_the_cache_holds():
    cache = build().new_cache(2, 30, 3)
    found = {id(x): x for x in vars(cache.fill).values() if isinstance(x, Tensor)}
    for store in (cache.selected, cache.compressed, cache.window, cache.raw):
        found |= {id(x): x for x in vars(store).values() if isinstance(x, Tensor)}
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in found.values())
    # A cache shorter than the window holds no more in its rings than there are tokens.
    assert build().new_cache(1, 3, 9).window.slots == 3


@part(10)
@given(data=st.data(), options=OPTIONS)
def test_flex(data, options):
    talk = Conversation(build(dtype=torch.float32, impl="flex", **options), 2, 40, 9)
    for _ in range(3):
        talk.say(
            [data.draw(st.integers(1, 6)) for _ in range(2)], left=[data.draw(st.integers(0, 2)) for _ in range(2)]
        )
    talk.say([1, 1])
    talk.crop([2, 1])
    talk.say([14, 15])
    talk.check()


def test_triton():
    pytest.importorskip("triton")
    talk = Conversation(build(dtype=torch.float32, impl="triton", **ALL), 2, 24, 3)
    talk.say([9, 6], left=[0, 1])
    talk.say([1, 1])
    talk.crop([2, 1])
    talk.say([5, 8])
    talk.check()


@pytest.mark.parametrize("overlap", (1, 2, 4))
def test_single_steps_run_on_the_decoding_kernels(overlap, monkeypatch):
    """Ragged rows, one of them empty; rings that wrap, with slots to go back to; a step with padding; NaN beyond."""
    pytest.importorskip("triton")
    calls = []
    step = flexnsa.layer.attend_to_cache
    monkeypatch.setattr(flexnsa.layer, "attend_to_cache", lambda *inputs: calls.append(1) or step(*inputs))
    config = NSAConfig(2 * overlap, 2, 8, num_selected=3, num_local=1, window=5)
    talk = Conversation(build(config, torch.float32, impl="reference", **ALL), 2, 29, 3)
    talk.say([20, 0], left=[1, 21])
    for row, length in enumerate((20, 0)):
        for store, end in ((talk.cache.selected, length), (talk.cache.compressed, config.num_compressed(length))):
            store.k[row, :, end:], store.v[row, :, end:] = torch.nan, torch.nan
    talk.layer.attention.impl = "triton"
    for _ in range(3):
        talk.say([1, 1])
    talk.crop([3, 0])
    talk.say([0, 1], width=1)
    talk.say([1, 1])
    assert len(calls) == 5
    talk.layer.attention.impl = "reference"
    talk.check()


def test_a_changed_composition_is_not_left_to_the_decoding_kernels():
    layer, q = build(dtype=torch.float32, impl="triton"), torch.empty(1, 4, 1, 4)
    cache = layer.new_cache(1, 10)
    branches = layer.attention.branch_modules
    with torch.no_grad():
        assert takes_kernels(layer.attention, q, cache)
        branches["selected"].score_mod = lambda score, b, h, q, k: score
        assert not takes_kernels(layer.attention, q, cache)
        branches["selected"].score_mod = None
        assert not takes_kernels(layer.attention, q.expand(1, 4, 2, 4), cache)
    assert not takes_kernels(layer.attention, q, cache)


class Replay(torch.nn.Module):
    """A selector that gives out choices made before."""

    def __init__(self, indices: Tensor):
        super().__init__()
        self.indices, self.used = indices, 0

    def select(self, q, context):
        self.used += q.shape[2]
        return Selection(self.indices[:, :, self.used - q.shape[2] : self.used].contiguous())


class Remember(torch.nn.Module):
    """The layer's selector, with a memory."""

    def __init__(self, selector):
        super().__init__()
        self.selector, self.made = selector, []

    def select(self, q, context):
        self.made.append(self.selector.select(q, context).indices)
        return Selection(self.made[-1])


def outputs(layer: NativeSparseAttention, x: Tensor, cuts: list[int], indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """One pass for no cuts, cached calls for some, choosing blocks or with given ones; outputs, and the blocks."""
    own = layer.attention.selector
    layer.attention.selector = selector = Remember(own if indices is None else Replay(indices))
    cache = layer.new_cache(len(x), x.shape[1]) if cuts else None
    with torch.no_grad():
        out = torch.cat([layer(chunk, cache=cache) for chunk in x.split(cuts or x.shape[1], dim=1)], dim=1)
    layer.attention.selector = own
    return out, torch.cat(selector.made, dim=2)


def test_bfloat16_given_the_same_selection(record_property):
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=6, window=16)
    exact, low = build(config, **ALL), build(config, torch.bfloat16, **ALL)
    low.load_state_dict(exact.state_dict())
    exact.load_state_dict(low.state_dict())
    x, cuts = tokens(4, 200).bfloat16(), [90, *[1] * 30, 80]
    one_pass, chosen = outputs(low, x, [], None)
    found, _ = outputs(low, x, cuts, chosen)
    truth, _ = outputs(exact, x.double(), [], chosen)
    assert_as_accurate(found, one_pass, truth)
    differing = (outputs(low, x, cuts, None)[1] != chosen).any(-1).double().mean().item()
    record_property("share of queries whose blocks differ", differing)
    print(f"share of queries whose blocks differ: {differing:.4f}")
    assert differing < 0.05


def snapshot(cache: NSACache) -> list[Tensor]:
    stores = (cache.selected, cache.compressed, cache.window, cache.raw)
    return [x.clone() for x in (cache.lengths, cache.fill.state, *(y for s in stores for y in (s.k, s.v)))]


REFUSED = {
    "full": (lambda c, x: {}, ValueError, "row 0 holds 18 of max_tokens=20 tokens, so that 2 more fit, got 3"),
    "padded": (
        lambda c, x: {"documents": torch.tensor([[-1, -1, 0], [0, 0, 0]])},
        ValueError,
        "cache is full: row 1 holds 18 of max_tokens=20",
    ),
    "batch": (lambda c, x: {"x": x[:1]}, ValueError, "x must have the cache's batch 2, got 1"),
    "width": (lambda c, x: {"x": x[..., :5]}, ValueError, "x must be"),
    "dtype": (lambda c, x: {"x": x[:, :1], "half": True}, ValueError, "cache must hold the keys' dtype torch.float32"),
    "documents": (
        lambda c, x: {"x": x[:, :2], "documents": torch.tensor([[0, 1], [0, 0]])},
        ValueError,
        "each row of a cache holds one document",
    ),
    "documents' shape": (
        lambda c, x: {"documents": torch.zeros(2, 5, dtype=torch.int64)},
        ValueError,
        "documents must be",
    ),
    "hole": (
        lambda c, x: {"documents": torch.tensor([[0, -1, 0], [0, 0, -1]])},
        ValueError,
        "padding .* between documents",
    ),
    "mask": (lambda c, x: {"mask_mod": lambda b, h, q, k: q >= k}, NotImplementedError, "mask_mod"),
    "type": (lambda c, x: {"cache": {}}, TypeError, "cache must be an NSACache, got dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_is_refused_leaves_the_cache_as_it_was(case):
    change, error, message = REFUSED[case]
    layer, x = build(), tokens(2, 21)
    cache = layer.new_cache(2, 20, 4)
    with torch.no_grad():
        layer(x[:, :18], cache=cache)
        before = snapshot(cache)
        call = {"x": x[:, 18:], "cache": cache, **change(cache, x[:, 18:])}
        if call.pop("half", False):
            layer, call["x"] = build(dtype=torch.float32), call["x"].float()
        with pytest.raises(error, match=message):
            layer(call.pop("x"), **call)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(cache), before, strict=True))
        assert_close([build()(x[:, 18:20], cache=cache)], [build()(x[:, :20])[:, 18:]])


@pytest.mark.parametrize(
    "other",
    (
        {"config": NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=6)},
        {"num_kv_heads": 1},
        {"head_dim": 6},
        {"value_dim": 4},
    ),
    ids=lambda other: next(iter(other)),
)
def test_a_cache_of_another_geometry_is_refused(other):
    cache = build(**other).new_cache(1, 9)
    with pytest.raises(ValueError, match="cache must be of the layer's geometry"):
        build()(tokens(1, 4), cache=cache)


def test_a_cache_on_another_device_is_refused():
    with pytest.raises(ValueError, match="cache must be on x's device cpu, got meta"):
        build()(tokens(1, 4), cache=build().new_cache(1, 9).to("meta"))


def test_an_engine_that_cannot_leaves_the_cache_as_it_was():
    layer, x = build(), tokens(1, 8)
    cache = layer.new_cache(1, 8)
    with torch.no_grad():
        layer(x[:, :6], cache=cache)
        layer.attention.impl = "triton"  # no float64
        with pytest.raises(NotImplementedError):
            layer(x[:, 6:], cache=cache)
        layer.attention.impl = "reference"
        assert_close([layer(x[:, 6:], cache=cache)], [layer(x)[:, 6:]])


@pytest.mark.parametrize(
    ("size", "error", "message"),
    (
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"max_rollback": -1}, ValueError, "max_rollback must be at least 0"),
        ({"max_tokens": 9.0}, TypeError, "max_tokens must be an int"),
    ),
)
def test_sizes_of_a_cache(size, error, message):
    with pytest.raises(error, match=message):
        build().new_cache(**{"batch": 1, "max_tokens": 9, **size})


def test_crops_that_cannot_be():
    layer = build()
    cache = layer.new_cache(2, 30, max_rollback=4)
    with torch.no_grad():
        layer(tokens(2, 12), cache=cache, documents=torch.tensor([[0] * 12, [0] * 3 + [-1] * 9]))
    for drop, message in (
        (5, r"in 0 \.\. 4 for row 0, got 5.*max_rollback=4"),
        (4, r"in 0 \.\. 3 for row 1, got 4"),
        (torch.tensor([3, 4]), r"in 0 \.\. 3 for row 1, got 4"),
        (-1, r"in 0 \.\. 4 for row 0, got -1"),
        (torch.tensor([1]), r"\[b\] = \(2,\)"),
        (torch.tensor([1.0, 1.0]), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.crop(drop)
    with pytest.raises(TypeError, match="an int or an int64 tensor"):
        cache.crop(1.5)
    assert cache.lengths.tolist() == [12, 3]
    cache.crop(torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"in 0 \.\. 1 for row 0, got 2"):  # 5 in all, from the 12 that it held
        cache.crop(torch.tensor([2, 0]))
    for rows, message in ((torch.tensor([0, 2]), r"0 \.\. 1"), (torch.tensor([0.0]), "int64")):
        with pytest.raises(ValueError, match=message):
            cache.reorder(rows)
    with pytest.raises(TypeError, match="rows must be an int64 tensor"):
        cache.reorder([0, 1])


def test_gradients_reach_the_tokens_of_the_call_alone():
    layer, x = build(**ALL), tokens(2, 30).requires_grad_()
    cache = layer.new_cache(2, 30)
    documents = torch.tensor([[0] * 21, [-1] * 2 + [0] * 19])
    first = layer(x[:, :21], cache=cache, documents=documents)
    layer(x[:, 21:22], cache=cache)
    leaves = [x, *layer.parameters()]
    assert_close(gradients([first], leaves), gradients([layer(x[:, :21], documents=documents)], leaves))
    later = layer(x[:, 22:], cache=cache)
    dx = gradients([later], [x])[0]
    assert not dx[:, :22].any() and dx[:, 22:].any()


def test_what_autograd_saves_is_no_view_of_what_the_next_call_writes():
    cache = build().new_cache(1, 20)
    for store in (cache.selected, cache.compressed):
        assert store.first(4)[0].data_ptr() != store.k.data_ptr()
        with torch.no_grad():
            assert store.first(4)[0].data_ptr() == store.k.data_ptr()


def test_inference_mode_and_no_grad_may_alternate():
    layer, x = build(), tokens(2, 24)
    with torch.inference_mode():
        cache = layer.new_cache(2, 24, 3)
        found = [layer(x[:, :13], cache=cache)]
        cache.reorder(torch.tensor([1, 0, 1]))
    with torch.no_grad():
        cache.reorder(torch.tensor([1, 0]))
        found.append(layer(x[:, 13:15], cache=cache))
        cache.crop(2)
    with torch.inference_mode():
        found[1] = layer(x[:, 13:], cache=cache)
    assert_close([torch.cat(found, 1)], [layer(x).detach()])


@pytest.fixture
def reckoning(monkeypatch):
    """As on CUDA: values are not read but where the host has lost count; what was read is listed."""
    reads: list[Tensor] = []
    read = flexnsa.cache.fill._read
    monkeypatch.setattr(flexnsa.cache.fill, "_read", lambda state: reads.append(state) or read(state))
    for module in (flexnsa.cache.fill, flexnsa.cache.append, flexnsa.cache.cache):
        monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)
    return reads


def test_the_host_reckons_lengths_that_it_does_not_read(reckoning):
    layer = build(compressor=Recording(CONFIG), **ALL)
    talk = Conversation(layer, 2, 40, 6)
    for count in (17, 1, 1, 1):
        talk.say([count, count])
    assert layer.compressor.slots == CONFIG.num_compressed(20)
    talk.crop([3, 3])
    talk.say([9, 9])
    with pytest.raises(ValueError, match=r"in 0 \.\. 6 for row 0, got 7"):
        talk.cache.crop(7)
    with pytest.raises(ValueError, match="holds 26 of max_tokens=40 tokens, so that 14 more fit, got 15"):
        layer(tokens(2, 15), cache=talk.cache)
    talk.say([14, 14])
    assert not reckoning
    talk.check()


def test_the_host_reads_ragged_lengths_only_when_the_cache_may_be_full(reckoning):
    layer = build(**ALL)
    talk = Conversation(layer, 2, 40, 6)
    talk.say([10, 4], left=[0, 6])
    for _ in range(10):
        talk.say([1, 1])
    talk.reorder([1, 0, 1])
    talk.say([2, 5, 1])
    talk.crop([1, 2, 0])
    assert not reckoning
    talk.say([12, 12, 12])  # to 37 at most, as far as it knows
    assert not reckoning
    talk.say([4, 4, 4])
    assert len(reckoning) == 1
    talk.say([1, 1, 1])
    assert len(reckoning) == 1
    with pytest.raises(ValueError, match="cache is full"):
        layer(tokens(3, 20), cache=talk.cache)
    talk.check()


def test_nothing_waits_for_the_device(reckoning, monkeypatch):
    """On tensors that have no values to read."""
    for module in (flexnsa.layout, flexnsa.checks):
        monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)
    with FakeTensorMode(), torch.no_grad():
        layer = NativeSparseAttention(config=CONFIG, **SIZES, **ALL)
        cache, x, rows = layer.new_cache(2, 100, 8), torch.empty(2, 20, 12), torch.empty(2, dtype=torch.int64)
        layer(x, cache=cache)
        for _ in range(3):
            assert layer(x[:, :1], cache=cache).shape == (2, 1, 12)
        cache.crop(5)
        layer(x, cache=cache, documents=torch.empty(2, 20, dtype=torch.int64))
        cache.fill._known = None
        cache.reorder(rows)
        cache.crop(rows)
        layer(x[:, :1], cache=cache)
        with pytest.raises(DataDependentOutputException):
            rows.tolist()


def test_a_cache_made_under_autocast_is_of_its_dtype():
    layer, x = build(dtype=torch.float32, **ALL), tokens(2, 30, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = layer.new_cache(2, 30)
        found = torch.cat([layer(chunk, cache=cache) for chunk in x.split([20, 1, 9], dim=1)], dim=1)
        expected = layer(x)
    assert cache.dtype == torch.bfloat16
    assert (found - expected).abs().mean() <= 0.05 * expected.abs().mean()


def test_a_compiled_step():
    """One graph for all steps: lengths live on the device."""
    torch._dynamo.reset()
    layer, x = build(**ALL), tokens(2, 40)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    cache = layer.new_cache(2, 40, 4)
    with torch.no_grad():
        found = [layer(x[:, :11], cache=cache)]
        for step in range(11, 30):
            found.append(compiled(x[:, step : step + 1], cache=cache))
        graphs = counter.frame_count
        cache.crop(3)
        found[-3:] = [layer(x[:, 27:32], cache=cache)]
        found += [compiled(x[:, step : step + 1], cache=cache) for step in range(32, 40)]
        assert_close([torch.cat(found, 1)], [layer(x)])
        with pytest.raises(ValueError, match="cache is full"):
            layer(x[:, :1], cache=cache)
    assert graphs == 1
    assert counter.frame_count == 1


def on_cuda(impl: str) -> tuple[NativeSparseAttention, Tensor]:
    config = NSAConfig(compress_block=16, compress_stride=8, select_block=32, num_selected=4, window=40)
    torch.manual_seed(0)
    layer = NativeSparseAttention(dim=64, num_heads=4, num_kv_heads=2, head_dim=32, config=config, impl=impl, **ALL)
    return layer.cuda(), torch.randn(2, 400, 64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ("reference", "flex", "triton"))
def test_calls_on_cuda_equal_one_pass_and_do_not_synchronise(impl):
    layer, x = on_cuda(impl)
    documents = torch.zeros(2, 400, dtype=torch.int64, device="cuda")
    documents[0, :30] = -1
    with torch.no_grad():
        whole = layer(x, documents=documents)
        for mode in ("default", "error"):  # the first time it compiles
            cache = layer.new_cache(2, 400, max_rollback=8)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                found = [layer(x[:, :200], cache=cache, documents=documents[:, :200])]
                found += [layer(x[:, t : t + 1], cache=cache) for t in range(200, 208)]
                cache.crop(8)
                found[1:] = [layer(x[:, 200:390], cache=cache)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(layer(x[:, 390:], cache=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert cache.lengths.tolist() == [370, 400]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ("reference", "triton"))
def test_a_step_in_a_cuda_graph(impl):
    layer, x = on_cuda(impl)
    cache, token = layer.new_cache(2, 400), torch.zeros(2, 1, 64, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(token, cache=cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(token, cache=cache)
        cache.reset()
        found = [layer(x[:, :200], cache=cache)]
        for t in range(200, 300):
            token.copy_(x[:, t : t + 1])
            graph.replay()
            found.append(out.clone())
        found.append(layer(x[:, 300:], cache=cache))  # an eager call sees that the lengths have grown
        torch.testing.assert_close(torch.cat(found, dim=1), layer(x), rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match="cache is full"):
            layer(token, cache=cache)
