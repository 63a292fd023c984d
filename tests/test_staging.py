"""Each mistake in a notebook is caught and named; the cache knows what counts.

Nothing is executed here: outputs are given.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from book.execute import cache_key  # noqa: E402
from book.stage import (  # noqa: E402
    BookError,
    clean,
    read_book,
    simplify,
    stage,
)

BIB = "@misc{gage1994,\n  title = {A New Algorithm}\n}\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def write_book(folder, *cells, more=()):
    "A book of a preface, one chapter with these cells and `more` files."
    notebooks = {"index": [("markdown", "# Title")], "01_one": cells}
    notebooks |= dict(more)
    (folder / "nbs").mkdir(exist_ok=True)
    chapters = ""
    for name, content in notebooks.items():
        raw = [
            {"cell_type": kind, "id": f"id{i}", "source": source}
            for i, (kind, source) in enumerate(content)
        ]
        (folder / "nbs" / f"{name}.ipynb").write_text(
            json.dumps({"cells": raw})
        )
        if name != "index":
            chapters += f"  - file: nbs/{name}\n"
    toc = folder / "_toc.yml"
    toc.write_text(f"root: nbs/index\nchapters:\n{chapters}")
    return read_book(toc)


def staged(folder, *cells, outputs=(), more=()):
    "What pandoc reads."
    book = write_book(folder, *cells, more=more)
    book[1].cells[-1].outputs = list(outputs)
    (folder / "references.bib").write_text(BIB)
    stage(book, folder / "_toc.yml", folder / "references.bib", folder)
    return (folder / "print" / "book.md").read_text("utf-8")


TITLE = ("markdown", "# One\n\n> A promise.")
WRONG = {
    "unknown reference": ("See @fig-nothing.", "unknown reference @fig-no"),
    "unknown chapter": ("See @ch-nothing.", "unknown reference @ch-nothing"),
    "unknown citation": ("So [@nobody1999].", "@nobody1999 is not in"),
    "one of two": ("So [@gage1994; @nobody1999].", "@nobody1999 is not in"),
    "twice": ("## A {#sec-a}\n\n## B {#sec-a}", "sec-a is used twice"),
    "label": ("## A {#part-a}", "part-a must begin with sec-"),
    "html": ("A <br> line.", "raw HTML, which the PDF would lose: <br>"),
    "comment": ("A <!-- hidden --> word.", "raw HTML"),
    "picture": ("![A cat.](figures/cat.svg){#fig-cat}", "cat.svg does not ex"),
    "bare picture": ("![A cat.](figures/cat.svg)", "cat.svg has no {#fig-"),
    "relative link": ("[here](02_data.ipynb)", "a link to 02_data.ipynb"),
    "admonition": ("> [!DANGER]\n> Mind.", "unknown admonition DANGER"),
    "directive of MyST": ("```{note}\nMind.\n```", "unknown kind of block"),
    "wide listing": (f"```\n{'x' * 80}\n```", "line 1 of the listing has 80"),
    "gap in formula": ("$$\na\n\nb\n$$", "an empty line inside"),
    "letters": ("So 你好.", "letters that the fonts of the PDF lack: 你 好"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_text_is_named(tmp_path, name):
    text, message = WRONG[name]
    with pytest.raises(BookError) as error:
        staged(tmp_path, TITLE, ("markdown", text))
    assert str(error.value).startswith("01_one.ipynb, cell 2 (id1): ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


FIG = "#| label: fig-a\n#| fig-cap: A.\n"
WRONG_CODE = {
    "wide code": ("x" * 80, [], "line 1 of the code has 80 columns"),
    "wide output": ("x", [("stdout", "y\n" + "z" * 80)], "line 2 of the outp"),
    "wide letters": ("x", [("value", "，" * 40)], "has 80 columns"),
    "directive": ("#| eval: false\nx", [], "unknown directive #| eval"),
    "lost": ("x", [("lost", "text/html")], "would lose: text/html"),
    "address": ("x", [("value", "<f at 0x7fabcdef01>")], "0x7fabcdef01 in"),
    "no label": ("x", [("svg", SVG)], "a picture without #| label"),
    "no caption": ("#| label: fig-a\nx", [("svg", SVG)], "go together"),
    "no words": ("#| label: tbl-a\nx", [("markdown", "| a |\n|---|")], "go t"),
    "no picture": (FIG + "x", [], "fig-a labels one output, but the cell ma"),
    "two": (FIG + "x", [("svg", SVG)] * 2, "but the cell makes 2"),
    "html table": ("x", [("markdown", "| <b>a</b> |\n|---|")], "raw HTML"),
    "table": ("x", [("markdown", "| @ch-x |\n|---|")], "reference @ch-x"),
}


@pytest.mark.parametrize("name", WRONG_CODE)
def test_wrong_code_is_named(tmp_path, name):
    source, outputs, message = WRONG_CODE[name]
    with pytest.raises(BookError) as error:
        staged(tmp_path, TITLE, ("code", source), outputs=outputs)
    assert str(error.value).startswith("01_one.ipynb, cell 2 (id1): ")
    assert message in str(error.value)


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(BookError) as error:
        staged(tmp_path, TITLE, ("markdown", "@fig-a <b>"), ("code", "x" * 80))
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_chapter_is_named(tmp_path):
    write_book(tmp_path, TITLE)
    (tmp_path / "nbs" / "01_one.ipynb").unlink()
    with pytest.raises(BookError, match="nbs/01_one: it does not exist"):
        read_book(tmp_path / "_toc.yml")


def test_code_is_not_translated(tmp_path):
    kept = "`@fig-a` and $a@b$ and ``[@x]`` and \\@you and a@b.org"
    listing = "```python\n@decorated  # <b>\n# not a heading\n```"
    page = staged(tmp_path, TITLE, ("markdown", f"{kept}\n\n{listing}"))
    assert kept in page and listing in page


def test_numbers_follow_the_notebook(tmp_path):
    text = "## A {#sec-a}\n\n$$x$$ {#eq-x}\n\nSee @eq-x, @sec-a, @sec-b, @ch-c"
    notes = [("markdown", "# C\n\n## B {#sec-b}\n\nSee @ch-figures.")]
    last = [("markdown", "# F\n\n## D\n\n## E {#sec-e}\n\n@sec-e @ch-index")]
    page = staged(tmp_path, TITLE, ("markdown", text),
                  more={"B_c": notes, "00_figures": last})
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    for shown in ("Equation (1.1)", "Section 1.1", "Section B.1", "Appendix B",
                  "Appendix C", "Section C.2", "[Preface](#ch-index)"):
        assert f"[{shown.strip('[')}" in page


def test_hidden_cells_and_directives_are_gone(tmp_path):
    page = staged(
        tmp_path, TITLE, ("code", "#| default_exp one"),
        ("code", "#| hide\nsecret = 1"), ("code", "#| export\nshown = 1"),
        ("code", "#| echo: false\nunseen = 1"), outputs=[("value", "seen")])
    assert "``` {.python .exported}\nshown = 1" in page and "seen" in page
    for gone in ("secret", "#|", "default_exp", "unseen"):
        assert gone not in page


def test_outputs_are_cleaned():
    bar = "  5%|#    | 1/20 [00:00<00:01]\r100%|#####| 20/20 [00:01<00:00]\n"
    assert clean(f"\x1b[1;31mred\x1b[0m\n{bar}end  \n") == "red\nend"
    assert clean("draft\rfinal\n") == "final"
    assert simplify([
        {"output_type": "stream", "name": "stdout", "text": "a\n"},
        {"output_type": "stream", "name": "stdout", "text": "b\n"},
        {"output_type": "stream", "name": "stderr", "text": "c\n"},
        {"output_type": "display_data", "data": {
            "image/png": "PNG", "image/svg+xml": SVG, "text/plain": "Fig"}},
        {"output_type": "execute_result", "data": {
            "text/html": "<p>", "text/plain": "<IPython.core.HTML object>"}},
        {"output_type": "execute_result", "data": {
            "text/html": "<table>", "text/plain": "a b"}},
    ]) == [("stdout", "a\nb"), ("stderr", "c"), ("svg", SVG),
           ("lost", "text/html, text/plain"), ("value", "a b")]


# --- The key of the cache ---------------------------------------------------

CODE = "from llm_from_scratch.b import f\n\nf('words.txt')"


@pytest.fixture
def key(tmp_path):
    "The key of the chapter after some change to its surroundings."
    package, data = tmp_path / "llm_from_scratch", tmp_path / "nbs" / "data"
    package.mkdir()
    data.mkdir(parents=True)
    files = {
        "a.py": "x = 1\n", "cli.py": "main = 1\n",
        "b.py": "from llm_from_scratch.a import x\n\ndef f(): return x\n",
        "pins": "torch==1\n", "words.txt": "to be", "other.txt": "or not",
    }

    def make(*cells, **changed):
        changes = {k.replace("_", "."): v for k, v in changed.items()}
        for name, text in (files | changes).items():
            folder = data if name.endswith(".txt") else package
            (folder / name).write_text(text)
        book = write_book(tmp_path, TITLE, *(cells or [("code", CODE)]))
        return cache_key(book[1], tmp_path, [package / "pins"])

    return make


def test_key_ignores_what_changes_no_output(key):
    assert key() == key(("markdown", "Prose."), ("code", CODE))
    assert key() == key(("code", f"#| label: fig-a\n#| fig-cap: B.\n{CODE}"))
    assert key() == key(("code", CODE), ("code", "#| slow\nlong()"))
    assert key() == key(a_py="# a remark\nx  =  1\n")
    assert key() == key(cli_py="main = 2\n")
    assert key() == key(other_txt="changed")


def test_key_knows_what_changes_outputs(key):
    assert key() != key(("code", CODE + "\n"), ("code", "1"))
    assert key() != key(("code", CODE.replace("words", "other")))
    assert key() != key(a_py="x = 2\n")
    assert key() != key(b_py="def f(): return 3\n")
    assert key() != key(pins="torch==2\n")
    assert key() != key(words_txt="to be?")
    shell = ("code", "!llm-from-scratch --help")
    assert key(shell) != key(shell, cli_py="main = 2\n")
