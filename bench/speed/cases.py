"""What is measured, as data: shapes, geometries, inputs and lengths."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flexnsa import NSAConfig

Inputs = Literal["random", "correlated"]
"""Independent normal numbers, so that neighbours select almost independently; or numbers that drift along t."""


@dataclass(frozen=True)
class Case:
    """One shape of attention and the lengths to run it at.

    Args:
        name: what the rows are called by.
        heads: query heads hq.
        kv_heads: KV heads hk.
        dim: key dim d.
        value_dim: value dim dv.
        tokens: lengths t, as many queries as keys.
        inputs: how q, k, v are drawn.
        batch: rows of the batch.
        documents: documents packed into each row, of mixed lengths.
        config: NSA's geometry.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    tokens: tuple[int, ...]
    inputs: Inputs = "random"
    batch: int = 1
    documents: int = 1
    config: NSAConfig = field(default_factory=NSAConfig)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


LONG = (8192, 16384, 32768, 65536, 131072, 262144)
SMALL_CONFIG = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32)

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("64q-4kv-128", 64, 4, 128, 128, LONG),
        Case("64q-4kv-128-correlated", 64, 4, 128, 128, (65536,), "correlated"),
        Case("64q-4kv-128-packed", 64, 4, 128, 128, (65536,), documents=32),
        Case("32q-8kv-128", 32, 8, 128, 128, (16384, 65536)),
        Case("64q-4kv-192-128", 64, 4, 192, 128, (16384,)),
        Case("small", 4, 1, 32, 32, (256, 512, 1024), config=SMALL_CONFIG),
        Case("small-correlated", 4, 1, 32, 32, (512,), "correlated", config=SMALL_CONFIG),
        Case("small-packed", 4, 1, 32, 32, (512,), documents=8, config=SMALL_CONFIG),
    )
}

ON_CUDA = ("64q-4kv-128", "64q-4kv-128-correlated", "64q-4kv-128-packed", "32q-8kv-128", "64q-4kv-192-128")
ON_CPU = ("small", "small-correlated", "small-packed")
