"""Throughput of the loader: batches drawn against batches trained on.

Tokens come from a file that is mapped, in the shape of the laptop preset and
its recipe; all are timed in turns in one run.
Usage: python benchmarks/data.py [--steps N] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from training import ours

from llm_from_scratch.data import (
    Packed,
    Windows,
    open_tokens,
    tokenize_corpus,
    write_tokens,
)
from llm_from_scratch.model import preset
from llm_from_scratch.tokenizer import write_file
from llm_from_scratch.training import RECIPES


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the results here")
    args = parser.parse_args()
    steps = args.steps
    torch.manual_seed(0)
    shape, recipe = preset("laptop", dropout=0.0), RECIPES["laptop"]
    length, size = shape.context_length, recipe.batch_size
    corpus = tokenize_corpus("shakespeare", shape.vocab_size)
    pieces = [
        corpus.train[i : i + 60] for i in range(0, len(corpus.train), 60)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tokens(
            Path(folder) / "ids", corpus.train, shape.vocab_size
        )
        windows = Windows(open_tokens(path), length, size)
        packed = Packed(pieces, 0, length, size)
        train, _ = ours(shape, recipe)
        jobs = {
            "training step, laptop preset": lambda n: train(*windows.batch(0)),
            "Windows.batch": windows.batch,
            "Windows.batch, a new epoch each time": lambda n: windows.batch(
                n * windows.n_windows
            ),
            "Packed.batch": packed.batch,
        }
        seconds = {name: [] for name in jobs}
        for n in range(-2, steps):  # two rounds to warm up
            for name, job in jobs.items():
                began = time.perf_counter()
                job(n + 2)
                if n >= 0:
                    seconds[name].append(time.perf_counter() - began)
    tokens = size * length
    median = {name: statistics.median(s) for name, s in seconds.items()}
    results = {
        "command": f"python benchmarks/data.py --steps {steps}",
        "steps": steps,
        "seed": 0,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": tokens,
        "seconds": median,
    }
    slowest = median["training step, laptop preset"]
    grid = Table(
        title=f"loader, {torch.get_num_threads()} threads, "
        f"{tokens:,} tokens a step, median of {steps}"
    )
    grid.add_column("job")
    grid.add_column("tokens/s", justify="right")
    grid.add_column("times training", justify="right")
    for name, value in median.items():
        grid.add_row(name, f"{tokens / value:,.0f}", f"{slowest / value:,.0f}")
    Console().print(grid)
    if args.out:
        write_file(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
