"""Small shapes of every kernel, to be run on a GPU under ``compute-sanitizer --tool memcheck`` or ``racecheck``.

Run as ``python tests/sanitize_selected.py`` first, which compiles, then as
``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize_selected.py``, so that each
tensor is an allocation of its own and a byte past its end is found. ``attend``, ``score`` or ``step`` as an argument
takes a part of the cases, ``--long`` more and larger ones. Exits with 1 where a result is wrong or a kernel was not
launched. The expected results come from the CPU: torch's own kernels would be checked too, and take longer than ours.
"""

import os
import pathlib
import sys
import time
from dataclasses import replace

import torch

root = pathlib.Path(__file__).parent
sys.path[:0] = [str(root), str(root.parent), str(root.parent / "masks")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import test_kernels_scoring as scoring  # noqa: E402
import test_kernels_selected as selected  # noqa: E402
import test_paged as paged  # noqa: E402
from flexnsa import NSAConfig, PagedKV, Pages, paged_step  # noqa: E402
from flexnsa.kernels import decode, selected_backward  # noqa: E402

SELECTED = [  # batch, KV heads, group, d, dv, select_block, tokens, documents, num_selected, seed, dtype
    (1, 1, 3, 80, 96, 32, 70, True, 3, 5, torch.float16),
    (1, 2, 16, 64, 64, 16, 50, False, 3, 3, torch.bfloat16),
    (1, 1, 16, 128, 128, 64, 150, True, 2, 7, torch.bfloat16),
    (1, 1, 16, 128, 128, 64, 640, False, 2, 58, torch.bfloat16),  # neighbours with nothing in common, and with some
]
LONG_SELECTED = [
    *((2, 2, group, 64, 64, 16, 200, documents, 5, 4, torch.bfloat16) for group in (1, 4, 8) for documents in (0, 1)),
    (1, 1, 4, 64, 64, 64, 300, True, 4, 6, torch.float32),
    (1, 1, 16, 128, 128, 64, 400, True, 16, 8, torch.bfloat16),
    (1, 1, 2, 192, 128, 128, 300, False, 2, 9, torch.float16),
]
GEOMETRY = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=5, window=16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KERNELS = {
    "_score", "_top_blocks", "_locate", "_divide", "_pair_keys", "_tabulate", "tile_attention", "query_attention",
    "pair_attention", "merge_pairs", "row_statistics", "pair_gradients", "sum_split_bins", "settle", "sum_query_pairs",
    "tile_gradients", "query_gradients", "score_compressed", "use_scores", "attend_chosen", "merge_branches",
    "attend_static", "select", "attend_selected", "add_selected", "_store",
}  # fmt: skip
if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9:
    KERNELS.add("fetched_attention")
LAUNCHED: set[str] = set()


def attend(*problem: object) -> None:
    """Selected attention, forward and backward, against dense attention on the CPU."""
    *sizes, dtype = problem
    options = {"select_block": sizes[5], "scale": 0.3}
    inputs, *table = selected.make(*sizes, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = selected.dense(*exact, *table, **options)
    want = [*want, *selected.gradients(*want, exact)]
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    where = [x.to(DEVICE) for x in table]
    for low in (None, where[-1]):  # the kernels without a mask, and those of one that hides nothing
        found = selected.selected_attention(*leaves, *where, low=low, **options)
        found = [*found, *selected.gradients(*found, leaves)]
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, want, strict=True):
            x, finite = x.detach().cpu().double(), y.isfinite()
            assert torch.equal(x.isfinite(), finite), (problem, name)
            assert (x - y)[finite].norm() <= TOLERANCE[dtype] * y[finite].norm() + 1e-6, (problem, name)


def score(tokens: int, group: int, dtype: torch.dtype) -> None:
    """Scoring and top-n against float64."""
    p = scoring.random_problem(GEOMETRY, tokens, 2 * group, 2, 64, dtype)
    scoring.assert_selects_best(p.select(), p)


def step(lengths: tuple[int, ...]) -> None:
    """A decoding step over pages, and the append before it, against the unpaged call."""
    shape = paged.Shape(GEOMETRY, lengths, hk=1, group=4, d=64, dv=64, dtype=torch.float32)
    x, pages = paged.filled(shape)
    there = replace(shape, device=DEVICE)
    own = there.sequences()
    _, filled = paged.filled(there, impl="triton")
    found = paged_step(own.q, own.gates, filled, own.lengths, GEOMETRY, impl="triton")
    paged.assert_same_pages(PagedKV(*(Pages(*(y.cpu() for y in part)) for part in filled)), pages)
    torch.testing.assert_close(found.out.cpu(), paged.unpaged(x, GEOMETRY), rtol=1e-4, atol=1e-5)


def note_launches(kind: type) -> None:
    """Add to ``LAUNCHED`` what is launched from here on."""
    launch = kind.run

    def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        LAUNCHED.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    kind.run = run


def main(*asked: str) -> None:
    """Every kernel at least once."""
    note_launches(InterpretedFunction if DEVICE == "cpu" else JITFunction)
    selected_backward._ROWS_PER_ITEM = 128  # so that few queries are several items already
    decode.FEW_LANES = 16  # so that a few more are many already
    calls = [(attend, case) for case in SELECTED]
    calls += [(score, (90, 4, torch.bfloat16)), (step, ((90, 0, 33),)), (step, (tuple(range(0, 80, 4)),))]
    if "--long" in asked:
        calls += [(attend, case) for case in LONG_SELECTED]
        calls += [(score, (tokens, group, torch.float16)) for tokens in (40, 211) for group in (1, 16)]
        calls += [(step, ((300,),)), (step, (tuple(range(0, 200, 7)),))]
    parts = {"attend", "score", "step"}.intersection(asked)
    for call, case in calls:
        if not parts or call.__name__ in parts:
            begin = time.perf_counter()
            call(*case)
            print(f"{call.__name__} {case}: {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"launched: {sorted(LAUNCHED)}")
    assert parts or KERNELS <= LAUNCHED, f"not launched: {sorted(KERNELS - LAUNCHED)}"
    print("all right")


if __name__ == "__main__":
    main(*sys.argv[1:])
