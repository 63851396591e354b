"""The dense engine never holds scores of tq x tk: 16k tokens in float32 fit into 4 GiB on a CPU."""

import resource
import subprocess
import sys

import pytest

FORWARD = """
import torch
from flexnsa import BranchKV, MeanPool, NSAConfig, native_sparse_attention

config, tokens = NSAConfig(), 16_384
q, k, v = (torch.randn(1, 8, tokens, 64) for _ in range(3))
gates = torch.rand(1, 8, tokens, 3)
with torch.no_grad():
    native_sparse_attention(q, BranchKV.shared(k, v), gates, config, MeanPool(config), impl="reference")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a child process as Linux counts it")
def test_16k_tokens_stay_under_4_gib():
    subprocess.run([sys.executable, "-c", FORWARD], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert peak < 4, f"{peak:.2f} GiB"
