"""What a run says about NSA's inside, and the plan of runs with which the whole comparison is made again."""

import importlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import main
from bench.learn.attention import ATTENTIONS
from bench.learn.copying import CopyTask
from bench.learn.grid import DEPTHS, ROWS, ask_everywhere
from bench.learn.insight import free_share, observe, random_hits
from bench.learn.matching import start_matching
from bench.learn.model import CausalConvolution, Transformer
from bench.learn.mqar import MQARTask
from bench.learn.orders import verdict
from bench.learn.passkey import PasskeyTask
from bench.learn.plans import CUDA, PLANS, Entry
from bench.learn.presets import MQAR_CUDA, MQAR_LONG, PASSKEY_CUDA, SYNTHETIC, TINY
from bench.learn.settings import twin_shape
from bench.learn.suite import chosen
from bench.learn.summary import means, spread_of, summary
from bench.learn.task import IGNORED
from bench.learn.text import read_corpus, standard_library
from bench.learn.train import Twin
from flexnsa import MeanPool, NSAConfig

CPU = torch.device("cpu")
TASKS = (MQARTask(pairs=4, vocabulary=64), CopyTask(), PasskeyTask())
tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@tasks
def test_places_and_sources_say_where_answers_are_asked_and_told(task):
    batch = task.training(3, 3, 40)
    assert (batch.asked != IGNORED).all() and batch.asked.numel() == (batch.labels != IGNORED).sum()
    assert torch.equal(batch.inputs.gather(1, batch.sources), batch.asked)
    assert (batch.sources < batch.places).all()


@tasks
def test_a_curriculum_begins_with_smaller_rows(task):
    smaller = 2 if task.name == "mqar" else 20
    learner = replace(task, curriculum=((5, smaller),))
    early, late = learner.training(4, 3, 40), learner.training(5, 3, 40)
    assert all(torch.equal(a, b) for a, b in zip(late[:2], task.training(5, 3, 40)[:2], strict=True))
    assert early.inputs.numel() == late.inputs.numel()
    assert (early.asked != IGNORED).sum() < (late.asked != IGNORED).sum() or task.name != "mqar"
    if task.name == "mqar":
        assert early.places.shape == late.places.shape, "a captured step keeps its shapes"
        assert (early.asked != IGNORED).sum() == 3 * 2 == (early.labels != IGNORED).sum()
    else:
        assert early.inputs.shape == (6, 20)


def test_smaller_rows_still_tell_what_is_asked():
    batch = MQARTask(pairs=6, vocabulary=64, curriculum=((1, 2),)).training(0, 3, 40)
    real = batch.asked != IGNORED
    assert torch.equal(batch.inputs.gather(1, batch.sources)[real], batch.asked[real])


def test_losses_come_from_the_asked_places_alone():
    task = MQARTask(pairs=4, vocabulary=64)
    twin = Twin("full", replace(TINY, context=40), task.vocabulary, CPU)
    batch = task.training(0, 3, 40)
    everywhere = batch._replace(places=None, sources=None)
    labels = (batch.labels != IGNORED).sum()
    torch.testing.assert_close(twin.loss(batch, labels), twin.loss(everywhere, labels))
    twin.evaluate([batch])
    twin.evaluate([everywhere])
    (_, bits), (_, same) = twin.progress.validation
    assert bits == pytest.approx(same)
    assert [x is None for x in twin.progress.position_bits] == (~(batch.labels != IGNORED).any(0)).tolist()


@given(st.integers(1, 5), st.integers(0, 1), st.integers(0, 2), st.integers(0, 99))
def test_random_hits_are_those_of_a_random_selector(free, initial, local, step):
    config = NSAConfig(
        compress_block=4,
        compress_stride=4,
        select_block=4,
        num_selected=max(1, free + initial + local),
        num_initial=initial,
        num_local=local,
    )
    batch = MQARTask(pairs=6, vocabulary=64).training(step, 2, 48)
    chances = []
    for place, source in zip(batch.places.flatten().tolist(), batch.sources.flatten().tolist(), strict=True):
        own, told = place // 4, source // 4
        others = [block for block in range(own + 1) if block >= initial and block < own + 1 - local]
        chances.append(min(1, free / len(others)) if told in others else 1)
    assert random_hits(config, batch) == pytest.approx(sum(chances) / len(chances))


