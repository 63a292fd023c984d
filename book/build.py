"""Build the book: `python book/build.py all|html|pdf|epub|wheel|stage|test`.

Notebooks are executed and staged, then each product is made, unless nothing
that it depends on has changed since it was made last. `test` gives nbdev_test
the notebooks that no build has run to the end as they are now.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")  # 2026-01-01
sys.path[0] = str(Path(__file__).resolve().parents[1])
from book.execute import ROOT, execute, kept_outputs  # noqa: E402
from book.stage import BookError, Chapter, read_book, stage  # noqa: E402

HERE = ROOT / "book"
NAME = "llm-from-scratch"
# What Markdown means: as on the site, which follows CommonMark.
DIALECT = "-".join("""
markdown+lists_without_preceding_blankline blank_before_blockquote
blank_before_header definition_lists example_lists fancy_lists grid_tables
implicit_header_references inline_notes latex_macros line_blocks
multiline_tables pandoc_title_block raw_html raw_tex simple_tables strikeout
subscript superscript yaml_metadata_block
"""[1:-1].replace("\n", " ").split(" "))
PANDOC = ["--from", DIALECT,
          "--columns", "10000", "--citeproc", "--fail-if-warnings",
          "--metadata", "link-citations=true",
          "--lua-filter", str(HERE / "book.lua")]


def settings() -> dict[str, str]:
    "The metadata of the book."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def digest(*paths: Path) -> str:
    "Of the contents of files and folders."
    total = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(str(file.relative_to(path.parent)).encode())
                total.update(file.read_bytes())
    return total.hexdigest()


def pandoc(source: Path, target: Path, out: Path, *options: str) -> None:
    "Run pandoc on the book."
    import pypandoc

    conf = settings()
    bib = out / "stage" / "references.bib"
    command = [pypandoc.get_pandoc_path(), str(source), "-o", str(target),
               *PANDOC, "--bibliography", str(bib),
               "--metadata", f"title={conf['title']}",
               "--metadata", f"author={conf['author']}",
               "--metadata", "lang=en", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BookError(f"pandoc: {done.stderr.strip()}")


def build_pdf(out: Path) -> Path:
    "Pandoc to Typst, Typst to PDF, with our template and the wheel's fonts."
    import typst

    folder, conf = out / "typst", settings()
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "template.typ", folder)
    source, target = folder / "book.typ", out / f"{NAME}.pdf"
    pandoc(out / "print" / "book.md", source, out, "--to", "typst",
           "--standalone", "--template", str(HERE / "main.typ"),
           "--variable", f"version={conf['version']}",
           "--variable", f"copyright={conf['copyright']}",
           "--variable", f"description={conf['description']}",
           "--variable", f"address={conf['git_url']}")
    try:
        compiler = typst.Compiler(root=str(out), ignore_system_fonts=True)
        pdf, warnings = compiler.compile_with_warnings(
            str(source), pdf_standards=["ua-1"])
    except typst.TypstError as error:
        raise BookError(f"typst: {error.diagnostic}") from None
    if warnings:
        raise BookError("\n".join(f"typst: {w.diagnostic}" for w in warnings))
    target.write_bytes(pdf)
    return target


def build_epub(out: Path) -> Path:
    "The same text as an EPUB, formulas as MathML."
    target = out / f"{NAME}.epub"
    pandoc(out / "print" / "book.md", target, out, "--to", "epub3",
           "--mathml", "--toc", "--toc-depth", "2", "--split-level", "1",
           "--metadata", f"identifier={settings()['git_url']}",
           "--resource-path", str(out / "stage" / "nbs"),
           "--css", str(HERE / "epub.css"))
    return target


def build_site(out: Path) -> Path:
    "Jupyter Book."
    from book.html import build_html
    build_html(out / "stage", out / "stage" / "_toc.yml", out / "html")
    return out / "html" / "index.html"


def build_wheel(out: Path) -> Path:
    "The package."
    for old in (ROOT / "dist").glob("*.whl"):
        old.unlink()
    done = subprocess.run([sys.executable, "-m", "build", "--wheel",
                           "--no-isolation", str(ROOT)],
                          capture_output=True, text=True)
    if done.returncode:
        raise BookError(f"wheel: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return next((ROOT / "dist").glob("*.whl"))


BUILDERS = {"pdf": build_pdf, "epub": build_epub, "html": build_site,
            "wheel": build_wheel}


def inputs(product: str, out: Path) -> list[Path]:
    "What a product depends on."
    if product == "wheel":
        return [ROOT / "llm_from_scratch", ROOT / "settings.ini",
                ROOT / "setup.py", ROOT / "pyproject.toml",
                ROOT / "README.md"]
    common = [out / "stage", ROOT / "settings.ini", ROOT / "constraints.txt"]
    if product == "html":  # which offers the other two
        return [*common, HERE, *sorted(out.glob(f"{NAME}.*"))]
    return [*common, HERE, out / "print" / "book.md"]


def make(product: str, out: Path) -> str:
    "Make a product if it is not up to date; a line that says where it lies."
    start, note = time.monotonic(), out / "cache" / f"{product}.made"
    note.parent.mkdir(parents=True, exist_ok=True)
    known = note.read_text().split("\n") if note.exists() else ["", ""]
    now = digest(*inputs(product, out))
    fresh = known[0] == now and Path(known[1]).exists()
    path = Path(known[1]) if fresh else BUILDERS[product](out)
    note.write_text(f"{now}\n{path}")
    size = path.stat().st_size
    if product == "html":
        size = sum(f.stat().st_size for f in path.parent.rglob("*")
                   if f.is_file())
    took = ("unchanged" if fresh else f"{time.monotonic() - start:.0f} s")
    shown = os.path.relpath(path)
    return f"{product:<6}{shown:<40}{size / 2**20:6.1f} MB  {took}"


def test(book: list[Chapter], cache: Path) -> int:
    "Run what no build has run: a cell that fails leaves no outputs there."
    stems = [chapter.path.stem for chapter in book
             if not kept_outputs(chapter, cache).exists()]
    passed = len(book) - len(stems)
    if passed:
        print(f"{passed} notebooks ran to their end when the book was built")
    if not stems:
        return 0
    command = Path(sys.executable).with_name("nbdev_test")
    return subprocess.run([command, "--n_workers", "2", "--file_re",
                           rf"^({'|'.join(stems)})\.ipynb$"]).returncode


def main() -> int:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("product", choices=["all", "stage", "test", *BUILDERS])
    parser.add_argument("--toc", type=Path, default=ROOT / "_toc.yml")
    parser.add_argument("--out", type=Path, default=ROOT / "_build")
    args = parser.parse_args()
    names = list(BUILDERS) if args.product == "all" else [args.product]
    out = args.out.resolve()
    try:
        if args.product == "test":
            return test(read_book(args.toc.resolve()), out / "cache")
        if args.product != "wheel":
            book = read_book(args.toc.resolve())
            execute(book, out / "cache")
            stage(book, args.toc.resolve(), HERE / "references.bib", out)
        lines = [make(name, out) for name in names if name != "stage"]
    except BookError as error:
        print(f"\nThe book was not built:\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished chapters are kept", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
