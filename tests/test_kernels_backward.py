"""What the backward of the Triton selected-attention path is made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnsa.kernels import selected_backward
from flexnsa.kernels.blocks import Blocks
from flexnsa.kernels.inversion import invert_selection
from flexnsa.kernels.items import list_items
from flexnsa.kernels.selected import selected_attention
from flexnsa.kernels.spans import Span
from test_kernels_selected import check, dense, gradients, make


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**20))
def test_items_are_the_pairs_of_each_block_longest_first(split, n, chunks, seed):
    rng = torch.Generator().manual_seed(seed)
    lanes, tq, bins, select = 2, 23, 6, 16
    seen = torch.randint(-1, bins * select, (lanes, tq), generator=rng).int()
    reach = seen.cummax(-1).values
    base = torch.stack([torch.randperm(bins, generator=rng)[:n].sort().values for _ in range(lanes * tq)]).int()
    base = base.view(lanes, tq, n) * select
    base = base.masked_fill(base > seen[..., None], -1)
    span = Span(0, lanes, 1, 0, -(-tq // chunks), chunks)
    found = invert_selection(base, None, span, bins * select, select, split)
    listed = list_items(found, Blocks(base, seen, seen, reach, None), span, select, split)[..., :5]
    for lane in range(lanes):
        for chunk in range(chunks):
            query0 = chunk * span.queries
            here = base[lane, query0 : query0 + span.queries].flatten()
            items = [x for x in listed[lane, chunk].tolist() if x[0] < x[1]]
            lengths = [end - begin for begin, end, *_ in items]
            assert lengths == sorted(lengths, reverse=True)
            assert max(lengths, default=0) <= split
            numbers = sorted(x[4] for x in items if x[4] >= 0)
            assert numbers == list(range(len(numbers)))
            pairs = found.pairs[lane, chunk].tolist()
            visited = [x for begin, end, *_ in items for x in pairs[begin:end]]
            assert sorted(visited) == (here >= 0).nonzero().flatten().tolist()
            for begin, end, token, limit, number in items:
                mine = pairs[begin:end]
                assert all(here[x] == token for x in mine)
                assert limit == min(token + select, reach[lane, query0 + mine[-1] // n] + 1)
                assert (number >= 0) == (int((here == token).sum()) > split)


@pytest.mark.parametrize("group", [9, 12, 16, 24, 32, 64])
def test_heads_of_any_number_in_a_tile(group):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 16, 24, False, 2, 6)
    check(inputs, indices, position, start, select_block=16, scale=0.3)


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_that_are_prepared_together(chunks, monkeypatch):
    monkeypatch.setattr(selected_backward, "PARTIAL_BYTES", 45000)  # and about 15,000 go to sums and tables
    monkeypatch.setattr(selected_backward, "_PREPARED_BYTES", chunks * 32 * (8 * 8 + 12 * 2))
    inputs, indices, position, start = make(1, 1, 8, 16, 16, 16, 110, False, 2, 19)
    assert position.shape[1] == 106  # four chunks of 32 queries at most
    check(inputs, indices, position, start, select_block=16, scale=0.3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("group", [2, 8])
def test_keys_that_fill_a_tile_up_count_for_nothing(group):
    inputs, indices, position, start = make(1, 1, group, 16, 16, 7, 40, False, 3, 6)
    q, k, v = (x.detach() for x in inputs)
    # Scores are about -150: exp(0 - lse), what a key of zeros would weigh, is infinite.
    leaves = [x.requires_grad_() for x in (q.abs() + 1, -10 - k.abs(), v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = {"select_block": 7, "scale": 0.5}
    found = gradients(*selected_attention(*leaves, indices, position, start, **options), leaves)
    wanted = gradients(*dense(*exact, indices, position, start, **options), exact)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-3)
