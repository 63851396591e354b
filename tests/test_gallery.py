"""The gallery: published patterns against Python predicates, their tiles, densities, pictures and command line."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import flexnsa_masks as masks
from flexnsa_masks import __main__ as command
from flexnsa_masks.bigbird import random_blocks
from flexnsa_masks.gallery import find, grid_shape
from test_masks import TILES, Example, build, by_hand, dense, listed, problem, softmax_attention, tile_share

ROOT = Path(__file__).parent.parent
LENGTHS = st.integers(1, 40)
SIZES = st.integers(1, 12)


def streaming_llm(draw: Any) -> Example:
    window, sinks = draw(SIZES), draw(st.integers(0, 9))
    twin = lambda b, h, q, k: k in {*range(sinks), *range(q - window + 1, q + 1)} and k <= q  # noqa: E731
    return Example(masks.streaming_llm(window, sinks=sinks), twin, draw(LENGTHS), draw(LENGTHS))


def power_attention(draw: Any) -> Example:
    window, sinks, block = draw(SIZES), draw(st.integers(0, 5)), draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    powers = {0} | {2**i for i in range(10)}

    def twin(b: int, h: int, q: int, k: int) -> bool:
        return k <= q and (k > q - window or k < sinks or q // block - k // block in powers)

    mod = masks.power_attention(window, sinks=sinks, block=block)
    return Example(mod, twin, draw(LENGTHS), draw(LENGTHS), exact=False)


def s2_attention(draw: Any) -> Example:
    heads, stride, local, block = (draw(st.integers(1, 4)) for _ in range(4))
    # Shard of a head: every stride-th block, counted from its first.
    first = [(stride - 1 - h * max(1, stride // heads)) % stride for h in range(heads)]

    def twin(b: int, h: int, q: int, k: int) -> bool:
        recent = range(q // block - local + 1, q // block + 1)
        return k <= q and (k // block in recent or k // block in range(first[h], 100, stride))

    mod = masks.s2_attention(heads, stride=stride, local_blocks=local, block=block)
    return Example(mod, twin, draw(LENGTHS), draw(LENGTHS), heads=heads, exact=False)


def moa(draw: Any) -> Example:
    tokens, heads = draw(LENGTHS), draw(st.integers(1, 3))
    quarters = st.integers(0, 8).map(lambda n: n / 4)
    rules = st.lists(st.tuples(st.integers(0, 9), quarters), min_size=heads, max_size=heads)
    windows, sinks = draw(rules), draw(st.one_of(st.integers(0, 9), rules))
    pairs = [(sinks, 0)] * heads if isinstance(sinks, int) else sinks

    def twin(b: int, h: int, q: int, k: int) -> bool:
        (alpha, beta), (gamma, delta) = windows[h], pairs[h]
        recent = q - k < alpha + math.floor(beta * tokens) or q == k
        return k <= q and (recent or k < gamma + math.floor(delta * tokens))

    return Example(masks.moa(tokens, windows, sinks=sinks), twin, tokens, tokens, heads=heads, exact=False)


def global_tokens(draw: Any) -> Example:
    n = draw(st.integers(0, 20))
    return Example(masks.global_tokens(n), lambda b, h, q, k: min(q, k) < n, draw(LENGTHS), draw(LENGTHS), exact=False)


def longformer(draw: Any) -> Example:
    reach, n = draw(st.integers(0, 12)), draw(st.integers(0, 5))
    twin = lambda b, h, q, k: q in range(k - reach, k + reach + 1) or q < n or k < n  # noqa: E731
    return Example(masks.longformer(reach, num_global=n), twin, draw(LENGTHS), draw(LENGTHS), exact=False)


def bigbird(draw: Any) -> Example:
    block, blocks, heads, seed = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 2)), draw(SIZES)
    width, num_global, num_random = draw(st.sampled_from([1, 3, 5])), draw(st.integers(0, 3)), draw(st.integers(0, 4))
    drawn = random_blocks(blocks, width // 2, num_global, num_random, heads=heads, seed=seed).tolist()

    def twin(b: int, h: int, q: int, k: int) -> bool:
        i, j = q // block, k // block
        return abs(i - j) <= (width - 1) / 2 or min(i, j) < num_global or j in drawn[h][i]

    mod = masks.bigbird(
        block * blocks,
        block=block,
        window_blocks=width,
        num_global=num_global,
        num_random=num_random,
        heads=heads,
        seed=seed,
    )
    return Example(mod, twin, block * blocks, block * blocks, heads=heads, exact=False)


def nearest(length: int, kernel: int, dilation: int, causal: bool, x: int) -> list[int]:
    """Neighbours of x along an axis: the ones on its line that are nearest to it, of as many as there may be."""
    line = [y for y in range(length) if (y - x) % dilation == 0]
    if causal:
        return [y for y in line if y <= x][-kernel:]
    # The nearest; of two as near the one behind first.
    return sorted(line, key=lambda y: (abs(y - x), y > x))[:kernel]


def neighborhood(draw: Any) -> Example:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 60)))
    if len(shape) == 1:
        shape = (draw(LENGTHS),)
    dilation = tuple(draw(st.integers(1, max(1, length // 2))) for length in shape)
    kernel = tuple(draw(st.integers(1, length // step)) for length, step in zip(shape, dilation, strict=True))
    causal = tuple(draw(st.booleans()) for _ in shape)
    seen = [[nearest(*axis, x) for x in range(axis[0])] for axis in zip(shape, kernel, dilation, causal, strict=True)]

    def place(index: int) -> list[int]:
        return torch.arange(math.prod(shape)).view(shape).eq(index).nonzero()[0].tolist()

    places = [place(index) for index in range(math.prod(shape))]
    twin = lambda b, h, q, k: all(y in near[x] for x, y, near in zip(places[q], places[k], seen, strict=True))  # noqa: E731
    mod = masks.neighborhood(shape, kernel, dilation=dilation, causal=causal)
    return Example(mod, twin, len(places), len(places), exact=len(shape) == 1 and dilation == (1,))


def chunk(draw: Any) -> Example:
    """Any of them, asked by queries from anywhere in the sequence."""
    inner = draw(st.sampled_from([pattern for pattern in PATTERNS if pattern not in (bigbird, chunk)]))(draw)
    at = draw(st.lists(st.integers(-1, inner.q_len - 1), min_size=1, max_size=12))
    twin = lambda b, h, q, k: at[q] >= 0 and inner.twin(b, h, at[q], k)  # noqa: E731
    mod = masks.at_positions(inner.mask_mod, torch.tensor(at))
    return inner._replace(mask_mod=mod, twin=twin, q_len=len(at), exact=False)


PATTERNS = [
    streaming_llm, power_attention, s2_attention, moa, global_tokens, longformer, bigbird, neighborhood, chunk,
]  # fmt: skip
EVERY = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)


@EVERY
@given(data=st.data(), block_size=TILES)
def test_pattern_equals_its_dense_twin_and_its_tiles_cover_it(
    pattern: Callable[[Any], Example], data: Any, block_size: tuple[int, int]
) -> None:
    example = pattern(data.draw)
    expected = by_hand(example)
    actual = dense(example.mask_mod, example.batch, example.heads, example.q_len, example.kv_len)
    assert torch.equal(actual, expected)
    partial, full = tables(example, block_size)
    some_truth, full_truth = tile_share(expected, block_size)
    assert not (partial & full).any() and not (some_truth & ~(partial | full)).any() and not (full & ~full_truth).any()
    if example.exact:
        assert torch.equal((partial | full).expand_as(some_truth), some_truth)


def tables(example: Example, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    block = build(example, block_size)
    partial = listed(block.kv_num_blocks, block.kv_indices)
    if block.full_kv_num_blocks is None:
        return partial, torch.zeros_like(partial)
    return partial, listed(block.full_kv_num_blocks, block.full_kv_indices)


@pytest.mark.parametrize("pattern", [power_attention, s2_attention, moa, longformer], ids=lambda p: p.__name__)
@given(data=st.data(), block_size=TILES)
def test_no_tile_is_visited_in_vain(pattern: Callable[[Any], Example], data: Any, block_size: tuple[int, int]) -> None:
    example = pattern(data.draw)
    partial, full = tables(example, block_size)
    truth, _ = tile_share(by_hand(example), block_size)
    assert torch.equal((partial | full).expand_as(truth), truth)


@pytest.mark.parametrize("entry", masks.GALLERY, ids=lambda entry: entry.name)
def test_density_counts_pairs_and_tiles(entry: masks.Entry) -> None:
    for tokens in (128, 288):
        mod = entry.build(tokens, unit=1)
        pairs = dense(mod, 1, entry.heads, tokens, tokens)[0]
        among = torch.ones(tokens, tokens, dtype=torch.bool)
        among = among.tril() if entry.causal else among
        assert masks.density(mod, tokens, heads=entry.heads, causal=entry.causal) == pytest.approx(
            (pairs & among).sum().item() / (entry.heads * among.sum().item()), rel=1e-12
        )
        assert not entry.causal or not (pairs & ~among).any()
        visited, _ = tile_share((pairs & among)[None], (16, 16))
        tiles, _ = tile_share(among[None], (16, 16))
        share = masks.tile_density(mod, tokens, heads=entry.heads, causal=entry.causal, block_size=16)
        least = visited.sum().item() / (entry.heads * tiles.sum().item())
        assert least <= share + 1e-9 and (share == pytest.approx(least) or entry.factory is masks.neighborhood)


def test_density_of_a_mask_without_geometry_and_of_one_that_looks_ahead() -> None:
    odd = lambda b, h, q, k: (q + k) % 2 == 0  # noqa: E731
    expected = sum((q + k) % 2 == 0 for q in range(150) for k in range(q + 1)) / (150 * 151 / 2)
    assert masks.density(odd, 150) == pytest.approx(expected)
    assert masks.tile_density(odd, 150) == 1.0
    assert masks.density(masks.prefix(150), 150) == masks.density(masks.prefix(150), 150, causal=False) == 1.0
    head = lambda b, h, q, k: k < h * q  # noqa: E731
    assert masks.density(head, 9, heads=2, causal=False) == pytest.approx((0 + 36) / (2 * 81))


def test_density_reads_tables_within_their_ends() -> None:
    ids = torch.tensor([[0] * 100 + [1] * 33])
    assert masks.density(masks.document(ids), 133) == (100 * 101 + 33 * 34) / (133 * 134)


def test_density_of_128k_tokens_stores_no_square() -> None:
    tokens, window, sinks = 1 << 17, 4096, 4
    pairs = sum(min(t + 1, window + sinks) for t in range(tokens))
    with torch.profiler.profile(profile_memory=True) as profile:
        share = masks.density(masks.streaming_llm(window, sinks=sinks), tokens)
    assert share == pairs / (tokens * (tokens + 1) / 2)
    assert max(abs(event.self_cpu_memory_usage) for event in profile.events()) < 64e6


@given(length=st.integers(1, 30), dilation=st.integers(1, 4), data=st.data())
def test_every_query_has_exactly_kernel_neighbours(length: int, dilation: int, data: Any) -> None:
    shape = (length + dilation, 2 * dilation + 1)
    kernel = tuple(data.draw(st.integers(1, side // dilation)) for side in shape)
    seen = dense(masks.neighborhood(shape, kernel, dilation=dilation), 1, 1, math.prod(shape), math.prod(shape))[0, 0]
    assert (seen.sum(-1) == math.prod(kernel)).all() and seen.diagonal().all()


def test_neighborhood_moves_its_window_at_the_border() -> None:
    seen = dense(masks.neighborhood((7,), 3), 1, 1, 7, 7)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [4, 5, 6],
    ]  # fmt: skip
    dilated = dense(masks.neighborhood((7,), 3, dilation=2), 1, 1, 7, 7)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in dilated] == [
        [0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6],
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_power_attention_reaches_two_to_the_layers(layers: int) -> None:
    step = dense(masks.power_attention(1), 1, 1, 64, 64)[0, 0].double()
    reached = torch.linalg.matrix_power(step, layers)[-1].flip(0) > 0
    assert reached[: 2**layers].all()


@given(heads=st.integers(1, 6), stride=st.integers(1, 6))
def test_shards_cover_the_context_with_enough_heads(heads: int, stride: int) -> None:
    mod = masks.s2_attention(heads, stride=stride, local_blocks=1, block=1)
    seen = dense(mod, 1, heads, 20, 20)[0].any(0)
    assert torch.equal(seen, torch.ones(20, 20).tril().bool()) == (heads >= stride)


def test_moa_grows_with_the_length() -> None:
    for tokens, expected in ((64, 24), (128, 40)):
        mod = masks.moa(tokens, [(8, 0.25), (4, 0.0)], sinks=[(0, 0.0), (0, 0.125)])
        seen = dense(mod, 1, 2, tokens, tokens)[0, :, -1].sum(-1)
        assert seen.tolist() == [expected, 4 + tokens // 8]


@given(
    blocks=st.integers(1, 20), reach=st.integers(0, 2), num_global=st.integers(0, 3), num_random=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_random_blocks_are_distinct_and_of_the_others(
    blocks: int, reach: int, num_global: int, num_random: int, seed: int
) -> None:
    drawn = random_blocks(blocks, reach, num_global, num_random, heads=2, seed=seed)
    assert drawn.dtype == torch.int32 and drawn.shape == (2, blocks, num_random)
    for head in drawn.tolist():
        for row, chosen in enumerate(head):
            others = [j for j in range(num_global, blocks) if abs(j - row) > reach]
            found = [j for j in chosen if j >= 0]
            assert len(set(found)) == len(found) == min(num_random, len(others)) and set(found) <= set(others)


def test_random_blocks_are_seeded_and_uniform() -> None:
    def draw(seed: int, heads: int = 300) -> Tensor:
        return random_blocks(12, 1, 2, 3, heads=heads, seed=seed)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    # Row 6 has 7 others, of which each is drawn 3 / 7 of the time; 2000 heads make that certain to a few percent.
    counts = draw(5, heads=2000)[:, 6].flatten().long().bincount(minlength=12)
    assert counts[[0, 1, 5, 6, 7]].sum() == 0
    assert (counts[[2, 3, 4, 8, 9, 10, 11]] / 2000 - 3 / 7).abs().max() < 0.05


def test_names() -> None:
    assert masks.streaming_llm(8).__name__ == "streaming_llm_8_4"
    assert masks.neighborhood((4, 6), 3).__name__ == "neighborhood_4_6"
    assert masks.and_masks(masks.causal(), masks.longformer(2, num_global=1)).__name__ == (
        "and_masks(causal, longformer_2_1)"
    )
    assert len({entry.name for entry in masks.GALLERY}) == len(masks.GALLERY)


@pytest.mark.parametrize("entry", masks.GALLERY, ids=lambda entry: entry.name)
def test_eager_flex_attention_is_masked_softmax(entry: masks.Entry) -> None:
    mod = entry.build(128, unit=1)
    block = masks.block_mask(mod, q_len=128, kv_len=128, heads=entry.heads, block_size=32)
    q, k, v = problem(1, entry.heads, 128, 128, torch.float64)
    expected = softmax_attention(q, k, v, dense(mod, 1, entry.heads, 128, 128), lambda scores: scores)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=block), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_flex_attention_with_a_mask_by_head_equals_eager() -> None:
    """Compiled kernels read the block tables, eager ones do not."""
    entry = find("s2")
    block = masks.block_mask(entry.build(128, unit=1), q_len=128, kv_len=128, heads=entry.heads, block_size=32)
    q, k, v = problem(1, entry.heads, 128, 128, torch.float32)
    compiled = torch.compile(flex.flex_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, block_mask=block), flex.flex_attention(q, k, v, block_mask=block))


@pytest.mark.parametrize("entry", masks.GALLERY, ids=lambda entry: entry.name)
def test_entries_build_what_they_say(entry: masks.Entry) -> None:
    made = eval(entry.call(512, unit=1), vars(masks))
    heads = entry.heads
    assert torch.equal(dense(made, 1, heads, 512, 512), dense(entry.build(512, unit=1), 1, heads, 512, 512))
    assert re.search(r"arXiv \d{4}\.\d{5}", entry.source)
    # Heads that differ are as many as stated: FlexAttention takes a mask of 1 or of all query heads.
    block = masks.block_mask(made, q_len=512, kv_len=512, heads=heads, block_size=32)
    assert block.kv_num_blocks.shape[:2] == (1, heads)


@given(tokens=st.integers(1, 5000), axes=st.integers(1, 3))
def test_grid_shapes_hold_all_tokens(tokens: int, axes: int) -> None:
    shape = grid_shape(tokens, axes)
    assert len(shape) == axes and math.prod(shape) == tokens and list(shape) == sorted(shape)


def test_list_has_a_line_for_each_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--tokens", "2048"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [entry.name for entry in masks.GALLERY]
    for line, entry in zip(lines[1:], masks.GALLERY, strict=True):
        assert entry.call(2048) in line and entry.source in line and "%" in line
    assert "100.00%" in lines[1]


def test_stats_per_length(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["streaming", "--stats", "--tokens", "512", "2048"])
    *_, lengths, row = capsys.readouterr().out.splitlines()
    assert lengths.split() == ["512", "2048"]
    shares = [float(number) for number in re.findall(r"([\d.]+)%", row)]
    mod = masks.streaming_llm(512)
    expected = [share(mod, tokens) for tokens in (512, 2048) for share in (masks.density, masks.tile_density)]
    assert shares == pytest.approx([100 * share for share in expected], abs=0.01)


@pytest.mark.parametrize("name", ["power", "s2", "neighborhood3d"])
def test_draw_writes_a_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.png"
    command.main([name, "--draw", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert find(name).call(128, unit=1) in capsys.readouterr().out


def test_picture_shows_tokens_and_tiles() -> None:
    figure = masks.draw(masks.s2_attention(3, stride=3, local_blocks=1, block=4), 32, heads=2, block_size=4)
    tokens, tiles = (axes.images[0].get_array() for axes in figure.axes[2:])
    seen = dense(masks.s2_attention(3, stride=3, local_blocks=1, block=4), 1, 3, 32, 32)[0, 1]
    some, full = tile_share(seen[None], (4, 4))
    assert torch.equal(torch.tensor(tokens) > 0, seen)
    assert torch.equal(torch.tensor(tiles) > 0, some[0]) and torch.equal(torch.tensor(tiles) == 2, full[0])
    assert figure.get_suptitle() == "s2_attention_3_3_1_4" and len(figure.axes) == 4


def test_module_runs_and_loads_matplotlib_only_to_draw() -> None:
    code = "import runpy, sys; sys.argv = ['x', 'power', '--stats', '--tokens', '512'];" \
        "runpy.run_module('flexnsa_masks', run_name='__main__'); print('matplotlib' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "masks")
    assert "power " in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_drawing_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"flexnsa\[viz\]"):
        masks.draw(masks.causal(), 8)
    with pytest.raises(SystemExit) as stop:
        command.main(["power", "--draw", str(tmp_path / "out.png")])
    assert stop.value.code == 2 and "flexnsa[viz]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pwer"], "one of causal, .*got 'pwer'"),
        (["--draw", "out.png"], "one pattern and one length"),
        (["power", "--draw", "out.png", "--tokens", "64", "128"], "one pattern and one length"),
        (["power", "--tokens", "0"], "tokens >= 1, got 0"),
        (["bigbird", "--stats", "--tokens", "100"], "multiple of block=64, got 100"),
        (["neighborhood2d", "--tokens", "997"], "<= 1 tokens of the axis, got 15"),
        (["power", "--tokens", "many"], "invalid int"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def two_heads() -> masks.MaskMod:
    return masks.moa(64, [(1, 0.0), (2, 0.0)])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: masks.streaming_llm(0), "window >= 1, got 0"),
        (lambda: masks.streaming_llm(1, sinks=-1), "n >= 0, got -1"),
        (lambda: masks.power_attention(0), "window >= 1"),
        (lambda: masks.power_attention(1, block=0), "block >= 1"),
        (lambda: masks.power_attention(1, sinks=-2), "sinks >= 0, got -2"),
        (lambda: masks.s2_attention(0, stride=1, local_blocks=1), "heads >= 1"),
        (lambda: masks.s2_attention(1, stride=0, local_blocks=1), "stride >= 1"),
        (lambda: masks.s2_attention(1, stride=1, local_blocks=0), "local_blocks >= 1"),
        (lambda: masks.moa(0, [(1, 0.0)]), "tokens >= 1"),
        (lambda: masks.moa(8, []), "heads >= 1, got 0"),
        (lambda: masks.moa(8, [(1, math.nan)]), "finite"),
        (lambda: masks.moa(8, [(1, 0.0)], sinks=[(1, 0.0), (1, 0.0)]), "1 in all, got 2"),
        (lambda: masks.moa(8, [(1, 0.0)], sinks=-1), "sinks >= 0 at 8 tokens"),
        (lambda: masks.global_tokens(-1), "n >= 0"),
        (lambda: masks.longformer(-1, num_global=0), "reach >= 0"),
        (lambda: masks.longformer(0, num_global=-1), "num_global >= 0"),
        (lambda: masks.bigbird(100), "multiple of block=64, got 100"),
        (lambda: masks.bigbird(64, window_blocks=2), "odd number of window_blocks, got 2"),
        (lambda: masks.bigbird(64, num_random=-1), "num_random >= 0"),
        (lambda: masks.bigbird(64, heads=0), "heads >= 1"),
        (lambda: masks.neighborhood((), 1), "1, 2 or 3 axes"),
        (lambda: masks.neighborhood((2, 2, 2, 2), 1), "1, 2 or 3 axes"),
        (lambda: masks.neighborhood((5, 5), 0), "kernel >= 1"),
        (lambda: masks.neighborhood((5, 5), 3, dilation=2), r"<= 5 tokens of the axis, got 3 \* 2"),
        (lambda: masks.neighborhood((5, 5), (3, 3, 3)), "kernel for 2 axes"),
        (lambda: masks.neighborhood((5, 5), 3, causal=(True,)), "causal for 2 axes"),
        (lambda: masks.block_mask(masks.neighborhood((4, 4), 3), q_len=17, kv_len=16), "16 tokens.*q_len=17"),
        (lambda: masks.block_mask(masks.neighborhood((4, 4), 3), q_len=16, kv_len=12), "16 tokens.*kv_len=12"),
        (lambda: masks.block_mask(two_heads(), q_len=64, kv_len=64, heads=4), "heads=4"),
        (lambda: masks.block_mask(two_heads(), q_len=64, kv_len=64, device="meta"), "on cpu"),
        (lambda: masks.density(masks.causal(), 0), "tokens >= 1"),
        (lambda: masks.density(two_heads(), 64, heads=3), "2 heads, got heads=3"),
        (lambda: masks.tile_density(masks.causal(), 8, block_size=0), "block_size >= 1"),
        (lambda: masks.draw(masks.causal(), 8, heads=0), "heads >= 1"),
        (lambda: masks.draw(two_heads(), 64, heads=3), "2 heads, got heads=3"),
        (lambda: find("nothing"), "one of causal"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
