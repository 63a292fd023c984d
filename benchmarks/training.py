"""Training throughput: our step against GPT-2 of transformers in a torch loop.

Two shapes, that of nanoGPT's settings for a CPU (0.8 million parameters) and
that of its settings for a GPU (10.7 million), characters, no dropout. Same
shape, batch and threads, all steps in turns in one run, medians; the peer in
fp32 and bf16, as it is and compiled, with the attention that it takes by
itself (sdpa) and with the one that holds its weights (eager). Products of
float32 may use the fast path (`medium`) for all. The last column: the share of
the fastest product of matrices that this machine does.
Usage: python benchmarks/training.py [--steps N] [--shape small large]
       [--save FILE]
"""

import argparse
import json
import time
from contextlib import ExitStack
from functools import partial
from itertools import count, product, repeat

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance
from torch.nn import functional as F

from llm_from_scratch.data import Windows
from llm_from_scratch.model import ModelConfig, TransformerLM, flops_per_token
from llm_from_scratch.tokenizer import write_file
from llm_from_scratch.training import (
    AdamW,
    TrainConfig,
    fast_settings,
    parameter_groups,
    train_step,
)

SHAPES = {
    "small": (
        ModelConfig(
            vocab_size=96, context_length=64, d_model=128, n_layers=4,
            n_heads=4,
        ),
        12,
    ),
    "large": (
        ModelConfig(
            vocab_size=96, context_length=256, d_model=384, n_layers=6,
            n_heads=6,
        ),
        16,
    ),
}  # fmt: skip


def ours(shape, windows, stack):
    model = TransformerLM(shape).train()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    config = TrainConfig(n_steps=10_000, batch_size=windows.batch_size)
    forward, why = stack.enter_context(fast_settings(model, config))

    def step(number):
        train_step(model, optimizer, windows, number, config, forward=forward)

    return step, why, sum(p.numel() for p in model.parameters())


def make_gpt2(shape, attention="sdpa"):
    "GPT-2 of transformers in the shape of a ModelConfig, without dropout."
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.context_length,
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    ).train()
    model.set_attn_implementation(attention)
    return model


def peer(shape, windows, bf16, compiled, attention):
    model = make_gpt2(shape, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    params = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step(number):
        inputs, targets = windows.batch(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, "", sum(p.numel() for p in params)


def best_product():
    "Operations a second of the fastest product of matrices in bf16 here."
    x = torch.randn(2048, 2048, dtype=torch.bfloat16)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def measure(name, rounds):
    shape, batch_size = SHAPES[name]
    ids = np.random.default_rng(0).integers(0, 96, 500_000)
    windows = Windows(ids, shape.context_length, batch_size)
    with ExitStack() as stack:
        runs = {"ours": ours(shape, windows, stack)}
        for form in product((False, True), (False, True), ("sdpa", "eager")):
            bf16, compiled, attention = form
            title = f"GPT-2, {'bf16' if bf16 else 'fp32'}, {attention}"
            title += ", compiled" if compiled else ""
            runs[title] = peer(shape, windows, *form)
        torch.set_float32_matmul_precision("medium")  # for all alike
        jobs = {
            title: partial(next, map(partial, repeat(step), count()))
            for title, (step, *_) in runs.items()
        }
        seconds = interleave(jobs, rounds, warmup=3)
    tokens = batch_size * shape.context_length
    best = min(s for n, s in seconds.items() if n != "ours")
    peak, rows = best_product(), []
    grid = Table(
        title=f"{name}: {tokens:,} tokens a step, {torch.get_num_threads()} "
        f"threads, median of {rounds}; product of matrices in bf16: "
        f"{peak / 1e9:,.0f} GFLOP/s",
        caption=f"ours: {runs['ours'][1]}",
    )
    grid.add_column("model")
    for column in (
        "parameters",
        "tokens/s",
        "of the peer's best",
        "of the product",
    ):
        grid.add_column(column, justify="right")
    for title, (_, _, size) in runs.items():
        speed = tokens / seconds[title]
        row = {
            "model": title,
            "parameters": size,
            "of_peers_best": best / seconds[title],
            "of_product": flops_per_token(shape) * speed / peak,
        }
        grid.add_row(
            title,
            f"{size:,}",
            f"{speed:,.0f}",
            f"{row['of_peers_best']:.2f}",
            f"{row['of_product']:.0%}",
        )
        rows.append(row)
    Console(width=100).print(grid)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES)
    )
    parser.add_argument("--save", help="a file for the ratios")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {name: measure(name, args.steps) for name in args.shape}
    if args.save:
        content = json.dumps(provenance() | {"rows": rows}, indent=1)
        write_file(args.save, content + "\n")


if __name__ == "__main__":
    main()
