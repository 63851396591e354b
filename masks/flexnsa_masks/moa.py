"""MoA: each head has a window and sinks of its own, which grow with the length of the input by a rule of its own.

Definition: on N tokens, query q sees key k in head h iff `k <= q` and (`q - k < window[h]` or `k < sinks[h]`), where
`window[h] = max(1, floor(alpha + beta * N))` with the head's own pair, and likewise for the sinks, from 0. Source: MoA,
Mixture of Sparse Attention (Fu et al. 2024, arXiv 2406.14909): the elastic rule. The released code
(github.com/thu-nics/MoA) counts in blocks of 64 tokens; one such block of sinks in every head, and that it comes on top
of the window, are our choice.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, table_row, with_tiles
from flexnsa_masks.rename import rename

Rule = tuple[float, float]


def moa(
    tokens: int, windows: Sequence[Rule], *, sinks: int | Sequence[Rule] = 64, device: torch.device | str = "cpu"
) -> MaskMod:
    """Mask mod: the latest `window[h]` keys and the first `sinks[h]`, sizes for an input of this length.

    Args:
        tokens: length of the input, N.
        windows: (alpha, beta) of each query head, in tokens and in tokens per token of the input.
        sinks: number of initial keys in every head, whatever the length; or (alpha, beta) of each head.
        device: where queries and keys are.

    Raises:
        ValueError: fewer than 1 token or head, negative sinks, rules for different numbers of heads, or a rule that is
            not finite.

    >>> from flexnsa_masks import block_mask
    >>> mask_mod = moa(1024, [(64, 0.0), (0, 0.5)], sinks=0)  # windows of 64 and 512 keys
    >>> mask = block_mask(mask_mod, q_len=1024, kv_len=1024, heads=2)
    >>> (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, :, -1].tolist()
    [2, 5]
    """
    at_least("moa", 1, tokens=tokens, heads=len(windows))
    rules = [(float(sinks), 0.0)] * len(windows) if isinstance(sinks, int) else list(sinks)
    if len(rules) != len(windows):
        raise ValueError(f"moa: expected one rule for sinks a head, {len(windows)} in all, got {len(rules)}")
    recent = _recent(_sizes("windows", windows, tokens, 1, device))
    initial = _initial(_sizes("sinks", rules, tokens, 0, device))
    return rename(or_masks(recent, initial), f"moa_{tokens}")


def _recent(window: Tensor) -> MaskMod:
    one_head = len(window) == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window[table_row(h, one_head)])

    def tiles(grid: Grid) -> Tiles:
        grid.require("moa", window)
        first, last = grid.queries()
        width = window.view(1, -1, 1, 1)
        return interval_tiles(grid, (first - width + 1, last - width + 1), (first, last))

    return with_tiles(mask_mod, tiles, "moa_windows")


def _initial(sinks: Tensor) -> MaskMod:
    one_head = len(sinks) == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx < sinks[table_row(h, one_head)])

    def tiles(grid: Grid) -> Tiles:
        grid.require("moa", sinks)
        first, last = grid.queries()
        end = sinks.view(1, -1, 1, 1) - 1
        return interval_tiles(grid, (torch.zeros_like(end),) * 2, (torch.minimum(first, end), torch.minimum(last, end)))

    return with_tiles(mask_mod, tiles, "moa_sinks")


def _sizes(name: str, rules: Sequence[Rule], tokens: int, least: int, device: torch.device | str) -> Tensor:
    """Sizes at a length, int64 `[h]`, no smaller than `least`."""
    if not all(math.isfinite(number) for rule in rules for number in rule):
        raise ValueError(f"moa: expected {name} of finite numbers, got {list(rules)}")
    if least == 0 and any(alpha + beta * tokens < 0 for alpha, beta in rules):
        raise ValueError(f"moa: expected {name} >= 0 at {tokens} tokens, got {list(rules)}")
    return torch.tensor([max(least, math.floor(alpha + beta * tokens)) for alpha, beta in rules], device=device)
