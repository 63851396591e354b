"""Tables that a mask mod captures, made safe for a graph that computes them too.

Inductor of torch 2.11 to 2.13 computes what a mod captures anew inside of the attention kernel if it can. After a scan
or a reduction it then fails; of a tensor that was written in place it takes the value before the writing, without a
word. The result of an opaque operator is only ever read from memory.
"""

import torch
from torch import Tensor


def in_memory(table: Tensor) -> Tensor:
    """`table` itself, and under torch.compile a copy that Inductor cannot look behind. It passes no gradient."""
    return _copy(table) if torch.compiler.is_compiling() else table


@torch.library.custom_op("flexnsa_masks::in_memory", mutates_args=())
def _copy(table: Tensor) -> Tensor:
    return table.clone(memory_format=torch.contiguous_format)


@_copy.register_fake
def _(table: Tensor) -> Tensor:
    return table.new_empty(table.shape)