def test_where_answers_lie_is_not_known_of_text():
    task = MQARTask(pairs=4, vocabulary=64)
    assert random_hits(TINY.attention.nsa, task.training(0, 1, 40)._replace(sources=None)) is None


@pytest.mark.parametrize("settings", (MQAR_CUDA, MQAR_LONG), ids=("512", "2048"))
def test_mqar_is_a_search(settings):
    """What makes the comparison one of selectors: few of the tokens that hold pairs fit into the free slots."""
    nsa = settings.attention.nsa
    assert free_share(nsa, 2 * settings.pairs) <= 0.25
    assert nsa.compress_block == 16 and nsa.window <= settings.context // 16


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_can_start_matching(name):
    """Heads of a group ask with their keys' projection, whatever is found is handed on; sizes stay as they were."""
    shape = replace(TINY.attention, heads=4, kv_heads=2, rope_theta=None)
    layer = ATTENTIONS[name](shape)
    before = [x.shape for x in layer.parameters()]
    start_matching(layer, 4, 2)
    assert [x.shape for x in layer.parameters()] == before
    weights = {part: x for part, x in layer.named_parameters() if part.endswith("weight") and x.ndim == 2}
    query, output = (
        next(weights[n] for n in names if n in weights)
        for names in (("query.weight", "q_proj.weight"), ("output.weight", "o_proj.weight"))
    )
    for begins, other in ((("key", "k_proj"), query), (("value", "v_proj"), output.T)):
        of_each_head = other.unflatten(0, (2, 2, -1))
        for part, weight in weights.items():
            if part.startswith(begins):
                assert all(torch.equal(of_each_head[:, i], weight.unflatten(0, (2, -1))) for i in range(2)), part


@pytest.mark.parametrize("name", ("nsa", "nsa-no-window", "nsa-no-compressed", "full"))
def test_some_rows_of_a_training_step_do_without_the_selected_branch(name):
    """In those the training loss is that of no selected branch, in the others and in validation it is the whole's."""
    task = MQARTask(pairs=4, vocabulary=64)
    batch = task.training(0, 4, 64)
    labels = torch.tensor(1)
    twin, plain = (
        Twin(name, replace(TINY, attention=replace(TINY.attention, searches_first=first)), task.vocabulary, CPU)
        for first in (True, False)
    )
    for each in (twin, plain):
        each.evaluate([batch])
    assert twin.progress.bits == plain.progress.bits

    def loss(of, share, rows=slice(None)):
        for gate in of.gates:
            gate.share.fill_(share)
        return of.loss(batch.map(lambda x: x[rows]), labels)

    if name not in ("nsa", "nsa-no-window"):
        assert not twin.gates and loss(twin, 1.0) == loss(plain, 1.0)
        return
    without = loss(twin, 1.0, slice(2))
    assert not torch.isclose(without, loss(plain, 1.0, slice(2)), rtol=1e-6)
    torch.testing.assert_close(loss(twin, 0.5), without + loss(plain, 0.5, slice(2, 4)))


def test_searching_comes_before_reading():
    settings = replace(TINY, attention=replace(TINY.attention, searches_first=True), tokens=10 * 256)
    twin = Twin("nsa", settings, 64, CPU)
    task, shares = MQARTask(pairs=4, vocabulary=64), []
    for step in range(10):
        twin.learn(task.training(step, 4, 64), 1e-3)
        shares.append(twin.gates[0].share.item())
    assert shares == [1.0] * 3 + [0.5] * 7


def test_a_compressor_that_starts_matching_is_near_the_mean():
    layer = ATTENTIONS["nsa"](TINY.attention)
    start_matching(layer, TINY.attention.heads, TINY.attention.kv_heads)
    k, v = torch.randn(2, 2, 1, 64, 16).mul(0.5)
    compressed = layer.compressor(k, v)
    for found, mean in zip(compressed, MeanPool(TINY.attention.nsa)(k, v), strict=True):
        long = mean * TINY.attention.nsa.compress_block**0.5
        assert (found - long).square().mean() < 0.05 * long.square().mean()


def test_a_model_that_starts_matching_has_its_convolution_look_back_by_one():
    torch.manual_seed(0)
    model = Transformer(twin_shape(replace(TINY, matching=True, convolution=4), "nsa", 64), "nsa")
    x = torch.randn(1, 9, TINY.attention.dim)
    torch.testing.assert_close(model.convolution(x)[:, 1:], x[:, 1:] + x[:, :-1])


