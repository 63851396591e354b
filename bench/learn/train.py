"""Train several twins in step: each batch goes to every twin before the next is drawn, so a stop is fair to all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bench.interrupt import Interrupt
from bench.learn.gates import RowsWithoutSelected
from bench.learn.model import Transformer
from bench.learn.progress import Clock, Progress
from bench.learn.settings import Settings, twin_shape
from bench.learn.step import Step, Stepped
from bench.learn.task import IGNORED, Batch, Task
from bench.parallel import ALONE, Ranks

SETTLED = 50
"""Steps after which the host waits for the device, so that it does not run ahead of a deadline by more."""


class Twin:
    """One model of the comparison with its optimizer and its history."""

    def __init__(self, attention: str, settings: Settings, vocabulary: int, device: torch.device, ranks: Ranks = ALONE):
        self.attention = attention
        self.ranks = ranks
        self.shape = twin_shape(settings, attention, vocabulary)
        self.settings = settings
        self.device = device
        torch.manual_seed(settings.seed)
        self.model = Transformer(self.shape, attention).to(device)
        ranks.shard(*self.model.blocks, self.model)
        self.gates = [module for module in self.model.modules() if isinstance(module, RowsWithoutSelected)]
        self.network: Callable[..., Tensor] = self.model
        if settings.compiled:  # block by block: one compilation serves them all
            self.network = partial(self.model, blocks=[torch.compile(block) for block in self.model.blocks])
        self.optimizer = _optimizer(self.model, settings)
        self.step = Step(self.model, self.optimizer, self.loss, settings.captured)
        self.pending: list[tuple[Stepped, Clock]] = []
        self.progress = Progress()

    def learn(self, batch: Batch, rate: float) -> None:
        """One optimizer step. What it found is known after ``settle``, on a CPU at once."""
        clock = Clock(self.device)
        batch = batch.to(self.device)
        for gate in self.gates:
            gate.share.fill_(self.settings.unselected(self.progress.tokens))
        stepped = self.step(batch.share(self.ranks), (batch.asked != IGNORED).sum(), rate)
        clock.stop()
        self.pending.append((stepped, clock))
        self.progress.tokens += batch.inputs.numel()
        if self.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Wait for the steps so far, and note what they found."""
        for (loss, norm), clock in self.pending:
            self.progress.train_bits.append(self.ranks.total(loss).item() / self.ranks.count)
            self.progress.norms.append(norm.item())
            self.progress.seconds += clock.seconds()
        self.pending.clear()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> None:
        """Add a validation point, and keep the loss by position."""
        self.settle()
        context = self.settings.context
        found = torch.zeros(3, context, dtype=torch.float64, device=self.device)
        for batch in batches:
            share = batch.share(self.ranks).to(self.device)
            logits, labels = self.logits(share), share.asked
            places = torch.arange(context, device=self.device) if share.places is None else share.places
            values = [self._bits(logits, labels), logits.argmax(-1) == labels, labels != IGNORED]
            for row, value in zip(found, values, strict=True):
                row.index_add_(0, places.expand_as(labels).flatten(), value.double().flatten())
        bits, right, asked = self.ranks.total(found).cpu()
        tokens = self.progress.tokens
        self.progress.validation.append((tokens, (bits.sum() / asked.sum()).item()))
        self.progress.accuracy.append((tokens, (right.sum() / asked.sum()).item()))
        pairs = zip(bits.tolist(), asked.tolist(), strict=True)
        self.progress.position_bits = [total / count if count else None for total, count in pairs]

    def autocast(self) -> torch.autocast:
        """The precision in which this twin trains."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def logits(self, batch: Batch) -> Float[Tensor, "b n vocabulary"]:
        """What the model expects at the places of a batch on its device."""
        given = {"documents": batch.documents, "places": batch.places}
        with self.autocast():
            return self.network(batch.inputs, **{name: value for name, value in given.items() if value is not None})

    def loss(self, batch: Batch, labels: Tensor) -> Float[Tensor, ""]:
        """Bits per label, where all ranks together have ``labels`` of them.

        The ranks' gradients are averaged, so that each rank's part of the sum counts as often as there are ranks.
        """
        with self._dropping():
            return self._bits(self.logits(batch), batch.asked).sum() * self.ranks.count / labels

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Some rows do without the selected branch, if the settings say so."""
        for gate in self.gates:
            gate.dropping = True
        try:
            yield
        finally:
            for gate in self.gates:
                gate.dropping = False

    @staticmethod
    def _bits(logits: Float[Tensor, "b n vocabulary"], labels: Int64[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Bits of each label, 0 where none is asked."""
        nats = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return nats.view_as(labels) / math.log(2)


def train(
    twins: Sequence[Twin],
    task: Task,
    settings: Settings,
    interrupt: Interrupt,
    after_evaluation: Callable[[], None],
    start: int = 0,
    save: Callable[[int], None] = lambda step: None,
) -> str:
    """Train all twins over the same batches in the same order, from step ``start`` on.

    ``save(step)`` is called where the training may go on later: before every validation but the first, and where it
    ends too early.

    Returns:
        Why it ended: `"finished"`, `"interrupted"` or `"out of time"`.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    interval = max(1, settings.steps // (settings.evaluations + 1))
    ranks, row = twins[0].ranks, settings.batch * settings.context

    def keep(step: int) -> None:
        for twin in twins:
            twin.settle()  # what is still on its way would be missing from what is kept
        save(step)

    with tqdm(
        total=settings.steps * row, initial=start * row, unit="tok", unit_scale=True, disable=not ranks.first
    ) as bar:
        for step in range(start, settings.steps):
            for status, reached in (
                ("interrupted", interrupt.requested),
                ("out of time", time.monotonic() > deadline),
            ):
                if ranks.any(reached, twins[0].device):
                    keep(step)
                    return status
            if step % interval == 0:
                if step > start:
                    keep(step)
                evaluate(twins, task, settings, settings.validation_rows // 4)
                bar.set_postfix({twin.attention: f"{twin.progress.bits:.3f}" for twin in twins})
                after_evaluation()
            batch = task.training(step, settings.batch, settings.context)
            for twin in twins:
                twin.learn(batch, settings.rate(step))
            bar.update(batch.inputs.numel())
            if step % SETTLED == 0:
                for twin in twins:
                    twin.settle()
    for twin in twins:
        twin.settle()
    return "finished"


def evaluate(twins: Sequence[Twin], task: Task, settings: Settings, rows: int) -> None:
    """Give every twin a validation point over the same `rows` rows (at least one)."""
    for twin in twins:
        twin.evaluate(task.validation(max(1, rows), settings.batch, settings.context))


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    rate: float | Tensor = settings.learning_rate
    if settings.captured:
        rate = torch.tensor(rate, device=matrices[0].device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=settings.captured)
