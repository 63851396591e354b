"""A user's mask over all branches: one ``visible(query, token)``, lifted to compressed tokens and to blocks.

Mask mods here take absolute token numbers and the query head, as FlexAttention's do, and replace causality: a
compressed token is visible iff all its tokens are, a block is a candidate iff any of its tokens is.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int64
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa_masks import MaskMod, ScoreMod


def compressed_mask(visible: MaskMod, starts: Int64[Tensor, "b c"] | None, config: NSAConfig) -> MaskMod:
    """Mask mod over compressed tokens: visible iff every token of the block is. Unrolled, as compiled masks must be."""
    first_token = compressed_tokens(starts, config)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        first = first_token(b, kv_idx)
        mask = first >= 0
        for place in range(config.compress_block):
            mask = mask & visible(b, h, q_idx, first.clamp(min=0) + place)
        return mask

    return mask_mod


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
