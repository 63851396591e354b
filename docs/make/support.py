"""What works where: every feature tried on every engine of a device, against the dense engine in float64.

Recorded on each device by hand, the CPU one under Triton's interpreter, and read by the build:

    TRITON_INTERPRET=1 python docs/make/support.py > docs/make/support-cpu.json
    python docs/make/support.py > docs/make/support-h200.json

A number of seconds may follow, after which it gives up. It exits with 1 where an engine gives a wrong result, fails, or
was not reached in time, and names it on stderr.
"""

import copy
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from flexnsa import (
    BranchKV,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    PagedKV,
    Pages,
    Selection,
    compressed_attention,
    documents_from_lengths,
    engines,
    explain,
    native_sparse_attention,
    paged_append,
    paged_step,
    select_blocks,
)
from flexnsa.compression import compress
from flexnsa.engines import AUTO, ENGINES, Impl
from flexnsa_masks import causal, or_masks, prefix

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=10)
SECONDS = 75 if DEVICE == "cuda" else 3600
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Problem(NamedTuple):
    """One call: sizes, geometry, and how it is made."""

    tokens: int = 40
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    config: NSAConfig = SIZES
    first: int = 0
    lengths: tuple[int, ...] | None = None
    gradients: bool = False
    compiled: bool = False
    prefix: int = 0
    served: Callable[["Problem", Impl], tuple[Tensor, Tensor]] | None = None


def cached(problem: Problem, impl: Impl) -> tuple[Tensor, Tensor]:
    """A prompt, a chunk and single tokens through the layer's cache; the same tokens in one call."""
    layer, exact, x = _layers(problem, impl)
    cache = layer.new_cache(batch=1, max_tokens=problem.tokens)
    with torch.inference_mode():
        parts = [layer(part, cache=cache) for part in x.split([problem.tokens - 11, 8, 1, 1, 1], dim=1)]
    return torch.cat(parts, dim=1), exact(x.double())


def exported(problem: Problem, impl: Impl) -> tuple[Tensor, Tensor]:
    """The layer through torch.export."""
    layer, exact, x = _layers(problem, impl)
    with patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False):  # Its eager code has no graph.
        graph = torch.export.export(layer, (x,)).module()
    return graph(x), exact(x.double())


