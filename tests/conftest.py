"""What several tests share: the command line, a small trained run."""

import io
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


@pytest.fixture
def inside(capsys, monkeypatch):
    "The command line without a process of its own, for many short runs."
    from llm_from_scratch.cli import main

    def call(*args, typed=""):
        with monkeypatch.context() as once, pytest.raises(SystemExit) as stop:
            once.setattr(sys, "stdin", io.StringIO(typed))
            main([*map(str, args)])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, stop.value.code, out, err)

    return call


def ends(done, code, *needles, begun=False):
    "The last line says why; the only one, unless a run had begun."
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = [x for x in done.stderr.splitlines() if x.strip()]
    assert lines[-1].startswith("error: "), done.stderr
    assert begun or len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for needle in needles:
        assert str(needle) in lines[-1], lines[-1]


def count_listings(monkeypatch, model):
    "A list that grows whenever all parameters of such a model are listed."
    real, seen = type(model).parameters, []

    def parameters(self, *args, **kwargs):
        yield from real(self, *args, **kwargs)
        seen.append(1)  # whoever asks for the first only never comes here

    monkeypatch.setattr(type(model), "parameters", parameters)
    return seen


def one_line(done, *needles):
    "Exit code 2 and a single line on stderr that says what was wrong."
    ends(done, 2, *needles)


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
