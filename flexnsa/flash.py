"""FLASH: the branches with static masks on the CuTe kernels of the package flash-attn-4.

They are called directly, by opaque operators. Through FlexAttention's FLASH backend the package would take the window
for a list of tiles, though it has kernels for windows; and before torch 2.13 it compiles beside no other work. What it
cannot do, ``flexnsa.engines`` knows: it is asked for nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa.layout import QueryTable
from flexnsa.static_masks import DESCENDING, TILE, mask_tables
from flexnsa.types import AttentionOutput


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7), its LSE without a gradient."""
    count = k_cmp.shape[2]
    # Whole tiles, of which there is one at least: the mask hides what is added.
    added = max(1, -(-count // TILE)) * TILE - count
    k_cmp, v_cmp = (F.pad(x, (0, 0, 0, added)) for x in (k_cmp, v_cmp))
    return _attend(q, k_cmp, v_cmp, "compressed", (config.compress_block, config.compress_stride), scale)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3), its LSE without a gradient."""
    return _attend(q, k, v, "sliding_window", (config.window,), scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, pattern: str, sizes: tuple[int, ...], scale: float) -> AttentionOutput:
    q = q if q.stride(-1) == 1 else q.contiguous()  # or the output would be laid out as the package does not take it
    out, lse = _forward(q, k, v, pattern, sizes, scale)
    return AttentionOutput(out, lse.detach())


@torch.library.custom_op("flexnsa::flash_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Output in q's layout, and natural LSE ``[b, hq, tq]``."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        _flash_attn_fwd(
            *map(_turned, (q, k, v)),
            softmax_scale=scale,
            return_lse=True,
            out=_turned(out),
            lse=lse,
            **_mask(q, k, pattern, tuple(sizes), backward=False),
        )
    return out, lse


@_forward.register_fake
def _(q, k, v, pattern, sizes, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flexnsa::flash_gradients", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    grad = grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()
    with torch.cuda.device_of(q):
        _flash_attn_bwd(
            *map(_turned, (q, k, v, out, grad)),
            lse,
            softmax_scale=scale,
            **dict(zip(("dq", "dk", "dv"), map(_turned, grads), strict=True)),
            **_mask(q, k, pattern, tuple(sizes), backward=True),
        )
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(grad, q, k, v, out, lse, pattern, sizes, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _turned(x: Tensor) -> Tensor:
    """``b h t d -> b t h d``, as the package has it; a view."""
    return x.transpose(1, 2)


def _mask(q: Tensor, k: Tensor, pattern: str, sizes: tuple[int, ...], *, backward: bool) -> dict[str, Any]:
    """What says to the package who sees whom, in tables by query tile or, for the backward, by key tile."""
    if pattern == "sliding_window":
        return {"window_size_left": sizes[0] - 1, "window_size_right": 0}
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    known = mask_tables("compressed", sizes, q[:1, 0, :, 0], k.shape[2])
    names = ("q_num_blocks", "q_indices") if backward else ("kv_num_blocks", "kv_indices")
    tables = [known[prefix + name] for prefix in ("", "full_") for name in names]
    if backward:
        tables[3] = known[DESCENDING]
    return {
        "mask_mod": _compressed(*sizes),
        "block_sparse_tensors": BlockSparseTensorsTorch(*tables, block_size=(TILE, TILE)),
    }


@functools.cache
def _compressed(block: int, stride: int) -> Callable[..., Any]:
    from cutlass import cute

    @cute.jit
    def compressed(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return kv_idx * stride + (block - 1) <= q_idx

    compressed.__cute_hash__ = f"flexnsa_compressed_{block}_{stride}"
    return compressed
