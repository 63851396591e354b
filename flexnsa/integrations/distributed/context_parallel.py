"""Context parallelism: each rank holds some queries, and gathers the keys and values of the whole sequence."""

from __future__ import annotations

import zlib
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from flexnsa import checks
from flexnsa.cache import NSACache
from flexnsa.integrations.distributed.agreement import check_alike, check_layer
from flexnsa.integrations.distributed.sequence import gather_sequence, sequence_positions
from flexnsa.layer import NativeSparseAttention
from flexnsa_masks import MaskMod


class ContextParallel(ParallelStyle):
    """Shards a ``NativeSparseAttention`` along the sequence: a plan for ``torch.distributed.tensor.parallel``.

    ``parallelize_module(model, mesh["cp"], {"layers.*.attention": ContextParallel()})``

    Afterwards the layer takes this rank's part of the sequence, ``shard_sequence(x, mesh)``, and ``documents`` of the
    whole, and returns the outputs of that part. Keys and values are all-gathered as projected, before compression, so
    that a compression block that straddles two ranks is like any other; queries know their absolute positions. The
    backward reduce-scatters the gradients of keys and values.

    A rank holds ``projections * b * hk * tk * (d + dv)`` gathered numbers for the backward (3 projections, 1 for
    ``shared_kv``): all of the keys and values, but queries, scores, selections and outputs of its own part alone. Under
    activation checkpointing they live for one layer at a time.

    A parameter's gradient on a rank is the part that its queries cause; the whole is the sum over ranks, or the mean
    where the loss is a mean over a rank's own tokens: ``fully_shard`` and DDP over the same ranks take that mean. The
    ranks must start from the same weights, which these two see to as well.

    Args:
        balanced: whether each rank holds a chunk from the head and one from the tail, see ``sequence_positions``.

    Raises:
        TypeError: the module is no ``NativeSparseAttention``.
        ValueError: the mesh has several axes, or the ranks differ in the layer or the arguments; on every rank.
        NotImplementedError: the layer is called with a cache.
    """

    def __init__(self, *, balanced: bool = True):
        self.balanced = balanced

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = check_layer(module, device_mesh, {"balanced": self.balanced})
        layer.forward = partial(self._forward, layer, device_mesh)  # type: ignore[method-assign]
        return layer

    def _forward(
        self,
        layer: NativeSparseAttention,
        mesh: DeviceMesh,
        x: Float[Tensor, "b tq dim"],
        *,
        documents: Int[Tensor, "b tk"] | None = None,
        cache: NSACache | None = None,
        mask_mod: MaskMod | None = None,
    ) -> Float[Tensor, "b tq dim"]:
        if cache is not None:
            raise NotImplementedError(
                "cache cannot be given to a context-parallel layer; decode whole rows, tensor-parallel for instance"
            )
        checks.check_tensor("x", x, "b t dim")
        if checks.values_are_checked(x):
            check_alike("the input", _outline(x, documents), mesh)
        tokens = x.shape[1] * mesh.size()
        if documents is not None and documents.shape != (x.shape[0], tokens):
            raise ValueError(
                f"documents must be [b, tk] = {(x.shape[0], tokens)}, of the whole sequence and not of this rank's "
                f"{x.shape[1]} tokens of it, got {tuple(documents.shape)}; do not shard it"
            )
        return layer.forward_part(
            x,
            positions=sequence_positions(tokens, mesh, balanced=self.balanced, device=x.device),
            gather=partial(gather_sequence, mesh=mesh, dim=2, balanced=self.balanced),
            documents=documents,
            mask_mod=mask_mod,
        )


def _outline(x: Tensor, documents: Tensor | None) -> dict[str, object]:
    """What must be alike on all ranks about one call."""
    ids = None if documents is None else (tuple(documents.shape), zlib.crc32(documents.cpu().numpy().tobytes()))
    return {"x": tuple(x.shape), "dtype": str(x.dtype), "documents (shape, checksum)": ids}
