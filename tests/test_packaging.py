"""The wheel works in an empty environment, without the tools of the book."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            out,
            ROOT,
        ],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"llm_from_scratch", *(t for t in tops if "dist-info" in t)}
    assert "llm_from_scratch/data-requirements.txt" in names
    assert any(n.endswith("LICENSE") for n in names)


def test_wheel_in_an_empty_environment(wheel, text_folder, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    torch = next(
        x
        for x in (ROOT / "constraints.txt").read_text().splitlines()
        if x.startswith("torch==")
    )
    for what in ([torch], [wheel]):
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "-c",
                ROOT / "constraints.txt",
                *what,
            ],
            check=True,
        )
    installed = subprocess.run(
        [python, "-m", "pip", "list"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.lower()
    for tool in ("nbdev", "jupyter", "pandoc", "typst", "matplotlib"):
        assert tool not in installed, tool

    def command(*args):
        return subprocess.run(
            [tmp_path / "env/bin/llm-from-scratch", *map(str, args)],
            text=True,
            capture_output=True,
            cwd=tmp_path,
            env=os.environ,
        )

    fetched = command("data", "get", "shakespeare")
    assert fetched.returncode == 0, fetched.stderr
    assert "38" in fetched.stdout
    done = command(
        "train",
        "--preset",
        "nano",
        "--data",
        text_folder,
        "--out",
        "run",
        "--steps",
        5,
    )
    assert done.returncode == 0, done.stderr
    text = command(
        "generate", "run", "--prompt", "ROMEO:", "--max-new-tokens", 5
    )
    assert text.returncode == 0 and text.stdout.startswith("ROMEO:")
