"""The gallery on the command line: `python -m flexnsa_masks [PATTERN] [--stats] [--draw PNG] [--tokens N ..]`."""

import argparse
from collections.abc import Sequence

from flexnsa_masks.density import density, tile_density
from flexnsa_masks.draw import draw
from flexnsa_masks.gallery import GALLERY, Entry, find

LISTED = 8192
LENGTHS = (2048, 8192, 32768)
DRAWN = 128
# More rows than this and a picture shows nothing.
HEADS_DRAWN = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """List the gallery, or count or draw its patterns. Exits with status 2 on bad arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        entries = GALLERY if options.pattern is None else (find(options.pattern),)
        if options.draw is not None:
            _draw(entries, options.tokens or [DRAWN], options.draw)
        if options.stats:
            _print_stats(entries, options.tokens or LENGTHS)
        if options.draw is None and not options.stats:
            _print_list(entries, options.tokens or [LISTED])
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexnsa_masks",
        description="Published sparse attention patterns as FlexAttention masks. Without options: one line for each.",
    )
    parser.add_argument(
        "pattern", nargs="?", help=f"one of {', '.join(entry.name for entry in GALLERY)}; all if left out"
    )
    parser.add_argument("--stats", action="store_true", help="density in pairs and in tiles of 128, per length")
    parser.add_argument("--draw", metavar="PNG", help="draw the pattern in miniature to this file (needs matplotlib)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help=f"lengths, by default {', '.join(map(str, LENGTHS))} for stats, {LISTED} to list, {DRAWN} to draw",
    )
    return parser


def _print_list(entries: Sequence[Entry], tokens: Sequence[int]) -> None:
    for length in tokens:
        print(f"pairs visible at {length} tokens, of the causal ones (of all ones where marked *)")
        for entry in entries:
            share = density(entry.build(length), length, heads=entry.heads, causal=entry.causal)
            print(f"{entry.name:22} {_percent(share)}{_mark(entry)}  {entry.call(length)}  [{entry.source}]")


def _print_stats(entries: Sequence[Entry], tokens: Sequence[int]) -> None:
    print("share of causal pairs visible, of causal tiles of 128 visited (of all ones where marked *)")
    print(f"{'':24}" + "".join(f"{length:>20}" for length in tokens))
    for entry in entries:
        cells = []
        for length in tokens:
            mask_mod = entry.build(length)
            pairs = density(mask_mod, length, heads=entry.heads, causal=entry.causal)
            tiles = tile_density(mask_mod, length, heads=entry.heads, causal=entry.causal)
            cells.append(f"{_percent(pairs)}, {_percent(tiles)}")
        print(f"{entry.name:22} {_mark(entry)}" + "".join(f"{cell:>20}" for cell in cells))


def _draw(entries: Sequence[Entry], tokens: Sequence[int], path: str) -> None:
    if len(entries) != 1 or len(tokens) != 1:
        raise ValueError("--draw: expected one pattern and one length; name the pattern before the options")
    entry, length = entries[0], tokens[0]
    heads = min(entry.heads, HEADS_DRAWN)
    title = f"{entry.call(length, unit=1)}\n{entry.source}"
    draw(entry.build(length, unit=1), length, heads=heads, title=title).savefig(path)
    print(f"{path}: {entry.call(length, unit=1)}, {heads} of {entry.heads} heads")


def _percent(share: float) -> str:
    return f"{100 * share:6.2f}%"


def _mark(entry: Entry) -> str:
    return " " if entry.causal else "*"


if __name__ == "__main__":
    main()
