"""What `python -m bench learn-all` runs: plans by name, each a list of commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """One process of a plan.

    Attributes:
        name: its folder.
        command: what comes after `python -m bench`.
        after: the entry whose first result it waits for, because that one compiles the same kernels; None for none.
        share: which GPU, counted from 0 and round where there are fewer.
    """

    name: str
    command: tuple[str, ...]
    after: str | None = None
    share: int = 0


SEEDS = (0, 1, 2)
MAIN = ("nsa", "full", "nsa-no-selected", "window")
REST = ("nsa-no-compressed", "nsa-no-window", "nsa-shared-kv", "nsa-mean-pool", "moba")


def _learn(task: str, *options: str, seed: int = 0) -> tuple[str, ...]:
    return ("learn", "--task", task, *options, "--seed", str(seed))


def _mqar(tokens: int, preset: str) -> list[Entry]:
    """Three seeds of the attentions that the claim is about, one of the others."""
    first = f"mqar-{tokens}-seed0"
    seeds = [
        Entry(
            f"mqar-{tokens}-seed{seed}",
            _learn("mqar", "--preset", preset, "--attention", *MAIN, seed=seed),
            after=first if seed else None,
        )
        for seed in SEEDS
    ]
    rest = Entry(f"mqar-{tokens}-others", _learn("mqar", "--preset", preset, "--attention", *REST), after=first)
    return [*seeds, rest]


def _text(seed: int) -> Entry:
    """The longest runs: both seeds compile at once rather than one after the other."""
    options = ("--preset", "cuda", "--installed", "--sample", "0", "--attention", "nsa", "full")
    return Entry(f"text-seed{seed}", _learn("text", *options, seed=seed), share=1)


CUDA = (
    _text(0),
    _text(1),
    *_mqar(512, "cuda"),
    *_mqar(2048, "cuda-long"),
    Entry("passkey", _learn("passkey", "--preset", "cuda", "--attention", "nsa", "full")),
    Entry("orders", ("learn-orders", "--preset", "cuda", "--context", "2048"), after="text-seed0", share=1),
)

TINY = (
    Entry("mqar", _learn("mqar", "--preset", "tiny", "--tokens", "1024", "--attention", "nsa", "full")),
    Entry("passkey", _learn("passkey", "--preset", "tiny", "--tokens", "1024", "--attention", "nsa"), after="mqar"),
)

PLANS: Mapping[str, tuple[Entry, ...]] = {"cuda": CUDA, "tiny": TINY}
"""The comparison of the page "Does it learn?", for one GPU or two, and one that shows in a minute that all works."""
