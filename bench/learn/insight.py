"""What an NSA twin does inside while it learns: gates, freely chosen blocks, answers in sight, gradients."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from bench.learn.look import attention_layers, gate_means
from bench.learn.task import IGNORED, Batch
from bench.learn.train import Twin
from flexnsa import NSAConfig

PARTS = {
    "compressed": ("k_proj.compressed.", "v_proj.compressed.", "compressor."),
    "selected": ("k_proj.selected.", "v_proj.selected."),
    "window": ("k_proj.window.", "v_proj.window."),
    "shared": ("k_proj.shared.", "v_proj.shared."),
    "query": ("q_proj.",),
    "gate": ("attention.gate.",),
    "output": ("o_proj.",),
}
"""Parameters of an attention layer by what they serve."""


class Candidates(NamedTuple):
    """The blocks that a query may choose freely, ``own`` being its own block.

    Attributes:
        first: the first of them.
        end: one past the last of them.
    """

    first: int
    end: Int64[Tensor, "*shape"]

    @property
    def number(self) -> Int64[Tensor, "*shape"]:
        """How many there are."""
        return (self.end - self.first).clamp(min=0)


def candidates(config: NSAConfig, own: Int64[Tensor, "*shape"]) -> Candidates:
    """All blocks up to the query's own but the forced ones."""
    return Candidates(config.num_initial, own + 1 - config.num_local)


def observe(twin: Twin, batch: Batch) -> dict[str, Any]:
    """What the twin does with a batch, as JSON; nothing of the twin changes.

    Gates are means over tokens, ``[layers][heads][branches]``. Of the freely chosen blocks there is, for each layer,
    their share of all chosen blocks and, beside what a choice at random has, the share at each of ``distances``, which
    are counted in blocks and reach up to the next one.
    Gradients are norms for each layer and part; not known where parameters are sharded. Hits are the shares, for each
    layer, of the answers that lie in a block which some KV head selected for the question.
    """
    batch = batch.to(twin.device)
    with torch.no_grad(), twin.autocast():
        found = {"tokens": twin.progress.tokens, "gates": gate_means(twin.model, batch.inputs).tolist()}
        chosen = _selections(twin, batch)
    config = twin.shape.attention.nsa
    found |= {"free": _free(config, chosen)}
    if batch.sources is not None:
        found |= {"hits": [_hits(config, layer, batch) for layer in chosen]}
    if twin.ranks.mesh is None:
        found |= {"gradients": _gradients(twin, batch)}
    return found


def random_hits(config: NSAConfig, batch: Batch) -> float | None:
    """Share of the answers in a block that a selector sees which fills its free slots at random; None if unknown.

    Forced blocks count as seen, as they do among the hits of a trained selector.
    """
    if batch.sources is None or batch.places is None:
        return None
    own, told = batch.places // config.select_block, batch.sources // config.select_block
    free = candidates(config, own)
    chance = (_free_slots(config) / free.number.clamp(min=1)).clamp(max=1)
    forced = (told < free.first) | (told >= free.end)
    return float(torch.where(forced, 1.0, chance)[batch.asked != IGNORED].double().mean())


def free_share(config: NSAConfig, told: int) -> float:
    """Tokens that the freely chosen slots cover, as a share of ``told`` tokens."""
    return _free_slots(config) * config.select_block / told


def _selections(twin: Twin, batch: Batch) -> list[Int64[Tensor, "b hk t n"]]:
    """The blocks that each layer chooses, -1 for none."""
    chosen = []
    for layer, x in attention_layers(twin.model, batch.inputs):
        q, kv = layer.project(x)
        selection = layer.attention.attend(q, kv._asdict(), x).selection
        assert selection is not None
        chosen.append(selection.indices.long())
    return chosen


def _free(config: NSAConfig, chosen: list[Int64[Tensor, "b hk t n"]]) -> dict[str, Any]:
    """Where freely chosen blocks lie, by distance in blocks: 1, 2 .. 3, 4 .. 7, ...; and their share of all."""
    tokens = chosen[0].shape[2]
    own = torch.arange(tokens, device=chosen[0].device) // config.select_block
    free = candidates(config, own)
    ranges = max(1, (config.num_blocks(tokens) - 1).bit_length())
    block = torch.arange(config.num_blocks(tokens), device=own.device)
    candidate = (block >= free.first) & (block < free.end[:, None])
    chance = (_free_slots(config) / free.number.clamp(min=1)).clamp(max=1)[:, None].expand_as(candidate)
    shares, layers = [], []
    for indices in chosen:
        freely = (indices >= free.first) & (indices < free.end[:, None])
        shares.append(float(freely.sum() / (indices >= 0).sum()))
        layers.append(_by_distance((own[:, None] - indices)[freely], ranges))
    return {
        "block": config.select_block,
        "shares": shares,
        "distances": [2**i for i in range(ranges)],
        "layers": layers,
        "random": _by_distance((own[:, None] - block)[candidate], ranges, chance[candidate]),
    }


def _free_slots(config: NSAConfig) -> int:
    return config.num_selected - config.num_initial - config.num_local


def _by_distance(distance: Tensor, ranges: int, weight: Tensor | None = None) -> list[float]:
    bins = distance.clamp(min=1).double().log2().floor().long()
    counts = torch.zeros(ranges, dtype=torch.float64, device=distance.device)
    counts.index_add_(0, bins, torch.ones_like(counts[bins]) if weight is None else weight.double())
    return (counts / counts.sum().clamp(min=1e-12)).tolist()


def _hits(config: NSAConfig, indices: Int64[Tensor, "b hk t n"], batch: Batch) -> float:
    assert batch.sources is not None and batch.places is not None
    places = batch.places[:, None, :, None].expand(-1, indices.shape[1], -1, indices.shape[3])
    told = (batch.sources // config.select_block)[:, None, :, None]
    seen: Bool[Tensor, "b n"] = (indices.gather(2, places) == told).any(dim=-1).any(dim=1)
    return float(seen[batch.asked != IGNORED].double().mean())


def _gradients(twin: Twin, batch: Batch) -> list[dict[str, float]]:
    """Norm of the loss's gradient for each layer and part of its attention."""
    names, parameters = zip(*twin.model.named_parameters(), strict=True)
    loss = twin.loss(batch, (batch.asked != IGNORED).sum())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    layers: list[dict[str, float]] = [defaultdict(float) for _ in twin.model.blocks]
    for name, gradient in zip(names, gradients, strict=True):
        where = name.split(".", 3)
        if gradient is None or where[0] != "blocks" or where[2] != "attention":
            continue
        part = next(part for part, begins in PARTS.items() if where[3].startswith(begins))
        layers[int(where[1])][part] += float(gradient.float().square().sum())
    return [{part: square**0.5 for part, square in layer.items()} for layer in layers]
