"""Staging: from executed notebooks to the pages that both renderers read.

`stage(chapters, out, bib)` fills two folders:

`out/stage`  the site's source, for Jupyter Book: notebooks in MyST's spelling
             with their outputs, `_toc.yml`, `references.bib`, and
             `references.md`, the page with the bibliography.
`out/print`  `book.md`, the whole book in pandoc's spelling.

All numbers are given here, once, so that the site and the PDF agree: titles
arrive as "4. Attention" and "4.2. Scores", captions as "**Figure 4.2.** ...",
equations with `\\tag{4.2}`, references as links with literal text. A renderer
must number nothing itself (Sphinx: `numfig: False`, no `numbered:` in the
table of contents). Every figure and captioned table is a MyST directive in a
Markdown cell; pictures drawn by cells are files in `stage/nbs/drawn`. Code
cells keep only what they printed. Citations are `{cite:p}` roles.
"""
import json
import re
import shutil
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from nbdev.process import first_code_ln

DIRECTIVES = {"default_exp", "export", "exporti", "hide", "slow", "echo",
              "label", "fig-cap", "tbl-cap"}
WORDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
ROMAN = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]
COLUMNS = 79
SLOW = "*Not run while the book is built: it takes too long.*"

# The dialect of the Markdown cells. What stands first wins, so that nothing
# is translated inside code or mathematics.
DIALECT = re.compile(r"""
    (?P<fence>^[ ]*(?P<ticks>`{3,}|~{3,})(?P<fenced>(?s:.*?))^[ ]*(?P=ticks)[ ]*$)
  | (?P<admonition>^>[ ]?\[!(?P<kind>\w+)\][ ]*(?P<head>.*)\n?
                   (?P<body>(?:^>.*\n?)*))
  | (?P<heading>^(?P<level>\#+)[ ]+(?P<title>.+?)
                (?:[ ]+\{\#(?P<sec>[\w-]+)\})?[ ]*$)
  | (?P<table>(?P<rows>(?:^[ ]*\|.*\n)+)\n:[ ]+(?P<tcap>(?s:(?:(?!\n\n).)+?))\s*
              \{\#(?P<tbl>[\w-]+)\})
  | (?P<figure>!\[(?P<fcap>(?:\\.|\[[^\]]*\]|[^\]\\])*)\]\((?P<src>[^)\s]+)\)
               (?:\{\#(?P<fig>[\w-]+)\})?)
  | (?P<display>\$\$(?P<tex>(?s:.+?))\$\$(?:[ ]*\{\#(?P<eq>[\w-]+)\})?)
  | (?P<code>(?P<tick>`+)(?!`)(?s:.+?)(?<!`)(?P=tick)(?!`))
  | (?P<escape>\\.)
  | (?P<math>\$(?=\S)(?:\\.|[^$\\])+?(?<=\S)\$(?!\d))
  | (?P<cite>\[(?P<keys>@[\w:.-]+(?:;[ \n]*@[\w:.-]+)*)\])
  | (?P<note>\[\^(?P<mark>[\w-]+)\])
  | (?P<ref>(?<![\w@./-])@(?P<to>\w[\w-]*))
  | (?P<link>\]\((?!https?://|mailto:)(?P<href>[^)\s]*)\))
  | (?P<html></?[a-zA-Z][\w-]*(?:\s[^<>]*)?/?>|<!--)
""", re.X | re.M)
ESCAPES = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")
BAR = re.compile(r"^.*\d+%\|.*\|.*$|^\d+it \[.*\]$")


class BookError(Exception):
    "Something in the notebooks that must be mended; the message says where."


@dataclass
class Cell:
    "One cell of a notebook, its `#|` lines taken apart from its code."
    where: str               # notebook, number and id, for messages
    kind: str                # "code" or "markdown"
    source: str              # without the `#|` lines
    directives: dict         # name -> value, "" where there is none
    outputs: list = field(default_factory=list)

    def has(self, *names: str) -> bool:
        return any(name in self.directives for name in names)


