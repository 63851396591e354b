"""`python -m bench learn-orders`: does a compiled model train as the eager one does, up to the order of its sums?

The same model is trained eagerly in float32 on the same batches, their rows in other orders, which changes nothing but
the order in which gradients are summed; and compiled. How far the eager runs come apart is what the compiled one may.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.learn.attention import ATTENTIONS
from bench.learn.presets import PRESETS, preset_for
from bench.learn.settings import Settings
from bench.learn.task import Task
from bench.learn.text import TextTask, read_corpus, standard_library
from bench.learn.train import Twin
from bench.options import add_device, device_of
from bench.record import environment, write_json

ORDERS = 3
"""Eager runs: the batches as they are, and their rows in other orders."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `learn-orders`."""
    parser = commands.add_parser(
        "learn-orders",
        help="compare the first losses of a compiled model with those of eager ones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes; by default those made for the device")
    add("--attention", choices=ATTENTIONS, default="nsa", help="model to train (default: nsa)")
    add("--steps", type=int, default=50, help="losses to compare (default: 50)")
    add("--context", type=int, help="tokens of one row")
    add("--batch", type=int, help="rows of one step, 2 at least")
    add("--source", type=Path, help="folder of *.py files to learn from instead of the standard library")
    add("--out", type=Path, default=Path("runs/learn-orders"), help="folder to write to (default: runs/learn-orders)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, compare, write and print.

    Raises:
        ValueError: a batch of one row has one order only.
    """
    device = device_of(options)
    settings = PRESETS[options.preset or preset_for(device)]
    given = {name: getattr(options, name) for name in ("context", "batch") if getattr(options, name) is not None}
    settings = replace(settings, **given, bfloat16=False, captured=False)
    if settings.batch < 2:
        raise ValueError(f"--batch: expected 2 rows or more, which have another order, got {settings.batch}")
    task = TextTask(read_corpus(options.source or standard_library()), settings.seed, device)
    curves = losses_by_order(task, settings, options.attention, device, options.steps)
    facts = {"attention": options.attention, "config": asdict(settings), "data": task.describe(), "losses": curves}
    result = {"task": "orders", "status": "finished", **environment(device), **facts, **verdict(curves)}
    write_json(options.out / "result.json", result)
    print(
        f"{options.steps} losses: eager orders differ by up to {result['spread']:.2e} bits, compiled by up to "
        f"{result['deviation']:.2e} from the nearest of them: {'within' if result['within'] else 'NOT within'}"
    )


def losses_by_order(
    task: Task, settings: Settings, attention: str, device: torch.device, steps: int
) -> dict[str, list[float]]:
    """The first losses, in bits, of eager runs and of the compiled one."""
    curves = {
        f"eager, order {order}": losses(task, replace(settings, compiled=False), attention, device, steps, order)
        for order in range(ORDERS)
    }
    return curves | {"compiled": losses(task, replace(settings, compiled=True), attention, device, steps)}


def losses(
    task: Task, settings: Settings, attention: str, device: torch.device, steps: int, order: int = 0
) -> list[float]:
    """The first losses with each batch's rows in some order, 0 being the task's own."""
    twin = Twin(attention, settings, task.vocabulary, device)
    rows = torch.arange(settings.batch)
    if order:
        rows = torch.randperm(settings.batch, generator=torch.Generator().manual_seed(order))
    for step in range(steps):
        batch = task.training(step, settings.batch, settings.context)
        twin.learn(batch.map(lambda x: x[rows.to(x.device)]), settings.rate(step))
    twin.settle()
    return twin.progress.train_bits


def verdict(curves: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """How far apart the eager runs come, how far the compiled one is from the nearest, and whether that is less."""
    eager = torch.tensor([curve for name, curve in curves.items() if name != "compiled"], dtype=torch.float64)
    compiled = torch.tensor(curves["compiled"], dtype=torch.float64)
    spread = (eager.amax(0) - eager.amin(0)).max().item()
    deviation = (eager - compiled).abs().amin(0).max().item()
    return {"spread": spread, "deviation": deviation, "within": deviation <= spread}
