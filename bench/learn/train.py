"""Train several twins in step: each batch goes to every twin before the next is drawn, so a stop is fair to all."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bench.interrupt import Interrupt
from bench.learn.model import Transformer
from bench.learn.parallel import ALONE, Ranks
from bench.learn.settings import Settings, twin_shape
from bench.learn.task import IGNORED, Batch, Task


@dataclass
class Progress:
    """What one twin has been through. Bits are per labelled token; `position_bits` is by position in the context."""

    tokens: int = 0
    seconds: float = 0.0
    train_bits: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    position_bits: list[float | None] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """The latest validation bits per token."""
        return self.validation[-1][1] if self.validation else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Training speed, validation not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0


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
        ranks.shard(self.model)
        self.network: Callable[..., Tensor] = torch.compile(self.model) if settings.compiled else self.model
        self.optimizer = _optimizer(self.model, settings)
        self.progress = Progress()

    def learn(self, batch: Batch, rate: float) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The ranks' gradients are averaged, so that each rank's part of the sum counts as often as there are ranks.
        share = self.ranks.share(batch)
        loss = self._bits(self._logits(share), share).sum() * self.ranks.count / _asked(batch).sum().to(self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.train_bits.append(self.ranks.total(loss.detach()).item() / self.ranks.count)
        self.progress.tokens += batch.inputs.numel()
        self.progress.seconds += time.perf_counter() - started

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> None:
        """Add a validation point, and keep the loss by position."""
        bits, right = torch.zeros(2, self.settings.context, dtype=torch.float64)
        asked = torch.zeros(self.settings.context, dtype=torch.int64)
        for batch in batches:
            share = self.ranks.share(batch)
            logits = self._logits(share)
            correct = logits.argmax(-1) == share.labels.to(self.device)
            found = torch.stack([self._bits(logits, share).double(), correct.double()])
            total = self.ranks.total(found.sum(dim=1)).cpu()
            bits, right, asked = bits + total[0], right + total[1], asked + _asked(batch).sum(dim=0)
        tokens, labels = self.progress.tokens, asked.sum()
        self.progress.validation.append((tokens, (bits.sum() / labels).item()))
        self.progress.accuracy.append((tokens, (right.sum() / labels).item()))
        pairs = zip(bits.tolist(), asked.tolist(), strict=True)
        self.progress.position_bits = [total / count if count else None for total, count in pairs]

    def autocast(self) -> torch.autocast:
        """The precision in which this twin trains."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _logits(self, batch: Batch) -> Float[Tensor, "b t vocabulary"]:
        with self.autocast():
            documents = None if batch.documents is None else batch.documents.to(self.device)
            return self.network(batch.inputs.to(self.device), documents=documents)

    def _bits(self, logits: Float[Tensor, "b t vocabulary"], batch: Batch) -> Float[Tensor, "b t"]:
        """Bits of each label, 0 where none is asked."""
        labels = batch.labels.to(self.device)
        nats = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return nats / math.log(2)


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
    with tqdm(
        total=settings.steps * row, initial=start * row, unit="tok", unit_scale=True, disable=not ranks.first
    ) as bar:
        for step in range(start, settings.steps):
            for status, reached in (
                ("interrupted", interrupt.requested),
                ("out of time", time.monotonic() > deadline),
            ):
                if ranks.any(reached, twins[0].device):
                    save(step)
                    return status
            if step % interval == 0:
                if step > start:
                    save(step)
                evaluate(twins, task, settings, settings.validation_rows // 4)
                bar.set_postfix({twin.attention: f"{twin.progress.bits:.3f}" for twin in twins})
                after_evaluation()
            batch = task.training(step, settings.batch, settings.context)
            for twin in twins:
                twin.learn(batch, settings.rate(step))
            bar.update(batch.inputs.numel())
    return "finished"


def evaluate(twins: Sequence[Twin], task: Task, settings: Settings, rows: int) -> None:
    """Give every twin a validation point over the same `rows` rows (at least one)."""
    for twin in twins:
        twin.evaluate(task.validation(max(1, rows), settings.batch, settings.context))


def _asked(batch: Batch) -> Bool[Tensor, "b t"]:
    return batch.labels != IGNORED


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
