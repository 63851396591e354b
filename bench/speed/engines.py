"""What is compared: NSA by each of flexnsa's engines, dense attention, and others' NSA, all called alike."""

import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.speed.cases import Case
from bench.speed.inputs import Tensors
from flexnsa import BranchKV, MeanPool, native_sparse_attention
from flexnsa.engines import Impl
from flexnsa_masks import block_mask, causal

Call = Callable[[Tensors], Tensor]
"""Attention as one call: q, k, v and gates in, the output [b, hq, t, dv] out."""


class MissingError(Exception):
    """An engine that cannot run here; the message says why."""


def nsa(case: Case, device: torch.device, *, impl: Impl, compiled: bool) -> Call:
    """The whole of NSA: mean-pool compression, scoring, selection, three branches, gates."""
    pool = MeanPool(case.config)

    def call(x: Tensors) -> Tensor:
        return native_sparse_attention(x.q, BranchKV.shared(x.k, x.v), x.gates, case.config, pool, impl=impl)

    if impl == "triton" and device.type != "cuda":
        raise MissingError("its kernels need CUDA")
    if compiled and device.type != "cuda":
        raise MissingError("compiled FlexAttention has no backward on a CPU")
    # A graph for each length, as a model trained at one length has.
    return torch.compile(call, fullgraph=True, dynamic=False) if compiled else call


def dense(case: Case, device: torch.device, *, backend: SDPBackend | None) -> Call:
    """Causal attention by PyTorch's SDPA with one backend, or with the one that PyTorch takes."""
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
    if device.type != "cuda":
        raise MissingError("compiled FlexAttention has no backward on a CPU")
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def call(x: Tensors) -> Tensor:
        mask = block_mask(causal(), q_len=x.q.shape[2], kv_len=x.k.shape[2], device=device)
        return attend(x.q, x.k, x.v, block_mask=mask, enable_gqa=True)

    return call


def peer(case: Case, device: torch.device) -> Call:
    """NSA of flash-linear-attention: compression by mean of whole blocks, so its geometry is not quite the paper's."""
    if find_spec("fla") is None:
        raise MissingError("not installed: pip install flash-linear-attention")
    if device.type != "cuda":
        raise MissingError("its kernels need CUDA")
    from fla.ops.nsa import parallel_nsa

    sizes = {"block_size": case.config.select_block, "block_counts": case.config.num_selected}

    def call(x: Tensors) -> Tensor:
        q, k, v, gates = (y.transpose(1, 2) for y in x.leaves)
        g = gates.unbind(-1)
        out = parallel_nsa(q, k, v, g_cmp=g[0], g_slc=g[1], g_swa=g[2], window_size=case.config.window, **sizes)
        return out.transpose(1, 2)

    return call


ENGINES: Mapping[str, Callable[[Case, torch.device], Call]] = {
    "flexnsa": functools.partial(nsa, impl="auto", compiled=True),
    "flexnsa-eager": functools.partial(nsa, impl="auto", compiled=False),
    "flexnsa-triton": functools.partial(nsa, impl="triton", compiled=True),
    "flexnsa-flex": functools.partial(nsa, impl="flex", compiled=True),
    "flexnsa-reference": functools.partial(nsa, impl="reference", compiled=False),
    "cudnn": functools.partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "fa2": functools.partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa": functools.partial(dense, backend=None),
    "flex-dense": dense_flex,
    "fla-nsa": peer,
}

ON_CUDA = ("flexnsa", "flexnsa-eager", "cudnn", "fa2", "flex-dense", "fla-nsa")
ON_CPU = ("flexnsa-eager", "sdpa", "cudnn", "fla-nsa")
LONGEST: Mapping[str, int] = {"fa2": 65536, "flex-dense": 16384, "flexnsa-reference": 4096}
"""Tokens beyond which an engine is so slow that it runs only where it is asked for by name."""

DENSE = ("cudnn", "sdpa")
"""What ratios are given against: the first of these that was measured."""
