"""The site: Jupyter Book on the staged pages, warnings are errors.

What the pages need lies beside them: MathJax from a wheel, the theme's
scripts and icons, our fonts. Nothing is fetched from anywhere else.
"""
import contextlib
import gc
import hashlib
import io
import re
import shutil
import weakref
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from book.stage import BookError

HERE = Path(__file__).resolve().parent
MATHJAX = ["tex-svg.js", "input/tex/extensions"]
HOME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}">
<link rel="canonical" href="{page}"></head>
<body><p><a href="{page}">{title}</a></p></body></html>
"""


def sources(staged: Path) -> list[Path]:
    "The pages, before they are rendered."
    return sorted([*staged.rglob("*.ipynb"), *staged.rglob("*.md")])


def shared(staged: Path, toc: Path) -> str:
    "A digest of what many pages show: if it changes, all are written again."
    total = hashlib.sha256(toc.read_bytes())
    names = re.compile(r"\n:name: [\w-]+|\([\w-]+\)=|\n#+ .*|{cite:.}`[^`]+")
    for path in sources(staged):  # for sidebar, links and bibliography
        text = path.read_text("utf-8").replace("\\n", "\n")
        total.update("\n".join([path.name, *names.findall(text)]).encode())
    for path in sorted((HERE / "_static").rglob("*.*")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def put(source: Path, target: Path) -> None:
    "Copy a file or folder unless it is there."
    if source.is_dir():
        for path in source.iterdir():
            put(path, target / path.name)
    elif not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def overrides(staged: Path, toc: Path, downloads: list[Path]) -> dict:
    "What the configuration takes from elsewhere."
    parser = ConfigParser(delimiters=["="])
    parser.read(HERE.parent / "settings.ini", encoding="utf-8")
    book, static = parser["DEFAULT"], HERE / "_static"
    return {
        "project": book["title"], "html_title": book["title"],
        "author": book["author"], "copyright": book["copyright"],
        "version": book["version"], "release": book["version"],
        "html_logo": str(static / "logo.svg"),
        "html_favicon": str(static / "logo.svg"),
        "html_theme_options": {"logo": {"text": book["title"],
                                        "alt_text": ""}},
        "html_static_path": [str(static)],
        "html_css_files": ["book.css"], "html_js_files": ["book.js"],
        "templates_path": [str(HERE / "_templates")],
        "html_context": {"shared": shared(staged, toc),
                         "downloads": [path.name for path in downloads]},
        "external_toc_path": str(toc),
        "nitpicky": True,
        "latex_individualpages": False,
    }


def living_objects() -> list:
    "Every object but weak proxies, which raise if what they name is gone."
    return [thing for thing in gc.get_objects()
            if type(thing) not in weakref.ProxyTypes]


def build_html(staged: Path, toc: Path, out: Path) -> None:
    "Render the staged pages into `out`; only what changed is written."
    from jupyter_book.sphinx import build_sphinx
    from sphinx.util.console import nocolor
    from sphinx_external_toc import collectors

    # its search for a collector asks every object there is for its class
    collectors.gc = SimpleNamespace(get_objects=living_objects)
    doctrees, said = out.parent / "cache" / "doctrees", io.StringIO()
    downloads = sorted(path for kind in ("*.pdf", "*.epub")
                       for path in out.parent.glob(kind))
    nocolor()
    with contextlib.redirect_stderr(said):
        failed = build_sphinx(
            staged, out, path_config=HERE / "_config.yml", noconfig=True,
            confoverrides=overrides(staged, toc, downloads),
            doctreedir=doctrees, quiet=True, warningiserror=True,
            keep_going=True)
    if failed:
        shutil.rmtree(doctrees, ignore_errors=True)  # or it warns only once
        raise BookError(f"Jupyter Book: {said.getvalue().strip()}")
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent
    for name in MATHJAX:
        put(mathjax / "static" / "mathjax" / name,
            out / "_static" / "mathjax" / name)
    for path in downloads:
        put(path, out / "downloads" / path.name)
    for old in [*out.glob("*.html"), *out.glob("nbs/*.html")]:
        page = staged / old.relative_to(out)
        if old.stem != "search" and not any(
                page.with_suffix(kind).exists() for kind in (".ipynb", ".md")):
            old.unlink()  # of a chapter that is gone
    home = re.search(r"^root: *(\S+)", toc.read_text("utf-8"), re.M)[1]
    title = overrides(staged, toc, [])["project"]
    (out / "index.html").write_text(
        HOME.format(title=title, page=f"{home}.html"), encoding="utf-8")
