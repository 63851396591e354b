"""Every number of a comparison, as data: the presets, and how one twin's sizes follow from them."""

from dataclasses import dataclass, replace

import torch

from bench.learn.attention import AttentionShape
from bench.learn.model import HIDDEN_STEP, ModelShape, Transformer, count_parameters

SEARCHING = 0.3
"""Share of the steps in which an NSA that searches first has no selected branch in any row."""

READING = 0.5
"""Share of the rows in which it has none in the steps after those."""


@dataclass(frozen=True)
class Settings:
    """One comparison. All twins share everything but the attention's name and the MLP width that follows from it.

    Args:
        attention: sizes shared by the attentions.
        layers: transformer blocks.
        hidden: MLP width of the full-attention twin; the others get the width that gives as many parameters.
        context: tokens of one row.
        batch: rows of one step.
        tokens: training tokens each twin sees.
        learning_rate: peak; linear warm-up over 5% of the steps, then linearly to zero.
        minutes: training stops here, all twins together, whatever they have seen.
        evaluations: validation points on the curve, besides the first and the last.
        validation_rows: rows of the final validation; the curve uses a quarter of them.
        continuation: tokens to sample from each twin at the end, 0 for none.
        curriculum: shares of the steps, ascending, and a size before each: of a row's pairs (mqar) or tokens.
        pairs: of a row of mqar, None for a sixteenth of its tokens.
        grid: row lengths at which a trained passkey model is asked at every depth.
        convolution: tokens of a causal depthwise convolution after the embedding, 0 for none.
        embedding_std: standard deviation of the embedding's first values.
        matching: start every attention such that it looks for what is like the query and copies it.
        bfloat16: autocast to bfloat16 in training and validation.
        compiled: run each twin through torch.compile.
        captured: replay a training step from a CUDA graph, so that small kernels do not wait for Python.
        seed: of the weights, the batches and the sampled continuation.
    """

    attention: AttentionShape
    layers: int
    hidden: int
    context: int
    batch: int
    tokens: int
    learning_rate: float
    minutes: float
    evaluations: int
    validation_rows: int
    continuation: int = 240
    curriculum: tuple[tuple[float, int], ...] = ()
    pairs: int | None = None
    grid: tuple[int, ...] = ()
    convolution: int = 0
    embedding_std: float = 0.02
    matching: bool = False
    bfloat16: bool = False
    compiled: bool = False
    captured: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "context", "batch", "learning_rate", "minutes", "validation_rows"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.tokens < self.batch * self.context:
            raise ValueError(
                f"tokens: expected at least one step of batch * context = {self.batch * self.context}, "
                f"got {self.tokens}; raise --tokens or shorten --context"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // (self.batch * self.context)

    @property
    def step_sizes(self) -> tuple[tuple[int, int], ...]:
        """The curriculum in steps instead of shares."""
        return tuple((round(share * self.steps), size) for share, size in self.curriculum)

    def unselected(self, tokens: int) -> float:
        """Share of a step's rows in which NSA does without its selected branch, if it searches first."""
        return 1.0 if tokens < SEARCHING * self.tokens else READING

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm_up = max(1, self.steps // 20)
        return self.learning_rate * min(1.0, (step + 1) / warm_up) * (1 - step / self.steps)


def twin_shape(settings: Settings, attention: str, vocabulary: int) -> ModelShape:
    """Sizes of one twin: its MLP is as wide as makes its parameters equal those of the full-attention twin."""
    shape = ModelShape(
        settings.attention,
        settings.layers,
        settings.hidden,
        vocabulary,
        settings.convolution,
        settings.embedding_std,
        settings.matching,
    )
    with torch.device("meta"):
        surplus = count_parameters(Transformer(shape, attention)) - count_parameters(Transformer(shape, "full"))
    one_step = 3 * settings.attention.dim * settings.layers * HIDDEN_STEP
    hidden = settings.hidden - HIDDEN_STEP * round(surplus / one_step)
    if hidden <= 0:
        raise ValueError(
            f"hidden: {attention!r} attention alone has {surplus} parameters more than full attention, which an MLP of "
            f"width {settings.hidden} cannot make up for; widen the MLP"
        )
    return replace(shape, hidden=hidden)
