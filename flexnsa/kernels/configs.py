"""Tile shapes of the selected-attention kernels, by dtype, head dims, group and the device's shared memory.

Nothing is timed at run time: the same call on the same device always takes the same kernel, hence gives the same bits.
"""

import functools
from typing import NamedTuple

import torch

from flexnsa.kernels.launch import next_power

SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability."""

_INTERPRETED = 99 * 1024


class Tile(NamedTuple):
    """The shape of one kernel.

    Attributes:
        rows: query rows (query and head) of a tile.
        keys: keys of a tile; a larger block is worked on in several parts.
        warps: warps of a program.
        stages: tiles in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@functools.cache
def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds ``dim``: what a tile's matrix product needs."""
    return max(16, next_power(dim))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on ``device``."""
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def generation(device: torch.device) -> int:
    """Major compute capability: from 9 on there is a copy engine that fetches tiles."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


class ForwardPlan(NamedTuple):
    """How the forward is divided.

    Attributes:
        queries: adjacent queries of a tile.
        least: how many of them must choose a block for the tile to visit it as one.
        worth: most blocks that a tile visits so, as a share of the choices that they stand for.
        otherwise: how many must choose a block where they would be more.
        shared: shape of the kernel over what they have in common.
        rest: shape of the kernel over the rest.
        by_query: whether the rest is visited query by query, rather than block by block.
    """

    queries: int
    least: int
    worth: float
    otherwise: int
    shared: Tile
    rest: Tile
    by_query: bool


@functools.lru_cache(maxsize=256)
def forward_plan(itemsize: int, dim: int, value_dim: int, select_block: int, group: int, limit: int) -> ForwardPlan:
    """The forward's division of work and tiles that fit ``limit`` bytes of shared memory.

    A large group fills a tile by itself: a tile of few queries visits the union of their blocks, or each query goes
    alone. A small group packs more queries, and what few of them chose is worked off block by block.
    """
    by_query = group >= 8
    shared = _fit_forward(_candidates(itemsize, select_block, 64, (3, 2, 1)), dim, value_dim, itemsize, limit)
    queries = max(1, min(16, shared.rows // group))
    if by_query:
        rest = _query_tiles(itemsize, dim, value_dim, select_block, group)
        return ForwardPlan(queries, 1, 0.6, 2, shared, _fit_forward(rest, dim, value_dim, itemsize, limit), True)
    rest = _candidates(itemsize, select_block, 64, (1,))
    least = max(1, queries // 3)
    return ForwardPlan(queries, least, 1.0, least, shared, _fit_forward(rest, dim, value_dim, itemsize, limit), False)


def _query_tiles(itemsize: int, dim: int, value_dim: int, select_block: int, group: int) -> list[Tile]:
    """Tiles of one query's heads. Where a warp can hold 16 of them with all their keys, warps need not wait for one
    another, and many small programs keep the memory busy."""
    rows = min(64, padded(group))
    if itemsize == 2 and padded(dim) + padded(value_dim) <= 256:
        return [Tile(rows, min(32, padded(select_block)), rows // 16, stages) for stages in (3, 2, 1)]
    return _candidates(itemsize, select_block, rows, (2, 1))


def _fit_forward(tiles: list[Tile], dim: int, value_dim: int, itemsize: int, limit: int) -> Tile:
    for tile in tiles:
        held = tile.rows * (padded(dim) + tile.keys)
        moving = tile.keys * (padded(dim) + padded(value_dim))
        if itemsize * (held + tile.stages * moving) <= limit:
            return tile
    raise NotImplementedError(_too_large(dim, value_dim, itemsize))


class HopperPlan(NamedTuple):
    """How the forward is divided on Hopper, where one program visits what a tile shares and what is left.

    Attributes:
        least: how many of a tile's queries must choose a block for all of it to visit the block as one.
        slots: blocks of keys, and of values, that a program's shared memory holds; two at least.
        registers: of a thread, where all have as many; those that compute take over what the others do not need.
    """

    least: int
    slots: int
    registers: int


def hopper_plan(itemsize: int, dim: int, value_dim: int, select_block: int, group: int) -> HopperPlan | None:
    """The plan for NSA's own shape, two programs to a multiprocessor; None for others."""
    if itemsize == 2 and dim == value_dim == 128 and select_block == 64 and group == 16:
        return HopperPlan(least=2, slots=3, registers=128)
    return None


class BackwardPlan(NamedTuple):
    """How the backward is divided.

    Attributes:
        tile: shape of the kernel over the pairs.
        keep_scores: whether a pair leaves the gradients of its scores, or its share of dQ. The former are smaller, and
            spare the kernel a fifth product and its registers, but K must be read once more: only for a large group.
        queries: adjacent queries whose dQ is computed as one tile, where they share blocks.
        worth: most blocks that such a tile visits, as a share of the choices that they stand for.
    """

    tile: Tile
    keep_scores: bool
    queries: int
    worth: float


@functools.lru_cache(maxsize=256)
def backward_plan(itemsize: int, dim: int, value_dim: int, select_block: int, group: int, limit: int) -> BackwardPlan:
    """The backward's tile: the widest of those that fit ``limit`` bytes of shared memory."""
    keep_scores = group >= 8
    dims = padded(dim) + padded(value_dim)
    for tile in _candidates(itemsize, select_block, 32, (3, 2, 1)):
        held = tile.keys * (dims if keep_scores else dims + padded(dim)) + 2 * tile.rows * tile.keys
        moving = tile.rows * dims * tile.stages
        if itemsize * (held + moving) <= limit and tile.keys * dims <= 128 * 256:
            return BackwardPlan(tile, keep_scores, max(1, min(8, 64 // group)), 0.6)
    raise NotImplementedError(_too_large(dim, value_dim, itemsize))


def _candidates(itemsize: int, select_block: int, widest: int, stages: tuple[int, ...]) -> list[Tile]:
    """Tiles from the most work per byte to the least."""
    widest = widest if itemsize == 2 else min(32, widest)
    keys, rows = min(128, padded(select_block)), [x for x in (64, 32, 16) if x <= widest]
    tiles = []
    while keys >= 16:
        tiles += [Tile(x, keys, 4 if x >= 32 else 2, n) for x in rows for n in stages]
        keys //= 2
    return tiles


def _too_large(dim: int, value_dim: int, itemsize: int) -> str:
    return f"head dims {dim} and {value_dim} of {itemsize} bytes do not fit the device's shared memory; use impl='flex'"
