"""Block masks that follow from the lengths alone: made once for a length, not in every call.

A compiled graph gets copies of their tables from one opaque operator: their arithmetic would make up much of the graph,
for tensors of kilobytes, and torch 2.11's Inductor fails on some of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexnsa_masks import MaskMod, block_mask, compressed, sliding_window

Pattern = Literal["compressed", "sliding_window"]
"""Masks of queries that stand at 0 .. tq-1 of one document."""

TILE = 128
"""Tokens of a block mask's tile."""

KEPT_MASKS = 8
KEPT_TILES = 2**20  # 16 MiB of tables; longer sequences rebuild theirs, which is little beside their attention

_TABLES = (
    "kv_num_blocks",
    "kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def static_mask(
    pattern: Pattern,
    sizes: tuple[int, ...],
    position: Int64[Tensor, "1 tq"],
    kv_len: int,
    *,
    repeat: int = 1,
    for_flash: bool = False,
) -> BlockMask:
    """The block mask of ``pattern(*sizes)`` for queries at 0 .. tq-1.

    Args:
        pattern: ``"compressed"``, sizes ``compress_block`` and ``compress_stride``; or ``"sliding_window"``, its keys.
        sizes: the pattern's arguments.
        position: int64 ``[1, tq]``; only the shape and the device are read.
        kv_len: keys.
        repeat: batch size of the mask's tables.
        for_flash: whether FLASH reads the mask: its mod then holds the sizes as constants, for which a graph is
            compiled anew, not as numbers that it is given in each call; and its tables are as long as there are tiles.
    """
    tables: dict[str, Any]
    if torch.compiler.is_compiling():
        tables = dict(zip(_TABLES, _static_tables(position, pattern, sizes, kv_len, repeat), strict=True))
        if for_flash:
            tables = {name: x[..., :-1] if x.ndim == 3 else x[..., :-1, :-1] for name, x in tables.items()}
    else:
        tables = _kept_or_new(position, pattern, sizes, kv_len, repeat)
    lengths = (position.shape[1], kv_len)
    mod = _constant_mod(pattern, *sizes) if for_flash else _mod(pattern, *sizes)
    return BlockMask(seq_lengths=lengths, BLOCK_SIZE=(TILE, TILE), mask_mod=mod, **tables)


def _mod(pattern: Pattern, *sizes: int) -> MaskMod:
    """The gallery's mask mod without the geometry: Dynamo does not set attributes of a function."""
    if pattern == "sliding_window":
        (window,) = sizes
        return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx > q_idx - window)
    block, stride = sizes
    return lambda b, h, q_idx, kv_idx: kv_idx * stride + (block - 1) <= q_idx


def _constant_mod(pattern: Pattern, *sizes: int) -> MaskMod:
    """``_mod`` with its sizes as defaults of arguments, which Dynamo takes for constants; of cells it makes inputs.

    ``operator.index`` makes constants of what are symbols where this is part of a graph itself.
    """
    first, *others = (operator.index(size) for size in sizes)

    def sliding_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, window: int = first) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

    if pattern == "sliding_window":
        return sliding_window
    (stride,) = others

    def compressed(
        b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, last: int = first - 1, s: int = stride
    ) -> Tensor:
        return kv_idx * s + last <= q_idx

    return compressed


@torch.library.custom_op("flexnsa::static_mask_tables", mutates_args=())
def _static_tables(position: Tensor, pattern: str, sizes: Sequence[int], kv_len: int, repeat: int) -> list[Tensor]:
    """The tables in the order of ``_TABLES``, with one row and one column more than there are tiles.

    With them no axis is ever of length 1, for which Dynamo would compile a graph of its own. Copies, since a compiled
    graph reuses their memory.
    """
    tables = _kept_or_new(position, pattern, tuple(sizes), kv_len, repeat, spare=1)
    return [table.clone() for table in tables.values()]


@_static_tables.register_fake
def _(position: Tensor, pattern: str, sizes: Sequence[int], kv_len: int, repeat: int) -> list[Tensor]:
    rows, columns = -(-position.shape[1] // TILE) + 1, -(-kv_len // TILE) + 1
    by_row = [(repeat, 1, rows), (repeat, 1, rows, columns)]
    by_column = [(repeat, 1, columns), (repeat, 1, columns, rows)]
    return [position.new_empty(shape, dtype=torch.int32) for shape in 2 * (by_row + by_column)]


def _kept_or_new(
    position: Tensor, pattern: str, sizes: tuple[int, ...], kv_len: int, repeat: int, *, spare: int = 0
) -> dict[str, Tensor]:
    """The tables by name, kept for later calls on the default stream, unless the tensors are fake ones.

    Calls on another stream would have to wait for those tables; and CUDA graphs are recorded there, for which
    torch.compile refuses whatever stays allocated.
    """
    q_len, device = position.shape[1], position.device
    keep = type(position) is Tensor and -(-q_len // TILE) * -(-kv_len // TILE) * repeat <= KEPT_TILES
    if device.type == "cuda":
        keep = keep and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    return (_kept if keep else _build)(pattern, sizes, q_len, kv_len, repeat, spare, device)


@functools.lru_cache(maxsize=KEPT_MASKS)
def _kept(
    pattern: str, sizes: tuple[int, ...], q_len: int, kv_len: int, repeat: int, spare: int, device: torch.device
) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # what a validation builds, training must be able to save for its backward
        return _build(pattern, sizes, q_len, kv_len, repeat, spare, device)


def _build(
    pattern: str, sizes: tuple[int, ...], q_len: int, kv_len: int, repeat: int, spare: int, device: torch.device
) -> dict[str, Tensor]:
    mod = compressed(*sizes) if pattern == "compressed" else sliding_window(*sizes)
    mask = block_mask(mod, q_len=q_len, kv_len=kv_len, block_size=TILE, device=device, repeat=repeat)
    tables = {name: cast(Tensor, getattr(mask, name)) for name in _TABLES}
    return {name: F.pad(x, (0, spare) if x.ndim == 3 else (0, spare, 0, spare)) for name, x in tables.items()}
