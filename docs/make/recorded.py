"""Results on record in bench/results: what was measured, and where."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench/results"


def result(name: str) -> Mapping[str, Any]:
    """What the file ``name`` below bench/results holds, its ending left out."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(found: Mapping[str, Any]) -> str:
    """The device, the versions and the date."""
    return f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['date'][:10]}"
