"""One run: every attention in the same model, a row each, written as soon as it is there."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import cross_entropy

from bench.interrupt import Interrupt, time_limit
from bench.learn.model import Transformer, count_parameters
from bench.learn.task import Batch
from bench.learn.text import TextTask, read_corpus, standard_library
from bench.model.cases import ENGINES, Case
from bench.model.profile import profiled
from bench.record import environment, write_json
from bench.speed.measure import GIB, time_call

Row = dict[str, Any]
BATCHES = 8
"""Different batches of a run, taken in turn."""


@dataclass
class Run:
    """What is measured, where, and the rows so far.

    Args:
        case: the model and its lengths.
        engines: names of ``ENGINES``.
        device: where to train.
        path: the JSON file, written after each row.
        compiled: for each row of an engine whether the model's blocks go through torch.compile.
        budget: milliseconds of timed steps for each row.
        row_seconds: how long a row may take, compilation included; None for as long as it takes.
        seed: of weights and batches.
        say: where progress goes.
    """

    case: Case
    engines: Sequence[str]
    device: torch.device
    path: Path
    compiled: Sequence[bool] = (True,)
    budget: float = 3000.0
    row_seconds: float | None = None
    seed: int = 0
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)

    def run(self, interrupt: Interrupt) -> dict[str, Any]:
        """Measure until done or interrupted; what the JSON file holds."""
        task = TextTask(read_corpus(standard_library()), self.seed)
        for tokens in self.case.tokens:
            batches = [task.training(step, self.case.batch, tokens) for step in range(BATCHES)]
            for compiled, engine in itertools.product(self.compiled, self.engines):
                if not interrupt.requested:
                    self._attempt(engine, compiled, tokens, batches)
        return self._save("stopped" if interrupt.requested else "finished")

    def _attempt(self, engine: str, compiled: bool, tokens: int, batches: Sequence[Batch]) -> None:
        """A failure is a row that says so; the others are still measured.

        Without the cache of traced graphs, which does not ask which of SDPA's kernels are allowed.
        """
        row = {"case": self.case.name, "engine": engine, "compiled": compiled, "tokens": tokens}
        row |= {"batch": self.case.batch}
        try:
            with time_limit(self.row_seconds), _only(engine), functorch_config.patch(enable_autograd_cache=False):
                row |= self._measure(engine, compiled, batches)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # those of compilers among them
            row["missing"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self.rows.append(row)
        self._save("running")
        self.say(line(row))
        torch.compiler.reset()  # or the next model's blocks would be compared with this one's
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, engine: str, compiled: bool, batches: Sequence[Batch]) -> Row:
        torch.manual_seed(self.seed)
        model = Transformer(self.case.shape, ENGINES[engine].attention).to(self.device)
        if compiled:
            for block in model.blocks:  # each by itself, so that all share one compilation
                block.compile(fullgraph=True, dynamic=False)
        step = Step(model, self.device, batches)
        first = step().item()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = time_call(step, self.device, self.budget)
        rows_of_batch = batches[0].inputs.numel()
        row: Row = {"parameters": count_parameters(model), "step_ms": times.median}
        row |= {"step_range_ms": [times.low, times.high], "tokens_per_second": 1e3 * rows_of_batch / times.median}
        row |= {"steps": step.count, "bits_first": first, "bits_last": step().item()}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            row |= self._profile(step)
        return row

    def _profile(self, step: Step) -> Row:
        found = profiled(step)
        return {"attention_share": found.attention_share, "kinds_ms": found.kinds, "kernels_ms": found.kernels}

    def _save(self, status: str) -> dict[str, Any]:
        content = environment(self.device) | {
            "status": status,
            "dtype": "bfloat16" if self.device.type == "cuda" else "float32",
            "rows": self.rows,
        }
        write_json(self.path, content)
        return content


class Step:
    """One training step of a model at each call: forward, backward, AdamW; under bfloat16 autocast on CUDA."""

    def __init__(self, model: Transformer, device: torch.device, batches: Sequence[Batch]):
        self.model, self.device, self.count = model, device, 0
        self.batches: Iterator[Batch] = itertools.cycle(
            [Batch(batch.inputs.to(device), batch.labels.to(device)) for batch in batches]
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self) -> Tensor:
        """Nats a byte before the step."""
        batch = next(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch.inputs)
        loss = cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return loss.detach()


def _only(engine: str) -> AbstractContextManager[None]:
    backend = ENGINES[engine].backend
    return nullcontext() if backend is None else sdpa_kernel(backend)


def line(row: Row) -> str:
    """One row, short."""
    head = f"{row['case']:<6} {row['engine']:<14} {'compiled' if row['compiled'] else 'eager':<9} {row['tokens']:>6} "
    if "missing" in row:
        return head + row["missing"]
    share = f", attention {row['attention_share']:.0%}" if "attention_share" in row else ""
    return f"{head}{row['step_ms']:.1f} ms a step, {row['tokens_per_second']:,.0f} tokens/s{share}"
