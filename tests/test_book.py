"""A tiny book with every construct goes through the renderers, and arrives."""

import json
import re
import sys
import weakref
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pypdf
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from book import build  # noqa: E402
from book.execute import execute  # noqa: E402
from book.stage import BookError, read_book, stage  # noqa: E402

TOC = ROOT / "tests" / "book" / "_toc.yml"
REFERENCES = [
    "Equation (1.1)", "Equation (1.2)", "Table 1.1", "Table 1.2",
    "Figure 1.1", "Figure 1.2", "Section 1.1", "Section 2.1", "Chapter 1",
    "Chapter 2", "Section A.1", "Appendix A", "Figure A.1",
]
TEXTS = [  # in this order on the page
    "The equation", "has a number", "and this one has none",
    "A typed table, see Equation (1.1).", "return 2 * x", "42",
    "to the output stream", "to the error stream", "line 00 of a long",
    "line 59 of a long output", "shown on purpose", "never executed",
    "Not run while the book is built", "Read this", "A note with code",
    "x = \"@fig-nothing in code\"", "Warning", "A warning without a title.",
    "Tip", "A tip.", "A quotation of an old master.", "nested",
    "make book # @nobody", "A heading without a number", "red 3",
    "the bar was overwritten", "done xxxx",
]
GONE = ["hidden words", "secret", "#| export", "#| label", "[@", "{#", "]{.",
        "RuntimeError: never", "circle cx", "00:09<", "\x1b", "3/3", "{ref}",
        "{cite"]


def flat(text):
    "Text on one line, so that a line break hides nothing."
    return re.sub(r"\s+", " ", text.replace("\N{NO-BREAK SPACE}", " "))


def parse(html):
    return BeautifulSoup(html, "html.parser")


def check_texts(text):
    "Everything in its order, nothing that should be gone."
    text, at = flat(text), 0
    for words in TEXTS:
        found = text.find(flat(words), at)
        assert found >= 0, f"{words!r} is missing after {text[at - 90:at]!r}"
        at = found
    for reference in REFERENCES:
        assert reference in text
    for words in GONE:
        assert words not in text


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "The tiny book, executed and staged."
    out = tmp_path_factory.mktemp("tiny")
    book = read_book(TOC)
    assert len(execute(book, out / "cache")) == 4
    stage(book, TOC, ROOT / "book" / "references.bib", out)
    return out


@pytest.fixture(scope="session")
def pdf(tiny):
    return pypdf.PdfReader(build.build_pdf(tiny))


@pytest.fixture(scope="session")
def site(tiny):
    "The pages of the site, by name."
    html = pytest.importorskip("book.html", reason="the site is not built yet")
    gone = type("Gone", (), {})()
    dead = weakref.proxy(gone)  # as any library may leave behind
    del gone
    html.build_html(tiny / "stage", tiny / "stage" / "_toc.yml", tiny / "html")
    assert type(dead) in weakref.ProxyTypes
    return {
        page.stem: parse(page.read_bytes())
        for page in (tiny / "html").rglob("*.html")
    }


def test_a_second_build_executes_nothing(tiny):
    kept = (tiny / "print" / "book.md").read_bytes()
    book = read_book(TOC)
    assert execute(book, tiny / "cache") == []
    stage(book, TOC, ROOT / "book" / "references.bib", tiny)
    assert (tiny / "print" / "book.md").read_bytes() == kept


def test_only_what_no_build_has_run_is_run(tiny, monkeypatch, capsys):
    called = []

    def run(command, **_):
        called.append(command[-1])
        return type("Done", (), {"returncode": 3})()

    monkeypatch.setattr(build.subprocess, "run", run)
    book = read_book(TOC)
    assert build.test(book, tiny / "cache") == 0 and not called
    assert capsys.readouterr().out.startswith("4 notebooks ran")
    changed = next(c for c in book[2].cells if c.kind == "code")
    changed.source += "\n1"
    assert build.test(book, tiny / "cache") == 3
    assert called == [rf"^({book[2].path.stem})\.ipynb$"]


def test_a_fresh_build_gives_the_same_text(tiny, tmp_path):
    book = read_book(TOC)
    execute(book, tmp_path / "cache", jobs=1)
    stage(book, TOC, ROOT / "book" / "references.bib", tmp_path)
    for file in sorted(tiny.glob("stage/**/*.*")):
        again = tmp_path / file.relative_to(tiny)
        assert file.read_bytes() == again.read_bytes(), file


