"""Writing speed: our generate against that of transformers, with its cache.

GPT-2 small with random weights, the same for both; greedy, 64 prompt tokens,
128 new ones; interleaved in one run, medians. Both must write the same ids.
Usage: python benchmarks/generation.py [--new N] [--rounds N] [--batch 1 8]
       [--precision fp32 medium bf16] [--save FILE]
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table
from timing import provenance

from llm_from_scratch.generation import generate, generate_batch, quicken
from llm_from_scratch.model import TransformerLM, preset, save_model
from llm_from_scratch.tokenizer import write_file


def make_pair():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ours = TransformerLM(preset("gpt2-124m", dropout=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
    theirs.generation_config.eos_token_id = None
    return ours, theirs


def write_ours(model, ids, n):
    if len(ids) == 1:
        return [list(generate(model, ids[0].tolist(), n, temperature=0))]
    return generate_batch(model, ids.tolist(), n, temperature=0)


def write_theirs(model, ids, n):
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].tolist()


def compare(pair, ids, n, rounds):
    "Median seconds of ours and of theirs, and the share of equal ids."
    pair = (quicken(pair[0]), pair[1])
    writers = (write_ours, write_theirs)
    seconds, texts = ([], []), [None, None]
    for turn in range(-1, rounds):  # one round to warm up
        for i, (write, model) in enumerate(zip(writers, pair)):
            began = time.perf_counter()
            texts[i] = write(model, ids, n)
            if turn >= 0:
                seconds[i].append(time.perf_counter() - began)
    pairs = [a == b for row in zip(*texts) for a, b in zip(*row, strict=True)]
    return *map(statistics.median, seconds), sum(pairs) / len(pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--save", help="a file for the ratios")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "medium", "bf16"]
    )
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    grid = Table(
        title=f"GPT-2 small, {args.prompt} + {args.new} tokens, "
        f"{torch.get_num_threads()} threads, median of {args.rounds}"
    )
    for column in (
        "precision",
        "batch",
        "ours, tokens/s",
        "transformers",
        "ratio",
        "same ids",
    ):
        grid.add_column(column, justify="right")
    pair, rows = make_pair(), []
    for precision in args.precision:  # bf16 last: weights do not come back
        torch.set_float32_matmul_precision(
            "medium" if precision == "medium" else "highest"
        )
        if precision == "bf16":
            pair = tuple(model.bfloat16() for model in pair)
        for n in args.batch:
            ids = torch.randint(50257, (n, args.prompt), generator=generator)
            ours, theirs, same = compare(pair, ids, args.new, args.rounds)
            grid.add_row(
                precision,
                str(n),
                f"{n * args.new / ours:.1f}",
                f"{n * args.new / theirs:.1f}",
                f"{theirs / ours:.2f}",
                f"{same:.0%}",
            )
            rows.append(
                {
                    "precision": precision,
                    "batch": n,
                    "times_as_fast": theirs / ours,
                    "same_ids": same,
                }
            )
    Console().print(grid)
    if args.save:
        content = provenance() | {"rows": rows}
        write_file(args.save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
