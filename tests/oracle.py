"""Native Sparse Attention as loops over sets of tokens: the definition, with nothing done for speed.

Every stage is stated as "which rows may this query read", a plain list of indices, followed by a softmax over exactly
those rows. Rows outside the list are never touched, and autograd through the loops gives the dense gradients of every
input.
Equation numbers are those of Yuan et al. 2025, arXiv 2502.11089.

Axes: b batch, hq query heads, hk KV heads, g = hq / hk, tq queries, tk tokens, c compressed tokens, s blocks, n
selected. A config is any object with the seven fields of `NSAConfig`; this module imports nothing from the library that
it judges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rows = Callable[[int, int, int], list[int]]
"""(batch row, KV head, query) -> the rows of k and v that the query reads."""


@dataclass(frozen=True)
class Layout:
    """Who stands where: the queries' positions [b][tq] and the tokens' document ids [b][tk], -1 for padding."""

    config: Any
    positions: list[list[int]]
    documents: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.documents[0])

    @property
    def num_blocks(self) -> int:
        return -(-self.tokens // self.config.select_block)

    @property
    def num_compressed(self) -> int:
        return max(0, (self.tokens - self.config.compress_block) // self.config.compress_stride + 1)

    def document_tokens(self, b: int, document: int) -> list[int]:
        """The tokens of one document; padding belongs to none."""
        return [k for k, owner in enumerate(self.documents[b]) if owner == document and owner >= 0]

    def document(self, b: int, t: int) -> list[int]:
        """The tokens of the query's document; empty for a query that is padding."""
        return self.document_tokens(b, self.documents[b][self.positions[b][t]])

    def seen(self, b: int, t: int) -> set[int]:
        """The tokens that query t may know about at all: those of its document that are not in its future."""
        return {k for k in self.document(b, t) if k <= self.positions[b][t]}

    def compressed_tokens(self, b: int) -> list[list[int]]:
        """What each compressed token of a row summarises, document after document (Eq. 7)."""
        size, stride = self.config.compress_block, self.config.compress_stride
        blocks = []
        for document in sorted(set(self.documents[b]) - {-1}):
            tokens = self.document_tokens(b, document)
            blocks += [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, stride)]
        return blocks

    def starts(self) -> list[list[int]]:
        """[b][c]: the first token of each compressed token, -1 where a row has fewer than one document would."""
        firsts = [[tokens[0] for tokens in self.compressed_tokens(b)] for b in range(len(self.documents))]
        return [row + [-1] * (self.num_compressed - len(row)) for row in firsts]

    def blocks(self, b: int, t: int) -> list[list[int]]:
        """The selection blocks of the query's document, the last one cut at its end."""
        size, tokens = self.config.select_block, self.document(b, t)
        return [tokens[i : i + size] for i in range(0, len(tokens), size)]

    def visible_compressed(self, b: int, t: int) -> list[int]:
        """Compressed tokens all of whose tokens are seen (Eq. 7)."""
        seen = self.seen(b, t)
        return [i for i, tokens in enumerate(self.compressed_tokens(b)) if set(tokens) <= seen]

    def candidates(self, b: int, t: int) -> list[int]:
        """Blocks any of whose tokens are seen."""
        seen = self.seen(b, t)
        return [j for j, tokens in enumerate(self.blocks(b, t)) if set(tokens) & seen]

    def forced(self, b: int, t: int) -> set[int]:
        """The first num_initial and the last num_local candidates; where they overlap they count once."""
        candidates = self.candidates(b, t)
        first = candidates[: self.config.num_initial]
        last = candidates[max(0, len(candidates) - self.config.num_local) :]
        return set(first) | set(last)

    def selected_tokens(self, b: int, t: int, chosen: list[int]) -> list[int]:
        """The seen tokens of the chosen blocks (Eq. 12)."""
        blocks, seen = self.blocks(b, t), self.seen(b, t)
        return [k for j in chosen if j >= 0 for k in blocks[j] if k in seen]

    def window_tokens(self, b: int, t: int) -> list[int]:
        """The seen ones among the last w positions, the query's own included."""
        position = self.positions[b][t]
        return sorted(self.seen(b, t) & set(range(position - self.config.window + 1, position + 1)))

    def block_weights(self, b: int, t: int) -> list[list[float]]:
        """[block][visible compressed token]: tokens in common, over the stride (Eq. 9, by the geometry)."""
        summaries = self.compressed_tokens(b)
        visible = self.visible_compressed(b, t)
        return [
            [len(set(block) & set(summaries[i])) / self.config.compress_stride for i in visible]
            for block in self.blocks(b, t)
        ]