def test_an_error_in_a_cell_is_named(tmp_path):
    cells = [("# Title", "markdown"), ("x = 1\n1 / 0", "code")]
    (tmp_path / "index.ipynb").write_text(json.dumps({"cells": [
        {"cell_type": kind, "id": f"id{i}", "source": text}
        for i, (text, kind) in enumerate(cells)]}))
    (tmp_path / "_toc.yml").write_text("root: index\nchapters: []\n")
    book = read_book(tmp_path / "_toc.yml")
    with pytest.raises(BookError) as error:
        execute(book, tmp_path)
    first, second = str(error.value).splitlines()
    assert first == ("index.ipynb, cell 2 (id1): ZeroDivisionError: "
                     "division by zero")
    assert "2 1 / 0" in second
    assert not list(tmp_path.glob("*.json"))


# --- The printed book -------------------------------------------------------

def test_pdf_has_every_text(pdf):
    pages = [page.extract_text() for page in pdf.pages]
    first = next(i for i, text in enumerate(pages) if "CHAPTER 1" in text)
    check_texts("\n".join(pages[first:]))


def test_pdf_links_go_to_their_targets(pdf):
    targets, outside = set(), set()
    for page in pdf.pages:
        for note in page.get("/Annots", []):
            action = note.get_object()
            if "/A" in action and "/URI" in action["/A"]:
                outside.add(action["/A"]["/URI"])
            else:
                targets.add(str(action.get("/Dest") or action["/A"]["/D"]))
    assert "https://example.org/page" in outside
    assert len(targets) > 15  # contents, references, citations, footnotes


def test_pdf_is_a_book(pdf):
    conf = build.settings()
    assert pdf.metadata.title == conf["title"]
    assert pdf.metadata.author == conf["author"]
    root = pdf.trailer["/Root"]
    assert root["/MarkInfo"]["/Marked"] and root["/Lang"] == "en"
    assert b"pdfuaid:part" in root["/Metadata"].get_data()

    def titles(entries):
        return [titles(e) if isinstance(e, list) else flat(e.title)
                for e in entries]

    assert titles(pdf.outline) == [
        "Contents", "Preface",
        "I Beginnings", ["1 First things", ["1.1 Numbers"],
                         "2 Second things", ["2.1 Another", [
                             "A heading without a number"], "2.2 Recap"]],
        "Appendices", ["A Symbols", ["A.1 Letters"]], "Bibliography"]
    texts = [flat(page.extract_text()) for page in pdf.pages]
    for i, text in enumerate(texts):  # titles on right pages, empty ones left
        if re.match(r"CHAPTER|APPENDIX|PART|Preface E|Bibliography", text):
            assert i % 2 == 0 and text.endswith(str(i + 1))
        assert text or i % 2
    contents = texts[2]
    assert re.search(r"1\.1 Numbers[ .]+\d", contents)
    fonts = {}
    for page in pdf.pages:
        for font in page["/Resources"].get("/Font", {}).values():
            font = font["/DescendantFonts"][0].get_object()
            fonts[font["/BaseFont"]] = font["/FontDescriptor"]
    assert all({"/FontFile2", "/FontFile3"} & set(d) for d in fonts.values())
    assert {name.split("+")[1].split("-")[0] for name in fonts} == {
        "LibertinusSerif", "DejaVuSansMono", "NewCMMath"}


def test_pdf_has_pictures_with_alternative_text(pdf):
    found = []

    def walk(node):
        node = node.get_object()
        if isinstance(node, list):
            for child in node:
                walk(child)
        elif isinstance(node, dict):
            found.append((node.get("/S"), str(node.get("/Alt", ""))))
            if "/K" in node:
                walk(node["/K"])

    walk(pdf.trailer["/Root"]["/StructTreeRoot"]["/K"])
    alts = [alt for kind, alt in found if kind == "/Figure"]
    assert "A square with a corner marked." in alts
    assert any(alt.startswith("A drawn circle, as in Section") for alt in alts)
    formulas = [alt for kind, alt in found if kind == "/Formula"]
    assert "E = m c^2" in formulas and r"\sum_i p_i = 1." in formulas
    assert {"/TOC", "/H1", "/Table", "/TH", "/Code", "/Note"} <= {
        kind for kind, _ in found}


