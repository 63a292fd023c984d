"""Speedrun: the small setting of nanoGPT for a CPU, learnt in less time.

Shakespeare by characters, 4 layers, 4 heads, width 128, context 64. Baseline:
GPT-2 of transformers, AdamW and a cosine, 2,000 batches of 12 windows, the
best of several learning rates, in its fastest form (compiled, bf16, attention
that holds its weights). Ours: no more parameters, the same context and text,
changes alone and together. The time of a run is its steps times the median
second of such a step, all kinds of step in turns: compiling and measuring are
left out for all alike. What stands in --out is not made again.
Usage: python benchmarks/speedrun.py [--out FILE]
       python benchmarks/speedrun.py --out LINES --run KEY=VALUE ...
"""

import argparse
import dataclasses
import json
import math
from collections import deque
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance
from torch.nn import functional as F
from tqdm import trange
from training import make_gpt2

from llm_from_scratch.block import FeedForward
from llm_from_scratch.data import Windows, load_documents, split_documents
from llm_from_scratch.model import ModelConfig, TransformerLM
from llm_from_scratch.tokenizer import write_file
from llm_from_scratch.training import (
    TrainConfig,
    fast_settings,
    learning_rate,
    make_optimizer,
    train_step,
)

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
# One change each: fields of ModelConfig, of TrainConfig, or of both.
CHANGES = {
    "rotary positions": {"position": "rotary"},
    "RMSNorm, no biases": {"norm": "rmsnorm", "bias": False},
    "squared ReLU": {"squared": True},
    "norms on queries and keys": {"qk_norm": True},
    "two tables, own start": {"tie_embeddings": False},
    "branches start at zero": {"zero": True},
    "Muon": {"optimizer": "muon"},
    "flat, then a fall": {"schedule": "wsd"},
    "larger batches": {"batch_size": 2 * BATCH},
}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "bias": True,
}
RATES, OUR_RATE = (2e-3, 4e-3, 8e-3), 1e-2
LENGTHS = {"a third": 305, "half": 460, "all": 920}  # steps of ours
SEEDS = (0, 1, 2)


def read_characters():
    "Ids of the characters of the training plays and of the others."
    parts = split_documents(load_documents("shakespeare"))
    texts = ["\n\n".join(d.text for d in part) for part in parts]
    places = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    ids = [np.array([places[c] for c in t], np.uint8) for t in texts]
    return *ids, len(places)


@torch.no_grad()
def validate(forward, ids, n_windows=1600):
    "Nats per character on fixed windows of the plays held out."
    line = torch.from_numpy(ids[: n_windows * CONTEXT + 1].astype(np.int64))
    inputs, targets = (x.view(-1, CONTEXT) for x in (line[:-1], line[1:]))
    total = 0.0
    for x, y in zip(inputs.split(400), targets.split(400)):
        logits = forward(x).flatten(0, 1).float()
        total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return total / targets.numel()


def make_shape(vocab_size, **changes):
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=CONTEXT,
        d_model=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        **changes,
    )


def make_peer(vocab_size, windows, rate, n_steps, seed):
    torch.manual_seed(seed)
    model = make_gpt2(make_shape(vocab_size), "eager")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.99), fused=True)
    compiled = torch.compile(model)

    def step(number):
        inputs, targets = windows.batch(number)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, n_steps, rate, 100)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def warm_up():
        inputs, _ = windows.batch(0)
        with torch.autocast("cpu", torch.bfloat16):
            compiled(inputs).logits.sum().backward()
        optimizer.zero_grad(set_to_none=True)

    return model, step, warm_up, lambda ids: model(ids).logits


class SquaredReLU(FeedForward):
    "max(a, 0) ** 2 between the two layers (So et al. 2021)."

    def forward(self, x):
        return self.down(self.up(x).relu().square())


def make_ours(vocab_size, windows, config, shape, extras, stack):
    torch.manual_seed(config.seed)
    squared, zero = (extras.get(name) for name in ("squared", "zero"))
    model = TransformerLM(make_shape(vocab_size, **shape)).train()
    if squared:
        for block in model.blocks:
            block.feed_forward.__class__ = SquaredReLU
    if zero:
        for block in model.blocks:
            torch.nn.init.zeros_(block.attention.out.weight)
            torch.nn.init.zeros_(block.feed_forward.down.weight)
    optimizer = make_optimizer(model, config)
    forward, _ = stack.enter_context(fast_settings(model, config))

    def step(number):
        train_step(model, optimizer, windows, number, config, forward=forward)

    def warm_up():
        inputs, _ = windows.batch(0)
        with torch.autocast("cpu", torch.bfloat16):
            forward(inputs).sum().backward()
        optimizer.zero_grad(set_to_none=True)

    return model, step, warm_up, model


def make(stack, what, fields, data, seed):
    "Model, step, warm-up, forward pass, and how many steps are planned."
    train_ids, _, vocab_size = data
    fields = dict(fields)
    n_steps = fields.pop("n_steps", STEPS)
    size = fields.pop("batch_size", BATCH)
    rate = fields.pop("learning_rate")
    windows = Windows(train_ids, CONTEXT, size, seed=100 + seed)
    if what == "peer":
        made = make_peer(vocab_size, windows, rate, n_steps, seed)
        return *made, n_steps
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    plan = {k: fields.pop(k) for k in list(fields) if k in names}
    extras = {k: fields.pop(k, False) for k in ("squared", "zero")}
    config = TrainConfig(
        n_steps=n_steps,
        batch_size=size,
        learning_rate=rate,
        seed=seed,
        compile="yes",
        max_spike=math.inf,
        **plan,
    )
    made = make_ours(vocab_size, windows, config, fields, extras, stack)
    return *made, n_steps


