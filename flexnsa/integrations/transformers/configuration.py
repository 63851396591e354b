"""The configuration of the NSA language model: a Llama's or Qwen3's fields, and NSA's geometry beside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from flexnsa.compression import BlockCompressor, GatedPool, LinearCompressor, MeanPool, MLPCompressor
from flexnsa.config import NSAConfig
from flexnsa.engines import ENGINES, Impl

COMPRESSORS: dict[str, type[BlockCompressor]] = {
    "mlp": MLPCompressor,
    "linear": LinearCompressor,
    "gated": GatedPool,
    "mean": MeanPool,
}
"""The compressors by the name that a saved configuration has for them."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on the length of the text, so that cached keys stay right."""


class FlexNSAConfig(PreTrainedConfig):
    """Configuration of [`FlexNSAForCausalLM`][flexnsa.integrations.transformers.FlexNSAForCausalLM].

    >>> config = FlexNSAConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, nsa={"window": 128})
    >>> config.geometry.window, config.geometry.select_block, config.head_dim
    (128, 64, 16)

    Fields that a Llama or a Qwen3 has are named and meant as there. The others:

    Attributes:
        nsa: the geometry, an ``NSAConfig`` or a dict of some of its fields; what is left out has the paper's value.
        compressor: what makes compressed tokens: ``"mlp"``, ``"linear"``, ``"gated"`` or ``"mean"``.
        compress_rotated: compress keys after the rotary embedding instead of before it.
        shared_kv: one key and value projection for all branches instead of one for each.
        qk_norm: RMS-normalise queries and keys head by head, as Qwen3 does.
        attention_out_bias: a bias for the output projection; None for what ``attention_bias`` says.
        impl: the engine of every stage.

    Raises:
        ValueError: a field is out of range, or the geometry is larger than ``max_position_embeddings``.
        NotImplementedError: a rotary embedding that changes with the length of the text, or attention dropout.
    """

    model_type = "flexnsa"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    nsa: NSAConfig | dict[str, int] | None = None
    compressor: str = "mlp"
    compress_rotated: bool = False
    shared_kv: bool = False
    impl: Impl = "auto"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        self.nsa = asdict(self.nsa if isinstance(self.nsa, NSAConfig) else NSAConfig(**(self.nsa or {})))
        super().__post_init__(**kwargs)
        check_context(self.geometry, self.max_position_embeddings)
        self._check_choices()

    @property
    def geometry(self) -> NSAConfig:
        """The geometry as the library's own configuration."""
        return NSAConfig(**self.nsa)  # type: ignore[arg-type]

    def _check_choices(self) -> None:
        for name, choices in (("compressor", tuple(COMPRESSORS)), ("impl", ("auto", *ENGINES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.attention_dropout:
            raise NotImplementedError(
                f"attention_dropout must be 0, got {self.attention_dropout}: NSA's branches have no dropout"
            )
        check_rope(self.rope_parameters)


def check_rope(parameters: dict[str, Any]) -> None:
    """The rotary embedding turns a key by its position alone.

    Raises:
        NotImplementedError: it depends on the length of the text, or turns a part of the head only.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise NotImplementedError(f"rope_parameters must have a rope_type among {ROPE_TYPES}, got {kind!r}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(
            f"rope_parameters must rotate the whole head, got partial_rotary_factor="
            f"{parameters['partial_rotary_factor']}"
        )


def check_context(geometry: NSAConfig, context: int) -> None:
    """Every block and the window fit into a text of ``context`` tokens.

    Raises:
        ValueError: one of them is longer.
    """
    for name in ("compress_block", "select_block", "window"):
        if getattr(geometry, name) > context:
            raise ValueError(
                f"the geometry is larger than the context: {name}={getattr(geometry, name)}, but "
                f"max_position_embeddings={context}; lower {name}, or raise max_position_embeddings"
            )
