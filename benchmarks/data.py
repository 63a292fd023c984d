"""Throughput of the loader: batches drawn against batches trained on.

Tokens come from a file that is mapped, in the shape of the laptop preset and
its recipe; both are timed in turns in one run.
Usage: python benchmarks/data.py [--steps N]
"""

import argparse
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
from llm_from_scratch.training import RECIPES


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
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
    speed = {n: tokens / statistics.median(s) for n, s in seconds.items()}
    slowest = speed["training step, laptop preset"]
    grid = Table(
        title=f"loader, {torch.get_num_threads()} threads, "
        f"{tokens:,} tokens a step, median of {steps}"
    )
    grid.add_column("job")
    grid.add_column("tokens/s", justify="right")
    grid.add_column("times training", justify="right")
    for name, value in speed.items():
        grid.add_row(name, f"{value:,.0f}", f"{value / slowest:,.0f}")
    Console().print(grid)


if __name__ == "__main__":
    main()
