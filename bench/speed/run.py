"""One run: every case by every engine at every length, a row each, written as soon as it is there."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.interrupt import Interrupt
from bench.record import environment, write_json
from bench.speed.cases import Case
from bench.speed.cost import flops
from bench.speed.engines import ENGINES, LONGEST, Call, MissingError
from bench.speed.inputs import Tensors, shared_blocks, tensors
from bench.speed.measure import matrix_product_tflops, peak_beyond, time_call
from bench.speed.stages import stages

Row = dict[str, Any]


@dataclass
class Run:
    """What is measured, where, and the rows so far.

    Args:
        cases: shapes and lengths.
        engines: names of ``ENGINES``.
        device: where to measure.
        dtype: of all tensors.
        path: the JSON file, written after each row.
        budget: milliseconds of runs for each number.
        backward: whether gradients are measured too.
        breakdown: whether the stages are measured one by one.
        everywhere: whether slow engines run beyond the lengths of ``LONGEST``.
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
    breakdown: bool = True
    everywhere: bool = False
    seed: int = 0
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    ceiling: float = 0.0

    def run(self, interrupt: Interrupt) -> dict[str, Any]:
        """Measure until done or interrupted; what the JSON file holds."""
        torch.manual_seed(self.seed)
        self.ceiling = matrix_product_tflops(self.device, self.dtype)
        for case in self.cases:
            for engine in self.engines:
                self._sweep(case, engine, interrupt)
            if self.breakdown:
                self._break_down(case, interrupt)
        return self.save("stopped" if interrupt.requested else "finished")

    def _break_down(self, case: Case, interrupt: Interrupt) -> None:
        for tokens in case.tokens:
            if not interrupt.requested:
                self._attempt(self._row(case, "stages", tokens), lambda row: self._stages(case, row))

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

    def _sweep(self, case: Case, engine: str, interrupt: Interrupt) -> None:
        """One engine over the lengths of a case: one compilation for all of them."""
        try:
            call = ENGINES[engine](case, self.device)
        except MissingError as why:
            self._add(self._row(case, engine, case.tokens[0]) | {"missing": str(why)})
            return
        for tokens in case.tokens:
            if interrupt.requested:
                return
            row = self._row(case, engine, tokens)
            if tokens > LONGEST.get(engine, tokens) and not self.everywhere:
                self._add(row | {"missing": f"slow: beyond {LONGEST[engine]} tokens only where asked for by name"})
            else:
                self._attempt(row, lambda row: self._whole(case, call, row))

    def _row(self, case: Case, engine: str, tokens: int) -> Row:
        return {"case": case.name, "engine": engine, "stage": "whole", "tokens": tokens, "inputs": case.inputs}

    def _attempt(self, row: Row, measure: Callable[[Row], list[Row]]) -> None:
        """A failure is a row that says so; the others are still measured."""
        try:
            for found in measure(row):
                self._add(found)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # those of compilers among them
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
        row = row | self._times(lambda: call(x), x.leaves if gated else x.leaves[:3], x.grad)
        row["peak_gib"] = peak_beyond(lambda: self._step(call, x), self.device)
        return [row | self._rates(case, "whole" if gated else "dense", row)]

    def _stages(self, case: Case, row: Row) -> list[Row]:
        x, found = tensors(case, row["tokens"], self.device, self.dtype, self.seed), []
        for name, call, leaves in stages(case, x):
            part = row | {"engine": "flexnsa-eager", "stage": name} | self._times(call, leaves, None)
            if name == "selection":
                part["shared_blocks"] = shared_blocks(call()[:, :, :4096].to(torch.int32))
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

    def _step(self, call: Call, x: Tensors) -> Sequence[Tensor]:
        out = call(x)
        if not self.backward:
            return [out]
        return [out, *(g for g in torch.autograd.grad(out, x.leaves, x.grad, allow_unused=True) if g is not None)]

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
