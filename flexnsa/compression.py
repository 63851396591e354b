"""Compression: every block of ``compress_block`` tokens becomes one key and one value (paper, section 3.3.1, Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from flexnsa.checks import check_tensor, known_finite
from flexnsa.config import NSAConfig
from flexnsa.layout import compressed_starts
from flexnsa.types import accumulator

Compressor = Callable[..., tuple[Tensor, Tensor]]
"""Anything called as ``compressor(k, v, starts=...)`` that returns compressed keys and values."""


Mark = Callable[[Tensor], Tensor]
"""Makes NaN of pooled blocks that hold what is not finite."""


def compress(
    compressor: Compressor | None,
    k: Float[Tensor, "b hk tk d"],
    v: Float[Tensor, "b hk tk dv"],
    config: NSAConfig,
    *,
    documents: Int[Tensor, "b tk"] | None = None,
    starts: Int64[Tensor, "b c"] | None = None,
) -> tuple[Float[Tensor, "b hk c d"], Float[Tensor, "b hk c dv"]]:
    """Compressed keys and values by ``compressor``, which starts anew in each document; k and v as they are for None.

    ``starts`` says which blocks instead: the first token of each, -1 for none.

    Raises:
        ValueError: the compressor was made for another geometry, or returns another number of compressed tokens.
    """
    if compressor is None:
        return k, v
    check_geometry(compressor, config)
    count = config.num_compressed(k.shape[2]) if starts is None else starts.shape[1]
    starts = compressed_starts(documents, config) if starts is None else starts
    k_cmp, v_cmp = compressor(k, v, starts=starts)
    expected = (*k.shape[:2], count)
    for name, x, raw in (("keys", k_cmp, k), ("values", v_cmp, v)):
        if tuple(x.shape) != (*expected, raw.shape[3]):
            raise ValueError(
                f"compressor must return {name} of shape {(*expected, raw.shape[3])}, got {tuple(x.shape)}; one "
                f"compressed token for each whole block"
            )
    return k_cmp, v_cmp


def check_geometry(compressor: Compressor, config: NSAConfig) -> None:
    """A compressor that says for which geometry it was made, was made for this one.

    Raises:
        ValueError: it was made for another.
    """
    made_for = getattr(compressor, "config", None)
    if not isinstance(made_for, NSAConfig):
        return
    for name in ("compress_block", "compress_stride"):
        if getattr(made_for, name) != getattr(config, name):
            raise ValueError(
                f"compressor was made for {name}={getattr(made_for, name)}, but config has "
                f"{name}={getattr(config, name)}; make both from one config"
            )


class BlockCompressor(nn.Module):
    """Base of the compressors: gathers the blocks; a subclass writes ``pool``.

    Args:
        config: the geometry, of which ``compress_block`` and ``compress_stride`` matter here.
    """

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.config = config

    def pool(
        self, k_blocks: Float[Tensor, "b hk c l d"], v_blocks: Float[Tensor, "b hk c l dv"]
    ) -> tuple[Float[Tensor, "b hk c d"], Float[Tensor, "b hk c dv"]]:
        """One key and one value for each block (the paper's phi)."""
        raise NotImplementedError(f"{type(self).__name__} must define pool(k_blocks, v_blocks) -> (k_cmp, v_cmp)")

    def forward(
        self,
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        *,
        starts: Int64[Tensor, "b c"] | None = None,
    ) -> tuple[Float[Tensor, "b hk c d"], Float[Tensor, "b hk c dv"]]:
        """Compress keys ``[b, hk, tk, d]`` and values ``[b, hk, tk, dv]``.

        Args:
            k: keys of raw tokens.
            v: values of raw tokens.
            starts: int64 ``[b, c]``, first token of each block, -1 for a slot that holds none and is then 0; None
                for ``i * compress_stride``.

        Returns:
            ``(k_cmp, v_cmp)`` with axis c in place of tk. A block that holds a NaN or an infinity is NaN, and it
            reaches no parameter's gradient while no query sees it.
        """
        check_tensor("k", k, "b hk tk d")
        check_tensor("v", v, "b hk tk dv")
        k_blocks, k_mark = self._gather(k, starts)
        v_blocks, v_mark = self._gather(v, starts)
        k_cmp, v_cmp = self.pool(k_blocks, v_blocks)
        return _restore(k_mark(k_cmp.to(k.dtype)), starts), _restore(v_mark(v_cmp.to(v.dtype)), starts)

    def _gather(self, x: Tensor, starts: Tensor | None) -> tuple[Tensor, Mark]:
        """Blocks ``[b, hk, c, l, d]``, and what makes NaN of those pooled ones that hold a row that is not finite."""
        if known_finite(x):
            return self._blocks(x, starts), _unmarked
        if not torch.is_grad_enabled():
            # No gradient to keep anything from, and a sum is cheaper than a choice: 0 times what is not finite is NaN.
            blocks = self._blocks(x, starts)
            largest = torch.linalg.vector_norm(blocks, torch.inf, (-2, -1))[..., None]
            return blocks, lambda pooled: pooled.add(largest, alpha=0)
        finite = x.isfinite().all(-1, keepdim=True)
        whole = self._blocks(finite, starts).all(-2)
        return self._blocks(x.where(finite, 0), starts), lambda pooled: pooled.where(whole, torch.nan)

    def _blocks(self, x: Tensor, starts: Tensor | None) -> Tensor:
        length, stride = self.config.compress_block, self.config.compress_stride
        if starts is None:
            count = self.config.num_compressed(x.shape[2])
            if count == 0:
                return x[:, :, :0, None].expand(-1, -1, -1, length, -1)
            return x.unfold(2, length, stride).movedim(-1, 3)
        tokens = starts.clamp(min=0)[..., None] + torch.arange(length, device=x.device)
        index = tokens.clamp(max=x.shape[2] - 1).flatten(1)[:, None, :, None]
        gathered = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
        return gathered.unflatten(2, (starts.shape[1], length))


def _unmarked(pooled: Tensor) -> Tensor:
    return pooled


def _restore(pooled: Tensor, starts: Tensor | None) -> Tensor:
    return pooled if starts is None else pooled.where(starts[:, None, :, None] >= 0, 0)


class MeanPool(BlockCompressor):
    """The mean of each block: no parameters. A block that holds an infinity is infinite here, or NaN.

    >>> k = torch.arange(6.0).reshape(1, 1, 6, 1)
    >>> k_cmp, v_cmp = MeanPool(NSAConfig(compress_block=4, compress_stride=2, select_block=4))(k, k)
    >>> k_cmp.flatten()
    tensor([1.5000, 3.5000])
    """

    def pool(
        self, k_blocks: Float[Tensor, "b hk c l d"], v_blocks: Float[Tensor, "b hk c l dv"]
    ) -> tuple[Float[Tensor, "b hk c d"], Float[Tensor, "b hk c dv"]]:
        """The mean over the block's tokens."""
        return k_blocks.mean(-2), v_blocks.mean(-2)

    def _gather(self, x: Tensor, starts: Tensor | None) -> tuple[Tensor, Mark]:
        """Blocks as they are: their mean is NaN or infinite where they are, and sends nothing back to parameters.

        Blocks that overlap by whole strides are made of the strides' means: each token is then read once.
        """
        length, stride = self.config.compress_block, self.config.compress_stride
        count, strides = self.config.num_compressed(x.shape[2]), length // stride
        if starts is not None or length % stride or count == 0 or type(self).pool is not MeanPool.pool:
            return self._blocks(x, starts), _unmarked
        parts = x[:, :, : (count + strides - 1) * stride].unflatten(2, (-1, stride))
        return parts.mean(3, dtype=accumulator(x)).unfold(2, strides, 1).movedim(-1, 3), _unmarked


class _PerHead(BlockCompressor):
    """A compressor with parameters of its own for keys, for values, and for each KV head."""

    def __init__(self, config: NSAConfig, *, num_kv_heads: int, head_dim: int, value_dim: int | None = None):
        super().__init__(config)
        value_dim = head_dim if value_dim is None else value_dim
        self.num_kv_heads = num_kv_heads
        for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}; raise it")
        self.k_pool = self.make_pool(num_kv_heads, head_dim)
        self.v_pool = self.make_pool(num_kv_heads, value_dim)

    def make_pool(self, heads: int, dim: int) -> nn.Module:
        raise NotImplementedError

    def pool(
        self, k_blocks: Float[Tensor, "b hk c l d"], v_blocks: Float[Tensor, "b hk c l dv"]
    ) -> tuple[Float[Tensor, "b hk c d"], Float[Tensor, "b hk c dv"]]:
        """Keys and values each through their own map."""
        if k_blocks.shape[1] != self.num_kv_heads:
            raise ValueError(
                f"k must have the {self.num_kv_heads} KV heads that {type(self).__name__} was made for, got "
                f"{k_blocks.shape[1]}; pass num_kv_heads={k_blocks.shape[1]} to it"
            )
        return self.k_pool(k_blocks), self.v_pool(v_blocks)


