"""Processes joined by gloo, or by NCCL with a GPU each, that run the same checks and write how each of them ended.

On CPUs one Python process imports everything and is forked into the ranks: on a busy machine imports take most of the
time.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PASSED = "passed"
NOT_REACHED = "not reached, since a check before it failed"
PATIENCE = timedelta(seconds=60)
"""How long a rank waits in a collective that the others do not enter."""

Outcomes = dict[str, list[str]]
"""How each check ended on each rank, by its name."""


def run_on_ranks(
    script: Path, names: Mapping[int, Sequence[str]], folder: Path, seconds: float, device: str = "cpu"
) -> dict[int, Outcomes]:
    """By number of ranks how each of the named checks of `script` ended; all are killed after `seconds`."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, script, folder, json.dumps(names), device], env=os.environ | settings, start_new_session=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {count: _outcomes(folder / str(count), count, checks) for count, checks in names.items()}


def _outcomes(folder: Path, count: int, names: Sequence[str]) -> Outcomes:
    paths = [folder / f"{rank}.json" for rank in range(count)]
    found = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    return {name: [outcomes.get(name, NOT_REACHED) for outcomes in found] for name in names}


def main(checks: Mapping[int, Mapping[str, Callable[[], None]]], arguments: Sequence[str]) -> None:
    """What a script of checks does when it is run, with its checks by number of ranks and name."""
    torch.set_num_threads(1)
    names = json.loads(arguments[1])
    for count in map(int, names):
        folder, device = Path(arguments[0]) / str(count), arguments[2]
        chosen = {name: checks[count][name] for name in names[str(count)]}
        if len(arguments) > 3:
            if count == int(arguments[3]):
                _be_a_rank(int(arguments[4]), count, folder, chosen, device)
            continue
        folder.mkdir()
        start = _start_anew if device == "cuda" else _fork
        ranks = [start(rank, count, folder, chosen, device) for rank in range(count)]
        for wait in ranks:
            wait()


def _fork(*arguments: Any) -> Callable[[], object]:
    rank = multiprocessing.get_context("fork").Process(target=_be_a_rank, args=arguments)
    rank.start()
    return rank.join


def _start_anew(rank: int, count: int, *_: Any) -> Callable[[], object]:
    """By this script: the threads that autograd starts for a GPU do not come along in a fork."""
    return subprocess.Popen([sys.executable, *sys.argv, str(count), str(rank)]).wait


def _be_a_rank(rank: int, count: int, folder: Path, checks: Mapping[str, Callable[[], None]], device: str) -> None:
    """Join the others and run the checks, up to the first that fails: after it the ranks may be out of step."""
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=PATIENCE
    )
    outcomes: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check()
            outcomes[name] = PASSED
        except BaseException:
            outcomes[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name] != PASSED:
            # Without goodbye: the others then fail at once instead of waiting.
            os._exit(1)
    dist.destroy_process_group()
