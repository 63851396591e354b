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

CUDA = Settings(
    attention=AttentionShape(
        dim=512,
        heads=8,
        kv_heads=2,
        head_dim=64,
        rope_theta=1e4,
        nsa=NSAConfig(compress_block=16, compress_stride=8, select_block=64, num_selected=8, window=128),
    ),
    layers=6,
    hidden=1536,
    context=2048,
    batch=8,
    tokens=8_000_000,
    learning_rate=1e-3,
    minutes=4.5,
    evaluations=11,
    validation_rows=128,
    bfloat16=True,
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

# 32 pairs in 64 tokens: the one free block covers a quarter.
MQAR_CUDA = replace(
    MQAR_CPU,
    attention=replace(
        MQAR_CPU.attention,
        nsa=NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=4, window=32),
    ),
    context=512,
    batch=128,
    tokens=400_000_000,
    bfloat16=True,
)

# Rows of a synthetic task continue with nothing.
TINY_ROWS = replace(TINY, continuation=0)
COPY_CPU = replace(MQAR_CPU, context=64, tokens=4_000_000)
COPY_CUDA = replace(MQAR_CUDA, context=2048, batch=32)
PASSKEY_CUDA = replace(
    CUDA, context=16_384, batch=2, tokens=200_000_000, minutes=9.0, validation_rows=32, continuation=0
)

PRESETS: Mapping[str, Settings] = {"tiny": TINY, "cpu": CPU, "cuda": CUDA}
"""Those of the text task, by name."""

SYNTHETIC: Mapping[str, Mapping[str, Settings]] = {
    "mqar": {"tiny": TINY_ROWS, "cpu": MQAR_CPU, "cuda": MQAR_CUDA},
    "copy": {"tiny": TINY_ROWS, "cpu": COPY_CPU, "cuda": COPY_CUDA},
    "passkey": {"tiny": TINY_ROWS, "cpu": replace(MQAR_CPU, context=256), "cuda": PASSKEY_CUDA},
}
"""Those of the other tasks, by task and name."""


def preset_for(device: torch.device) -> str:
    """The preset made for a device."""
    return "cuda" if device.type == "cuda" else "cpu"
