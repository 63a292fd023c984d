"""The command line: good runs, bad input, interruption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import one_line


def tree(folder):
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["data", "--help"],
        ["data", "list", "--help"],
        ["data", "get", "--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["estimate", "--help"],
        ["export", "--help"],
        ["evaluate", "--help"],
        ["plan", "--help"],
        ["benchmark", "--help"],
    ],
)
def test_help(cli, args):
    done = cli(*args)
    assert done.returncode == 0
    assert "Usage" in done.stdout and len(done.stdout) > 100


def test_version(cli):
    assert re.match(r"\d+\.\d+\.\d+$", cli("--version").stdout.strip())


def test_train_leaves_a_model_and_generate_uses_it(cli, run):
    names = {p.name for p in run.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "run.json",
        "log.jsonl",
    } <= names
    log = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(1, 61))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    texts = [
        cli(
            "generate",
            run,
            "--prompt",
            "the king",
            "--seed",
            5,
            "--max-new-tokens",
            20,
        ).stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and texts[0].startswith("the king")
    greedy = [
        cli(
            "generate",
            run,
            "--prompt",
            "the",
            "--temperature",
            0,
            "--seed",
            seed,
        ).stdout
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_same_seed_same_model(cli, run, text_folder, tmp_path):
    done = cli(
        "train",
        "--preset",
        "nano",
        "--data",
        text_folder,
        "--out",
        tmp_path / "again",
        "--steps",
        60,
    )
    assert done.returncode == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        run / "model.safetensors"
    ).read_bytes()


def test_config_file(cli, text_folder, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'preset = "nano"\ndata = "{text_folder}"\n'
        "[model]\nn_layers = 1\n[train]\nn_steps = 3\n"
    )
    done = cli(
        "train", "--config", tmp_path / "run.toml", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_auto_batch_keeps_the_windows_of_a_step(cli, text_folder, tmp_path):
    args = ["train", "--preset", "nano", "--data", text_folder, "--steps", 2]
    done = cli(*args, "--auto-batch", "--memory", "12MB", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run.json").read_text())["train"]
    assert 1 < plan["accumulation_steps"] == 16 // plan["batch_size"]
    line = f"{plan['batch_size']} windows at once"
    assert done.stdout.startswith(line), done.stdout


def test_every_recipe_field_trains(cli, text_folder, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'preset = "nano"\ndata = "{text_folder}"\n[train]\nn_steps = 4\n'
        'optimizer = "muon"\nschedule = "wsd"\nrecompute = 1\n'
        'precision = "fp16"\nwarmup_steps = 1\n'
    )
    out = tmp_path / "out"
    done = cli("train", "--config", tmp_path / "run.toml", "--out", out)
    assert done.returncode == 0, done.stderr
    lines = (out / "log.jsonl").read_text().splitlines()
    assert len(lines) == 4 and "scale" in json.loads(lines[0])


def test_tensorboard_on_request(cli, text_folder, tmp_path):
    args = ["--preset", "nano", "--data", text_folder, "--steps", 2]
    out = tmp_path / "out"
    done = cli("train", *args, "--tensorboard", "--out", out)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        one_line(done, "pip install", "[tensorboard]")
        return
    assert done.returncode == 0, done.stderr
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_data_changed_since_the_checkpoint(cli, run, tmp_path):
    from llm_from_scratch.data import open_tokens, write_tokens

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "data" / "train.tokens"
    ids = open_tokens(file).copy()
    ids[7] += 1
    write_tokens(file, ids, 512)
    before = tree(copy / "checkpoints")
    done = cli("train", "--out", copy, "--resume", "--steps", 70)
    one_line(done, "the data have changed since step-0000060")
    assert tree(copy / "checkpoints") == before


def test_jsonl_and_markdown_folders(cli, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"line {n} says so. " * 40}) + "\n"
            for n in range(20)
        )
    )
    (data / "b.md").write_text("# Title\n\n" + "some words here. " * 200)
    done = cli(
        "train",
        "--preset",
        "nano",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
    )
    assert done.returncode == 0, done.stderr


def test_prompt_longer_than_the_context(cli, run):
    done = cli(
        "generate",
        run,
        "--prompt",
        "the king speaks " * 99,
        "--max-new-tokens",
        5,
    )
    assert done.returncode == 0 and "note: the prompt has" in done.stderr


BAD_TRAIN = {
    "missing folder": (["--data", "{tmp}/nothing"], ["nothing"]),
    "empty folder": (["--data", "{tmp}/empty"], ["empty"]),
    "not UTF-8": (["--data", "{tmp}/latin"], ["a.txt", "offset 3"]),
    "bad json line": (["--data", "{tmp}/jsonl"], ["a.jsonl", "2"]),
    "too short": (["--data", "{tmp}/short"], ["tokens", "64"]),
    "unknown preset": (["--preset", "lapptop"], ["'laptop'"]),
    "unknown data": (["--data", "shakespere"], ["'shakespeare'"]),
    "zero steps": (["--steps", "0"], ["n_steps", "0"]),
    "steps not a number": (["--steps", "many"], ["--steps"]),
    "missing config": (["--config", "{tmp}/no.toml"], ["no.toml"]),
    "config not TOML": (["--config", "{tmp}/bad.toml"], ["bad.toml"]),
    "config with unknown key": (
        ["--config", "{tmp}/key.toml"],
        ["n_layer", "n_layers"],
    ),
    "config with wrong type": (["--config", "{tmp}/type.toml"], ["d_model"]),
    "config that nothing can load": (
        ["--config", "{tmp}/odd.toml"],
        ["post", "pre_norm"],
    ),
    "nothing to resume": (["--resume"], ["--resume"]),
    "unknown optimizer": (
        ["--optimizer", "adam"],
        ["adamw, muon or adamw8bit"],
    ),
    "not on several processes": (
        ["--optimizer", "adamw8bit", "--sharding", "fsdp"],
        ["adamw8bit is for one process", "adamw or muon"],
    ),
    "unknown schedule": (["--config", "{tmp}/sine.toml"], ["cosine or wsd"]),
    "no memory": (["--auto-batch", "--memory", "1MB"], ["MB are free"]),
    "resume with more": (["--resume", "--seed", "1"], ["only --steps"]),
    "memory alone": (["--memory", "1GB"], ["--auto-batch"]),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_training_input(cli, tmp_path, text_folder, name):
    for folder in ("empty", "latin", "jsonl", "short"):
        (tmp_path / folder).mkdir()
    (tmp_path / "latin/a.txt").write_bytes("Café".encode("latin-1"))
    (tmp_path / "jsonl/a.jsonl").write_text('{"text": "fine"}\nnot json\n')
    for file in "ab":
        (tmp_path / f"short/{file}.txt").write_text("a few words")
    (tmp_path / "bad.toml").write_text("preset = ")
    (tmp_path / "key.toml").write_text("[model]\nn_layer = 2\n")
    (tmp_path / "type.toml").write_text('[model]\nd_model = "wide"\n')
    (tmp_path / "sine.toml").write_text('[train]\nschedule = "sine"\n')
    (tmp_path / "odd.toml").write_text("[model]\npre_norm = false\n")
    args, needles = BAD_TRAIN[name]
    args = [a.format(tmp=tmp_path) for a in args]
    for option, value in (("--preset", "nano"), ("--data", text_folder)):
        if option not in args and "--resume" not in args:
            args += [option, value]
    before = tree(tmp_path)
    done = cli("train", "--out", tmp_path / "out", *args)
    if name == "config that nothing can load":
        needles = ["pre_norm"]
    one_line(done, *needles)
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_output_folder_that_holds_a_run(cli, run, text_folder):
    before = tree(run)
    done = cli(
        "train", "--preset", "nano", "--data", text_folder, "--out", run
    )
    one_line(done, "--resume", run)
    assert tree(run) == before


def test_output_folder_that_holds_other_files(cli, text_folder, tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    done = cli(
        "train", "--preset", "nano", "--data", text_folder, "--out", tmp_path
    )
    one_line(done, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    "args, needle",
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "0"], "top_k"),
        (["--top-k", "100000"], "top_k"),
        (["--max-new-tokens", "0"], "max_new"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
    ],
)
def test_impossible_sampling(cli, run, args, needle):
    one_line(cli("generate", run, *args), needle)


def test_not_a_model(cli, tmp_path):
    one_line(cli("generate", tmp_path / "none"), "none")
    one_line(cli("generate", tmp_path), tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["cut weights", "no weights", "bad config", "bad tokenizer", "pickle"],
)
def test_damaged_model(cli, run, tmp_path, damage):
    copy = tmp_path / "model"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    weights = copy / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "pickle":
        import pickle

        weights.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "bad config":
        (copy / "config.json").write_text("{")
    else:
        (copy / "tokenizer.json").write_text("[]")
    one_line(cli("generate", copy), copy)


def test_ctrl_c_saves_and_resume_goes_on(cli, text_folder, tmp_path):
    args = ["train", "--preset", "nano", "--data", text_folder, "--out"]
    whole = tmp_path / "whole"
    assert cli(*args, whole, "--steps", 300).returncode == 0
    out, err = tmp_path / "run", tmp_path / "err"
    command = [sys.executable, "-m", "llm_from_scratch.cli", *args, out]
    with open(err, "w") as stream:
        process = subprocess.Popen(
            [*command, "--steps", "300"], stderr=stream, text=True
        )
        while process.poll() is None and "loss" not in err.read_text():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert process.returncode == 130, err.read_text()
    assert f"train --out {out} --resume" in err.read_text().splitlines()[-1]
    assert cli("generate", out, "--max-new-tokens", 3).returncode == 0
    done = cli("train", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes(), "resume is not exact"


def test_full_disk(run, text_folder, tmp_path):
    "A file system of 3 MB, in a mount namespace of its own."
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=3m none {disk} && "
        f"{sys.executable} -m llm_from_scratch.cli train --preset nano "
        f"--data {text_folder} --out {disk}/run --steps 900 2>{tmp_path}/err; "
        f"echo code $?; ls -A {disk}/run {disk}/run/checkpoints; "
        f"{sys.executable} -m llm_from_scratch.cli generate {disk}/run "
        "--max-new-tokens 3 && echo usable"
    )
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            text=True,
            capture_output=True,
            timeout=240,
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this machine allows no mount namespaces")
    assert "code 2" in done.stdout, done.stdout + done.stderr
    last = (tmp_path / "err").read_text().strip().splitlines()[-1]
    assert "No space left" in last and last.startswith("error: ")
    assert ".step-" not in done.stdout, "a half-written checkpoint is left"
    assert "usable" in done.stdout, "the checkpoint before is lost"


def test_estimate_says_what_fits(cli):
    from llm_from_scratch.model import PRESETS, training_bytes

    done = cli("estimate", "--preset", "gpt2-124m")
    assert done.returncode == 0 and "124,439,808" in done.stdout
    assert "training" not in done.stdout
    done = cli("estimate", "--preset", "gpt2-124m", "--memory", "16GB")
    found = re.search(r"batches of up to (\d+) texts", done.stdout)
    n, shape = int(found[1]), PRESETS["gpt2-124m"]
    assert training_bytes(shape, n)["total"] <= 16e9
    assert training_bytes(shape, n + 1)["total"] > 16e9
    done = cli("estimate", "--preset", "gpt2-1558m", "--memory", "16 GB")
    assert "The largest preset that does is gpt2-774m" in done.stdout
    done = cli("estimate", "--preset", "smollm2-135m", "--memory", "16GB")
    assert "set a smaller context_length" in done.stdout
    done = cli("estimate", "--preset", "qwen3-8b", "--memory", "2GiB")
    assert "the weights take 32.8 GB" in done.stdout


@pytest.mark.parametrize("memory", ["much", "16", "-3GB", "0GB", ""])
def test_estimate_of_impossible_memory(cli, memory):
    one_line(
        cli("estimate", "--preset", "nano", f"--memory={memory}"),
        "--memory",
        repr(memory),
    )


def test_estimate_of_an_unknown_preset(cli):
    one_line(cli("estimate", "--preset", "gpt2-124"), "'gpt2-124m'")


def test_start_imports_no_more_than_it_needs():
    code = (
        "import sys, llm_from_scratch.cli; "
        "print([m for m in ('torch.distributed.fsdp', 'matplotlib', "
        "'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_estimate_of_a_cluster(inside):
    args = ["estimate", "--preset", "llama-3.1-8b"]
    done = inside(*args, "--gpus", 8)
    assert done.returncode == 0 and "fsdp" in done.stdout, done.stderr
    dear = inside(*args, "--gpus", 8, "--price", 6)
    dollars = [
        int(re.search(r"dollars\s+([\d,]+)", d.stdout)[1].replace(",", ""))
        for d in (done, dear)
    ]
    assert abs(dollars[1] - 2 * dollars[0]) <= 1


@pytest.mark.parametrize(
    "args, needle",
    [
        (["--gpus", 1], "with 4 GPUs it fits"),
        (["--gpus", 0], "n_gpus"),
        (["--price", 2], "add --gpus"),
        (["--tokens", "1e9"], "add --gpus"),
        (["--gpus", 8, "--gpu-memory", "much"], "--gpu-memory"),
        (["--gpus", 8, "--tokens=-1"], "tokens"),
        (["--gpus", 8, "--efficiency", 2], "efficiency"),
    ],
)
def test_impossible_clusters(inside, args, needle):
    one_line(inside("estimate", "--preset", "llama-3.1-8b", *args), needle)


def test_plan(inside):
    done = inside("plan", "--flops", "1e15", "--law", "hoffmann")
    assert done.returncode == 0 and "hoffmann" in done.stdout
    done = inside("plan", "--budget", "10h", "--machine", "laptop")
    assert re.search(r"time\s+10\.0 hours", done.stdout), done.stdout


@pytest.mark.parametrize(
    "args, needle",
    [
        ([], "--budget"),
        (["--budget", "10h"], "--machine"),
        (["--budget", "soon", "--machine", "a100"], "'soon'"),
        (["--budget", "1h", "--machine", "labtop"], "'laptop'"),
        (["--flops", "-1"], "flops"),
        (["--flops", "1e18", "--law", "murphy"], "murphy"),
    ],
)
def test_impossible_plans(inside, args, needle):
    one_line(inside("plan", *args), needle)


def test_benchmark(cli, tmp_path):
    out = tmp_path / "speed.json"
    done = cli("benchmark", "--preset", "nano", "--quick", "--json", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["bandwidth"] > 0 and "training step" in done.stdout


def test_impossible_benchmarks(inside):
    one_line(inside("benchmark", "--device", "tpu"), "'tpu'")
    one_line(inside("benchmark", "--preset", "laptopp"), "'laptop'")
    one_line(inside("benchmark", "--batch-size", 0), "--batch-size")
    one_line(inside("benchmark", "--figure", "roof.xyz"), ".svg")


def test_of_several_processes_one_complains(cli):
    for rank, lines in (("0", 1), ("1", 0)):
        done = cli("train", "--stepps", 3, RANK=rank)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == lines


def test_export_and_read_again(cli, run, tmp_path):
    args = ["--prompt", "the king", "--temperature", 0]
    wanted = cli("generate", run, *args).stdout
    assert wanted.startswith("the king")
    for name in ("folder", "model.gguf"):
        out = tmp_path / name
        done = cli("export", run, "--out", out, "--kind", "F32")
        assert done.returncode == 0, done.stderr
        assert cli("generate", out, *args).stdout == wanted
    before = tree(tmp_path)
    one_line(cli("export", run, "--out", out), "is there already")
    one_line(cli("export", "none", "--out", tmp_path / "new"), "'none'")
    bad = cli("export", run, "--out", tmp_path / "q.gguf", "--kind", "Q9_9")
    one_line(bad, "Q9_9")
    assert tree(tmp_path) == before


def test_chat_needs_a_template(cli, run):
    one_line(cli("generate", run, "--chat"), "no chat template")


def test_evaluate_a_text(cli, run, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "answers.json"
    text.write_text("the king speaks one. " * 50)
    args = ["--tasks", "piqa", "--limit", 5, "--text", text, "--out", out]
    done = cli("evaluate", run, *args)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    assert len(json.loads(out.read_text())["piqa"]) == 5
    one_line(cli("evaluate", run, *args), "is there already")


def test_impossible_examinations(inside, run, tmp_path):
    one_line(inside("evaluate", run, "--tasks", "piga"), "'piqa'")
    one_line(inside("evaluate", run, "--limit", 0), "--limit")
    one_line(inside("evaluate", "no-model", "--limit", 1), "no-model")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    one_line(
        inside("evaluate", run, "--text", tmp_path / "latin.txt"), "latin"
    )


def torchrun(*args):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", "2", "-m", "llm_from_scratch.cli", "train"]
        + [*map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_train_on_two_processes(cli, text_folder, tmp_path):
    out = tmp_path / "pair"
    args = ["--preset", "nano", "--data", text_folder, "--out", out]
    done = torchrun(*args, "--steps", 4)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    done = torchrun(*args, "--steps", 6)  # other words, same folder
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode and len(errors) == 1, done.stderr
    assert "holds a run with n_steps 4, not 6" in errors[0]
    done = cli("train", "--out", out, "--resume", "--steps", 6)  # alone
    assert done.returncode == 0, done.stderr
    assert len((out / "log.jsonl").read_text().splitlines()) == 6
    assert cli("generate", out, "--max-new-tokens", 3).returncode == 0
