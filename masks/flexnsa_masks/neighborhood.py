"""Neighborhood attention: tokens on a line, a plane or in space see the tokens around them, as many at the border.

Definition, for each axis by itself (a pair is visible iff it is along every axis): with dilation d, the coordinates of
one residue modulo d form a line of their own, on which they are counted 0 .. n - 1. The query at i sees the `kernel` of
them that begin at `i - kernel // 2`, shifted to `0 .. n - kernel` at the borders; along a causal axis it sees the
`kernel` up to i, fewer near the start. Source: Neighborhood Attention Transformer (Hassani et al. 2023, arXiv
2204.07143), section 3; dilated: arXiv 2209.15001; causal: arXiv 2403.04690. An even kernel, which the first paper
excludes, reaches one farther back than ahead, as NATTEN has it. Tokens are in row-major order.
"""

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, with_tiles

Value = TypeVar("Value", int, bool)
Bounds = tuple[Tensor, Tensor]


def neighborhood(
    shape: tuple[int, ...],
    kernel: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> MaskMod:
    """Mask mod over the tokens of a grid, `prod(shape)` of them: the `kernel` nearest along each axis.

    Args:
        shape: tokens along each of 1, 2 or 3 axes, the last one contiguous.
        kernel: neighbours along each axis, the query's own included; one number serves all axes.
        dilation: tokens from one neighbour to the next, likewise.
        causal: whether nothing ahead is seen along an axis, likewise.

    Raises:
        ValueError: another number of axes, a size below 1, or `kernel * dilation` beyond the axis.

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(neighborhood((5,), 3), 1, 1, 5, 5, device="cpu")[0, 0, :3].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    """
    axes = _axes(shape, kernel, dilation, causal)
    tokens = math.prod(shape)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = axes[0].sees(q_idx, kv_idx)
        for axis in axes[1:]:
            seen = seen & axis.sees(q_idx, kv_idx)
        return seen

    def tiles(grid: Grid) -> Tiles:
        _check_lengths(grid, tokens)
        some = torch.ones(1, 1, *grid.shape, dtype=torch.bool, device=grid.device)
        full = some
        for axis in axes:
            queries, keys = axis.span(grid.queries()), axis.span(grid.keys())
            first, last = axis.visible(queries)
            some = some & (keys[0] <= last[1]) & (keys[1] >= first[0]) & axis.aligned(queries, keys)
            full = full & (keys[0] >= first[1]) & (keys[1] <= last[0])
        return Tiles(some, full if all(axis.dilation == 1 for axis in axes) else None)

    return with_tiles(mask_mod, tiles, "_".join(["neighborhood", *map(str, shape)]))


class _Axis(NamedTuple):
    length: int
    kernel: int
    dilation: int
    causal: bool
    # Tokens from one coordinate to the next, and whether coordinates come round again along an axis before this one.
    stride: int
    repeats: bool

    def sees(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query, key = self._coordinate(q_idx), self._coordinate(kv_idx)
        group, rank = query % self.dilation, query // self.dilation
        start = rank - self.kernel + 1
        if not self.causal:
            members = (self.length - 1 - group) // self.dilation + 1
            start = torch.minimum((rank - self.kernel // 2).clamp(min=0), members - self.kernel)
        ahead = key // self.dilation - start
        return (key >= 0) & (key % self.dilation == group) & (ahead >= 0) & (ahead < self.kernel)

    def span(self, tokens: Bounds) -> Bounds:
        """Least and greatest coordinate of the tokens first .. last; the whole axis where they go round a corner."""
        first, last = tokens[0] // self.stride, tokens[1] // self.stride
        if not self.repeats:
            return first, last
        same = first // self.length == last // self.length
        return torch.where(same, first % self.length, 0), torch.where(same, last % self.length, self.length - 1)

    def visible(self, queries: Bounds) -> tuple[Bounds, Bounds]:
        """Bounds on the first key that queries of a range of coordinates see, and on the last one."""
        reach = (self.kernel - 1) * self.dilation
        if self.causal:
            return (queries[0] - reach, queries[1] - reach), queries
        # The lines of the residues begin and end within `dilation` tokens of the border.
        back, slack, end = (
            self.kernel // 2 * self.dilation,
            self.dilation - 1,
            self.length - self.kernel * self.dilation,
        )
        low, high = (queries[0] - back).clamp(0, end), (queries[1] - back).clamp(slack, end + slack)
        return (low, high), (low + reach, high + reach)

    def aligned(self, queries: Bounds, keys: Bounds) -> Tensor:
        """Whether some query and some key of two ranges of coordinates are a multiple of the dilation apart."""
        least, most = keys[0] - queries[1], keys[1] - queries[0]
        return most // self.dilation * self.dilation >= least

    def _coordinate(self, index: Tensor) -> Tensor:
        step = index // self.stride
        return step % self.length if self.repeats else step


def _axes(
    shape: tuple[int, ...],
    kernel: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    causal: bool | tuple[bool, ...],
) -> list[_Axis]:
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"neighborhood: expected a shape of 1, 2 or 3 axes, got {shape}")
    count = len(shape)
    kernels, steps = _per_axis("kernel", kernel, count), _per_axis("dilation", dilation, count)
    ahead = _per_axis("causal", causal, count)
    for length, size, step in zip(shape, kernels, steps, strict=True):
        at_least("neighborhood", 1, shape=length, kernel=size, dilation=step)
        if size * step > length:
            raise ValueError(
                f"neighborhood: expected kernel * dilation <= {length} tokens of the axis, got {size} * {step}"
            )
    strides = [math.prod(shape[axis + 1 :]) for axis in range(count)]
    repeats = [axis > 0 for axis in range(count)]
    return [_Axis(*values) for values in zip(shape, kernels, steps, ahead, strides, repeats, strict=True)]


def _per_axis(name: str, value: Value | tuple[Value, ...], axes: int) -> tuple[Value, ...]:
    values = value if isinstance(value, tuple) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"neighborhood: expected {name} for {axes} axes, or one for all, got {value}")
    return values


def _check_lengths(grid: Grid, tokens: int) -> None:
    # Queries at positions of their own may be any number.
    q_len = tokens if grid.span is not None else grid.q_len
    for axis, asked in (("q_len", q_len), ("kv_len", grid.kv_len)):
        if asked != tokens:
            raise ValueError(f"neighborhood: its shape holds {tokens} tokens, the BlockMask asks for {axis}={asked}")