def test_pdf_lines_stay_on_the_page(pdf):
    wide = 0
    for page in pdf.pages:
        starts = []

        def visit(text, cm, tm, font, size, starts=starts):
            if text.strip():
                starts.append(tm[4] * cm[0] + cm[4])

        text = page.extract_text(visitor_text=visit)
        assert all(0.9 * 72 <= x < 7.1 * 72 for x in starts)
        wide += "done " + "x" * 74 in text
    assert wide == 1  # the line of 79 columns is one line


def test_pdf_cites_only_what_is_cited(pdf):
    text = flat(pdf.pages[-1].extract_text())
    for name in ("Elman", "Gage", "Shannon", "Vaswani"):
        assert name in text
    assert "Brown" not in text


# --- The site ---------------------------------------------------------------

def test_site_has_every_text(site):
    text = "\n".join(site[name].article.get_text()
                     for name in ("01_first", "02_second", "A_symbols"))
    check_texts(text)
    assert "Fig. 1" not in text  # numbered once


def test_site_links_go_to_their_targets(site):
    for name in ("index", "01_first", "02_second", "A_symbols"):
        for link in site[name].article.select("a.reference.internal"):
            file, _, label = link["href"].partition("#")
            target = site[Path(file).stem if file else name]
            assert not label or target.find(id=label), link
    shown = {flat(a.get_text()) for a in site["01_first"].article.select("a")}
    assert {r for r in REFERENCES if "1." in r} <= shown


def test_site_has_the_elements(site):
    first, second = site["01_first"].article, site["02_second"].article
    assert first.h1.get_text().startswith("1. First things")
    assert first.h2.get_text().startswith("1.1. Numbers")
    for figure in first.select("figure"):
        assert figure.img["alt"].startswith("A ")
        assert figure.figcaption
    assert len(first.select("figure")) == 2
    assert [len(table.select("tr")[0].select("th, td"))
            for table in first.select("table")] == [2, 5, 2, 2]
    assert r"\tag{1.1}" in first.get_text()
    assert "to the error" in first.select_one(".stderr").get_text()
    assert "Elman" in first.get_text() and "Gage" in second.get_text()
    titles = [x.get_text() for x in second.select(".admonition-title")]
    assert titles == ["Read this", "Warning", "Tip"]
    kinds = [set(x["class"]) & {"note", "warning", "tip"}
             for x in second.select(".admonition")]
    assert kinds == [{"note"}, {"warning"}, {"tip"}]
    assert len(site["references"].select("div.citation")) == 4
    assert len(first.select(".tag_exported .cell_input")) == 1


# --- The EPUB ---------------------------------------------------------------

def test_epub_has_every_text(tiny):
    with zipfile.ZipFile(build.build_epub(tiny)) as book:
        for name in book.namelist():
            if name.endswith((".xhtml", ".opf", ".ncx", ".svg")):
                ElementTree.fromstring(book.read(name))  # is well formed
        names = [n for n in book.namelist() if re.search(r"ch\d+\.xhtml", n)]
        pages = [parse(book.read(name)) for name in sorted(names)]
        nav = parse(book.read("EPUB/nav.xhtml")).get_text()
        pictures = [n for n in book.namelist() if n.endswith(".svg")]
    check_texts("\n".join(page.get_text() for page in pages))
    assert sum(len(page.find_all("math")) for page in pages) == 5
    assert len(pictures) == 3  # the square is used twice
    for words in ("1.1\u2002Numbers", "A\u2002Symbols", "Bibliography"):
        assert words in nav
    ids = {tag["id"] for page in pages for tag in page.find_all(id=True)}
    for page in pages:
        for link in page.find_all("a", href=re.compile("#")):
            assert link["href"].partition("#")[2] in ids, link


def test_frames_move_on_the_site_and_stand_still_in_print(tiny, site):
    printed = (tiny / "print" / "book.md").read_text()
    assert "fig-moves.svg" in printed and "fig-moves-1" not in printed
    frames = site["02_second"].select("div.frames img")
    assert [img["alt"][-6:] for img in frames] == ["1 of 2", "2 of 2"]
    for img in frames:
        assert (tiny / "html" / "nbs" / img["src"]).exists()
