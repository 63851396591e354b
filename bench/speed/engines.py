"""What is compared: NSA by each of flexnsa's engines, dense attention, and others' NSA, all called alike."""

import functools
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.speed.cases import Case
from bench.speed.inputs import Tensors
from flexnsa import (
    Branch,
    BranchKV,
    CompressedBranch,
    ImportanceSelector,
    MeanPool,
    SelectedBranch,
    SparseAttention,
    WindowBranch,
    native_sparse_attention,
)
from flexnsa.engines import Impl
from flexnsa_masks import MaskMod, block_mask, causal, sliding_window

Call = Callable[[Tensors], Tensor]
"""Attention as one call: q, k, v and gates in, the output [b, hq, t, dv] out."""


class MissingError(Exception):
    """An engine that cannot run here; the message says why."""


def nsa(
    case: Case,
    device: torch.device,
    *,
    impl: Impl,
    compiled: bool,
    recompute: Collection[str] = (),
    mode: str | None = None,
) -> Call:
    """The whole of NSA: mean-pool compression, scoring, selection, three branches, gates."""
    pool = MeanPool(case.config)
    options: dict[str, Any] = {"recompute": recompute, "impl": impl}

    def call(x: Tensors) -> Tensor:
        kv = BranchKV.shared(x.k, x.v)
        return native_sparse_attention(x.q, kv, x.gates, case.config, pool, documents=x.documents, **options)

    return _ready(call, device, impl, compiled, mode)


def composed(case: Case, device: torch.device, *, compiled: bool) -> Call:
    """The same as a composition of three branches and a selector."""
    config = case.config
    branches: dict[str, Branch] = {
        "compressed": CompressedBranch(config, MeanPool(config)),
        "selected": SelectedBranch(config),
        "window": WindowBranch(config),
    }
    attention = SparseAttention(branches, lambda x: x, selector=ImportanceSelector(config))

    def call(x: Tensors) -> Tensor:
        kv = dict.fromkeys(branches, (x.k, x.v))
        return attention(x.q, kv, x.gates, documents=x.documents)

    return _ready(call, device, "auto", compiled)


def _ready(call: Call, device: torch.device, impl: Impl, compiled: bool, mode: str | None = None) -> Call:
    if impl in ("flash", "triton") and device.type != "cuda":
        raise MissingError("its kernels need CUDA")
    if compiled and device.type != "cuda":
        raise MissingError("compiled FlexAttention has no backward on a CPU")
    # A graph for each length, as a model trained at one length has.
    return torch.compile(call, fullgraph=True, dynamic=False, mode=mode) if compiled else call


def dense(case: Case, device: torch.device, *, backend: SDPBackend | None) -> Call:
    """Causal attention by PyTorch's SDPA with one backend, or with the one that PyTorch takes."""
    _one_document(case)
    if backend is not None and device.type != "cuda":
        raise MissingError("needs CUDA")

    def call(x: Tensors) -> Tensor:
        attend = functools.partial(F.scaled_dot_product_attention, x.q, x.k, x.v, is_causal=True, enable_gqa=True)
        if backend is None:
            return attend()
        with sdpa_kernel(backend):
            return attend()

    return call


def dense_flex(case: Case, device: torch.device) -> Call:
    """Causal attention by compiled FlexAttention."""
    _one_document(case)
    return _flex(causal(), device)


def _flex(mask_mod: MaskMod, device: torch.device) -> Call:
    if device.type != "cuda":
        raise MissingError("compiled FlexAttention has no backward on a CPU")
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @functools.cache
    def mask(tokens: int) -> BlockMask:
        return block_mask(mask_mod, q_len=tokens, kv_len=tokens, device=device)

    def call(x: Tensors) -> Tensor:
        return attend(x.q, x.k, x.v, block_mask=mask(x.q.shape[2]), enable_gqa=True)

    return call