def observed(name, **changes):
    task = MQARTask(pairs=4, vocabulary=64)
    twin = Twin(name, replace(TINY, context=64, **changes), task.vocabulary, CPU)
    return observe(twin, task.training(0, 3, 64))


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name.startswith("nsa")])
def test_what_is_seen_inside(name):
    found = observed(name)
    gates = torch.tensor(found["gates"])
    assert gates.shape == (TINY.layers, TINY.attention.heads, 3) and (gates >= 0).all()
    left_out = name.removeprefix("nsa-no-") if name.startswith("nsa-no-") else None
    for branch, mean in zip(("compressed", "selected", "window"), gates.mean((0, 1)), strict=True):
        assert (mean == 0) == (branch == left_out)
    free = found["free"]
    assert len(free["layers"]) == len(free["shares"]) == TINY.layers
    for shares in (*free["layers"], free["random"]):
        assert sum(shares) == pytest.approx(1) and len(shares) == len(free["distances"])
    assert all(0 < share < 0.5 for share in free["shares"])
    assert all(0 <= hits <= 1 for hits in found["hits"])
    for layer in found["gradients"]:
        own = {"compressed", "selected", "window"} - {left_out}
        wanted = {"shared"} if name == "nsa-shared-kv" else own
        assert all(layer[part] > 0 for part in wanted | {"query", "gate", "output"})
        assert left_out is None or layer.get(left_out, 0) == 0 or left_out == "compressed"


def test_looking_inside_changes_nothing():
    task = MQARTask(pairs=4, vocabulary=64)
    twin = Twin("nsa", replace(TINY, context=64), task.vocabulary, CPU)
    before = {name: x.clone() for name, x in twin.model.state_dict().items()}
    observe(twin, task.training(0, 3, 64))
    assert all(torch.equal(x, before[name]) for name, x in twin.model.state_dict().items())
    assert all(parameter.grad is None for parameter in twin.model.parameters())


def test_the_convolution_is_causal_and_short():
    layer = CausalConvolution(3, 4)
    x = torch.randn(1, 9, 3, requires_grad=True)
    layer(x)[0, 6].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize(("theta", "same"), ((None, True), (1e4, False)))
def test_without_positions_the_order_of_what_is_far_does_not_matter(theta, same):
    settings = replace(TINY, attention=replace(TINY.attention, rope_theta=theta))
    torch.manual_seed(0)
    model = Transformer(replace(twin_shape(settings, "full", 64), layers=1, embedding_std=1.0), "full").double()
    tokens = torch.randint(64, (1, 30))
    moved = torch.cat([tokens[:, 10:20], tokens[:, :10], tokens[:, 20:]], dim=1)
    assert torch.allclose(model(tokens)[:, -1], model(moved)[:, -1]) == same
    assert Transformer(twin_shape(settings, "nsa", 64), "nsa").blocks[0].attention.rope_theta == theta


def test_the_grid_asks_at_every_depth_and_length():
    task = PasskeyTask()
    twin = Twin("full", replace(TINY, context=32), task.vocabulary, CPU)

    def knows_early_keys_only(inputs, places):
        answers = torch.stack([inputs[row, 1:6] for row in range(len(inputs))])
        return torch.nn.functional.one_hot(answers, task.vocabulary).float()

    twin.network = knows_early_keys_only
    cells = ask_everywhere(twin, task, (32, 64))
    assert [(cell["tokens"], cell["depth"]) for cell in cells] == [(t, depth) for t in (32, 64) for depth in DEPTHS]
    for cell in cells:
        assert cell["rows"] == ROWS and (cell["keys"] == 1) == (cell["depth"] == 0)


