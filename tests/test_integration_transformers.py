"""The NSA language model in transformers: loading, padding, generation, training, compiling."""

import copy
import inspect
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from flexnsa import LinearCompressor, NativeSparseAttention, NSAConfig
from flexnsa.integrations.transformers import FlexNSACache, FlexNSAConfig, FlexNSAForCausalLM, FlexNSAModel

GEOMETRY = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=4, window=6)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Wide enough that what a tiny model says depends on what it attends to.
    "initializer_range": 0.3,
}
FORMS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "rms_norm_eps": 1e-3, "compressor": "gated"},
    "biases": {"attention_bias": True, "mlp_bias": True, "compressor": "linear", "tie_word_embeddings": True},
    "fla": {"compressor": "mean", "shared_kv": True, "compress_rotated": True},
}
SIGNATURES = {
    "FlexNSACache": "config max_tokens max_rollback",
    "convert": "model config * compressor compress_rotated shared_kv others",
    "fla_config": "config",
    "fla_geometry": "block_size block_counts window_size",
    "fla_weights": "weights",
    "from_fla": "config weights",
    "sparsify": "model config * dense_up_to gates",
}


def tiny(**changes: object) -> FlexNSAForCausalLM:
    torch.manual_seed(0)
    model = FlexNSAForCausalLM(FlexNSAConfig(**(SIZES | {"nsa": GEOMETRY} | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model.requires_grad_(False)


def prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(1))


def left_padded() -> dict[str, torch.Tensor]:
    ids, mask = prompt(3, 29), torch.ones(3, 29, dtype=torch.int64)
    mask[0, :7], mask[2, :20] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def test_the_auto_classes_know_the_model():
    config = AutoConfig.for_model("flexnsa", **SIZES, nsa=GEOMETRY)
    assert type(AutoModelForCausalLM.from_config(config)) is FlexNSAForCausalLM
    assert type(AutoModel.from_config(config)) is FlexNSAModel


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_is_the_same(form, tmp_path):
    model = tiny(**FORMS[form])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.geometry == GEOMETRY
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = prompt(2, 40)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_a_checkpoint_lacks_begins_as_new(tmp_path):
    model = tiny(compressor="linear", qk_norm=True)
    weights = {name: x for name, x in model.state_dict().items() if ".compressor." not in name and "_norm" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    layer = FlexNSAForCausalLM.from_pretrained(tmp_path).model.layers[1].self_attn
    new = LinearCompressor(GEOMETRY, num_kv_heads=2, head_dim=8)
    assert torch.equal(layer.compressor.k_pool.kernel, new.k_pool.kernel)
    assert torch.equal(layer.k_norm["window"].weight, torch.ones(8))


@pytest.mark.parametrize("form", ["llama", "qwen3", "fla"])
def test_its_attention_is_the_layer_of_the_library(form):
    model = tiny(**FORMS[form], num_hidden_layers=1)
    own = model.model.layers[0].self_attn
    shared = {"shared_kv": own.k_proj.keys() == {"shared"}, "compress_rotated": own.compress_rotated}
    sizes = {
        "dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "config": GEOMETRY,
        "qk_norm": form == "qwen3",
    }
    theta = model.config.rope_parameters["rope_theta"]
    layer = NativeSparseAttention(**sizes, **shared, compressor=copy.deepcopy(own.compressor), rope_theta=theta)
    layer.load_state_dict(own.state_dict())
    for norm in (layer.q_norm, *layer.k_norm.values()):
        norm.eps = model.config.rms_norm_eps
    x = torch.randn(2, 40, 24)
    torch.testing.assert_close(own(x), layer(x))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=3))
def test_a_padded_row_is_the_row_alone(padding):
    model, ids = tiny(num_hidden_layers=1), prompt(len(padding), 40)
    column = torch.arange(40)
    mask = torch.stack([(column >= left) & (column < 40 - right) for left, right in padding]).long()
    logits = model(ids, attention_mask=mask).logits
    for row, (left, right) in enumerate(padding):
        inside = slice(left, 40 - right)
        alone = model(ids[row : row + 1, inside]).logits[0]
        torch.testing.assert_close(logits[row, inside], alone)


def test_packed_rows_are_their_documents_alone():
    model, ids = tiny(), prompt(2, 40)
    positions = torch.cat([torch.arange(25), torch.arange(10), torch.arange(5)])[None]
    logits = model(ids, position_ids=positions).logits
    for document in (slice(0, 25), slice(25, 35), slice(35, 40)):
        torch.testing.assert_close(logits[:, document], model(ids[:, document]).logits)


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "a prompt in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_generation_with_the_cache_is_generation_without(mode):
    model, options = tiny(), {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0} | GENERATION[mode]
    found, expected = [], []
    for results, cached in ((found, {}), (expected, {"use_cache": False, "prefill_chunk_size": None})):
        torch.manual_seed(2)
        output = model.generate(
            **left_padded(), **(options | cached), return_dict_in_generate=True, output_logits="beams" not in mode
        )
        results += [output.sequences, *(output.logits or ())]
    assert torch.equal(found[0], expected[0])
    assert found[0][:, 29:].unique().numel() > 3
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_left_padded_row_goes_on_as_it_would_alone():
    model, batch = tiny(**FORMS["qwen3"]), left_padded()
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    together = model.generate(**batch, **options)
    for row in range(3):
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row] == 1]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(together[row, 29 - ids.shape[1] :], alone[0])


