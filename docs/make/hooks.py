"""What the build adds to the pages: pictures and tables from real runs of the library, and maths as MathML.

In a page `<!-- generated: NAME -->` stands for the Markdown of `TABLES[NAME]`, `pictures/NAME.svg` for the picture
`PICTURES[NAME]`, drawn for the light and for the dark theme, and `$x$` for maths, which browsers render by themselves.
"""

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

import conversion
import decode
import distributed
import gallery
import gpu_tests
import kernels
import learn
import learn_pictures
import learn_tables
import model
import pictures
import speed
import support
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

TABLES: Mapping[str, Callable[[], str]] = {
    "conversion": conversion.table,
    "decode": decode.table,
    "decode where": decode.where,
    "decode designs": decode.designs,
    "decode bounds": decode.bounds,
    "decode timeline": decode.timeline,
    "distributed": distributed.table,
    "gpu tests": gpu_tests.table,
    "learn": learn.table,
    "gallery": gallery.table,
    "model": model.table,
    "gallery pictures": gallery.sections,
    "auto": support.auto_order,
    "engines": support.engines_table,
    "support": support.support_table,
    **kernels.TABLES,
    **speed.TABLES,
    **learn_tables.TABLES,
    **learn_pictures.PLACES,
}
MARKER = re.compile(r"<!-- generated: (.+?) -->")
PICTURE = re.compile(r"!\[([^\]]*)\]\(((?:\.\./)*)pictures/([\w-]+)\.svg\)")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Draw every picture."""
    measured = pictures.themed({**speed.PICTURES, **learn_pictures.PICTURES})
    for path, content in (pictures.files() | measured | gallery.files()).items():
        files.append(File.generated(config, f"pictures/{path}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the tables, and a picture for each theme."""
    markdown = MARKER.sub(lambda found: TABLES[found[1]](), markdown)
    return PICTURE.sub(_for_each_theme, markdown)


def _for_each_theme(found: re.Match[str]) -> str:
    caption, up, name = found.groups()
    return "".join(f"![{caption}]({up}pictures/{name}-{theme}.svg#only-{theme})" for theme in pictures.THEMES)


def on_page_content(content: str, **_: Any) -> str:
    """Render the maths."""
    return MATHS.sub(lambda found: _mathml(html.unescape(found[2]), block=found[1] == "div"), content)


def _mathml(latex: str, *, block: bool) -> str:
    rendered = convert(latex.strip(), display="block" if block else "inline")
    return f'<div class="math">{rendered}</div>' if block else rendered
