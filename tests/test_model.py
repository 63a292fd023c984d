"""What must hold for every shape of the model, whatever its parts."""

import itertools

import pytest
import torch

from llm_from_scratch.generation import Reader
from llm_from_scratch.model import ModelConfig, TransformerLM

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
