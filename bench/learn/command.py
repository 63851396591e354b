"""`python -m bench learn`: its options, and what they build."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bench.learn.attention import ATTENTIONS, DEFAULT_ATTENTIONS
from bench.learn.compare import Comparison
from bench.learn.copying import CopyTask
from bench.learn.mqar import MQARTask
from bench.learn.parallel import joined, own_device
from bench.learn.passkey import PasskeyTask
from bench.learn.presets import PRESETS, SYNTHETIC, preset_for
from bench.learn.report import report
from bench.learn.settings import Settings
from bench.learn.task import Task
from bench.learn.text import PackedTextTask, TextTask, read_corpus, standard_library

TASKS = ("text", *SYNTHETIC)
DESCRIPTION = """\
Train small language models that differ in their attention alone (nsa, full, window, and ablations of nsa), side by side
on the same batches, and compare them.

  text     the next byte of the standard library's own source
  mqar     which value was told with each of several keys (multi-query associative recall)
  copy     a row of random tokens once more
  passkey  the digits hidden somewhere in a row of noise

Writes result.json, loss.png, attention.png, selection.png and gates.png. Ctrl-C stops the training of all models at
the same step and keeps results and pictures so far; a second Ctrl-C stops at once.

On several processes, each with its share of every batch and of the parameters:
    torchrun --nproc-per-node 2 -m bench learn --task text ...
A killed run goes on where it was last validated, on any number of processes: the same command with --resume."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `learn`."""
    parser = commands.add_parser(
        "learn",
        help="train small models that differ in their attention alone",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="what is to be learned, see above")
    add("--preset", choices=PRESETS, help="sizes; by default those made for the device. tiny takes seconds")
    chosen = list(DEFAULT_ATTENTIONS)
    add("--attention", choices=ATTENTIONS, nargs="+", default=chosen, help="models to train (default: nsa full window)")
    add("--tokens", type=int, help="training tokens that each model sees")
    add("--context", type=int, help="tokens of one row")
    add("--batch", type=int, help="rows of one step")
    add("--lr", type=float, dest="learning_rate", help="peak learning rate")
    add("--minutes", type=float, help="training stops here, all models at the same step")
    add("--seed", type=int, default=0, help="of weights, batches and sampling (default: 0)")
    add("--device", type=torch.device, help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--compile", action="store_true", default=None, dest="compiled", help="run the models through torch.compile")
    add(
        "--packed", action="store_true", help="text: rows of several excerpts, as documents that do not see one another"
    )
    add("--pairs", type=int, help="mqar: pairs of a row (default: a sixteenth of the context)")
    add("--source", type=Path, help="text: folder of *.py files to learn from instead of the standard library")
    add("--out", type=Path, help="folder to write to (default: runs/TASK-PRESET-seedN)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in that folder, if there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, compare, write, print.

    Raises:
        ValueError: the options do not fit one another or the data.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = own_device(options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    preset = options.preset or preset_for(device)
    folder = options.out or Path("runs") / f"{options.task}{'-packed' * options.packed}-{preset}-seed{options.seed}"
    settings = settings_of(options, SYNTHETIC.get(options.task, PRESETS)[preset])
    task = task_of(options, settings)
    with joined(device) as ranks:
        result = Comparison(task, settings, options.attention, device, folder, ranks).run(options.resume)
    if ranks.first:
        print(report(result))
        print(f"\nResults and pictures: {folder}/")


def task_of(options: argparse.Namespace, settings: Settings) -> Task:
    """The task of that name.

    Raises:
        ValueError: an option that another task takes.
    """
    owners = {"packed": "text", "source": "text", "pairs": "mqar"}
    for name, owner in owners.items():
        if getattr(options, name) and options.task != owner:
            raise ValueError(f"--{name} is an option of --task {owner}, got --task {options.task}; leave it out")
    match options.task:
        case "mqar":
            return MQARTask(options.pairs or settings.context // 16, seed=settings.seed)
        case "copy":
            return CopyTask(seed=settings.seed)
        case "passkey":
            return PasskeyTask(seed=settings.seed)
        case _:
            rows = PackedTextTask if options.packed else TextTask
            return rows(read_corpus(options.source or standard_library()), settings.seed)


def settings_of(options: argparse.Namespace, preset: Settings) -> Settings:
    """The preset with the options that were given in place of its own values."""
    names = ("tokens", "context", "batch", "learning_rate", "minutes", "seed", "compiled")
    return replace(preset, **{name: getattr(options, name) for name in names if getattr(options, name) is not None})
