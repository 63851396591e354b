"""`python -m bench learn-all`: a whole plan of runs, side by side on the GPUs that there are, within a time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.interrupt import catching_interrupt
from bench.learn.plans import PLANS, Entry
from bench.learn.summary import summary
from bench.record import environment, write_json

PATIENCE = 35.0
"""Seconds that runs get at the end to validate and to write."""

PAUSE = 0.2

COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
"""Several runs compile at once: none of them should take all cores."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `learn-all`."""
    parser = commands.add_parser(
        "learn-all",
        help="run the whole comparison of the page on learning",
        description="Run a plan of `bench learn` runs side by side. Each writes its own folder, goes on from its last "
        "checkpoint when the command is given again, and ends with the time; a run that is done is not repeated. "
        "Writes a summary of each run to OUT/results.",
    )
    add = parser.add_argument
    add("--plan", choices=PLANS, help="what to run (default: cuda where there is a GPU, else tiny)")
    add("--minutes", type=float, default=9.0, help="when all runs end, and what is left resumes (default: 9)")
    add("--out", type=Path, default=Path("runs/learn-all"), help="folder to write to (default: runs/learn-all)")
    add("--only", nargs="+", help="only these runs of the plan")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Start what is not done, wait, and write the summaries.

    Raises:
        ValueError: ``--only`` names a run that the plan has not.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = options.plan or ("cuda" if device.type == "cuda" else "tiny")
    entries = chosen(PLANS[plan], options.only)
    gpus = torch.cuda.device_count()
    began = time.monotonic()
    jobs = [Job(entry, options.out, entry.share % gpus if gpus else None) for entry in entries]
    supervise([job for job in jobs if not job.done()], began + 60 * options.minutes)
    facts = {"plan": plan, "minutes": options.minutes, "gpus": gpus, "seconds": round(time.monotonic() - began, 1)}
    collect(options.out, jobs, environment(device) | facts)


def chosen(entries: Sequence[Entry], only: Sequence[str] | None) -> list[Entry]:
    """The entries of those names, all for None.

    Raises:
        ValueError: there is none of a name.
    """
    names = [entry.name for entry in entries]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise ValueError(f"--only: expected names among {', '.join(names)}, got {', '.join(unknown)}")
    return [entry for entry in entries if only is None or entry.name in only]


@dataclass
class Job:
    """An entry of a plan, its folder and, once started, its process."""

    entry: Entry
    out: Path
    gpu: int | None
    process: subprocess.Popen[bytes] | None = None
    attempts: int = 0

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.out / self.entry.name

    def result(self) -> dict[str, Any] | None:
        """What it has written so far."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def done(self) -> bool:
        """Whether it ran to its end, now or earlier."""
        result = self.result()
        return result is not None and result["status"] == "finished"

    def start(self, deadline: float) -> None:
        """Start the process, the second time without CUDA graphs; what it prints goes to a file."""
        command = [sys.executable, "-m", "bench", *self.entry.command, "--out", str(self.folder)]
        self.attempts += 1
        if self.entry.command[0] == "learn":
            command += ["--resume", "--minutes", f"{max(0.05, (deadline - time.monotonic()) / 60):.2f}"]
            command += ["--no-capture"] * (self.attempts > 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": _visible(self.gpu)}
        environment = COMPILERS | os.environ | gpu
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def over(self) -> bool:
        """Whether the process was started and has ended."""
        return self.process is not None and self.process.poll() is not None

    def failed(self) -> bool:
        """Whether the process ended with an error for the first time."""
        return self.process is not None and self.process.poll() not in (None, 0) and self.attempts == 1


def _visible(gpu: int) -> str:
    """The name of a GPU of this process for a child of it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[gpu] if given else str(gpu)


def supervise(jobs: Sequence[Job], deadline: float) -> None:
    """Run the jobs, twice where one fails; at the deadline or at Ctrl-C ask them to stop, and at last make them."""
    with catching_interrupt() as interrupt:
        while (
            not all(job.over() and not job.failed() for job in jobs)
            and time.monotonic() < deadline
            and not interrupt.requested
        ):
            for job in jobs:
                if job.failed() or job.process is None:
                    job.start(deadline)
            time.sleep(PAUSE)
        for number in (signal.SIGINT, signal.SIGKILL):
            running = [job.process for job in jobs if job.process is not None and job.process.poll() is None]
            for process in running:
                process.send_signal(number)
            until = time.monotonic() + PATIENCE
            while any(process.poll() is None for process in running) and time.monotonic() < until:
                time.sleep(PAUSE)


def collect(out: Path, jobs: Sequence[Job], facts: dict[str, object]) -> None:
    """Write a summary of each run, and one of the plan; print how each ended."""
    states = {}
    for job in jobs:
        result = job.result()
        states[job.entry.name] = "not begun" if result is None else result["status"]
        if result is not None:
            beside = sum(other.gpu == job.gpu for other in jobs)
            write_json(out / "results" / f"{job.entry.name}.json", summary(result) | {"beside": beside})
        print(f"{job.entry.name:<20} {states[job.entry.name]}")
    write_json(out / "results" / "plan.json", facts | {"runs": states})
