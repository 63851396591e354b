"""The tables of what flash-attn-4 gains, from bench/results/flash."""

from collections.abc import Callable, Mapping
from typing import Any

import recorded

WITH, WITHOUT, DENSE = "flexnsa-flash-eager", "flexnsa-triton-eager", "cudnn"


def result() -> Mapping[str, Any]:
    """The run on record."""
    return recorded.result("flash/h200")


def where() -> str:
    """The device and the versions, in a sentence."""
    found = result()
    return f"{found['device']}, torch {found['torch']}, flash-attn-4 {found['flash-attn-4']}, {found['date']}."


def table() -> str:
    """Each branch and the whole with and without FLASH, beside dense attention where that was timed."""
    rows = {(row["stage"], row["tokens"], row["inputs"], row["engine"]): row for row in result()["rows"]}
    lines = [
        "| | tokens | FLASH: ms forward / backward | without | gain | FLASH x cuDNN | without |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (*place, engine), row in rows.items():
        stage, tokens, inputs = place
        if engine != WITH:
            continue
        other, dense = (rows.get((*place, name)) for name in (WITHOUT, DENSE))
        against = [_ratios(dense, x) for x in (row, other)]
        times = ["" if x is None else f"{x['forward_ms']:.2f} / {x['backward_ms']:.2f}" for x in (row, other)]
        name = stage if inputs == "random" else f"{stage}, {inputs}"
        lines.append(f"| {' | '.join((name, f'{tokens:,}', *times, _ratios(other, row), *against))} |")
    return "\n".join(lines)


def memory() -> str:
    """What the whole takes at its peak, with and without FLASH, in a sentence."""
    rows = [row for row in result()["rows"] if row["stage"] == "whole" and row["inputs"] == "random"]
    rows = [row for row in rows if row["engine"] != DENSE]
    peaks = {(row["tokens"], row["engine"]): row["peak_gib"] for row in rows}
    lengths = dict.fromkeys(tokens for tokens, _ in peaks)
    both = [tokens for tokens in lengths if (tokens, WITHOUT) in peaks]
    return "; ".join(f"{peaks[t, WITH]:.1f} GiB against {peaks[t, WITHOUT]:.1f} at {t:,} tokens" for t in both) + "."


def _ratios(slow: Mapping[str, float] | None, fast: Mapping[str, float] | None) -> str:
    if slow is None or fast is None:
        return ""
    return " / ".join(f"{slow[key] / fast[key]:.2f}" for key in ("forward_ms", "backward_ms"))


TABLES: Mapping[str, Callable[[], str]] = {"flash": table, "flash where": where, "flash memory": memory}
