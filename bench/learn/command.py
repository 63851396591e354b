"""`python -m bench learn`: its options, and what they build."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.learn.attention import ATTENTIONS, DEFAULT_ATTENTIONS
from bench.learn.compare import Comparison
from bench.learn.copying import CopyTask
from bench.learn.mqar import MQARTask
from bench.learn.passkey import PasskeyTask
from bench.learn.presets import PRESETS, SYNTHETIC, preset_for
from bench.learn.report import report
from bench.learn.settings import Settings
from bench.learn.task import Task
from bench.learn.text import PackedTextTask, TextTask, installed_packages, read_corpus, standard_library
from bench.options import add_device, device_of
from bench.parallel import joined, own_device

TASKS = ("text", *SYNTHETIC)
OVERRIDES = (
    "tokens", "context", "batch", "learning_rate", "minutes", "seed", "pairs", "continuation", "compiled", "captured",
)  # fmt: skip
NAMES = tuple(dict.fromkeys(name for presets in (PRESETS, *SYNTHETIC.values()) for name in presets))
DESCRIPTION = """\
Train small language models that differ in their attention alone (nsa, full, window, and ablations of nsa), side by side
on the same batches, and compare them.

  text     the next byte of the standard library's own source
  mqar     which value was told with each of several keys (multi-query associative recall)
  copy     a row of random tokens once more
  passkey  the digits hidden somewhere in a row of noise

Writes result.json and loss.png; of nsa's inside selection.png, gates.png and insights.png, and for text attention.png;
for passkey presets that ask at several lengths grid.png. Ctrl-C stops the training of all models at the same step and
keeps results and pictures so far; a second Ctrl-C stops at once.

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
    add("--preset", choices=NAMES, help="sizes; by default those made for the device. tiny takes seconds")
    chosen = list(DEFAULT_ATTENTIONS)
    add("--attention", choices=ATTENTIONS, nargs="+", default=chosen, help="models to train (default: nsa full window)")
    add("--tokens", type=int, help="training tokens that each model sees")
    add("--context", type=int, help="tokens of one row")
    add("--batch", type=int, help="rows of one step")
    add("--lr", type=float, dest="learning_rate", help="peak learning rate")
    add("--minutes", type=float, help="training stops here, all models at the same step")
    add("--seed", type=int, default=0, help="of weights, batches and sampling (default: 0)")
    add_device(parser)
    add("--compile", action="store_true", default=None, dest="compiled", help="run the models through torch.compile")
    add(
        "--packed", action="store_true", help="text: rows of several excerpts, as documents that do not see one another"
    )
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        dest="captured",
        help="whether to replay CUDA graphs of training steps (default: the preset's)",
    )
    add(
        "--sample",
        type=int,
        dest="continuation",
        help="tokens that each model writes at the end (default: the preset's)",
    )
    add("--pairs", type=int, help="mqar: pairs of a row (default: the preset's, or a sixteenth of the context)")
    add("--source", type=Path, help="text: folder of *.py files to learn from instead of the standard library")
    add("--installed", action="store_true", help="text: learn from the installed packages too")
    add("--out", type=Path, help="folder to write to (default: runs/TASK-PRESET-seedN)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in that folder, if there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, compare, write, print.

    Raises:
        ValueError: the options do not fit one another or the data.
    """
    device = own_device(device_of(options))
    preset = options.preset or preset_for(device)
    folder = options.out or Path("runs") / f"{options.task}{'-packed' * options.packed}-{preset}-seed{options.seed}"
    settings = fitted(settings_of(options, preset_of(options.task, preset)), device, options.captured)
    task = task_of(options, settings, device)
    with joined(device) as ranks:
        result = Comparison(task, settings, options.attention, device, folder, ranks).run(options.resume)
    if ranks.first:
        print(report(result))
        print(f"\nResults and pictures: {folder}/")


def preset_of(task: str, name: str) -> Settings:
    """The settings of that name.

    Raises:
        ValueError: the task has no such preset.
    """
    presets = SYNTHETIC.get(task, PRESETS)
    if name not in presets:
        raise ValueError(f"--preset must be one of {', '.join(presets)} for --task {task}, got {name}")
    return presets[name]


def fitted(settings: Settings, device: torch.device, captured: bool | None) -> Settings:
    """The settings without CUDA graphs, which a preset may ask for, where there can be none.

    Raises:
        ValueError: ``--capture`` asks for them there.
    """
    if device.type == "cuda" and not dist.is_torchelastic_launched():
        return settings
    if captured:
        raise ValueError(f"--capture needs CUDA and a single process, got {device}; leave it out")
    return replace(settings, captured=False)


def task_of(options: argparse.Namespace, settings: Settings, device: torch.device) -> Task:
    """The task of that name, its training rows on ``device``.

    Raises:
        ValueError: an option that another task takes.
    """
    owners = {"packed": "text", "source": "text", "installed": "text", "pairs": "mqar"}
    for name, owner in owners.items():
        if getattr(options, name) not in (None, False) and options.task != owner:
            raise ValueError(f"--{name} is an option of --task {owner}, got --task {options.task}; leave it out")
    drawn: dict[str, Any] = {"seed": settings.seed, "device": device, "curriculum": settings.step_sizes}
    match options.task:
        case "mqar":
            return MQARTask(settings.context // 16 if settings.pairs is None else settings.pairs, **drawn)
        case "copy":
            return CopyTask(**drawn)
        case "passkey":
            return PasskeyTask(**drawn)
        case _:
            sources = [options.source or standard_library(), *[installed_packages()] * options.installed]
            rows = PackedTextTask if options.packed else TextTask
            return rows(read_corpus(*sources), settings.seed, device)


def settings_of(options: argparse.Namespace, preset: Settings) -> Settings:
    """The preset with the options that were given in place of its own values."""
    given = {name: value for name, value in vars(options).items() if name in OVERRIDES and value is not None}
    return replace(preset, **given)
