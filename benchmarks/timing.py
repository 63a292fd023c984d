"""The clock of the benchmarks, and what stands beside the results kept."""

import platform
import statistics
import sys
import time
from importlib.metadata import version

import torch


def interleave(jobs, rounds, warmup=1):
    "Median seconds of each job; `jobs` maps names to makers, not timed."
    seconds = {name: [] for name in jobs}
    for n in range(-warmup, rounds):
        for name, make in jobs.items():
            job = make()
            began = time.perf_counter()
            job()
            if n >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def provenance():
    "Where results come from: command, versions, machine."
    return {
        "command": "python " + " ".join(sys.argv),
        "seed": 0,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "processor": f"{platform.machine()}, "
        + torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
