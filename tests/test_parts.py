"""Positions and blocks on their own: properties of random cases, refusals,
and every way to run them."""

import shutil

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_from_scratch.attention import (
    KVCache,
    MultiHeadAttention,
    fused_attention,
    held_attention,
)
from llm_from_scratch.block import (
    Block,
    FeedForward,
    LayerNorm,
    RMSNorm,
    gated_width,
)
from llm_from_scratch.position import (
    AlibiBias,
    RotaryPositions,
    alibi_slopes,
    half_split_order,
    rope_angles,
    rope_rates,
    scaled_rates,
    sinusoidal_positions,
)

CONTEXT = 64
seeds = st.integers(0, 2**31 - 1)
places = st.integers(0, CONTEXT - 1)
few = settings(max_examples=40)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turn_neighbours(x, offset, theta):
    "The layout of the paper, by complex numbers, in double precision."
    T, Dh = x.shape[-2:]
    angles = rope_angles(offset + T, Dh, theta)[offset:].double()
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def turn_halves(x, offset, theta):
    return RotaryPositions(x.shape[-1], 2 * CONTEXT, theta)(x, offset)


@few
@given(seeds, places, places, places, st.integers(1, 16),
       st.sampled_from([100.0, 10000.0, 500000.0]),
       st.sampled_from([turn_halves, turn_neighbours]))
def test_scores_feel_the_distance_alone(seed, t, s, shift, half, theta, turn):
    q, k = draw(seed, 2, 1, 1, 1, 2 * half)
    here = turn(q, t, theta) * turn(k, s, theta)
    there = turn(q, t + shift, theta) * turn(k, s + shift, theta)
    size = q.norm().item() * k.norm().item()
    assert abs((here - there).sum().item()) < 1e-4 * (1 + size)


@few
@given(seeds, places, st.integers(1, 16), st.integers(1, 9))
def test_both_layouts_turn_alike(seed, offset, half, T):
    x, order = draw(seed, 1, 2, T, 2 * half), half_split_order(2 * half)
    ours = turn_halves(x[..., order], offset, 10000.0)
    paper = turn_neighbours(x, offset, 10000.0)[..., order]
    torch.testing.assert_close(ours.double(), paper, rtol=0, atol=1e-4)


@few
@given(st.sampled_from(["linear", "llama3", "yarn"]),
       st.sampled_from([32, 64, 96, 128]),
       st.sampled_from([1e4, 5e5, 1e6]), st.floats(1.0, 64.0),
       st.sampled_from([256, 4096, 32768]), st.booleans())
def test_slowed_rates_are_those_of_transformers(
    kind, head_dim, theta, factor, trained, truncate
):
    scaling = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = trained
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        scaling["truncate"] = truncate
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4,
        max_position_embeddings=int(trained * factor),
        rope_parameters={"rope_theta": theta, **scaling})
    theirs, their_scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    rates, scale = scaled_rates(head_dim, theta, scaling)
    torch.testing.assert_close(rates, theirs, rtol=1e-4, atol=0)
    assert scale == pytest.approx(their_scale)


@few
@given(seeds, st.integers(2, 40), st.floats(0.1, 100), st.floats(-10, 10))
def test_norms_forget_what_they_promise(seed, D, factor, constant):
    x = draw(seed, 3, D).double()
    x = x + torch.linspace(0, 1, D, dtype=torch.float64)  # never constant
    layer, rms = LayerNorm(D, eps=0.0).double(), RMSNorm(D, 0.0).double()
    for norm in (layer, rms):
        torch.testing.assert_close(norm(factor * x), norm(x))
    torch.testing.assert_close(layer(x + constant), layer(x),
                               rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        rms(x).square().mean(-1), torch.ones(3, dtype=torch.float64))


@few
@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 6]),
       st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 0.06)]))
def test_holding_the_weights_changes_nothing(seed, T, n_kv_heads, kind):
    dtype, eps = kind
    q = draw(seed, 2, 6, T, 8).requires_grad_()
    k, v = (draw(seed + i, 2, n_kv_heads, T, 8).requires_grad_()
            for i in (1, 2))
    expected = fused_attention(q, k, v)
    ours = held_attention(*(x.to(dtype) for x in (q, k, v)))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, rtol=eps, atol=eps)
    grads = [torch.autograd.grad(y.float().square().mean(), (q, k, v))
             for y in (ours, expected)]
    for held, fused in zip(*grads, strict=True):
        torch.testing.assert_close(held, fused, rtol=eps, atol=eps)


