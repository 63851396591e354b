"""The FlexAttention engine: every branch is a block mask built from geometry, or from the selection's indices.

On CUDA the call is compiled, once for the process; on a CPU FlexAttention runs eagerly and forward only, for parity.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from flexnsa.compiled import call_compiled
from flexnsa.config import NSAConfig
from flexnsa.dense import full_precision
from flexnsa.layout import KeyRange, QueryTable, compressed_starts
from flexnsa.static_masks import TILE, static_mask
from flexnsa.types import AttentionOutput, Selection
from flexnsa.visibility import at_last_token, compressed_mask
from flexnsa_masks import MaskMod, ScoreMod, and_masks, at_positions, block_mask, key_range, selected

FEW_HEADS = 32
"""KV heads of the whole batch below which dK/dV of the few compressed tokens leaves most of a GPU idle."""


def compressed_attention(
    q: Float[Tensor, "b hq tq d"],
    k_cmp: Float[Tensor, "b hk c d"],
    v_cmp: Float[Tensor, "b hk c dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the compressed tokens that end at or before the query (Eq. 7).

    Where ``table.first`` is known the mask is arithmetic, and reads no table.
    """
    _know_heads(q, k_cmp)
    count = k_cmp.shape[2]
    if count == 0:
        table, score_mod = table._replace(visible=None, mask_mod=None), None
    if table.num_tokens is None:  # those that compressed ones summarise: what lies after them is not looked at
        known = (count - 1) * config.compress_stride + config.compress_block
        seen = table._replace(num_tokens=known).masked_range(q.shape[0])
    else:
        seen = table.masked_range(q.shape[0])
    by_table = score_mod is None and (table.visible is None or seen is not None)
    if by_table:
        # Whole tiles only: no key needs a check against the end, and FlexAttention cannot index keys of length 0.
        tiles = 1 if count == 0 else -(-count // TILE)
        k_cmp, v_cmp = (F.pad(x, (0, 0, 0, tiles * TILE - count)) for x in (k_cmp, v_cmp))
    shared = (table.position if seen is None else seen.last).shape[0] == 1
    if by_table and shared and _starved(q, k_cmp, v_cmp):
        return _by_head(q, k_cmp, v_cmp, table, config, seen, scale)
    if score_mod is not None:
        starts = compressed_starts(table.documents, config)
        score_mod = _placed(at_last_token(score_mod, starts, config), table, group=1)
    mask, static = _compressed_mask(q, k_cmp, table, config, seen), _is_static(table) and score_mod is None
    return _attend(q, k_cmp, v_cmp, mask, score_mod, scale, static=static, runs=static)


def _is_static(table: QueryTable) -> bool:
    """Whether the mask follows from the lengths, and from where the queries begin."""
    return table.first is not None and not table.packed and table.visible is None


def _compressed_mask(
    q: Tensor,
    k_cmp: Tensor,
    table: QueryTable,
    config: NSAConfig,
    seen: KeyRange | None,
    *,
    repeat: int = 1,
) -> BlockMask:
    if seen is not None:
        return _mask(key_range(*table.compressed_range(config, seen)), q, k_cmp, repeat=repeat)
    if table.visible is not None:
        starts = compressed_starts(table.documents, config)
        lifted = compressed_mask(table.visible, starts, config, table.num_tokens)
        return _mask(at_positions(lifted, table.position), q, k_cmp)
    if _is_static(table):
        assert table.first is not None
        sizes = (config.compress_block, config.compress_stride)
        return static_mask("compressed", sizes, table.position, k_cmp.shape[2], first=table.first, repeat=repeat)
    return _mask(key_range(*table.compressed_range(config)), q, k_cmp, repeat=repeat)


def window_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the last ``window`` keys (section 3.3.3); ``table.first`` as in ``compressed_attention``."""
    _know_heads(q, k)
    if _is_static(table):
        assert table.first is not None
        mask = static_mask("sliding_window", (config.window,), table.position, k.shape[2], first=table.first)
    else:
        seen = table.masked_range(q.shape[0])
        mask_mod = key_range(*table.window_range(config, seen))
        if table.visible is not None and seen is None:
            mask_mod = and_masks(mask_mod, at_positions(table.visible, table.position))
        mask = _mask(mask_mod, q, k)
    static = _is_static(table) and score_mod is None
    score_mod = None if score_mod is None else _placed(score_mod, table, group=1)
    return _attend(q, k, v, mask, score_mod, scale, static=static)


def selected_attention(
    q: Float[Tensor, "b hq tq d"],
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    selection: Selection,
    table: QueryTable,
    config: NSAConfig,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
) -> AttentionOutput:
    """Attention to the visible tokens of the selected blocks (Eq. 11 and 12).

    The heads of a group share their blocks, so they are folded into the query axis (row = token * g + head): a tile of
    rows then spans few tokens, and the union of their blocks stays small.
    """
    _know_heads(q, k)
    group = q.shape[1] // k.shape[1]
    member = selected(
        selection.indices,
        config.select_block,
        num_blocks=config.num_blocks(k.shape[2]),
        start=table.start if table.packed else None,
        group=group,
    )
    interval = table.causal_range() if table.visible is None else table.masked_range(q.shape[0])
    if interval is not None:
        seen = key_range(*interval, group=group)
    else:
        assert table.visible is not None
        seen = _placed_mask(table.visible, table, group)
    if score_mod is not None:
        score_mod = _placed(score_mod, table, group)
    rows = rearrange(q, "b (hk g) t d -> b hk (t g) d", hk=k.shape[1])  # the same symbol as k's: Inductor divides them
    mask = _mask(and_masks(member, seen), rows, k)
    out, lse = _attend(rows, k, v, mask, score_mod, scale, lookup=True)
    return AttentionOutput(
        rearrange(out, "b hk (t g) d -> b (hk g) t d", g=group), rearrange(lse, "b hk (t g) -> b (hk g) t", g=group)
    )


def _know_heads(q: Tensor, k: Tensor) -> None:
    """Make constants of the heads in a graph of all sizes: lowered, FlexAttention looks at the bits of their ratio."""
    if torch.compiler.is_compiling():
        operator.index(q.shape[1])
        operator.index(k.shape[1])


def _starved(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there will be a backward with too few programs for dK and dV, one for each KV head and tile of keys."""
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return differentiated and q.shape[1] > k.shape[1] and k.shape[0] * k.shape[1] < FEW_HEADS


def _by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: QueryTable,
    config: NSAConfig,
    seen: KeyRange | None,
    scale: float,
) -> AttentionOutput:
    """The heads of a group along the batch, over one K and V: each adds up dK and dV of its own, summed at the end."""
    batch, group = q.shape[0], q.shape[1] // k.shape[1]
    mask = _compressed_mask(q, k, table, config, seen, repeat=group)
    # b (hk g) t d -> g (b hk) t d and back; einops takes longer than such a call can spare.
    q = q.unflatten(1, (-1, group)).movedim(2, 0).flatten(1, 2)
    k, v = (x.flatten(0, 1)[None] for x in (k, v))
    static = _is_static(table)
    output = _attend(q, k, v, mask, None, scale, static=static, runs=static)
    out, lse = (x.unflatten(1, (batch, -1)).movedim(0, 2).flatten(1, 2) for x in output)
    return AttentionOutput(out, lse)