def test_what_an_assistant_proposed_in_vain_is_taken_back():
    model, ids = tiny(), prompt(1, 30)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), model.generate(ids, **options))


def test_a_cache_of_ones_own_takes_any_chunks_and_goes_back():
    model, ids = tiny(), prompt(2, 40)
    whole = model(ids).logits
    cache = FlexNSACache(model.config, max_tokens=50, max_rollback=5)
    assert cache.nbytes == 0
    first = model(ids[:, :17], past_key_values=cache)
    assert first.past_key_values is cache and cache.nbytes > 0
    model(prompt(2, 3), past_key_values=cache)
    cache.crop(-3)
    parts = [
        first.logits,
        *(model(ids[:, a:b], past_key_values=cache).logits for a, b in ((17, 30), (30, 31), (31, 40))),
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.get_seq_length() == 40
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    token = torch.tensor([[5], [6]])
    following = model(torch.cat([ids.flip(0), token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(model(token, past_key_values=cache).logits, following)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole)


def test_use_cache_makes_one():
    model, ids = tiny(), prompt(1, 9)
    assert model(ids).past_key_values is None
    output = model(ids, use_cache=True)
    assert output.past_key_values.get_max_length() == SIZES["max_position_embeddings"]
    torch.testing.assert_close(output.logits, model(ids).logits)


def test_the_rest_of_what_a_causal_model_offers():
    model, ids = tiny(), prompt(2, 30)
    output = model(ids, labels=ids, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert len(output.hidden_states) == 3
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=2, return_dict=False)
    torch.testing.assert_close(embedded[0], output.logits[:, -2:])


def text() -> list[dict[str, torch.Tensor]]:
    """6 KB of a module of the standard library, as rows of bytes."""
    data = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()[: 48 * 128]), dtype=torch.uint8).long()
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in data.view(-1, 128)]


# The next major version gives it another name.
RENAMED = pytest.mark.filterwarnings("ignore:.gradient_checkpointing\\w*. is deprecated:FutureWarning")


@RENAMED
def test_the_trainer_learns_text_in_an_epoch(tmp_path):
    model = tiny(vocab_size=256, initializer_range=0.02, max_position_embeddings=128).requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        learning_rate=2e-2,
        bf16=True,
        gradient_checkpointing=True,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=text(), eval_dataset=text())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer.evaluate()["eval_loss"] < min(before - 1, 4.5)


@RENAMED
def test_checkpointed_gradients_are_the_gradients():
    model, ids = tiny().requires_grad_(True).train(), prompt(2, 30)
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_compiled_graph_is_whole():
    model, batch = tiny(num_hidden_layers=1, qk_norm=True), left_padded()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="geometry is larger than the context: window=512"):
        FlexNSAConfig(max_position_embeddings=256)
    with pytest.raises(ValueError, match="compressor must be one of"):
        FlexNSAConfig(compressor="median")
    with pytest.raises(NotImplementedError, match="rope_type"):
        FlexNSAConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(NotImplementedError, match="partial_rotary_factor"):
        FlexNSAConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with pytest.raises(NotImplementedError, match="attention_dropout must be 0"):
        FlexNSAConfig(attention_dropout=0.1)
    model, ids = tiny(num_hidden_layers=1), prompt(1, 8)
    with pytest.raises(ValueError, match="zeros between ones"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[b, t\]"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(TypeError, match="past_key_values must be a FlexNSACache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="cache_implementation must be left out"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0, cache_implementation="static")
    with pytest.raises(ValueError, match="cache is full"):
        model(ids, past_key_values=FlexNSACache(model.config, max_tokens=7))
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or below"):
        FlexNSACache(model.config, max_tokens=7).crop(1)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name):
    from flexnsa.integrations import transformers

    names = []
    for parameter in inspect.signature(getattr(transformers, name)).parameters.values():
        names += ["*"] * (parameter.kind is parameter.KEYWORD_ONLY and "*" not in names) + [parameter.name]
    assert " ".join(names) == SIGNATURES[name]
    assert sorted(transformers.__all__) == transformers.__all__


def test_public_names_are_documented():
    from flexnsa.integrations import transformers

    entries = (Path(__file__).parent.parent / "docs/api/hugging-face.md").read_text().split()
    for name in transformers.__all__:
        assert inspect.getdoc(getattr(transformers, name)), name
        assert entries.count(f"flexnsa.integrations.transformers.{name}") == 1, name
