"""BigBird: blocks see their neighbours, a few global blocks and a few blocks drawn at random.

Definition: with tokens cut into blocks, query q sees key k in head h iff, for `i = q // block` and `j = k // block`,
`|i - j| <= window_blocks // 2`, or i or j is one of the first `num_global` blocks, or j is one of the `num_random`
blocks drawn for i in h. Source: BigBird (Zaheer et al. 2020, arXiv 2007.14062), section 2 and its blocked form in
appendix D, with existing tokens made global (ITC). The paper leaves open which blocks are global (here the first ones;
its code takes the first and the last) and from what is drawn: here without replacement from the blocks that are not
seen anyway.
"""

import torch
from torch import Tensor

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles
from flexnsa_masks.global_tokens import global_tokens
from flexnsa_masks.rename import rename
from flexnsa_masks.selected import selected


def bigbird(
    tokens: int,
    *,
    block: int = 64,
    window_blocks: int = 3,
    num_global: int = 2,
    num_random: int = 3,
    heads: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> MaskMod:
    """Mask mod: window, global and random blocks, seen as a whole and to both sides.

    Args:
        tokens: length of the input, a multiple of `block`.
        block: tokens in a block, at least 1.
        window_blocks: blocks around the query's own, itself included: an odd number.
        num_global: initial blocks that are global, at least 0.
        num_random: blocks drawn for each query block, at least 0; fewer where fewer are left.
        heads: heads that draw for themselves: the query heads of the attention call, or 1 for all alike.
        seed: of torch's generator on the CPU; the same seed draws the same blocks on every device.
        device: where queries and keys are.

    Raises:
        ValueError: a size out of range.

    >>> from flexnsa_masks import block_mask
    >>> mask = block_mask(bigbird(4096), q_len=4096, kv_len=4096, block_size=64)
    >>> (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0, [0, 20, 40]].tolist()  # a global block, two others
    [64, 8, 8]
    """
    at_least("bigbird", 1, tokens=tokens, block=block, window_blocks=window_blocks, heads=heads)
    at_least("bigbird", 0, num_global=num_global, num_random=num_random)
    if tokens % block:
        raise ValueError(f"bigbird: expected tokens to be a multiple of block={block}, got {tokens}; pad the input")
    if window_blocks % 2 == 0:
        raise ValueError(f"bigbird: expected an odd number of window_blocks, got {window_blocks}")
    parts = [_near(window_blocks // 2, block), global_tokens(num_global * block)]
    if num_random:
        drawn = random_blocks(tokens // block, window_blocks // 2, num_global, num_random, heads=heads, seed=seed)
        # `selected` by query block: each of its index lists stands for the rows of one.
        parts.append(selected(drawn[None].to(device), block, num_blocks=tokens // block, group=block))
    return rename(or_masks(*parts), f"bigbird_{tokens}_{block}_{seed}")


def random_blocks(blocks: int, reach: int, num_global: int, num_random: int, *, heads: int, seed: int) -> Tensor:
    """Blocks drawn for each head and query block, int32 `[heads, blocks, num_random]`, -1 where none are left.

    Uniform without replacement over the blocks that are neither global nor within `reach` of the query's own, without
    listing them: numbers below the count of what is left, each pushed past the ones already taken.
    """
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(blocks)
    left = (row - reach).clamp(min=num_global)
    near = ((row + reach).clamp(max=blocks - 1) - left + 1).clamp(min=0)
    free = blocks - num_global - near
    taken = torch.empty(0, heads, blocks, dtype=torch.int64)
    for turn in range(num_random):
        share = torch.rand(heads, blocks, generator=generator, dtype=torch.float64)
        pick = (share * (free - turn).clamp(min=1)).to(torch.int64)
        for earlier in taken.sort(0).values:
            pick = pick + (pick >= earlier)
        taken = torch.cat([taken, torch.where(turn < free, pick, blocks)[None]])
    chosen = taken + num_global
    chosen = torch.where(chosen >= left, chosen + near, chosen)
    return torch.where(taken < free, chosen, -1).to(torch.int32).permute(1, 2, 0).contiguous()


def _near(reach: int, block: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx // block - kv_idx // block).abs() <= reach

    def tiles(grid: Grid) -> Tiles:
        first, last = (query // block for query in grid.queries())
        begin = ((first - reach) * block, (last - reach) * block)
        return interval_tiles(grid, begin, ((first + reach + 1) * block - 1, (last + reach + 1) * block - 1))

    return with_tiles(mask_mod, tiles, f"near_{reach}_{block}")
