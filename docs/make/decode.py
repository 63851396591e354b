"""The table of a decoding step's time, from what ``python -m bench decode`` recorded."""

import recorded

from bench.decode import report

RESULT = "decode/h200"


def table() -> str:
    """A row for each case: microseconds, and how much faster than dense; then what a prompt in chunks costs."""
    rows = recorded.result(RESULT)["rows"]
    return f"{report.table(rows)}\n{_chunks(rows)}"


def _chunks(rows: list[report.Row]) -> str:
    """What a prompt costs in chunks, in a sentence, where it was measured."""
    found = report.chunked(rows)
    if found is None:
        return ""
    row, ratio = found
    return (
        f"\nA prompt of {row['tokens']:,} tokens through a layer of width {row['dim']:,} with a cache takes "
        f"{row['us'] / 1000:.1f} ms in eager calls of {row['chunk']:,}, {ratio:.2f} times what one call takes.\n"
    )


def where() -> str:
    """The device, the versions and the date, in a sentence."""
    return f"{recorded.where(recorded.result(RESULT))}."
