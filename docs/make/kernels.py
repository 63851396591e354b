"""The tables of the page on kernels, from the files in bench/results/kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import recorded

REGIMES = {"random": "independent", "alike": "neighbours alike"}
MARK = " (chosen)"


def selected() -> str:
    """Selected attention beside dense attention of the same run."""
    found = _result("selected")
    dense = {(row["shape"], row["tokens"]): row for row in found["rows"] if row["case"] == "dense-causal"}
    ours = [row for row in found["rows"] if row["case"].removeprefix("selected-") in REGIMES]
    times = [name for name in TIMES if any(name in row for row in ours)]
    rows = []
    for row in ours:
        baseline, regime = dense[row["shape"], row["tokens"]], REGIMES[row["case"].removeprefix("selected-")]
        shares = [_beside(row.get(name), baseline.get(_pass(name))) for name in times]
        rows.append([f"`{row['shape']}`", f"{row['tokens']:,}", regime, *shares])
    head = ["heads and dim", "tokens", "selections", *(TIMES[name] for name in times)]
    return _table(head, rows, numbers=len(times)) + _where(found)


def scoring() -> str:
    """Scoring and top-n beside dense attention of the same run."""
    found = _result("scoring")
    dense = {(row["shape"], row["tokens"]): row["forward_ms"] for row in found["rows"] if row["case"] == "dense-causal"}
    rows = [
        [
            f"`{row['shape']}`",
            f"{row['tokens']:,}",
            _beside(row["forward_ms"], dense[row["shape"], row["tokens"]]),
            f"{row['scoring_alone_ms']:.2f}",
        ]
        for row in found["rows"]
        if row["case"] == "scoring-and-top-n"
    ]
    head = ["heads and dim", "tokens", "scoring and top-n, ms (of dense)", "scoring alone, ms"]
    return _table(head, rows, numbers=3) + _where(found)


def reads() -> str:
    """How near the forward comes to programs that read and do nothing else, in two sentences."""
    rows = _result("selected")["rows"]
    rates = [f"{row['tb_per_s']:.1f} TB/s at {row['tokens']:,} tokens" for row in rows if "tb_per_s" in row]
    found = [row for row in rows if "share_of_l2_read_rate" in row]
    if not rates or not found:
        return ""
    counts = " and ".join(f"{row['share_of_blocks_read']:.0%} at {row['tokens']:,}" for row in found)
    return (
        f"Programs that read 16 random blocks each, and do nothing else, reached {' and '.join(rates)}. Of independent "
        f"selections sharing leaves {counts} of the blocks to be read, and the forward as a whole reads them at "
        f"{min(row['share_of_l2_read_rate'] for row in found):.0%} of that rate or more."
    )


def designs(direction: str) -> str:
    """Every design of a direction that was timed, the fastest first, and what its kernels took."""
    found, time = _result("designs"), f"{direction}_ms"
    timed = sorted((row for row in found["rows"] if time in row), key=lambda row: row[time])
    rows = []
    for regime, name in REGIMES.items():
        for row in timed:
            if row["regime"] == regime:
                parts = sorted(row["kernels_ms"].items(), key=lambda part: -part[1])[:3]
                kernels = ", ".join(f"{kernel} {ms:.1f}" for kernel, ms in parts)
                bold = "**" if row["design"].endswith(MARK) else ""
                design = f"{bold}{row['design'].removesuffix(MARK)}{bold}"
                rows.append([design, name, f"{bold}{row[time]:.1f}{bold}", kernels])
    head = ["design", "selections", "ms", "its longest kernels, ms"]
    sizes = " and ".join(sorted({f"`{row['shape']}` at {row['tokens']:,} tokens" for row in timed}))
    return f"{sizes}:\n\n{_table(head, rows, numbers=1, last=1)}{_where(found)}"


def parts() -> str:
    """What the tiles take with a stage left out, and what the chip then draws."""
    found = _result("parts-h200")
    rows = [
        [row["variant"], f"{row['ms']:.2f}", f"{row['sm_mhz']:,.0f}", f"{row['watts']:.0f}"] for row in found["rows"]
    ]
    head = ["`tile_attention`, neighbours alike, 65,536 tokens", "ms", "clock, MHz", "W"]
    return _table(head, rows, numbers=3) + _where(found)


def counters() -> str:
    """What the profiler saw of one launch of each kernel: which part of the chip is busy, and what warps wait for."""
    found, rows = _result("ncu-h200"), []
    for row in found["rows"]:
        # An instruction that is selected is issued: nothing waits.
        stalls = {name: x for name, x in row["stalls_cycles_per_instruction"].items() if name != "selected"}
        numbers = ["" if row[name] is None else f"{row[name]:.0f}" for name in COUNTERS]
        waits = "<br>".join(f"{name.replace('_', ' ')} {cycles:.1f}" for name, cycles in stalls.items())
        rows.append([f"`{row['kernel']}`", REGIMES[row["regime"]], f"{row['duration_us'] / 1e3:.2f}", *numbers, waits])
    head = ["kernel", "selections", "ms", *COUNTERS.values(), "stalls"]
    table = _table(head, rows, numbers=1 + len(COUNTERS), last=1)
    return (
        "One launch of each under the profiler: busy parts of the chip in percent, warps on a multiprocessor, and the "
        f"cycles that an instruction waits, for what:\n\n{table}{_where(found)}"
    )


COUNTERS = {
    "l2_percent": "L2",
    "dram_percent": "memory",
    "tensor_percent": "matrix",
    "issue_active_percent": "issue",
    "warps_active": "warps",
}
TIMES = {
    "forward_ms": "forward, ms (of dense)",
    "forward_graph_ms": "the same as a CUDA graph",
    "backward_ms": "backward, ms (of dense)",
    "backward_graph_ms": "the same as a CUDA graph",
}
TABLES: Mapping[str, Callable[[], str]] = {
    "kernels selected": selected,
    "kernels scoring": scoring,
    "kernels reads": reads,
    "kernels counters": counters,
    "kernels parts": parts,
    "kernels forward designs": lambda: designs("forward"),
    "kernels backward designs": lambda: designs("backward"),
}


def _result(name: str) -> Mapping[str, Any]:
    return recorded.result(f"kernels/{name}")


def _pass(time: str) -> str:
    """The time of dense attention that goes with one of ours: a graph leaves nothing out there."""
    return time.replace("_graph", "")


def _beside(ms: float | None, dense: float | None) -> str:
    """A time, and its share of dense attention's."""
    if ms is None:
        return ""
    return f"{ms:.2f}" if dense is None else f"{ms:.2f} ({ms / dense:.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, last: int = 0) -> str:
    """Markdown; of the columns before the ``last`` ones, ``numbers`` hold numbers."""
    rules = ["---"] * (len(head) - numbers - last) + ["--:"] * numbers + ["---"] * last
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rules, *rows))


def _where(found: Mapping[str, Any]) -> str:
    commit = f", commit {found['commit']}" if found.get("commit") else ""
    told = [part for part in found["note"].split("; ") if "_ms" not in part]  # names of columns, told on the page
    return f"\n\n{recorded.where(found)}{commit}; {'; '.join(told)}."
