"""Dense models made sparse: converted, or with another attention function; and weights of flash-linear-attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flexnsa import NSAConfig
from flexnsa.integrations.transformers import convert, fla_geometry, from_fla, sparsify

GEOMETRY = NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=6, window=8)
EVERYTHING = GEOMETRY.num_selected * GEOMETRY.select_block
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"rms_norm_eps": 1e-3}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}


def dense(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config_class, own = DENSE[name]
    model = model_class(config_class(**(SIZES | own | changes))).eval()
    for weight, parameter in model.named_parameters():
        if "norm" in weight or weight.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model.requires_grad_(False)


def prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DENSE)
def test_a_converted_model_begins_as_the_dense_one(name):
    model, ids = dense(name), prompt(2, 100)
    logits = model(ids).logits
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    near, nearer = (convert(model, GEOMETRY, others=others)(ids).logits for others in (0.01, 1e-6))
    # Some hundredths where everything is selected, in logits of standard deviation 1; all of it the gates' own.
    difference = (near - logits).abs().amax((0, 2))
    assert 0 < difference[:EVERYTHING].max() < 0.15 * logits.std()
    torch.testing.assert_close(nearer[:, :EVERYTHING], logits[:, :EVERYTHING], rtol=1e-4, atol=1e-4)
    assert difference[-10:].min() > difference[:EVERYTHING].max()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", DENSE)
def test_every_old_weight_is_kept(name):
    model = dense(name)
    new = convert(model, GEOMETRY)
    old, found = model.state_dict(), new.state_dict()
    for layer, branch in ((0, "compressed"), (1, "selected"), (1, "window")):
        for kind in ("k_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{kind}"
            assert torch.equal(found[f"{prefix}.{branch}.weight"], old[f"{prefix}.weight"])
    kept = [key for key in old if not any(kind in key for kind in ("k_proj", "v_proj", "k_norm"))]
    assert len(kept) > 10
    for key in kept:
        assert found[key].data_ptr() == old[key].data_ptr(), key
    attention = new.model.layers[0].self_attn
    gates = attention.attention.gate(torch.randn(2, 5, 24))
    torch.testing.assert_close(gates, torch.tensor([0.01, 0.98, 0.01]).expand_as(gates))
    branches = attention.k_proj
    assert len({projection.weight.data_ptr() for projection in branches.values()}) == 3
    assert new.generation_config is model.generation_config


def test_a_converted_model_trains_saves_and_generates(tmp_path):
    new = convert(dense("qwen3").train().to(torch.bfloat16), GEOMETRY)
    assert new.training and {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    new.requires_grad_(True)
    new(prompt(2, 60), labels=prompt(2, 60)).loss.backward()
    still = [name for name, parameter in new.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert still == []
    new.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(prompt(1, 40), **options), new.generate(prompt(1, 40), **options))


def test_forms_of_conversion():
    model, ids = dense("mistral"), prompt(1, EVERYTHING)
    logits = model(ids).logits
    for options in ({"shared_kv": True}, {"compressor": "mean", "compress_rotated": True}, {"compressor": "gated"}):
        new = convert(model, GEOMETRY, others=1e-6, **options)
        torch.testing.assert_close(new(ids).logits, logits, rtol=1e-4, atol=1e-4)
    mlp = convert(model, GEOMETRY, compressor="mlp")
    assert all(parameter.isfinite().all() for parameter in mlp.parameters())


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(NotImplementedError, match=r"model must be one of LlamaForCausalLM.*, got GPT2LMHeadModel"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    with pytest.raises(NotImplementedError, match="got Linear"):
        convert(torch.nn.Linear(2, 2))
    model = dense("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="geometry is larger than the context: window=512"):
        convert(model)
    with pytest.raises(ValueError, match="others must lie between 0 and 0.5"):
        convert(model, GEOMETRY, others=0.5)
    with pytest.raises(ValueError, match="compressor must be one of"):
        convert(model, GEOMETRY, compressor="sum")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(NotImplementedError, match="rope_type"):
        convert(dense("llama", rope_parameters=dynamic), GEOMETRY)


@pytest.mark.parametrize("name", DENSE)
def test_the_attention_function_is_sdpa_where_everything_is_selected(name, tmp_path):
    model, ids = dense(name), prompt(2, EVERYTHING + 30)
    logits = model(ids).logits
    sparsify(model, GEOMETRY, dense_up_to=0)
    assert model.config._attn_implementation == "flexnsa"
    sparse = model(ids).logits
    torch.testing.assert_close(sparse[:, :EVERYTHING], logits[:, :EVERYTHING], rtol=1e-4, atol=1e-5)
    assert (sparse - logits)[:, -1].abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flexnsa")
    torch.testing.assert_close(loaded(ids).logits, sparse)


def test_without_settings_it_has_the_papers_geometry():
    model, ids = dense("llama", num_hidden_layers=1), prompt(1, 100)
    logits = model(ids).logits
    model.set_attn_implementation("flexnsa")
    assert torch.equal(model(ids).logits, logits)
    model.config.nsa = {"dense_up_to": 0}
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_dense_or_sparse_by_length():
    model, ids = dense("llama"), prompt(2, 60)
    logits = model(ids).logits
    sparse = sparsify(model, GEOMETRY, dense_up_to=0)(ids).logits
    for dense_up_to, expected in ((60, logits), (59, sparse), (None, sparse)):
        assert torch.equal(sparsify(model, GEOMETRY, dense_up_to=dense_up_to)(ids).logits, expected)
    mask = (torch.arange(60) >= torch.tensor([[7], [0]])).long()
    padded = sparsify(model, GEOMETRY, dense_up_to=60)(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 7:], model(ids[:1, 7:]).logits[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=3))
def test_padding_counts(padding):
    model, ids = sparsify(dense("qwen3", num_hidden_layers=1), GEOMETRY, dense_up_to=0), prompt(len(padding), 50)
    column = torch.arange(50)
    mask = torch.stack([(column >= left) & (column < 50 - right) for left, right in padding]).long()
    logits = model(ids, attention_mask=mask).logits
    for row, (left, right) in enumerate(padding):
        inside = slice(left, 50 - right)
        alone = model(ids[row : row + 1, inside]).logits[0]
        torch.testing.assert_close(logits[row, inside], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense_up_to", [0, 100])
def test_generation_from_a_padded_prompt(dense_up_to):
    model, ids = sparsify(dense("llama"), GEOMETRY, dense_up_to=dense_up_to), prompt(2, 36)
    mask = (torch.arange(36) >= torch.tensor([[9], [0]])).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    if dense_up_to == 0:
        alone = model.generate(ids[:1, 9:], **options)
        assert torch.equal(found[0, 9:], alone[0])


@pytest.mark.parametrize("dense_up_to", [0, 100])
def test_packed_rows_are_their_documents_alone(dense_up_to):
    model, ids = sparsify(dense("llama"), GEOMETRY, dense_up_to=dense_up_to), prompt(2, 60)
    positions = torch.cat([torch.arange(41), torch.arange(19)])[None]
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for document in (slice(0, 41), slice(41, 60)):
        torch.testing.assert_close(logits[:, document], model(ids[:, document]).logits, rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_sliding_window_keeps_it():
    model, ids = dense("mistral", sliding_window=10), prompt(2, 50)
    mask = (torch.arange(50) >= torch.tensor([[7], [0]])).long()
    logits = model(ids, attention_mask=mask).logits
    sparsify(model, GEOMETRY, dense_up_to=0)
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], logits[mask == 1], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    sparse = model.generate(ids, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(sparse, model.generate(ids, **options))


def test_a_mask_of_ones_own_replaces_causality():
    model, ids = sparsify(dense("llama", num_hidden_layers=1), GEOMETRY, dense_up_to=0), prompt(1, 20)
    x = model.model.embed_tokens(ids)

    from transformers.masking_utils import create_causal_mask

    def own(b, h, q_idx, kv_idx):
        return (kv_idx < 5) | (q_idx - kv_idx < 3)

    outputs = []
    for name in ("flexnsa", "sdpa"):
        model.set_attn_implementation(name)
        mask = create_causal_mask(model.config, x, None, None, and_mask_function=own)
        outputs.append(
            model.model.layers[0](x, mask, position_embeddings=model.model.rotary_emb(x, torch.arange(20)[None]))
        )
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_fixed_gates_mix_all_branches():
    model, ids = dense("llama"), prompt(2, GEOMETRY.window)
    logits = model(ids).logits
    mixed = sparsify(model, GEOMETRY, gates=(0.0, 0.25, 0.75))(ids).logits
    torch.testing.assert_close(mixed, logits, rtol=1e-4, atol=1e-5)
    assert (sparsify(model, GEOMETRY, gates=(0.5, 0.5, 0.0))(ids).logits - logits).abs().max() > 1e-2


def test_the_attention_function_compiles_whole():
    model, ids = sparsify(dense("llama", num_hidden_layers=1), GEOMETRY, dense_up_to=0), prompt(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


def test_what_the_attention_function_cannot_do_is_refused():
    model, ids = dense("llama", num_hidden_layers=1), prompt(1, 8)
    with pytest.raises(NotImplementedError, match="model must be a transformers model .* got Linear"):
        sparsify(torch.nn.Linear(2, 2), GEOMETRY)
    with pytest.raises(ValueError, match="geometry is larger than the context: window=512"):
        sparsify(model)
    with pytest.raises(ValueError, match="gates must be three numbers"):
        sparsify(model, GEOMETRY, gates=(1.0, 0.0))
    with pytest.raises(ValueError, match="dense_up_to must be at least 0"):
        sparsify(model, GEOMETRY, dense_up_to=-1)
    sparsify(model, GEOMETRY)
    with pytest.raises(NotImplementedError, match=r"takes a mask \[b, tk\] of zeros and ones, got Tensor"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="zeros between ones"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]))
    with pytest.raises(NotImplementedError, match="no static cache"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0, cache_implementation="static", disable_compile=True)
    with pytest.raises(NotImplementedError, match="is causal, but LlamaAttention is not"):
        model(ids, is_causal=False)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="has no dropout, got 0.1"):
        model.train()(ids)


FLA = {
    "model_type": "nsa",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "qkv_bias": True,
    "block_size": 4,
    "block_counts": 4,
    "window_size": 6,
    "intermediate_size": 32,
    "norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
}


def fla_state() -> dict[str, torch.Tensor]:
    """Random weights by the names and shapes of that library."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embeddings.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    for layer in range(2):
        own = {"attn_norm.weight": (24,), "mlp_norm.weight": (24,), "attn.g_proj.weight": (12, 24)}
        for name, width in (("q", 32), ("k", 16), ("v", 16)):
            own |= {f"attn.{name}_proj.weight": (width, 24), f"attn.{name}_proj.bias": (width,)}
        own |= {"attn.o_proj.weight": (24, 32), "mlp.gate_proj.weight": (32, 24)}
        own |= {"mlp.up_proj.weight": (32, 24), "mlp.down_proj.weight": (24, 32)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {
        name: 1 + 0.2 * torch.randn(shape, generator=generator)
        if "norm" in name
        else 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def fla_logits(state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """That library's forward by loops, one token and head at a time, in float64."""
    w = {name: weight.double() for name, weight in state.items()}
    x = w["model.embeddings.weight"][ids]
    for layer in range(2):
        p = {name.removeprefix(f"model.layers.{layer}."): weight for name, weight in w.items()}
        x = x + fla_attention(p, rms(x, p["attn_norm.weight"]))
        y = rms(x, p["mlp_norm.weight"])
        gated = torch.nn.functional.silu(y @ p["mlp.gate_proj.weight"].T) * (y @ p["mlp.up_proj.weight"].T)
        x = x + gated @ p["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + FLA["norm_eps"]).rsqrt() * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[t, h, d]`` by pairs of complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * 1e4 ** -(torch.arange(half) / half).double()
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def fla_attention(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        (x @ p[f"attn.{name}_proj.weight"].T + p[f"attn.{name}_proj.bias"]).unflatten(-1, (-1, 8)) for name in "qkv"
    )
    gates = (x @ p["attn.g_proj.weight"].T).unflatten(-1, (4, 3)).sigmoid()
    q, k, block = turned(q), turned(k), FLA["block_size"]
    out = torch.zeros(len(x), 4, 8, dtype=torch.float64)
    for t in range(len(x)):
        complete, own = (t + 1) // block, t // block
        for group in range(2):
            heads = (2 * group, 2 * group + 1)
            keys, values = k[:, group], v[:, group]
            k_cmp = [keys[i * block : (i + 1) * block].mean(0) for i in range(complete)]
            v_cmp = [values[i * block : (i + 1) * block].mean(0) for i in range(complete)]
            score = [sum(weights(q[t, h], k_cmp)[i] for h in heads) if i < complete else 0 for i in range(own + 1)]
            rank = sorted(range(own + 1), key=lambda i: (i not in (0, own - 1, own), -score[i]))
            selected = [j for i in rank[: FLA["block_counts"]] for j in range(i * block, (i + 1) * block) if j <= t]
            window = range(max(0, t - FLA["window_size"] + 1), t + 1)
            for h in heads:
                branches = (
                    (k_cmp, v_cmp),
                    *(([keys[j] for j in s], [values[j] for j in s]) for s in (selected, window)),
                )
                for gate, (ks, vs) in zip(gates[t, h], branches, strict=True):
                    if ks:
                        out[t, h] += gate * weights(q[t, h], ks) @ torch.stack(vs)
    return out.flatten(1) @ p["attn.o_proj.weight"].T


def weights(q: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
    return (torch.stack(keys) @ q / math.sqrt(len(q))).softmax(0)


def test_weights_of_fla_give_what_they_give_there(tmp_path):
    state, ids = fla_state(), prompt(1, 43)
    model = from_fla(FLA, state).eval()
    expected = fla_logits(state, ids[0].tolist())
    torch.testing.assert_close(model.double()(ids).logits[0], expected, rtol=1e-4, atol=1e-5)
    model.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits[0], expected.float(), rtol=1e-3, atol=1e-3)


def test_the_preset_says_what_it_does_not_know():
    assert fla_geometry() == NSAConfig(compress_block=64, compress_stride=64)
    state = fla_state()
    with pytest.raises(ValueError, match='model_type "nsa", got "?\'?mamba'):
        from_fla(FLA | {"model_type": "mamba"}, state)
    with pytest.raises(ValueError, match="window must be at least 1"):
        from_fla(FLA | {"window_size": 0}, state)
    with pytest.raises(ValueError, match=r"names that the model has not, \['model.layers.0.self_attn.sinks'\]"):
        from_fla(FLA, state | {"model.layers.0.attn.sinks": torch.zeros(4)})
    with pytest.raises(ValueError, match="weights lacks names that the model has"):
        from_fla(FLA, {name: weight for name, weight in state.items() if "o_proj" not in name})
    with pytest.raises(ValueError, match=r"weights\['model.layers.0.self_attn.q_proj.weight'\] must be \(32, 24\)"):
        from_fla(FLA, state | {"model.layers.0.attn.q_proj.weight": torch.zeros(31, 24)})
