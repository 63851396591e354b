import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from bench.cli import main
from bench.interrupt import Interrupt
from bench.learn.attention import (
    ATTENTIONS,
    DEFAULT_ATTENTIONS,
    AttentionShape,
    DenseAttention,
    banded,
    near_attention,
)
from bench.learn.compare import Comparison
from bench.learn.generate import draw, generate
from bench.learn.look import gate_means, look_into, telling_query
from bench.learn.model import Transformer, count_parameters
from bench.learn.presets import PRESETS, TINY
from bench.learn.settings import twin_shape
from bench.learn.task import IGNORED, Batch
from bench.learn.text import PackedTextTask, TextTask, is_validation, read_corpus, source_files, standard_library
from bench.learn.train import Twin, train
from bench.parallel import Ranks
from flexnsa import NSAConfig

CPU = torch.device("cpu")
PICTURES = ("loss.png", "attention.png", "selection.png", "gates.png")


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(standard_library() / "asyncio")


@pytest.fixture
def task(corpus):
    return TextTask(corpus, seed=0)


def comparison(task, folder, **changes):
    return Comparison(task, replace(TINY, **changes), list(DEFAULT_ATTENTIONS), CPU, folder)


def test_the_command_writes_a_result_and_pictures(tmp_path, capsys):
    source = str(standard_library() / "asyncio")
    options = ["--task", "text", "--preset", "tiny", "--tokens", "1024", "--seed", "3", "--source", source]
    main(["learn", *options, "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["seed"] == 3 and result["config"]["tokens"] == 1024
    assert {"device", "torch", "triton", "python", "date", "commit"} <= result.keys()
    assert [row["attention"] for row in result["rows"]] == ["nsa", "full", "window"]
    for row in result["rows"]:
        assert row["tokens"] == 1024 and 4 < row["bits_per_token"] < 8.5 and row["tokens_per_second"] > 0
        assert row["continuation"] and len(row["position_bits"]) == TINY.context
    assert all((tmp_path / "run" / name).stat().st_size > 5_000 for name in PICTURES)
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("bits/byte", "tokens/s", "parameters", "window", "nsa continues", "tokens/s from a cache")
    )


def test_the_whole_standard_library_splits_by_content_into_disjoint_files():
    corpus = read_corpus(standard_library())
    again = read_corpus(standard_library())
    assert corpus.digest == again.digest and torch.equal(corpus.validation, again.validation)
    assert not set(corpus.train_files) & set(corpus.validation_files)
    assert len(corpus.train_files) + len(corpus.validation_files) == len(source_files(standard_library()))
    assert 0.05 < len(corpus.validation_files) / len(corpus.train_files) < 0.2
    assert len(corpus.train) > 5_000_000
    assert not any("test" in Path(name).parts for name in corpus.train_files + corpus.validation_files)


def test_copies_of_a_file_stay_on_one_side(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.py").write_bytes(b"%d" % (number // 2))
    corpus = read_corpus(tmp_path)
    held_out = {int(Path(name).stem) for name in corpus.validation_files}
    assert held_out and all(number ^ 1 in held_out for number in held_out)
    assert held_out == {number for number in range(40) if is_validation(b"%d" % (number // 2))}


def test_a_folder_without_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--source"):
        read_corpus(tmp_path)


def test_batches_depend_on_seed_and_step_alone(corpus):
    task, twin = TextTask(corpus, 1), TextTask(corpus, 1)
    late = task.training(7, 3, 50)
    assert all(torch.equal(a, b) for a, b in zip(late[:2], twin.training(7, 3, 50)[:2], strict=True))
    assert torch.equal(late.inputs[:, 1:], late.labels[:, :-1])
    assert not torch.equal(late.inputs, task.training(8, 3, 50).inputs)
    assert not torch.equal(late.inputs, TextTask(corpus, 2).training(7, 3, 50).inputs)


def test_validation_rows_do_not_depend_on_the_seed_or_the_batch(corpus):
    rows = torch.cat([batch.inputs for batch in TextTask(corpus, 1).validation(7, 3, 50)])
    assert torch.equal(rows, torch.cat([batch.inputs for batch in TextTask(corpus, 2).validation(7, 7, 50)]))
    assert rows.shape == (7, 50)


def excerpts(batch):
    """(row, first, end) of each document of a batch."""
    for row, ids in enumerate(batch.documents.tolist()):
        for document in sorted(set(ids)):
            first = ids.index(document)
            yield row, first, first + ids.count(document)


def test_packed_rows_are_excerpts_and_what_follows_them(corpus):
    task = PackedTextTask(corpus, seed=1)
    lengths = set()
    for split, batch in (
        (corpus.train, task.training(7, 5, 60)),
        (corpus.validation, next(task.validation(5, 5, 60))),
    ):
        source = bytes(split.tolist())
        for row, first, end in excerpts(batch):
            asked = batch.labels[row, first:end]
            assert bytes([*batch.inputs[row, first:end].tolist(), asked[-1].item()]) in source
            assert torch.equal(batch.inputs[row, first + 1 : end], asked[:-1])
            lengths.add(end - first)
    assert len(lengths) > 5
    again = PackedTextTask(corpus, seed=1).training(7, 5, 60)
    assert all(torch.equal(a, b) for a, b in zip(task.training(7, 5, 60)[:3], again[:3], strict=True))
    assert not torch.equal(task.training(8, 5, 60).documents, again.documents)
    parts = torch.cat([batch.inputs for batch in PackedTextTask(corpus, 2).validation(5, 2, 60)])
    assert parts.shape == (5, 60)


def test_ranks_share_documents_too(corpus):
    batch = PackedTextTask(corpus, seed=0).training(0, 5, 30)
    shares = [batch.share(Ranks(rank, 2)) for rank in range(2)]
    assert all(share.documents.shape == share.inputs.shape == (3, 30) for share in shares)
    assert torch.equal(torch.cat([share.documents for share in shares])[:5], batch.documents)


@pytest.mark.parametrize("attention", DEFAULT_ATTENTIONS)
def test_a_packed_row_trains_each_excerpt_as_if_alone(attention, corpus):
    torch.manual_seed(0)
    model = Transformer(twin_shape(TINY, attention, 256), attention)
    batch = PackedTextTask(corpus, seed=0).training(3, 3, TINY.context)
    packed = model(batch.inputs, documents=batch.documents)
    for row, first, end in excerpts(batch):
        alone = model(batch.inputs[row : row + 1, first:end])
        torch.testing.assert_close(packed[row : row + 1, first:end], alone, rtol=1e-4, atol=1e-5)


def test_the_demo_trains_on_packed_documents(tmp_path):
    source = str(standard_library() / "asyncio")
    options = ["--task", "text", "--packed", "--preset", "tiny", "--tokens", "1024", "--source", source]
    main(["learn", *options, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished" and result["task"] == "packed-text"
    assert all(4 < row["bits_per_token"] < 8.5 for row in result["rows"])


def test_a_context_longer_than_the_data_is_refused(task):
    with pytest.raises(ValueError, match="--context"):
        task.training(0, 1, 10_000_000)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parameters_are_equal_within_two_percent(preset, attention):
    settings = PRESETS[preset]
    with torch.device("meta"):
        counts = [count_parameters(Transformer(twin_shape(settings, name, 256), name)) for name in (attention, "full")]
    assert abs(counts[0] / counts[1] - 1) < 0.02
    if preset == "cpu":
        assert 0.9e6 < counts[0] < 2e6


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_window_is_far_shorter_than_the_context(preset):
    assert preset.attention.nsa.window * 8 <= preset.context


def test_an_mlp_too_narrow_to_match_is_refused():
    with pytest.raises(ValueError, match="widen the MLP"):
        twin_shape(replace(TINY, hidden=8), "nsa", 256)


def trained(task, **changes):
    settings = replace(TINY, **changes)
    twins = [Twin(name, settings, 256, CPU) for name in DEFAULT_ATTENTIONS]
    return train(twins, task, settings, Interrupt(), lambda: None), twins


def test_the_twins_learn_from_the_same_batches_in_the_same_order(task, monkeypatch):
    seen = {}
    learn = Twin.learn

    def spy(twin, batch, rate):
        seen.setdefault(twin.attention, []).append((batch.inputs.clone(), rate))
        learn(twin, batch, rate)

    monkeypatch.setattr(Twin, "learn", spy)
    trained(task, tokens=1024)
    assert len(seen["nsa"]) == 4
    for name in ("full", "window"):
        for (inputs, rate), (other, other_rate) in zip(seen["nsa"], seen[name], strict=True):
            assert torch.equal(inputs, other) and rate == other_rate


def test_a_run_repeats_exactly(task):
    (_, first), (_, second) = (trained(task, tokens=512) for _ in range(2))
    for twin, again in zip(first, second, strict=True):
        assert twin.progress.train_bits == again.progress.train_bits


def test_a_time_budget_stops_all_twins_at_one_step(task):
    status, twins = trained(task, minutes=1e-6)
    assert status == "out of time"
    assert {twin.progress.tokens for twin in twins} == {0}


def test_ctrl_c_keeps_results_and_pictures(task, tmp_path, monkeypatch):
    learn = Twin.learn

    def interrupted(twin, batch, rate):
        if twin.attention == "full" and twin.progress.tokens == 512:
            signal.raise_signal(signal.SIGINT)
        learn(twin, batch, rate)

    monkeypatch.setattr(Twin, "learn", interrupted)
    before = signal.getsignal(signal.SIGINT)
    comparison(task, tmp_path).run()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert [row["tokens"] for row in result["rows"]] == [768] * 3, "all twins stop at the same step"
    assert all((tmp_path / name).exists() for name in PICTURES)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(task, tmp_path, monkeypatch):
    def impatient(twin, batch, rate):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Twin, "learn", impatient)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            comparison(task, tmp_path).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "running"


def twin(attention):
    torch.manual_seed(0)
    model = Transformer(twin_shape(TINY, attention, 256), attention)
    model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight))  # tied it would repeat itself
    return model


@pytest.mark.parametrize("cached", (False, True))
def test_generation_is_seeded_and_reads_the_prompt(task, cached):
    model, prompt = twin("nsa"), task.prompt(32)
    first, again, other = (
        generate(model, prompt, 12, TINY.context, seed, temperature=2.0, cached=cached).tokens for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == 12 and all(0 <= token < 256 for token in first)
    greedy = generate(model, prompt, 1, TINY.context, 0, temperature=0, cached=cached).tokens
    assert greedy == [model(prompt)[0, -1].argmax().item()]


def test_a_cached_continuation_is_the_uncached_one(task):
    """Token for token, past the context too, where both forget the same half."""
    model, prompt = twin("nsa"), task.prompt(30)
    for options in ({"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}):
        cached, uncached = (
            generate(model, prompt, 60, TINY.context, 0, **options, cached=cached) for cached in (True, False)
        )
        assert cached.tokens == uncached.tokens
        assert len(set(cached.tokens)) > 5
        assert cached.cached and not uncached.cached
        assert cached.tokens_per_second > 0
    assert not generate(twin("full"), prompt, 3, TINY.context, 0).cached


def test_a_cached_continuation_feeds_each_token_once(task, monkeypatch):
    fed, forward = [], Transformer.forward
    monkeypatch.setattr(
        Transformer, "forward", lambda self, x, *rest: fed.append(x.shape[1]) or forward(self, x, *rest)
    )
    generate(twin("nsa"), task.prompt(20), 60, TINY.context, 0)
    half = TINY.context // 2
    assert fed == [20, *[1] * (TINY.context - 20), half + 1, *[1] * (60 - 2 - TINY.context + 20)]


@pytest.mark.parametrize("option", ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}))
def test_drawing_options_out_of_range(task, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        generate(twin("window"), task.prompt(8), 1, TINY.context, 0, **option)


def test_drawing_among_the_likeliest():
    logits, generator = torch.tensor([0.1, 0.5, 0.05, 0.35]).log(), torch.Generator().manual_seed(0)

    def drawn(temperature, top_p):
        return {draw(logits, temperature, top_p, generator).item() for _ in range(200)}

    assert drawn(1.0, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 0.51) == {1, 3}
    assert drawn(1.0, 0.5) == drawn(1.0, 1e-9) == drawn(0, 1.0) == {1}
    assert drawn(1e-3, 1.0) == {1}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_twin_sees_the_future(attention):
    torch.manual_seed(0)
    model = Transformer(twin_shape(TINY, attention, 256), attention)
    tokens = torch.randint(256, (1, 40))
    changed = tokens.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 256
    assert torch.equal(model(tokens)[:, :30], model(changed)[:, :30])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 2))
def test_near_attention_is_attention_under_a_band(tokens, window, group):
    q, k, v = (torch.randn(2, heads, tokens, 4, dtype=torch.double) for heads in (2 * group, 2, 2))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=banded(tokens, window, CPU), enable_gqa=True)
    torch.testing.assert_close(near_attention(q, k, v, window), expected)


def test_the_window_twin_sees_window_keys_and_no_more():
    shape = AttentionShape(dim=8, heads=2, kv_heads=1, head_dim=4, rope_theta=1e4, nsa=NSAConfig(window=5))
    attention = DenseAttention(shape, 5)
    x = torch.randn(1, 12, 8, requires_grad=True)
    attention(x)[0, -1].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [False] * 7 + [True] * 5


def test_ignored_labels_count_nowhere():
    twin = Twin("full", TINY, 256, CPU)
    inputs = torch.randint(256, (2, TINY.context))
    labels = torch.full_like(inputs, IGNORED)
    labels[:, 5] = inputs[:, 5]
    twin.evaluate([Batch(inputs, labels)])
    twin.evaluate([Batch(inputs, labels), Batch(inputs, torch.full_like(labels, IGNORED))])
    (_, bits), (_, same) = twin.progress.validation
    assert bits == same == pytest.approx(twin.progress.position_bits[5])


def test_the_telling_query_gains_most_from_what_it_chose(task):
    torch.manual_seed(0)
    model = Transformer(twin_shape(TINY, "nsa", 256), "nsa")
    looks = look_into(model, task.prompt(TINY.context))
    assert len(looks) == TINY.layers
    query = telling_query(looks)
    look, block = looks[query.layer], TINY.attention.nsa.select_block
    free = (look.chosen & ~look.forced)[0, query.head, query.position]
    assert query.position >= TINY.context // 2 and free.any()
    gains = look.gates[0, :, :, 1] * (look.weights["selected"][0] * ~look.forced[0].repeat_interleave(block, -1)).sum(
        -1
    )
    later = gains.unflatten(0, (look.num_kv_heads, -1)).mean(1)[:, TINY.context // 2 :]
    assert later.argmax() == query.head * later.shape[1] + query.position - TINY.context // 2
    means = torch.stack([look.gates[0].mean(1) for look in looks])
    torch.testing.assert_close(gate_means(model, task.prompt(TINY.context)), means)


def test_every_byte_has_a_visible_character():
    shown = TextTask.characters(None, [*b"ab\ncd", 200])
    assert shown == ["a", "b", "\n", "c", "d", "\N{MIDDLE DOT}"]


def test_options_that_do_not_fit_are_refused_with_a_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["learn", "--task", "text", "--preset", "tiny", "--tokens", "10", "--out", str(tmp_path)])
    assert "raise --tokens" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["learn", "--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in ("task", "tokens", "seed", "context", "out", "minutes", "preset"))
