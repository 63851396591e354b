"""Every kernel, compiled for every chip without a GPU: its shared memory fits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

EVERY_DIM = [[16, 16], [64, 64], [80, 96], [128, 128], [192, 128], [256, 256]]


def compile_everywhere(every: bool, operators: list[str], *lists: list) -> set[str]:
    """The names of the kernels that were compiled, all of which fit; in a process that does not interpret them."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, "-W", "ignore", str(script), json.dumps([every, operators, *lists])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for row in found:
        assert row["shared"] <= row["limit"], row
    return {row["kernel"] for row in found}


@pytest.mark.parametrize(
    ("operator", "capability", "dims", "group", "kernels"),
    [
        ("attend", 89, [192, 128], 16, {"tile_attention", "query_attention", "pair_gradients", "query_gradients"}),
        ("attend", 90, [128, 128], 16, {"fetched_attention", "tile_attention", "query_attention"}),
        ("attend", 80, [128, 128], 4, {"tile_attention", "pair_attention", "pair_gradients"}),
        ("select", 90, [128, 128], 16, {"_score"}),
        ("step", 100, [128, 128], 16, {"attend_static", "attend_selected", "use_scores", "attend_chosen"}),
    ],
)
def test_kernels_compile_and_fit(operator, capability, dims, group, kernels):
    assert kernels <= compile_everywhere(False, [operator], [capability], ["bfloat16"], [dims], [64], [group])


@pytest.mark.thorough
@pytest.mark.timeout(0)
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operator", ["select", "attend", "step"])
@pytest.mark.parametrize("dims", EVERY_DIM, ids=str)
def test_every_configuration_compiles_and_fits(dims, operator, dtype, capability):
    assert compile_everywhere(True, [operator], [capability], [dtype], [dims], [16, 32, 64, 128], [1, 4, 16, 64])
