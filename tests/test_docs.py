"""The pages: their Python runs, and every public name has its place on an API page."""

import functools
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import flexnsa
import flexnsa_masks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def code_of(page: Path) -> str:
    """The page's Python blocks, each on its own lines of the page, so that a traceback points there."""
    text = page.read_text()
    code, line = "", 1
    for block in BLOCK.finditer(text):
        begins = text[: block.start(1)].count("\n") + 1
        code += "\n" * (begins - line) + block[1]
        line = begins + block[1].count("\n")
    return code


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    # Graphs are captured whole as ever; generating machine code for them would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("package", [flexnsa, flexnsa_masks, flexnsa.inspect], ids=lambda package: package.__name__)
def test_every_public_name_has_one_place_in_the_api(package):
    entries = [name for page in (ROOT / "docs/api").glob("*.md") for name in ENTRY.findall(page.read_text())]
    places = {name: entries.count(f"{package.__name__}.{name}") for name in package.__all__}
    assert {name: count for name, count in places.items() if count != 1} == {}


def test_the_readme_has_the_numbers_of_the_recorded_demo():
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = json.loads((ROOT / "bench/results/learn/text-cpu-seed0.json").read_text())["rows"]
    bits = {row["attention"]: f"{row['bits_per_token']:.3f}" for row in rows}
    assert f"NSA {bits['nsa']}, window alone {bits['window']}, full attention {bits['full']}" in text


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/make/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_works_where_was_recorded_for_every_feature():
    support = script("support")
    records = list((ROOT / "docs/make").glob("support-*.json"))
    assert records
    for path in records:
        cells = json.loads(path.read_text())["cells"]
        assert list(cells) == list(support.FEATURES), path
        assert not [cell for cell in support.bad(cells) if "wrong: " in cell]


def test_a_feature_that_takes_too_long_is_said_to_be_untried():
    support = script("support")
    cells = {"float64": support._in_a_process("float64", ends=0)}
    assert cells == {"float64": dict.fromkeys(support.TRIED, "not tried: the time was up")}
    assert len(support.bad(cells)) == len(support.TRIED)


def test_what_works_where_is_still_so():
    """The rows that Triton's interpreter is quick about; a result that is wrong raises."""
    support = script("support")
    recorded = json.loads((ROOT / "docs/make/support-cpu.json").read_text())["cells"]
    for name in ("fewer tokens than a compressed one", "float64"):
        for engine in ("flex", "reference"):
            assert support.attempt(support.FEATURES[name], engine) == recorded[name][engine]
