"""The oracle against what the paper states in numbers and against torch's own attention."""

import torch

import oracle
from conftest import Case, assert_close
from flexnsa import NSAConfig


def at(position: int, config: NSAConfig, tokens: int = 2048) -> oracle.Layout:
    return oracle.layout(config, 1, tokens, torch.tensor([position]))


def test_paper_geometry_has_block_weights_1_2_2_2_1():
    weights = at(1023, NSAConfig()).block_weights(0, 0)
    for j in range(1, 15):
        expected = [0.0] * 63
        expected[4 * j - 1 : 4 * j + 4] = [1.0, 2.0, 2.0, 2.0, 1.0]
        assert weights[j] == expected


def test_a_compressed_token_appears_with_its_last_token():
    assert at(30, NSAConfig()).visible_compressed(0, 0) == []
    assert at(31, NSAConfig()).visible_compressed(0, 0) == [0]
    assert at(46, NSAConfig()).visible_compressed(0, 0) == [0]
    assert at(47, NSAConfig()).visible_compressed(0, 0) == [0, 1]


def test_forced_blocks_count_once_and_the_freed_slots_go_to_others():
    where = at(100, NSAConfig(num_selected=3))
    assert where.candidates(0, 0) == [0, 1]
    assert where.forced(0, 0) == {0, 1}
    where = at(300, NSAConfig(num_selected=4))
    assert where.forced(0, 0) == {0, 3, 4}
    scores = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0] + [9.0] * 27).expand(1, 1, 1, -1)
    assert oracle.select_blocks(scores, where).tolist() == [[[[0, 1, 3, 4]]]]


def test_nan_ranks_below_every_number():
    where = at(300, NSAConfig(num_selected=2, num_initial=0, num_local=0))
    scores = torch.tensor([torch.nan, -torch.inf, torch.nan, 0.0, torch.nan] + [9.0] * 27).expand(1, 1, 1, -1)
    assert oracle.select_blocks(scores, where).tolist() == [[[[1, 3]]]]


def test_documents_start_blocks_of_their_own():
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
    documents = torch.tensor([[-1, 2, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, -1]])
    where = oracle.layout(config, 1, 14, None, documents)
    assert where.starts() == [[1, 3, 8, -1, -1, -1]]
    assert where.blocks(0, 5) == [[1, 2, 3, 4], [5, 6, 7]]
    assert where.window_tokens(0, 9) == [8, 9]
    assert where.window_tokens(0, 0) == []
    assert where.visible_compressed(0, 11) == [2]


def test_everything_visible_is_torchs_causal_attention():
    case = Case(NSAConfig(window=16), kv_heads=2, group=3, dim=5, value_dim=3)
    x = case.inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(x.q, x.k_win, x.v_win, is_causal=True, enable_gqa=True)
    assert_close([oracle.window_attention(x.q, x.k_win, x.v_win, case.where)[0]], [expected])
