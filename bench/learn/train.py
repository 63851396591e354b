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

from bench.learn.interrupt import Interrupt
from bench.learn.model import Transformer
from bench.learn.settings import Settings, twin_shape
from bench.learn.task import IGNORED, Batch, Task


@dataclass
class Progress:
    """What one twin has been through. Bits are per labelled token; `position_bits` is by position in the context."""

    tokens: int = 0
    seconds: float = 0.0
    train_bits: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    position_bits: list[float] = field(default_factory=list)

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

    def __init__(self, attention: str, settings: Settings, vocabulary: int, device: torch.device):
        self.attention = attention
        self.shape = twin_shape(settings, attention, vocabulary)
        self.settings = settings
        self.device = device
        torch.manual_seed(settings.seed)
        self.model = Transformer(self.shape, attention).to(device)
        self.network: Callable[[Tensor], Tensor] = torch.compile(self.model) if settings.compiled else self.model
        self.optimizer = _optimizer(self.model, settings)
        self.progress = Progress()

    def learn(self, batch: Batch, rate: float) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._bits(batch).sum() / _asked(batch).sum().to(self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.train_bits.append(loss.item())
        self.progress.tokens += batch.inputs.numel()
        self.progress.seconds += time.perf_counter() - started

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> None:
        """Add a validation point, and keep the loss by position."""
        bits = torch.zeros(self.settings.context, dtype=torch.float64)
        asked = torch.zeros(self.settings.context, dtype=torch.int64)
        for batch in batches:
            bits += self._bits(batch).double().sum(dim=0).cpu()
            asked += _asked(batch).sum(dim=0)
        self.progress.validation.append((self.progress.tokens, (bits.sum() / asked.sum()).item()))
        self.progress.position_bits = (bits / asked).tolist()

    def autocast(self) -> torch.autocast:
        """The precision in which this twin trains."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _bits(self, batch: Batch) -> Float[Tensor, "b t"]:
        """Bits of each label, 0 where none is asked."""
        with self.autocast():
            logits = self.network(batch.inputs.to(self.device))
        labels = batch.labels.to(self.device)
        nats = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return nats / math.log(2)


def train(
    twins: Sequence[Twin],
    task: Task,
    settings: Settings,
    interrupt: Interrupt,
    after_evaluation: Callable[[], None],
) -> str:
    """Train all twins over the same batches in the same order.

    Returns:
        Why it ended: `"finished"`, `"interrupted"` or `"out of time"`.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    interval = max(1, settings.steps // (settings.evaluations + 1))
    with tqdm(total=settings.steps * settings.batch * settings.context, unit="tok", unit_scale=True) as bar:
        for step in range(settings.steps):
            if interrupt.requested:
                return "interrupted"
            if time.monotonic() > deadline:
                return "out of time"
            if step % interval == 0:
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
