"""Writing speed in four precisions, against transformers and torch's own int8.

Random weights of three shapes, the same for all; greedy, one text at a time,
64 prompt tokens, 64 new ones; in turns in one run, medians. torch's dynamic
int8 is `torch.ao.quantization.quantize_dynamic` of our model, head included.
The first shape is also measured with transformers and with torch's int8.
Usage: python benchmarks/quantization.py [--new N] [--rounds N] [--kernels]
       [--shapes gpt2-124m smollm2-135m laptop] [--save FILE]
"""

import argparse
import copy
import json
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance
from torch import nn
from torch.nn import functional as F

from llm_from_scratch.generation import PackedWeight, generate, quicken
from llm_from_scratch.model import TransformerLM, preset, save_model
from llm_from_scratch.quantization import (
    GroupedProduct,
    IntegerProduct,
    digits_for,
    quantize_model,
    to_steps,
)
from llm_from_scratch.tokenizer import write_file


class AskedHead:
    "Lets `F.linear(x, head.weight)` call a head that has no such tensor."

    def __init__(self, layer):
        self.layer = layer

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is F.linear
        return args[1].layer(args[0])


def dynamic_int8(model):
    "What torch's own quantize_dynamic makes of all matrices."
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = (
            model.embedding.weight
            if model.head is None
            else (model.head.weight)
        )
        head = nn.Sequential(nn.Linear(*table.shape[::-1], bias=False))
        head[0].weight = nn.Parameter(table.detach().clone())
        dynamic = torch.ao.quantization.quantize_dynamic
        other.blocks = dynamic(other.blocks, {nn.Linear}, torch.qint8)
        head = dynamic(head, {nn.Linear}, torch.qint8)
    other.head = None
    del other.head
    other.head = SimpleNamespace(weight=AskedHead(head[0]))
    return other


def as_calibrated(model, windows):
    "In eight bits, with the digits that a calibration would choose."
    other, hooks = quantize_model(model, 8), []
    layers = dict(other.named_modules())
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, nn.Linear):

            def note(_, args, name=f"blocks.{name}"):
                layers[name].multiply.digits = digits_for(args[0])

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.inference_mode():
        model(windows)
    for hook in hooks:
        hook.remove()
    other.head.multiply.digits = 1  # of a norm, without outliers
    return other


def ours(model, ids, n):
    return lambda: list(generate(model, ids, n, temperature=0))


def theirs(model, ids, n):
    ids = torch.tensor([ids])
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )


def transformers_form(model, dtype):
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    other.generation_config.eos_token_id = None
    return other.eval()


OURS = ["float32", "bfloat16", "int8", "int8, two digits", "int4"]


def measure(shape, n_prompt, n_new, rounds, only):
    torch.manual_seed(0)
    model = TransformerLM(preset(shape, dropout=0.0)).eval()
    windows = torch.randint(model.config.vocab_size, (1, 64))
    ids = windows[0, :n_prompt].tolist()
    forms = {
        "float32": lambda: quicken(model),
        "bfloat16": lambda: quicken(copy.deepcopy(model).bfloat16()),
        "int8": lambda: as_calibrated(model, windows),
        "int8, two digits": lambda: quantize_model(model, 8),
        "int4": lambda: quantize_model(model, 4),
        "torch, dynamic int8": lambda: dynamic_int8(model),
    }
    jobs = {
        name: ours(make(), ids, n_new)
        for name, make in forms.items()
        if not only or name in only
    }
    for name, dtype in (
        ("transformers, float32", torch.float32),
        ("transformers, bfloat16", torch.bfloat16),
    ):
        if not only or name in only:
            form = transformers_form(model, dtype)
            jobs[name] = theirs(form, ids, n_new)
    seconds = interleave(
        {name: lambda job=job: job for name, job in jobs.items()}, rounds
    )
    return {name: n_new / s for name, s in seconds.items()}


