"""A decoding step over pages as one opaque operator: three or four launches, grids fixed by shapes, no host waits."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa.kernels.configs import generation, padded, shared_memory
from flexnsa.kernels.decode_chosen import attend_chosen, merge_branches
from flexnsa.kernels.decode_scores import score_compressed, use_scores
from flexnsa.kernels.decode_selected import add_selected, attend_selected, select
from flexnsa.kernels.decode_static import attend_static
from flexnsa.kernels.launch import computable
from flexnsa.kernels.scoring import LOG2E
from flexnsa.pages import PagedKV, Pages
from flexnsa.types import BranchKV

WAVE = 396
"""Programs that an H200 runs at a time, three on each multiprocessor."""

THIRD = 168
"""Registers a thread that let three programs of four warps share a multiprocessor."""

FEW_LANES = 32
"""Lanes that leave so much of a device idle that every program of the selected branch chooses for itself."""

MOST_BLOCKS = 8192
"""Blocks among which it does, for it holds an importance and a page of each in registers."""

SUMMED = 8192
"""Scores that such a step's program sums at a time, all in registers."""

SUMS: dict[str, Any] = {"enable_fp_fusion": False}
"""How a kernel is compiled that sums shares of tiles: a product is rounded before it is added, in every block alike.
Fused additions would round those blocks once that are not joined of two tiles, and ties would be none."""

MANY_LANES = 64
"""Lanes that keep a large device busy with little dividing: programs that start early only stand in the way there."""

FEW_PARTS = 4
"""Parts of a lane's selected blocks that one program merges; more have a launch of their own for that."""

WHOLE_ROW = 1 << 30
"""The size of a page that a whole row is, so that rows of every size are read by one kernel."""


class Layout(NamedTuple):
    """Where keys and values lie in their pages.

    Attributes:
        capacity: tokens of one sequence that fit.
        behind: places by which compressed tokens lie before those of `Pages`.
        ring: places of the window's ring, whose pages are whole rows; 0 for pages of `Pages`.
    """

    capacity: int
    behind: int
    ring: int


class Plan(NamedTuple):
    """How a step is divided: decided by shapes, never by lengths.

    Attributes:
        blocks: selection blocks whose compressed tokens are a tile.
        keys: raw tokens of a tile.
        stages: tiles in flight and the one that is worked on.
        run: selection blocks whose importances a program sums over the heads.
        compressed: programs that share a lane's compressed tokens; their keys, where values are read apart.
        values: programs that share a lane's compressed values: each those that some programs scored.
        window: programs that share a lane's window.
        alone: whether each of those that share the selected blocks chooses them for itself; then values are read apart.
        selected: programs that share a lane's selected blocks; up to ``FEW_PARTS`` write the output themselves, unless
            they choose.
        rows: heads that a program merges.
    """

    blocks: int
    keys: int
    stages: int
    run: int
    compressed: int
    values: int
    window: int
    alone: bool
    selected: int
    rows: int


