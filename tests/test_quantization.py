"""What the chapter does not show: other layouts, hostile files, processes."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llm_from_scratch import quantization
from llm_from_scratch.data import Windows
from llm_from_scratch.generation import (
    generate,
    generate_batch,
    quicken,
    speculate,
)
from llm_from_scratch.model import (
    TransformerLM,
    load_model,
    preset,
    save_model,
)
from llm_from_scratch.pretrained import load_pretrained, save_pretrained
from llm_from_scratch.quantization import (
    AdamW8bit,
    GroupedProduct,
    IntegerProduct,
    QuantizedLinear,
    from_octaves,
    gptq,
    load_any,
    load_quantized,
    quantize_model,
    save_quantized,
    state_bytes,
    to_octaves,
    to_steps,
)
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training import (
    TrainConfig,
    load_checkpoint,
    save_checkpoint,
    train,
)

V = shapes.V
SHAPES = {"untied": preset("nano", vocab_size=V)} | shapes.SHAPES


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the king and the queen " * 20], V - 20)


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    torch.manual_seed(0)
    model = TransformerLM(SHAPES[request.param]).eval()
    for p in model.parameters():
        if p.dim() == 1:  # norms and biases that are not one and zero
            torch.nn.init.normal_(p)
    return model


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (3, 40), generator=generator)


def logits(model, ids):
    with torch.inference_mode():
        return model(ids)


def relative(found, right):
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.parametrize("bits", [8, 4])
def test_folder_returns_the_same_model(model, ids, bits, tokenizer, tmp_path):
    small = quantize_model(model, bits, 32)
    save_quantized(small, tokenizer, tmp_path)
    again, words = load_any(tmp_path)
    assert torch.equal(logits(again, ids), logits(small, ids))
    assert again.special_ids == {} or again.special_ids == small.special_ids
    assert words.encode("the queen") == tokenizer.encode("the queen")
    texts = [
        list(generate(m, [1, 2, 3], 12, temperature=0))
        for m in (small, again, quicken(again))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert (tmp_path / "quantized.safetensors").stat().st_size < 0.6 * sum(
        p.nbytes for p in model.parameters()
    )


def test_eight_bits_are_near_and_four_further(model, ids):
    right = logits(model, ids)
    eight = relative(logits(quantize_model(model, 8), ids), right)
    four = relative(logits(quantize_model(model, 4, 32), ids), right)
    assert eight < 0.04 and 2 * eight < four < 0.4


def test_gptq_helps_the_whole_model(model, ids):
    right = logits(model, ids)
    nearest = quantize_model(model, 4, 32)
    ahead = quantize_model(model, 4, 32, ids)
    assert relative(logits(ahead, ids), right) < 0.95 * relative(
        logits(nearest, ids), right
    )


def test_outliers_get_the_second_digit(model, ids, tokenizer, tmp_path):
    loud = copy.deepcopy(model)
    norm = loud.blocks[1].attention_norm
    norm.weight.data[3] *= 300.0
    small = quantize_model(loud, 8, 64, ids)
    digits = {
        name: layer.digits
        for name, layer in small.blocks.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    assert digits["1.attention.qkv"] == 2
    assert digits["0.attention.qkv"] == digits["0.feed_forward.up"] == 1
    save_quantized(small, tokenizer, tmp_path)
    again, _ = load_any(tmp_path)
    assert torch.equal(logits(again, ids), logits(small, ids))
    right = logits(loud, ids)
    with_two = relative(logits(small, ids), right)
    small.blocks[1].attention.qkv.multiply.digits = 1
    assert relative(logits(small, ids), right) > with_two


def test_the_original_stays(model, ids):
    before = logits(model, ids)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    quantize_model(model, 4, 32, ids)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("bits", [8, 4])
def test_export_writes_what_the_steps_stand_for(
    model, ids, bits, tokenizer, tmp_path
):
    small = quantize_model(model, bits, 32)
    for write in (save_model, lambda m, f: save_pretrained(m, tokenizer, f)):
        write(small, tmp_path / "plain")
        plain = load_model(tmp_path / "plain")
        gap = relative(logits(plain, ids), logits(small, ids))
        assert gap < (1e-4 if bits == 8 else 1e-2)


def test_writing_in_batches_and_with_a_draft(model):
    small = quantize_model(model, 8)
    prompts = [[1, 2], [3], list(range(20))]
    alone = [list(generate(small, p, 8, temperature=0)) for p in prompts]
    assert generate_batch(small, prompts, 8, temperature=0) == alone
    guessed = list(speculate(model, small, [1, 2], 8, temperature=0))
    assert guessed == list(generate(model, [1, 2], 8, temperature=0))


def test_without_the_kernels_all_is_the_same(model, ids, monkeypatch):
    fast = [logits(quantize_model(model, bits, 32), ids) for bits in (8, 4)]
    monkeypatch.setattr(quantization, "_can_multiply", lambda matrix: None)
    for bits, found in zip((8, 4), fast):
        slow = logits(quantize_model(model, bits, 32), ids)
        assert relative(found, slow) < 1e-3


def test_digits_without_the_wide_instruction(monkeypatch):
    w, x = torch.randn(40, 64), torch.randn(7, 64)
    matrix = to_steps(w)
    right = x @ matrix.restore().T
    for top in (127, 63):
        monkeypatch.setattr(quantization, "_TOP", top)
        assert relative(IntegerProduct(matrix, 2)(x), right) < 2e-4
        assert relative(IntegerProduct(matrix, 1)(x), right) < 0.02


@given(
    st.integers(2, 8),
    st.integers(1, 40),
    st.integers(1, 5),
    st.booleans(),
    st.floats(1e-6, 1e6),
)
def test_nearest_is_within_half_a_step(bits, width, size, affine, scale):
    torch.manual_seed(width)
    w = torch.randn(3, width) * scale
    s = to_steps(w, bits, size, affine)
    error = (s.restore() - w).abs()
    step = s.scale.repeat_interleave(size, 1)[:, :width]
    assert s.restore().shape == w.shape
    assert (error <= 0.5001 * step + 1e-6 * scale).all()
    top = 2 ** (bits - 1) - 1
    assert -top - affine <= s.steps.min() and s.steps.max() <= top


def test_integer_product_is_the_integer_product():
    w, x = torch.randn(48, 96), torch.randn(5, 96)
    matrix = to_steps(w)
    step = x.abs().amax(1, True) / 127
    sums = (x / step).round().to(torch.int64) @ matrix.steps.to(torch.int64).T
    right = sums * step * matrix.scale.T
    if quantization._TOP == 127:
        assert relative(IntegerProduct(matrix, 1)(x), right) < 1e-6


def test_grouped_product_beside_bfloat16():
    for width, size in ((128, 32), (172, 64), (96, 128)):
        w, x = torch.randn(32, width), torch.randn(4, width)
        s = to_steps(w, 4, size, True, torch.bfloat16)
        right = F.linear(x, s.restore())
        assert relative(GroupedProduct(s)(x), right) < 0.01


@pytest.mark.parametrize("size", [None, 100, 64, 20])
def test_gptq_in_pieces_is_gptq_column_by_column(size):
    torch.manual_seed(0)
    w = torch.randn(5, 150)
    data = torch.randn(400, 150) @ torch.randn(150, 150)
    h, g, D = (data.T @ data).double(), size or 150, 150
    filling = -D % g
    h = F.pad(h, (0, filling, 0, filling))
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(h.inverse(), upper=True)
    left = torch.cat([w, w[:, -1:].expand(-1, filling)], 1).double()
    for j in range(D + filling):
        if j % g == 0:
            part = left[:, j : j + g]
            scale = (part.amax(1) - part.amin(1)) / 15
            middle = part.amin(1) + 8 * scale
        q = ((left[:, j] - middle) / scale).round().clamp(-8, 7)
        error = (q * scale + middle - left[:, j]) / upper[j, j]
        left[:, j:] += error[:, None] * upper[j, j:]
    found = gptq(w, (data.T @ data), 4, size).restore()
    share = ((found - left[:, :D]).abs() < 1e-3).double().mean()
    assert share > 0.97  # a tie may fall the other way in float32


def test_gptq_with_dead_inputs_and_few_texts():
    w, x = torch.randn(16, 50), torch.randn(10, 50)
    x[:, 7] = 0.0
    s = gptq(w, x.T @ x, 4, 32)
    assert s.restore().isfinite().all() and s.restore().shape == w.shape
    near = to_steps(w, 4, 32, True).restore()
    assert relative(x @ s.restore().T, x @ w.T) < relative(x @ near.T, x @ w.T)
    nothing = gptq(w, torch.zeros(50, 50), 4, 32)  # then it is nearest
    assert torch.allclose(nothing.restore(), near, atol=1e-5)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: quantize_model(m, 5), "bits is 5; choose 8 or 4"),
        (lambda m: quantize_model(m, "8"), "bits is '8'"),
        (lambda m: quantize_model(m, 4, 100), "group_size is 100; choose"),
        (lambda m: quantize_model(m, 4, 0), "group_size is 0; choose"),
        (lambda m: quantize_model(quantize_model(m)), "quantized already"),
        (lambda m: save_quantized(m, None, "x"), "not quantized"),
        (lambda m: to_steps(torch.ones(3)), "no matrix"),
        (lambda m: to_steps(torch.full((1, 2), math.nan)), "no matrix"),
        (lambda m: to_steps(torch.ones(2, 2), 9), "bits is 9"),
        (lambda m: to_steps(torch.ones(2, 2), 8, 1.5), "group_size is 1.5"),
        (lambda m: gptq(torch.ones(2, 3), torch.eye(2)), "moments have"),
        (lambda m: IntegerProduct(to_steps(torch.ones(2, 2)), 3), "digits"),
        (
            lambda m: quantize_model(
                TransformerLM(SHAPES["untied"]).bfloat16()
            ),
            "float32 is needed",
        ),
    ],
)
def test_bad_requests_say_what_would_do(call, said):
    with pytest.raises(ValueError, match=said) as caught:
        call(TransformerLM(SHAPES["untied"]))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    small = quantize_model(TransformerLM(SHAPES["gpt2"]), 4, 32)
    return save_quantized(small, tokenizer, tmp_path_factory.mktemp("four"))


def edit(folder, tmp_path, change):
    "A copy of the folder with its configuration changed."
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


QUANT = "quantization"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c[QUANT].update(bits=8), "steps"),
        (lambda c: c[QUANT].update(bits=3), "bits is 3"),
        (lambda c: c[QUANT].update(bits=None), "bits is None"),
        (lambda c: c[QUANT].update(group_size=64), "scale"),
        (lambda c: c[QUANT].update(group_size=10**9), "group_size"),
        (lambda c: c[QUANT].update(group_size=[32]), "group_size"),
        (lambda c: c[QUANT].update(format="awq"), "'awq'"),
        (lambda c: c.update({QUANT: [1]}), "quantization"),
        (lambda c: c.update(n_embd=128), "steps"),
        (lambda c: c.update(n_layer=10**6), "n_layers"),
        (lambda c: c.update(n_positions=10**9), "context_length"),
        (lambda c: c.update(n_layer=3), "missing"),
        (lambda c: c.update(n_layer=1), "does not have"),
        (lambda c: c.update(vocab_size=10**7), "embedding"),
        (lambda c: c.update(model_type="mamba"), "mamba"),
        (lambda c: c.update(n_head="four"), "n_heads"),
    ],
)
def test_a_lying_configuration_is_refused(folder, tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as caught:
        load_any(edit(folder, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused(folder, tmp_path):
    edit(folder, tmp_path, lambda c: None)
    path = tmp_path / "quantized.safetensors"
    good = path.read_bytes()
    load_quantized(tmp_path)
    for bad in (good[:-5], good + b"x", b"", b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            load_quantized(tmp_path)
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    start = 8 + size + header["embedding.scale"]["data_offsets"][0]
    path.write_bytes(good[:start] + b"\xff" * 4 + good[start + 4 :])
    with pytest.raises(ValueError, match="not finite"):
        load_quantized(tmp_path)


def test_odd_files_beside_the_weights(folder, tmp_path):
    edit(folder, tmp_path, lambda c: None)
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 279, "bos_token_id": "x", "x": 1}')
    assert load_any(tmp_path)[0].special_ids == {"eos_token_id": 279}
    for bad in ("[", "[" * 100_000):
        path.write_text(bad)
        with pytest.raises(ValueError):
            load_any(tmp_path)
    path.unlink()
    words = " ".join(str(7**n) for n in range(60))
    Tokenizer.train([words], V + 20).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer has 320 ids"):
        load_any(tmp_path)
    (tmp_path / "quantized.safetensors").unlink()
    with pytest.raises(ValueError, match="quantized.safetensors"):
        load_any(tmp_path)


def test_others_refuse_the_folder_loudly(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantization is"):
        load_pretrained(folder)


def test_plain_folders_load_as_ever(tokenizer, tmp_path):
    model = TransformerLM(SHAPES["gpt2"]).eval()
    save_pretrained(model, tokenizer, tmp_path)
    found, _ = load_any(tmp_path)
    assert not any(isinstance(m, QuantizedLinear) for m in found.modules())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        load_any(tmp_path)


@settings(max_examples=25)
@given(st.floats(1e-12, 1e12), st.booleans(), st.integers(1, 600))
def test_octaves_keep_the_order_of_magnitude(scale, signed, n):
    torch.manual_seed(n)
    x = torch.randn(n) * torch.logspace(-3, 0, n) * scale
    x, octaves = (x, 16.0) if signed else (x.abs(), 32.0)
    codes, top = to_octaves(x, octaves, signed)
    back = from_octaves(codes, top, octaves, x.shape)
    step = 2 ** (octaves / (127 if signed else 255)) - 1
    tops = top.repeat_interleave(codes.shape[1], 1).flatten()[:n]
    kept = x.abs() > 2 * tops * 2**-octaves
    assert (back.sign()[kept] == x.sign()[kept]).all()
    assert ((back - x).abs() <= 1.01 * step * x.abs())[kept].all()
    assert (back.abs() <= 3 * tops * 2**-octaves)[~kept].all()


def test_small_averages_take_a_quarter():
    model = TransformerLM(SHAPES["untied"])
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    n = sum(p.numel() for p in model.parameters())
    assert state_bytes(optimizer) < 2.2 * n
    assert all(p.isfinite().all() for p in model.parameters())


def test_small_averages_go_through_a_checkpoint(tmp_path):
    def two_steps(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    models = [TransformerLM(SHAPES["untied"]) for _ in range(2)]
    whole, again = (AdamW8bit(m.parameters(), lr=1e-3) for m in models)
    two_steps(models[0], whole, 0)
    path = save_checkpoint(tmp_path, models[0], whole, 2, {})
    load_checkpoint(path, models[1], again)
    for model, optimizer in zip(models, (whole, again)):
        two_steps(model, optimizer, 1)
    for a, b in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_on_small_averages_goes_on_exactly(tmp_path):
    shape = preset("nano", vocab_size=61, dropout=0.1)
    windows = Windows((np.arange(999) * 7919 % 61).astype(np.uint16), 64, 2)

    def go(folder, optimizer="adamw8bit"):
        plan = TrainConfig(
            *(6, 2),
            optimizer=optimizer,
            warmup_steps=2,
            precision="fp32",
            eval_batches=1,
            checkpoint_interval=3,
        )
        torch.manual_seed(0)
        model = TransformerLM(shape)
        train(model, windows, windows, plan, folder, progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = go(tmp_path / "run")
    assert not torch.equal(whole, go(None, "adamw"))
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000006")
    assert torch.equal(whole, go(tmp_path / "run"))
    with pytest.raises(ValueError, match="optimizer adamw8bit, not muon"):
        go(tmp_path / "run", "muon")
