"""The demo trained by several processes: the same loss as one, on with it after a kill, and no hang without a rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.cli import main
from bench.learn.checkpoint import Checkpoints
from bench.learn.task import IGNORED, Batch
from bench.learn.text import standard_library
from bench.parallel import ALONE, Ranks, own_device

SOURCE = standard_library() / "asyncio"
OPTIONS = ["learn", "--task", "text", "--preset", "tiny", "--attention", "nsa", "--tokens", "10240"]
OPTIONS += ["--minutes", "9", "--source", str(SOURCE), "--out"]
ROOT = Path(__file__).parent.parent


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "masks")])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "bench", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker(job: subprocess.Popen[str], rank: int) -> int:
    """Process id of a rank, which is a child of its launcher."""
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} was not found")


def wait_until(condition, job: subprocess.Popen[str], seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, f"the job ended: {job.communicate()[0]}"
        assert time.monotonic() < until, "the job took too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str, float]]:
    """A run one of whose ranks was killed after the first checkpoint: folder, exit code, output, seconds to its end."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("needs /proc to find the ranks")
    folder = tmp_path_factory.mktemp("killed") / "run"
    job = torchrun(*OPTIONS, folder)
    try:
        wait_until(lambda: Checkpoints(folder / "checkpoint", ALONE).newest(), job)
        os.kill(worker(job, rank=1), signal.SIGKILL)
        at = time.monotonic()
        output, _ = job.communicate(timeout=100)
        yield folder, job.returncode, output, time.monotonic() - at
    finally:
        job.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("alone")
    main([*OPTIONS, str(folder)])
    return json.loads((folder / "result.json").read_text())


def assert_same_training(result: dict, expected: dict) -> None:
    (row,), (other,) = result["rows"], expected["rows"]
    assert result["status"] == "finished" and len(row["train_bits"]) == 40
    torch.testing.assert_close(torch.tensor(row["train_bits"]), torch.tensor(other["train_bits"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(row["validation"]), torch.tensor(other["validation"]), rtol=1e-4, atol=1e-4)
    gates = [torch.tensor([insight["gates"] for insight in x["insights"]]) for x in (row, other)]
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-4)


def test_a_job_whose_rank_was_killed_ends_and_says_why(killed):
    folder, code, output, seconds = killed
    assert code != 0
    assert "SIGKILL" in output and "rank" in output
    assert seconds < 60
    assert json.loads((folder / "result.json").read_text())["status"] == "running"


def test_two_processes_go_on_after_the_kill_and_end_as_one_process_does(killed, alone, tmp_path):
    folder = shutil.copytree(killed[0], tmp_path / "run")
    job = torchrun(*OPTIONS, folder, "--resume")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert output.count("bits/byte") == 1, "one process prints"
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == 2
    assert_same_training(result, alone)
    assert not (folder / "checkpoint").exists(), "a finished run needs none"
    assert (folder / "attention.png").stat().st_size > 5_000


def test_one_process_goes_on_with_what_two_wrote(killed, alone, tmp_path, monkeypatch):
    folder = shutil.copytree(killed[0], tmp_path / "run")
    seen = []
    learn = Checkpoints.load
    monkeypatch.setattr(Checkpoints, "load", lambda *args: seen.append(learn(*args)) or seen[-1])
    main([*OPTIONS, str(folder), "--resume"])
    assert seen[0][0] in (13, 26, 39), "it did not start anew"
    assert_same_training(json.loads((folder / "result.json").read_text()), alone)


def test_another_run_does_not_go_on_with_this_one(killed, tmp_path, capsys):
    folder = shutil.copytree(killed[0], tmp_path / "run")
    with pytest.raises(SystemExit):
        main([*OPTIONS, str(folder), "--resume", "--lr", "0.5"])
    assert "'learning_rate': 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*OPTIONS, str(folder), "--resume", "--attention", "nsa", "window"])
    assert "does not fit this run" in capsys.readouterr().err


def test_without_resume_a_run_starts_anew(killed, tmp_path):
    folder = shutil.copytree(killed[0], tmp_path / "run")
    main([*OPTIONS, str(folder), "--tokens", "512"])
    assert len(json.loads((folder / "result.json").read_text())["rows"][0]["train_bits"]) == 2


def test_shares_are_as_long_on_each_rank_and_together_the_batch():
    rows = torch.arange(15).reshape(5, 3)
    shares = [Batch(rows, rows + 1, rows // 3).share(Ranks(rank, 4))[:3] for rank in range(4)]
    assert all(x.shape == (2, 3) for share in shares for x in share)
    inputs, labels, documents = (torch.cat(x) for x in zip(*shares, strict=True))
    asked = (labels != IGNORED).all(1)
    for found, expected in ((inputs, rows), (labels, rows + 1), (documents, rows // 3)):
        assert torch.equal(found[asked].sort(0).values, expected)
    assert (labels[~asked] == IGNORED).all() and (~asked).sum() == 3


def test_a_single_process_shares_and_sends_nothing():
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2))
    assert all(torch.equal(x, y) for x, y in zip(batch.share(ALONE)[:2], batch[:2], strict=True))
    x: Tensor = torch.ones(2)
    assert ALONE.total(x) is x and ALONE.any(True, x.device) and not ALONE.any(False, x.device)


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="--device must be cuda where"):
        own_device(torch.device("cuda:1"))
    assert own_device(torch.device("cpu")) == torch.device("cpu")
