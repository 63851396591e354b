"""One run: every case by every engine at every length, a row each, written as soon as it is there."""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.interrupt import Interrupt, time_limit
from bench.record import environment, write_json
from bench.speed.cases import Case
from bench.speed.cost import flops
from bench.speed.engines import ENGINES, GRAPHED, LONGEST, STAGES, Call, MissingError
from bench.speed.inputs import Tensors, shared_blocks, tensors
from bench.speed.measure import matrix_product_tflops, memory_beyond, time_call
from bench.speed.stages import select, stages

Row = dict[str, Any]
Measure = Callable[[Row], list[Row]]
VERY_LONG = 131072
"""Tokens beyond which rows come last: they take most memory, and compile anew where 32-bit indices do not suffice."""


@dataclass
class Run:
    """What is measured, where, and the rows so far.

    Args:
        cases: shapes and lengths.
        engines: names of ``ENGINES``, and ``STAGES``, in the order in which they run.
        device: where to measure.
        dtype: of all tensors.
        path: the JSON file, written after each row.
        budget: milliseconds of runs for each number.
        backward: whether gradients are measured too.
        everywhere: whether slow engines run beyond the lengths of ``LONGEST``.
        row_seconds: how long a row may take, compilation included; None for as long as it takes.
        seconds: when the last row may begin, from the start; None for no limit.
        seed: of the inputs.
        say: where progress goes.
    """

    cases: Sequence[Case]
    engines: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    path: Path
    budget: float = 200.0
    backward: bool = True
    everywhere: bool = False
    row_seconds: float | None = None
    seconds: float | None = None
    seed: int = 0
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    ceiling: float = 0.0
    shared: dict[tuple[str, int], float] = field(default_factory=dict)

    def run(self, interrupt: Interrupt) -> dict[str, Any]:
        """Measure until done or interrupted, an engine after the other; what the JSON file holds."""
        torch.manual_seed(self.seed)
        started = time.monotonic()
        self.ceiling = matrix_product_tflops(self.device, self.dtype)
        for row, measure in self._plan():
            if interrupt.requested:
                break
            if self.seconds is not None and time.monotonic() - started > self.seconds:
                self._add(row | {"missing": "its turn did not come in the time given"})
            else:
                self._attempt(row, measure)
        return self.save("stopped" if interrupt.requested else "finished")

    def _plan(self) -> list[tuple[Row, Measure]]:
        plan = [step for engine in self.engines for case in self.cases for step in self._sweep(case, engine)]
        return sorted(plan, key=lambda step: step[0]["tokens"] > VERY_LONG)

    def save(self, status: str) -> dict[str, Any]:
        """Write the rows so far."""
        content = environment(self.device) | {
            "status": status,
            "dtype": str(self.dtype).removeprefix("torch."),
            "ceiling_tflops": float(f"{self.ceiling:.3g}"),
            "rows": self.rows,
        }
        write_json(self.path, content)
        return content

    def _sweep(self, case: Case, engine: str) -> Iterator[tuple[Row, Measure]]:
        """One engine over the lengths of a case."""
        if engine == STAGES:
            for tokens in case.tokens:
                yield self._row(case, engine, tokens), functools.partial(self._stages, case)
            return
        try:
            call = ENGINES[engine](case, self.device)
        except MissingError as why:
            self._add(self._row(case, engine, case.tokens[0]) | {"missing": str(why)})
            return
        for tokens in case.tokens:
            row = self._row(case, engine, tokens)
            if tokens > LONGEST.get(engine, tokens) and not self.everywhere:
                self._add(row | {"missing": f"slow: beyond {LONGEST[engine]} tokens only where asked for by name"})
            else:
                yield row, functools.partial(self._whole, case, call)

    def _row(self, case: Case, engine: str, tokens: int) -> Row:
        return {"case": case.name, "engine": engine, "stage": "whole", "tokens": tokens, "inputs": case.inputs}

    def _attempt(self, row: Row, measure: Measure) -> None:
        """A failure is a row that says so; the others are still measured."""
        try:
            with time_limit(self.row_seconds):
                rows = measure(row)
            for found in rows:
                self._add(found)
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
            TypeError,
            AssertionError,
        ) as error:  # those of compilers among them
            self._add(row | {"missing": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.save("running")
        numbers = {k: f"{row[k]:.3f}" for k in ("forward_ms", "backward_ms", "peak_gib") if row.get(k) is not None}
        told = row.get("missing") or ", ".join(f"{k} {v}" for k, v in numbers.items())
        self.say(f"{row['case']:<24} {row['engine']:<16} {row['stage']:<12} {row['tokens']:>7} {told}")

    def _whole(self, case: Case, call: Call, row: Row) -> list[Row]:
        x, gated = tensors(case, row["tokens"], self.device, self.dtype, self.seed), "nsa" in row["engine"]
        graphed = row["engine"] in GRAPHED
        if graphed:
            row = row | self._graphed_times(call, x)
        else:
            row = row | self._times(lambda: call(x), x.leaves if gated else x.leaves[:3], x.grad)
        if gated:
            row["shared_blocks"] = self._shared(case, x)
        if self.backward and not graphed:
            memory = memory_beyond(lambda: call(x), lambda out: self._gradients(out, x), self.device)
            row |= {"held_gib": memory and memory.held, "peak_gib": memory and memory.peak}
        return [row | self._rates(case, "whole" if gated else "dense", row)]

    def _stages(self, case: Case, row: Row) -> list[Row]:
        x, found = tensors(case, row["tokens"], self.device, self.dtype, self.seed), []
        for name, call, leaves in stages(case, x):
            part = row | {"engine": "flexnsa-eager", "stage": name} | self._times(call, leaves, None)
            found.append(part | self._rates(case, name, part))
        return found

    def _times(self, call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor | None) -> Row:
        forward = time_call(call, self.device, self.budget)
        row: Row = {"forward_ms": forward.median, "forward_range_ms": [forward.low, forward.high]}
        if self.backward and leaves:
            out = call()
            grad = torch.randn_like(out) if grad is None else grad
            backward = time_call(
                lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), self.device, self.budget
            )
            row |= {"backward_ms": backward.median, "backward_range_ms": [backward.low, backward.high]}
        return row

    def _graphed_times(self, call: Call, x: Tensors) -> Row:
        """A replayed backward cannot be run twice: forward alone, and with it, of which the difference is taken."""
        for leaf in x.leaves:
            torch._dynamo.mark_static_address(leaf)  # as what a model computes is: not copied before each replay

        def step(backward: bool) -> object:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.set_grad_enabled(backward):
                out = call(x)
            return self._gradients(out, x) if backward else out

        forward = time_call(lambda: step(False), self.device, self.budget)
        row: Row = {"forward_ms": forward.median, "forward_range_ms": [forward.low, forward.high]}
        if self.backward:
            both = time_call(lambda: step(True), self.device, self.budget)
            row |= {"backward_ms": both.median - forward.median, "both_range_ms": [both.low, both.high]}
        return row

    def _shared(self, case: Case, x: Tensors) -> float:
        place = case.name, x.q.shape[2]
        if place not in self.shared:
            self.shared[place] = shared_blocks(select(case, x))
        return self.shared[place]

    def _gradients(self, out: Tensor, x: Tensors) -> Sequence[Tensor]:
        found = torch.autograd.grad(out, x.leaves, x.grad, allow_unused=True)
        return [grad for grad in found if grad is not None]

    def _rates(self, case: Case, stage: str, row: Row) -> Row:
        """TFLOP/s of the FLOPs that the mathematics needs, and their share of a matrix product's."""
        rates: Row = {}
        for direction in ("forward", "backward"):
            work = flops(case, stage, row["tokens"], backward=direction == "backward")
            if work and row.get(f"{direction}_ms"):
                rate = work / row[f"{direction}_ms"] / 1e9
                rates |= {f"{direction}_tflops": rate, f"{direction}_share_of_ceiling": rate / self.ceiling}
        return rates


def shortened(case: Case, tokens: Sequence[int] | None) -> Case:
    """The case at other lengths."""
    return case if tokens is None else replace(case, tokens=tuple(tokens))
