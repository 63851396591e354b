"""One comparison from start to end: train the twins, validate, sample, draw, and write `result.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bench.learn import pictures
from bench.learn.generate import generate
from bench.learn.interrupt import catching_interrupt
from bench.learn.look import gate_means, look_into, telling_query
from bench.learn.model import count_parameters
from bench.learn.settings import Settings
from bench.learn.task import Task
from bench.learn.train import Twin, evaluate, train
from bench.record import environment, write_json


class Comparison:
    """The twins of one run and everything that is written about them to a folder."""

    def __init__(self, task: Task, settings: Settings, attentions: Sequence[str], device: torch.device, folder: Path):
        self.task = task
        self.settings = settings
        self.folder = folder
        self.device = device
        self.twins = [Twin(name, settings, task.vocabulary, device) for name in attentions]
        self.status = "running"
        self.continuations: dict[str, str] = {}
        self.gates: list[tuple[int, Tensor]] = []

    def run(self) -> dict[str, object]:
        """Train until the budget ends or Ctrl-C, then validate in full and write everything.

        Returns:
            What `result.json` holds.
        """
        with catching_interrupt() as interrupt:
            self.status = train(self.twins, self.task, self.settings, interrupt, self.note)
        evaluate(self.twins, self.task, self.settings, self.settings.validation_rows)
        self.note()
        prompt = self.task.prompt(self.settings.context)
        self.draw(prompt)
        self.continuations = {twin.attention: self._continuation(twin, prompt) for twin in self.twins}
        return self.save()

    def note(self) -> None:
        """After each validation: NSA's gates at this point, and the result so far, in case the run is killed."""
        prompt = self.task.prompt(self.settings.context).to(self.device)
        for twin in self._nsa():
            with twin.autocast():
                self.gates.append((twin.progress.tokens, gate_means(twin.model, prompt)))
        self.save()

    def draw(self, prompt: Tensor) -> None:
        """Write the pictures; those of NSA's inside only if it takes part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures.draw_losses(self.folder / "loss.png", {twin.attention: twin.progress for twin in self.twins})
        for twin in self._nsa():
            with twin.autocast():
                look = look_into(twin.model, prompt.to(self.device))
            text = pictures.printable(prompt[0].tolist())
            pictures.draw_selection(self.folder / "selection.png", look)
            pictures.draw_query(self.folder / "attention.png", look, telling_query(look), text)
            tokens, means = zip(*self.gates, strict=True)
            pictures.draw_gates(self.folder / "gates.png", tokens, means)

    def save(self) -> dict[str, object]:
        """Write `result.json`."""
        result = {
            "task": self.task.name,
            "status": self.status,
            **environment(self.device),
            "seed": self.settings.seed,
            "config": asdict(self.settings),
            "data": self.task.describe(),
            "rows": [self._row(twin) for twin in self.twins],
        }
        write_json(self.folder / "result.json", result)
        return result

    def _row(self, twin: Twin) -> dict[str, object]:
        return {
            "attention": twin.attention,
            "parameters": count_parameters(twin.model),
            "hidden": twin.shape.hidden,
            "bits_per_token": twin.progress.bits,
            "tokens_per_second": round(twin.progress.tokens_per_second, 1),
            **asdict(twin.progress),
            "gates": [(tokens, mean.tolist()) for tokens, mean in self.gates] if twin.attention == "nsa" else None,
            "continuation": self.continuations.get(twin.attention),
        }

    def _continuation(self, twin: Twin, prompt: Tensor) -> str:
        settings = self.settings
        with twin.autocast():
            row = prompt.to(self.device)
            drawn = generate(twin.model, row, settings.continuation, settings.context, settings.seed)
        return self.task.decode(drawn)

    def _nsa(self) -> list[Twin]:
        return [twin for twin in self.twins if twin.attention == "nsa"]
