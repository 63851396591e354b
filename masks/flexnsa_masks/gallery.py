"""The gallery: published static patterns, one entry each, as data.

Every entry is a factory of this package and its arguments for a length. Sizes are multiples of a `unit` of tokens, so
that a pattern can be counted at the size it is used at and drawn as a miniature of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flexnsa_masks.bigbird import bigbird
from flexnsa_masks.causal import causal
from flexnsa_masks.dilated import dilated
from flexnsa_masks.geometry import MaskMod
from flexnsa_masks.longformer import longformer
from flexnsa_masks.moa import moa
from flexnsa_masks.neighborhood import neighborhood
from flexnsa_masks.power_attention import power_attention
from flexnsa_masks.s2_attention import s2_attention
from flexnsa_masks.sliding_window import sliding_window
from flexnsa_masks.streaming_llm import streaming_llm

# Tokens per unit where patterns are counted; 1 where they are drawn.
UNIT = 16


class Entry(NamedTuple):
    """A pattern of the gallery.

    `arguments` gives the factory's keyword arguments for (tokens, unit). `heads` is how many heads differ, 1 where none
    do; `causal` whether densities count pairs with `k <= q` only, as for patterns that never see ahead.
    """

    name: str
    factory: Callable[..., MaskMod]
    arguments: Callable[[int, int], dict[str, Any]]
    source: str
    heads: int = 1
    causal: bool = True

    def build(self, tokens: int, unit: int = UNIT) -> MaskMod:
        """Mask mod for a length. Raises ValueError where the pattern does not fit it."""
        return self.factory(**self.arguments(tokens, unit))

    def call(self, tokens: int, unit: int = UNIT) -> str:
        """The factory call that `build` makes, as Python."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments(tokens, unit).items())
        return f"{self.factory.__name__}({arguments})"


def find(name: str) -> Entry:
    """Entry of the gallery by name. Raises ValueError, listing the names, for another.

    >>> find("streaming").call(8192)
    'streaming_llm(window=512, sinks=4)'
    """
    for entry in GALLERY:
        if entry.name == name:
            return entry
    raise ValueError(f"expected a pattern of the gallery, one of {', '.join(e.name for e in GALLERY)}, got {name!r}")


def grid_shape(tokens: int, axes: int) -> tuple[int, ...]:
    """Sides of a grid that holds as many tokens, ascending and as alike as divisors allow.

    >>> grid_shape(8192, 2), grid_shape(8192, 3)
    ((64, 128), (16, 16, 32))
    """
    if axes == 1:
        return (tokens,)
    # The root of a perfect power may come out a rounding short.
    side = max(n for n in range(1, math.floor(tokens ** (1 / axes) + 1e-9) + 1) if tokens % n == 0)
    return tuple(sorted((side, *grid_shape(tokens // side, axes - 1))))


def _plane(tokens: int, unit: int) -> dict[str, Any]:
    return {"shape": grid_shape(tokens, 2), "kernel": 4 * math.isqrt(unit) - 1}


def _space(tokens: int, unit: int) -> dict[str, Any]:
    return {"shape": grid_shape(tokens, 3), "kernel": 3 + unit // 4}


GALLERY = (
    Entry("causal", causal, lambda tokens, unit: {}, "Vaswani et al. 2017, arXiv 1706.03762"),
    Entry("window", sliding_window, lambda tokens, unit: {"window": 32 * unit}, "Longformer, arXiv 2004.05150"),
    Entry(
        "dilated",
        dilated,
        lambda tokens, unit: {"window": 16 * unit, "dilation": 4},
        "Longformer, arXiv 2004.05150",
    ),
    Entry(
        "streaming",
        streaming_llm,
        lambda tokens, unit: {"window": 32 * unit, "sinks": 4},
        "StreamingLLM, arXiv 2309.17453",
    ),
    Entry(
        "power",
        power_attention,
        lambda tokens, unit: {"window": 8 * unit, "sinks": 4, "block": 4 * unit},
        "PowerAttention, arXiv 2503.03588",
    ),
    Entry(
        "s2",
        s2_attention,
        lambda tokens, unit: {"heads": 8, "stride": 8, "local_blocks": 4, "block": 4 * unit},
        "S2-Attention, arXiv 2407.17678",
        heads=8,
    ),
    Entry(
        "moa",
        moa,
        lambda tokens, unit: {
            "tokens": tokens,
            "windows": [(16 * unit, 0.0), (8 * unit, 0.0625), (4 * unit, 0.125), (0, 0.5)],
            "sinks": 4 * unit,
        },
        "MoA, arXiv 2406.14909",
        heads=4,
    ),
    Entry(
        "longformer",
        longformer,
        lambda tokens, unit: {"reach": 16 * unit, "num_global": 4 * unit},
        "Longformer, arXiv 2004.05150",
        causal=False,
    ),
    Entry(
        "bigbird",
        bigbird,
        lambda tokens, unit: {"tokens": tokens, "block": 4 * unit, "heads": 4},
        "BigBird, arXiv 2007.14062",
        heads=4,
        causal=False,
    ),
    Entry(
        "neighborhood1d",
        neighborhood,
        lambda tokens, unit: {"shape": (tokens,), "kernel": 32 * unit - 1},
        "NAT, arXiv 2204.07143",
        causal=False,
    ),
    Entry(
        "neighborhood1d-causal",
        neighborhood,
        lambda tokens, unit: {"shape": (tokens,), "kernel": 8 * unit, "dilation": 4, "causal": True},
        "NAT, arXiv 2204.07143, 2209.15001, 2403.04690",
    ),
    Entry("neighborhood2d", neighborhood, _plane, "NAT, arXiv 2204.07143", causal=False),
    Entry(
        "neighborhood2d-dilated",
        neighborhood,
        lambda tokens, unit: _plane(tokens, unit) | {"dilation": 2},
        "NAT, arXiv 2204.07143, 2209.15001",
        causal=False,
    ),
    Entry("neighborhood3d", neighborhood, _space, "NAT, arXiv 2204.07143, 2403.04690", causal=False),
    Entry(
        "neighborhood3d-video",
        neighborhood,
        lambda tokens, unit: _space(tokens, unit) | {"causal": (True, False, False)},
        "NAT, arXiv 2204.07143, 2403.04690",
        causal=False,
    ),
)