@dataclass
class Chapter:
    "A notebook with its place in the book."
    file: str                # as in `_toc.yml`: nbs/04_attention
    path: Path               # of the notebook
    part: tuple | None       # number and title of the part it opens
    word: str                # Chapter, Appendix or Preface
    number: str              # "4", "A", or "" for the preface
    cells: list[Cell]

    @property
    def name(self) -> str:
        return re.sub(r"^(\d+|[A-Z])_", "", self.path.stem)


def read_cells(path: Path) -> list[Cell]:
    "The cells of a notebook."
    cells = []
    for i, raw in enumerate(json.loads(path.read_text("utf-8"))["cells"], 1):
        where = f"{path.name}, cell {i} ({raw['id']})"
        source, directives = "".join(raw["source"]), {}
        if raw["cell_type"] == "code":
            lines = source.splitlines()
            start = first_code_ln(lines)
            start = len(lines) if start is None else start
            for line in lines[:start]:
                if match := re.match(r"\s*#\|\s*([\w-]+):?\s*(.*)", line):
                    directives[match[1]] = match[2].strip()
            source = "\n".join(x for x in lines
                               if not re.match(r"\s*#\|", x)).strip("\n")
        cells.append(Cell(where, raw["cell_type"], source, directives))
    return cells


def read_book(toc: Path) -> list[Chapter]:
    "The chapters in the order of the table of contents, preface first."
    content = yaml.safe_load(toc.read_text("utf-8"))
    entries, opened = [(content["root"], None)], 0
    for part in content.get("parts") or [content]:
        files = [chapter["file"] for chapter in part["chapters"]]
        title = part.get("caption")
        if numbered := any(re.match(r".*/[0-9]*[1-9]_", f) for f in files):
            opened += 1
        number = ROMAN[opened] if numbered else ""
        entries.append((files[0], (number, title) if title else None))
        entries += [(file, None) for file in files[1:]]
    letters = [m[1] for f, _ in entries
               if (m := re.match(r"([A-Z])_", Path(f).name))]
    book = []
    for file, part in entries:
        path = toc.parent / f"{file}.ipynb"
        if not path.exists():
            raise BookError(f"{toc.name} names {file}, which does not exist")
        match = re.match(r"(\d+|[A-Z])_", path.name)
        if not book:
            word, number = "Preface", ""
        elif match and match[1].isdigit() and int(match[1]):
            word, number = "Chapter", str(int(match[1]))
        else:
            word = "Appendix"
            number = match[1] if match and not match[1].isdigit() else ""
        if word == "Appendix" and not number:  # 00_figures: the next letter
            number = chr(ord(max(letters, default="@")) + 1)
            letters.append(number)
        book.append(Chapter(file, path, part, word, number, read_cells(path)))
    return book


# --- Outputs -------------------------------------------------------------

def clean_text(text: str) -> str:
    "Printed text without colours, progress bars and overwritten lines."
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip()
             for line in ESCAPES.sub("", text).split("\n")]
    return "\n".join(line for line in lines if not BAR.match(line)).strip("\n")


def simplify(outputs: list) -> list[tuple[str, str]]:
    "Outputs as (kind, content): stdout, stderr, value, svg, png, markdown."
    result = []
    for out in outputs:
        if out["output_type"] == "stream":
            kind, content = out["name"], "".join(out["text"])
        elif out["output_type"] == "error":
            kind, content = "error", out["evalue"]
        else:
            data = {k: "".join(v) if isinstance(v, list) else v
                    for k, v in out["data"].items()}
            plain = data.get("text/plain", "")
            for mime, kind in {
                    "image/svg+xml": "svg", "image/png": "png",
                    "text/markdown": "markdown", "text/plain": "value",
            }.items():
                if mime in data:
                    content = data[mime]
                    break
            else:
                kind, content = "lost", ", ".join(data)
            if kind == "value" and re.match(r"<IPython\..* object>$", plain):
                kind, content = "lost", ", ".join(set(data) - {"text/plain"})
            if any("widget" in mime for mime in data):
                continue
        if kind in ("stdout", "stderr") and result and result[-1][0] == kind:
            content = result.pop()[1] + content
        result.append((kind, content))
    text = ("stdout", "stderr", "value")
    result = [(k, clean_text(c) if k in text else c) for k, c in result]
    return [(k, c) for k, c in result if c]


