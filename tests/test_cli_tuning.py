"""The commands that teach a model: good runs, bad input, interruption."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import ends
from safetensors.torch import load_file

from llm_from_scratch import alignment, cli, finetuning
from llm_from_scratch.finetuning import Classifier
from llm_from_scratch.model import (
    TransformerLM,
    load_model,
    preset,
    save_model,
    save_tokenizer,
)
from llm_from_scratch.quantization import quantize_model, save_quantized
from llm_from_scratch.tokenizer import END_OF_TEXT, Tokenizer

TEXT = " ".join(
    f"{a} {b} {c} {n}."
    for a in ("the", "a", "one", "no")
    for b in ("king", "queen", "fool")
    for c in ("speaks", "sleeps")
    for n in range(5)
)
PAIRS = [
    {"prompt": "the", "chosen": " king", "rejected": " fool"},
    {"prompt": "one", "chosen": " queen sleeps", "rejected": " fool"},
]
WANTS = [{"prompt": "the", "answer": "king"}, {"prompt": "a", "answer": "no"}]
NESTED = "[" * 100_000


def chat(asked="who speaks?", answer="the king."):
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


CHATS = [
    chat(f"who {c}?", f"the {b}.") for b in ("king", "fool") for c in "ab"
]


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def shelf(words, tmp_path_factory):
    "Models, adapters and data; no test may write to it."
    folder = tmp_path_factory.mktemp("shelf")
    shape = dict(vocab_size=words.vocab_size)
    bases = {"base": shape, "twin": shape, "slim": {**shape, "d_ff": 32}}
    for seed, (name, fields) in enumerate(bases.items()):
        torch.manual_seed(seed)
        lm = TransformerLM(preset("nano", **fields))
        save_model(lm, folder / name)
        save_tokenizer(words, folder / name)
    save_quantized(
        quantize_model(load_model(folder / "base"), 4, 32),
        words,
        folder / "small",
    )
    (folder / "verses.txt").write_text(TEXT)
    write(folder / "chats.jsonl", *CHATS)
    write(folder / "pairs.jsonl", *PAIRS)
    write(folder / "wants.jsonl", *WANTS)
    before = tree(folder)
    yield folder
    assert tree(folder) == before


@pytest.fixture
def call(inside, monkeypatch, tmp_path):
    "The command line, in this process and in an empty folder."
    monkeypatch.chdir(tmp_path)
    return inside


def write(path, *rows):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def refused(call, args, *needles, begun=False, kept=()):
    "Exit code 2 with a line, and not a file more than there was."
    before = set(os.listdir("."))
    ends(call(*args), 2, *needles, begun=begun)
    assert set(os.listdir(".")) == before | set(kept)


SOON = ["--steps", 2, "--batch-size", 2]
BRIEF = [*SOON, "--max-new-tokens", 4, "--group-size", 2]


def builder(command, data, *brief):
    "Makes the arguments of a short run."
    usual = data

    def make(shelf, *more, model="base", data=usual, out="out"):
        paths = (shelf / model, "--data", shelf / data, "--out", out)
        return [command, *paths, *brief, *more]

    return make


finetune = builder("finetune", "chats.jsonl", "--epochs", 1, "--batch-size", 2)
lora = builder("lora", "verses.txt", *SOON)
align = builder("align", "pairs.jsonl", *BRIEF)


def opens(folder):
    "transformers reads it, and its numbers are numbers."
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert all(p.isfinite().all() for p in lm.parameters())
    return load_file(f"{folder}/model.safetensors")


def differ(one, other):
    return any(not one[name].equal(other[name]) for name in one)


# --- good runs


def test_finetune_and_chat(call, shelf):
    done = call(*finetune(shelf, "--learning-rate", 1e-3))
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout and "model in out" in done.stdout
    assert differ(opens("out"), opens(shelf / "base"))
    talk = call(
        *("chat", "out", "--temperature", 0, "--max-new-tokens", 3),
        typed="who speaks?\n\n" + "king " * 99 + "\n<|endoftext|>\nwho?\n",
    )
    assert talk.returncode == 0
    assert talk.stdout.count("you: ") == 6  # four, an empty one, and the end
    refusals = talk.stderr.splitlines()  # the talk goes on after each
    assert len(refusals) == 2, talk.stderr
    assert "room for 61" in refusals[0] and "special" in refusals[1]


def test_lora_and_merge(call, shelf):
    done = call(*lora(shelf, "--rank", 2, "--rate", 1e-2, out="part"))
    assert done.returncode == 0, done.stderr
    assert "4,928 numbers" in done.stdout
    assert sorted(os.listdir("part")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    done = call("merge", shelf / "base", "part", "--out", "whole")
    assert done.returncode == 0, done.stderr
    assert differ(opens("whole"), opens(shelf / "base"))


def test_lora_on_a_quantized_base(call, shelf):
    done = call(*lora(shelf, model="small", out="part"))
    assert done.returncode == 0, done.stderr
    done = call("merge", shelf / "small", "part", "--out", "whole")
    assert done.returncode == 0, done.stderr
    opens("whole")


@pytest.mark.parametrize(
    ("method", "data", "said"),
    [
        ("dpo", "pairs.jsonl", "pairs told apart"),
        ("grpo", "wants.jsonl", "reward: "),
        ("ppo", "wants.jsonl", "reward: "),
    ],
)
def test_align(call, shelf, method, data, said):
    done = call(*align(shelf, "--method", method, data=data))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "model in out" in done.stdout
    assert os.listdir(".") == ["out"]
    opens("out")


# --- Ctrl-C


def stop_at(monkeypatch, module, name, when):
    "Press Ctrl-C before the step of that number."
    real, calls = getattr(module, name), []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, step)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_ctrl_c_and_resume(call, shelf, monkeypatch, optimizer):
    words = ("--epochs", 2, "--learning-rate", 1e-3, "--optimizer", optimizer)
    assert call(*finetune(shelf, *words, out="whole")).returncode == 0
    with monkeypatch.context() as once:
        stop_at(once, finetuning, "_step", 2)
        done = call(*finetune(shelf, *words))
    ends(done, 130, "after step 2 of 4", "--resume", begun=True)
    assert os.listdir("out") == ["checkpoints"]
    refused(call, finetune(shelf, *words), "out", "--resume")
    refused(
        call,
        finetune(shelf, "--resume", "--optimizer", optimizer),
        "learning_rate 0.001",
    )
    two = (*words, "--resume")
    refused(call, finetune(shelf, *two, "--seed", 1), "seed 0")
    other = (*two, "--optimizer", "muon")
    refused(call, finetune(shelf, *other), f"optimizer {optimizer}, not muon")
    more = write(shelf.parent / "more.jsonl", *CHATS, *CHATS)
    refused(
        call,
        finetune(shelf, *two, "--epochs", 1, data=more),
        "data have changed",
    )
    more.unlink()
    done = call(*finetune(shelf, *two))
    assert done.returncode == 0, done.stderr
    one, other = (
        load_file(f"{x}/model.safetensors") for x in ("out", "whole")
    )
    assert not differ(one, other), "resume is not exact"


def test_training_on_small_averages_resumes(
    call, text_folder, monkeypatch, tmp_path
):
    from llm_from_scratch import training

    words = ["train", "--preset", "nano", "--data", text_folder]
    words += ["--steps", 6, "--optimizer", "adamw8bit", "--out"]
    assert call(*words, "whole").returncode == 0
    with monkeypatch.context() as once:
        stop_at(once, training, "train_step", 3)
        done = call(*words, "out")
    ends(done, 130, "after step 3 of 6", "--resume", begun=True)
    kept = "out/checkpoints/step-0000003/training.safetensors"
    kinds = {name: t.dtype for name, t in load_file(kept).items()}
    assert kinds["v.blocks.0.attention.qkv.weight"] == torch.uint8
    assert call("train", "--out", "out", "--resume").returncode == 0
    one, other = (
        load_file(f"{x}/model.safetensors") for x in ("out", "whole")
    )
    assert not differ(one, other), "resume is not exact"


@pytest.mark.parametrize("command", ["lora", "align"])
def test_ctrl_c_leaves_nothing(call, shelf, monkeypatch, command):
    from llm_from_scratch import training

    if command == "lora":
        stop_at(monkeypatch, training, "train_step", 2)
        done = call(*lora(shelf))
    else:
        stop_at(monkeypatch, alignment, "_pair_loss", 2)
        done = call(*align(shelf))
    ends(done, 130, "interrupted", begun=True)
    assert not os.listdir(".")


def test_ctrl_c_ends_a_talk(call, shelf, monkeypatch):
    assert call(*finetune(shelf)).returncode == 0
    stop_at(monkeypatch, finetuning, "fit_chat", 1)
    ends(call("chat", "out", typed="who?\n"), 130, "interrupted")


# --- bad input


@pytest.mark.parametrize("make", [finetune, lora, align])
def test_folders_and_files(call, shelf, make, tmp_path):
    refused(call, make(shelf, model="none"), "none")
    refused(call, make(shelf, model="verses.txt"), "verses.txt")
    refused(call, make(shelf, data="none.jsonl"), "none.jsonl")
    refused(call, make(shelf, data="base"), "base")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes("Café".encode("latin-1") * 99)
    refused(call, make(shelf, data=latin), "latin.jsonl")
    refused(call, make(shelf, out="latin.jsonl"), "is there already")
    refused(call, make(shelf, out="latin.jsonl/x"), "latin.jsonl is no folder")
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    refused(call, make(shelf, out="full"), "full", "is there already")
    refused(call, make(shelf, "--sped", 3), "--sped")
    assert tree(full) == {"note.txt": b"mine"}


def test_resume_needs_a_run(call, shelf, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for out in ("full", "new"):
        refused(
            call,
            finetune(shelf, "--resume", out=out),
            f"{out} holds no checkpoint",
        )
    assert os.listdir("full") == ["note.txt"]


@pytest.mark.parametrize(
    ("row", "needles"),
    [
        ("{", ["line 2", "JSON"]),
        (NESTED, ["line 2"]),
        ("7", ["line 2", "messages"]),
        ({"messages": []}, ["line 2", "at least one"]),
        (chat(answer=" \n"), ["line 2", "message 2", "empty"]),
        (chat(asked=""), ["line 2", "message 1", "empty"]),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            ["line 2", "'tool'", "system, user, assistant"],
        ),
        ({"messages": chat()["messages"][:1]}, ["line 2", "last message"]),
        ({"messages": [{"role": "user"}]}, ["line 2", "content"]),
        (chat("<|endoftext|>"), ["line 2:", "<|endoftext|>"]),
        (chat("\ud800"), ["line 2:"]),
    ],
)
def test_malformed_conversations(call, shelf, tmp_path, row, needles):
    data = write(tmp_path / "bad.jsonl", CHATS[0], row)
    refused(call, finetune(shelf, data=data), "bad.jsonl: ", *needles)


def test_conversations_that_fail_are_named_by_line(call, shelf, tmp_path):
    bad, long = chat(answer="<|endoftext|>"), chat("the king " * 40)
    data = write(tmp_path / "bad.jsonl", CHATS[0], "", *[bad] * 6, "\n", bad)
    refused(call, finetune(shelf, data=data), "lines 3, 4, 5, 6, 7, ...: ")
    write(data, CHATS[0], bad, "", chat("\ud800"))
    refused(call, finetune(shelf, data=data), "line 2: ", "; line 4: ")
    write(data, long, "", CHATS[0], long)
    done = call(*finetune(shelf, data=data))
    assert done.returncode == 0
    said = "note: 2 of 3 conversations have more than 64 tokens and are left "
    assert said + "out: lines 1, 4\n" in done.stderr


def test_conversations_that_fill_the_context(call, shelf, tmp_path):
    long = chat("the king " * 40)
    data = write(tmp_path / "long.jsonl", long)
    refused(call, finetune(shelf, data=data), "longer than 64 tokens")
    write(data, long, CHATS[0])
    done = call(*finetune(shelf, data=data))
    assert done.returncode == 0 and "note: 1 of 2" in done.stderr
    write(data, "")
    refused(call, finetune(shelf, data=data, out="new"), "no conversation")


@pytest.mark.parametrize(
    ("row", "needles"),
    [
        ("{", ["line 2"]),
        ("7", ["line 2", "not an object"]),
        (NESTED, ["line 2"]),
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, ["line 2", "equal"]),
        ({"prompt": "a", "chosen": "", "rejected": "x"}, ["line 2", "chosen"]),
        ({"prompt": "a", "chosen": "x", "rejected": " "}, ["rejected"]),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, ["line 2", "prompt"]),
        ({"prompt": "a", "chosen": "x"}, ["line 2", "'rejected'"]),
        (
            {
                "prompt": [{"role": "tool", "content": "x"}],
                "chosen": "x",
                "rejected": "y",
            },
            ["line 2", "'tool'", "system, user, assistant"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "x"}],
                "chosen": "x",
                "rejected": "y",
            },
            ["line 2", "no chat template"],
        ),
        (
            {"prompt": "the king " * 40, "chosen": "x", "rejected": "y"},
            ["pair 1", "holds 64"],
        ),
    ],
)
def test_malformed_pairs(call, shelf, tmp_path, row, needles):
    data = write(tmp_path / "bad.jsonl", PAIRS[0], row)
    refused(call, align(shelf, data=data), *needles)


def test_prompts_for_a_reward(call, shelf, tmp_path):
    grpo = ("--method", "grpo")
    data = write(tmp_path / "bad.jsonl", {"prompt": "a " * 61, "answer": "x"})
    refused(call, align(shelf, *grpo, data=data), "prompt 0", "from 1 to 60")
    write(data, WANTS[0], {"answer": "x"})
    refused(call, align(shelf, *grpo, data=data), "line 2", "'prompt'")
    for reward, missing in (("exact", "answer"), ("palindrome", "letters")):
        write(data, {"prompt": "the", "other": "x"})
        made = align(shelf, *grpo, "--reward", reward, data=data)
        refused(call, made, "line 1", f"'{missing}'")
    write(data, "")
    refused(call, align(shelf, *grpo, data=data), "nothing in it")


@pytest.mark.parametrize("harm", ["raises", "nan"])
def test_rewards_that_fail(call, shelf, monkeypatch, harm):
    def judge(answer, entry):
        if entry["prompt"] == "a":
            return 1 / 0 if harm == "raises" else float("nan")
        return float(len(answer))

    monkeypatch.setitem(alignment.REWARDS, "exact", (judge, ["answer"]))
    said = "ZeroDivisionError" if harm == "raises" else "returned nan"
    args = align(shelf, "--method", "grpo", data="wants.jsonl", out="run.2")
    refused(
        call,
        args,
        said,
        "run.2.batch.jsonl",
        begun=True,
        kept=["run.2.batch.jsonl"],
    )
    kept = [json.loads(x) for x in open("run.2.batch.jsonl")]
    assert len(kept) == 4  # two prompts, two answers each
    assert sum(row["reward"] is None for row in kept) == 2
    assert {row["entry"]["prompt"] for row in kept} == {"the", "a"}
    done = call(*args, "--on-bad-reward", "skip")
    assert done.returncode == 0 and said in done.stderr
    assert "the batch is in run.2.batch.jsonl, step 2" in done.stderr
    kept = [json.loads(x) for x in open("run.2.batch.jsonl")]
    assert [row["step"] for row in kept] == [1] * 8 + [2] * 4  # two runs
    opens("run.2")


def test_a_reward_that_always_fails(call, shelf, monkeypatch):
    judge = (lambda *_: 1 / 0, [])
    monkeypatch.setitem(alignment.REWARDS, "exact", judge)
    refused(
        call,
        align(
            shelf,
            *("--method", "grpo", "--on-bad-reward", "skip"),
            data="wants.jsonl",
        ),
        "failed for every answer",
        begun=True,
        kept=["out.batch.jsonl"],
    )


def test_names_that_are_nearly_right(call, shelf):
    refused(call, align(shelf, "--method", "dpoo"), "'dpoo'", "mean 'dpo'")
    refused(call, align(shelf, "--reward", "exakt"), "'exakt'", "mean 'exact'")
    said = ("'moon'", "mean 'muon'", "adamw8bit")
    refused(call, finetune(shelf, "--optimizer", "moon"), *said)
    refused(call, align(shelf, "--on-bad-reward", "go"), "'go'", "stop, skip")


@pytest.mark.parametrize(
    ("make", "given", "needle"),
    [
        (finetune, ["--epochs", 0], "epochs 0"),
        (finetune, ["--context", 0], "context 0"),
        (finetune, ["--learning-rate", "nan"], "learning_rate is nan"),
        (finetune, ["--seed", -1], "seed is -1"),
        (lora, ["--rank", 0], "rank is 0"),
        (lora, ["--alpha", "nan"], "alpha is nan"),
        (lora, ["--alpha", 0], "alpha is 0"),
        (lora, ["--steps", 0], "n_steps is 0"),
        (lora, ["--rate", -1], "learning_rate is -1"),
        (lora, ["--batch-size", 0], "batch_size"),
        (align, ["--steps", 0], "n_steps is 0"),
        (align, ["--beta", "nan"], "beta is nan"),
        (align, ["--group-size", 1], "group_size is 1"),
        (align, ["--learning-rate", "inf"], "learning_rate is inf"),
    ],
)
def test_impossible_settings(call, shelf, make, given, needle):
    refused(call, make(shelf, *given), needle)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (finetune, "--learning-rate"),
        (lora, "--rate"),
        (align, "--learning-rate"),
    ],
)
def test_runs_that_diverge(call, shelf, make, word):
    refused(call, make(shelf, word, 1e30), "nothing was updated", begun=True)


def test_too_little_to_learn(call, shelf, tmp_path):
    for text in ("", "a king"):
        (tmp_path / "few.txt").write_text(text)
        refused(call, lora(shelf, data=tmp_path / "few.txt"), "too few")


@pytest.mark.parametrize("make", [finetune, align])
def test_whole_steps_cannot_be_trained(call, shelf, make):
    refused(call, make(shelf, model="small"), "quantized", "lora")


def test_adapters_for_another_base(call, shelf):
    assert call(*lora(shelf, out="part")).returncode == 0

    def merge(base, adapter="part", out="out"):
        return ["merge", shelf / base, adapter, "--out", out]

    refused(call, merge("slim"), "shape", "another base")
    refused(call, merge("twin"), "fingerprint", "--any-base")
    refused(call, merge("base", "none"), "none", "adapter_config.json")
    refused(call, merge("base", shelf / "base"), "adapter_config.json")
    refused(call, merge("base", out="part"), "is there already")
    shutil.copytree("part", "bad")
    with open("bad/adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    refused(call, merge("base", "bad"), "bad/adapter_model.safetensors")
    done = call(*merge("twin"), "--any-base")
    assert done.returncode == 0, done.stderr
    opens("out")


def test_talks_that_cannot_be(call, shelf):
    refused(call, ["chat", shelf / "base"], "no chat template", "finetune")
    refused(call, ["chat", "none"], "none")
    assert call(*finetune(shelf)).returncode == 0
    refused(call, ["chat", "out", "--temperature", -1], "temperature is -1")
    refused(call, ["chat", "out", "--top-p", 2], "top_p")
    refused(call, ["chat", "out", "--max-new-tokens", 0], "max_new_tokens")


def test_labels_that_were_never_taught(words, shelf):
    # no command judges; the function has to say it
    judge = Classifier(load_model(shelf / "base"), ["fresh", "rotten"])
    assert judge.numbers(["rotten", "fresh"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="'ripe'.*fresh, rotten"):
        judge.numbers(["fresh", "ripe"])


def test_simpo_has_a_beta_of_its_own(call, shelf):
    done = call(*align(shelf, "--method", "simpo", data=shelf / "pairs.jsonl"))
    assert done.returncode == 0, done.stderr


def test_answers_end_as_the_model_says(call, shelf, tmp_path, monkeypatch):
    lm = load_model(shelf / "base")
    lm.special_ids = {"eos_token_id": [7, 0]}  # a chat's end, a text's end
    save_model(lm, tmp_path / "talker")
    save_tokenizer(
        Tokenizer.train([TEXT], lm.config.vocab_size), tmp_path / "talker"
    )
    seen = []

    def note(data, tokenizer, end):
        seen.append(end)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "read_pairs", note)
    for model in ("talker", shelf / "base"):
        call(*("align", model, "--data", shelf / "pairs.jsonl"), "--out", "x")
    words = Tokenizer.load(shelf / "base" / "tokenizer.json")
    assert seen == [7, words.special_tokens[END_OF_TEXT]]
    monkeypatch.setattr(cli, "end_ids", lambda lm, tokenizer: [])
    args = ("align", "talker", "--data", shelf / "pairs.jsonl", "--out", "x")
    ends(call(*args), 2, "talker names no token that ends an answer")


def test_quantize_with_and_without_a_text(call, shelf):
    calls = {
        "own": [],
        "near": ["--nearest"],
        "text": ["--calibrate", shelf / "verses.txt"],
    }
    for name, more in calls.items():
        done = call("quantize", shelf / "base", "--out", name, *more)
        assert done.returncode == 0, done.stderr
    weights = [load_file(f"{name}/quantized.safetensors") for name in calls]
    steps = [t["blocks.0.attention.qkv.steps"] for t in weights]
    assert len({tuple(s.flatten().tolist()) for s in steps}) == 3
    done = call(
        *("quantize", shelf / "base", "--out", "both", "--nearest"),
        *("--calibrate", shelf / "verses.txt"),
    )
    assert done.returncode == 2 and "--nearest" in done.stderr


def test_evaluate_against_what_is_no_answers(call, shelf, tmp_path):
    for text in ("[1]", "{}", '{"piqa": {"a": 3}}', "no json"):
        (tmp_path / "old.json").write_text(text)
        done = call("evaluate", shelf / "base", "--against", "old.json")
        assert done.returncode != 0 and done.stderr.count("\n") == 1
        assert "old.json is not what evaluate --out writes" in done.stderr
