"""Notebooks are clean, the package is in step, the order of the book holds."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PACKAGE = ROOT / "llm_from_scratch"


def toc_stems() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [Path(c["file"]).name for p in toc["parts"] for c in p["chapters"]]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path, tmp_path):
    from nbdev.clean import nbdev_clean

    copy = shutil.copy(path, tmp_path / path.name)
    nbdev_clean(fname=copy, clear_all=True)
    assert Path(copy).read_bytes() == path.read_bytes(), (
        f"run `nbdev_clean` on {path.name}"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_carry_no_metadata_and_known_directives(path):
    known = (
        "default_exp",
        "export",
        "exporti",
        "hide",
        "slow",
        "echo:",
        "label:",
        "fig-cap:",
        "tbl-cap:",
        "frames:",
    )
    for cell in cells(path):
        assert not cell["metadata"], f"{path.name}: cell {cell['id']}"
        if cell["cell_type"] != "code":
            continue
        for line in "".join(cell["source"]).splitlines():
            if line.startswith("#|"):
                assert line[2:].split()[0] in known, f"{path.name}: {line}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_is_not_taken_for_a_list(path):
    "A line that begins with a sign or a number and a dot may open one."
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.S)
            item = r"(?:[-+*]|\d+[.)])\s"
            wrong = re.findall(rf"^(?!{item}| |\n).+\n({item}.*)", text, re.M)
            assert not wrong, (cell["id"], wrong)


def test_package_is_in_step(tmp_path):
    "The command itself, in a copy, makes exactly what is committed."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    (tmp_path / "llm_from_scratch").mkdir()
    export = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([export], cwd=tmp_path, check=True)
    made = {p.name: p.read_text() for p in tmp_path.rglob("*.py")}
    ours = {p.name: p.read_text() for p in PACKAGE.glob("*.py")}
    assert made.keys() == ours.keys(), "run `nbdev_export`"
    for name, text in made.items():
        assert ours[name] == text, f"run `nbdev_export`: {name} differs"


def test_book_and_table_of_contents_agree():
    stems = toc_stems()
    assert sorted(stems + ["index"]) == sorted(p.stem for p in NOTEBOOKS)
    numbers = [int(s[:2]) for s in stems if s[:2].isdigit() and s[:2] != "00"]
    assert numbers == sorted(numbers)
    assert stems[: len(numbers)] == sorted(stems[: len(numbers)])


def test_notebook_makes_the_module_of_its_name():
    names = {"D_command_line": "cli"}
    for path in NOTEBOOKS:
        text = "".join("".join(c["source"]) + "\n" for c in cells(path))
        made = [
            line.split()[-1]
            for line in text.splitlines()
            if line.startswith("#| default_exp")
        ]
        if made:
            stem = path.stem
            assert made == [names.get(stem, stem.split("_", 1)[1])], path.name


def test_modules_import_only_from_earlier_chapters():
    from llm_from_scratch.figures import CHAPTERS

    order = list(CHAPTERS)  # and before them all, 00_figures
    assert order == [
        s[3:] for s in toc_stems() if s[0].isdigit() and s != "00_figures"
    ]
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (
                node.module or ""
            ).startswith("llm_from_scratch."):
                used = node.module.split(".")[1]
                if path.stem in order:
                    before = ["figures", *order[: order.index(path.stem)]]
                    assert used in before, (
                        f"{path.name} imports {used}, a later chapter"
                    )
                else:
                    assert path.stem == "cli", f"{path.name} imports {used}"


def test_recap_names_what_is_exported():
    for path in NOTEBOOKS:
        if path.stem == "index" or path.stem[0] in "AB":
            continue
        text = "\n\n".join("".join(c["source"]) for c in cells(path))
        recap = re.search(r"^## Recap.*?(?=^## |\Z)", text, re.M | re.S)
        assert recap, f"{path.name} has no recap"
        stem = "cli" if path.stem == "D_command_line" else path.stem[3:]
        module = ast.parse((PACKAGE / f"{stem}.py").read_text())
        exported = next(
            ast.literal_eval(n.value)
            for n in module.body
            if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
        )
        public = [
            n
            for n in exported
            if not n.isupper()
            and n != "app"
            and n != "data_app"
            and n != "console"
        ]
        missing = [n for n in public if f"`{n}`" not in recap[0]]
        assert not missing, f"{path.name}: recap lacks {missing}"
