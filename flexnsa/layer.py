"""The layer that goes into a model: projections, rotary embedding, NSA, output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from flexnsa import checks
from flexnsa.composition import CompressedBranch, ImportanceSelector, SelectedBranch, SparseAttention, WindowBranch
from flexnsa.compression import Compressor, MLPCompressor, check_geometry, compress
from flexnsa.config import NSAConfig
from flexnsa.engines import Impl
from flexnsa.gating import SigmoidGate
from flexnsa.layout import check_documents, compressed_starts, document_starts
from flexnsa.rotary import rotate
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
        impl: Impl = "auto",
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(dim, num_heads, num_kv_heads, head_dim, value_dim, rope_theta)
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = num_heads, num_kv_heads, head_dim, value_dim
        self.config, self.rope_theta = config, rope_theta
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
            impl=impl,
        )

    def forward(
        self,
        x: Float[Tensor, "b t dim"],
        *,
        documents: Int[Tensor, "b t"] | None = None,
        mask_mod: MaskMod | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """Attend causally within each row, or within each document of it; or as ``mask_mod`` says.

        Args:
            x: ``[b, t, dim]``.
            documents: int ``[b, t]``, non-decreasing ids of packed documents, -1 for padding, which outputs 0.
            mask_mod: FlexAttention mask mod over tokens and query heads, in place of causality in every branch.

        Returns:
            ``[b, t, dim]``.

        Raises:
            ValueError: the arguments do not fit.
        """
        x = _checked_input(x, self.q_proj.in_features, documents)
        q, kv = self._project(x, documents)
        out = self.attention(q, kv._asdict(), x, documents=documents, mask_mod=mask_mod)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))

    def project(
        self, x: Float[Tensor, "b t dim"], *, documents: Int[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b hq t d"], BranchKV]:
        """Queries ``[b, hq, t, d]``, and keys and values of the branches, those of ``compressed`` compressed already.

        With the gates ``layer.attention.gate(x)`` these are the arguments of ``native_sparse_attention``.
        """
        return self._project(_checked_input(x, self.q_proj.in_features, documents), documents)

    def _project(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, BranchKV]:
        position, block_end = self._positions(x, documents)
        q = self._place(self.q_norm(_heads(self.q_proj(x), self.head_dim)), position)
        raw = {name: self._key_value(name, x) for name in self.k_proj}
        compressed, selected, window = (raw[name] if name in raw else raw["shared"] for name in BRANCHES)
        compressed = compress(self.compressor, *compressed, self.config, documents=documents)
        kv = zip(BRANCHES, (compressed, selected, window), (block_end, position, position), strict=True)
        return q, BranchKV(*((self._place(self.k_norm[name](k), at), v) for name, (k, v), at in kv))

    def _key_value(self, name: str, x: Tensor) -> KV:
        return _heads(self.k_proj[name](x), self.head_dim), _heads(self.v_proj[name](x), self.value_dim)

    def _place(self, x: Tensor, position: Tensor) -> Tensor:
        return x if self.rope_theta is None else rotate(x, position, self.rope_theta)

    def _positions(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Position in its document of each token, and of the last token of each compressed token's block."""
        token = torch.arange(x.shape[1], device=x.device)[None]
        last = self.config.compress_block - 1
        starts = compressed_starts(documents, self.config)
        if documents is None or starts is None:
            count = self.config.num_compressed(x.shape[1])
            return token, torch.arange(count, device=x.device)[None] * self.config.compress_stride + last
        begins = document_starts(documents)
        return token - begins, starts - begins.gather(1, starts.clamp(min=0)) + last


def _projections(names: tuple[str, ...], dim: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(dim, width, bias=False) for name in names})


def _heads(x: Tensor, dim: int) -> Tensor:
    return rearrange(x, "b t (h d) -> b h t d", d=dim)


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


def _checked_input(x: Tensor, dim: int, documents: Tensor | None) -> Tensor:
    """``x`` with padding set to 0: what it held, NaN perhaps, would reach the projections' gradients as 0 * NaN."""
    checks.check_tensor("x", x, "b t dim")
    checks.check_not_empty("x", x, "b t dim")
    if x.shape[-1] != dim:
        raise ValueError(f"x must be [b, t, dim={dim}], got shape {tuple(x.shape)}; make the layer with that dim")
    if documents is None:
        return x
    check_documents(documents, x, x.shape[1])
    return x.masked_fill(documents[..., None] < 0, 0)