def run(what, fields, data, seed, points=10):
    "One run: its size and its validation losses by steps."
    torch._dynamo.reset()
    with ExitStack() as stack:
        made = make(stack, what, fields, data, seed)
        model, step, warm_up, forward, n_steps = made
        warm_up()
        curve, every = [], max(1, n_steps // points)
        for start in trange(0, n_steps, every, disable=None):
            for number in range(start, min(start + every, n_steps)):
                step(number)
            model.eval()
            curve.append((number + 1, round(validate(forward, data[1]), 5)))
            model.train()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": curve[-1][1],
        "curve": curve,
    }


def several(step, starts, n):
    "The next n steps, to be timed."
    return partial(deque, map(step, range(start := next(starts), start + n)))


def time_steps(kinds, data, rounds=20, n=5):
    "Median seconds of a step of each kind, all in turns."
    torch._dynamo.config.recompile_limit = 100  # each kind is compiled once
    with ExitStack() as stack:
        jobs = {}
        for name, (what, fields) in kinds.items():
            _, step, warm_up, *_ = make(stack, what, fields, data, 0)
            warm_up()
            jobs[name] = partial(several, step, count(0, n), n)
        seconds = interleave(jobs, rounds)
    return {name: s / n for name, s in seconds.items()}


def kinds_of_run(best):
    "What the runs are made of, at the peer's best rate: name -> what, fields."
    whole = dict(GPT2)
    for change in CHANGES.values():
        whole |= change
    kinds = {
        "peer": ("peer", {"learning_rate": best}),
        "all": ("ours", {**whole, "learning_rate": OUR_RATE}),
    }
    for name, change in {"our loop": {}, **CHANGES}.items():
        rate = OUR_RATE if "optimizer" in change else best
        steps = STEPS // 2 * BATCH // change.get("batch_size", BATCH)
        fields = {**GPT2, **change, "learning_rate": rate, "n_steps": steps}
        kinds[f"alone: {name}"] = "ours", fields
    return kinds


def planned(best):
    "Every run of the table: name, what, fields, seed; `best`: peer's rate."
    for rate in RATES:
        yield f"peer, rate {rate}", "peer", {"learning_rate": rate}, 0
    if best is None:
        return
    kinds = kinds_of_run(best)
    for seed in SEEDS[1:]:
        yield f"peer, seed {seed}", *kinds["peer"], seed
    what, fields = kinds["all"]
    for title, n_steps in LENGTHS.items():
        for seed in SEEDS:
            longer = {**fields, "n_steps": n_steps}
            yield f"{title}, seed {seed}", what, longer, seed
    for name, (what, fields) in kinds.items():
        if name.startswith("alone"):
            yield name, what, fields, 0


def best_rate(runs):
    "The peer's, once all are tried."
    tried = {
        r["loss"]: r["fields"]["learning_rate"]
        for name, r in runs.items()
        if name.startswith("peer, rate")
    }
    return tried[min(tried)] if len(tried) == len(RATES) else None


def make_all(path):
    "What is missing of the plan, in its order; the file grows run by run."
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    found |= provenance()
    runs, data = found["runs"], read_characters()

    def keep():
        write_file(path, json.dumps(found) + "\n")

    for _ in range(2):  # the rates first, then what hangs on the best one
        for name, what, fields, seed in planned(best_rate(runs)):
            if name not in runs:
                made = run(what, fields, data, seed)
                runs[name] = {"fields": fields, "seed": seed, **made}
                keep()
                print(name, round(made["loss"], 4))
    if "step_seconds" not in found:
        kinds = kinds_of_run(best_rate(runs))
        found["step_seconds"] = time_steps(kinds, data)
        keep()
    show(found)


def show(found):
    "The table: losses, and the time of training beside the baseline's."
    seconds = found["step_seconds"]
    grid = Table(title=f"{found['threads']} threads")
    for column in ("run", "parameters", "steps", "nats a character", "time"):
        grid.add_column(column)
    for name, r in found["runs"].items():
        kind = name.split(",")[0] if "alone" not in name else name
        kind = "all" if kind in LENGTHS else kind
        steps = r["curve"][-1][0]
        grid.add_row(
            name,
            f"{r['parameters']:,}",
            str(steps),
            f"{r['loss']:.4f}",
            f"{steps * seconds[kind] / (STEPS * seconds['peer']):.2f}",
        )
    Console().print(grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("_build/speedrun.json")
    )
    parser.add_argument("--run", nargs="*", help="KEY=VALUE of one own run")
    args = parser.parse_args()
    if args.run is None:  # the whole plan
        return make_all(args.out)
    data, fields = read_characters(), {}
    for pair in args.run:
        key, value = pair.split("=")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    what, seed = fields.pop("what", "ours"), fields.pop("seed", 0)
    found = run(what, fields, data, seed)
    line = {"what": what, "seed": seed, "fields": fields, **found}
    with open(args.out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(what, fields, found["parameters"], found["loss"])


if __name__ == "__main__":
    main()
