"""Training throughput: our laptop preset against GPT-2 of transformers.

Same shape, data, batch and number of threads, interleaved in one run; the
peer's figure is the best of its eager and compiled forms in fp32 and bf16.
Usage: python benchmarks/training.py [--steps N]
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from llm_from_scratch.data import Windows, tokenize_corpus
from llm_from_scratch.model import TransformerLM, count_parameters, preset
from llm_from_scratch.training import (
    RECIPES,
    AdamW,
    autocast,
    clip_gradients,
    parameter_groups,
)


def ours(shape, recipe):
    model = TransformerLM(shape).train()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    params = list(model.parameters())

    def step(inputs, targets):
        with autocast(recipe.precision):
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        clip_gradients(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in params)


def peer(shape, bf16, compiled):
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
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    params = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step(inputs, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in params)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")  # for all alike
    shape, recipe = preset("laptop", dropout=0.0), RECIPES["laptop"]
    corpus = tokenize_corpus("shakespeare", shape.vocab_size)
    windows = Windows(corpus.train, shape.context_length, recipe.batch_size)
    runs = {"ours": ours(shape, recipe)}
    for bf16 in (False, True):
        for compiled in (False, True):
            name = f"transformers GPT-2, {'bf16' if bf16 else 'fp32'}"
            runs[name + (", compiled" if compiled else "")] = peer(
                shape, bf16, compiled
            )
    seconds = {name: [] for name in runs}
    for n in range(-2, steps):  # two rounds to warm up
        for name, (step, _) in runs.items():
            batch = windows.batch(n + 2)
            began = time.perf_counter()
            step(*batch)
            if n >= 0:
                seconds[name].append(time.perf_counter() - began)
    tokens = recipe.batch_size * shape.context_length
    speed = {n: tokens / statistics.median(s) for n, s in seconds.items()}
    best = max(v for n, v in speed.items() if n != "ours")
    grid = Table(
        title=f"training, {torch.get_num_threads()} threads, "
        f"{tokens:,} tokens a step, median of {steps}"
    )
    for column in ("model", "parameters", "tokens/s", "of the peer's best"):
        grid.add_column(
            column, justify="right" if column[1] != "o" else "left"
        )
    for name, (_, size) in runs.items():
        grid.add_row(
            name,
            f"{size:,}",
            f"{speed[name]:,.0f}",
            f"{speed[name] / best:.2f}",
        )
    Console().print(grid)
    assert count_parameters(shape)["total"] == runs["ours"][1]


if __name__ == "__main__":
    main()
