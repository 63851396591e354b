"""A finished run as one table."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
FULL = ("cudnn", "fa2", "sdpa")


def table(rows: Sequence[Row]) -> str:
    """Step time, speed, memory and attention's share of every row, as Markdown; ratios against the fastest full one."""
    lines = [
        "| attention | model | tokens | parameters | ms a step | tokens/s | x full | peak GiB | attention's kernels |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "step_ms" in row):
        full = fastest_full(rows, row["tokens"])
        low, high = row["step_range_ms"]
        lines.append(
            f"| {row['engine']} | {'compiled' if row['compiled'] else 'eager'} | {row['tokens']:,} "
            f"| {row['parameters'] / 1e6:,.1f}M | {row['step_ms']:,.1f} ({low:,.1f} to {high:,.1f}) "
            f"| {row['tokens_per_second']:,.0f} | {'' if full is None else format(full / row['step_ms'], '.2f')} "
            f"| {_number(row.get('peak_gib'), '.1f')} | {_number(row.get('attention_share'), '.0%')} |"
        )
    return "\n".join(lines)


def fastest_full(rows: Sequence[Row], tokens: int) -> float | None:
    """Milliseconds of the fastest step with full attention at a length, by any kernel, compiled or not."""
    times = [row["step_ms"] for row in rows if row["engine"] in FULL and row["tokens"] == tokens and "step_ms" in row]
    return min(times, default=None)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
