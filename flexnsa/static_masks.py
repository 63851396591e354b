"""Block masks that follow from the lengths alone: kept between eager calls, and one opaque operator under compile.

Opaque, since the tables' arithmetic would otherwise make up much of a compiled layer's graph, for tensors of kilobytes,
and since torch 2.11's Inductor fails on some of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, cast

import torch
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
    pattern: Pattern, sizes: tuple[int, ...], position: Int64[Tensor, "1 tq"], kv_len: int, *, repeat: int = 1
) -> BlockMask:
    """The block mask of ``pattern(*sizes)`` for queries at 0 .. tq-1.

    Args:
        pattern: ``"compressed"``, sizes ``compress_block`` and ``compress_stride``; or ``"sliding_window"``, its keys.
        sizes: the pattern's arguments.
        position: int64 ``[1, tq]``; only the shape and the device are read.
        kv_len: keys.
        repeat: batch size of the mask's tables.
    """
    if torch.compiler.is_compiling():
        tables = dict(zip(_TABLES, _static_tables(position, pattern, sizes, kv_len, repeat), strict=True))
    else:
        tables = _kept_or_new(position, pattern, sizes, kv_len, repeat)
    lengths = (position.shape[1], kv_len)
    return BlockMask(seq_lengths=lengths, BLOCK_SIZE=(TILE, TILE), mask_mod=_mod(pattern, *sizes), **tables)


def _mod(pattern: Pattern, *sizes: int) -> MaskMod:
    """The gallery's mask mod without the geometry: Dynamo does not set attributes of a function."""
    if pattern == "sliding_window":
        (window,) = sizes
        return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx > q_idx - window)
    block, stride = sizes
    return lambda b, h, q_idx, kv_idx: kv_idx * stride + (block - 1) <= q_idx


@torch.library.custom_op("flexnsa::static_mask_tables", mutates_args=())
def _static_tables(position: Tensor, pattern: str, sizes: Sequence[int], kv_len: int, repeat: int) -> list[Tensor]:
    """The tables in the order of ``_TABLES``.

    New ones at each call: a compiled graph reuses their memory, and a CUDA graph keeps all that it allocates to itself.
    """
    return list(_build(pattern, tuple(sizes), position.shape[1], kv_len, repeat, position.device).values())


@_static_tables.register_fake
def _(position: Tensor, pattern: str, sizes: Sequence[int], kv_len: int, repeat: int) -> list[Tensor]:
    rows, columns = -(-position.shape[1] // TILE), -(-kv_len // TILE)
    by_row = [(repeat, 1, rows), (repeat, 1, rows, columns)]
    by_column = [(repeat, 1, columns), (repeat, 1, columns, rows)]
    return [position.new_empty(shape, dtype=torch.int32) for shape in 2 * (by_row + by_column)]


def _kept_or_new(position: Tensor, pattern: str, sizes: Sequence[int], kv_len: int, repeat: int) -> dict[str, Tensor]:
    """The tables by name. Not kept where tensors hold no values yet: fake ones, or those of a CUDA graph's capture."""
    q_len, device, stream = position.shape[1], position.device, 0
    keep = type(position) is Tensor and -(-q_len // TILE) * -(-kv_len // TILE) * repeat <= KEPT_TILES
    if device.type == "cuda":
        keep = keep and not torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream  # another one would have to wait for the tables
    if not keep:
        return _build(pattern, tuple(sizes), q_len, kv_len, repeat, device)
    return _kept(pattern, tuple(sizes), q_len, kv_len, repeat, device, stream)


@functools.lru_cache(maxsize=KEPT_MASKS)
def _kept(
    pattern: str, sizes: tuple[int, ...], q_len: int, kv_len: int, repeat: int, device: torch.device, stream: int
) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # what a validation builds, training must be able to save for its backward
        return _build(pattern, sizes, q_len, kv_len, repeat, device)


def _build(
    pattern: str, sizes: tuple[int, ...], q_len: int, kv_len: int, repeat: int, device: torch.device
) -> dict[str, Tensor]:
    mod = compressed(*sizes) if pattern == "compressed" else sliding_window(*sizes)
    mask = block_mask(mod, q_len=q_len, kv_len=kv_len, block_size=TILE, device=device, repeat=repeat)
    return {name: cast(Tensor, getattr(mask, name)) for name in _TABLES}
