"""What must hold for every shape of the model, whatever its parts."""

import dataclasses
import itertools

import pytest
import torch

from llm_from_scratch.generation import Reader
from llm_from_scratch.model import (
    PRESETS,
    ModelConfig,
    TransformerLM,
    from_hf_config,
    load_model,
    save_model,
    training_bytes,
    what_fits,
)

POSITIONS = ("rotary", "learned", "sinusoidal", "none")
BLOCKS = (  # norm, activation, pre_norm, bias, tied
    ("rmsnorm", "swiglu", True, False, False),
    ("layernorm", "gelu", True, True, True),
    ("layernorm", "relu", False, True, True),
)
SHAPES = list(itertools.product(POSITIONS, BLOCKS, (4, 2, 1)))


def make(position, block, n_kv_heads):
    norm, activation, pre_norm, bias, tied = block
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(
        vocab_size=37, context_length=16, d_model=32, n_layers=2, n_heads=4,
        n_kv_heads=n_kv_heads, position=position, norm=norm,
        activation=activation, pre_norm=pre_norm, bias=bias,
        tie_embeddings=tied)).eval()


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}-{s[1][1]}-{s[2]}kv")
def model(request):
    return make(*request.param)


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(37, (3, 12), generator=generator)


@torch.no_grad()
def test_future_does_not_leak(model, ids):
    other = ids.clone()
    other[:, 7:] = (ids[:, 7:] + 1) % 37
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-5)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


@torch.no_grad()
def test_cache_changes_nothing(model, ids):
    whole, caches, at = model(ids), model.new_caches(3), 0
    for size in (5, 1, 1, 4, 1):  # a prompt, single tokens, a burst
        part = model(ids[:, at:at + size], caches)
        torch.testing.assert_close(
            part, whole[:, at:at + size], rtol=0, atol=1e-5)
        at += size


@torch.no_grad()
def test_batching_changes_nothing(model, ids):
    together = model(ids)
    for i in range(3):
        alone = model(ids[i:i + 1])[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_stays_near(model, ids):
    exact = model(ids).log_softmax(-1)
    short = model.bfloat16()(ids)
    assert short.dtype == torch.bfloat16
    assert (short.float().log_softmax(-1) - exact).abs().max() < 0.3


@pytest.mark.parametrize("shape", SHAPES[::4], ids=str)
def test_meta_compile_and_export(shape, ids):
    model = make(*shape)
    expected = model(ids)
    torch.compiler.reset()
    # every graph break is an error; the backend only repeats the graph
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), expected)
    with torch.device("meta"):
        ghost = TransformerLM(model.config)
        assert ghost(torch.zeros(3, 12, dtype=torch.long)).shape == (3, 12, 37)


@pytest.mark.parametrize("position", POSITIONS)
def test_reader_past_the_context(position):
    model = make(position, BLOCKS[0], 2)
    cached, plain = Reader(model), Reader(model, use_cache=False)
    for i in range(50):
        a, b = cached.read([i % 37]), plain.read([i % 37])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


SLOWED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    "more",
    [dict(qk_norm=True, head_dim=12), dict(rope_scaling=SLOWED)],
    ids=["qwen3", "llama3"],
)
@torch.no_grad()
def test_norms_of_heads_and_slowed_rotations(more, ids):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=37, context_length=16, d_model=32, n_layers=2, n_heads=4
    )
    model = TransformerLM(ModelConfig(**shape, n_kv_heads=2, **more)).eval()
    plain = TransformerLM(ModelConfig(**shape, n_kv_heads=2, head_dim=12))
    whole, other = model(ids), ids.clone()
    if "qk_norm" in more:  # the norms must do something
        assert plain.load_state_dict(model.state_dict(), strict=False)
        assert (plain.eval()(ids) - whole).abs().max() > 1e-3
    other[:, 7:] = (ids[:, 7:] + 1) % 37
    torch.testing.assert_close(model(other)[:, :7], whole[:, :7])
    caches, at = model.new_caches(3), 0
    for size in (5, 1, 6):
        part = model(ids[:, at : at + size], caches)
        torch.testing.assert_close(
            part, whole[:, at : at + size], rtol=0, atol=1e-5
        )
        at += size
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), whole)


@pytest.mark.parametrize("eos", [0, None, [3, 7]], ids=str)
def test_ids_that_end_a_text_survive(eos, tmp_path):
    model = make("rotary", BLOCKS[0], 2)
    ends = {"bos_token_id": 1, "eos_token_id": eos}
    save_model(model, tmp_path / "a", ends)
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert load_model(tmp_path / "b").special_ids == ends
    for name in ("config.json", "generation_config.json"):
        texts = [(tmp_path / run / name).read_text() for run in "ab"]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", PRESETS)
def test_what_fits_is_the_most_that_fits(name):
    config, memory = PRESETS[name], 24 * 10**9
    length = min(1024, config.context_length)
    n = what_fits(config, memory, length)["texts in training"]
    assert n == 0 or training_bytes(config, n, length)["total"] <= memory
    assert training_bytes(config, n + 1, length)["total"] > memory


LLAMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
PUBLISHED = {  # the keys of the config.json files, as they were published
    "gpt2-124m": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    },
    "smollm2-135m": LLAMA
    | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "llama-3.2-1b": LLAMA
    | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name):
    config = from_hf_config(PUBLISHED[name])
    if name.startswith("gpt2"):  # which was trained with dropout
        config = dataclasses.replace(config, dropout=0.0)
    assert config == PRESETS[name]


@pytest.mark.parametrize(
    "key, value",
    [
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("attention_dropout", 0.1),
        ("rope_interleaved", True),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_what_would_change_the_computation_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        from_hf_config(PUBLISHED["llama-3.2-1b"] | {key: value})