@few
@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.booleans())
@torch.no_grad()
def test_a_layer_that_holds_is_the_same_layer(seed, T, n_kv_heads, is_apart):
    torch.manual_seed(seed)
    layer = MultiHeadAttention(32, 4, n_kv_heads=n_kv_heads).eval()
    x, mask = draw(seed, 2, T, 32), None
    if is_apart:  # held weights know no mask and no cache: not used there
        mask = torch.eye(T) > 0
    caches = [KVCache(2, n_kv_heads, T, 8) for _ in range(2)]
    found = []
    for layer.holds, cache in zip((False, True), caches):
        pieces = [layer(part, cache) for part in x.split([1, T - 1], 1)
                  if part.shape[1]]
        found.append([layer(x, mask=mask), torch.cat(pieces, 1)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


BLOCKS = {
    "2017": dict(pre_norm=False, activation="relu"),
    "gpt2": dict(),
    "llama": dict(norm="rmsnorm", activation="swiglu", bias=False,
                  n_kv_heads=2),
}


def make(kind, position="rotary", dtype=torch.float32, seed=0):
    "A block with what turns its queries and keys."
    torch.manual_seed(seed)
    block = Block(32, 4, 48, **BLOCKS[kind]).eval().to(dtype)
    if position == "alibi":
        block.attention.score_bias = AlibiBias(4)
    rotate = RotaryPositions(8, CONTEXT) if position == "rotary" else None
    return block, rotate


kinds = st.sampled_from(sorted(BLOCKS))
positions = st.sampled_from(["rotary", "alibi", "none"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@few
@given(seeds, kinds, positions, dtypes, st.lists(st.integers(1, 5),
                                                 min_size=2, max_size=5))
@torch.no_grad()
def test_no_block_leaks_through_any_cache(seed, kind, position, dtype, sizes):
    block, rotate = make(kind, position, dtype)
    T, cut = sum(sizes), sum(sizes[:-1])
    x = draw(seed, 2, T, 32).to(dtype)
    y = torch.cat([x[:, :cut], draw(seed + 1, 2, T - cut, 32).to(dtype)], 1)
    exact = dtype == torch.float32
    found = []
    for row in (x, y):
        cache = KVCache(2, block.attention.n_kv_heads, T, 8, dtype)
        found.append(torch.cat([block(part, cache, rotate)
                                for part in row.split(sizes, 1)], 1))
        whole = block(row, None, rotate)
        torch.testing.assert_close(found[-1], whole, rtol=0,
                                   atol=1e-5 if exact else 0.15)
    assert found[0].dtype == dtype
    assert torch.equal(found[0][:, :cut], found[1][:, :cut])
    assert not torch.equal(found[0][:, cut:], found[1][:, cut:])


@few
@given(seeds, kinds, st.lists(st.integers(1, 6), min_size=2, max_size=4))
@torch.no_grad()
def test_texts_in_one_row_never_meet(seed, kind, sizes):
    block, _ = make(kind, "none")
    x = draw(seed, 1, sum(sizes), 32)
    text = torch.repeat_interleave(torch.arange(len(sizes)),
                                   torch.tensor(sizes))
    packed = block(x, mask=text[:, None] == text)
    alone = torch.cat([block(part) for part in x.split(sizes, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@few
@given(st.integers(1, 5000), st.integers(1, 300))
def test_gated_networks_are_as_large_as_plain_ones(d_ff, multiple):
    width = gated_width(d_ff, multiple)
    assert width % multiple == 0
    assert 0 <= 3 * width - 2 * d_ff < 3 * multiple


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_bfloat16_stays_near(kind):
    x = draw(0, 2, 12, 32)
    block, rotate = make(kind)
    exact = block(x, None, rotate)
    short = block.bfloat16()(x.bfloat16(), None, rotate.bfloat16())
    assert short.dtype == torch.bfloat16
    assert (short.float() - exact).abs().max() < 0.1


class Turned(nn.Module):
    "A block and its rotation, or bias, as one module."

    def __init__(self, kind, position):
        super().__init__()
        self.block, self.rotate = make(kind, position)

    def forward(self, x):
        return self.block(x, None, self.rotate)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_compile_export_and_meta(kind, position):
    model, x = Turned(kind, position), draw(0, 2, 12, 32)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    with torch.device("meta"):
        ghost = Turned(kind, position)
        assert ghost(torch.zeros(2, 12, 32)).shape == (2, 12, 32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_code_gives_the_same():
    model, x = Turned("llama", "rotary"), draw(0, 2, 12, 32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


REFUSALS = {
    "d_model is 7": lambda: sinusoidal_positions(4, 7),
    "head_dim is 5": lambda: rope_rates(5),
    "theta is 0": lambda: rope_rates(8, 0),
    "theta is -1": lambda: sinusoidal_positions(4, 8, -1),
    "3 pairs, but head_dim is 8": lambda: rope_angles(
        4, 8, rates=torch.ones(3)),
    "positions 6 to 9, but the tables hold 0 to 7": lambda: RotaryPositions(
        8, 8)(torch.zeros(1, 1, 4, 8), 6),
    "positions -1 to 2": lambda: RotaryPositions(
        8, 8)(torch.zeros(1, 1, 4, 8), -1),
    "heads of width 6; the tables are for head_dim 8":
        lambda: RotaryPositions(8, 8)(torch.zeros(1, 1, 4, 6)),
    "n_heads is 0": lambda: alibi_slopes(0),
    "5 queries, but only 3 keys": lambda: AlibiBias(2)(5, 3),
    "'spiral'": lambda: scaled_rates(8, 1e4, {"rope_type": "spiral"}),
    "lacks 'factor'": lambda: scaled_rates(8, 1e4, {"rope_type": "linear"}),
    "d_ff is 0": lambda: FeedForward(8, 0),
    "'tanh'": lambda: FeedForward(8, 8, "tanh"),
    "'batchnorm'": lambda: Block(8, 2, 8, norm="batchnorm"),
    "d_model 9 is not a multiple of n_heads 2": lambda: Block(9, 2, 8),
    "n_heads 4 is not a multiple of n_kv_heads 3": lambda: Block(8, 4, 8, 3),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_the_impossible_is_refused(words):
    with pytest.raises(ValueError) as error:
        REFUSALS[words]()
    assert words in str(error.value)