def layout(
    config: Any, batch: int, num_tokens: int, positions: Tensor | None = None, documents: Tensor | None = None
) -> Layout:
    """Spells out the defaults: queries at 0..tk-1, one document a row."""
    places = torch.arange(num_tokens) if positions is None else positions
    owners = torch.zeros(batch, num_tokens, dtype=torch.int64) if documents is None else documents
    return Layout(config, places.expand(batch, places.shape[-1]).tolist(), owners.tolist())


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(d)) v over exactly the rows that `rows` names, and its LSE (Eq. 2 to 4).

    The g heads of a KV group stand in one matrix, because they read the same rows.
    """
    b, hq, tq, d = q.shape
    hk = k.shape[1]
    factor = d**-0.5 if scale is None else scale
    heads, lses = [], []
    for x in range(b):
        for h in range(hk):
            group = q[x, h * (hq // hk) : (h + 1) * (hq // hk)]
            for t in range(tq):
                out, lse = _attend(group[:, t], k[x, h], v[x, h], rows(x, h, t), factor)
                heads.append(out)
                lses.append(lse)
    out = torch.stack(heads).view(b, hk, tq, hq // hk, -1).transpose(2, 3).reshape(b, hq, tq, -1)
    lse = torch.stack(lses).view(b, hk, tq, hq // hk).transpose(2, 3).reshape(b, hq, tq)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: list[int], factor: float) -> tuple[Tensor, Tensor]:
    if not rows:
        return v.new_zeros(len(q), v.shape[-1]), q.new_full((len(q),), -torch.inf)
    logits = q @ k[rows].T * factor
    return logits.softmax(-1) @ v[rows], logits.logsumexp(-1)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, where: Layout, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed tokens that end at or before the query."""
    return attention(q, k_cmp, v_cmp, lambda b, h, t: where.visible_compressed(b, t), scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, where: Layout, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the last w tokens (section 3.3.3)."""
    return attention(q, k, v, lambda b, h, t: where.window_tokens(b, t), scale)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, where: Layout, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected blocks (Eq. 12)."""
    chosen = indices.tolist()
    return attention(q, k, v, lambda b, h, t: where.selected_tokens(b, t, chosen[b][h][t]), scale)


def block_importance(q: Tensor, k_cmp: Tensor, where: Layout, scale: float | None = None) -> Tensor:
    """Each block's share of the compressed attention, summed over a KV group's heads: [b, hk, tq, s] (Eq. 8 to 10)."""
    b, hq, tq, d = q.shape
    hk = k_cmp.shape[1]
    factor = d**-0.5 if scale is None else scale
    importance = q.new_zeros(b, hk, tq, where.num_blocks)
    for x in range(b):
        for t in range(tq):
            visible = where.visible_compressed(x, t)
            if not visible:
                continue
            weights = q.new_tensor(where.block_weights(x, t))
            for head in range(hq):
                h = head // (hq // hk)
                p_cmp = (k_cmp[x, h, visible] @ q[x, head, t] * factor).softmax(-1)
                importance[x, h, t, : len(weights)] += weights @ p_cmp
    return importance


def select_blocks(importance: Tensor, where: Layout) -> Tensor:
    """The forced blocks and the most important others: int32 [b, hk, tq, n], ascending, -1 behind (Eq. 11)."""
    b, hk, tq, _ = importance.shape
    scores = importance.tolist()
    indices = torch.full((b, hk, tq, where.config.num_selected), -1, dtype=torch.int32)
    for x in range(b):
        for t in range(tq):
            candidates, forced = where.candidates(x, t), where.forced(x, t)
            for h in range(hk):
                chosen = _most_important(scores[x][h][t], candidates, forced, where.config.num_selected)
                indices[x, h, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices


def _most_important(scores: list[float], candidates: list[int], forced: set[int], count: int) -> list[int]:
    """Ordered by (importance descending, index ascending), a NaN below every number."""

    def rank(j: int) -> tuple[bool, float, int]:
        missing = scores[j] != scores[j]
        return missing, 0.0 if missing else -scores[j], j

    others = sorted((j for j in candidates if j not in forced), key=rank)
    return sorted([*forced, *others][:count])


def mean_pool(k: Tensor, where: Layout) -> Tensor:
    """The mean of the tokens that each compressed token summarises: [b, hk, c, d], zero in the unused tail."""
    b, hk, _, d = k.shape
    pooled = []
    for x in range(b):
        means = [k[x, :, tokens].mean(1) for tokens in where.compressed_tokens(x)]
        unused = [k.new_zeros(hk, d)] * (where.num_compressed - len(means))
        pooled += means + unused
    if not pooled:
        return k.new_zeros(b, hk, 0, d)
    return torch.stack(pooled).view(b, -1, hk, d).transpose(1, 2)


def mix(gates: Tensor, branches: list[Tensor]) -> Tensor:
    """o[t] = sum over branches c of g_c[t] * o_c[t], one gate for each query head (Eq. 5)."""
    b, hq, tq, _ = gates.shape
    mixed = [
        gates[x, h, t] @ torch.stack([branch[x, h, t] for branch in branches])
        for x in range(b)
        for h in range(hq)
        for t in range(tq)
    ]
    return torch.stack(mixed).view(b, hq, tq, -1)


def native_sparse_attention(
    q: Tensor,
    kv: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    gates: Tensor,
    where: Layout,
    scale: float | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """The whole (Eq. 5) on compressed, selected and window K and V in this order; `indices` replays a selection."""
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = kv
    compressed, _ = compressed_attention(q, k_cmp, v_cmp, where, scale)
    if indices is None:
        indices = select_blocks(block_importance(q.detach(), k_cmp.detach(), where, scale), where)
    selected, _ = selected_attention(q, k_slc, v_slc, indices, where, scale)
    window, _ = window_attention(q, k_win, v_win, where, scale)
    return mix(gates, [compressed, selected, window])
