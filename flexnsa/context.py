"""What the parts of a composition tell one another: the protocols of branches and selectors, and their context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexnsa.config import NSAConfig
from flexnsa.engines import Impl
from flexnsa.layout import query_table
from flexnsa.types import KV, AttentionOutput, Positions, Selection
from flexnsa_masks import MaskMod, ScoreMod, and_masks, causal


class Attended(NamedTuple):
    """What a branch made its scores of, for those that read them later.

    Attributes:
        k: keys ``[b, hk, tk or c, d]``.
        v: values ``[b, hk, tk or c, dv]``.
        scale: softmax scale, None for ``d ** -0.5``.
        score_mod: what the branch did to its scores, or None.
    """

    k: Float[Tensor, "b hk keys d"]
    v: Float[Tensor, "b hk keys dv"]
    scale: float | None = None
    score_mod: ScoreMod | None = None


class Placing(NamedTuple):
    """Who sees whom: the arguments of a call that every branch has to obey.

    Attributes:
        positions: absolute positions of the queries, or None.
        documents: document of each KV token, or None.
        mask_mod: what replaces causality in every branch, or None.
    """

    positions: Positions | None = None
    documents: Int[Tensor, "b tk"] | None = None
    mask_mod: MaskMod | None = None


@dataclass
class AttentionContext:
    """What a branch or a selector may read beside its own queries, keys and values.

    Attributes:
        q: queries ``[b, hq, tq, d]``.
        x: the layer's input, from which the gate is made.
        kv: the keys and values that each branch was given, by name.
        num_tokens: KV tokens tk: the longest of the branches' sequences.
        placing: positions, documents and mask mod of the call; read them as properties of the context.
        impl: the engine asked for.
        lse_grad: whether anything may differentiate the branches' LSE.
        selector: makes the selection when it is first asked for.
        outputs: what the branches before this one returned, by name.
        attended: what they made their scores of, by name; a branch that transforms its keys, or scores in its own way,
            puts an ``Attended`` here.
        branch: name of the branch that is being computed.
        read: which of positions, documents and mask_mod that branch has read.
        given: the selection, once it is known; read it as the property ``selection``.
    """

    q: Float[Tensor, "b hq tq d"]
    x: Float[Tensor, "b tq dim"]
    kv: Mapping[str, KV]
    num_tokens: int
    placing: Placing
    impl: Impl
    selector: Selector | None
    lse_grad: bool = True
    outputs: dict[str, AttentionOutput] = field(default_factory=dict)
    attended: dict[str, Attended] = field(default_factory=dict)
    branch: str = ""
    read: set[str] = field(default_factory=set)
    given: Selection | None = None

    @property
    def positions(self) -> Positions | None:
        """Absolute positions of the queries, int64 ``[tq]`` or ``[b, tq]``; None for ``0 .. tk-1``."""
        self.read.add("positions")
        return self.placing.positions

    @property
    def documents(self) -> Int[Tensor, "b tk"] | None:
        """Document of each KV token, int ``[b, tk]``, -1 for padding; None for one document a row."""
        self.read.add("documents")
        return self.placing.documents

    @property
    def mask_mod(self) -> MaskMod | None:
        """What replaces causality, a mask mod over absolute token numbers and query heads; None for causality."""
        self.read.add("mask_mod")
        return self.placing.mask_mod

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every stage function takes: positions, documents, mask_mod and impl."""
        return {
            "positions": self.positions,
            "documents": self.documents,
            "mask_mod": self.mask_mod,
            "impl": self.impl,
        }

    def narrowed(self, mask_mod: MaskMod) -> dict[str, Any]:
        """``options`` in which a query sees a key only if ``mask_mod`` lets it, too."""
        whole = causal() if self.mask_mod is None else self.mask_mod
        return {**self.options, "mask_mod": and_masks(whole, mask_mod)}

    @property
    def selection(self) -> Selection:
        """The blocks of each query: those given with the call, or the selector's choice, made once.

        Raises:
            ValueError: the composition has no selector.
            TypeError: the selector returned something else.
        """
        if self.given is None:
            if self.selector is None:
                raise ValueError(
                    f'branch "{self.branch}" reads the selection, but selector is None; pass selector= to the '
                    f"composition, or selection= to the call"
                )
            read, self.read = self.read, set()
            self.given = self.selector.select(self.q, self)
            self.read = read
        if not isinstance(self.given, Selection):
            raise TypeError(f"selector must return Selection(indices), got {type(self.given).__name__}; wrap it")
        return self.given

    def earlier(self, name: str) -> tuple[Attended, AttentionOutput]:
        """What a branch before this one made its scores of, and its output.

        Raises:
            ValueError: no such branch was computed before.
        """
        if name not in self.outputs:
            raise ValueError(
                f'branch "{self.branch}" needs branch "{name}" before it, got {list(self.outputs)}; order the branches'
            )
        self.read.update(Placing._fields)  # obeyed by that branch already
        return Attended(*self.attended[name]), self.outputs[name]

    def own_block(self, config: NSAConfig) -> Int64[Tensor, "#b 1 tq 1"]:
        """Number of the selection block in which each query stands, counted from its document's start; -1 for padding.

        Compare it with ``torch.arange(s)`` to tell past, own and future blocks apart in a table ``[b, hk, tq, s]``.
        """
        table = query_table(
            self.q, config, num_tokens=self.num_tokens, positions=self.positions, documents=self.documents
        )
        own = (table.position - table.start).div(config.select_block, rounding_mode="floor")
        return own.masked_fill(table.position < 0, -1)[:, None, :, None]


class Branch(Protocol):
    """One way to attend. Any object with this method is a branch; an ``nn.Module`` has its parameters registered.

    One that differentiates no LSE, not even its own, may say so by an attribute ``differentiates_lse = False``. Where
    every branch and the selector say so, the LSEs come without gradients, and kernels may run that have none.
    """

    def attend(
        self,
        q: Float[Tensor, "b hq tq d"],
        k: Float[Tensor, "b hk tk d"],
        v: Float[Tensor, "b hk tk dv"],
        context: AttentionContext,
    ) -> AttentionOutput:
        """``AttentionOutput(out [b, hq, tq, dv], lse [b, hq, tq])`` of queries ``q [b, hq, tq, d]``."""
        ...


class Selector(Protocol):
    """One way to choose blocks. Any object with this method is a selector; ``differentiates_lse`` as of a branch."""

    def select(self, q: Float[Tensor, "b hq tq d"], context: AttentionContext) -> Selection:
        """The blocks of each query, by the contract of ``Selection``."""
        ...
