"""Launches remember what Triton compiled: for what it would compile alike, and nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flexnsa.kernels.launch import Kernel, ceil_div, is_watched, next_power


class OnDevice(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


class Compiler:
    """Stands in for a JITFunction ``(x, y, stride, count, scale, BLOCK)`` that specializes on all numbers but count."""

    arg_names = ("x", "y", "stride", "rows", "count", "scale", "BLOCK")

    def __init__(self) -> None:
        self.params = [SimpleNamespace(name=name, do_not_specialize=name == "count") for name in self.arg_names]
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*arguments: Any, **constants: Any) -> Any:
            self.compiled.append((grid, *arguments, constants))
            return self.program()

        return compile_and_launch

    def program(self) -> Any:
        launched = self.launched

        class Program:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *arguments: launched.append((grid[:3], *arguments))

        return Program()


def tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(OnDevice)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(Compiler())


def test_a_call_of_the_same_kind_goes_straight_to_the_driver(kernel: Kernel):
    x, y = tensor(), tensor()
    kernel[(2, 3)](x, y, 16, 4, 5, 0.5, BLOCK=8)
    others = tensor(), tensor()
    kernel[(7,)](*others, 16, 4, 6, 0.25, BLOCK=8)
    assert len(kernel.function.compiled) == 1
    assert kernel.function.launched == [((7, 1, 1), *(o.data_ptr() for o in others), 16, 4, 6, 0.25, 8)]


@pytest.mark.parametrize(
    "other",
    [
        lambda: ((tensor(torch.float16), tensor(), 16, 4, 5, 0.5), 8),
        lambda: ((tensor(), tensor(torch.bfloat16), 16, 4, 5, 0.5), 8),
        lambda: ((tensor(), tensor(), 1, 4, 5, 0.5), 8),
        lambda: ((tensor(), tensor(), 16, 3, 5, 0.5), 8),
        lambda: ((tensor(), tensor(), 16, 4, 5, 0.5), 16),
    ],
)
def test_another_kind_is_compiled(kernel: Kernel, other: Any):
    kernel[(1,)](tensor(), tensor(), 16, 4, 5, 0.5, BLOCK=8)
    arguments, block = other()
    for _ in range(2):
        kernel[(1,)](*arguments, BLOCK=block)
    assert len(kernel.function.compiled) == 2
    assert len(kernel.function.launched) == 1


def test_what_is_not_aligned_is_left_to_triton(kernel: Kernel):
    aligned, shifted = tensor(), tensor(offset=1)
    kernel[(1,)](aligned, aligned, 16, 4, 5, 0.5, BLOCK=8)
    for _ in range(2):
        kernel[(1,)](aligned, shifted, 16, 4, 5, 0.5, BLOCK=8)
    assert len(kernel.function.compiled) == 3
    assert not kernel.function.launched
    kernel[(1,)](aligned, aligned, 16, 4, 5, 0.5, BLOCK=8)
    assert len(kernel.function.launched) == 1


def test_no_more_kinds_are_remembered_than_it_says(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flexnsa.kernels.launch._KEPT", 3)
    for stride in range(10):
        kernel[(1,)](tensor(), tensor(), stride, 4, 5, 0.5, BLOCK=8)
        assert len(kernel._compiled) <= 3


def test_sizes():
    assert [ceil_div(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power(x) for x in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_a_plain_call_without_gradients_is_not_watched():
    x = torch.zeros(3)
    assert is_watched(x)
    with torch.no_grad():
        assert not is_watched(x, x)
        assert is_watched(x, tensor())


def test_modes_traces_and_transforms_watch():
    x, answers = torch.zeros(3), []

    def ask(x: Tensor) -> Tensor:
        answers.append(is_watched(x))
        return x

    with torch.no_grad():
        with FlopCounterMode(display=False):
            ask(x)
        with FakeTensorMode():
            ask(torch.zeros(3))
        torch.vmap(ask)(x)
        torch.compile(ask, backend="eager", fullgraph=True)(x)
    assert answers == 4 * [True]