def peer(case: Case, device: torch.device) -> Call:
    """NSA of flash-linear-attention: compression by mean of whole blocks, so its geometry is not quite the paper's.

    Its window is FlashAttention-2's; where that is not installed, compiled FlexAttention's.
    """
    if find_spec("fla") is None:
        raise MissingError("not installed: pip install flash-linear-attention")
    _one_document(case)
    if device.type != "cuda":
        raise MissingError("its kernels need CUDA")
    if case.group < 16:
        raise MissingError(f"takes 16 query heads a KV head or more, the case has {case.group}")
    from fla.ops.nsa import parallel

    config = case.config
    options: dict[str, int] = {"block_size": config.select_block, "block_counts": config.num_selected}
    window = None
    if parallel.flash_attn_func is None:
        window = _flex(sliding_window(config.window), device)
    else:
        options["window_size"] = config.window

    def call(x: Tensors) -> Tensor:
        q, k, v, gates = (y.transpose(1, 2) for y in x.leaves)
        g = gates.unbind(-1)
        out: Tensor = parallel.parallel_nsa(q, k, v, g_cmp=g[0], g_slc=g[1], g_swa=g[2], **options)
        out = out.transpose(1, 2)
        return out if window is None else torch.addcmul(out, x.gates[..., 2:], window(x))

    return call


def _one_document(case: Case) -> None:
    if case.documents > 1:
        raise MissingError("is not given packed rows: compare them with one document of the same length")


STAGES = "stages"
"""NSA's stages one by one, in place of an engine."""

ENGINES: Mapping[str, Callable[[Case, torch.device], Call]] = {
    "flexnsa": functools.partial(nsa, impl="auto", compiled=True),
    "flexnsa-eager": functools.partial(nsa, impl="auto", compiled=False),
    "flexnsa-recompute-window": functools.partial(nsa, impl="auto", compiled=False, recompute=("window",)),
    "flexnsa-recompute-both": functools.partial(nsa, impl="auto", compiled=False, recompute=("selected", "window")),
    "flexnsa-graphs": functools.partial(nsa, impl="auto", compiled=True, mode="reduce-overhead"),
    "flexnsa-composed": functools.partial(composed, compiled=True),
    "flexnsa-composed-eager": functools.partial(composed, compiled=False),
    "flexnsa-flash": functools.partial(nsa, impl="flash", compiled=True),
    "flexnsa-flash-eager": functools.partial(nsa, impl="flash", compiled=False),
    "flexnsa-triton": functools.partial(nsa, impl="triton", compiled=True),
    "flexnsa-triton-eager": functools.partial(nsa, impl="triton", compiled=False),
    "flexnsa-flex": functools.partial(nsa, impl="flex", compiled=True),
    "flexnsa-reference": functools.partial(nsa, impl="reference", compiled=False),
    "cudnn": functools.partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "fa2": functools.partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa": functools.partial(dense, backend=None),
    "flex-dense": dense_flex,
    "fla-nsa": peer,
}

ON_CUDA = (
    *("flexnsa-eager", "cudnn", "flexnsa-triton-eager", STAGES, "flexnsa-recompute-window", "flexnsa-recompute-both"),
    *("fa2", "fla-nsa", "flexnsa", "flexnsa-graphs", "flex-dense"),
)
ON_CPU = ("flexnsa-eager", "sdpa", "cudnn", "fla-nsa", STAGES)
"""In the order in which they run: what takes long to compile comes last, so that a run that is cut off has the rest."""

LONGEST: Mapping[str, int] = {
    "cudnn": 131072,
    "fa2": 65536,
    "flexnsa-triton-eager": 131072,
    "flexnsa-recompute-window": 65536,
    "flexnsa-recompute-both": 65536,
    "flex-dense": 16384,
    "fla-nsa": 65536,
    "flexnsa": 16384,
    "flexnsa-graphs": 8192,
    "flexnsa-reference": 4096,
}
"""Tokens beyond which an engine takes long, to run or to compile, and runs only where it is asked for by name."""

GRAPHED = ("flexnsa-graphs",)
"""Engines whose steps torch.compile replays as CUDA graphs: a forward by itself, then each with its backward."""

DENSE = ("cudnn", "sdpa")
"""What ratios are given against: the first of these that was measured."""
