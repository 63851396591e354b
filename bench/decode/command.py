"""`python -m bench decode`: its options, and the loop over cases and engines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.decode.cases import LARGE, PREFILLS, SMALL, Case, Prefill
from bench.decode.engines import PREFILL, engines_for, make_prefill, make_step
from bench.decode.measure import Stopwatch, Time
from bench.decode.report import Row, line, summary
from bench.options import add_device, device_of
from bench.record import environment, write_json

DESCRIPTION = """\
Time one decoding step of NSA over paged keys and values, and of dense attention on the same shapes: SDPA's kernels and
compiled FlexAttention. Prints bytes of keys and values against what the memory copies, and the ratio to the best dense
step. Then time a prompt through a layer with a cache, in one call and in chunks. Writes decode.json after every row;
Ctrl-C keeps what is done."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `decode`."""
    parser = commands.add_parser(
        "decode", help="time a decoding step over paged keys and values", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add_device(parser)
    add("--tokens", type=int, nargs="+", help="only these lengths")
    add("--engine", nargs="+", help="only these engines")
    add("--out", type=Path, default=Path("runs/decode"), help="folder to write to (default: runs/decode)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    device = device_of(options)
    known = (*engines_for(device), *PREFILL)
    engines = options.engine or known
    if not set(engines) <= set(known):
        raise ValueError(f"--engine must be among {', '.join(known)} on {device.type}, got {' '.join(engines)}")
    cases = [x for x in (LARGE if device.type == "cuda" else SMALL) if not options.tokens or x.tokens in options.tokens]
    prefills = [x for x in (PREFILLS[device.type],) if not options.tokens or x.tokens in options.tokens]
    if not cases and not prefills:
        raise ValueError(f"--tokens names no case, got {options.tokens}")
    rows: list[Row] = []
    try:
        measure([*cases, *prefills], engines, device, rows, options.out / "decode.json")
    except KeyboardInterrupt:
        print("stopped; what is done is written")
    print(summary(rows))


def measure(
    cases: Sequence[Case | Prefill], engines: Sequence[str], device: torch.device, rows: list[Row], path: Path
) -> None:
    """Add a row for each case and engine, and write all after each."""
    stopwatch, where = Stopwatch(device), environment(device)
    for case in cases:
        for engine in engines:
            row = _measured(case, engine, device, stopwatch)
            if row is None:
                continue
            rows.append(row)
            print(line(rows[-1]), flush=True)
            write_json(path, {**where, "rows": rows})


def _measured(case: Case | Prefill, engine: str, device: torch.device, stopwatch: Stopwatch) -> Row | None:
    """A row, or None where the engine is of the other kind of case."""
    if isinstance(case, Prefill):
        return _prefill(case, engine, device, stopwatch) if engine in PREFILL else None
    return None if engine in PREFILL else _row(case, engine, device, stopwatch)


def _prefill(case: Prefill, cut: str, device: torch.device, stopwatch: Stopwatch) -> Row:
    row: Row = {
        "case": "prefill", "engine": cut, "tokens": case.tokens, "batch": 1, "chunk": case.chunk, "dim": case.dim,
        "shape": f"{case.heads}q-{case.kv_heads}kv-{case.head_dim}",
    }  # fmt: skip
    return row | _microseconds(stopwatch.wall(make_prefill(cut, case, device)))


def _row(case: Case, engine: str, device: torch.device, stopwatch: Stopwatch) -> Row:
    row: Row = {
        "case": case.name, "engine": engine, "tokens": case.tokens, "batch": case.batch,
        "shape": f"{case.heads}q-{case.kv_heads}kv-{case.dim}",
        "bytes": case.sparse_bytes if engine == "nsa" else case.dense_bytes,
    }  # fmt: skip
    try:
        time = stopwatch.time(make_step(engine, case, device))
    except (RuntimeError, NotImplementedError) as error:
        return row | {"note": f"missing: {str(error).splitlines()[0]}"}
    return row | _microseconds(time)


def _microseconds(time: Time) -> Row:
    return {"us": round(time.median, 2), "us_least": round(time.least, 2), "us_most": round(time.most, 2)}
