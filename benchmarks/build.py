"""Time to build the book: from nothing, again, and after one word of prose.

Works in a fresh clone of the last commit, with an environment of its own.
Usage: python benchmarks/build.py
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def timed(command, folder):
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return time.perf_counter() - began


def change_a_word(folder):
    path = folder / "nbs" / "04_attention.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in book["cells"][3:] if c["cell_type"] == "markdown")
    cell["source"][0] = "Indeed: " + cell["source"][0]
    text = json.dumps(book, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main():
    grid = Table(title="make book")
    grid.add_column("build")
    grid.add_column("seconds", justify="right")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "book"
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        make = ["make", "book"]
        grid.add_row("from nothing", f"{timed(make, folder):.0f}")
        grid.add_row("again", f"{timed(make, folder):.0f}")
        change_a_word(folder)
        grid.add_row("one word of prose", f"{timed(make, folder):.0f}")
    Console().print(grid)


if __name__ == "__main__":
    main()
