"""What the tests share: random problems, gradients, tolerances, and settings that must precede any import of triton."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

import oracle

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.filter_too_much)
settings.register_profile(
    "default", max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("thorough", max_examples=500, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The library comes after the settings above.
from flexnsa import BranchKV, NSAConfig  # noqa: E402


def part(divisor: int) -> settings:
    """For costly tests: a share of the profile's examples."""
    return settings(max_examples=max(1, settings.default.max_examples // divisor))


TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def pytest_configure(config: pytest.Config) -> None:
    # On a CPU the flex engine runs FlexAttention eagerly on purpose: it has no compiled LSE there.
    config.addinivalue_line("filterwarnings", "ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def untraced_flex() -> Iterator[None]:
    """Eager FlexAttention traces itself anew at every call, half a second each, only to run the same dense code."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@pytest.fixture
def traced_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as users get it."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    by_hand = pytest.mark.skip(reason="long; run with -m thorough")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if "thorough" in item.keywords and "thorough" not in config.option.markexpr:
            item.add_marker(by_hand)


class Inputs(NamedTuple):
    """Leaves of one call: every branch has K and V of its own."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor

    @property
    def kv(self) -> BranchKV:
        return BranchKV(
            compressed=(self.k_cmp, self.v_cmp), selected=(self.k_slc, self.v_slc), window=(self.k_win, self.v_win)
        )

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.k_cmp, self.v_cmp), (self.k_slc, self.v_slc), (self.k_win, self.v_win)

    def to(self, dtype: torch.dtype, grad: bool = False) -> "Inputs":
        return Inputs(*(x.detach().to(dtype).requires_grad_(grad) for x in self))


@dataclass(frozen=True)
class Case:
    """One random problem: a geometry, sizes, who stands where, and how the values are drawn."""

    config: NSAConfig
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    dim: int = 4
    value_dim: int = 4
    tokens: int = 16
    positions: Tensor | None = None
    documents: Tensor | None = None
    values: str = "normal"
    seed: int = 0

    @property
    def logits(self) -> float:
        """About how large the logits are."""
        return 100.0 if self.values == "hot" else 1.0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def queries(self) -> int:
        return self.tokens if self.positions is None else self.positions.shape[-1]

    @property
    def where(self) -> oracle.Layout:
        return oracle.layout(self.config, self.batch, self.tokens, self.positions, self.documents)

    @property
    def placing(self) -> dict[str, Any]:
        """The keywords that every stage takes."""
        return {"positions": self.positions, "documents": self.documents}

    def randn(self, *shape: int, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def query(self) -> Tensor:
        q = self.randn(self.batch, self.heads, self.queries, self.dim)
        return {"normal": q, "hot": 100 * q, "repeated": q.round(), "flat": 0 * q}[self.values]

    def rows(self, count: int, dim: int, salt: int) -> Tensor:
        """K or V of `count` rows; "repeated" has few distinct rows of small integers, so that scores tie exactly."""
        x = self.randn(self.batch, self.kv_heads, count, dim, salt=salt)
        if self.values == "repeated" and count:
            return x[:, :, :2].round()[:, :, torch.arange(count) // 3 % 2 % x[:, :, :2].shape[2]]
        return x

    def inputs(self, dtype: torch.dtype = torch.float64, grad: bool = False, raw: bool = False) -> Inputs:
        """Random leaves; `raw` gives the compressed branch raw tokens, for a compressor."""
        compressed = self.tokens if raw else self.where.num_compressed
        pairs = [
            self.rows(count, dim, salt)
            for count, first in ((compressed, 1), (self.tokens, 3), (self.tokens, 5))
            for dim, salt in ((self.dim, first), (self.value_dim, first + 1))
        ]
        gates = self.randn(self.batch, self.heads, self.queries, 3, salt=7).sigmoid()
        return Inputs(self.query(), *pairs, gates).to(dtype, grad)


@st.composite
def geometries(draw: st.DrawFn) -> NSAConfig:
    """Every kind of valid geometry, the forced blocks from none to all of those selected."""
    stride = draw(st.sampled_from((1, 2, 3, 4)))
    overlap = draw(st.integers(1, 3))
    widening = draw(st.integers(overlap, 4))
    selected = draw(st.integers(1, 6))
    initial = draw(st.integers(0, selected))
    local = draw(st.integers(0, selected - initial))
    return NSAConfig(
        compress_stride=stride,
        compress_block=stride * overlap,
        select_block=stride * widening,
        num_selected=selected,
        num_initial=initial,
        num_local=local,
        window=draw(st.integers(1, 12)),
    )


def lengths(config: NSAConfig, longest: int = 40) -> st.SearchStrategy[int]:
    """Token counts: the edges of both kinds of block, any, and those with more blocks than most selections hold."""
    size, block = config.compress_block, config.select_block
    edges = (1, size - 1, size, size + 1, block - 1, block, block + 1, 2 * block, 2 * block + 1)
    many = st.integers(min(longest, 3 * block), longest)
    return st.one_of(many, st.sampled_from([n for n in edges if n >= 1]), st.integers(1, longest))


@st.composite
def packed_rows(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    """[b, tk] ids of packed documents, non-decreasing with gaps, padding on either side of a row (or all of it)."""
    rows = []
    for _ in range(batch):
        left = draw(st.integers(0, tokens)) if draw(st.booleans()) else 0
        right = draw(st.integers(0, tokens - left)) if draw(st.booleans()) else 0
        row, owner = [-1] * left, draw(st.integers(0, 3))
        while len(row) < tokens - right:
            length = draw(st.integers(1, tokens - right - len(row)))
            row += [owner] * length
            owner += draw(st.integers(1, 3))
        rows.append(row + [-1] * right)
    return torch.tensor(rows, dtype=torch.int64)


@st.composite
def placements(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    """Positions that are a slice, a single one, two runs far apart, or any set; one for all rows or one each."""
    kind = draw(st.sampled_from(("slice", "single", "runs", "any")))
    count = 1 if kind == "single" else draw(st.integers(1, tokens))

    def row() -> list[int]:
        if kind == "any":
            return sorted(draw(st.sets(st.integers(0, tokens - 1), min_size=count, max_size=count)))
        if kind == "runs":
            head = count // 2
            return [*range(head), *range(tokens - (count - head), tokens)]
        start = draw(st.integers(0, tokens - count))
        return list(range(start, start + count))

    rows = [row() for _ in range(batch)]
    return torch.tensor(rows if draw(st.booleans()) else rows[0], dtype=torch.int64)


@st.composite
def cases(
    draw: st.DrawFn,
    positions: bool = True,
    documents: bool = True,
    values: Sequence[str] = ("normal", "hot", "repeated", "flat"),
    groups: Sequence[int] = (1, 3, 4, 16),
) -> Case:
    """A whole problem; `positions` and `documents` say which of the two may be there."""
    config = draw(geometries())
    batch, tokens = draw(st.sampled_from((1, 2))), draw(lengths(config))
    group = draw(st.sampled_from(groups))
    return Case(
        config=config,
        batch=batch,
        kv_heads=draw(st.sampled_from((1, 2))),
        group=group,
        dim=draw(st.sampled_from((2, 4, 5))),
        value_dim=draw(st.sampled_from((3, 4))),
        tokens=tokens,
        positions=draw(placements(batch, tokens)) if positions and draw(st.booleans()) else None,
        documents=draw(packed_rows(batch, tokens)) if documents and draw(st.booleans()) else None,
        values=draw(st.sampled_from(values)),
        seed=draw(st.integers(0, 9999)),
    )


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a random linear function of the outputs, where finite; zero for an input that plays no part."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        torch.where(x.isfinite(), x, 0.0).mul(torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs
    )
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, found, strict=True)]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to rounding in the dtype of `expected`, shapes and dtypes included; -inf equals -inf."""
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE[y.dtype])


def assert_as_accurate(actual: Tensor, baseline: Tensor, exact: Tensor, logits: float = 1.0, terms: int = 0) -> None:
    """`actual` is about as far from `exact` as plain torch is at the same precision, at worst and on average.

    Beyond that it may be off by some roundings of the largest number, or of a typical one for the average, and by what
    cancels to 0 in float32 from numbers of the inputs' size. `logits` says how large the logits are: a softmax weight
    is only as exact as its logit's last digit. `terms` says how many numbers `actual` adds one after the other in
    float32 where plain torch adds them as a tree: their roundings walk at random, sqrt(terms) steps far.
    """
    assert actual.shape == exact.shape
    assert torch.equal(actual == -torch.inf, exact == -torch.inf)
    exact = exact.double()
    finite = exact.isfinite()
    if not finite.any():
        return
    error, allowed, size = ((x.double() - y)[finite] for x, y in ((actual, exact), (baseline, exact), (exact, 0)))
    eps, single = torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps
    for name, measure, factor, roundings in (("worst", _worst, 4, 4), ("average", _average, 2, 1)):
        limit = factor * measure(allowed) + roundings * logits * eps * measure(size) + 16 * single
        limit += terms**0.5 * single * measure(size)
        assert measure(error) <= limit, f"{name} error {measure(error):.2e} of {measure(size):.2e}, limit {limit:.2e}"


def _worst(x: Tensor) -> float:
    return x.abs().amax().item()


def _average(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
