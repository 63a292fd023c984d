"""Many processes: the same losses, restarts, hangs, and one clear line.

Processes are started by torchrun's own launcher, called from one helper
program that has torch in memory and forks, so that each start takes tenths of
a second. (Four processes, the hang and the command torchrun itself are run by
the chapter.)
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_from_scratch.data import Windows
from llm_from_scratch.distributed import (
    Cluster,
    cluster_bytes,
    estimate_cluster,
    join,
    save_shards,
    train_distributed,
)
from llm_from_scratch.model import (
    PRESETS,
    ModelConfig,
    TransformerLM,
    count_parameters,
    preset,
)
from llm_from_scratch.quantization import AdamW8bit
from llm_from_scratch.training import TrainConfig

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the helper forks"
)

HELPER = """
import json, os, shutil, signal, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from llm_from_scratch.data import Windows
from llm_from_scratch.distributed import *
from llm_from_scratch.model import ModelConfig, TransformerLM
from llm_from_scratch.training import Interrupted, TrainConfig

torch.set_num_threads(1)
tokens = (np.arange(4000) * 7919 % 61).astype(np.uint16)
# widths that do not divide by four: parts of unequal size
shape = ModelConfig(vocab_size=63, context_length=16, d_model=20, n_layers=2,
                    n_heads=2, d_ff=30, tie_embeddings=False)


class Odd(Windows):
    "Windows that do something at a step, in the first life only."
    what, when = "", -1

    def batch(self, step):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if step == self.when and first:
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "hang":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(1000)
            if self.what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        inputs, targets = super().batch(step)
        if self.what == "spike" and self.when <= step < self.end:
            targets = (targets + 30) % 61
        return inputs, targets


def work(sharding, folder, what, fields):
    def say(error, code):
        print("error:", error, file=sys.stderr, flush=True)
        os._exit(code)

    try:
        with join(fields.pop("timeout", 20)) as team:
            torch.manual_seed(0)
            model = TransformerLM(shape)
            plan = TrainConfig(**dict(
                n_steps=8, batch_size=8, accumulation_steps=2, warmup_steps=2,
                precision="fp32", eval_interval=4, eval_batches=2,
                checkpoint_interval=2, keep_checkpoints=9) | fields)
            windows = Windows(tokens, 16, 8)
            if team.rank == 1 and what in ("kill", "hang", "stop"):
                windows = Odd(tokens, 16, 8)
                windows.what, windows.when = what, 4 * plan.accumulation_steps
                windows.when = windows.when * team.size + 1
            if what == "spike":   # in all shares of the batches of step 24
                windows = Odd(tokens, 16, 8)
                windows.what, windows.when = what, 24 * 2 * team.size
                windows.end = windows.when + 2 * team.size
            if team.rank == 1 and what == "other data":
                windows = Windows(tokens[1:], 16, 8)
            if team.rank == 1 and what == "other weights":
                torch.nn.init.ones_(model.embedding.weight)
            if team.rank == 1 and what == "dies early":
                os._exit(7)
            with together(team):
                if team.rank == 1 and what == "fails early":
                    raise RuntimeError("no such disk")
            if what == "overflow":
                return overflow(team)
            sample, said = None, []
            if what == "sample":   # what is written must not be an answer
                sys.stdout = open(os.devnull, "w")

                def sample(lm):
                    said.append([*lm.embedding.weight.shape])
                    return "x"
            log = train_distributed(team, model, windows,
                                    Windows(tokens, 16, 8), plan, folder,
                                    sharding, False, sample)
            if what == "sample":
                return said
            whole = whole_model(model)
            total = None if whole is None else sum(
                p.double().abs().sum().item() for p in whole.parameters())
            return [[r["loss"] for r in log], log[-1]["valid_loss"], total]
    except Interrupted as error:
        say(error, 3)
    except ValueError as error:
        say(error, 2)


def overflow(team):
    "A part of rank 1 is infinite; then none is."
    from torch.distributed.tensor import Shard, distribute_tensor
    from llm_from_scratch.distributed import _TeamScaler

    mesh = dist.device_mesh.init_device_mesh("cpu", (team.size,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh,
                                             [Shard(0)]))
    scaler, found = _TeamScaler(8.0, 0, 2), []
    for bad in (True, False, False):
        p.grad = distribute_tensor(torch.full((3, 2), 8.0), mesh, [Shard(0)])
        if bad and team.rank == 1:
            p.grad.to_local().fill_(float("inf"))
        found += [scaler.unscale([p]), scaler.scale]
    return [*found, p.grad.to_local().mean().item()]


def launch(n, restarts, *args):
    config = LaunchConfig(
        1, 1, n, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="test", max_restarts=restarts, shutdown_timeout=3,
        start_method="fork")
    return elastic_launch(config, work)(*args)


