"""The steps that are compared: each is a callable of no arguments over inputs made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from bench.decode.cases import Case, Prefill
from flexnsa import NativeSparseAttention, PagedKV, Pages, paged_step

Step = Callable[[], object]

SDPA = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


PREFILL = ("whole", "chunks")
"""How a prompt is cut into calls."""


def engines_for(device: torch.device) -> tuple[str, ...]:
    """Names of what is measured on a device, ours first."""
    return ("nsa", "fa2", "cudnn", "efficient", "flex") if device.type == "cuda" else ("nsa", "math")


def make_step(engine: str, case: Case, device: torch.device, pool: int | None = None) -> Step:
    """The step of an engine; ``pool`` physical pages instead of one for each logical page, where only compiling counts.

    Raises:
        RuntimeError, NotImplementedError: the engine cannot run such a call; some say so at the first call only.
    """
    q = _random((case.batch, case.heads, 1, case.dim), device)
    if engine == "nsa":
        return _nsa(q, case, pool)
    k, v = (_random((case.batch, case.kv_heads, case.tokens, case.dim), device) for _ in range(2))
    if engine == "flex":
        # One graph for each shape: with symbolic sizes its decoding kernel is ten times slower.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention.flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, enable_gqa=True)
    return lambda: _sdpa(SDPA[engine], q, k, v)


def make_prefill(cut: str, case: Prefill, device: torch.device) -> Step:
    """A prompt through a layer, its cache emptied before."""
    layer = NativeSparseAttention(
        dim=case.dim,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        config=case.config,
        rope_theta=1e4,
    ).to(device, torch.bfloat16)
    x = _random((1, case.tokens, case.dim), device)
    cache = layer.new_cache(1, case.tokens)
    calls = x.split(case.chunk if cut == "chunks" else case.tokens, dim=1)

    @torch.no_grad()
    def prefill() -> None:
        cache.reset()
        for call in calls:
            layer(call, cache=cache)

    return prefill


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _nsa(q: Tensor, case: Case, pool: int | None) -> Step:
    gates = torch.rand(*q.shape[:3], 3, device=q.device).to(q.dtype)
    pages = PagedKV(*_pages(case, q.device, pool))
    lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=q.device)
    out = torch.empty_like(q)
    return lambda: paged_step(q, gates, pages, lengths, case.config, out=out)


def _pages(case: Case, device: torch.device, pool: int | None) -> Iterator[Pages]:
    """Each branch's own pages, in random places."""
    for size, tokens in (
        (case.compressed_page, case.tokens // case.config.compress_stride),
        (case.page, case.tokens),
        (case.page, case.tokens),
    ):
        logical = case.batch * -(-tokens // size)
        count = logical if pool is None else pool
        k, v = (_random((count, case.kv_heads, size, case.dim), device) for _ in range(2))
        table = torch.randperm(logical, device=device).remainder(count).int().view(case.batch, -1)
        yield Pages(k, v, table)


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
