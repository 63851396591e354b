"""Stack frames that say which branch runs, in tracebacks and in what torch.compile says of code it cannot trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import Tensor

from flexnsa.context import AttentionContext, Branch
from flexnsa.types import AttentionOutput

Attend = Callable[[Branch, Tensor, Tensor, Tensor, AttentionContext], AttentionOutput]


class Frames(dict[str, Attend]):
    """``attend`` of each branch by name, called in a frame ``branch "NAME"``.

    Dynamo raises its errors outside of the traced code, where nothing can catch and explain them; but it prints the
    frames that it was in.

    >>> print(*Frames(["mine"]))
    mine
    """

    def __init__(self, names: Iterable[str]):
        super().__init__((name, _frame(f'branch "{name}"')) for name in names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Frames, (tuple(self),)  # such functions cannot be pickled


def _attend(branch: Branch, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> AttentionOutput:
    return branch.attend(q, k, v, context)


@functools.cache  # one function for a name, on whose identity Dynamo guards: layers that are alike share their graph
def _frame(name: str) -> Attend:
    return FunctionType(_attend.__code__.replace(co_name=name), globals(), name)
