"""The layer that goes into a model: projections, rotary embedding, NSA, output projection."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from flexnsa import checks
from flexnsa.branches import CompressedBranch, ImportanceSelector, SelectedBranch, WindowBranch
from flexnsa.cache import (
    Append,
    Blocks,
    NSACache,
    attend_to_cache,
    check_cache,
    check_cache_dtype,
    takes_kernels,
)
from flexnsa.composition import SparseAttention
from flexnsa.compression import Compressor, MLPCompressor, check_geometry, compress
from flexnsa.config import NSAConfig
from flexnsa.engines import Impl
from flexnsa.gating import SigmoidGate, check_recompute
from flexnsa.layout import check_documents, compressed_starts, document_starts, resolve_positions
from flexnsa.rotary import Rotate, rotation, steps, tabulated
from flexnsa.types import KV, BranchKV
from flexnsa_masks import MaskMod

BRANCHES = BranchKV._fields


class NativeSparseAttention(nn.Module):
    """Causal self-attention by NSA, in place of a transformer's attention layer.

    >>> layer = NativeSparseAttention(dim=64, num_heads=4, num_kv_heads=2, head_dim=16, config=NSAConfig())
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])

    With ``rope_theta`` queries and keys are rotated by their position in the document. Keys are compressed before they
    are rotated, so that the pooling sees no phases; a compressed key is then rotated as its block's last token, the one
    with which it becomes visible. With ``qk_norm`` queries, compressed keys and the other branches' keys are
    RMS-normalised before the rotation, with a weight for each branch.

    Args:
        dim: width of the input and the output.
        num_heads: query heads hq, a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads hk; the heads of one group share their selection.
        head_dim: key dim d.
        value_dim: value dim dv, None for ``head_dim``.
        config: the geometry.
        compressor: makes the compressed tokens; None for an ``MLPCompressor``.
        shared_kv: one key and value projection for all branches instead of one for each (paper, section 3.3.3).
        rope_theta: base of the rotary embedding, None for none.
        qk_norm: whether to normalise queries and keys.
        compress_rotated: whether to compress keys after norm and rotation, each at its own position, instead of before:
            the mean of a block then scores as the block's tokens do on average.
        recompute: ``("window",)`` or ``("selected", "window")``: branches whose output is not kept for the backward
            but computed again there: 2 bytes a token, query head and value dim less in 16 bits for each.
        impl: the engine of every stage.

    Raises:
        ValueError: the sizes do not fit one another, or the compressor was made for another geometry.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        config: NSAConfig,
        compressor: Compressor | None = None,
        shared_kv: bool = False,
        rope_theta: float | None = None,
        qk_norm: bool = False,
        compress_rotated: bool = False,
        recompute: Collection[str] = (),
        impl: Impl = "auto",
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(dim, num_heads, num_kv_heads, head_dim, value_dim, rope_theta)
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = num_heads, num_kv_heads, head_dim, value_dim
        self.config, self.rope_theta, self.compress_rotated = config, rope_theta, compress_rotated
        check_recompute(recompute, BRANCHES[1:])
        projections = ("shared",) if shared_kv else BRANCHES
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = _projections(projections, dim, num_kv_heads * head_dim)
        self.v_proj = _projections(projections, dim, num_kv_heads * value_dim)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=False)
        self.q_norm = _HeadNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.ModuleDict({name: _HeadNorm(head_dim) if qk_norm else nn.Identity() for name in BRANCHES})
        if compressor is None:
            compressor = MLPCompressor(config, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        check_geometry(compressor, config)
        self.compressor = compressor
        self.attention = SparseAttention(
            dict(zip(BRANCHES, (CompressedBranch(config), SelectedBranch(config), WindowBranch(config)), strict=True)),
            gate=SigmoidGate(dim, num_heads, len(BRANCHES)),
            selector=ImportanceSelector(config),
            recompute=recompute,
            impl=impl,
        )

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        *,
        documents: Int[Tensor, "b t"] | None = None,
        cache: NSACache | None = None,
        mask_mod: MaskMod | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """Attend causally within each row, or within each document of it; or as ``mask_mod`` says.

        With a ``cache`` x continues the rows that it holds: a prompt, a chunk of any length or one token. The tokens
        attend to those of earlier calls and are added to them. Any way of cutting a sequence into calls gives what one
        call with all of it gives.

        Args:
            x: ``[b, t, dim]``.
            documents: int ``[b, t]``, non-decreasing ids of packed documents, -1 for padding, which outputs 0. With a
                cache the ids are 0 or -1, and a row's padding, on either side, is not added to the row.
            cache: from ``new_cache``. Tokens of earlier calls are constants: gradients reach those of this call alone.
            mask_mod: FlexAttention mask mod over tokens and query heads, in place of causality in every branch; not
                with a cache.

        Returns:
            ``[b, t, dim]``.

        Raises:
            TypeError: ``cache`` is not an ``NSACache``.
            ValueError: the arguments do not fit, or the cache cannot hold the tokens, and is left as it was.
            NotImplementedError: ``mask_mod`` with a cache, or what the engine asked for cannot do.
        """
        x = _checked_input(x, self.q_proj.in_features, documents)
        if cache is not None:
            if mask_mod is not None:
                raise NotImplementedError(
                    "mask_mod cannot be given with a cache, which is causal; leave one of them out"
                )
            return self._forward_cached(x, cache, documents)
        q, kv = self._project(x, documents)
        out = self.attention(q, kv._asdict(), x, documents=documents, mask_mod=mask_mod)
        return self._output(out)

    def forward_part(
        self,
        x: Float[Tensor, "b tq dim"],
        *,
        positions: Int[Tensor, "*b tq"],
        gather: Callable[[Tensor], Tensor],
        documents: Int[Tensor, "b tk"] | None = None,
        mask_mod: MaskMod | None = None,
    ) -> Float[Tensor, "b tq dim"]:
        """``forward`` for some rows of a sequence whose other rows are elsewhere, on other ranks.

        Args:
            x: these rows of the sequence, ``[b, tq, dim]``.
            positions: int64 ``[tq]`` or ``[b, tq]``, where they stand in it, strictly increasing.
            gather: makes keys or values of the whole sequence, ``[b, hk, tk, d]``, of those of these rows,
                ``[b, hk, tq, d]``; called once for every projection, before compression, norm and rotation.
            documents: int ``[b, tk]``, of the whole sequence.
            mask_mod: as in ``forward``, over token numbers of the whole sequence.

        Returns:
            ``[b, tq, dim]``.

        Raises:
            ValueError: the arguments do not fit.
        """
        checks.check_tensor("x", x, "b tq dim")
        rows = resolve_positions(positions, x[:, None], None if documents is None else documents.shape[-1])
        x = _checked_input(x, self.q_proj.in_features, documents, rows)
        q, kv = self._project(x, documents, rows, gather)
        out = self.attention(q, kv._asdict(), x, positions=positions, documents=documents, mask_mod=mask_mod)
        return self._output(out)

    def new_cache(
        self,
        batch: int,
        max_tokens: int,
        max_rollback: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NSACache:
        """An empty cache for this layer, everything allocated.

        Args:
            batch: rows.
            max_tokens: tokens that a row can hold.
            max_rollback: how many of the latest tokens ``crop`` can drop.
            device: None for that of the layer's parameters.
            dtype: of keys and values, None for that of the layer's parameters, or autocast's where it is on.

        Raises:
            TypeError: a size is not an int.
            ValueError: a size is out of range.
        """
        weight = self.q_proj.weight
        device = weight.device if device is None else torch.device(device)
        return NSACache(
            self.config,
            batch,
            max_tokens,
            max_rollback,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            device=device,
            dtype=_projected_dtype(weight, device) if dtype is None else dtype,
        )

    def project(
        self, x: Float[Tensor, "b t dim"], *, documents: Int[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b hq t d"], BranchKV]:
        """Queries ``[b, hq, t, d]``, and keys and values of the branches, those of ``compressed`` compressed already.

        With the gates ``layer.attention.gate(x)`` these are the arguments of ``native_sparse_attention``.
        """
        return self._project(_checked_input(x, self.q_proj.in_features, documents), documents)

    def _project(
        self,
        x: Tensor,
        documents: Tensor | None,
        rows: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, BranchKV]:
        projected = {name: self._key_value(name, x) for name in self.k_proj}
        if gather is not None:
            projected = {name: (gather(k), gather(v)) for name, (k, v) in projected.items()}
        raw, selected, window = _by_branch(projected)
        position, block_end = self._positions(raw[0], documents)
        if rows is not None:
            resolve_positions(rows, x[:, None], raw[0].shape[2])  # only now is the number of tokens known
        rotate = self._rotation(x, position)
        q = self._query(x, rotate if rows is None else self._rotation(x, _at(tabulated(position, x.device), rows)))
        compressed = compress(self.compressor, *self._before(raw, rotate), self.config, documents=documents)
        return q, BranchKV(
            self._after(compressed, block_end),
            self._key("selected", selected, rotate),
            self._key("window", window, rotate),
        )

    def _forward_cached(self, x: Tensor, cache: NSACache, documents: Tensor | None) -> Tensor:
        check_cache(cache, x, self.config, (self.num_kv_heads, self.head_dim, self.value_dim))
        append = Append(cache, x.shape[1], documents)
        x = append.pack(x)
        rotate = self._rotation(x, append.places)
        q = self._query(x, rotate)
        raw, *others = _by_branch({name: self._key_value(name, x) for name in self.k_proj})
        raw = self._before(raw, rotate)
        check_cache_dtype(cache, q)
        selected, window = (self._key(name, kv, rotate) for name, kv in zip(BRANCHES[1:], others, strict=True))
        blocks = append.blocks(raw)
        compressed = None if blocks is None else self._compressed(blocks)
        if takes_kernels(self.attention, q, cache):
            gates = self.attention.gate(x).to(q.dtype)
            append.store(blocks, compressed, selected)
            append.commit(raw, window)
            out = attend_to_cache(q, gates, cache)
        else:
            kv = append.extend(blocks, compressed, selected, window)
            out = self.attention(q, kv._asdict(), x, positions=append.positions())
            append.commit(raw, window)
        return append.unpack(self._output(out))

    def _compressed(self, blocks: Blocks) -> KV:
        compressed = compress(self.compressor, blocks.k, blocks.v, self.config, starts=blocks.starts)
        return self._after(compressed, blocks.ends(self.config))

    def _output(self, out: Tensor) -> Tensor:
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _query(self, x: Tensor, rotate: Rotate) -> Tensor:
        return rotate(self.q_norm(_heads(self.q_proj(x), self.head_dim)))

    def _key(self, name: str, kv: KV, rotate: Rotate) -> KV:
        return rotate(self.k_norm[name](kv[0])), kv[1]

    def _before(self, raw: KV, rotate: Rotate) -> KV:
        """What the compressor takes."""
        return self._key("compressed", raw, rotate) if self.compress_rotated else raw

    def _after(self, compressed: KV, block_end: Tensor | range) -> KV:
        """What the queries meet."""
        if self.compress_rotated:
            return compressed
        return self._key("compressed", compressed, self._rotation(compressed[0], block_end))

    def _key_value(self, name: str, x: Tensor) -> KV:
        return _heads(self.k_proj[name](x), self.head_dim), _heads(self.v_proj[name](x), self.value_dim)

    def _rotation(self, like: Tensor, positions: Tensor | range) -> Rotate:
        """The rotary embedding of tokens at these positions, for queries and keys as exact as ``like``."""
        if self.rope_theta is None:
            return lambda x: x
        return rotation(positions, self.head_dim, self.rope_theta, like)

    def _positions(self, k: Tensor, documents: Tensor | None) -> tuple[Tensor | range, Tensor | range]:
        """Position in its document of each token, and of the last token of each compressed token's block."""
        last = self.config.compress_block - 1
        starts = compressed_starts(documents, self.config)
        if documents is None or starts is None:
            count, stride = self.config.num_compressed(k.shape[2]), self.config.compress_stride
            return steps(k.shape[2], 0, 1, k.device), steps(count, last, stride, k.device)
        begins = document_starts(documents)
        token = torch.arange(k.shape[2], device=k.device)[None]
        return token - begins, starts - begins.gather(1, starts.clamp(min=0)) + last


def _projections(names: tuple[str, ...], dim: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(dim, width, bias=False) for name in names})


def _by_branch(projected: dict[str, KV]) -> list[KV]:
    return [projected[name] if name in projected else projected["shared"] for name in BRANCHES]


def _projected_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """What a linear map by ``weight`` returns: autocast leaves float64 alone."""
    autocast = torch.is_autocast_enabled(device.type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if autocast else weight.dtype


def _heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // dim, dim)).transpose(1, 2)


class _HeadNorm(nn.RMSNorm):
    """RMS norm over a head that keeps its input's dtype, under autocast too."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps).to(x.dtype)


def _check_sizes(
    dim: int, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, rope_theta: float | None
) -> None:
    sizes = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in (sizes | {"value_dim": value_dim}).items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}; raise it")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        )
    if rope_theta is not None and head_dim % 2:
        raise ValueError(f"head_dim must be even for a rotary embedding, got {head_dim}; raise it")
    if rope_theta is not None and not rope_theta > 0:
        raise ValueError(f"rope_theta must be above 0, got {rope_theta}; pass None for no rotary embedding")


def _checked_input(x: Tensor, dim: int, documents: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """``x`` with padding set to 0: what it held, NaN perhaps, would reach the projections' gradients as 0 * NaN.

    ``rows`` says where the tokens of ``x`` stand among the documents', None where they are the same.
    """
    checks.check_tensor("x", x, "b t dim")
    checks.check_not_empty("x", x, "b t dim")
    if x.shape[-1] != dim:
        raise ValueError(f"x must be [b, t, dim={dim}], got shape {tuple(x.shape)}; make the layer with that dim")
    if documents is None:
        return x
    check_documents(documents, x, x.shape[1] if rows is None else documents.shape[-1])
    return x.masked_fill((documents if rows is None else _at(documents, rows))[..., None] < 0, 0)


def _at(table: Tensor, rows: Tensor) -> Tensor:
    """``table [b|1, t]`` at ``rows [b|1, tq]``."""
    batch = max(table.shape[0], rows.shape[0])
    return table.expand(batch, -1).gather(1, rows.expand(batch, -1))
