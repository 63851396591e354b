"""A user's mask over all branches: one ``visible(query, token)``, lifted to compressed tokens and to blocks.

Mask mods here take absolute token numbers and the query head, as FlexAttention's do, and replace causality: a
compressed token is visible iff all its tokens are, a block is a candidate iff any of its tokens is.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import pad

from flexnsa.config import NSAConfig
from flexnsa_masks import Grid, MaskMod, ScoreMod, Tiles, tiles_of, with_tiles


def compressed_mask(
    visible: MaskMod, starts: Int64[Tensor, "b c"] | None, config: NSAConfig, num_tokens: int | None = None
) -> MaskMod:
    """Mask mod over compressed tokens: visible iff every token of the block is. Unrolled, as compiled masks must be.

    Its tile geometry is that of ``visible``, where compressed tokens stand at fixed distances (no ``starts``) and the
    number of tokens is known; else every tile may be visited.
    """
    first_token = compressed_tokens(starts, config)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        first = first_token(b, kv_idx)
        mask = first >= 0
        for place in range(config.compress_block):
            mask = mask & visible(b, h, q_idx, first.clamp(min=0) + place)
        return mask

    if starts is not None or num_tokens is None:
        return mask_mod
    return with_tiles(mask_mod, lambda grid: _compressed_tiles(visible, grid, config, num_tokens), "compressed_mask")


def _compressed_tiles(visible: MaskMod, grid: Grid, config: NSAConfig, num_tokens: int) -> Tiles:
    """Tiles of compressed tokens from those of the tokens that they summarise.

    A key tile of compressed tokens and the tile of as many strides of tokens begin together. A visible compressed token
    has its first token in that tile, and reaches ``compress_block - compress_stride`` tokens into those after it.
    """
    some, full = tiles_of(visible, grid._replace(kv_len=num_tokens, kv_block=grid.kv_block * config.compress_stride))
    columns = grid.shape[1]
    if full is None:
        return Tiles(some[..., :columns], None)
    overlap = config.compress_block - config.compress_stride
    whole = full
    for after in range(1, -(-overlap // (grid.kv_block * config.compress_stride)) + 1):
        whole = whole & pad(full[..., after:], (0, after))
    return Tiles(some[..., :columns], whole[..., :columns])


def candidate_mask(
    visible: MaskMod, start: Int64[Tensor, "b tk"] | None, num_tokens: int, config: NSAConfig
) -> MaskMod:
    """Mask mod over the blocks of the query's document: a candidate iff any token of the block is visible.

    ``start`` holds the first token of each token's document, None for one document a row.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        first = kv_idx * config.select_block + (0 if start is None else start[b, q_idx])
        mask = first < 0
        for token in (first + place for place in range(config.select_block)):
            mask = mask | ((token < num_tokens) & visible(b, h, q_idx, token.clamp(max=num_tokens - 1)))
        return mask

    return mask_mod


def compressed_tokens(starts: Int64[Tensor, "b c"] | None, config: NSAConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """``(b, compressed index) -> first token`` of a compressed token, -1 for a slot that holds none."""
    if starts is None:
        return lambda b, index: index * config.compress_stride
    return lambda b, index: starts[b, index]


def at_last_token(score_mod: ScoreMod, starts: Int64[Tensor, "b c"] | None, config: NSAConfig) -> ScoreMod:
    """Score mod over compressed tokens: each stands where its block's last token does."""
    first_token = compressed_tokens(starts, config)

    def moved(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, q_idx, first_token(b, kv_idx) + config.compress_block - 1)

    return moved
