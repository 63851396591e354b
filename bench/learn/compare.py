"""One comparison from start to end: train the twins, validate, sample, draw, and write `result.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bench.interrupt import catching_interrupt
from bench.learn import pictures
from bench.learn.checkpoint import Checkpoints
from bench.learn.generate import Continuation, generate
from bench.learn.grid import ask_everywhere
from bench.learn.insight import observe, random_hits
from bench.learn.look import look_into, telling_query
from bench.learn.model import count_parameters
from bench.learn.passkey import PasskeyTask
from bench.learn.settings import Settings
from bench.learn.task import Task
from bench.learn.train import Twin, evaluate, train
from bench.parallel import ALONE, Ranks
from bench.record import environment, write_json
from flexnsa import NativeSparseAttention

DRAWN = 2048
"""Tokens of which attention is drawn at most: each weight is a number."""


class Comparison:
    """The twins of one run and everything that is written about them to a folder.

    With several ranks each of them runs this, and the first one writes.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        attentions: Sequence[str],
        device: torch.device,
        folder: Path,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.task = task
        self.settings = settings
        self.folder = folder
        self.device = device
        ranks.agree(self._facts() | {"attentions": list(attentions)})
        self.twins = [Twin(name, settings, task.vocabulary, device, ranks) for name in attentions]
        self.checkpoints = Checkpoints(folder / "checkpoint", ranks)
        self.status = "running"
        self.continuations: dict[str, Continuation] = {}
        self.grids: dict[str, list[dict[str, object]]] = {}

    def run(self, resume: bool = False) -> dict[str, object]:
        """Train until the budget ends or Ctrl-C, then validate in full and write everything.

        Args:
            resume: go on from the folder's newest checkpoint, if there is one.

        Returns:
            What `result.json` holds.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        start = self._start(resume)
        with catching_interrupt() as interrupt:
            status = train(self.twins, self.task, self.settings, interrupt, self.note, start, self._checkpoint)
        evaluate(self.twins, self.task, self.settings, self.settings.validation_rows)
        self.note()
        prompt = self.task.prompt(self.settings.context)
        if isinstance(self.task, PasskeyTask) and self.settings.grid:
            self.grids = {twin.attention: ask_everywhere(twin, self.task, self.settings.grid) for twin in self.twins}
        self.status = status
        self.save()
        self.draw(prompt[:, :DRAWN])
        if self.settings.continuation:
            self.continuations = {twin.attention: self._continuation(twin, prompt) for twin in self.twins}
        if self.status == "finished":
            self.checkpoints.remove()
        return self.save()

    def _start(self, resume: bool) -> int:
        """The step to begin with: 0, or that of the newest checkpoint."""
        newest = self.checkpoints.newest()
        if newest is None or not resume:
            self.checkpoints.remove()
            return 0
        step, notes = self.checkpoints.load(newest, self.twins)
        facts: dict[str, object] = json.loads(json.dumps(self._facts()))
        written = {name: value for name, value in notes["facts"].items() if facts[name] != value}
        if written:
            given = {name: facts[name] for name in written}
            raise ValueError(
                f"the checkpoint in {newest} was written with {written}, got {given}; resume with the options of that "
                f"run, or leave out --resume"
            )
        return step

    def _checkpoint(self, step: int) -> None:
        self.checkpoints.save(step, self.twins, {"facts": self._facts()})

    def _facts(self) -> dict[str, object]:
        """What makes two runs the same: the data, and all settings but time and how kernels are launched."""
        facts = asdict(self.settings) | {"task": self.task.name, "data": self.task.describe()}
        return {name: value for name, value in facts.items() if name not in ("minutes", "captured")}

    def note(self) -> None:
        """After each validation: NSA's gates at this point, and the result so far, in case the run is killed."""
        rows = self.settings.batch  # as many as in training, for which everything is compiled already
        batch = next(iter(self.task.validation(rows, rows, self.settings.context)))
        for twin in self.twins:
            if any(isinstance(module, NativeSparseAttention) for module in twin.model.modules()):
                twin.progress.insights.append(observe(twin, batch))
        self.save()

    def draw(self, prompt: Tensor) -> None:
        """Write the pictures; those of NSA's inside only if it takes part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.first:
            progress = {twin.attention: twin.progress for twin in self.twins}
            pictures.draw_losses(self.folder / "loss.png", progress, f"bits per {self.task.unit}")
        for twin in self._nsa():
            with twin.autocast():
                look = look_into(twin.model, prompt.to(self.device))
            if not self.ranks.first:
                continue
            text = self.task.characters(prompt[0].tolist())
            pictures.draw_selection(self.folder / "selection.png", look)
            if text is not None:
                pictures.draw_query(self.folder / "attention.png", look, telling_query(look), text)
            pictures.draw_gates(self.folder / "gates.png", twin.progress.insights)
            pictures.draw_insights(self.folder / "insights.png", twin.progress.insights)
        if self.grids and self.ranks.first:
            pictures.draw_grids(self.folder / "grid.png", self.grids)

    def save(self) -> dict[str, object]:
        """Write `result.json`."""
        result = {
            "task": self.task.name,
            "unit": self.task.unit,
            "status": self.status,
            **environment(self.device),
            "processes": self.ranks.count,
            "seed": self.settings.seed,
            "config": asdict(self.settings),
            "data": self.task.describe(),
            "random_hits": self.random_hits,
            "rows": [self._row(twin) for twin in self.twins],
        }
        if self.ranks.first:
            write_json(self.folder / "result.json", result)
        return result

    @cached_property
    def random_hits(self) -> float | None:
        """Answers in sight of a selector that chooses at random, if the task says where answers are."""
        rows = self.settings.validation_rows
        batch = next(iter(self.task.validation(rows, rows, self.settings.context)))
        return random_hits(self.settings.attention.nsa, batch)

    def _row(self, twin: Twin) -> dict[str, object]:
        written = self.continuations.get(twin.attention)
        return {
            "attention": twin.attention,
            "parameters": count_parameters(twin.model),
            "hidden": twin.shape.hidden,
            "bits_per_token": twin.progress.bits,
            "tokens_per_second": round(twin.progress.tokens_per_second, 1),
            **asdict(twin.progress),
            "grid": self.grids.get(twin.attention),
            "continuation": None if written is None else self.task.decode(written.tokens),
            "written_per_second": None if written is None else round(written.tokens_per_second, 1),
            "cached": None if written is None else written.cached,
        }

    def _continuation(self, twin: Twin, prompt: Tensor) -> Continuation:
        settings = self.settings
        with twin.autocast():
            row = prompt.to(self.device)
            return generate(twin.model, row, settings.continuation, settings.context, settings.seed)

    def _nsa(self) -> list[Twin]:
        return [twin for twin in self.twins if twin.attention == "nsa"]
