"""Sharded layers equal one process: ranks are started once and run every check of distributed_checks.py."""

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexnsa
import ranks
from conftest import assert_close, geometries, packed_rows, part, placements
from distributed_checks import BROKEN, CHECKS, THOROUGH, build, normal
from flexnsa.integrations import distributed
from test_house import imported_modules

SCRIPT = Path(__file__).with_name("distributed_checks.py")
SIGNATURES = {
    "ContextParallel": "balanced",
    "KVGroupParallel": "input_layout output_layout use_local_output",
    "gather_sequence": "x mesh dim balanced",
    "sequence_positions": "tokens mesh balanced device",
    "shard_sequence": "x mesh dim balanced",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ranks.Outcomes]:
    names = {count: [*checks, *BROKEN.get(count, {})] for count, checks in CHECKS.items()}
    return ranks.run_on_ranks(SCRIPT, names, tmp_path_factory.mktemp("ranks"), seconds=400)


@pytest.mark.parametrize(
    ("count", "check"),
    [(count, check) for count, checks in CHECKS.items() for check in checks],
    ids=lambda value: f"{value} ranks" if isinstance(value, int) else value,
)
def test_every_rank_agrees_with_one_process(outcomes: dict[int, ranks.Outcomes], count: int, check: str):
    for rank, outcome in enumerate(outcomes[count][check]):
        assert outcome == ranks.PASSED, f"rank {rank}: {outcome}"


@pytest.fixture(scope="module")
def outcomes_on_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ranks.Outcomes]:
    names = {count: list(checks) for count, checks in CHECKS.items() if count <= torch.cuda.device_count()}
    return ranks.run_on_ranks(SCRIPT, names, tmp_path_factory.mktemp("gpus"), seconds=400, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("count", CHECKS)
def test_every_gpu_agrees_with_one(outcomes_on_gpus: dict[int, ranks.Outcomes], count: int):
    """The same checks over NCCL, outputs and gradients in float64."""
    if count > torch.cuda.device_count():
        pytest.skip(f"needs {count} GPUs")
    for check, found in outcomes_on_gpus[count].items():
        assert found == [ranks.PASSED] * count, f"{check}: {found}"


def test_a_check_that_fails_on_one_rank_fails_on_all_and_ends_the_run(outcomes: dict[int, ranks.Outcomes]):
    """The harness itself: nothing passes that was not run to its end."""
    broken, waiting = outcomes[2]["fails on one rank"]
    assert "on purpose" in broken
    assert "barrier" in waiting
    assert outcomes[2]["after it"] == [ranks.NOT_REACHED] * 2


@part(4)
@given(st.data())
def test_any_rows_of_a_sequence_are_those_of_the_whole(data: st.DataObject):
    """What each rank computes, without ranks: one kind of positions for all rows of the batch, or one each."""
    config, batch = data.draw(geometries()), data.draw(st.sampled_from((1, 2)))
    tokens = data.draw(st.integers(1, 24))
    documents = data.draw(packed_rows(batch, tokens)) if data.draw(st.booleans()) else None
    positions = data.draw(placements(batch, tokens))
    options = {"rope_theta": 10.0, "qk_norm": True, "shared_kv": data.draw(st.booleans())}
    layer, x = build(config, **options), normal(batch, tokens, 12)
    with torch.no_grad():
        known = [*map(layer._key_value, layer.k_proj, [x] * len(layer.k_proj))]
        whole = iter([y for pair in known for y in pair])
        rows = positions.expand(batch, -1)[..., None].expand(-1, -1, 12)
        found = layer.forward_part(
            x.gather(1, rows), positions=positions, gather=lambda part: next(whole), documents=documents
        )
        expected = layer(x, documents=documents).gather(1, rows)
    assert_close([found], [expected])


@pytest.mark.parametrize(
    ("positions", "message"),
    (
        (torch.tensor([0, 2]), "positions must be"),
        (torch.tensor([2, 1, 0]), "strictly increasing"),
        (torch.tensor([1, 2, 8]), r"0 .. 7, got 1 .. 8"),
        (torch.tensor([0.0, 1.0, 2.0]), "int64"),
    ),
    ids=("count", "order", "range", "dtype"),
)
@pytest.mark.parametrize("documents", (None, torch.zeros(1, 8, dtype=torch.int64)), ids=("row", "packed"))
def test_rows_that_are_not_there_are_refused(positions, message, documents):
    layer, whole = build(), torch.zeros(1, 4, 8, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        layer.forward_part(
            normal(1, 3, 12), positions=positions, gather=lambda part: whole[..., : part.shape[3]], documents=documents
        )


def test_names_are_pinned_and_documented():
    assert distributed.__all__ == list(SIGNATURES)
    for name, parameters in SIGNATURES.items():
        value = getattr(distributed, name)
        assert " ".join(inspect.signature(value).parameters) == parameters, name
        assert inspect.getdoc(value)


def test_the_core_knows_nothing_of_integrations():
    package = Path(flexnsa.__file__).parent
    for path in [*package.glob("*.py"), *package.glob("kernels/*.py")]:
        assert not any(name.startswith("flexnsa.integrations") for name in imported_modules(path)), path


@pytest.mark.thorough
@pytest.mark.parametrize("check", THOROUGH[2])
def test_long_checks(tmp_path: Path, check: str):
    found = ranks.run_on_ranks(SCRIPT, {2: [check]}, tmp_path, seconds=500)
    assert found[2][check] == [ranks.PASSED] * 2
