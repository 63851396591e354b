"""`torchrun --nproc-per-node 2 -m bench distributed`: its options, and what they measure."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from bench.distributed.run import Run, Shape
from bench.distributed.ways import WAYS
from bench.options import add_device, device_of
from bench.parallel import joined, own_device
from flexnsa.engines import ENGINES

DESCRIPTION = """\
Time one NSA layer on one GPU and spread over all of them: along the sequence (context), by KV group (tensor). Start it
with torchrun, one process a GPU:

    torchrun --nproc-per-node 2 -m bench distributed --tokens 131072

Writes one JSON file with a row for each way: medians of the slowest rank, the speed-up over one GPU, the peak memory of
each GPU beyond parameters and input, and how far output and input gradient are from one GPU's. Parameter gradients are
summed over ranks in context-fsdp alone."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `distributed`."""
    parser = commands.add_parser(
        "distributed",
        help="time a layer over several GPUs against one; start it with torchrun",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--way", choices=WAYS, nargs="+", default=list(WAYS), help="how to spread it (default: all)")
    add("--tokens", type=int, default=131072, help="length of the sequence (default: 131072)")
    add("--dim", type=int, default=4096, help="width of the layer's input (default: 4096)")
    add("--heads", type=int, default=64, help="query heads (default: 64)")
    add("--kv-heads", type=int, default=4, help="KV heads (default: 4)")
    add("--head-dim", type=int, default=128, help="key and value dim (default: 128)")
    add("--impl", choices=("auto", *ENGINES), default="auto", help="engine (default: auto)")
    add("--compile", action="store_true", dest="compiled", help="run the layer through torch.compile")
    add("--runs", type=int, default=5, help="timed runs of each number (default: 5)")
    add_device(parser)
    add("--out", type=Path, help="the JSON file (default: runs/distributed-DEVICE.json)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, write, print.

    Raises:
        ValueError: not started by torchrun, or no run to time.
    """
    if not dist.is_torchelastic_launched():
        raise ValueError("distributed: expected one process a GPU; start it with torchrun --nproc-per-node 2 -m bench")
    if options.runs < 1:
        raise ValueError(f"--runs: expected 1 or more, got {options.runs}")
    device = own_device(device_of(options))
    with joined(device) as ranks:
        measured = Run(
            shape=Shape(options.dim, options.heads, options.kv_heads, options.head_dim, options.tokens),
            ways=options.way,
            ranks=ranks,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            path=options.out or Path("runs") / f"distributed-{device.type}.json",
            impl=options.impl,
            compiled=options.compiled,
            runs=options.runs,
        )
        measured.run()
        if ranks.first:
            print(f"\nRows: {measured.path}")