def width(line: str) -> int:
    "Columns that a line takes on a grid of fixed-width letters."
    return sum(0 if unicodedata.combining(c) else
               1 + (unicodedata.east_asian_width(c) in "WF") for c in line)


def check_cell(cell: Cell) -> list[str]:
    "What is wrong with a cell, whatever the renderer."
    found = []

    def check_width(what: str, text: str) -> None:
        for i, line in enumerate(text.split("\n"), 1):
            if width(line) > COLUMNS:
                found.append(f"line {i} of the {what} has {width(line)} "
                             f"columns, more than {COLUMNS}: {line[:40]}...")

    if cell.kind == "markdown":
        for match in DIALECT.finditer(cell.source):
            if match["fence"]:
                check_width("listing", match["fenced"])
            elif match["html"]:
                found.append(f"raw HTML, which the PDF loses: {match[0]}")
            elif match["link"]:
                found.append(f"a link to {match['href'] or 'nothing'}: write "
                             "@ch-name, @sec-name or a web address")
            elif match["tex"] and "\n\n" in match["tex"].strip():
                found.append("an empty line inside $$ ... $$")
            elif match["figure"] and not match["fig"]:
                found.append(f"the picture {match['src']} has no "
                             "{#fig-label}")
        return found
    found += [f"unknown directive #| {name}"
              for name in cell.directives if name not in DIRECTIVES]
    if cell.has("hide", "default_exp"):
        return found
    check_width("code", cell.source)
    kinds = [kind for kind, _ in cell.outputs]
    for kind, content in cell.outputs:
        if kind in ("stdout", "stderr", "value"):
            check_width("output", content)
            if found_at := re.search(r"\b0x[0-9a-f]{8,}", content):
                found.append(f"the address {found_at[0]} in the output "
                             "changes with every build")
        elif kind == "lost":
            found.append(f"an output that the PDF would lose: {content}")
        elif kind == "markdown":
            found += [f"raw HTML in a table: {m[0]}"
                      for m in DIALECT.finditer(content) if m["html"]]
    label, pictures = cell.directives.get("label", ""), 0
    pictures = kinds.count("svg") + kinds.count("png")
    if cell.has("slow"):
        return found
    for prefix, cap, n in (("fig-", "fig-cap", pictures),
                           ("tbl-", "tbl-cap", kinds.count("markdown"))):
        if label.startswith(prefix) or cell.has(cap):
            if not (label.startswith(prefix) and cell.directives.get(cap)):
                found.append(f"#| label: {prefix}... and #| {cap}: ... "
                             "go together")
            elif n != 1:
                found.append(f"{label} labels one output, but the cell "
                             f"makes {n}")
    if pictures and not label.startswith("fig-"):
        found.append("a picture without #| label: fig-... and #| fig-cap:")
    return found


# --- The two spellings ---------------------------------------------------

def plain(text: str) -> str:
    "A caption as the words of an alternative text, on one line."
    text = re.sub(r"\[(@[^]]*|\^[^]]*)\]|[`*$\\]", "", text)
    return " ".join(text.replace('"', "'").split())


def fence(text: str, info: str) -> str:
    "A fenced block, its fence longer than any inside."
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"\n{ticks}{info}\n{text}\n{ticks}\n"


