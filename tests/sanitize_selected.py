"""Small shapes of every kernel on a GPU, to be run under ``compute-sanitizer --tool memcheck`` or ``racecheck``.

Run as ``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize_selected.py``, so that
each tensor is an allocation of its own and a byte past its end is found. Exits with 1 where a result is wrong.
"""

import pathlib
import sys

import torch

root = pathlib.Path(__file__).parent
sys.path[:0] = [str(root), str(root.parent), str(root.parent / "masks")]

from flexnsa import NSAConfig  # noqa: E402
from flexnsa.kernels.scoring import select_blocks  # noqa: E402
from flexnsa.layout import query_table  # noqa: E402
from test_kernels_on_gpu import Config, assert_close, dense, draw  # noqa: E402

CONFIGS = [
    Config(1, 64, 64, 16, 3, torch.bfloat16),
    Config(3, 80, 96, 32, 5, torch.float16),
    Config(4, 64, 64, 64, 4, torch.float32),
    Config(16, 128, 128, 64, 16, torch.bfloat16),
]


def main() -> None:
    """Selected attention forward and backward, then scoring with top-n."""
    for config in CONFIGS:
        for seed in (0, 3, 6):
            p = draw(config, seed)
            for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), p.run(), dense(p), strict=True):
                assert_close(got, want, config.dtype, (config, seed, name))
    nsa = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=5, window=16)
    for tokens in (40, 211):
        q = torch.randn(1, 8, tokens, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, 2, nsa.num_compressed(tokens), 64, device="cuda", dtype=torch.bfloat16)
        lse, table = torch.full((1, 8, tokens), 3.0, device="cuda"), query_table(q, nsa, num_tokens=tokens)
        select_blocks(
            q, k, lse, table.position, table.start, table.offset, num_blocks=nsa.num_blocks(tokens), compress_block=16,
            compress_stride=8, select_block=16, num_selected=5, num_initial=1, num_local=2, scale=0.125,
        )  # fmt: skip
    torch.cuda.synchronize()
    print("all right")


if __name__ == "__main__":
    main()
