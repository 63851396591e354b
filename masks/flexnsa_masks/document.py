"""Documents: packed sequences do not see one another.

Definition: a query sees a key iff both carry the same id, and it is not -1 (padding, which sees nothing and is seen by
nothing). Source: sequence packing (Krell et al. 2021, arXiv 2107.02027). Ids need not be sorted; where
they are, the tiles are exact but for their edges.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexnsa_masks.geometry import FAR, Grid, MaskMod, Tiles, table_row, tile_bounds, unknown_tiles, with_tiles
from flexnsa_masks.intervals import with_interval


def document(ids: Tensor, key_ids: Tensor | None = None, *, contiguous: bool = False) -> MaskMod:
    """Mask mod: keys of the query's own document.

    Args:
        ids: integers `[t]` or `[b|1, t]`, document of each token, -1 for padding; of each query if there are `key_ids`.
        key_ids: integers `[tk]` or `[b|1, tk]`, the document of each key; None where keys and queries are the same.
        contiguous: whether the tokens of a document stand together, which makes the mask an interval; a promise that
            is not checked. Not with `key_ids`.

    Raises:
        ValueError: ids of another rank, or `contiguous` with `key_ids`.

    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(document(torch.tensor([0, 0, 1, -1])), 1, 1, 4, 4, device="cpu").int().tolist()
    [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]]]
    """
    query = _rows("ids", ids)
    key = query if key_ids is None else _rows("key_ids", key_ids)
    one_query, one_key = query.shape[0] == 1, key.shape[0] == 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = query[table_row(b, one_query), q_idx.to(torch.int64)]
        return (own >= 0) & (own == key[table_row(b, one_key), kv_idx.to(torch.int64)])

    def tiles(grid: Grid) -> Tiles:
        if grid.span is not None:
            return unknown_tiles(grid)
        grid.require("document", query, q_len=query.shape[1], kv_len=key.shape[1])
        q_low, q_high, q_one = (x[:, None, :, None] for x in _summary(query, grid.q_block))
        k_low, k_high, k_one = (x[:, None, None, :] for x in _summary(key, grid.kv_block))
        return Tiles((q_low <= k_high) & (k_low <= q_high), q_one & k_one & (q_low == k_low))

    named = with_tiles(mask_mod, tiles, "document")
    if not contiguous:
        return named
    if key_ids is not None:
        raise ValueError("document: expected contiguous=False with key_ids, got True; give the ids of all tokens")
    first, last = _edges(query)
    own = lambda table: lambda b, q_idx: table[table_row(b, one_query), q_idx.to(torch.int64)]  # noqa: E731
    return with_interval(named, last=own(last.where(query >= 0, -1)), first=own(first))


def _edges(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token of the run of equal ids that each token stands in, int64 `[b, t]`."""
    index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    change = ids[:, 1:] != ids[:, :-1]
    first = torch.where(pad(change, (1, 0), value=True), index, 0).cummax(1).values
    last = torch.where(pad(change, (0, 1), value=True), index, FAR).flip(1).cummin(1).values.flip(1)
    return first, last


def _rows(name: str, ids: Tensor) -> Tensor:
    if ids.dim() not in (1, 2):
        raise ValueError(f"document: expected {name} of shape [t] or [b, t], got {list(ids.shape)}")
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


def _summary(ids: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least and greatest id of each tile, padding apart, and whether a tile is of one document: `[b, tiles]` each."""
    least, greatest = tile_bounds(ids, tile)
    low, _ = tile_bounds(torch.where(ids < 0, FAR, ids), tile)
    return low, greatest, (least == greatest) & (least >= 0)
