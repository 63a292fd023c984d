"""What the chapter does not show: other layouts, peft, hostile files."""

import json
import shutil

import pytest
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llm_from_scratch.generation import generate, quicken
from llm_from_scratch.lora import (
    Adapter,
    LoRAConfig,
    LoRALinear,
    add_lora,
    fingerprint,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    use_adapter,
)
from llm_from_scratch.model import TransformerLM, preset, save_model
from llm_from_scratch.quantization import quantize_model
from llm_from_scratch.training import AdamW, autocast

V = shapes.V
SHAPES = {
    "llama": preset("nano", vocab_size=V, n_kv_heads=2),
    "smollm2": preset("smollm2-135m", vocab_size=V, n_layers=2),
} | shapes.SHAPES
IDS = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(0))


def make(name):
    torch.manual_seed(0)
    return TransformerLM(SHAPES[name]).eval()


def shake(model, seed=1):
    "Give all thin matrices numbers, as if they had been trained."
    torch.manual_seed(seed)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture
def adapted():
    return shake(add_lora(make("llama"), rank=3, alpha=5))


def refuses(words, function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and all(w in message for w in words), message


# --- parity with peft


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folders = {}
    for name in SHAPES:
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(make(name), folders[name])
    return folders


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours(name, rslora, exported, tmp_path):
    from peft import PeftModel

    model = shake(add_lora(make(name), 3, 5.0, rslora=rslora))
    save_adapter(model, tmp_path, base=str(exported[name]))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] == (name == "gpt2")
    other = PeftModel.from_pretrained(theirs(exported[name]), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            other(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4
        )
        assert (model(IDS) - make(name)(IDS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["gate_proj", "o_proj"]),
        ("smollm2", ["k_proj", "v_proj", "up_proj", "down_proj"]),
        ("smollm2", "all-linear"),
        ("qwen3", "all-linear"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
    ],
)
def test_ours_reads_peft(name, targets, exported, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    other = get_peft_model(
        theirs(exported[name]),
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=targets,
            init_lora_weights=False,
            fan_in_fan_out=name == "gpt2",
        ),
    ).eval()
    other.save_pretrained(tmp_path)
    base = make(name)
    model = load_adapter(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS), other(IDS).logits, atol=1e-4, rtol=1e-4
        )
        assert (model(IDS) - base(IDS)).abs().max() > 0.01


def test_peft_reads_what_sits_in_one_block_only(exported, tmp_path):
    from peft import PeftModel

    model = shake(
        add_lora(make("llama"), 2, targets=["layers.1.self_attn.q_proj"])
    )
    assert len(lora_parameters(model)) == 2
    save_adapter(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    other = PeftModel.from_pretrained(theirs(exported["llama"]), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            other(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4
        )


def test_initial_thin_matrices_are_pefts(exported):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(
        theirs(exported["llama"]), LoraConfig(r=8, target_modules=["q_proj"])
    )
    a = next(p for n, p in other.named_parameters() if "lora_A" in n)
    ours = lora_parameters(add_lora(make("llama"), 8, targets=["q_proj"]))[0]
    assert a.shape == ours.shape
    for tensor in (a, ours):
        assert 0.9 / 8 < tensor.abs().max() <= 1 / 8


# --- what always holds


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.25, 32),
    rslora=st.booleans(),
    chosen=st.sets(st.sampled_from(["q", "k", "v"]), min_size=1),
)
def test_update_is_what_forward_adds(rank, alpha, rslora, chosen):
    adapter = Adapter(
        8,
        {"q": 8, "k": 4, "v": 4},
        chosen,
        LoRAConfig(rank, alpha, rslora=rslora),
    )
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(
        adapter(x), x @ adapter.update().T, atol=1e-3, rtol=1e-3
    )
    assert torch.linalg.matrix_rank(adapter.update()) <= rank * len(chosen)