class Myst:
    "Jupyter Book's spelling."

    def ref(self, text, label):
        return f"{{ref}}`{text} <{label}>`"

    def cite(self, keys):
        return "{cite:p}`" + ",".join(keys) + "`"

    def note(self, mark, chapter):
        return f"[^{mark}]"

    def heading(self, level, title, label, chapter, number):
        target = f"({label})=\n" if label else ""
        return f"{target}{level} {number}{'. ' * bool(number)}{title}"

    def figure(self, caption, alt, src, label, number):
        return fence(f":name: {label}\n:alt: {alt}\n\n"
                     f"**Figure {number}.** {caption}", f"{{figure}} {src}")

    def table(self, rows, caption, label, number):
        caption = " ".join(caption.split())
        return fence(f":name: {label}\n\n{rows}",
                     f"{{table}} **Table {number}.** {caption}")

    def equation(self, tex, label, number):
        return f"\n\n({label})=" + fence(
            f":nowrap:\n\n\\begin{{equation}}\n{tex.strip()}\n"
            f"\\tag{{{number}}}\n\\end{{equation}}", "{math}") + "\n"

    def admonition(self, kind, title, body):
        return fence(f":class: {kind}\n\n{body}", f"{{admonition}} {title}")


class Pandoc:
    "Pandoc's spelling; `book.lua` turns classes and attributes into Typst."

    def ref(self, text, label):
        return f"[{text}](#{label})"

    def cite(self, keys):
        return "[" + "; ".join(f"@{key}" for key in keys) + "]"

    def note(self, mark, chapter):
        return f"[^{chapter.name}-{mark}]"

    def heading(self, level, title, label, chapter, number):
        label = f"#{label} " if label else ""
        word = chapter.word if len(level) == 1 else "Section"
        return (f"\n{level} {title} "
                f'{{{label}number="{number}" word="{word}"}}\n')

    def figure(self, caption, alt, src, label, number):
        return (f"\n![[Figure {number}.]{{.number}} {caption}]({src})"
                f'{{#{label} alt="{alt}"}}\n')

    def table(self, rows, caption, label, number):
        return (f"\n{rows}\n\n: [Table {number}.]{{.number}} {caption} "
                f"{{#{label}}}\n")

    def equation(self, tex, label, number):
        return f'\n\n[$${tex}$$]{{#{label} .equation number="{number}"}}\n\n'

    def admonition(self, kind, title, body):
        return f"\n::: {{.admonition .{kind}}}\n{title}\n\n{body}\n:::\n"


@dataclass
class Label:
    "What a label stands for."
    text: str    # "Figure 4.2"
    number: str  # "4.2"


