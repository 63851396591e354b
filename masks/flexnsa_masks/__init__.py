"""FlexAttention mask mods and score mods, one pattern a file, needing torch alone.

Every factory returns a plain function that `flex_attention`, `create_mask` and torch's own `and_masks` take. Mask mods
carry their tile geometry besides, from which `block_mask` builds a BlockMask without evaluating every pair.

- Patterns of positions: `causal`, `sliding_window`, `compressed`, `prefix`, `sink`, `dilated`.
- Patterns generated from tables: `document`, `key_range`, `selected`.
- Published patterns: `streaming_llm`, `power_attention`, `s2_attention`, `moa`, `longformer`, `bigbird`,
  `neighborhood`, and `global_tokens`; `GALLERY` lists them, as does `python -m flexnsa_masks`.
- A pattern as numbers and as a picture: `density`, `tile_density`, `draw`.
- Masks from masks: `and_masks`, `or_masks`, `at_positions`; the BlockMask: `block_mask`.
- A pattern of your own: `with_tiles`, `Grid`, `Tiles`, `interval_tiles`, `tiles_of`; `with_interval`,
  `interval_of` for patterns in which each query sees one run of keys.
- Score mods: `alibi`, `soft_cap`, `compose_score_mods`.
"""

from flexnsa_masks.alibi import alibi
from flexnsa_masks.bigbird import bigbird
from flexnsa_masks.block_mask import block_mask
from flexnsa_masks.causal import causal
from flexnsa_masks.compose import and_masks, or_masks
from flexnsa_masks.compressed import compressed
from flexnsa_masks.density import density, tile_density
from flexnsa_masks.dilated import dilated
from flexnsa_masks.document import document
from flexnsa_masks.draw import draw
from flexnsa_masks.gallery import GALLERY, Entry
from flexnsa_masks.geometry import Grid, MaskMod, TileGeometry, Tiles, interval_tiles, tiles_of, with_tiles
from flexnsa_masks.global_tokens import global_tokens
from flexnsa_masks.intervals import Interval, interval_of, with_interval
from flexnsa_masks.key_range import key_range
from flexnsa_masks.longformer import longformer
from flexnsa_masks.moa import moa
from flexnsa_masks.neighborhood import neighborhood
from flexnsa_masks.positions import at_positions
from flexnsa_masks.power_attention import power_attention
from flexnsa_masks.prefix import prefix
from flexnsa_masks.s2_attention import s2_attention
from flexnsa_masks.score import ScoreMod, compose_score_mods
from flexnsa_masks.selected import selected
from flexnsa_masks.sink import sink
from flexnsa_masks.sliding_window import sliding_window
from flexnsa_masks.soft_cap import soft_cap
from flexnsa_masks.streaming_llm import streaming_llm

__all__ = [
    "GALLERY",
    "Entry",
    "Grid",
    "Interval",
    "MaskMod",
    "ScoreMod",
    "TileGeometry",
    "Tiles",
    "alibi",
    "and_masks",
    "at_positions",
    "bigbird",
    "block_mask",
    "causal",
    "compose_score_mods",
    "compressed",
    "density",
    "dilated",
    "document",
    "draw",
    "global_tokens",
    "interval_of",
    "interval_tiles",
    "key_range",
    "longformer",
    "moa",
    "neighborhood",
    "or_masks",
    "power_attention",
    "prefix",
    "s2_attention",
    "selected",
    "sink",
    "sliding_window",
    "soft_cap",
    "streaming_llm",
    "tile_density",
    "tiles_of",
    "with_interval",
    "with_tiles",
]