@pytest.mark.parametrize("name", SHAPES)
def test_merged_is_adapted_and_can_be_saved(name, tmp_path):
    base = make(name)
    model = shake(add_lora(base, 3))
    merged = merge_lora(model)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    own = {p.data_ptr() for p in merged.parameters()}
    assert not own & {p.data_ptr() for p in base.parameters()}
    assert all(p.requires_grad for p in merged.parameters())
    assert fingerprint(model) == fingerprint(base) != fingerprint(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            merged(IDS), model(IDS), atol=1e-4, rtol=1e-4
        )
    save_model(merged, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tmp_path)(IDS).logits, merged(IDS), atol=1e-4, rtol=1e-4
        )


def test_merging_no_adapter_gives_the_base(adapted):
    merged = merge_lora(use_adapter(adapted, None))
    assert fingerprint(merged) == fingerprint(make("llama"))


def test_only_thin_matrices_move_and_the_base_can_still_be_trained():
    base = make("llama")
    before = fingerprint(base)
    model = add_lora(base, 2)
    optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
    assert fingerprint(base) == before
    assert all(p.grad is not None for p in lora_parameters(model))
    assert all(p.requires_grad for p in base.parameters())
    assert all(p.grad is None for p in base.parameters())


def test_rows_get_the_adapter_that_they_ask_for(adapted):
    model = add_lora(adapted, 2, targets=["q_proj", "down_proj"], name="two")
    second = lora_parameters(model, "two")
    assert len(second) == 2 * 2 * 2  # layers, places, A and B
    for p in second:
        nn.init.normal_(p, std=0.2)
    which = ["two", None, "default", "two"]
    rows = IDS[[0, 1, 0, 1]]
    with torch.no_grad():
        together = use_adapter(model, which)(rows)
        for i, name in enumerate(which):
            alone = use_adapter(model, name)(rows[i : i + 1])[0]
            torch.testing.assert_close(together[i], alone)
    assert use_adapter(model, "default")(IDS).equal(adapted(IDS))
    refuses(["4 rows", "2 came"], use_adapter(model, which), IDS)
    refuses(["own", "use_adapter"], merge_lora, model)


def test_writes_like_its_merged_form(adapted):
    merged, start = merge_lora(adapted), [1, 2, 3]
    texts = [
        list(generate(m, start, 12, temperature=0))
        for m in (adapted, merged, quicken(adapted), quicken(merged))
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_dropout_only_in_training():
    model = shake(add_lora(make("llama"), 2, dropout=0.5))
    assert model(IDS).equal(model(IDS))
    model.train()
    assert not model(IDS).equal(model(IDS))


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_a_quantized_base(bits):
    small = quantize_model(make("llama"), bits)
    model = shake(add_lora(small, 2))
    floats = add_lora(merge_lora(add_lora(small, 2)), 2)
    with torch.no_grad():
        for p, q in zip(lora_parameters(floats), lora_parameters(model)):
            p.copy_(q)
    for m in (model, floats):
        m(IDS).float().logsumexp(-1).mean().backward()
    for p, q in zip(lora_parameters(floats), lora_parameters(model)):
        assert (p.grad - q.grad).norm() < 0.03 * p.grad.norm()
    with autocast("bf16"):
        loss = model(IDS).float().square().mean()
    loss.backward()
    with torch.no_grad():  # one row, by the fast kernel
        model(IDS[:1, :3])


def test_files_come_back_also_on_a_quantized_base(tmp_path):
    small = quantize_model(make("llama"), 4)
    model = shake(add_lora(small, 2))
    save_adapter(model, tmp_path)
    assert load_adapter(small, tmp_path)(IDS).equal(model(IDS))
    refuses(["fingerprint"], load_adapter, make("llama"), tmp_path)
    load_adapter(make("llama"), tmp_path, any_base=True)


# --- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rank=0), ["rank is 0"]),
        (dict(rank=2.0), ["rank is 2.0"]),
        (dict(rank=True), ["rank is True"]),
        (dict(alpha=-1), ["alpha is -1"]),
        (dict(alpha=0), ["alpha is 0"]),
        (dict(alpha=float("nan")), ["alpha is nan"]),
        (dict(dropout=1.0), ["dropout is 1.0"]),
        (dict(targets="q_proj"), ["targets is 'q_proj'", "list"]),
        (dict(targets=["proj"]), ["'proj'", "q_proj", "down_proj"]),
        (dict(name=""), ["name is ''"]),
        (dict(name="a.b"), ["name is 'a.b'"]),
        (dict(name="keys"), ["name is 'keys'"]),
    ],
)
def test_refuses_bad_requests(change, words):
    refuses(words, add_lora, make("llama"), **change)


