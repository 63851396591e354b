"""Compile what the operators launch, without a GPU, and print the shared memory that each kernel takes.

Run as a script, apart from the tests: they import triton as an interpreter. Launches are recorded rather than run, so
that what is compiled here is exactly what the launchers ask for on a device of so much shared memory.
"""

import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flexnsa import NSAConfig, PagedKV, Pages, engines, paged_append, paged_step
from flexnsa.kernels import configs, decode, scoring, selected, selected_backward, selected_forward
from flexnsa.kernels.launch import computable
from flexnsa.types import BranchKV

POINTERS = {
    torch.int8: "*i8",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Config(NamedTuple):
    """What kernels are compiled for."""

    capability: int
    dtype: str
    dim: int
    value_dim: int
    select_block: int
    group: int

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, self.dtype))

    @property
    def geometry(self) -> NSAConfig:
        stride = min(16, self.select_block // 2)
        return NSAConfig(2 * stride, stride, self.select_block, num_selected=16, num_initial=1, num_local=2, window=512)


def select(c: Config) -> None:
    """Scoring and top-n, causal and masked, of short rows and of rows of a million tokens."""
    hk, tokens = 2, 64
    q, k_cmp = c.tensor(1, hk * c.group, tokens, c.dim), c.tensor(1, hk, 8, c.dim)
    lse, where = torch.zeros(1, hk * c.group, tokens), torch.arange(tokens)[None]
    geometry = {k: v for k, v in c.geometry.__dict__.items() if k != "window"}
    for blocks, low in itertools.product((8, 512, (1 << 20) // c.select_block), (None, where)):
        scoring.select_blocks(
            q, k_cmp, lse, where, where * 0, where * 0, low, low, num_blocks=blocks, scale=1.0, **geometry
        )


def attend(c: Config) -> None:
    """Selected attention, forward and backward, causal and masked."""
    tokens, n = 64, 16
    q, k, v = (c.tensor(1, h, tokens, d) for h, d in ((2 * c.group, c.dim), (2, c.dim), (2, c.value_dim)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    where, indices = torch.arange(tokens)[None], torch.zeros(1, 2, tokens, n, dtype=torch.int32)
    for low in (None, where):
        out, lse = selected.selected_attention(
            *inputs, indices, where, where * 0, select_block=c.select_block, scale=1.0, low=low
        )
        torch.autograd.grad([out, lse], inputs, [torch.zeros_like(out), torch.zeros_like(lse)])


def step(c: Config) -> None:
    """A decoding step over pages and the append, of few sequences, whose work is split, of more, and of many."""
    block, tokens = c.select_block, 8192
    compressed = block // c.geometry.compress_stride
    for batch in (32, 1, 8, 256):  # the last program merges, each chooses, a launch merges, there is nothing to merge
        pages = PagedKV(
            *(
                Pages(
                    c.tensor(1, 2, size, c.dim),
                    c.tensor(1, 2, size, c.value_dim),
                    torch.zeros(batch, tokens // block, dtype=torch.int32),
                )
                for size in (compressed, block, block)
            )
        )
        q, gates = c.tensor(batch, 2 * c.group, 1, c.dim), c.tensor(batch, 2 * c.group, 1, 3)
        lengths = torch.full((batch,), tokens, dtype=torch.int32)
        paged_step(q, gates, pages, lengths, c.geometry, impl="triton")
        new = (c.tensor(batch, 2, 1, c.dim), c.tensor(batch, 2, 1, c.value_dim))
        paged_append(BranchKV.shared(*new), pages, lengths, c.geometry, impl="triton")


OPERATORS: Mapping[str, Callable[[Config], None]] = {"select": select, "attend": attend, "step": step}


class Launch(NamedTuple):
    """A kernel, its arguments by name, and how it is compiled."""

    kernel: JITFunction
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    def source(self) -> ASTSource:
        """What Triton would compile: types, constants, and which arguments it knows to be divisible by 16."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or one or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, HopperDescriptor):
                tile = f"{POINTERS[value.base.dtype][1:]}{value.block_shape}"
                signature[parameter.name] = f"tensordesc<{tile},{value.layout!r}>"
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i64" if abs(value) >= 2**31 else "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        return source(self.kernel, signature, constants, attributes)

    def key(self) -> str:
        """Launches of one key compile to the same."""
        source = self.source()
        parts = (self.kernel.fn.__qualname__, source.signature, source.constants, source.attrs, self.options)
        return repr(parts)

    def shared_memory(self, capability: int) -> int:
        """Bytes that the kernel, compiled for a compute capability, takes."""
        target = GPUTarget("cuda", capability, 32)
        return int(triton.compile(self.source(), target=target, options=dict(self.options)).metadata.shared)


def launches(operator: Callable[[Config], None], config: Config, limit: int) -> list[Launch]:
    """What an operator launches on a device of so much shared memory, each kind once."""
    found: dict[str, Launch] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in kernel.arg_names}
        options = {k: v for k, v in options.items() if v is not None}
        launch = Launch(kernel, inspect.signature(kernel.fn).bind(*args, **kwargs).arguments, options)
        found.setdefault(launch.key(), launch)

    JITFunction.run = record
    engines.TRITON_INTERPRETED = True  # or a CPU's tensors would be refused
    for module in (configs, scoring, selected_forward, selected_backward, decode):
        module.shared_memory = lambda device: limit
    selected_forward.generation = lambda device: config.capability // 10
    selected_forward._has_hopper_kernel = lambda device: config.capability == 90
    for module in (scoring, selected, decode):
        assert module.computable is computable
        module.computable = lambda x: x
    operator(config)
    return list(found.values())


PRODUCTS = (
    "_score",
    "fetched_attention",
    "tile_attention",
    "query_attention",
    "pair_attention",
    "pair_gradients",
    "tile_gradients",
    "query_gradients",
    "attend_static",
    "attend_selected",
    "score_compressed",
    "use_scores",
    "attend_chosen",
)
"""The kernels with matrix products: those that take much shared memory, and long to compile."""


def compiled(every: bool, operators: list[str], *lists: list) -> Iterator[dict[str, Any]]:
    """A row for each kind of launch of the product of capabilities, dtypes, dims, blocks and groups.

    Without ``every`` only the kernels of ``PRODUCTS``, and of those the first launch for each; with it the others'.
    """
    seen: set[tuple[int, str]] = set()
    for capability, dtype, dims, block, group in itertools.product(*lists):
        config, limit = Config(capability, dtype, *dims, block, group), configs.SHARED_MEMORY[divmod(capability, 10)]
        for launch in (x for operator in operators for x in launches(OPERATORS[operator], config, limit)):
            name = launch.kernel.fn.__name__
            kind = (capability, launch.key() if every and name in PRODUCTS else name)
            if kind not in seen and (every or name in PRODUCTS):
                seen.add(kind)
                yield {
                    "kernel": name,
                    "config": config,
                    "shared": launch.shared_memory(capability),
                    "limit": limit,
                }


if __name__ == "__main__":
    for row in compiled(*json.loads(sys.argv[1])):
        print(json.dumps(row), flush=True)
