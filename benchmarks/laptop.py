"""The preset `laptop` in ten minutes: recipes, each with as many steps as fit.

Steps of all recipes are timed in turns, with random tokens; ten minutes, less
the time of compiling, over the median second of a step is the number of steps.
Then the command line trains each recipe, and other ones for a fifth of that.
What stands in the folder --work is not made again. 35 minutes on two cores.
Usage: python benchmarks/laptop.py [--work DIR] [--save FILE]
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance

from llm_from_scratch.data import Windows
from llm_from_scratch.model import PRESETS, TransformerLM
from llm_from_scratch.tokenizer import write_file
from llm_from_scratch.training import (
    TrainConfig,
    fast_settings,
    make_optimizer,
    train_step,
)

MINUTES = 10
RECIPES = {
    "before": {"learning_rate": 0.002, "compile": "no"},
    "after": {"learning_rate": 0.004, "compile": "yes"},
}
SHORT = {  # 320 times 8 windows each
    "AdamW, 0.004": {"learning_rate": 0.004},
    "AdamW, 0.004, half the batch": {
        "learning_rate": 0.004,
        "batch_size": 4,
        "n_steps": 640,
    },
    "Muon, 0.004": {"learning_rate": 0.004, "optimizer": "muon"},
    "Muon, 0.008": {"learning_rate": 0.008, "optimizer": "muon"},
}


def make_step(stack, fields):
    "A step of a recipe, and the seconds that the first two of them took."
    torch.manual_seed(0)
    model = TransformerLM(PRESETS["laptop"]).train()
    c = TrainConfig(n_steps=900, max_spike=math.inf, batch_size=8, **fields)
    optimizer = make_optimizer(model, c)
    ids = np.random.default_rng(0).integers(0, 4096, 500_000)
    windows = Windows(ids.astype(np.uint16), 256, c.batch_size, seed=1)
    forward, _ = stack.enter_context(fast_settings(model, c))
    number = count()

    def step():
        train_step(model, optimizer, windows, next(number), c, forward=forward)

    began = time.perf_counter()
    step()
    step()
    return step, time.perf_counter() - began


def time_steps():
    "Median seconds of a step of each kind, and those of its first two."
    kinds = RECIPES | {
        "Muon, compiled": {"optimizer": "muon", "compile": "yes"}
    }
    with ExitStack() as stack:
        made = {k: make_step(stack, fields) for k, fields in kinds.items()}
        seconds = interleave(
            {k: lambda step=step: step for k, (step, _) in made.items()}, 16
        )
    return {k: [seconds[k], made[k][1]] for k in kinds}


def run(folder, name, fields):
    "Train by the command line, unless it is done: the record of the run."
    place = folder / re.sub(r"\W+", "-", name)
    if not (place / "config.json").is_file():
        lines = ['preset = "laptop"', 'data = "shakespeare"', "[train]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in fields.items()]
        write_file(place.with_suffix(".toml"), "\n".join(lines) + "\n")
        subprocess.run(
            [sys.executable, "-m", "llm_from_scratch.cli", "train"]
            + ["--config", place.with_suffix(".toml"), "--out", place],
            check=True,
        )
    log = [json.loads(line) for line in open(place / "log.jsonl")]
    curve = [[r["step"], r["valid_loss"]] for r in log if "valid_loss" in r]
    fields = fields | {"n_steps": log[-1]["step"]}  # of the run that stands
    return {"fields": fields, "valid_loss": curve[-1][1], "curve": curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("laptop-runs"))
    parser.add_argument("--save", help="a file for what was found")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    times = args.work / "steps.json"
    if not times.is_file():
        write_file(times, json.dumps(time_steps()) + "\n")
    steps, found = json.loads(times.read_text()), {}
    for name, fields in RECIPES.items():
        each, first = steps[name]
        n_steps = int((60 * MINUTES - first) / each)
        found[name] = run(
            args.work, name, {"n_steps": n_steps, "batch_size": 8, **fields}
        )
    for name, fields in SHORT.items():
        plan = {"n_steps": 320, "batch_size": 8, "compile": "yes", **fields}
        found[name] = run(args.work, name, plan)
    grid = Table("recipe", "steps", "validation loss, nats a token")
    for name, r in found.items():
        grid.add_row(name, f"{r['curve'][-1][0]:,}", f"{r['valid_loss']:.3f}")
    Console().print(grid)
    if args.save:
        content = provenance() | {"step_seconds": steps, "runs": found}
        write_file(args.save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
