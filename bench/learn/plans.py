"""What `python -m bench learn-all` runs: plans by name, each a list of commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """One process of a plan.

    Attributes:
        name: its folder.
        command: what comes after `python -m bench`.
        share: which GPU, counted from 0 and round where there are fewer.
    """

    name: str
    command: tuple[str, ...]
    share: int = 0


SEEDS = (0, 1, 2)
MAIN = ("nsa", "full", "nsa-no-selected", "window")
REST = ("nsa-no-compressed", "nsa-no-window", "nsa-shared-kv", "nsa-mean-pool", "moba")


def _learn(task: str, *options: str, seed: int = 0) -> tuple[str, ...]:
    return ("learn", "--task", task, *options, "--seed", str(seed))


def _mqar(tokens: int, preset: str, share: int) -> list[Entry]:
    """Three seeds of the attentions that the claim is about, one of the others."""
    task = ("mqar", "--preset", preset, "--attention")
    seeds = [Entry(f"mqar-{tokens}-seed{seed}", _learn(*task, *MAIN, seed=seed), share) for seed in SEEDS]
    return [*seeds, Entry(f"mqar-{tokens}-others", _learn(*task, *REST), share)]


def _text(seed: int, share: int) -> Entry:
    options = ("--preset", "cuda", "--installed", "--sample", "0", "--attention", "nsa", "full")
    return Entry(f"text-seed{seed}", _learn("text", *options, seed=seed), share)


CUDA = (
    *_mqar(512, "cuda", share=0),
    *_mqar(2048, "cuda-long", share=1),
    *(_text(seed, share=2) for seed in (0, 1)),
    Entry("passkey", _learn("passkey", "--preset", "cuda", "--attention", "nsa", "full")),
    Entry("orders", ("learn-orders", "--preset", "cuda", "--context", "2048")),
)

TINY = (
    Entry("mqar", _learn("mqar", "--preset", "tiny", "--tokens", "1024", "--attention", "nsa", "full")),
    Entry("passkey", _learn("passkey", "--preset", "tiny", "--tokens", "1024", "--attention", "nsa")),
)

PLANS: Mapping[str, tuple[Entry, ...]] = {"cuda": CUDA, "tiny": TINY}
"""The comparison of the page "Does it learn?", for up to three GPUs, and one that shows in a minute that all works."""
