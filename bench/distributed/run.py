"""Measure the ways one after the other, all ranks together, and keep a row of each."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.distributed.ways import WAYS
from bench.parallel import Ranks
from bench.record import environment, write_json
from bench.speed.measure import GIB, spread
from flexnsa import NativeSparseAttention, NSAConfig
from flexnsa.engines import Impl

Row = dict[str, Any]
WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """One layer and the length to run it at.

    Args:
        dim: width of the layer's input.
        heads: query heads hq.
        kv_heads: KV heads hk.
        head_dim: key and value dim.
        tokens: length of the sequence.
        config: NSA's geometry.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    config: NSAConfig = field(default_factory=NSAConfig)

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"{self.heads}q-{self.kv_heads}kv-{self.head_dim}"


@dataclass
class Run:
    """The ways to measure one shape, and the rows so far; every rank holds the same.

    Args:
        shape: the layer.
        ways: names in ``WAYS``, ``one`` first where speed-ups are wanted.
        ranks: the processes.
        device: of this process.
        dtype: of parameters and inputs.
        path: the JSON file, written by the first rank.
        impl: the engine.
        compiled: run the layer through torch.compile.
        runs: timed runs of each number.
    """

    shape: Shape
    ways: Sequence[str]
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    path: Path
    impl: Impl = "auto"
    compiled: bool = False
    runs: int = 5
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    alone: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Measure every way; what the JSON file holds."""
        for way in self.ways:
            self._add(self._measure(way))
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._save()

    def _measure(self, way: str) -> Row:
        torch.manual_seed(0)
        shape, mesh = self.shape, self.ranks.mesh
        assert mesh is not None
        x, grad = (torch.randn(1, shape.tokens, shape.dim, device=self.device, dtype=self.dtype) for _ in range(2))
        layer = self._layer()
        part = WAYS[way](layer, mesh)
        x, grad = part(x).requires_grad_(), part(grad)
        call: Callable[[Tensor], Tensor] = torch.compile(layer) if self.compiled else layer

        def step() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            call(x).backward(grad)

        row: Row = {"case": shape.name, "engine": "flexnsa", "impl": self.impl, "compiled": self.compiled}
        row |= {"way": way, "gpus": 1 if way == "one" else self.ranks.count, "tokens": shape.tokens, "dim": shape.dim}
        row |= self._times("forward", lambda: call(x)) | self._times("forward_backward", step)
        row["peak_gib"] = self._peak(step)
        step()
        layer.zero_grad(set_to_none=True)
        assert x.grad is not None
        with torch.no_grad():
            found = {"difference": call(x), "gradient_difference": x.grad}
        return row | self._compared(way, found, part) | self._speed_up(row)

    def _layer(self) -> NativeSparseAttention:
        shape = self.shape
        layer = NativeSparseAttention(
            dim=shape.dim,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            config=shape.config,
            rope_theta=1e6,
            impl=self.impl,
        )
        return layer.to(self.device, self.dtype)

    def _times(self, name: str, call: Callable[[], object]) -> Row:
        """Milliseconds of the slowest rank in each run; as many runs on every rank, since they wait for one another."""
        for _ in range(WARM_UP):
            call()
        times = torch.tensor(self._clock(call), device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        found = spread(times.tolist())
        return {f"{name}_ms": found.median, f"{name}_range_ms": [found.low, found.high]}

    def _clock(self, call: Callable[[], object]) -> list[float]:
        dist.barrier()
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(self.runs):
                call()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.runs + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def _peak(self, step: Callable[[], object]) -> list[float] | None:
        """GiB on each rank at the peak of forward and backward, beyond parameters and input."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.tensor([(torch.cuda.max_memory_allocated() - before) / GIB], device=self.device)
        every = [torch.empty_like(peak) for _ in range(self.ranks.count)]
        dist.all_gather(every, peak)
        return [x.item() for x in every]

    def _compared(self, way: str, found: dict[str, Tensor], part: Callable[[Tensor], Tensor]) -> Row:
        """Norms of the differences from one GPU's tensors, relative to those tensors' norms."""
        if way == "one":
            self.alone = found
        return {name: self._relative(found[name], part(whole)) for name, whole in self.alone.items()}

    def _relative(self, found: Tensor, expected: Tensor) -> float:
        found, expected = found.float(), expected.float()
        norms = torch.stack([(found - expected).square().sum(), expected.square().sum()])
        difference, size = self.ranks.total(norms).tolist()
        return float((difference / size) ** 0.5)

    def _speed_up(self, row: Row) -> Row:
        one = next((other for other in self.rows if other["way"] == "one"), None)
        if one is None:
            return {}
        return {f"speed_up_{name}": one[f"{name}_ms"] / row[f"{name}_ms"] for name in ("forward", "forward_backward")}

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._save()
        if self.ranks.first:
            peak = "" if row["peak_gib"] is None else " ".join(f"{x:.1f}" for x in row["peak_gib"]) + " GiB"
            self.say(
                f"{row['way']:<20} {row['tokens']:>7} forward {row['forward_ms']:9.1f} ms, and backward "
                f"{row['forward_backward_ms']:9.1f} ms, {row.get('speed_up_forward_backward', 1):.2f} x, {peak}"
            )

    def _save(self) -> dict[str, Any]:
        content = environment(self.device) | {
            "gpus": self.ranks.count,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows": self.rows,
        }
        if self.ranks.first:
            write_json(self.path, content)
        return content
