"""What every rank checks: sharded layers equal the same layer in one process. Run by test_distributed.py.

On the default device, which is a CPU with gloo or a GPU of the rank's own with NCCL.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import ranks
from conftest import TOLERANCE, geometries, packed_rows
from flexnsa import (
    GatedPool,
    LinearCompressor,
    MeanPool,
    NativeSparseAttention,
    NSAConfig,
    debug,
    documents_from_lengths,
)
from flexnsa.integrations.distributed import (
    ContextParallel,
    KVGroupParallel,
    gather_sequence,
    sequence_positions,
    shard_sequence,
)

CONFIG = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=5)
TOKENS = 32
PACKED = documents_from_lengths([[9, 14], [TOKENS]], TOKENS)
SIZES = {"num_kv_heads": 4, "head_dim": 4, "value_dim": 3}
VARIANTS = {
    "plain": {},
    "rope+qk_norm": {"rope_theta": 100.0, "qk_norm": True},
    "shared_kv+mean": {"shared_kv": True, "rope_theta": 100.0, "compressor": MeanPool(CONFIG)},
    "gated pool": {"qk_norm": True, "compressor": GatedPool(CONFIG, **SIZES)},
    "linear": {"compressor": LinearCompressor(CONFIG, **SIZES)},
}
EVERYTHING = VARIANTS["rope+qk_norm"]


def build(config: NSAConfig = CONFIG, **options) -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(**{"dim": 12, "num_heads": 8, "config": config, **SIZES, **copy.deepcopy(options)})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.to(torch.get_default_device(), torch.float64)


def normal(*shape: int, seed: int = 1) -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
    return here(drawn)


def here(x: Tensor) -> Tensor:
    """On this rank's device."""
    return x.to(torch.get_default_device())


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh(torch.get_default_device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def everyone(name: str) -> DeviceMesh:
    return mesh_of(**{name: dist.get_world_size()})


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(whole(found[name]), x, **TOLERANCE[x.dtype], msg=lambda text, n=name: f"{n}: {text}")


class Case:
    """A layer in one process, its input, and what one backward of ``mean(out * weight)`` leaves behind."""

    def __init__(self, config: NSAConfig = CONFIG, batch: int = 2, tokens: int = TOKENS, options=EVERYTHING, **call):
        call = {name: here(x) if isinstance(x, Tensor) else x for name, x in call.items()}
        self.layer, self.call = build(config, **options), call
        self.x, self.weight = normal(batch, tokens, 12), normal(batch, tokens, 12, seed=2)
        self.out, self.dx = backward(self.layer, self.x, self.weight, **call)
        self.grads = {name: parameter.grad for name, parameter in self.layer.named_parameters()}

    def fresh(self) -> NativeSparseAttention:
        """The same layer, before the backward."""
        layer = copy.deepcopy(self.layer)
        layer.zero_grad()
        return layer


def backward(layer: nn.Module, x: Tensor, weight: Tensor, **call) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, **call)
    (out * weight).mean().backward()
    return out.detach(), x.grad


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def summed(grads: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    for grad in grads.values():
        dist.all_reduce(grad, group=mesh.get_group())
    return grads


def rows(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of the batch."""
    return x.chunk(mesh.size())[mesh.get_local_rank()]


# Fully sharded data parallelism


def fsdp() -> None:
    case, mesh = Case(documents=PACKED), everyone("dp")
    layer = fully_shard(case.fresh(), mesh=mesh)
    out, dx = backward(layer, *(rows(x, mesh) for x in (case.x, case.weight)), documents=rows(here(PACKED), mesh))
    assert_equal({"out": out, "dx": dx / mesh.size()}, {"out": rows(case.out, mesh), "dx": rows(case.dx, mesh)})
    assert_equal(gradients(layer), case.grads)


# Tensor parallelism


def tensor_parallel(options: dict, **call) -> None:
    case, mesh = Case(options=options, **call), everyone("tp")
    layer = parallelize_module(case.fresh(), mesh, KVGroupParallel())
    out, dx = backward(layer, case.x, case.weight, **case.call)
    assert_equal({"out": out, "dx": dx}, {"out": case.out, "dx": case.dx})
    assert_equal(gradients(layer), case.grads)


def tensor_parallel_placements() -> None:
    mesh = everyone("tp")
    layer = parallelize_module(build(**EVERYTHING), mesh, KVGroupParallel())
    placed = {name: parameter.placements for name, parameter in layer.named_parameters()}
    columns = ("q_proj.weight", "k_proj.selected.weight", "v_proj.window.weight", "attention.gate.proj.bias")
    assert all(placed[name] == (Shard(0),) for name in (*columns, "compressor.k_pool.up"))
    assert placed["o_proj.weight"] == (Shard(1),)
    assert placed["q_norm.weight"] == placed["k_norm.window.weight"] == (Replicate(),)
    assert (layer.num_heads, layer.num_kv_heads) == (8 // mesh.size(), 4 // mesh.size())
    assert {name: whole(x).shape for name, x in layer.state_dict().items()} == {
        name: x.shape for name, x in build(**EVERYTHING).state_dict().items()
    }


def tensor_parallel_starts_from_the_first_rank() -> None:
    """Ranks that were initialised apart hold one layer afterwards."""
    mesh, apart = everyone("tp"), build()
    for parameter in apart.parameters():
        nn.init.constant_(parameter, 1.0 + dist.get_rank())
    layer = parallelize_module(apart, mesh, KVGroupParallel())
    assert all(torch.equal(whole(x), torch.ones_like(whole(x))) for x in layer.parameters())


def tensor_parallel_sequence_layouts() -> None:
    case, mesh = Case(), everyone("tp")
    style = KVGroupParallel(input_layout=Shard(1), output_layout=Shard(1))
    layer = parallelize_module(case.fresh(), mesh, style)
    part = partial(shard_sequence, mesh=mesh, balanced=False)
    out, dx = backward(layer, part(case.x), part(case.weight) / mesh.size())
    assert_equal({"out": out, "dx": dx}, {"out": part(case.out), "dx": part(case.dx)})
    assert_equal(gradients(layer), case.grads)


def tensor_parallel_dtensors() -> None:
    case, mesh = Case(), everyone("tp")
    layer = parallelize_module(case.fresh(), mesh, KVGroupParallel(output_layout=Shard(1), use_local_output=False))
    x = DTensor.from_local(case.x, mesh, [Replicate()]).requires_grad_()
    out = layer(x=x)
    assert out.placements == (Shard(1),)
    weight = DTensor.from_local(case.weight, mesh, [Replicate()])
    (out * weight).mean().backward()
    assert_equal({"out": out.detach(), "dx": x.grad}, {"out": case.out, "dx": case.dx})
    assert_equal(gradients(layer), case.grads)


def tensor_parallel_decoding() -> None:
    """A cache of the sharded layer holds this rank's heads."""
    case, mesh = Case(), everyone("tp")
    layer = parallelize_module(case.fresh(), mesh, KVGroupParallel())
    cache = layer.new_cache(batch=2, max_tokens=TOKENS)
    with torch.no_grad():
        out = torch.cat([layer(x, cache=cache) for x in case.x.split([20, 1, 1, 10], 1)], 1)
    assert_equal({"out": out}, {"out": case.out})


def even_heads_look_back_four(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & ((h % 4 == 0) | (h < 5) | (q_idx - kv_idx < 4))


# Context parallelism


def context_parallel(options: dict, balanced: bool, config: NSAConfig = CONFIG, batch: int = 2, tokens=TOKENS, **call):
    case, mesh = Case(config, batch, tokens, options, **call), everyone("cp")
    layer = parallelize_module(case.fresh(), mesh, ContextParallel(balanced=balanced))
    part = partial(shard_sequence, mesh=mesh, balanced=balanced)
    out, dx = backward(layer, part(case.x), part(case.weight) / mesh.size(), **case.call)
    assert_equal({"out": out, "dx": dx}, {"out": part(case.out), "dx": part(case.dx)})
    assert_equal({"out": gather_sequence(out, mesh, balanced=balanced)}, {"out": case.out})
    assert_equal(summed(gradients(layer), mesh), case.grads)


@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(st.data())
def context_parallel_everywhere(data: st.DataObject) -> None:
    """Any geometry, length and packing: chunks shorter than a block, borders inside blocks and documents."""
    config, balanced = data.draw(geometries()), data.draw(st.booleans())
    parts = dist.get_world_size() * (2 if balanced else 1)
    tokens = parts * data.draw(st.integers(1, 32 // parts))
    documents = data.draw(packed_rows(1, tokens)) if data.draw(st.booleans()) else None
    options = {"num_kv_heads": 2, "num_heads": 4, "rope_theta": 10.0, "shared_kv": data.draw(st.booleans())}
    context_parallel(options, balanced, config, batch=1, tokens=tokens, documents=documents)


def context_parallel_under_checkpointing() -> None:
    case, mesh = Case(documents=PACKED), everyone("cp")
    layer = parallelize_module(case.fresh(), mesh, ContextParallel())
    part = partial(shard_sequence, mesh=mesh)
    again = partial(checkpoint, layer, use_reentrant=False)
    out, dx = backward(again, part(case.x), part(case.weight) / mesh.size(), **case.call)
    assert_equal({"out": out, "dx": dx}, {"out": part(case.out), "dx": part(case.dx)})
    assert_equal(summed(gradients(layer), mesh), case.grads)


def positions_of_shards() -> None:
    mesh, count = everyone("cp"), dist.get_world_size()
    rank = mesh.get_local_rank()
    head, tail = range(2 * rank, 2 * rank + 2), range(4 * count - 2 * rank - 2, 4 * count - 2 * rank)
    assert sequence_positions(4 * count, mesh).tolist() == [*head, *tail]
    assert sequence_positions(4 * count, mesh, balanced=False).tolist() == list(range(4 * rank, 4 * rank + 4))
    x = normal(3, 4 * count, 5)
    for balanced in (True, False):
        part = shard_sequence(x, mesh, balanced=balanced)
        assert torch.equal(part, x[:, sequence_positions(4 * count, mesh, balanced=balanced)])
        assert torch.equal(gather_sequence(part, mesh, balanced=balanced), x)


# Two at a time


def fsdp_with_tensor_parallel(dp: int, tp: int) -> None:
    case, mesh = Case(documents=PACKED), mesh_of(dp=dp, tp=tp)
    layer = parallelize_module(case.fresh(), mesh["tp"], KVGroupParallel())
    layer = fully_shard(layer, mesh=mesh["dp"])
    part = partial(rows, mesh=mesh["dp"])
    out, dx = backward(layer, part(case.x), part(case.weight), documents=part(here(PACKED)))
    assert_equal({"out": out, "dx": dx / dp}, {"out": part(case.out), "dx": part(case.dx)})
    assert_equal(gradients(layer), case.grads)


def fsdp_with_context_parallel(dp: int, cp: int) -> None:
    """The parameters are sharded over all ranks of both axes."""
    case, mesh = Case(documents=PACKED), mesh_of(dp=dp, cp=cp)
    layer = parallelize_module(case.fresh(), mesh["cp"], ContextParallel())
    layer = fully_shard(layer, mesh=mesh._flatten("dp_cp"))
    x, weight = (shard_sequence(rows(x, mesh["dp"]), mesh["cp"]) for x in (case.x, case.weight))
    out, dx = backward(layer, x, weight, documents=rows(here(PACKED), mesh["dp"]))
    expected = {"out": case.out, "dx": case.dx * dp * cp}
    assert_equal(
        {"out": out, "dx": dx},
        {name: shard_sequence(rows(y, mesh["dp"]), mesh["cp"]) for name, y in expected.items()},
    )
    assert_equal(gradients(layer), case.grads)


def tensor_with_context_parallel(tp: int, cp: int) -> None:
    case, mesh = Case(documents=PACKED, mask_mod=even_heads_look_back_four), mesh_of(cp=cp, tp=tp)
    layer = parallelize_module(case.fresh(), mesh["tp"], KVGroupParallel())
    layer = parallelize_module(layer, mesh["cp"], ContextParallel())
    part = partial(shard_sequence, mesh=mesh["cp"])
    out, dx = backward(layer, part(case.x), part(case.weight) / cp, **case.call)
    assert_equal({"out": out, "dx": dx}, {"out": part(case.out), "dx": part(case.dx)})
    grads = gradients(layer)
    for grad in grads.values():
        dist.all_reduce(grad.to_local(), group=mesh["cp"].get_group())
    assert_equal(grads, case.grads)


def a_few_steps_of_training() -> None:
    """Clipping and AdamW see DTensors of both kinds of placement, and leave the weights of one process."""
    case, mesh = Case(), mesh_of(dp=1, tp=dist.get_world_size())
    layer = parallelize_module(case.fresh(), mesh["tp"], KVGroupParallel())
    twins = (case.fresh(), fully_shard(layer, mesh=mesh["dp"]))
    for twin in twins:
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            backward(twin, case.x, case.weight)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(dict(twins[1].named_parameters()), {n: x.detach() for n, x in twins[0].named_parameters()})


def made_without_memory() -> None:
    """A layer that never exists whole: shaped on the meta device, sharded, and only then allocated and drawn."""
    mesh = mesh_of(dp=1, tp=dist.get_world_size())
    for compressor in (None, LinearCompressor):
        with torch.device("meta"):
            options = {} if compressor is None else {"compressor": compressor(CONFIG, **SIZES)}
            layer = NativeSparseAttention(dim=12, num_heads=8, config=CONFIG, **SIZES, **options)
        layer = parallelize_module(layer, mesh["tp"], KVGroupParallel())
        layer = fully_shard(layer, mesh=mesh["dp"]).to_empty(device=torch.get_default_device())
        for parameter in layer.parameters():
            nn.init.constant_(parameter, torch.nan)
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert all(whole(parameter).isfinite().all() for parameter in layer.parameters())
        out = layer(normal(1, TOKENS, 12).float())
        assert out.isfinite().all() and out.std() > 1e-3
        if compressor is not None:
            kernel = whole(layer.compressor.k_pool.kernel)
            assert torch.equal(kernel, LinearCompressor(CONFIG, **SIZES).k_pool.kernel)


def compiles_in_one_graph() -> None:
    case, mesh = Case(batch=1, tokens=8), everyone("all")
    for style in (KVGroupParallel(), ContextParallel()):
        layer = parallelize_module(case.fresh(), mesh, style)
        x = shard_sequence(case.x, mesh) if isinstance(style, ContextParallel) else case.x
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


# Bad input


def bad_degree() -> None:
    for style_options in ({"num_kv_heads": 1, "num_heads": 8}, {"num_kv_heads": 3, "num_heads": 6}):
        with pytest.raises(ValueError, match="must divide num_kv_heads=., got a mesh of 2 ranks"):
            parallelize_module(build(**style_options), everyone("tp"), KVGroupParallel())


def different_layers() -> None:
    first = dist.get_rank() == 0
    one_window = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=6)
    odd = {
        "config.window: 5 on rank 0, 6 on rank 1": build(CONFIG if first else one_window),
        "num_heads: 8 on rank 0, 16 on rank 1": build(num_heads=8 if first else 16),
        "type: 'NativeSparseAttention' on rank 0, 'Linear' on rank 1": build() if first else nn.Linear(12, 12),
        "float64 .* on rank 0, 'float32": build() if first else build().float(),
        "rope_theta: None on rank 0, 100.0": build(rope_theta=None if first else 100.0),
    }
    for message, layer in odd.items():
        for style in (KVGroupParallel(), ContextParallel()):
            with pytest.raises(ValueError, match=message):
                parallelize_module(layer, everyone("all"), style)


def different_options() -> None:
    first = dist.get_rank() == 0
    with pytest.raises(ValueError, match="balanced: True on rank 0, False on rank 1"):
        parallelize_module(build(), everyone("cp"), ContextParallel(balanced=first))
    with pytest.raises(ValueError, match="output_layout: "):
        layout = Replicate() if first else Shard(1)
        parallelize_module(build(), everyone("tp"), KVGroupParallel(output_layout=layout))


def what_cannot_be_sharded() -> None:
    mesh = everyone("tp")
    for style in (KVGroupParallel(), ContextParallel()):
        with pytest.raises(TypeError, match="must be a NativeSparseAttention, got Linear"):
            parallelize_module(nn.Linear(12, 12), mesh, style)
        with pytest.raises(ValueError, match="one axis, got 2.*slice it"):
            style._apply(build(), mesh_of(dp=1, tp=2))
    gated, adapted, pooled = build(), build(), build(compressor=SharedPool(CONFIG))
    gated.attention.gate = nn.Linear(12, 24)
    adapted.q_proj.bias = nn.Parameter(torch.zeros(32))
    for layer, message in ((gated, "SigmoidGate"), (adapted, "q_proj.bias"), (pooled, "compressor.weight")):
        with pytest.raises(NotImplementedError, match=message):
            parallelize_module(layer, mesh, KVGroupParallel())


class SharedPool(MeanPool):
    """A compressor with a parameter that all KV heads share."""

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(7))


def bad_sequences() -> None:
    mesh, first = everyone("cp"), dist.get_rank() == 0
    for balanced, parts in ((True, 4), (False, 2)):
        with pytest.raises(ValueError, match=f"multiple of {parts} tokens, got 27.*documents=-1"):
            shard_sequence(normal(1, 27, 3), mesh, balanced=balanced)
    layer = parallelize_module(build(), mesh, ContextParallel())
    on_cpu = torch.get_default_device().type == "cpu"
    with nullcontext() if on_cpu else debug():  # on a GPU what ranks are given is compared for those who debug alone
        bad_parts(layer, first)


def bad_parts(layer: NativeSparseAttention, first: bool) -> None:
    with pytest.raises(ValueError, match=r"x: \(1, 4, 12\) on rank 0, \(1, 6, 12\) on rank 1"):
        layer(normal(1, 4 if first else 6, 12))
    with pytest.raises(ValueError, match=r"multiple of 4 tokens, got 6"):
        layer(normal(1, 3, 12))
    with pytest.raises(ValueError, match=r"documents must be .*\(1, 8\), of the whole sequence"):
        layer(normal(1, 4, 12), documents=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="documents .shape, checksum."):
        layer(normal(1, 4, 12), documents=torch.zeros(1, 8, dtype=torch.int64) + dist.get_rank())
    with pytest.raises(ValueError, match="axes"):
        layer(normal(4, 12))
    with pytest.raises(NotImplementedError, match="cache"):
        layer(normal(1, 4, 12), cache=layer.new_cache(1, 8))


def fails_on_one_rank() -> None:
    """The other rank waits for it."""
    if dist.get_rank() == 0:
        raise AssertionError("on purpose")
    dist.barrier()


def _both(name: str, balanced: bool) -> Callable[[], None]:
    def check() -> None:
        for documents in (None, PACKED):
            context_parallel(VARIANTS[name], balanced, documents=documents)

    return check


CHECKS: dict[int, dict[str, Callable[[], None]]] = {
    2: {
        "fsdp": fsdp,
        **{f"tensor parallel, {name}": partial(tensor_parallel, VARIANTS[name]) for name in VARIANTS},
        "tensor parallel, packed": partial(tensor_parallel, EVERYTHING, documents=PACKED),
        "tensor parallel, mask by head": partial(tensor_parallel, {}, mask_mod=even_heads_look_back_four),
        "tensor parallel, placements": tensor_parallel_placements,
        "tensor parallel, weights of the first rank": tensor_parallel_starts_from_the_first_rank,
        "tensor parallel, sequence layouts": tensor_parallel_sequence_layouts,
        "tensor parallel, dtensors": tensor_parallel_dtensors,
        "tensor parallel, decoding": tensor_parallel_decoding,
        **{
            f"context parallel, {name}, {kind}": _both(name, kind == "balanced")
            for name in VARIANTS
            for kind in ("balanced", "contiguous")
        },
        "context parallel, mask by head": partial(context_parallel, {}, True, mask_mod=even_heads_look_back_four),
        "context parallel, everywhere": context_parallel_everywhere,
        "context parallel, checkpointing": context_parallel_under_checkpointing,
        "positions of shards": positions_of_shards,
        "fsdp and tensor parallel, 1 x 2": partial(fsdp_with_tensor_parallel, 1, 2),
        "fsdp and tensor parallel, 2 x 1": partial(fsdp_with_tensor_parallel, 2, 1),
        "fsdp and context parallel, 1 x 2": partial(fsdp_with_context_parallel, 1, 2),
        "fsdp and context parallel, 2 x 1": partial(fsdp_with_context_parallel, 2, 1),
        "training": a_few_steps_of_training,
        "made without memory": made_without_memory,
        "bad degree": bad_degree,
        "different layers": different_layers,
        "different options": different_options,
        "what cannot be sharded": what_cannot_be_sharded,
        "bad sequences": bad_sequences,
    },
    4: {
        "fsdp and tensor parallel, 2 x 2": partial(fsdp_with_tensor_parallel, 2, 2),
        "fsdp and context parallel, 2 x 2": partial(fsdp_with_context_parallel, 2, 2),
        "tensor and context parallel, 2 x 2": partial(tensor_with_context_parallel, 2, 2),
        "context parallel, four ranks": context_parallel_under_checkpointing,
    },
}
"""By number of ranks and name."""

THOROUGH: dict[int, dict[str, Callable[[], None]]] = {2: {"one graph": compiles_in_one_graph}}

BROKEN: dict[int, dict[str, Callable[[], None]]] = {2: {"fails on one rank": fails_on_one_rank, "after it": fsdp}}
"""What must not pass."""

if __name__ == "__main__":
    ranks.main(
        {count: checks | THOROUGH.get(count, {}) | BROKEN.get(count, {}) for count, checks in CHECKS.items()},
        sys.argv[1:],
    )