class Render:
    "One pass over one chapter in one spelling."

    def __init__(self, chapter, writer, labels, keys, drawn: Path,
                 collect=False):
        self.chapter, self.writer, self.labels = chapter, writer, labels
        self.keys, self.drawn, self.collect = keys, drawn, collect
        self.counts = dict.fromkeys(WORDS, 0)
        self.problems, self.cell = [], None

    def complain(self, message: str) -> None:
        self.problems.append(f"{self.cell.where}: {message}")

    def number(self, kind: str, label: str | None) -> str:
        "The next number of its kind; the collecting pass remembers labels."
        self.counts[kind] += 1
        number = f"{self.chapter.number or 0}.{self.counts[kind]}"
        if self.collect and label:
            if not label.startswith(f"{kind}-"):
                self.complain(f"the label {label} must begin with {kind}-")
            shown = f"({number})" if kind == "eq" else number
            self.define(label, f"{WORDS[kind]}\N{NO-BREAK SPACE}{shown}",
                        number)
        return number

    def define(self, label: str, text: str, number: str) -> None:
        if label in self.labels:
            self.complain(f"the label {label} is used twice")
        self.labels[label] = Label(text, number)

    def heading(self, level: str, title: str, label: str | None) -> str:
        chapter, number = self.chapter, ""
        title = self.markdown(title)
        if len(level) == 1:
            label, number = f"ch-{chapter.name}", chapter.number
            if self.collect:
                space = "\N{NO-BREAK SPACE}" if number else ""
                self.define(label, f"{chapter.word}{space}{number}", number)
            if not number and isinstance(self.writer, Pandoc):
                title = chapter.word  # the site's front page is the preface
        elif len(level) == 2 and chapter.number:
            number = self.number("sec", label)
        elif self.collect and label:  # unnumbered: the title is the name
            self.define(label, f"“{plain(title)}”", "")
        return self.writer.heading(level, title, label, chapter, number)

    def ref(self, label: str) -> str:
        if label in self.labels:
            return self.writer.ref(self.labels[label].text, label)
        if not self.collect:
            self.complain(f"unknown reference @{label}")
        return ""

    def cite(self, keys: list[str]) -> str:
        if self.collect:
            for key in set(keys) - self.keys:
                self.complain(f"@{key} is not in references.bib")
        return self.writer.cite(keys)

    def figure(self, caption: str, src: str, label: str) -> str:
        if self.collect and not (self.drawn.parent / src).exists():
            self.complain(f"the picture {src} does not exist")
        number, alt = self.number("fig", label), plain(self.words(caption))
        return self.writer.figure(self.markdown(caption.strip()), alt, src,
                                  label, number)

    def words(self, caption: str) -> str:
        "A caption with the texts of its references."
        return re.sub(r"@([\w-]*\w)", lambda m: self.labels[m[1]].text
                      if m[1] in self.labels else m[0], caption)

    def markdown(self, text: str) -> str:
        "Translate the dialect."
        return DIALECT.sub(self.translate, text)

    def translate(self, m: re.Match) -> str:
        kind, w = m.lastgroup and next(
            k for k in ("fence", "admonition", "heading", "table", "figure",
                        "display", "code", "escape", "math", "cite", "note",
                        "ref", "link", "html") if m[k]), self.writer
        if kind == "admonition":
            name = m["kind"].lower()
            if name not in ("note", "tip", "warning"):
                self.complain(f"unknown admonition {m['kind']}")
            body = re.sub(r"^> ?", "", m["body"], flags=re.M)
            title = self.markdown(m["head"].strip()) or name.capitalize()
            return w.admonition(name, title, self.markdown(body).strip("\n"))
        if kind == "heading":
            return self.heading(m["level"], m["title"], m["sec"])
        if kind == "table":
            number = self.number("tbl", m["tbl"])
            return w.table(self.markdown(m["rows"]).strip("\n"),
                           self.markdown(m["tcap"]), m["tbl"], number)
        if kind == "figure" and m["fig"]:
            return self.figure(m["fcap"], m["src"], m["fig"])
        if kind == "display" and m["eq"]:
            return w.equation(m["tex"], m["eq"], self.number("eq", m["eq"]))
        if kind == "cite":
            return self.cite(re.findall(r"@([\w:.-]+)", m["keys"]))
        if kind == "note":
            return w.note(m["mark"], self.chapter)
        return self.ref(m["to"]) if kind == "ref" else m[0]

    def made(self, kind: str, content: str) -> str:
        "The Markdown for a picture or a table that a cell made."
        given = self.cell.directives
        label = given.get("label", "")
        if kind in ("svg", "png"):
            name = f"{self.chapter.path.stem}-{label}.{kind}"
            if self.collect:
                save_picture(self.drawn / name, content)
            return self.figure(given.get("fig-cap", ""), f"drawn/{name}",
                               label)
        if not label.startswith("tbl-"):
            return f"\n{content}\n"
        number = self.number("tbl", label)
        return self.writer.table(content, self.markdown(given["tbl-cap"]),
                                 label, number)

    def cells(self):
        "Pairs of a shown cell and the blocks that it becomes."
        for cell in self.chapter.cells:
            self.cell = cell
            if cell.kind == "markdown":
                yield self.cell, [("text", self.markdown(self.cell.source))]
            elif not self.cell.has("hide", "default_exp"):
                blocks = []
                if self.cell.directives.get("echo") != "false":
                    blocks.append(("code", self.cell.source))
                for kind, content in self.cell.outputs:
                    if kind in ("svg", "png", "markdown"):
                        blocks.append(("text", self.made(kind, content)))
                    else:
                        blocks.append((kind, content))
                if self.cell.has("slow"):
                    blocks.append(("text", SLOW))
                yield self.cell, blocks


def save_picture(path: Path, content: str) -> None:
    "Write what a cell drew, without the date that some backends add."
    if path.suffix == ".png":
        import base64
        write(path, base64.b64decode(content))
    else:
        write(path, re.sub(r"<dc:date>.*?</dc:date>", "", content))


