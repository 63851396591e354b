"""What is measured, as data: sizes of the model, and the attentions that it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch.nn.attention import SDPBackend

from bench.learn.attention import AttentionShape
from bench.learn.model import ModelShape
from flexnsa import NSAConfig

BYTES = 256


@dataclass(frozen=True)
class Case:
    """A byte-level transformer and the rows that it is trained on.

    Args:
        name: what the rows are called by.
        shape: sizes of the model.
        tokens: lengths of a row of the batch.
        batch: rows.
    """

    name: str
    shape: ModelShape
    tokens: tuple[int, ...]
    batch: int = 1


class Engine(NamedTuple):
    """One attention: the name by which ``bench.learn`` builds it, and SDPA's kernel, None for what needs none."""

    attention: str
    backend: SDPBackend | None = None


MEDIUM = AttentionShape(dim=1024, heads=16, kv_heads=2, head_dim=128, rope_theta=1e6, nsa=NSAConfig())
SMALL = AttentionShape(
    dim=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    nsa=NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32),
)

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("150M", ModelShape(MEDIUM, layers=12, hidden=2560, vocabulary=BYTES), (32768,)),
        Case("small", ModelShape(SMALL, layers=2, hidden=128, vocabulary=BYTES), (256,)),
    )
}
ON_CUDA, ON_CPU = "150M", "small"

ENGINES: Mapping[str, Engine] = {
    "nsa": Engine("nsa"),
    "nsa-mean-pool": Engine("nsa-mean-pool"),
    "cudnn": Engine("full", SDPBackend.CUDNN_ATTENTION),
    "fa2": Engine("full", SDPBackend.FLASH_ATTENTION),
    "sdpa": Engine("full"),
}
"""``sdpa`` is full attention by the kernel that PyTorch takes by itself."""

ENGINES_ON_CUDA = ("nsa", "cudnn", "fa2")
ENGINES_ON_CPU = ("nsa", "sdpa")
