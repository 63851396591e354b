"""Selection's ways in and out: from scores, from a table, to a table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexnsa import Selection


@st.composite
def tables(draw: st.DrawFn) -> list[float]:
    """Scores of one query: few distinct ones, so that they tie, and what is no number."""
    return draw(
        st.lists(st.sampled_from((0.0, -3.0, 1.5, 7.0, torch.inf, -torch.inf, torch.nan)), min_size=1, max_size=9)
    )


def best(scores: list[float], count: int) -> list[int]:
    """By (score descending, block ascending), then NaN, never -inf; ascending, padded with -1."""
    numbers = [block for block, score in enumerate(scores) if score > -torch.inf]
    unknown = [block for block, score in enumerate(scores) if score != score]
    order = sorted(numbers, key=lambda block: (-scores[block], block)) + unknown
    chosen = sorted(order[:count])
    return chosen + [-1] * (count - len(chosen))


@given(scores=tables(), count=st.integers(1, 12), dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_from_scores_takes_the_highest(scores: list[float], count: int, dtype: torch.dtype):
    found = Selection.from_scores(torch.tensor(scores, dtype=dtype).view(1, 1, 1, -1), count).indices
    assert found.dtype == torch.int32
    assert found.flatten().tolist() == best(scores, count)


@given(chosen=st.lists(st.booleans(), min_size=1, max_size=9), count=st.integers(1, 12))
def test_from_mask_keeps_the_first(chosen: list[bool], count: int):
    table = torch.tensor(chosen).view(1, 1, 1, -1)
    found = Selection.from_mask(table, count)
    kept = [block for block, yes in enumerate(chosen) if yes][:count]
    assert found.indices.flatten().tolist() == kept + [-1] * (count - len(kept))
    assert found.to_mask(len(chosen)).flatten().nonzero().flatten().tolist() == kept


def test_tables_go_there_and_back_with_every_axis():
    table = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(Selection.from_mask(table, 7).to_mask(7), table)


def test_a_traced_selection_is_the_same():
    torch._dynamo.reset()
    scores = torch.randn(1, 2, 5, 6, requires_grad=True)
    traced = torch.compile(lambda x: Selection.from_scores(x, 3).to_mask(6), fullgraph=True, backend="eager")
    assert torch.equal(traced(scores), Selection.from_scores(scores, 3).to_mask(6))
    assert not Selection.from_scores(scores, 3).indices.requires_grad


@pytest.mark.parametrize(
    ("make", "table", "count", "message"),
    (
        (Selection.from_scores, torch.zeros(2, 3, 4), 1, r"scores must be floating point \[b, hk, tq, s\]"),
        (Selection.from_scores, torch.zeros(1, 1, 1, 4).int(), 1, "scores must be floating point"),
        (Selection.from_mask, torch.zeros(1, 1, 1, 4), 1, "chosen must be bool"),
        (Selection.from_mask, torch.zeros(1, 1, 1, 4).bool(), 0, "num_selected must be at least 1, got 0"),
    ),
)
def test_what_is_no_table_of_blocks(make, table, count, message):
    with pytest.raises(ValueError, match=message):
        make(table, count)