def write(path: Path, content: str | bytes) -> None:
    "Write only what changed, so that renderers redo only what changed."
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


# --- The two products of staging -----------------------------------------

def site_notebook(render: Render) -> str:
    "A notebook for Jupyter Book."
    cells = []

    def add(kind, source, **more):
        cells.append({"cell_type": kind, "id": f"c{len(cells)}",
                      "metadata": {}, "source": source.strip("\n"), **more})

    for _, blocks in render.cells():
        code = None
        for kind, content in blocks:
            if kind == "text":
                add("markdown", content)
                code = None
                continue
            if kind == "code" or code is None:
                add("code", content if kind == "code" else "",
                    execution_count=1, outputs=[])
                code = cells[-1]
                if kind == "code":
                    continue
                code["metadata"] = {"tags": ["remove-input"]}
            if kind == "value":
                code["outputs"].append({
                    "output_type": "execute_result", "execution_count": 1,
                    "data": {"text/plain": content}, "metadata": {}})
            else:
                code["outputs"].append({
                    "output_type": "stream", "name": kind,
                    "text": content + "\n"})
    return json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5,
                       "metadata": {"kernelspec": {
                           "name": "python3", "display_name": "Python 3",
                           "language": "python"}}}, indent=1) + "\n"


def print_chapter(render: Render) -> str:
    "A chapter for pandoc."
    page = []
    if render.chapter.part:
        number, title = render.chapter.part
        page.append(f'\n# {title} {{word="Part" number="{number}"}}\n')
    infos = {"code": "python", "stderr": " {.stderr}"}
    for _, blocks in render.cells():
        for kind, content in blocks:
            page.append(f"\n{content}\n" if kind == "text" else
                        fence(content, infos.get(kind, " {.output}")))
    return "".join(page)


def stage(book: list[Chapter], toc: Path, bib: Path, out: Path) -> None:
    "Check the executed book and write it for both renderers."
    site, drawn = out / "stage", out / "stage" / "nbs" / "drawn"
    keys = set(re.findall(r"^@\w+\{([^,\s]+)", bib.read_text("utf-8"), re.M))
    for folder in {chapter.path.parent for chapter in book}:
        for file in sorted((folder / "figures").glob("*")):
            write(site / "nbs" / "figures" / file.name, file.read_bytes())
    problems, labels = [], {}
    for chapter in book:
        for cell in chapter.cells:
            problems += [f"{cell.where}: {p}" for p in check_cell(cell)]
    if problems:
        raise BookError("\n".join(dict.fromkeys(problems)))

    def render(writer, collect=False):
        for chapter in book:
            yield Render(chapter, writer, labels, keys, drawn, collect)

    for one in render(Pandoc(), collect=True):
        list(one.cells())
        problems += one.problems
    pages = []
    for one in render(Pandoc()):
        pages.append(print_chapter(one))
        problems += one.problems
    if problems:
        raise BookError("\n".join(dict.fromkeys(problems)))
    pages.append('\n# Bibliography {word="Bibliography" number=""}\n')
    write(out / "print" / "book.md", "\n".join(pages))
    for one in render(Myst()):
        write(site / f"{one.chapter.file}.ipynb", site_notebook(one))
    write(site / "references.bib", bib.read_bytes())
    write(site / "references.md",
          "# Bibliography\n\n```{bibliography}\n```\n")
    content = yaml.safe_load(toc.read_text("utf-8"))
    last = content["parts"][-1] if content.get("parts") else content
    last["chapters"].append({"file": "references"})
    write(site / "_toc.yml", yaml.safe_dump(content, sort_keys=False))
    remove_strangers(site / "nbs", {c.path.name for c in book})


def remove_strangers(folder: Path, names: set[str]) -> None:
    "Delete staged notebooks that are no longer in the book."
    for file in folder.glob("*.ipynb"):
        if file.name not in names:
            file.unlink()
    shutil.rmtree(folder / ".ipynb_checkpoints", ignore_errors=True)