@torch.inference_mode()
def measure_kernels(rounds):
    "One row times all matrices of GPT-2's blocks: bytes, relative time."
    torch.manual_seed(0)
    weights = [
        layer.weight.detach()
        for layer in TransformerLM(preset("gpt2-124m")).blocks.modules()
        if isinstance(layer, nn.Linear)
    ]
    eight = [to_steps(w) for w in weights]
    four = [to_steps(w, 4, 64, True, torch.bfloat16) for w in weights]
    rows = [torch.randn(1, w.shape[1]) for w in weights]
    whole = [(x * 30).round().clamp(-127, 127).to(torch.int8) for x in rows]
    half = [x.bfloat16() for x in rows]
    onednn, packed = torch.ops.onednn, [IntegerProduct(s) for s in eight]
    nibbles = [GroupedProduct(s) for s in four]
    zeros = [torch.zeros(len(w), dtype=torch.long) for w in weights]
    integer = torch.ops.quantized
    integer = integer.linear_with_input_q_dq_qweight_dq_output_fp32

    def fbgemm(n):
        several = [x.expand(n, -1).contiguous() for x in rows]
        return 1, lambda: [
            integer(x, 0.03, 128, p.packed) for x, p in zip(several, packed)
        ]

    def linear(weights, rows):
        return lambda: [F.linear(x, w) for x, w in zip(rows, weights)]

    blocked = [onednn.qlinear_prepack(s.steps, [1, s.width]) for s in eight]
    unsigned = [(x.int() + 128).to(torch.uint8) for x in whole]
    scales = [s.scale[:, 0].contiguous() for s in eight]
    forms = {
        "float32, in halves": (
            4,
            linear([PackedWeight(w) for w in weights], rows),
        ),
        "bfloat16, oneDNN": (
            2,
            linear([PackedWeight(w.bfloat16()) for w in weights], half),
        ),
        "_weight_int8pack_mm": (
            1,
            lambda: [
                torch._weight_int8pack_mm(x, s.steps, d)
                for x, s, d in zip(half, eight, half_scales)
            ],
        ),
        "_int_mm": (
            1,
            lambda: [
                torch._int_mm(x, s.steps.T) for x, s in zip(whole, eight)
            ],
        ),
        "int8, oneDNN": (
            1,
            lambda: [
                onednn.qlinear_pointwise(
                    *(x, 0.03, 128, w, d, z, None, 1.0, 0),
                    *(torch.float32, "none", [], ""),
                )
                for x, w, d, z in zip(unsigned, blocked, scales, zeros)
            ],
        ),
        "int8, FBGEMM, 1 row": fbgemm(1),
        "int8, FBGEMM, 2 rows": fbgemm(2),
        "_weight_int4pack_mm_for_cpu": (
            4.5 / 8,
            lambda: [g(x) for g, x in zip(nibbles, rows)],
        ),
    }
    half_scales = [d.bfloat16() for d in scales]
    seconds = interleave(
        {name: lambda job=job: job for name, (_, job) in forms.items()}, rounds
    )
    first = next(iter(seconds.values()))
    return {
        name: {"bytes": forms[name][0], "time": s / first}
        for name, s in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="a file for the speeds")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["gpt2-124m", "smollm2-135m", "laptop"],
    )
    parser.add_argument(
        "--kernels", action="store_true", help="time the products alone, too"
    )
    parser.add_argument("--only", nargs="+", help="forms to measure")
    args = parser.parse_args()
    found = {}
    for shape in args.shapes:
        only = args.only or (OURS if shape != args.shapes[0] else None)
        found[shape] = measure(shape, args.prompt, args.new, args.rounds, only)
    for shape, speeds in found.items():
        grid = Table(
            title=f"{shape}, {args.prompt} + {args.new} tokens, "
            f"{torch.get_num_threads()} threads, median of {args.rounds}"
        )
        for column in ("form", "tokens/s", "times the first"):
            grid.add_column(column, justify="right")
        first = next(iter(speeds.values()))
        for name, speed in speeds.items():
            grid.add_row(name, f"{speed:.1f}", f"{speed / first:.2f}")
        Console().print(grid)
    kernels = measure_kernels(3 * args.rounds) if args.kernels else {}
    grid = Table("kernel", "bytes for a weight", "time, float32 = 1")
    for name, k in kernels.items():
        grid.add_row(name, f"{k['bytes']:.2f}", f"{k['time']:.2f}")
    if kernels:
        Console().print(grid)
    if args.save:
        old = {}
        if Path(args.save).is_file():  # shapes of an earlier run stay
            old = json.loads(Path(args.save).read_text())
        here = provenance()
        content = here | {
            "command": [*old.get("command", []), here["command"]],
            # tokens per second, of which only ratios mean much
            "shapes": old.get("shapes", {}) | found,
            "kernels": kernels or old.get("kernels", {}),
        }
        write_file(args.save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
