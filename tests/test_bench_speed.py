import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.interrupt import Interrupt
from bench.speed import cases, engines, pictures, report, run
from bench.speed.cases import CASES, Case
from bench.speed.cost import costs, fit, flops
from bench.speed.inputs import mixed_lengths, shared_blocks, tensors
from bench.speed.measure import spread, time_call
from bench.speed.run import Run
from bench.speed.stages import stages
from flexnsa import BranchKV, MeanPool, NSAConfig, native_sparse_attention

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "bench/results/speed"
GEOMETRY = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)
TINY = Case("tiny", 2, 1, 8, 8, (32, 48), config=GEOMETRY)


def run_of(folder, **changes):
    options = {
        "cases": [TINY],
        "engines": ["flexnsa-eager", "sdpa", engines.STAGES],
        "budget": 1.0,
        "say": lambda line: None,
    } | changes
    return Run(device=CPU, dtype=torch.float32, path=folder / "rows.json", **options)


def test_the_command_writes_rows_and_pictures(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    options = ["--case", "small", "--tokens", "64", "96", "128", "--milliseconds", "1", "--forward-only"]
    main(["speed", *options, "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {"device", "torch", "triton", "date", "commit", "rows"} <= result.keys()
    assert result["status"] == "finished" and result["ceiling_tflops"] > 0
    for row in result["rows"]:
        assert {"case", "engine", "tokens"} <= row.keys() and type(row["tokens"]) is int
        assert ("missing" in row) != ("forward_ms" in row)
    measured = {(row["engine"], row["stage"], row["tokens"]) for row in result["rows"] if "forward_ms" in row}
    assert {("sdpa", "whole", 96), ("flexnsa-eager", "whole", 128), ("flexnsa-eager", "window", 64)} <= measured
    assert (tmp_path / "cpu-small.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("x forward", "quadratic", "cudnn: needs CUDA", "fla-nsa: "))


def test_a_missing_baseline_is_a_row_that_says_so(tmp_path):
    result = run_of(tmp_path, engines=["cudnn", "fla-nsa", "flexnsa-triton"]).run(Interrupt())
    assert [row["engine"] for row in result["rows"]] == ["cudnn", "fla-nsa", "flexnsa-triton"]
    assert all(row["missing"] and "forward_ms" not in row for row in result["rows"])


def test_a_failure_is_a_row_and_the_rest_is_measured(tmp_path, monkeypatch):
    def broken(case, device):
        def call(x):
            raise RuntimeError("no kernel for this")

        return call

    monkeypatch.setitem(engines.ENGINES, "cudnn", broken)
    result = run_of(tmp_path, engines=["cudnn", "sdpa"]).run(Interrupt())
    assert [row.get("missing") for row in result["rows"]] == 2 * ["RuntimeError: no kernel for this"] + 2 * [None]


def test_an_interrupt_keeps_what_is_done(tmp_path):
    interrupt = Interrupt()

    def stop(line):
        interrupt.requested = True

    result = run_of(tmp_path, say=stop).run(interrupt)
    assert result["status"] == "stopped" and len(result["rows"]) == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == result


def test_a_row_that_takes_too_long_says_so_and_the_rest_is_measured(tmp_path, monkeypatch):
    def endless(case, device):
        def call(x):
            while True:
                pass

        return call

    monkeypatch.setitem(engines.ENGINES, "cudnn", endless)
    options = {"engines": ["cudnn", "sdpa"], "row_seconds": 0.2}
    result = run_of(tmp_path, **options).run(Interrupt())
    reason = "OutOfTimeError: took longer than 0.2 s"
    assert [row.get("missing") for row in result["rows"]] == 2 * [reason] + 2 * [None]


def test_the_longest_rows_come_last(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "VERY_LONG", 40)
    result = run_of(tmp_path, engines=["flexnsa-eager", "sdpa"]).run(Interrupt())
    assert [(row["engine"], row["tokens"]) for row in result["rows"]] == [
        *(("flexnsa-eager", 32), ("sdpa", 32)),
        *(("flexnsa-eager", 48), ("sdpa", 48)),
    ]


def test_rows_whose_turn_does_not_come_say_so(tmp_path):
    result = run_of(tmp_path, seconds=0.0).run(Interrupt())
    assert len(result["rows"]) == 6 and all("turn did not come" in row["missing"] for row in result["rows"])


def test_every_row_of_nsa_says_how_alike_neighbours_select(tmp_path):
    result = run_of(tmp_path).run(Interrupt())
    x = tensors(TINY, 48, CPU, torch.float32)
    expected = shared_blocks({s.name: s for s in stages(TINY, x)}["selection"].call())
    rows = [row for row in result["rows"] if row["stage"] == "whole"]
    found = {(row["engine"], row["tokens"]): row.get("shared_blocks") for row in rows}
    assert found["flexnsa-eager", 48] == pytest.approx(expected) and found["sdpa", 48] is None
    assert f"{expected:.1f} at 48 tokens" in report.report(result)


def test_slow_engines_stop_early_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(engines.LONGEST, "sdpa", 40)
    options = {"engines": ["sdpa"]}
    lengths = [row["tokens"] for row in run_of(tmp_path, **options).run(Interrupt())["rows"] if "forward_ms" in row]
    assert lengths == [32]
    everywhere = run_of(tmp_path, **options, everywhere=True).run(Interrupt())
    assert [row["tokens"] for row in everywhere["rows"] if "forward_ms" in row] == [32, 48]


def test_every_engine_computes_attention():
    x = tensors(TINY, 32, CPU, torch.float32)
    out = engines.nsa(TINY, CPU, impl="reference", compiled=False)(x)
    pool, kv = MeanPool(GEOMETRY), BranchKV.shared(x.k, x.v)
    torch.testing.assert_close(out, native_sparse_attention(x.q, kv, x.gates, GEOMETRY, pool))
    scores = (x.q @ x.k.mT / 8**0.5).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(engines.dense(TINY, CPU, backend=None)(x), scores.softmax(-1) @ x.v)


@pytest.mark.parametrize("documents", [1, 3])
def test_a_composition_computes_the_same(documents):
    case = replace(TINY, documents=documents)
    x = tensors(case, 48, CPU, torch.float32)
    plain = engines.nsa(case, CPU, impl="auto", compiled=False)(x)
    torch.testing.assert_close(engines.composed(case, CPU, compiled=False)(x), plain)


@pytest.mark.parametrize(("documents", "tokens"), [(1, 7), (32, 65536), (5, 100)])
def test_documents_of_mixed_lengths_fill_a_row(documents, tokens):
    lengths = mixed_lengths(documents, tokens)
    assert len(lengths) == documents and sum(lengths) == tokens and min(lengths) >= 1


@pytest.mark.parametrize("engine", ["sdpa", "cudnn", "flex-dense"])
def test_dense_attention_is_not_given_packed_rows(engine, tmp_path):
    result = run_of(tmp_path, cases=[replace(TINY, documents=3)], engines=[engine]).run(Interrupt())
    assert all(row["missing"] for row in result["rows"])


@pytest.mark.parametrize("engine", ["flexnsa-recompute-window", "flexnsa-recompute-both"])
def test_recomputing_engines_compute_the_same(engine):
    x = tensors(TINY, 48, CPU, torch.float32)
    grads = []
    for name in ("flexnsa-eager", engine):
        out = engines.ENGINES[name](TINY, CPU)(x)
        grads.append(torch.autograd.grad(out, x.leaves, x.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("documents", [1, 3])
def test_the_stages_are_those_of_the_whole(documents):
    case = replace(TINY, documents=documents)
    x = tensors(case, 48, CPU, torch.float32)
    found = {stage.name: stage.call() for stage in stages(case, x)}
    assert list(found) == ["compression", "compressed", "selection", "selected", "window", "gates"]
    branches = [found[name] for name in ("compressed", "selected", "window")]
    mixed = sum(gate[..., None] * out for gate, out in zip(x.gates.unbind(-1), branches, strict=True))
    torch.testing.assert_close(mixed, engines.nsa(case, CPU, impl="reference", compiled=False)(x))


def test_correlated_inputs_select_alike_and_keep_their_variance():
    overlap = {}
    for inputs in ("random", "correlated"):
        case = replace(CASES["small"], inputs=inputs, tokens=(512,))
        x = tensors(case, 512, CPU, torch.float32)
        assert x.q.std().item() == pytest.approx(1, abs=0.15)
        overlap[inputs] = shared_blocks({s.name: s for s in stages(case, x)}["selection"].call())
    assert overlap["correlated"] > overlap["random"] + 0.5


def test_the_model_counts_pairs_of_queries_and_keys():
    """Against a count over the masks themselves, long enough for the start not to matter."""
    case, tokens = replace(CASES["small"], value_dim=16), 4096
    config, t = case.config, torch.arange(4096, dtype=torch.float64)
    pairs = {
        "dense": t + 1,
        "compressed": ((t - config.compress_block + 1) // config.compress_stride + 1).clamp(min=0),
        "selected": (t + 1).clamp(max=config.num_selected * config.select_block),
        "window": (t + 1).clamp(max=config.window),
    }
    for stage, count in pairs.items():
        expected = count.sum().item() * 2 * case.heads * (case.dim + case.value_dim)
        assert costs(case)[stage].at(tokens) == pytest.approx(expected, rel=0.02), stage
    assert flops(case, "selection", tokens, backward=True) == 0
    assert flops(case, "dense", tokens, backward=True) == 2.5 * flops(case, "dense", tokens, backward=False)
    whole = costs(CASES["64q-4kv-128"])["whole"]
    assert whole.quadratic_share(8192) < 0.5 < whole.quadratic_share(131072)


@pytest.mark.parametrize("terms", [(0.5, 3e-3, 0.0), (0.0, 0.0, 2e-6), (1.0, 0.0, 1e-6), (0.2, 1e-3, 1e-7)])
def test_the_fit_finds_the_terms(terms):
    tokens = [1000 * 2**i for i in range(5)]
    found = fit(tokens, [terms[0] + terms[1] * t + terms[2] * t * t for t in tokens])
    assert found[:3] == pytest.approx(terms, abs=1e-9, rel=1e-6) and found.error < 1e-6


def test_a_fit_needs_three_lengths():
    with pytest.raises(ValueError, match="three lengths"):
        fit([1, 2], [1.0, 2.0])


def test_ratios_are_against_the_dense_engine_of_the_same_length():
    def row(engine, tokens, forward, backward):
        part = {"case": "c", "stage": "whole", "engine": engine, "tokens": tokens}
        return part | {"forward_ms": forward, "backward_ms": backward}

    rows = [row("cudnn", 10, 4.0, 8.0), row("flexnsa", 10, 2.0, 1.0), row("flexnsa", 20, 2.0, 1.0)]
    assert [report.ratio(rows, rows[1], part) for part in ("forward", "backward", "both")] == [2.0, 8.0, 4.0]
    assert report.ratio(rows, rows[2], "forward") is None


def test_times_are_medians_of_several_runs():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])[0] == 3.5
    calls = []
    times = time_call(lambda: calls.append(None), CPU, budget=1e-9)
    assert len(calls) >= 3 and times.low <= times.median <= times.high


def test_the_figure_shows_every_engine_and_stage(tmp_path):
    result = run_of(tmp_path).run(Interrupt())
    axes = pictures.figure(result["rows"], "tiny").axes
    assert len(axes) == 6
    assert {line.get_label() for line in axes[0].lines} == {"flexnsa-eager", "sdpa"}
    legend = axes[2].get_legend()
    assert {text.get_text() for text in legend.get_texts()} >= {"compressed", "selection", "selected", "window"}


@pytest.mark.parametrize(
    "options",
    [["--tokens", "0"], ["--milliseconds", "-1"], ["--minutes", "0"], ["--threads", "0"], ["--engine", "nothing"]],
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        main(["speed", *options])
    assert options[0].removeprefix("--") in capsys.readouterr().err


def test_the_record_says_that_a_composition_costs_nothing():
    """Within 2% of the function at 8,192 tokens and above, compiled and not."""
    rows = json.loads((RESULTS / "h200-composed.json").read_text())["rows"]
    times = {(row["engine"], row["tokens"]): row for row in rows}
    for pair in (("flexnsa", "flexnsa-composed"), ("flexnsa-eager", "flexnsa-composed-eager")):
        for tokens in {row["tokens"] for row in rows if row["engine"] == pair[0]}:
            bare, composed = (times[engine, tokens] for engine in pair)
            for part in ("forward_ms", "backward_ms"):
                assert composed[part] <= 1.02 * bare[part], (pair, tokens, part)


def test_the_record_says_that_packing_costs_less_than_one_long_document():
    rows = json.loads((RESULTS / "h200-eager.json").read_text())["rows"]
    whole = {row["case"]: row for row in rows if row["tokens"] == 65536 and "forward_ms" in row}
    for part in ("forward_ms", "backward_ms"):
        assert whole["64q-4kv-128-packed"][part] <= whole["64q-4kv-128"][part]


def test_the_cases_of_the_presets_exist():
    assert set(cases.ON_CUDA + cases.ON_CPU) == set(CASES)
    assert set(engines.ON_CUDA + engines.ON_CPU) <= {*engines.ENGINES, engines.STAGES}
