"""A run that is killed at any moment goes on as if it had not been.

The lives are forks of one process that has torch in memory, so that each takes
some hundredths of a second. Each ends by SIGKILL, which no process can catch:
half of them after a random time, half at a random place inside the writing,
renaming or removing of a checkpoint, with a file half written or half gone.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_from_scratch import training
from llm_from_scratch.data import Windows
from llm_from_scratch.model import PRESETS, ModelConfig, TransformerLM
from llm_from_scratch.training import (
    RECIPES,
    AdamW,
    TrainConfig,
    best_checkpoint,
    compiled,
    fast_settings,
    parameter_groups,
    train_step,
)

LIVES = """
import os, random, shutil, signal, sys, time
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
from llm_from_scratch import training
from llm_from_scratch.data import Windows
from llm_from_scratch.model import ModelConfig, TransformerLM
from llm_from_scratch.training import TrainConfig, train

tokens = (np.arange(4000) * 7919 % 61).astype(np.uint16)
shape = ModelConfig(vocab_size=64, context_length=16, d_model=16, n_layers=1,
                    n_heads=2, d_ff=32, dropout=0.1)
plan = TrainConfig(n_steps=80, batch_size=2, warmup_steps=5, precision="fp32",
                   eval_interval=6, eval_batches=1, checkpoint_interval=3,
                   optimizer="muon", schedule="wsd")


def run(folder):
    torch.manual_seed(0)
    windows = Windows(tokens, 16, 2)
    train(TransformerLM(shape), windows, windows, plan, folder,
          progress=False)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_inside_a_save(chance):
    "Every step of a save may be the last thing that this process does."
    written, removed = training.write_file, shutil.rmtree

    def deadly(function):
        def call(*args, **kwargs):
            if chance.random() < 0.04:
                die()
            result = function(*args, **kwargs)
            if chance.random() < 0.04:
                die()
            return result
        return call

    def write_half(path, content):
        if isinstance(content, bytes) and chance.random() < 0.1:
            Path(path).write_bytes(content[:len(content) // 2])
            die()
        return written(path, content)

    def remove_half(path, **rest):
        if Path(path).is_dir() and chance.random() < 0.1:
            for file in sorted(Path(path).iterdir())[:2]:
                file.unlink()
            die()
        removed(path, **rest)

    training.write_file = deadly(write_half)
    training.save_model = deadly(training.save_model)
    shutil.rmtree = remove_half
    os.replace = deadly(os.replace)


def life(folder, number, inside=None):
    "Train in a fork until it is killed; False if it came to the end."
    chance = random.Random(number)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if inside:
                die_inside_a_save(chance)
            run(folder)
            code = 0
        except BaseException as error:
            print(folder, number, repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if inside is False:
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    return os.WIFSIGNALED(status)


training.save_model(TransformerLM(shape), "warm")   # torch imports lazily
torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).step()
life("whole", 0)
kills, number, runs = {True: 0, False: 0}, 0, 0
while min(kills.values()) < 25:
    inside = kills[True] < kills[False]
    number += 1
    if life(f"run-{runs}", number, inside):
        kills[inside] += 1
    else:
        runs += 1   # it outran us; the next life begins another run
life(f"run-{runs}", 0)
print(sum(kills.values()))
"""


def records(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(x).items() if k != "tokens_per_second"}
        for x in lines
    ]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork")
def test_fifty_kills_leave_no_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIVES],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 50
    assert "damaged" not in done.stderr, "a broken checkpoint was seen"
    whole = tmp_path / "whole"
    wanted = records(whole)
    assert [r["step"] for r in wanted] == list(range(1, 81))
    runs = sorted(tmp_path.glob("run-*"))
    assert runs
    for run in runs:
        assert records(run) == wanted
        best = best_checkpoint(run)
        assert best and best.name == best_checkpoint(whole).name
        for file in ("model.safetensors", "training.safetensors"):
            last = f"checkpoints/step-0000080/{file}"
            assert (run / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler"
)
def test_compiled_steps_learn_the_same():
    shape = ModelConfig(
        vocab_size=32, context_length=16, d_model=16, n_layers=1, n_heads=2
    )
    batches = Windows(np.arange(999) % 32, 16, 4)
    losses = {}
    for choice in ("no", "yes"):
        torch.manual_seed(0)
        model = TransformerLM(shape).train()
        config = TrainConfig(n_steps=3, precision="fp32", compile=choice)
        optimizer = AdamW(parameter_groups(model, 0.1))
        with fast_settings(model, config) as (forward, why):
            assert ("not compiled" in why) == (choice == "no")
            losses[choice] = [
                train_step(
                    model, optimizer, batches, i, config, forward=forward
                )["loss"]
                for i in range(3)
            ]
    assert losses["no"] == pytest.approx(losses["yes"], abs=1e-4)
    assert not any(block.attention.holds for block in model.blocks)


def test_a_compiler_that_fails_is_given_up_once(capsys):
    asked = []

    def broken(graph, inputs):
        asked.append("once")
        raise RuntimeError("no compiler")

    model, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    forward = compiled(model, backend=broken)
    for _ in range(2):
        assert torch.equal(forward(x), model(x))
    assert asked == ["once"]
    assert capsys.readouterr().err.count("not compiled after all") == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "preset, n_steps, is_long",
    [("nano", 200, False), ("nano", 2000, True), ("laptop", 100, False)]
    + [("laptop", RECIPES["laptop"].n_steps, True)],
)
def test_auto_compiles_what_is_long(monkeypatch, preset, n_steps, is_long):
    monkeypatch.setattr(training, "_can_compile", lambda device: True)
    monkeypatch.setattr(training, "compiled", lambda model: None)
    model = TransformerLM(PRESETS[preset])
    plan = dataclasses.replace(RECIPES[preset], n_steps=n_steps)
    with fast_settings(model, plan) as (forward, _):
        assert (forward is None) == is_long
