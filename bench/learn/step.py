"""One optimizer step: forward, backward, clipped update; run kernel by kernel, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench.learn.task import Batch

WARM_UPS = 3
"""Steps of each shape of batch that run kernel by kernel before one is captured."""


class Stepped(NamedTuple):
    """What a step found, still on its way from the device.

    Attributes:
        loss: the batch's loss before the step.
        norm: norm of the whole gradient before it was clipped.
    """

    loss: Tensor
    norm: Tensor


class _Replay(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Batch, Tensor]
    stepped: Stepped


class Step:
    """Steps of one model.

    Args:
        model: what learns; its gradients are clipped to norm 1.
        optimizer: how, with ``capturable`` set where steps are captured.
        loss: of a batch, and how many labels the sum is divided by.
        captured: whether to replay CUDA graphs, one for each shape of batch. A replay runs the kernels of the first
            steps with the same arguments but for what batch and learning rate hold.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Batch, Tensor], Tensor],
        captured: bool,
    ):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        device = next(model.parameters()).device
        self.rate = torch.zeros((), device=device) if captured else None
        self.stream = torch.cuda.Stream(device) if captured else None
        self.seen: dict[tuple[torch.Size | None, ...], int] = {}
        self.replays: dict[tuple[torch.Size | None, ...], _Replay] = {}

    def __call__(self, batch: Batch, labels: Tensor, rate: float) -> Stepped:
        """Learn from a batch at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate.fill_(rate)
        if self.stream is None:
            return self._run(batch, labels)
        shape = tuple(None if x is None else x.shape for x in batch)
        self.seen[shape] = self.seen.get(shape, 0) + 1
        if self.seen[shape] <= WARM_UPS:
            return self._beside(self.stream, batch, labels)
        if shape not in self.replays:
            self.replays[shape] = self._capture(batch, labels)
        return self._replay(self.replays[shape], batch, labels)

    def _run(self, batch: Batch, labels: Tensor) -> Stepped:
        loss = self.loss(batch, labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Stepped(loss.detach(), norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _beside(self, stream: torch.cuda.Stream, batch: Batch, labels: Tensor) -> Stepped:
        """A step on the stream on which the backward's bookkeeping is to live, so that a graph can hold it."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            stepped = self._run(batch, labels)
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return stepped

    def _capture(self, batch: Batch, labels: Tensor) -> _Replay:
        inputs = batch.map(torch.clone), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            stepped = self._run(*inputs)
        return _Replay(graph, inputs, stepped)

    @staticmethod
    def _replay(replay: _Replay, batch: Batch, labels: Tensor) -> Stepped:
        for old, new in zip((*replay.inputs[0], replay.inputs[1]), (*batch, labels), strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        replay.graph.replay()
        return Stepped(*(x.clone() for x in replay.stepped))
