"""The sizes to choose from by name."""

from collections.abc import Mapping

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

PRESETS: Mapping[str, Settings] = {"tiny": TINY, "cpu": CPU, "cuda": CUDA}


def preset_for(device: torch.device) -> str:
    """The preset made for a device."""
    return "cuda" if device.type == "cuda" else "cpu"
