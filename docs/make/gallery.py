"""The mask gallery's page: every pattern of `flexnsa_masks.GALLERY` drawn, defined, counted and cited."""

import functools
import inspect
import io
import re
from collections.abc import Sequence
from itertools import groupby

from flexnsa_masks import GALLERY, Entry, density, draw, tile_density

COUNTED = 4096
DRAWN = 128
HEADS_DRAWN = 2
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


def table() -> str:
    """One row for each pattern: the call, and what it lets through."""
    rows = [
        f"| pattern | pairs | tiles | call at {COUNTED} tokens |",
        "|---|--:|--:|---|",
    ]
    for entry in GALLERY:
        pairs, tiles = _densities(entry)
        mark = "" if entry.causal else " \\*"
        rows.append(
            f"| [{entry.name}](#{entry.name}) | {pairs:.1%}{mark} | {tiles:.1%}{mark} | `{entry.call(COUNTED)}` |"
        )
    return "\n".join(rows)


def sections() -> str:
    """For each factory its module's definition, and for each of its patterns a picture and the source."""
    factories = groupby(GALLERY, lambda entry: entry.factory)
    return "\n\n".join(_section(list(entries)) for _, entries in factories)


@functools.cache
def files() -> dict[str, bytes]:
    """The pictures, by file name."""
    return {f"mask-{entry.name}.png": _picture(entry) for entry in GALLERY}


def _section(entries: Sequence[Entry]) -> str:
    factory = entries[0].factory
    module = inspect.getmodule(factory)
    assert module is not None and module.__doc__ is not None, factory
    title, _, definition = inspect.cleandoc(module.__doc__).partition("\n\n")
    name, _, subtitle = title.partition(": ")
    name_of_factory = factory.__name__
    heading = f"### {name} {{ #{name_of_factory if len(entries) > 1 else entries[0].name} }}"
    api = f"API: [`{name_of_factory}`][flexnsa_masks.{name_of_factory}]."
    return "\n\n".join(
        [
            heading,
            f"{subtitle[0].upper()}{subtitle[1:]}\n\n{definition} {api}",
            *(_example(e, len(entries) > 1) for e in entries),
        ]
    )


def _example(entry: Entry, one_of_several: bool) -> str:
    caption = f"`{entry.call(DRAWN, unit=1)}`, {DRAWN} tokens. Left: the keys (columns) that each query (row) sees; "
    caption += "right: the tiles that a kernel visits for them, dark where it need not mask."
    if entry.heads > 1:
        caption += f" A row for each of {min(entry.heads, HEADS_DRAWN)} heads, of {entry.heads}."
    heading = f"#### {entry.name} {{ #{entry.name} }}\n\n" if one_of_several else ""
    source = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", entry.source)
    return f"""{heading}<figure markdown="span">
![Visible pairs and visited tiles of {entry.name}](pictures/mask-{entry.name}.png){{ .on-white }}
<figcaption markdown="span">{caption}</figcaption>
</figure>

Paper: {source}."""


def _picture(entry: Entry) -> bytes:
    figure = draw(entry.build(DRAWN, unit=1), DRAWN, heads=min(entry.heads, HEADS_DRAWN), title="")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


@functools.cache
def _densities(entry: Entry) -> tuple[float, float]:
    mask_mod = entry.build(COUNTED)
    return (
        density(mask_mod, COUNTED, heads=entry.heads, causal=entry.causal),
        tile_density(mask_mod, COUNTED, heads=entry.heads, causal=entry.causal),
    )
