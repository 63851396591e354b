"""A Llama or a Qwen3 whose attention is NSA."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from flexnsa.integrations.transformers.attention import FlexNSAAttention
from flexnsa.integrations.transformers.cache import FlexNSACache
from flexnsa.integrations.transformers.configuration import FlexNSAConfig
from flexnsa.integrations.transformers.padding import documents_from_mask, documents_from_positions

ASSISTED_ROLLBACK = 64
"""Tokens that assisted generation can take back at once: more than assistants propose."""


class FlexNSADecoderLayer(GradientCheckpointingLayer):
    """NSA and the gated MLP, each after a norm and beside a residual."""

    def __init__(self, config: FlexNSAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = FlexNSAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Float[Tensor, "b t dim"],
        documents: Int64[Tensor, "b t"] | None = None,
        past_key_values: FlexNSACache | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """``[b, t, dim]`` to the same."""
        hidden_states = hidden_states + self.self_attn.attend(
            self.input_layernorm(hidden_states), documents, past_key_values
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class FlexNSAPreTrainedModel(PreTrainedModel):
    """What the models share: their configuration, and how weights begin."""

    config_class = FlexNSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["FlexNSADecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": FlexNSADecoderLayer}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm) or module.__module__ == "flexnsa.compression":
            own = list(module.parameters(recurse=False))
            if own and not all(getattr(parameter, "_is_hf_initialized", False) for parameter in own):
                cast(Any, module).reset_parameters()


class FlexNSAModel(FlexNSAPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: FlexNSAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([FlexNSADecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Int64[Tensor, "b t"] | None = None,
        attention_mask: Shaped[Tensor, "b columns"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: FlexNSACache | None = None,
        inputs_embeds: Float[Tensor, "b t dim"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[b, t, dim]``.

        Args:
            input_ids: tokens ``[b, t]``.
            attention_mask: ``[b, t]``, 0 for padding on either side of a row; with a cache its last t columns count.
            position_ids: ``[1, t]`` or ``[b, t]``; where they begin anew, a new document begins, as in packed rows. A
                token's place in its document is counted here, padding left out, whatever they say.
            past_key_values: the cache that the tokens are added to.
            inputs_embeds: in place of ``input_ids``.
            use_cache: make a cache of ``max_position_embeddings`` tokens where none is given.
            kwargs: what else transformers hands down, without effect on the attention.

        Raises:
            TypeError: the cache is not a ``FlexNSACache``.
            ValueError: the arguments do not fit.
            NotImplementedError: attention weights are asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or neither")
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions must be False: NSA has no one matrix of weights to return")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and use_cache and not (self.training and self.layers[0].gradient_checkpointing):
            past_key_values = FlexNSACache(self.config, self.config.max_position_embeddings)
        _check_cache(past_key_values)
        documents = _documents(x, attention_mask, position_ids if past_key_values is None else None)
        for layer in self.layers:
            x = layer(x, documents=documents, past_key_values=past_key_values)
        if past_key_values is not None:
            past_key_values.settle(documents)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class FlexNSAForCausalLM(FlexNSAPreTrainedModel, GenerationMixin):
    """The language model: ``from_pretrained``, ``generate`` and ``Trainer`` take it as they take a Llama.

    >>> import torch
    >>> config = FlexNSAConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                        num_attention_heads=4, num_key_value_heads=2)
    >>> model = FlexNSAForCausalLM(config)
    >>> model(torch.zeros(1, 10, dtype=torch.long)).logits.shape
    torch.Size([1, 10, 256])
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlexNSAConfig):
        super().__init__(config)
        self.model = FlexNSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int64[Tensor, "b t"] | None = None,
        attention_mask: Shaped[Tensor, "b columns"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        past_key_values: FlexNSACache | None = None,
        inputs_embeds: Float[Tensor, "b t dim"] | None = None,
        labels: Int64[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int64[Tensor, " kept"] = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[b, t, vocab]``, and the loss where there are labels.

        Args:
            input_ids: see ``FlexNSAModel``, as for all that are not named here.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: the tokens to predict, ``[b, t]``, not yet shifted; -100 for none.
            use_cache: see there.
            logits_to_keep: the last so many positions, or these; 0 for all.
            kwargs: handed to the loss.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Int64[Tensor, "b t"],
        past_key_values: FlexNSACache | None = None,
        attention_mask: Shaped[Tensor, "b columns"] | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one step. Padding is on the left: once it has ended, later steps need no mask."""
        if not is_first_iteration and past_key_values is not None and past_key_values.settled:
            attention_mask = None
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """A cache for as many tokens as the generation may reach."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be left out, got {generation_config.cache_implementation!r}; NSA has a "
                f"cache of its own, static, in the model's dtype"
            )
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        assisted = generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION
        rollback = ASSISTED_ROLLBACK if assisted else 0
        model_kwargs["past_key_values"] = FlexNSACache(self.config, max(1, max_cache_length) + rollback, rollback)


def _check_cache(past_key_values: object) -> None:
    if past_key_values is not None and not isinstance(past_key_values, FlexNSACache):
        raise TypeError(
            f"past_key_values must be a FlexNSACache, got {type(past_key_values).__name__}; make one with "
            f"FlexNSACache(model.config, max_tokens)"
        )


def _documents(x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Documents of the present tokens: packed ones by their positions, -1 where the mask has 0."""
    batch, tokens = x.shape[:2]
    if attention_mask is not None and (
        attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens
    ):
        raise ValueError(
            f"attention_mask must be [b, t] of zeros and ones with b={batch} and t of {tokens} or more, got "
            f"{tuple(attention_mask.shape)}; NSA makes its own masks from it"
        )
    padded = None if attention_mask is None else documents_from_mask(attention_mask[:, -tokens:])
    packed = None if position_ids is None else documents_from_positions(position_ids, batch)
    if padded is None or packed is None:
        return packed if padded is None else padded
    return packed.where(padded >= 0, -1)
