"""`python -m bench speed`: its options, and what they measure."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from bench.interrupt import catching_interrupt
from bench.options import add_device, device_of
from bench.speed import cases, engines
from bench.speed.pictures import draw
from bench.speed.report import report
from bench.speed.run import Run, shortened
from flexnsa.engines import COMPILATIONS

DESCRIPTION = """\
Time NSA against dense attention, and against others' NSA where installed: forward and backward, whole and stage by
stage, over lengths, on random inputs and on inputs that drift along the sequence.

Writes one JSON file, a row for each case, engine and length, as soon as it is measured, and pictures beside it. An
engine that cannot run, or not in time, is a row that says why. Ctrl-C stops after the row being measured and keeps what
is done. Times are medians with the middle 60% of the runs; memory is beyond the inputs: what is held between forward
and backward, and the peak of both."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `speed`."""
    parser = commands.add_parser(
        "speed",
        help="time NSA against dense attention, whole and stage by stage",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--case", choices=cases.CASES, nargs="+", help="shapes and inputs (default: those made for the device)")
    add("--engine", choices=engines.ENGINES, nargs="+", help="what to compare (default: what suits the device)")
    add("--tokens", type=int, nargs="+", help="lengths in place of the cases' own")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--forward-only", action="store_true", help="leave the gradients out")
    add("--no-breakdown", action="store_true", help="leave the stages out")
    add("--milliseconds", type=float, default=200.0, help="runs for each number take about this long (default: 200)")
    add("--row-seconds", type=float, help="give a row up after this long, compilation included (default: never)")
    add("--minutes", type=float, help="begin no row after this long (default: until all are done)")
    add("--seed", type=int, default=0, help="of the inputs (default: 0)")
    add_device(parser)
    add("--out", type=Path, help="the JSON file (default: runs/speed-DEVICE.json)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, write, print.

    Raises:
        ValueError: a length or a time below 1.
    """
    if options.tokens and min(options.tokens) < 1:
        raise ValueError(f"--tokens: expected lengths of 1 or more, got {min(options.tokens)}")
    for name in ("milliseconds", "row_seconds", "minutes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive time, got {value}")
    device = device_of(options)
    measured = measurement(options, device)
    # Each backward is timed many times, so its buffers must outlive the first; and each length is compiled anew.
    many = dynamo_config.patch(recompile_limit=COMPILATIONS)
    with catching_interrupt() as interrupt, functorch_config.patch(donated_buffer=False), many:
        result = measured.run(interrupt)
    draw(measured.path.with_suffix(""), result)
    print(report(result))
    print(f"\nRows: {measured.path}, pictures beside it")


def measurement(options: argparse.Namespace, device: torch.device) -> Run:
    """The run that the options describe."""
    on_cuda = device.type == "cuda"
    dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    names = options.case or (cases.ON_CUDA if on_cuda else cases.ON_CPU)
    chosen = (*options.engine, engines.STAGES) if options.engine else engines.ON_CUDA if on_cuda else engines.ON_CPU
    return Run(
        cases=[shortened(cases.CASES[name], options.tokens) for name in names],
        engines=[name for name in chosen if name != engines.STAGES or not options.no_breakdown],
        device=device,
        dtype=getattr(torch, dtype),
        path=options.out or Path("runs") / f"speed-{device.type}.json",
        budget=options.milliseconds,
        backward=not options.forward_only,
        everywhere=options.engine is not None,
        row_seconds=options.row_seconds,
        seconds=None if options.minutes is None else 60 * options.minutes,
        seed=options.seed,
    )