def plan_step(lanes: int, blocks: int, config: NSAConfig, row_bytes: int, group: int, limit: int) -> Plan:
    """The division of a step over ``lanes`` sequences times KV heads whose tables name ``blocks`` selection blocks.

    ``row_bytes`` are those of a key and its value; ``limit`` is the shared memory that a program may take. Three
    programs share a multiprocessor where they fit.
    """
    widest = 64
    while widest > 16 and 2 * widest * row_bytes > limit // 3:
        widest //= 2
    stages = max(1, min(3, 1 + limit // 3 // (widest * row_bytes)))
    residues = _power(config.select_block // config.compress_stride)
    tile = max(1, widest // residues, 16 // residues)
    keys = min(widest, padded(config.select_block))
    scores, tiles = _scores(blocks, config), triton.cdiv(blocks, tile)
    window = max(1, min(256 // lanes, config.window // keys, 16))
    alone = lanes <= FEW_LANES and scores <= MOST_BLOCKS
    if alone:
        # Two programs a multiprocessor read keys. Afterwards those that choose are to have one to themselves: few
        # others, each with much to do, which nobody waits for.
        compressed = min(_floor(256 // lanes), 64, _power(tiles))
        values = min(compressed, max(_floor(64 // lanes), _power(triton.cdiv(tiles, 8))))
        window, selected = min(window, 4), max(8, 64 // lanes)
        run = min(max(32, _power(lanes * blocks // 64)), max(1, SUMMED // residues // padded(group)))
    else:
        compressed = values = min(_filling(lanes), tiles, 32)
        selected = max(1, 128 // lanes)
        run = tile * max(1, min(32, (512 if lanes < MANY_LANES else 4096) // padded(group) // tile))
    selected = min(selected, config.num_selected)
    least = 2 if alone and lanes >= 8 else 1
    rows = min(_power(group), max(least, 16 // _power(max(compressed, window, selected))))
    return Plan(tile, keys, stages, run, compressed, values, window, alone, selected, rows)


def _scores(blocks: int, config: NSAConfig) -> int:
    """Blocks of a row among which a program chooses."""
    return max(32, _power(config.num_selected), _power(blocks))


def _filling(lanes: int) -> int:
    """Programs a lane that fill a few waves well: one that is not full takes as long as one that is."""
    for waves in range(1, 8):
        programs = waves * WAVE // lanes
        if programs * lanes > 0.85 * waves * WAVE:
            return programs
    return 8 * WAVE // lanes or 1


def paged_step(
    q: Tensor, gates: Tensor, pages: PagedKV, lengths: Tensor, out: Tensor, config: NSAConfig, *, scale: float
) -> Tensor:
    """Write a step's output to ``out``; the selected blocks, int32 [b, hk, 1, n].

    Args:
        q: float16, bfloat16 or float32 [b, hq, 1, d], any strides.
        gates: [b, hq, 1, 3].
        pages: keys and values of q's dtype.
        lengths: [b], the query's own token included.
        out: [b, hq, 1, dv] of q's dtype, any strides.
        config: the geometry.
        scale: softmax scale.
    """
    layout = Layout(pages.capacity(config), 0, 0)
    return _call(q, gates, pages, lengths, out, config, layout, scale)


def cached_step(
    q: Tensor, gates: Tensor, kv: BranchKV, lengths: Tensor, out: Tensor, config: NSAConfig, *, max_tokens: int
) -> Tensor:
    """The same over rows that lie in one piece each, of at most ``max_tokens`` tokens, with a scale of ``d ** -0.5``.

    ``kv.compressed`` is by number, ``kv.selected`` by position; ``kv.window`` is a ring: position p is in place p
    modulo its size.
    """
    rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)[:, None]
    pages = PagedKV(*(Pages(k, v, rows) for k, v in kv))
    behind = config.compress_block // config.compress_stride - 1
    layout = Layout(max_tokens, behind, kv.window[0].shape[2])
    return _call(q, gates, pages, lengths, out, config, layout, q.shape[-1] ** -0.5)


def _call(
    q: Tensor,
    gates: Tensor,
    pages: PagedKV,
    lengths: Tensor,
    out: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> Tensor:
    tensors = [x for part in pages for x in part]
    geometry = list(asdict(config).values())
    return _paged_step(q, gates, *tensors, lengths.contiguous(), out, geometry, list(layout), scale)


@torch.library.custom_op("flexnsa::paged_step", mutates_args=("out",))
def _paged_step(
    q: Tensor,
    gates: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cmp_table: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    win_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    geometry: list[int],
    layout: list[int],
    scale: float,
) -> Tensor:
    config = NSAConfig(*geometry)
    parts = ((k_cmp, v_cmp, cmp_table), (k, v, table), (k_win, v_win, win_table))
    pages = PagedKV(*(Pages(computable(k), computable(v), _rows(table)) for k, v, table in parts))
    with torch.cuda.device_of(q):
        return run_step(computable(q), gates, pages, lengths, out, config, Layout(*layout), scale)


@_paged_step.register_fake
def _(  # type: ignore[no-untyped-def]
    q, gates, k_cmp, v_cmp, cmp_table, k, v, table, k_win, v_win, win_table, lengths, out, geometry, layout, scale
):
    num_selected = geometry[list(NSAConfig.__dataclass_fields__).index("num_selected")]
    return q.new_empty(q.shape[0], k.shape[1], 1, num_selected, dtype=torch.int32)


def _rows(table: Tensor) -> Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


def run_step(
    q: Tensor,
    gates: Tensor,
    pages: PagedKV,
    lengths: Tensor,
    out: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> Tensor:
    """Launch a step; the output goes to ``out``, the indices [b, hk, 1, n] are returned."""
    (batch, hq, _, d), (_, heads, _, dv) = q.shape, pages.selected.v.shape
    group, lanes = hq // heads, batch * heads
    blocks, slots = config.num_blocks(layout.capacity), max(16, _power(config.num_selected))
    row_bytes = (padded(d) + padded(dv)) * q.element_size()
    plan = plan_step(lanes, blocks, config, row_bytes, group, shared_memory(q.device))
    residues = _power(config.select_block // config.compress_stride)
    tiles, runs, rows = (triton.cdiv(*x) for x in ((blocks, plan.blocks), (blocks, plan.run), (group, plan.rows)))
    pitch, tiles_pitch = (triton.cdiv(x, 16) * 16 for x in (tiles * plan.blocks, tiles))

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(lanes, *shape, dtype=dtype, device=q.device)

    arguments: dict[str, Any] = {
        "q": q, "lengths": lengths, "gates": gates, "out": out, "scale_log2": scale * LOG2E.value,
        "indices": scratch(config.num_selected, dtype=torch.int32), "sums": scratch(pitch), "pitch": pitch,
        "heads": heads, "capacity": layout.capacity, "BEHIND": layout.behind, "WIN_RING": layout.ring, "G": group,
        "HEADS": padded(group), "D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv), "BLOCKS": plan.blocks,
        "RESIDUES": residues, "KEYS": plan.keys, "N": slots, "S": _scores(blocks, config), "imp_programs": runs,
        "WIN_BLOCKS": _power(triton.cdiv(config.window - 1, config.select_block) + 1),
        "ROWS": plan.rows, "STAGES": plan.stages,
        # Compressed keys wait for their page's number, which is therefore looked up as much earlier.
        "LATER_STAGES": 2 * plan.stages - 1, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        # Programs of a launch can start before the launch before it has ended.
        "EARLY": lanes < MANY_LANES and q.device.type == "cuda" and generation(q.device) >= 9,
    }  # fmt: skip
    arguments |= {name.upper(): value for name, value in asdict(config).items()}
    arguments |= _strides("q", q, "batch head _ dim") | _strides("out", out, "batch head _ dim")
    arguments |= _strides("gate", gates, "batch head _ branch")
    parts = {"cmp": plan.compressed, "val": plan.values, "win": plan.window, "slc": plan.selected}
    for name, programs in parts.items():
        arguments |= {f"{name}_programs": programs, f"{name.upper()}_MOST": _power(programs)}
        arguments |= {f"{name}_{of}": scratch(group, programs) for of in ("peaks", "totals")}
    for name in ("val" if plan.alone else "cmp", "win", "slc"):
        arguments[f"{name}_part"] = scratch(group, parts[name], dv)

    compressed, selected, window = (_reading(part, layout.ring > 0) for part in pages)
    window = _prefixed("win", window)
    if plan.alone:
        width, columns = tiles * plan.blocks * residues, min(padded(dv), 32)
        arguments |= {"scores": scratch(group, width), "scores_pitch": width, "summed": scratch(dtype=torch.int32)}
        arguments |= {"RUN": plan.run, "OWN": _own(config, plan), "SLC_STAGES": min(plan.stages, 2), "COLUMNS": columns}
        _launch(score_compressed, (lanes, plan.compressed), arguments | compressed, first=True)
        programs = plan.values + runs + plan.window
        # Where each has a multiprocessor to itself it had better be quick, elsewhere small.
        warps = 8 if lanes * programs <= WAVE // 2 else 4
        _launch(use_scores, (programs, lanes), arguments | compressed | window, num_warps=warps)
        _launch(attend_chosen, (plan.selected, lanes), arguments | selected, num_warps=8)
        _launch(merge_branches, (rows * (padded(dv) // columns), lanes), arguments, num_warps=1)
    else:
        merges = plan.selected <= FEW_PARTS
        arguments |= {"shares": scratch(group, pitch), "tiles_pitch": tiles_pitch}
        arguments |= {"arrived": scratch(dtype=torch.int32), "mixed": scratch(group, dv), "MERGES": merges}
        arguments |= {"TILES": plan.run // plan.blocks, "CHUNK": padded(group)}
        edges = ("ends", "befores", "afters", "tile_peaks", "next_peaks")
        arguments |= {name: scratch(group, tiles_pitch) for name in edges}
        # More heads than a product's tile has rows need more registers than that.
        third: dict[str, Any] = {"maxnreg": THIRD} if padded(group) == 16 else {}
        static = arguments | compressed | window
        _launch(attend_static, (lanes, plan.compressed + plan.window), static, first=True, **third)
        _launch(select, (lanes, runs + rows), arguments, **SUMS)
        _launch(attend_selected, (plan.selected, lanes), arguments | selected, **third)
        if not merges:
            _launch(add_selected, (rows, lanes), arguments)
    return arguments["indices"].view(batch, heads, 1, -1)


def _own(config: NSAConfig, plan: Plan) -> int:
    """Selected blocks, rounded up to a power of two, of which a program may be given a part."""
    parts = triton.cdiv(config.select_block, plan.keys)
    return _power((triton.cdiv(config.num_selected * parts, plan.selected) + parts - 2) // parts + 1)


def _launch(
    kernel: Any, grid: tuple[int, int], arguments: dict[str, Any], *, first: bool = False, **options: Any
) -> None:
    """Run a kernel on those of the arguments that it names; all but a step's first may start early."""
    options = {"num_warps": 4} | options
    if arguments["EARLY"] and not first:
        options["launch_pdl"] = True
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options)


def _reading(pages: Pages, whole: bool) -> dict[str, Any]:
    """A branch's keys and values as a kernel takes them; with ``whole``, one page is a row, whatever its size."""
    (k, v, table), axes = pages, "page head place dim"
    found = {"k": k, "v": v, "table": table, "table_row": table.stride(0), "num_pages": k.shape[0]}
    return found | _strides("k", k, axes) | _strides("v", v, axes) | {"PAGE": WHOLE_ROW if whole else k.shape[2]}


def _prefixed(prefix: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that they have in a kernel that reads several branches."""
    return {f"{prefix.upper() if name.isupper() else prefix}_{name}": value for name, value in arguments.items()}


def _strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(axes.split())}


def _power(x: int) -> int:
    """The least power of two from ``x`` on; 1 for 0."""
    return triton.next_power_of_2(max(x, 1))


def _floor(x: int) -> int:
    """The largest power of two up to ``x``; 1 for 0."""
    return _power(x + 1) // 2 if x else 1
