"""The sizes to choose from by name."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from bench.learn.attention import AttentionShape
from bench.learn.settings import Settings
from flexnsa import NSAConfig

TINY = Settings(
    attention=AttentionShape(
        dim=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        rope_theta=1e4,
        nsa=NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=8),
    ),
    layers=2,
    hidden=192,
    context=64,
    batch=4,
    tokens=5_120,
    learning_rate=3e-3,
    minutes=1.0,
    evaluations=2,
    validation_rows=8,
    continuation=24,
)

CPU = Settings(
    attention=AttentionShape(
        dim=208,
        heads=4,
        kv_heads=1,
        head_dim=32,
        rope_theta=100.0,
        nsa=NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=8, window=8),
    ),
    layers=2,
    hidden=672,
    context=256,
    batch=4,
    tokens=800_000,
    learning_rate=2e-3,
    minutes=4.25,
    evaluations=7,
    validation_rows=192,
)

# The paper's geometry in a model of 24M parameters.
CUDA = Settings(
    attention=AttentionShape(dim=512, heads=8, kv_heads=1, head_dim=64, rope_theta=1e4, nsa=NSAConfig()),
    layers=8,
    hidden=1536,
    context=8192,
    batch=4,
    tokens=18_874_368,
    learning_rate=1e-3,
    minutes=9.0,
    evaluations=7,
    validation_rows=64,
    bfloat16=True,
    captured=True,
)

# A search: the one block that is chosen freely covers a quarter of the 16 tokens that hold the pairs.
MQAR_CPU = Settings(
    attention=AttentionShape(
        dim=128,
        heads=4,
        kv_heads=1,
        head_dim=32,
        rope_theta=1e4,
        nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, window=8),
    ),
    layers=2,
    hidden=512,
    context=128,
    batch=32,
    tokens=8_000_000,
    learning_rate=2e-3,
    minutes=9.0,
    evaluations=15,
    validation_rows=256,
    continuation=0,
)

# 64 pairs in 128 tokens: the two blocks that are chosen freely cover a quarter. A compressed key stands for eight keys,
# so it needs many dims. The convolution and the start spare every model the time in which it finds out that a value
# follows its key and that what is found is to be copied: what is left to learn, and to compare, is the search.
MQAR_CUDA = replace(
    MQAR_CPU,
    attention=AttentionShape(
        dim=256,
        heads=4,
        kv_heads=1,
        head_dim=128,
        rope_theta=None,
        nsa=NSAConfig(compress_block=16, compress_stride=16, select_block=16, num_selected=5, window=32),
        searches_first=True,
    ),
    hidden=1024,
    context=512,
    pairs=64,
    batch=32,
    tokens=40_960_000,
    learning_rate=1e-3,
    convolution=4,
    embedding_std=0.06,
    matching=True,
    evaluations=7,
    bfloat16=True,
    captured=True,
)

# 128 pairs in 256 tokens: the four free blocks cover a quarter.
MQAR_LONG = replace(
    MQAR_CUDA,
    attention=replace(
        MQAR_CUDA.attention,
        nsa=NSAConfig(compress_block=16, compress_stride=16, select_block=16, num_selected=7, window=64),
    ),
    context=2048,
    pairs=128,
    batch=8,
    tokens=32_768_000,
)

# Rows of a synthetic task continue with nothing.
TINY_ROWS = replace(TINY, continuation=0)
COPY_CPU = replace(MQAR_CPU, context=64, tokens=4_000_000)
COPY_CUDA = replace(MQAR_LONG, pairs=None)

# No positions, so that a longer row is nothing new in itself: the convolution tells the order of near tokens.
PASSKEY_CUDA = replace(
    MQAR_CUDA,
    attention=AttentionShape(
        dim=128,
        heads=4,
        kv_heads=1,
        head_dim=64,
        rope_theta=None,
        nsa=NSAConfig(compress_block=32, compress_stride=16, select_block=64, num_selected=8, window=128),
    ),
    convolution=8,
    embedding_std=0.1,
    matching=False,
    context=16_384,
    pairs=None,
    batch=4,
    tokens=98_304_000,
    learning_rate=2e-3,
    curriculum=((1 / 3, 1024), (2 / 3, 4096)),
    grid=(4096, 8192, 16_384, 32_768, 65_536),
    validation_rows=32,
)

PRESETS: Mapping[str, Settings] = {"tiny": TINY, "cpu": CPU, "cuda": CUDA}
"""Those of the text task, by name."""

SYNTHETIC: Mapping[str, Mapping[str, Settings]] = {
    "mqar": {"tiny": TINY_ROWS, "cpu": MQAR_CPU, "cuda": MQAR_CUDA, "cuda-long": MQAR_LONG},
    "copy": {"tiny": TINY_ROWS, "cpu": COPY_CPU, "cuda": COPY_CUDA},
    "passkey": {"tiny": TINY_ROWS, "cpu": replace(MQAR_CPU, context=256), "cuda": PASSKEY_CUDA},
}
"""Those of the other tasks, by task and name."""


def preset_for(device: torch.device) -> str:
    """The preset made for a device."""
    return "cuda" if device.type == "cuda" else "cpu"
