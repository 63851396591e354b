"""Compiled functions behind eager calls: what changes is seen although most of Dynamo's checks are left out."""

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from flexnsa import compiled
from flexnsa.compiled import call_compiled

FACTOR = 2.0
OFFSET = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is tested is Dynamo: whether it compiles anew where it must."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled._compile.cache_clear()
    torch._dynamo.reset()
    yield
    compiled._compile.cache_clear()
    torch._dynamo.reset()


def apply(x: Tensor, mod: Callable[[Tensor], Tensor], options: dict[str, float] | None = None) -> Tensor:
    return mod(x) * (1.0 if options is None else options["scale"])


def scaled(by: float | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


def test_functions_of_one_code_and_other_closures_are_told_apart():
    x = torch.arange(3.0)
    for by in (2.0, 3.0, torch.tensor(4.0), torch.tensor([1.0, 2.0, 3.0]), 2.0):
        assert torch.equal(call_compiled(apply, x, scaled(by)), x * by)


def times_global(x: Tensor) -> Tensor:
    return x * FACTOR + OFFSET


def test_globals_of_a_given_function_may_change(monkeypatch: pytest.MonkeyPatch):
    x, here = torch.arange(3.0), sys.modules[__name__]
    assert torch.equal(call_compiled(apply, x, times_global), x * 2 + 1)
    monkeypatch.setattr(here, "FACTOR", 5.0)
    assert torch.equal(call_compiled(apply, x, times_global), x * 5 + 1)
    monkeypatch.setattr(here, "OFFSET", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert torch.equal(call_compiled(apply, x, times_global), x * 5 + here.OFFSET)


def test_globals_of_a_function_without_a_module_may_change():
    space: dict[str, object] = {"FACTOR": 2.0}
    exec("def mod(x): return x * FACTOR", space)
    x = torch.arange(3.0)
    assert isinstance(space["mod"], types.FunctionType)
    assert torch.equal(call_compiled(apply, x, space["mod"]), x * 2)
    space["FACTOR"] = 7.0
    assert torch.equal(call_compiled(apply, x, space["mod"]), x * 7)


def test_tensors_of_every_kind_are_told_apart():
    mod = scaled(3.0)
    x = torch.randn(4, 6)
    kinds = [x, x.double(), x.T, x[:, ::2], x[:1], x.half(), x.clone().requires_grad_(), x.expand(2, 4, 6)]
    for kind in [*kinds, *kinds]:
        found = call_compiled(apply, kind, mod)
        assert torch.equal(found, kind * 3.0)
        assert found.requires_grad == kind.requires_grad
    with torch.no_grad():
        assert not call_compiled(apply, kinds[6], mod).requires_grad


def test_numbers_in_arguments_may_change():
    x = torch.arange(3.0)
    for scale in (1.0, 2.0, 0.5, 2.0):
        assert torch.equal(call_compiled(apply, x, torch.neg, {"scale": scale}), -x * scale)


def test_many_variants_do_not_reach_dynamos_own_limit():
    before = torch._dynamo.config.recompile_limit
    for rank in range(1, before + 4):
        x = torch.ones([2] * rank)
        assert torch.equal(call_compiled(apply, x, torch.neg), -x)
    assert torch._dynamo.config.recompile_limit == before
