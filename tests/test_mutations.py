"""The tests can fail: each of five planted bugs makes the property test that guards against it fail."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings

import test_importance
import test_selected
import test_selection
import test_window
from conftest import cases
from flexnsa import reference
from flexnsa.layout import KeyRange, QueryTable


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = QueryTable.window_range
    patch.setattr(
        QueryTable, "window_range", lambda table, config: right(table, replace(config, window=config.window + 1))
    )


def overlap_shifted_by_a_block(patch: pytest.MonkeyPatch) -> None:
    right = reference._overlap_sum
    patch.setattr(reference, "_overlap_sum", lambda *args: right(*args).roll(1, -1))


def first_head_only(patch: pytest.MonkeyPatch) -> None:
    right = reference.block_importance

    def wrong(q, k_cmp, lse, *args, **kwargs):
        group = q.shape[1] // k_cmp.shape[1]
        return right(q[:, ::group], k_cmp, lse[:, ::group], *args, **kwargs)

    patch.setattr(reference, "block_importance", wrong)


def forced_blocks_dropped(patch: pytest.MonkeyPatch) -> None:
    right = reference.top_blocks
    patch.setattr(
        reference, "top_blocks", lambda *args: right(*args[:-1], replace(args[-1], num_initial=0, num_local=0))
    )


def future_token_in_the_own_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueryTable, "causal_range", lambda table: KeyRange(table.start, table.position + 1))


GUARDS = [
    (window_off_by_one, test_window.test_reference_equals_the_oracle, {"scale": None}),
    (overlap_shifted_by_a_block, test_importance.test_equals_the_oracle, {"scale": None}),
    (first_head_only, test_importance.test_equals_the_oracle, {"scale": None}),
    (forced_blocks_dropped, test_selection.test_chooses_the_most_important, {"impl": "reference"}),
    (future_token_in_the_own_block, test_selected.test_reference_equals_the_oracle, {"scale": None}),
]


@pytest.mark.parametrize(("plant", "guard", "fixed"), GUARDS, ids=[plant.__name__ for plant, *_ in GUARDS])
def test_a_planted_bug_is_found(plant: Callable, guard: Callable, fixed: dict[str, object], monkeypatch):
    # Without shrinking: that a counterexample exists is all that matters here.
    @settings(phases=(Phase.generate,), report_multiple_bugs=False)
    @given(case=cases())
    def guarded(case):
        guard.hypothesis.inner_test(case=case, **fixed)

    guarded()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        guarded()
