"""The table of training steps of a whole model, from what ``python -m bench model`` recorded."""

import recorded

from bench.model import report


def table() -> str:
    """A row for each attention, and where it was measured."""
    found = recorded.result("model/h200")
    note = f" Note: {found['note']}." if "note" in found else ""
    return f"{report.table(found['rows'])}\n\n{recorded.where(found)}.{note}"
