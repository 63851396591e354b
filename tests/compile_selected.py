"""Compile what the selected-attention operator launches, without a GPU, and print the shared memory that it takes.

Run as a script, apart from the tests: they import triton as an interpreter. Launches are recorded rather than run, so
that what is compiled here is exactly what the launchers ask for.
"""

import inspect
import itertools
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from flexnsa.kernels import configs, selected, selected_backward, selected_forward

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def launches(dtype: torch.dtype, dims: tuple[int, int], select_block: int, group: int, limit: int) -> list[tuple]:
    """(kernel, arguments, options) of a forward and a backward pass on a device of so much shared memory."""
    found = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        found.append((kernel, inspect.signature(kernel.fn).bind(*args, **kwargs).arguments, options))

    JITFunction.run = record
    selected._computable = lambda x: x
    for module in (configs, selected_forward, selected_backward):
        module.shared_memory = lambda device: limit
    tokens, n = 64, 16
    q = torch.zeros(1, 2 * group, tokens, dims[0], dtype=dtype)
    k, v = (torch.zeros(1, 2, tokens, dim, dtype=dtype) for dim in dims)
    where = torch.arange(tokens)[None]
    indices = torch.zeros(1, 2, tokens, n, dtype=torch.int32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = selected.selected_attention(
        *inputs, indices, where, torch.zeros_like(where), select_block=select_block, scale=1.0
    )
    torch.autograd.grad([out, lse], inputs, [torch.zeros_like(out), torch.zeros_like(lse)])
    return found


def compile_launch(kernel: JITFunction, arguments: dict[str, Any], options: dict, capability: int) -> Any:
    """The kernel, compiled for a compute capability as the launcher would on such a device."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


PRODUCTS = (
    "tile_attention",
    "query_attention",
    "pair_attention",
    "pair_gradients",
    "tile_gradients",
    "query_gradients",
)
"""The kernels with matrix products: those that take much shared memory, and long to compile."""


def main(every: bool, *lists: list) -> None:
    """Print a line of JSON for each kernel of the product of capabilities, dtypes, dims, blocks and groups."""
    for capability, dtype, dim, block, group in itertools.product(*lists):
        limit = configs.SHARED_MEMORY[divmod(capability, 10)]
        seen = set()
        for kernel, arguments, options in launches(getattr(torch, dtype), tuple(dim), block, group, limit):
            if kernel.fn.__name__ in seen or not (every or kernel.fn.__name__ in PRODUCTS):
                continue
            seen.add(kernel.fn.__name__)
            taken = compile_launch(kernel, arguments, options, capability).metadata.shared
            case = [capability, dtype, dim, block, group, kernel.fn.__name__]
            print(json.dumps({"case": case, "shared": taken, "limit": limit}), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