def _place(table: QueryTable, group: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(b, h, row) -> (query head, position)`` where the heads of a group are folded into the query axis."""
    shared = table.position.shape[0] == 1

    def place(b: Tensor, h: Tensor, q_idx: Tensor) -> tuple[Tensor, Tensor]:
        row = q_idx.to(torch.int64)
        return h * group + row % group, table.position[torch.zeros_like(b) if shared else b, row // group]

    return place


def _placed_mask(mask_mod: MaskMod, table: QueryTable, group: int) -> MaskMod:
    """A mask mod over query heads and positions, asked about folded rows. It carries no geometry."""
    place = _place(table, group)

    def placed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head, position = place(b, h, q_idx)
        return (position >= 0) & mask_mod(b, head, position.clamp(min=0), kv_idx)

    return placed


def _placed(score_mod: ScoreMod, table: QueryTable, group: int) -> ScoreMod:
    """A score mod over query heads and positions, asked about folded rows."""
    place = _place(table, group)

    def placed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head, position = place(b, h, q_idx)
        return score_mod(score, b, head, position.clamp(min=0), kv_idx)

    return placed


def _mask(mask_mod: MaskMod, q: Tensor, k: Tensor, *, repeat: int = 1) -> BlockMask:
    """Of a call with queries ``q`` and keys ``k``, whose batch and heads are checked unless the tables are repeated."""
    sizes: dict[str, int] = {} if repeat > 1 else {"batch": q.shape[0], "heads": q.shape[1]}
    lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
    return block_mask(mask_mod, **lengths, **sizes, block_size=TILE, device=q.device, repeat=repeat)


@full_precision
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float,
    *,
    lookup: bool = False,
    static: bool = False,
    runs: bool = False,
) -> AttentionOutput:
    if not torch.is_grad_enabled():  # On a CPU FlexAttention refuses tensors that require grad even then.
        q, k, v = q.detach(), k.detach(), v.detach()
    out, aux = _attention_function(q)(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_options(q, k, v, lookup, static, runs),
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return AttentionOutput(out, aux.lse)


def _options(q: Tensor, k: Tensor, v: Tensor, lookup: bool, static: bool, runs: bool) -> FlexKernelOptions | None:
    """Options of FlexAttention's kernels; ``lookup`` where the mask mod looks up a word for each pair.

    The lookup is pipelined with K and V. At FlexAttention's three stages that is too much for an H200's shared memory
    in 16 bits: by 1 KiB in the backward at d = 128, and by 17 KiB in the forward at d = 64, whose tiles are wider.

    ``static`` where the mask mod is arithmetic: with nothing else in shared memory, two programs of 64 queries and 64
    keys a step share a multiprocessor of Hopper's at d = 128, and are 5% faster forward than one of 128 by 128.

    ``runs`` where the tiles that are visited lie side by side, those to mask and the others, as long as the lengths are
    of whole tiles: the backward then looks up the first alone, and is 5% faster.
    """
    if q.device.type != "cuda":
        return None
    # Named, since "AUTO" guards on fewer than 128 queries, compiles anew for them, and may then find no kernel.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if not torch.compiler.is_compiling() and q.shape[2] % TILE == 0 and k.shape[2] % TILE == 0:
        # The graph of all lengths checks every key against the end; lengths of whole tiles get one that need not.
        options["IS_DIVISIBLE"] = True
        if runs:
            options["bwd_BLOCKS_ARE_CONTIGUOUS"] = True
    if lookup:
        options["bwd_num_stages"] = 2
        if q.shape[3] <= 64:
            options["fwd_num_stages"] = 2
    if static and q.shape[3] == 128 and v.shape[3] <= 128 and q.element_size() == 2 and _is_hopper(q):
        options |= {"fwd_BLOCK_M": TILE // 2, "fwd_BLOCK_N": TILE // 2, "fwd_num_warps": 4, "fwd_num_stages": 3}
    return cast(FlexKernelOptions, options)


def _is_hopper(q: Tensor) -> bool:
    return torch.cuda.get_device_properties(q.device).major == 9


def _attention_function(q: Tensor) -> Callable[..., tuple[Tensor, AuxOutput]]:
    if torch.compiler.is_compiling():
        return flex_attention
    return functools.partial(call_compiled, flex_attention) if q.device.type == "cuda" else _eager_flex_attention


def _eager_flex_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, AuxOutput]:
    with warnings.catch_warnings():  # It says on each call that it is slow, which is why "auto" avoids it here.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)