def paged(problem: Problem, impl: Impl) -> tuple[Tensor, Tensor]:
    """Every token into shuffled pages of 16, and a step for the last query; the same query over the whole sequence."""
    torch.manual_seed(0)
    (hq, hk), (d, dv), count = problem.heads, problem.dims, -(-problem.tokens // 16)
    whole = {"device": DEVICE, "dtype": problem.dtype}
    k, v = (torch.randn(1, hk, problem.tokens, size, **whole) for size in (d, dv))
    q, gates = torch.randn(1, hq, 1, d, **whole), torch.rand(1, hq, 1, 3, **whole)
    table = torch.randperm(count, device=DEVICE).int()[None]
    pages = PagedKV(*(Pages(*(torch.empty(count, hk, 16, size, **whole) for size in (d, dv)), table) for _ in range(3)))
    lengths = torch.tensor([problem.tokens], dtype=torch.int32, device=DEVICE)
    recent = tuple(torch.zeros(1, hk, problem.config.compress_block, size, **whole) for size in (d, dv))
    kv, pool = BranchKV.shared(k, v), MeanPool(problem.config)
    paged_append(kv, pages, lengths, problem.config, compressor=pool, recent=recent, impl=impl)
    found = paged_step(q, gates, pages, lengths, problem.config, impl=impl).out
    q, k, v, gates = (x.double() for x in (q, k, v, gates))
    last = lengths.long() - 1
    return found, native_sparse_attention(q, BranchKV.shared(k, v), gates, problem.config, pool, positions=last)


def _layers(problem: Problem, impl: Impl) -> tuple[NativeSparseAttention, NativeSparseAttention, Tensor]:
    """A layer for inference on an engine, the same on the reference in float64, and an input."""
    torch.manual_seed(0)
    (hq, hk), (d, dv), sizes = problem.heads, problem.dims, {"dim": 32, "config": problem.config, "rope_theta": 1e4}
    layer = NativeSparseAttention(**sizes, num_heads=hq, num_kv_heads=hk, head_dim=d, value_dim=dv, impl=impl)
    layer = layer.to(DEVICE, problem.dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    exact.attention.impl = "reference"
    return layer, exact, torch.randn(1, problem.tokens, 32, device=DEVICE, dtype=problem.dtype)


FEATURES: Mapping[str, Problem] = {
    "forward, float32": Problem(),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "float16": Problem(dtype=torch.float16),
    "float64": Problem(dtype=torch.float64),
    "gradients": Problem(gradients=True),
    "one query head a KV head (g = 1)": Problem(heads=(2, 2)),
    "a group of three (g = 3)": Problem(heads=(6, 2)),
    "a group of sixteen (g = 16)": Problem(heads=(16, 1)),
    "key and value dims that differ": Problem(dims=(24, 16)),
    "five selected blocks, of 12 tokens": Problem(
        config=NSAConfig(compress_block=8, compress_stride=4, select_block=12, num_selected=5, window=10)
    ),
    "some of the queries (`positions`)": Problem(first=21),
    "packed documents and padding (`documents`)": Problem(lengths=(21, 1, 15)),
    "a mask in place of causality (`mask_mod`)": Problem(prefix=13),
    "fewer tokens than a compressed one": Problem(tokens=5),
    "`torch.compile(fullgraph=True)`": Problem(compiled=True),
    "decoding with a cache": Problem(served=cached),
    "a paged decoding step": Problem(served=paged),
    "`torch.export`": Problem(served=exported),
}


TRIED = tuple(engine for engine in ENGINES if engine != "flash")
"""The engines of the table of features. FLASH takes few of them, by rules that the page tells."""

UNTRIED = "not tried"


def auto_order() -> str:
    """Which engines `impl="auto"` tries, as a sentence."""
    tried = ", then ".join(f"`{engine}`" for engine in AUTO)
    missing = [f'`impl="{engine}"`' for engine in ENGINES if engine not in AUTO]
    return f"tries {tried}." + (f" {', '.join(missing)} has to be asked for." if missing else "")


def engines_table() -> str:
    """What `impl="auto"` takes, asked of `explain` with tensors that have a device and a dtype and no memory."""
    half, interval = ("cuda", torch.bfloat16, 64), or_masks(causal(), prefix(4))
    cases: Mapping[str, tuple[tuple[str, torch.dtype, int], dict]] = {
        "CPU": (("cpu", torch.float32, 64), {}),
        "CUDA; bfloat16, float16, float32": (half, {}),
        "CUDA, a mask mod of [intervals](masks.md#intervals)": (half, {"mask_mod": interval}),
        "CUDA, another mask mod, or a score mod": (half, {"mods": True}),
        "CUDA, head dim above 256": (("cuda", torch.bfloat16, 320), {}),
        "CUDA, float64": (("cuda", torch.float64, 64), {}),
    }
    rows = ["| inputs | compressed | selection | selected | window |", "|---|---|---|---|---|"]
    with FakeTensorMode(), patch.object(engines, "FLASH_INSTALLED", False):
        for name, ((device, dtype, dim), mods) in cases.items():
            choices = explain(torch.empty(1, 4, 8, dim, device=device, dtype=dtype), **mods)
            rows.append(f"| {name} | " + " | ".join(f"`{choice.engine}`" for choice in choices) + " |")
    return "\n".join(rows)


def support_table() -> str:
    """A table for each device that was recorded."""
    return "\n\n".join(_table(json.loads(path.read_text())) for path in sorted(HERE.glob("support-*.json")))


def record(seconds: float) -> dict[str, object]:
    """Every feature on every engine: "yes", or why not. A process for each feature: none can harm the others."""
    ends = time.monotonic() + seconds
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        cells = dict(zip(FEATURES, processes.map(lambda name: _in_a_process(name, ends), FEATURES), strict=True))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    today = datetime.date.today().isoformat()
    return {"device": device, "torch": torch.__version__, "date": today, "cells": cells}


def _in_a_process(name: str, ends: float) -> dict[str, str]:
    """The outcome for each engine; of a process that broke off, what it had said until then."""
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | os.environ
    command, end = [sys.executable, __file__, name], f"the {name!r} process ended early"
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=max(0, ends - time.monotonic()))
        lines = said.stdout
    except subprocess.TimeoutExpired as late:
        lines, end = late.stdout or b"", "the time was up"
    found = dict(json.loads(line) for line in lines.decode().splitlines() if line.startswith("["))
    return {engine: found.get(engine, f"{UNTRIED}: {end}") for engine in TRIED}


def tell(problem: Problem) -> None:
    """Print a line for each engine as soon as it is tried; the kernels that may break a device's context come last."""
    if DEVICE == "cpu":  # Eager FlexAttention traces itself at every call, only to run the same dense code.
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    for engine in reversed(TRIED):
        try:
            outcome = attempt(problem, engine)
        except Exception as error:
            what = "wrong" if isinstance(error, AssertionError) else f"failed: {type(error).__name__}"
            outcome = f"{what}: {str(error).strip().partition(chr(10))[0]}"
        print(json.dumps([engine, outcome]), flush=True)


def _table(record: dict) -> str:
    reasons: list[str] = []
    rows = [f"| {record['device']} | " + " | ".join(f"`{e}`" for e in TRIED) + " |", "|---|" + ":-:|" * len(TRIED)]
    for feature, cells in record["cells"].items():
        rows.append(f"| {feature} | " + " | ".join(_cell(cells[engine], reasons) for engine in TRIED) + " |")
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join(rows) + f"\n\nTried with torch {record['torch']} on {record['date']}.\n\n{notes}"


def _cell(outcome: str, reasons: list[str]) -> str:
    if outcome == "yes" or outcome.startswith(UNTRIED):
        return outcome.partition(":")[0]
    if outcome not in reasons:
        reasons.append(outcome)
    return f"no ({reasons.index(outcome) + 1})"


def attempt(problem: Problem, impl: Impl) -> str:
    """Say "yes", or why the engine refuses. Raises AssertionError where a result is wrong."""
    try:
        found = _results(problem, impl)
    except NotImplementedError as error:
        what, _, why = str(error).partition("; use impl")[0].partition(": ")
        return why or what
    for name, (value, expected) in found.items():
        scale = expected.abs().max().clamp(min=1)
        error = ((value.double() - expected).abs().max() / scale).item()
        assert error <= TOLERANCE[problem.dtype], f"{impl}, {problem}: {name} differs by {error}"
    return "yes"


def _results(problem: Problem, impl: Impl) -> dict[str, tuple[Tensor, Tensor]]:
    """Output, and gradients where asked for, of an engine and of the reference, given the engine's own selection."""
    if problem.served:
        return {"out": problem.served(problem, impl)}
    leaves, options = _inputs(problem)
    exact = [x.detach().double().requires_grad_(problem.gradients) for x in leaves]
    selection = _selection(problem, impl, leaves, options)
    out, expected = (
        _attend(problem, engine, inputs, options, selection)
        for engine, inputs in ((impl, leaves), ("reference", exact))
    )
    found = {"out": (out, expected)}
    if problem.gradients:
        gradients = (torch.autograd.grad(y.square().sum(), x) for y, x in ((out, leaves), (expected, exact)))
        found |= {f"gradient {i}": pair for i, pair in enumerate(zip(*gradients, strict=True))}
    return found


def _inputs(problem: Problem) -> tuple[list[Tensor], dict]:
    torch.manual_seed(0)
    (hq, hk), (d, dv), queries = problem.heads, problem.dims, problem.tokens - problem.first
    shapes = ((hq, queries, d), (hk, problem.tokens, d), (hk, problem.tokens, dv), (hq, queries, 3))
    leaves = [torch.randn(1, *shape).to(DEVICE, problem.dtype).requires_grad_(problem.gradients) for shape in shapes]
    options: dict = {}
    if problem.first:
        options["positions"] = torch.arange(problem.first, problem.tokens, device=DEVICE)
    if problem.lengths:
        options["documents"] = documents_from_lengths(list(problem.lengths), problem.tokens).to(DEVICE)
    if problem.prefix:
        options["mask_mod"] = or_masks(causal(), prefix(problem.prefix))
    return leaves, options


def _selection(problem: Problem, impl: Impl, leaves: list[Tensor], options: dict) -> Selection:
    q, k, v, _ = (x.detach() for x in leaves)
    k_cmp, v_cmp = compress(MeanPool(problem.config), k, v, problem.config, documents=options.get("documents"))
    lse = compressed_attention(q, k_cmp, v_cmp, problem.config, **options, impl=impl).lse
    return select_blocks(q, k_cmp, lse, problem.config, num_tokens=problem.tokens, **options, impl=impl)


def _attend(problem: Problem, impl: Impl, leaves: list[Tensor], options: dict, selection: Selection) -> Tensor:
    q, k, v, gates = leaves
    attend = native_sparse_attention
    if problem.compiled:
        attend = torch.compile(attend, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    kv, pool = BranchKV.shared(k, v), MeanPool(problem.config)
    return attend(q, kv, gates, problem.config, pool, **options, selection=selection, impl=impl)


def bad(cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is neither "yes" nor refused with a reason."""
    words = ("wrong", "failed", UNTRIED)
    return [
        f"{name}, {impl}: {said}" for name, row in cells.items() for impl, said in row.items() if said.startswith(words)
    ]


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else str(SECONDS)
    if given in FEATURES:
        tell(FEATURES[given])
    else:
        found = record(float(given))
        print(json.dumps(found, indent=1))
        if bad(found["cells"]):
            sys.exit("\n".join(bad(found["cells"])))