def test_a_passkey_run_draws_its_grid(tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHETIC["passkey"], "tiny", replace(SYNTHETIC["passkey"]["tiny"], grid=(32, 64)))
    main(
        [
            "learn",
            "--task",
            "passkey",
            "--preset",
            "tiny",
            "--tokens",
            "256",
            "--attention",
            "nsa",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"][0]["grid"]) == 2 * len(DEPTHS)
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("grid.png", "insights.png", "gates.png"))


def test_zero_pairs_are_refused_and_not_taken_for_the_default(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["learn", "--task", "mqar", "--preset", "tiny", "--pairs", "0", "--out", str(tmp_path)])
    assert "pairs: expected 1 to" in capsys.readouterr().err


def test_presets_and_graphs_that_do_not_fit_are_refused(tmp_path, capsys):
    for options, word in (
        (["--task", "text", "--preset", "cuda-long"], "--preset must be one of tiny, cpu, cuda"),
        (["--task", "mqar", "--preset", "tiny", "--device", "cpu", "--capture"], "--capture needs CUDA"),
    ):
        with pytest.raises(SystemExit):
            main(["learn", *options, "--out", str(tmp_path)])
        assert word in capsys.readouterr().err


def test_several_folders_are_one_corpus():
    folders = [standard_library() / name for name in ("asyncio", "json")]
    both = read_corpus(*folders)
    assert len(both.train_files) + len(both.validation_files) == sum(len(list(x.rglob("*.py"))) for x in folders) - len(
        {path.relative_to(folders[0]) for path in folders[0].rglob("*.py")}
        & {path.relative_to(folders[1]) for path in folders[1].rglob("*.py")}
    )


def test_a_summary_is_short_and_says_the_same(tmp_path):
    options = ["--task", "mqar", "--preset", "tiny", "--tokens", "1024", "--attention", "nsa", "full"]
    main(["learn", *options, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    short = summary(result)
    for row, before in zip(short["rows"], result["rows"], strict=True):
        assert row["steps"] == len(before["train_bits"]) and row["accuracy"] == before["accuracy"]
        assert row["gradient_norm"]["max"] == max(before["norms"]) and row["gradient_norm"]["not_finite"] == 0
        assert not {"train_bits", "norms", "position_bits"} & row.keys()
    assert [insight["gates"] for insight in short["rows"][0]["insights"]] == [
        insight["gates"] for insight in result["rows"][0]["insights"]
    ]
    assert "free" in short["rows"][0]["insights"][-1]
    assert len(json.dumps(short)) < len(json.dumps(result))


def test_norms_that_are_not_finite_are_counted():
    assert spread_of([1.0, float("nan"), 3.0, float("inf"), 2.0]) == {"median": 2.0, "max": 3.0, "not_finite": 2}
    assert spread_of([]) is None and means([], 3) == []


def test_a_compiled_run_is_judged_by_the_eager_ones():
    eager = {"eager, order 0": [3.0, 2.0], "eager, order 1": [3.0, 2.1]}
    assert verdict(eager | {"compiled": [3.05, 2.15]})["within"]
    assert not verdict(eager | {"compiled": [3.0, 2.3]})["within"]


def test_the_first_losses_of_a_compiled_model(tmp_path, monkeypatch, capsys):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend="eager"))
    source = str(standard_library() / "asyncio")
    main(["learn-orders", "--preset", "tiny", "--steps", "3", "--source", source, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    curves = result["losses"]
    assert len(curves) == 4 and all(len(curve) == 3 for curve in curves.values())
    assert curves["eager, order 1"] != curves["eager, order 0"], "the order of the sums shows"
    assert result["spread"] < 1e-4 and result["deviation"] < 1e-4
    assert "3 losses" in capsys.readouterr().out


def test_every_command_of_a_plan_parses(monkeypatch):
    seen = []
    for module in ("command", "orders"):
        monkeypatch.setattr(f"bench.learn.{module}.run", lambda options: seen.append(options))
    entries = [entry for plan in PLANS.values() for entry in plan]
    for entry in entries:
        main([*entry.command, "--out", "unused"])
    assert len(seen) == len(entries)
    for plan in PLANS.values():
        names = [entry.name for entry in plan]
        assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="--only"):
        chosen(CUDA, ["none such"])


def test_a_plan_runs_resumes_and_is_summed_up(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "masks")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["learn-all", "--plan", "tiny", "--only", "mqar", "--out", str(tmp_path)]
    main([*command, "--minutes", "0.0001"])
    assert "not begun" in capsys.readouterr().out
    main([*command, "--minutes", "5"])
    assert "finished" in capsys.readouterr().out, (tmp_path / "mqar" / "log").read_text()
    written = (tmp_path / "mqar" / "result.json").stat().st_mtime_ns
    main([*command, "--minutes", "5"])
    assert (tmp_path / "mqar" / "result.json").stat().st_mtime_ns == written, "what is done is not repeated"
    short = json.loads((tmp_path / "results" / "mqar.json").read_text())
    assert short["status"] == "finished" and short["beside"] == 1
    assert json.loads((tmp_path / "results" / "plan.json").read_text())["runs"] == {"mqar": "finished"}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's tables and pictures of what a run of the plan left in a folder; first of an empty one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs/make"))
    runs, tables, pictures = (importlib.import_module(f"learn_{name}") for name in ("runs", "tables", "pictures"))
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    return tables, pictures


def test_the_page_says_what_was_not_measured(page):
    tables, pictures = page
    for name, table in tables.TABLES.items():
        assert "Not measured yet" in table(), name
    assert not any(there() for _, there, _ in pictures.DRAWN.values())


def test_the_page_is_made_of_what_runs_wrote(page, tmp_path, monkeypatch):
    tables, pictures = page
    monkeypatch.setitem(SYNTHETIC["passkey"], "tiny", replace(SYNTHETIC["passkey"]["tiny"], grid=(64, 1024)))
    source = str(standard_library() / "asyncio")
    for name, options in {
        "mqar-512-seed0": ["mqar", "--attention", "nsa", "full", "moba"],
        "mqar-512-seed1": ["mqar", "--attention", "nsa", "full", "--seed", "1"],
        "mqar-2048-seed0": ["mqar", "--attention", "nsa"],
        "passkey": ["passkey", "--attention", "full", "nsa"],
        "text-seed0": ["text", "--attention", "nsa", "full", "--source", source],
    }.items():
        main(["learn", "--preset", "tiny", "--tokens", "512", "--out", str(tmp_path / "raw"), "--task", *options])
        short = summary(json.loads((tmp_path / "raw" / "result.json").read_text()))
        (tmp_path / f"{name}.json").write_text(json.dumps(short | {"beside": 3}))
    made = {name: table() for name, table in tables.TABLES.items()}
    missing = {name for name, text in made.items() if "Not measured yet" in text}
    assert missing == {"learn plan", "learn orders", "learn searching"}
    nsa = [json.loads((tmp_path / f"mqar-512-seed{seed}.json").read_text())["rows"][0] for seed in (0, 1)]
    accuracy = ", ".join(f"{row['accuracy'][-1][1]:.4f}" for row in nsa)
    assert f"| nsa | {accuracy} |" in made["learn mqar 512"]
    assert "reached 0.99 in 0 of 2 runs" in made["learn mqar 512"] and "| moba |" in made["learn mqar 512"]
    for draw, there, _ in pictures.DRAWN.values():
        assert there() and draw().axes


def test_the_recorded_runs_bear_out_what_the_page_says_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs/make"))
    runs = importlib.import_module("learn_runs")
    for tokens, pairs in ((512, 64), (2048, 128)):
        found = runs.by_attention(runs.runs(f"mqar-{tokens}-"))
        accuracy = {name: [row["accuracy"][-1][1] for _, row in seeds] for name, seeds in found.items()}
        assert all(len(accuracy[name]) == 3 for name in ("full", "nsa", "nsa-no-selected", "window"))
        assert min(accuracy["full"]) > 0.999 and min(accuracy["nsa"]) > max(accuracy["full"]) - 0.01
        assert max(accuracy["window"]) < 0.001 and 0.11 < min(accuracy["nsa-no-selected"]) < 0.13
        assert max(accuracy["moba"] + accuracy["nsa-no-compressed"]) < 0.97 and max(accuracy["nsa-shared-kv"]) < 0.13
        for result, row in found["nsa"] + found["full"]:
            assert result["status"] == "finished" and row["steps"] == result["config"]["tokens"] // 16_384
        hits = {name: [max(row["insights"][-1]["hits"]) for _, row in found[name]] for name in ("nsa", "nsa-shared-kv")}
        assert min(hits["nsa"] + hits["nsa-shared-kv"]) > 0.98
        early = runs.by_attention(runs.runs(f"reading-first/mqar-{tokens}-"))
        assert max(row["accuracy"][-1][1] for _, row in early["nsa"]) < min(accuracy["nsa"]) - 0.06
        assert min(max(row["insights"][-1]["hits"]) for _, row in early["nsa-no-selected"]) > 0.98
        assert all(
            row["accuracy"][-1][1] == pytest.approx(1 - 1 / pairs, abs=2e-3) and row["steps"] == 2000
            for _, row in early["full"]
        )
        for _, row in early["nsa"]:
            shares = [max(insight["hits"]) for insight in row["insights"]]
            assert tokens == 512 or shares[1] > shares[4] + 0.1 > shares[-1]
    ((_, nsa),) = runs.by_attention(runs.runs("passkey"))["nsa"]
    assert all(cell["keys"] == 1 for cell in nsa["grid"] if cell["depth"] < 1)
    for result in runs.runs("text-seed"):
        nsa, full = result["rows"]
        for (_, ours), (_, theirs) in zip(nsa["by_position"], full["by_position"], strict=True):
            assert ours < theirs
        assert nsa["seconds"] > full["seconds"]


@pytest.mark.parametrize("lagging", (False, True), ids=("at once", "lagging"))
def test_a_broken_off_run_goes_on_with_the_same_losses(tmp_path, monkeypatch, lagging):
    """To the last bit: nothing of it hangs on when it was stopped, or on losses that are still on their way then."""
    options = ["learn", "--task", "mqar", "--preset", "tiny", "--tokens", "2560", "--attention", "nsa", "full", "--out"]
    main([*options, str(tmp_path / "whole")])
    learn = Twin.learn

    def interrupted(twin, batch, rate):
        if twin.attention == "full" and twin.progress.tokens == 5 * 256:
            signal.raise_signal(signal.SIGINT)
        with pytest.MonkeyPatch.context() as patch:
            if lagging:  # as on a GPU, where learning does not wait for the step
                patch.setattr(twin, "settle", lambda: None)
            learn(twin, batch, rate)

    monkeypatch.setattr(Twin, "learn", interrupted)
    main([*options, str(tmp_path / "broken")])
    monkeypatch.setattr(Twin, "learn", learn)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["status"] == "interrupted"
    main([*options, str(tmp_path / "broken"), "--resume"])
    whole, broken = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken"))
    for row, other in zip(whole["rows"], broken["rows"], strict=True):
        assert len(row["train_bits"]) == 10
        for part in ("train_bits", "norms", "validation", "accuracy", "insights"):
            assert row[part] == other[part], part


@pytest.mark.gpu
@tasks
def test_rows_drawn_on_a_gpu_follow_from_seed_and_step_too(task):
    task = replace(task, device=torch.device("cuda"))
    batch, again = (task.training(3, 2, 40) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True) if a is not None)
    assert torch.equal(batch.inputs.gather(1, batch.sources), batch.asked)
    assert not torch.equal(batch.inputs, task.training(4, 2, 40).inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("full", "nsa", "moba"))
def test_a_captured_step_learns_as_one_run_kernel_by_kernel(name):
    """Through a change of the rows' shape too, which a graph of its own serves."""
    task = PasskeyTask(vocabulary=64, device=torch.device("cuda"), curriculum=((6, 64),))
    losses = []
    for captured in (False, True):
        settings = replace(TINY, context=128, captured=captured)
        twin = Twin(name, settings, task.vocabulary, torch.device("cuda"))
        for step in range(14):
            twin.learn(task.training(step, 4, 128), 1e-3 * (step + 1))
        twin.settle()
        assert len(twin.step.replays) == 2 * captured
        losses.append(torch.tensor(twin.progress.train_bits))
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_the_passkey_preset_says_nothing_about_positions():
    assert PASSKEY_CUDA.attention.rope_theta is None and PASSKEY_CUDA.convolution > 5
    assert max(PASSKEY_CUDA.grid) == 65_536 and PASSKEY_CUDA.context == 16_384


def test_a_run_that_fails_is_tried_once_more(tmp_path, monkeypatch, capsys):
    failing = Entry("failing", ("learn", "--task", "mqar", "--preset", "tiny", "--pairs", "0"))
    monkeypatch.setitem(PLANS, "failing", (failing,))
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "masks")]))
    main(["learn-all", "--plan", "failing", "--minutes", "2", "--out", str(tmp_path)])
    assert "not begun" in capsys.readouterr().out
    assert (tmp_path / "failing" / "log").read_text().count("pairs: expected 1 to") == 2
