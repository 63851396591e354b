"""The bench over several GPUs, as a group of one process: every way runs, and says the same as one GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.cli import main
from bench.distributed.run import Run, Shape
from bench.distributed.ways import WAYS
from bench.parallel import Ranks
from flexnsa import NSAConfig

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)


@pytest.fixture
def alone() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_every_way_is_measured_and_agrees_with_one_gpu(alone: Ranks, tmp_path: Path):
    said: list[str] = []
    run = Run(
        shape=Shape(dim=16, heads=4, kv_heads=2, head_dim=8, tokens=32, config=CONFIG),
        ways=list(WAYS),
        ranks=alone,
        device=torch.device("cpu"),
        dtype=torch.float32,
        path=tmp_path / "distributed.json",
        runs=3,
        say=said.append,
    )
    run.run()
    result = json.loads(run.path.read_text())
    assert {"device", "torch", "triton", "date", "commit", "rows"} <= result.keys()
    assert [row["way"] for row in result["rows"]] == list(WAYS)
    for row in result["rows"]:
        assert row["tokens"] == 32 and row["case"] == "4q-2kv-8" and row["gpus"] == 1
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
        assert row["difference"] < 1e-5 and row["gradient_difference"] < 1e-5 and row["peak_gib"] is None
    assert "speed_up_forward_backward" not in result["rows"][0]
    assert all(row["speed_up_forward_backward"] > 0 for row in result["rows"][1:])
    assert len(said) == len(WAYS) and all(way in line for way, line in zip(WAYS, said, strict=True))


def test_without_torchrun_it_says_how_to_start_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["distributed"])
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
