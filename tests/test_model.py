"""What must hold for every shape of the model, whatever its parts."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
T = 12  # positions of the texts that are read


def make(**changes):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=37, context_length=16, d_model=32, n_layers=2, n_heads=4
    )
    model = TransformerLM(ModelConfig(**shape | changes)).eval()
    for weight in model.parameters():  # norms and biases must matter
        weight.data += 0.05 * torch.randn_like(weight)
    return model.requires_grad_(False)


SLOWED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


@st.composite
def shapes(draw):
    "Any fields that a `ModelConfig` takes, in any combination."
    position = draw(st.sampled_from(POSITIONS))
    scalings = [None]
    if position == "rotary":
        scalings += [SLOWED, {"rope_type": "linear", "factor": 2.0}]
    n_heads = draw(st.sampled_from((1, 3, 4)))
    groups = [n for n in (1, 2, 3, 4) if n_heads % n == 0]
    return dict(
        position=position,
        rope_scaling=draw(st.sampled_from(scalings)),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from(groups)),
        head_dim=draw(st.sampled_from((2, 8, 12))),
        n_layers=draw(st.integers(1, 3)),
        norm=draw(st.sampled_from(("rmsnorm", "layernorm"))),
        activation=draw(st.sampled_from(("swiglu", "gelu", "relu"))),
        pre_norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.1))),
    )


@st.composite
def batches(draw):
    "Three rows of ids."
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(37, (3, T), generator=generator)


def cuts_of(places):
    "Sizes of the pieces when a text is cut at these places."
    ends = sorted({0, T, *places})
    return [b - a for a, b in zip(ends, ends[1:])]


cuts = st.sets(st.integers(1, T - 1), max_size=5).map(cuts_of)
any_model = settings(max_examples=60)


def in_pieces(model, ids, sizes, **told):
    caches = model.new_caches(len(ids))
    return torch.cat(
        [model(piece, caches, **told) for piece in ids.split(sizes, 1)], 1
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


@any_model
@given(shapes(), batches(), st.integers(1, T - 1), cuts)
def test_future_does_not_leak(shape, ids, place, sizes):
    model, other = make(**shape), ids.clone()
    other[:, place:] = (ids[:, place:] + 1) % 37
    for read in (model, lambda ids: in_pieces(model, ids, sizes)):
        a, b = read(ids), read(other)
        assert torch.equal(a[:, :place], b[:, :place])
        assert (a[:, place] - b[:, place]).abs().max() > 1e-4


@any_model
@given(shapes(), batches(), cuts)
def test_cache_changes_nothing(shape, ids, sizes):
    model = make(**shape)
    close(in_pieces(model, ids, sizes), model(ids))


@any_model
@given(
    shapes(),
    batches(),
    st.lists(st.integers(0, T - 1), min_size=3, max_size=3),
    cuts,
)
def test_batching_changes_nothing(shape, ids, padding, sizes):
    model, told = make(**shape), torch.tensor(padding)
    whole = model(ids, padding=told)
    assert whole.isfinite().all()
    for row, text, n in zip(whole, ids, padding):
        close(row[n:], model(text[None, n:])[0])
    pieces = in_pieces(model, ids, sizes, padding=told)
    for row, piece, n in zip(whole, pieces, padding):
        close(piece[n:], row[n:])
    other = ids.clone()
    for row, n in zip(other, padding):  # what fills does not matter
        row[:n] = (row[:n] + 1) % 37
    for a, b, n in zip(whole, model(other, padding=told), padding):
        assert torch.equal(a[n:], b[n:])


@any_model
@given(shapes(), batches(), cuts)
def test_packing_changes_nothing(shape, ids, sizes):
    model = make(**shape)
    numbers = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(sizes)
    )
    packed = model(ids, documents=numbers.expand(3, T))
    for together, alone in zip(packed.split(sizes, 1), ids.split(sizes, 1)):
        close(together, model(alone))


@any_model
@given(shapes(), batches())
def test_bfloat16_stays_near(shape, ids):
    exact = make(**shape)(ids)
    short = make(**shape).bfloat16()(ids)
    assert short.dtype == torch.bfloat16
    assert (short.float() - exact).abs().mean() < 0.1 * exact.std()


WHOLE = [dict(position=position) for position in POSITIONS] + [
    dict(norm="layernorm", activation="gelu", bias=True, position="learned"),
    dict(activation="relu", pre_norm=False, dropout=0.1),
    dict(n_kv_heads=2, qk_norm=True, head_dim=12, tie_embeddings=False),
    dict(n_kv_heads=1, rope_scaling=SLOWED),
]


def test_export_of_any_length():
    model = make(**WHOLE[0])
    length = torch.export.Dim("length", min=2, max=T - 1)
    ids = torch.arange(3 * T).view(3, T) % 37
    exported = torch.export.export(
        model, (ids[:, :8],), dynamic_shapes=({1: length},))
    for n in (2, 5, T - 1):
        torch.testing.assert_close(
            exported.module()(ids[:, :n]), model(ids[:, :n]))


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_meta_compile_and_export(shape):
    model, ids = make(**shape), torch.arange(36).view(3, T)
    for told in ({}, {"padding": torch.tensor([0, 3, 7])}):
        expected = model(ids, **told)
        torch.compiler.reset()
        # every graph break is an error; the backend only repeats the graph
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, **told), expected)
        exported = torch.export.export(model, (ids,), told).module()
        torch.testing.assert_close(exported(ids, **told), expected)
    with torch.device("meta"):
        ghost = TransformerLM(model.config)
        assert ghost(torch.zeros(3, T, dtype=torch.long)).shape == (3, T, 37)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(n_heads=10), "d_model 256 is not a multiple of n_heads 10"),
        (dict(n_kv_heads=3), "n_heads 8 is not a multiple of n_kv_heads 3"),
        (dict(d_model=36, n_heads=4), "head_dim 9 is odd"),
        (
            dict(d_model=33, n_heads=3, position="sinusoidal"),
            "d_model 33 is odd",
        ),
        (dict(n_layers=0), "n_layers is 0; it must be a whole number from 1"),
        (dict(context_length=-5), "context_length is -5; it must be"),
        (dict(dropout=1.0), "dropout is 1.0; it must be a number from 0 to"),
        (dict(dropout=float("nan")), "dropout is nan; it must be a number"),
        (dict(rope_theta=0.5), "rope_theta is 0.5; it must be a number from"),
        (dict(position="rotery"), "position is 'rotery'; choose rotary, lear"),
    ],
)
def test_impossible_configurations_are_refused(fields, said):
    with pytest.raises(ValueError) as refused:
        ModelConfig(**fields)
    message = str(refused.value)
    assert "\n" not in message
    assert said in message


def test_impossible_batches_are_refused():
    model, ids = make(), torch.zeros(3, T, dtype=torch.long)
    for padding, said in [
        ([1, 2], ["(2,)", "3 rows"]),
        ([0, 0, T], [str(T), f"{T} ids"]),
        ([0, -1, 0], ["-1"]),
    ]:
        with pytest.raises(ValueError) as refused:
            model(ids, padding=torch.tensor(padding))
        assert all(part in str(refused.value) for part in said)
    with pytest.raises(ValueError, match="17 positions.*16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="1 caches, but 2 blocks"):
        model(ids, model.new_caches(3)[:1])
    with pytest.raises(ValueError, match="2 rows; 3"):
        model(ids, model.new_caches(2))
    with pytest.raises(ValueError, match=r"\(3, 5\).*3 rows of 12"):
        model(ids, documents=ids[:, :5])


def test_a_configuration_cannot_be_changed():
    config = PRESETS["llama-3.2-1b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 1
    with pytest.raises(TypeError, match="does not change"):
        config.rope_scaling["factor"] = 1.0
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("position", POSITIONS)
def test_reader_past_the_context(position):
    model = make(position=position, n_kv_heads=2)
    cached, plain = Reader(model), Reader(model, use_cache=False)
    for i in range(50):
        a, b = cached.read([i % 37]), plain.read([i % 37])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eos", [0, None, [3, 7]], ids=str)
def test_ids_that_end_a_text_survive(eos, tmp_path):
    model = make(n_kv_heads=2)
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
