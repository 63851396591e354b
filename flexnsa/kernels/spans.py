"""How much of a call is in flight at once: lanes (batch element and KV head) and chunks of queries bound memory."""

from collections.abc import Iterator
from typing import NamedTuple

from flexnsa.kernels.launch import ceil_div

PARTIAL_BYTES = 416 << 20
"""Bytes that results of pairs may take, together with the larger of the tables held beside them."""

TABLE_BYTES = 224 << 20
"""Bytes of tables about the selection: what a call holds at once beside results of pairs and sums."""

_SORTED_PAIRS = 4 << 20

_BYTES_PER_SORTED = 64
"""Results held at once for each pair that is sorted with others: where little is held, tables are small as well."""


class Span(NamedTuple):
    """A run of adjacent lanes and adjacent chunks of queries whose pairs are sorted together.

    Attributes:
        lane: first lane.
        lanes: number of lanes.
        at_once: lanes whose results are held at once.
        query: first query.
        queries: queries of a chunk.
        chunks: number of chunks.
    """

    lane: int
    lanes: int
    at_once: int
    query: int
    queries: int
    chunks: int

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(first lane within the span, lanes, chunk) of each launch."""
        for lane in range(0, self.lanes, self.at_once):
            for chunk in range(self.chunks):
                yield lane, min(self.at_once, self.lanes - lane), chunk


def lane_groups(batch: int, heads: int, lane_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Batch elements and KV heads whose tables, ``lane_bytes`` each, are held at once, in ``TABLE_BYTES``."""
    most = max(1, TABLE_BYTES // lane_bytes)
    rows, columns = max(1, most // heads), min(heads, most)
    for row in range(0, batch, rows):
        for column in range(0, heads, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def spans(lanes: int, tq: int, n: int, pair_bytes: int, most_bytes: int, multiple: int = 1) -> Iterator[Span]:
    """Cover ``lanes`` x ``tq`` queries of ``n`` pairs each, ``pair_bytes`` of results a pair,
    of which ``most_bytes`` are held at once. Where a lane is several chunks, their queries are a ``multiple``.

    One lane's queries come before more lanes: the more queries that share a block are worked on together, the fewer
    times it is read.
    """
    most = max(16, most_bytes // (n * pair_bytes))
    chunks = ceil_div(tq, most)
    queries = tq if chunks == 1 else ceil_div(ceil_div(tq, chunks), multiple) * multiple
    chunks = ceil_div(tq, queries)
    at_once = max(1, min(lanes, most // queries))
    most_sorted = min(_SORTED_PAIRS, most_bytes // _BYTES_PER_SORTED)
    chunks_sorted = max(1, min(chunks, most_sorted // (at_once * queries * n)))
    lanes_sorted = max(at_once, min(lanes, most_sorted // (chunks_sorted * queries * n)) // at_once * at_once)
    for lane in range(0, lanes, lanes_sorted):
        for chunk in range(0, chunks, chunks_sorted):
            yield Span(
                lane=lane,
                lanes=min(lanes_sorted, lanes - lane),
                at_once=at_once,
                query=chunk * queries,
                queries=queries,
                chunks=min(chunks_sorted, chunks - chunk),
            )