for line in sys.stdin:
    n, restarts, *args = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            found = launch(n, restarts, *args)
            answer = [found[rank] for rank in range(n)]
        except BaseException as error:
            answer = type(error).__name__
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("error: end", file=sys.stderr, flush=True)
"""


class Helper:
    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),
            text=True,
        )

    def __call__(
        self, n, sharding="fsdp", folder=None, what="", restarts=0, **fields
    ):
        before = os.path.getsize(self.log)
        folder = folder and str(folder)
        request = [n, restarts, sharding, folder, what, fields]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        with open(self.log) as file:
            file.seek(before)
            lines = [x for x in file if x.startswith("error: ")]
        return answer, [x[7:].strip() for x in lines if "error: end" not in x]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    helper = Helper(tmp_path_factory.mktemp("helper") / "log")
    yield helper
    helper.process.stdin.close()
    helper.process.wait(10)


@pytest.fixture(scope="module")
def alone(start):
    return start(1, "ddp")[0][0]


def close(one, other):
    return all(
        abs(a - b) < 1e-5
        for a, b in zip([*one[0], one[1]], [*other[0], other[1]], strict=True)
    )


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(start, alone, sharding):
    found, _ = start(2, sharding)
    assert all(close(rank, alone) for rank in found)
    assert abs(found[0][2] - alone[2]) < 1e-3


def test_bf16_and_recomputing_are_close_to_float32(start, alone):
    found, _ = start(2, "fsdp", precision="bf16", recompute=1)
    assert abs(found[0][0][-1] - alone[0][-1]) < 0.02
    assert found[0][0] != alone[0]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_muon_on_two_processes_is_muon(start, sharding):
    fields = {"optimizer": "muon", "learning_rate": 1e-3}
    whole = start(1, "ddp", **fields)[0][0]
    parts = start(2, sharding, **fields)[0][0]
    away = [abs(a - b) for a, b in zip(whole[0], parts[0], strict=True)]
    assert max(away) < 1e-4 and abs(whole[2] - parts[2]) < 1e-2


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_fp16_is_close_to_float32(start, alone, tmp_path, sharding):
    found, _ = start(2, sharding, tmp_path, precision="fp16")
    assert found[0][0] == found[1][0] != alone[0]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    scales = [json.loads(line)["scale"] for line in lines]
    assert scales[0] == 2**16 and len(scales) == 8
    assert abs(found[0][0][-1] - alone[0][-1]) < 0.05


def test_an_overflow_in_one_part_is_seen_by_all(start):
    found, _ = start(2, what="overflow")
    wanted = [False, 4.0, True, 4.0, True, 8.0, 2.0]
    assert found == [wanted, wanted]


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory):
    "A finished run of two processes, with a checkpoint at every second step."
    folder = tmp_path_factory.mktemp("saved") / "run"
    start(2, "fsdp", folder)
    return folder


@pytest.mark.parametrize("n, sharding", [(1, "fsdp"), (4, "ddp")])
def test_a_checkpoint_of_two_opens_on_any_number(
    start, alone, saved, tmp_path, n, sharding
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    # step 4 was saved right after a validation
    for late in sorted((folder / "shards").iterdir())[2:]:
        shutil.rmtree(late)
    found, errors = start(n, sharding, folder)
    assert close(found[0], alone) and not errors
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == list(range(1, 9))


def test_checkpoints_hold_no_pickle(saved):
    kinds = {p.suffix for p in saved.glob("shards/*/*")}
    assert kinds == {".safetensors", ".json"}


def test_a_damaged_checkpoint_is_passed_over(start, alone, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    last = sorted((folder / "shards").iterdir())[-1]
    file = sorted(last.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])
    found, errors = start(1, "fsdp", folder)
    assert close(found[0], alone) and not errors


def test_a_killed_worker_is_restarted_and_nothing_is_lost(
    start, alone, tmp_path
):
    found, errors = start(2, "fsdp", tmp_path, "kill", restarts=1)
    assert close(found[0], alone)
    assert errors == [] or errors[0].startswith("rank 1 is gone")


def test_after_a_refused_step_all_go_back(start, tmp_path):
    fields = dict(n_steps=30, max_spike=0.1, checkpoint_interval=5)
    found, errors = start(2, "fsdp", tmp_path / "two", "spike", **fields)
    again, _ = start(1, "ddp", tmp_path / "one", "spike", **fields)
    assert not errors and close(found[0], again[0])
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == list(range(1, 31))
    assert (tmp_path / "two" / "refused-batch-24.safetensors").is_file()
    state = tmp_path / "two" / "shards" / "step-0000030" / "training.json"
    assert json.loads(state.read_text())["skipped"] == 5
    _, errors = start(
        2, "fsdp", tmp_path / "three", "spike", recoveries=0, **fields
    )
    assert len(errors) == 1 and errors[0].startswith("step 25: loss")
    assert "Try a learning_rate below" in errors[0]


def test_rank_0_writes_samples_and_curves(start, tmp_path):
    pytest.importorskip("tensorboard")
    found, errors = start(
        2, "fsdp", tmp_path, "sample", sample_interval=4, tensorboard=True
    )
    assert found == [[[63, 20], [63, 20]], []] and not errors
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_the_best_checkpoint_stays(start, tmp_path):
    fields = dict(eval_interval=2, keep_checkpoints=1, max_spike=99.0)
    # ever larger steps: the loss only grows
    start(2, "ddp", tmp_path, learning_rate=2.0, warmup_steps=8, **fields)
    kept = {path.name for path in (tmp_path / "shards").iterdir()}
    assert kept == {"step-0000002", "step-0000008"}


def test_a_warned_machine_saves_and_all_stop(start, alone, tmp_path):
    answer, errors = start(2, "fsdp", tmp_path, "stop")
    assert answer == "ChildFailedError"
    assert errors == ["stopped after step 5 of 8"]
    assert (tmp_path / "shards" / "step-0000005").is_dir()
    found, errors = start(2, "fsdp", tmp_path)
    assert close(found[0], alone) and not errors


@pytest.mark.parametrize(
    "what, said",
    [
        (
            "other data",
            "the ranks do not have the same data: rank 0 has 4,000",
        ),
        ("other weights", "the ranks do not have the same weights"),
        ("fails early", "rank 1: no such disk"),
    ],
)
def test_unequal_ranks_end_in_one_line(start, tmp_path, what, said):
    answer, errors = start(2, "fsdp", tmp_path / "run", what)
    assert answer == "ChildFailedError"
    assert len(errors) == 1 and errors[0].startswith(said)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_first_leaves_nothing(start, tmp_path):
    answer, errors = start(2, "fsdp", tmp_path / "run", "dies early")
    assert answer == "ChildFailedError"
    assert len(errors) == 1 and errors[0].startswith("rank 1 is gone")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sharding, fields, said",
    [
        ("ddp", {"compile": "yes"}, "compile yes is for one process"),
        ("zero", {}, "sharding is 'zero'; choose ddp or fsdp"),
        ("fsdp", {"optimizer": "adamw8bit"}, "for one process; .* or muon"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, sharding, fields, said):
    windows = Windows(np.arange(500) % 60, 16, 8)
    model = TransformerLM(ModelConfig(64, 16, 8, 1, 2, d_ff=8))
    with join() as team, pytest.raises(ValueError, match=said):
        train_distributed(
            team,
            model,
            windows,
            windows,
            TrainConfig(**fields),
            tmp_path / "run",
            sharding,
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_averages_of_another_shape_are_not_saved(tmp_path):
    model = TransformerLM(ModelConfig(64, 16, 64, 1, 2, d_ff=8))
    optimizer = AdamW8bit(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with join() as team, pytest.raises(ValueError, match="no sharded") as said:
        save_shards(tmp_path, team, model, optimizer, 1, {})
    assert "AdamW8bit keeps m of embedding.weight" in str(said.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"RANK": None}, "WORLD_SIZE is set, but not what goes with it"),
        ({"RANK": "5"}, "RANK is 5; of 2 processes"),
        ({"MASTER_PORT": "taken"}, "the port is in use"),
    ],
)
def test_a_wrong_environment_is_explained(monkeypatch, changes, said):
    import socket

    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in (names | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                value = port if value == "taken" else value
                monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=said), join(5):
            pass


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("n", [1, 8, 64])
def test_a_plan_fits_or_says_why(name, n):
    cluster = Cluster(n_gpus=n)
    try:
        plan = estimate_cluster(preset(name), cluster)
    except ValueError as error:
        assert "it fits" in str(error) or "do not help" in str(error)
        return
    assert plan["memory"]["total"] <= 0.9 * cluster.gpu_memory
    passes = plan["batch per GPU"] * plan["accumulation"]
    context = min(preset(name).context_length, 8192)
    assert plan["tokens per step"] == passes * n * context
    assert plan["days"] <= plan["days without overlap"]


def test_a_plan_gathers_blocks_twice_and_the_ends_once():
    shape = preset("llama-3.1-8b")
    cluster = Cluster(n_gpus=8, latency=1e-30)
    plan = estimate_cluster(shape, cluster, batch_tokens=2**18)
    counts = count_parameters(shape)
    ends = counts["total"] - counts["attention"] - counts["feed-forward"]
    gathered = 2 * (2 * (counts["total"] - ends) + ends)
    sent = 7 / 8 * (gathered + 4 * counts["total"]) * plan["accumulation"]
    assert plan["sharding"] == "fsdp"
    assert plan["exchange seconds"] == pytest.approx(sent / cluster.link)


def test_more_gpus_never_need_more_memory_each():
    shape = preset("llama-3.1-8b")
    totals = [
        cluster_bytes(shape, n, "fsdp", 1, 4096, True)["total"]
        for n in (2, 4, 8, 64)
    ]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_gpus": 0},
        {"n_gpus": 2.5},
        {"gpu_memory": 0},
        {"gpu_memory": float("inf")},
        {"efficiency": 1.5},
        {"peak_flops": -1},
        {"latency": float("nan")},
    ],
)
def test_absurd_clusters_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Cluster(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"tokens": 0}, {"context": 10**6}, {"batch_tokens": 0}],
)
def test_absurd_plans_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        estimate_cluster(preset("gpt2-124m"), Cluster(), **fields)