class MLPCompressor(_PerHead):
    """The paper's phi: an MLP over the block's tokens with intra-block position embeddings, per KV head.

    ``phi(x) = W2 . gelu(W1 . vec(x + e) + b1) + b2`` with ``x`` of ``compress_block`` tokens and ``e`` one learned
    vector for each place in the block.

    Args:
        config: the geometry.
        num_kv_heads: KV heads, each with its own parameters.
        head_dim: key dim d.
        value_dim: value dim dv; None for ``head_dim``.
        hidden: hidden units of the MLP; None for the dim of what it compresses.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        hidden: int | None = None,
    ):
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}; raise it or pass None")
        self.hidden = hidden
        super().__init__(config, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)

    def make_pool(self, heads: int, dim: int) -> nn.Module:
        """The MLP of keys or of values."""
        return _HeadMLP(heads, self.config.compress_block, dim, dim if self.hidden is None else self.hidden)


class GatedPool(_PerHead):
    """A weighted mean: each token's weight is a softmax over the block of a learned linear score plus a learned bias.

    Args:
        config: the geometry.
        num_kv_heads: KV heads, each with its own parameters.
        head_dim: key dim d.
        value_dim: value dim dv; None for ``head_dim``.
    """

    def make_pool(self, heads: int, dim: int) -> nn.Module:
        """The weighting of keys or of values."""
        return _HeadWeights(heads, self.config.compress_block, dim)


class LinearCompressor(_PerHead):
    """A learned linear map of the whole block, as a convolution with stride: starts as the mean.

    Args:
        config: the geometry.
        num_kv_heads: KV heads, each with its own kernel.
        head_dim: key dim d.
        value_dim: value dim dv; None for ``head_dim``.
    """

    def make_pool(self, heads: int, dim: int) -> nn.Module:
        """The kernel of keys or of values."""
        return _HeadConvolution(heads, self.config.compress_block, dim)


class _HeadMLP(nn.Module):
    def __init__(self, heads: int, length: int, dim: int, hidden: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(heads, 1, length, dim))
        self.up = nn.Parameter(torch.empty(heads, length * dim, hidden))
        self.up_bias = nn.Parameter(torch.empty(heads, 1, hidden))
        self.down = nn.Parameter(torch.empty(heads, hidden, dim))
        self.down_bias = nn.Parameter(torch.empty(heads, 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position, std=0.02)
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.up_bias, self.down_bias):
            nn.init.zeros_(bias)

    def forward(self, blocks: Tensor) -> Tensor:
        flat = (blocks + self.position).flatten(-2)
        hidden = nn.functional.gelu(flat @ self.up + self.up_bias)
        return hidden @ self.down + self.down_bias


class _HeadWeights(nn.Module):
    def __init__(self, heads: int, length: int, dim: int):
        super().__init__()
        self.score = nn.Parameter(torch.empty(heads, 1, dim, 1))
        self.bias = nn.Parameter(torch.empty(heads, 1, length, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.score)
        nn.init.zeros_(self.bias)

    def forward(self, blocks: Tensor) -> Tensor:
        weights = (blocks @ self.score + self.bias).softmax(-2)
        return (weights * blocks).sum(-2)


class _HeadConvolution(nn.Module):
    def __init__(self, heads: int, length: int, dim: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(heads, length, dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # No writing through a view: it is lost where the kernel is a DTensor.
        with torch.no_grad():
            self.kernel.copy_(torch.full_like(self.kernel, 1 / self.kernel.shape[1]).tril().triu())

    def forward(self, blocks: Tensor) -> Tensor:
        return einsum(blocks, self.kernel, "b h c l d, h l d e -> b h c e")
