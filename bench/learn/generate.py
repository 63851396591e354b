"""Continue a prompt token by token, from a cache where the attention has one."""

import time
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bench.learn.model import Transformer


class Continuation(NamedTuple):
    """What a model wrote, and how fast.

    Attributes:
        tokens: the tokens after the prompt.
        seconds: wall-clock time for all of them, the prompt included.
        cached: whether a cache served the model.
    """

    tokens: list[int]
    seconds: float
    cached: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens written in a second."""
        return len(self.tokens) / self.seconds


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Int64[Tensor, "1 t"],
    tokens: int,
    context: int,
    seed: int,
    *,
    temperature: float = 0.8,
    top_p: float = 1.0,
    cached: bool = True,
) -> Continuation:
    """Draw tokens one after the other.

    The model sees at most `context` tokens: whenever there are more, it forgets the oldest half, so that a cache is
    filled anew only every `context / 2` tokens. With a cache and without it sees the same.

    Args:
        model: in float32 the cached and the uncached continuation are the same, token for token.
        prompt: what to continue.
        tokens: how many to draw.
        context: how many the model sees at most.
        seed: of the draws.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability.
        cached: use a cache, if the model's attention has one.

    Raises:
        ValueError: `temperature` or `top_p` is out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    generator, row, seen = torch.Generator().manual_seed(seed), prompt, -1
    caches = model.new_caches(len(prompt), context) if cached else None
    started = time.perf_counter()
    for _ in range(tokens):
        begin = first_seen(row.shape[1], context)
        if caches is None:
            logits = model(row[:, begin:])
        elif begin == seen:
            logits = model(row[:, -1:], caches)
        else:
            for cache in caches:
                cache.reset()
            logits = model(row[:, begin:], caches)
        seen = begin
        drawn = draw(logits[0, -1].float().cpu(), temperature, top_p, generator)
        row = torch.cat([row, drawn[None].to(row.device)], dim=1)
    return Continuation(row[0, prompt.shape[1] :].tolist(), time.perf_counter() - started, caches is not None)


def first_seen(length: int, context: int) -> int:
    """The oldest of `length` tokens that the model sees.

    >>> [first_seen(length, 8) for length in (7, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    half = max(1, context // 2)
    return -(-max(0, length - context) // half) * half


def draw(
    logits: Float[Tensor, "vocabulary"], temperature: float, top_p: float, generator: torch.Generator
) -> Int64[Tensor, "1"]:
    """One token by its logits."""
    if temperature == 0:
        return logits.argmax(keepdim=True)
    chances, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # A token stays if those before it have less than top_p: the first one always does.
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0)
    return order[torch.multinomial(chances, 1, generator=generator)]
