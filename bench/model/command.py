"""`python -m bench model`: its options, and what they measure."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch._dynamo import config as dynamo_config

from bench.interrupt import catching_interrupt
from bench.model.cases import CASES, ENGINES, ENGINES_ON_CPU, ENGINES_ON_CUDA, ON_CPU, ON_CUDA
from bench.model.report import table
from bench.model.run import Run
from bench.options import add_device, device_of
from flexnsa.engines import COMPILATIONS

DESCRIPTION = """\
Time a training step of a byte-level transformer with NSA and with full attention, everything else the same: on the
standard library's own source, AdamW, bfloat16 autocast on CUDA. On CUDA a profile says what share of the step
attention's kernels have.

  nsa            NSA, keys and values of each branch projected and compressed by an MLP as in the paper
  nsa-mean-pool  the same, compressed by their mean
  cudnn, fa2     full attention by that kernel of SDPA
  sdpa           full attention by the kernel that PyTorch takes by itself

Writes one JSON file, a row for each attention and length, as soon as it is measured; what cannot run is a row that
says why. Ctrl-C stops after the row being measured and keeps what is done."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `model`."""
    parser = commands.add_parser(
        "model",
        help="time training steps of a whole model with NSA and with full attention",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--case", choices=CASES, help="sizes of the model (default: those made for the device)")
    add("--attention", choices=ENGINES, nargs="+", dest="engine", help="what to compare (default: nsa cudnn fa2)")
    add("--tokens", type=int, nargs="+", help="lengths of a row in place of the case's own")
    add("--batch", type=int, help="rows of a step (default: the case's own)")
    add("--layers", type=int, help="blocks in place of the case's own")
    add("--compile", choices=("yes", "no", "both"), help="blocks through torch.compile (default: yes on CUDA alone)")
    add("--milliseconds", type=float, default=3000.0, help="timed steps of a row take about this long (default: 3000)")
    add("--row-seconds", type=float, help="give a row up after this long, compilation included (default: never)")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add_device(parser)
    add("--out", type=Path, help="the JSON file (default: runs/model-DEVICE.json)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, write, print.

    Raises:
        ValueError: a length, a count or a time below 1.
    """
    for name in ("tokens", "batch", "layers", "milliseconds", "row_seconds"):
        given = getattr(options, name)
        least = min(given) if isinstance(given, list) else given
        if least is not None and least <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, got {least}")
    measured = measurement(options)
    with catching_interrupt() as interrupt, dynamo_config.patch(recompile_limit=COMPILATIONS):
        result = measured.run(interrupt)
    print(f"{result['status']} on {result['device']}, torch {result['torch']}\n\n{table(result['rows'])}")
    print(f"\nRows: {measured.path}")


def measurement(options: argparse.Namespace) -> Run:
    """The run that the options describe."""
    device = device_of(options)
    on_cuda = device.type == "cuda"
    case = CASES[options.case or (ON_CUDA if on_cuda else ON_CPU)]
    shape = replace(case.shape, layers=options.layers or case.shape.layers)
    case = replace(case, shape=shape, tokens=tuple(options.tokens or case.tokens), batch=options.batch or case.batch)
    compiled = {"yes": (True,), "no": (False,), "both": (True, False)}
    return Run(
        case=case,
        engines=options.engine or (ENGINES_ON_CUDA if on_cuda else ENGINES_ON_CPU),
        device=device,
        path=options.out or Path("runs") / f"model-{device.type}.json",
        compiled=compiled[options.compile or ("yes" if on_cuda else "no")],
        budget=options.milliseconds,
        row_seconds=options.row_seconds,
        seed=options.seed,
    )