def test_no_adapter_takes_the_place_of_another(adapted, tmp_path):
    refuses(["'default'", "new word"], add_lora, adapted)
    save_adapter(adapted, tmp_path)
    refuses(["'default'", "new word"], load_adapter, adapted, tmp_path)
    model = load_adapter(adapted, tmp_path, "again")
    assert model(IDS).equal(adapted(IDS))


def test_an_old_design_is_adapted_but_not_saved(tmp_path):
    shape = preset("nano", pre_norm=False, activation="relu")
    model = shake(add_lora(TransformerLM(shape), 2, targets=["out"]))
    merge_lora(model)
    refuses(["no Hugging Face layout"], save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_to_save(tmp_path):
    refuses(["no adapter"], save_adapter, make("llama"), tmp_path)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, function):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: change_config(f, peft_type="IA3"), ["'IA3'", "LORA"]),
        (lambda f: change_config(f, use_dora=True), ["use_dora is True"]),
        (lambda f: change_config(f, bias="all"), ["bias is 'all'"]),
        (
            lambda f: change_config(f, rank_pattern={"q_proj": 4}),
            ["rank_pattern"],
        ),
        (
            lambda f: change_config(f, init_lora_weights="pissa_niter_4"),
            ["pissa"],
        ),
        (lambda f: change_config(f, r=None), ["rank is None"]),
        (lambda f: change_config(f, r=4), ["lora_A", "(3, ", "(4, "]),
        (
            lambda f: (f / "adapter_config.json").write_text("[" * 100000),
            ["adapter_config.json"],
        ),
        (
            lambda f: (f / "adapter_config.json").write_text("[]"),
            ["peft_type is []"],
        ),
        (
            lambda f: (f / "adapter_config.json").unlink(),
            ["cannot be read"],
        ),
        (lambda f: change_tensors(f, lambda t: t.pop(FIRST)), ["missing"]),
        (lambda f: change_tensors(f, lambda t: t.clear()), ["no tensors"]),
        (
            lambda f: change_tensors(
                f, lambda t: t.update({"extra": torch.zeros(1)})
            ),
            ["extra", "no place"],
        ),
        (
            lambda f: change_tensors(
                f, lambda t: t[FIRST].fill_(float("inf"))
            ),
            ["q_proj", "not finite"],
        ),
        (
            lambda f: change_tensors(
                f, lambda t: t.update({FIRST: torch.zeros(3, 64).long()})
            ),
            ["q_proj", "not finite"],
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK" * 9),
            ["damaged"],
        ),
        (
            lambda f: (f / "adapter_model.safetensors").rename(
                f / "adapter_model.bin"
            ),
            ["is missing", "pickle"],
        ),
    ],
)
def test_refuses_harmed_folders(harm, words, adapted, tmp_path):
    save_adapter(adapted, tmp_path)
    harm(tmp_path)
    refuses(words, load_adapter, make("llama"), tmp_path)


def test_refuses_other_bases(adapted, tmp_path):
    save_adapter(adapted, tmp_path)
    base = make("llama")
    with torch.no_grad():
        base.norm.weight[0] += 1e-6
    refuses(["fingerprint", "any_base"], load_adapter, base, tmp_path)
    for other in (
        preset("nano", vocab_size=V),  # as many key heads as query heads
        preset("nano", vocab_size=V, n_kv_heads=2, d_ff=32),
        preset("nano", vocab_size=V, n_kv_heads=2, n_layers=1),
        SHAPES["gpt2"],
    ):
        refuses(
            ["made for another base"],
            load_adapter,
            TransformerLM(other),
            tmp_path,
        )


def test_a_failed_write_leaves_no_configuration(
    adapted, tmp_path, monkeypatch
):
    from llm_from_scratch import lora

    save_adapter(adapted, tmp_path)

    def fail(path, content):
        raise OSError(28, "no space left")

    monkeypatch.setattr(lora, "write_file", fail)
    with pytest.raises(OSError):
        save_adapter(adapted, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    shutil.rmtree(tmp_path)
