"""Block masks that follow from the lengths alone, and from where the queries begin: made once, not in every call.

A compiled graph gets copies of their tables from one opaque operator: their arithmetic would make up much of the graph,
for tensors of kilobytes, and torch 2.11's Inductor fails on some of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexnsa_masks import MaskMod, at_positions, block_mask, compressed, sliding_window

Pattern = Literal["compressed", "sliding_window"]
"""Masks of adjacent queries of one document."""

TILE = 128
"""Tokens of a block mask's tile."""

LONGEST_KEPT = 2**20  # tiles, of 16 bytes; longer sequences rebuild theirs, which is little beside their attention
KEPT_MASKS = 64
KEPT_TILES = 2**23

DESCENDING = "full_q_descending"
"""The table ``full_q_indices`` from the last query tile to the first.

The key tiles of a compressed branch begin hundreds of query tiles apart. From the last one on they go through the same
queries at the same time, which stay in L2.
"""

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
    first: int = 0,
    repeat: int = 1,
) -> BlockMask:
    """The block mask of ``pattern(*sizes)`` for queries at first .. first+tq-1.

    Args:
        pattern: ``"compressed"``, sizes ``compress_block`` and ``compress_stride``; or ``"sliding_window"``, its keys.
        sizes: the pattern's arguments.
        position: int64 ``[1, tq]``; only the shape and the device are read.
        kv_len: keys.
        first: where the first query stands.
        repeat: batch size of the mask's tables.
    """
    tables: dict[str, Any]
    if torch.compiler.is_compiling():
        tables = dict(zip(_TABLES, _static_tables(position, pattern, sizes, first, kv_len, repeat), strict=True))
    else:
        known = mask_tables(pattern, sizes, position, kv_len, first=first, repeat=repeat)
        tables = {name: known[name] for name in _TABLES}
    lengths = (position.shape[1], kv_len)
    mod = _mod(pattern, first, *sizes)
    return BlockMask(seq_lengths=lengths, BLOCK_SIZE=(TILE, TILE), mask_mod=mod, **tables)


def _mod(pattern: Pattern, first: int, *sizes: int) -> MaskMod:
    """The gallery's mask mod without the geometry: Dynamo does not set attributes of a function."""
    # Both sides are 2 larger than they need be: of 0 and 1 Dynamo makes constants, and a graph for each.
    shift = first + 2
    if pattern == "sliding_window":
        (window,) = sizes
        return lambda b, h, q_idx, kv_idx: (kv_idx + 2 <= q_idx + shift) & (kv_idx + 2 > q_idx + shift - window)
    block, stride = sizes
    return lambda b, h, q_idx, kv_idx: kv_idx * stride + (block + 1) <= q_idx + shift


@torch.library.custom_op("flexnsa::static_mask_tables", mutates_args=())
def _static_tables(
    position: Tensor, pattern: str, sizes: Sequence[int], first: int, kv_len: int, repeat: int
) -> list[Tensor]:
    """The tables in the order of ``_TABLES``, with one row and one column more than there are tiles.

    With them no axis is ever of length 1, for which Dynamo would compile a graph of its own. Copies, since a compiled
    graph reuses their memory.
    """
    tables = mask_tables(pattern, tuple(sizes), position, kv_len, first=first, repeat=repeat, spare=1)
    return [tables[name].clone() for name in _TABLES]


@_static_tables.register_fake
def _(position: Tensor, pattern: str, sizes: Sequence[int], first: int, kv_len: int, repeat: int) -> list[Tensor]:
    rows, columns = -(-position.shape[1] // TILE) + 1, -(-kv_len // TILE) + 1
    by_row = [(repeat, 1, rows), (repeat, 1, rows, columns)]
    by_column = [(repeat, 1, columns), (repeat, 1, columns, rows)]
    return [position.new_empty(shape, dtype=torch.int32) for shape in 2 * (by_row + by_column)]


def mask_tables(
    pattern: str,
    sizes: tuple[int, ...],
    position: Int64[Tensor, "1 tq"],
    kv_len: int,
    *,
    first: int = 0,
    repeat: int = 1,
    spare: int = 0,
) -> dict[str, Tensor]:
    """The tables by name, kept for later calls on the default stream, unless the tensors are fake ones.

    ``spare`` rows and columns more than there are tiles; the other arguments as in ``static_mask``.

    Calls on another stream would have to wait for those tables; and CUDA graphs are recorded there, for which
    torch.compile refuses whatever stays allocated.
    """
    q_len, device = position.shape[1], position.device
    tiles = -(-q_len // TILE) * -(-kv_len // TILE) * repeat
    keep = type(position) is Tensor and tiles <= LONGEST_KEPT
    if device.type == "cuda":
        keep = keep and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    key = (pattern, sizes, first, q_len, kv_len, repeat, spare, device)
    if not keep:
        return _build(*key)
    if key not in _KEPT:
        with torch.inference_mode(False):  # what a validation builds, training must be able to save for its backward
            _KEPT[key] = _build(*key)
        while len(_KEPT) > KEPT_MASKS or sum(kept["kv_indices"].numel() for kept in _KEPT.values()) > KEPT_TILES:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]


_KEPT: OrderedDict[tuple[Any, ...], dict[str, Tensor]] = OrderedDict()


def _build(
    pattern: str,
    sizes: tuple[int, ...],
    first: int,
    q_len: int,
    kv_len: int,
    repeat: int,
    spare: int,
    device: torch.device,
) -> dict[str, Tensor]:
    mod = compressed(*sizes) if pattern == "compressed" else sliding_window(*sizes)
    if first > 0:
        mod = at_positions(mod, torch.arange(first, first + q_len, device=device))
    mask = block_mask(mod, q_len=q_len, kv_len=kv_len, block_size=TILE, device=device, repeat=repeat)
    tables = {name: cast(Tensor, getattr(mask, name)) for name in _TABLES}
    padded = {name: F.pad(x, (0, spare) if x.ndim == 3 else (0, spare, 0, spare)) for name, x in tables.items()}
    # Strides of a contiguous tensor along axes of one entry too: flash-attn-4 wants 1 for the last.
    found = {name: x.clone(memory_format=torch.contiguous_format) for name, x in padded.items()}
    return found | {DESCENDING: _descending(found["full_q_num_blocks"], found["full_q_indices"])}


def _descending(count: Tensor, index: Tensor) -> Tensor:
    place = torch.arange(index.shape[-1], dtype=torch.int32, device=index.device)
    return index.gather(-1, torch.where(place < count[..., None], count[..., None] - 1 - place, place).long())
