import json
from dataclasses import replace

import pytest
import torch

from bench.cli import main
from bench.interrupt import Interrupt
from bench.learn.model import Transformer, count_parameters
from bench.model import cases, run
from bench.model.cases import CASES, ENGINES
from bench.model.profile import kind_of, own_kernels, spent
from bench.model.report import table
from bench.model.run import Run

CPU = torch.device("cpu")
TINY = replace(CASES["small"], tokens=(64, 96), shape=replace(CASES["small"].shape, layers=1))


def run_of(folder, **changes):
    options = {"case": TINY, "engines": ["nsa", "sdpa"], "compiled": (False,), "budget": 1.0, "say": lambda line: None}
    return Run(device=CPU, path=folder / "model.json", **(options | changes))


def test_the_command_writes_a_row_for_each_attention(tmp_path, capsys):
    out = tmp_path / "model.json"
    main(["model", "--tokens", "64", "--layers", "1", "--milliseconds", "1", "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {"device", "torch", "date", "commit", "rows"} <= result.keys() and result["status"] == "finished"
    assert [(row["engine"], row["tokens"], row["compiled"]) for row in result["rows"]] == [
        ("nsa", 64, False),
        ("sdpa", 64, False),
    ]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(64e3 / row["step_ms"])
        assert row["steps"] >= 5 and 0 < row["bits_last"] < row["bits_first"]
    printed = capsys.readouterr().out
    assert "x full" in printed and printed.count("| eager |") == 2


def test_a_failure_is_a_row_and_the_rest_is_measured(tmp_path):
    """SDPA has no cuDNN on a CPU."""
    result = run_of(tmp_path, engines=["cudnn", "sdpa"], case=replace(TINY, tokens=(64,))).run(Interrupt())
    assert ["missing" in row for row in result["rows"]] == [True, False]
    assert json.loads((tmp_path / "model.json").read_text())["rows"] == result["rows"]


def test_an_interrupt_keeps_what_is_done(tmp_path):
    interrupt = Interrupt()

    def stop(line):
        interrupt.requested = True

    result = run_of(tmp_path, say=stop).run(interrupt)
    assert result["status"] == "stopped" and len(result["rows"]) == 1


def test_a_row_that_takes_too_long_says_so(tmp_path, monkeypatch):
    def endless(step, device, budget):
        while True:
            step()

    monkeypatch.setattr(run, "time_call", endless)
    result = run_of(tmp_path, row_seconds=0.2, engines=["sdpa"]).run(Interrupt())
    assert [row["missing"] for row in result["rows"]] == 2 * ["OutOfTimeError: took longer than 0.2 s"]


def test_models_differ_in_their_attention_alone():
    shapes = {}
    for engine in ("nsa", "sdpa"):
        with torch.device("meta"):
            model = Transformer(CASES["150M"].shape, ENGINES[engine].attention)
        shapes[engine] = {n: p.shape for n, p in model.named_parameters() if ".attention." not in n}
        assert 100e6 < count_parameters(model) < 200e6
    assert shapes["nsa"] == shapes["sdpa"]


def test_all_blocks_share_one_compilation():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = Transformer(replace(TINY.shape, layers=3), "nsa")
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    model(torch.zeros(1, 64, dtype=torch.int64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_kernels_are_told_apart_by_name():
    names = {
        "triton_tem_fused_flex_attention_backward_2": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>": "optimizer",
        "triton_poi_fused_mul_silu_3": "other",
    }
    assert {name: kind_of(name) for name in names} == names
    assert own_kernels() and all(kind_of(name) == "attention" for name in own_kernels())
    found = spent({"nvjet_a": 3.0, "sdpa": 1.0})
    assert found.attention_share == 0.25 and list(found.kernels) == ["nvjet_a", "sdpa"]


def test_ratios_are_against_the_fastest_full_attention():
    def row(engine, step, compiled=True):
        part = {"engine": engine, "compiled": compiled, "tokens": 8, "parameters": 10**8, "tokens_per_second": 1.0}
        return part | {"step_ms": step, "step_range_ms": [step, step]}

    lines = table([row("nsa", 2.0), row("fa2", 8.0), row("cudnn", 6.0), row("nsa", 4.0, False)]).splitlines()
    assert [line.split("|")[7].strip() for line in lines[2:]] == ["3.00", "0.75", "1.00", "1.50"]


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--layers", "-1"], ["--attention", "nothing"]])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        main(["model", *options])
    assert options[0].removeprefix("--") in capsys.readouterr().err


def test_the_defaults_exist():
    assert {cases.ON_CUDA, cases.ON_CPU} <= set(CASES)
    assert set(cases.ENGINES_ON_CUDA + cases.ENGINES_ON_CPU) <= set(ENGINES)
