"""What several tests share: a command line process, a small trained run."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import settings

# the same examples in every run, and no limit that a busy machine breaks
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")


def pytest_configure():
    "Some tests press Ctrl-C, which a run in the background would not hear."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_cli(*args, cwd=None, timeout=240, **env):
    return subprocess.run(
        [sys.executable, "-m", "llm_from_scratch.cli", *map(str, args)],
        cwd=cwd,
        timeout=timeout,
        text=True,
        capture_output=True,
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"} | env,
    )


@pytest.fixture(scope="session")
def cli():
    return run_cli


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    "Five small documents, enough for the nano preset."
    folder = tmp_path_factory.mktemp("texts")
    for n in range(5):
        lines = [
            f"{a} {b} {c} {n}.\n"
            for a in ("the", "a", "one", "no")
            for b in ("king", "queen", "fool")
            for c in ("speaks", "sleeps")
        ]
        (folder / f"{n}.txt").write_text("".join(lines) * 12)
    return folder


@pytest.fixture(scope="session")
def run(cli, text_folder, tmp_path_factory):
    "A finished run of the nano preset on the small documents."
    out = tmp_path_factory.mktemp("runs") / "nano"
    done = cli(
        "train",
        "--preset",
        "nano",
        "--data",
        text_folder,
        "--out",
        out,
        "--steps",
        60,
    )
    assert done.returncode == 0, done.stderr
    return out
