"""Run the notebooks, each in a fresh kernel, and remember what they said.

Outputs are kept in a cache folder under a key made of everything that they
depend on: the code of the cells (not the prose, not the `#|` lines), the
modules of the package that the code imports, the data files it names, and
the pins. A build in which no key changed executes nothing.
"""
import ast
import asyncio
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook
from tqdm import tqdm

from book.stage import ESCAPES, BookError, Cell, Chapter, simplify

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llm_from_scratch"
PINS = [ROOT / "constraints.txt", ROOT / PACKAGE / "data-requirements.txt"]


def executed(chapter: Chapter) -> list[Cell]:
    "The cells that run: code, but not what is marked as slow."
    return [cell for cell in chapter.cells
            if cell.kind == "code" and not cell.has("slow")]


def modules(source: str, root: Path) -> dict[str, str]:
    "The package's modules that code needs, with their meaning."
    found, todo = {}, [source]
    while todo:
        source = todo.pop()
        names = {"cli"} if "llm-from-scratch" in source else set()
        try:
            tree = ast.parse(source)
        except SyntaxError:  # running it will tell where
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(f"{PACKAGE}.")[2]
                          for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(f"{PACKAGE}.")[2])
                if node.module == PACKAGE:
                    names |= {alias.name for alias in node.names}
        for name in names - {""} - set(found):
            file = root / PACKAGE / f"{name}.py"
            if file.exists():
                todo.append(file.read_text("utf-8"))
                found[name] = ast.dump(ast.parse(todo[-1]))
    return found


def cache_key(chapter: Chapter, root: Path = ROOT, pins=PINS) -> str:
    "Changes with whatever could change an output."
    python = TransformerManager().transform_cell  # `!ls` becomes Python
    sources = [python(cell.source) for cell in executed(chapter)]
    code = "\n".join(sources)
    parts = [sys.version, platform.machine(), *sources]
    parts += [f"{k} {v}" for k, v in sorted(modules(code, root).items())]
    data = sorted((chapter.path.parent / "data").glob("*"))
    files = [file for file in data if file.name in code] + list(pins)
    parts += [hashlib.sha256(file.read_bytes()).hexdigest()
              for file in files if file.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def environment(root: Path) -> dict[str, str]:
    "The same for every run: one thread, plain text, our package first."
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    path = [str(root), env.get("PYTHONPATH", "")]
    programs = [str(Path(sys.executable).parent), env.get("PATH", "")]
    return env | {
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm wants widgets
        "COLUMNS": "79", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1",
        "IPYTHONDIR": tempfile.gettempdir(),  # not the reader's own
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PATH": os.pathsep.join(filter(None, programs)),
    }


async def run(chapter: Chapter, root: Path) -> list[list[dict]]:
    "The outputs of each executed cell."
    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
              "{connection_file}"],
        display_name="Python", language="python")
    cells = executed(chapter)
    if not cells:
        return []
    notebook = new_notebook(cells=[new_code_cell(c.source) for c in cells])
    client = NotebookClient(notebook, km=manager, timeout=None)
    cell = cells[0]
    try:
        await client.async_start_new_kernel(
            cwd=str(chapter.path.parent), env=environment(root),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await client.async_start_new_kernel_client()
        for i, cell in enumerate(cells):  # noqa: B007
            await client.async_execute_cell(notebook.cells[i], i)
    except CellExecutionError as error:
        lines = ESCAPES.sub("", error.traceback).splitlines()
        arrow = [line.strip() for line in lines if line.startswith("-")
                 and "> " in line]
        raise BookError(f"{cell.where}: {error.ename}: {error.evalue}\n"
                        f"    {arrow[0] if arrow else ''}") from None
    except DeadKernelError:
        raise BookError(f"{cell.where}: the kernel died") from None
    finally:
        if client.kc:
            client.kc.stop_channels()
        if manager.has_kernel:
            await manager.shutdown_kernel(now=True)
    return [list(cell.outputs) for cell in notebook.cells]


def last_duration(chapter: Chapter, cache: Path) -> float:
    "Seconds that the chapter took the last time; unknown counts as long."
    files = cache.glob(f"{chapter.path.stem}-*.json")
    newest = max(files, key=os.path.getmtime, default=None)
    return json.loads(newest.read_text())["seconds"] if newest else 1e6


async def run_all(todo: list, cache: Path, jobs: int, root: Path) -> None:
    "Execute (chapter, file for its outputs) pairs, the longest first."
    limit, problems, running = asyncio.Semaphore(jobs), [], []
    bar = tqdm(total=len(todo), unit="chapter", desc="executing")

    async def work(chapter, file):
        async with limit:
            running.append(chapter.path.stem)
            bar.set_postfix_str(", ".join(running))
            start = time.monotonic()
            try:
                outputs = await run(chapter, root)
                text = json.dumps({"seconds": time.monotonic() - start,
                                   "outputs": outputs})
                file.write_text(text)
            except BookError as error:
                problems.append(str(error))
            finally:
                running.remove(chapter.path.stem)
                bar.set_postfix_str(", ".join(running))
                bar.update()

    todo = sorted(todo, key=lambda pair: -last_duration(pair[0], cache))
    with bar:
        await asyncio.gather(*(work(*pair) for pair in todo))
    if problems:
        raise BookError("\n".join(problems))


def kept_outputs(chapter: Chapter, cache: Path, root: Path = ROOT) -> Path:
    "Where the outputs stand if the notebook as it is now ran to its end."
    return cache / f"{chapter.path.stem}-{cache_key(chapter, root)}.json"


def execute(book: list[Chapter], cache: Path, jobs: int = 2,
            root: Path = ROOT) -> list[str]:
    "Fill in the outputs of every cell; return the notebooks that had to run."
    cache.mkdir(parents=True, exist_ok=True)
    files = [(chapter, kept_outputs(chapter, cache, root)) for chapter in book]
    todo = [(chapter, file) for chapter, file in files if not file.exists()]
    if todo:
        asyncio.run(run_all(todo, cache, jobs, root))
    for chapter, file in files:
        outputs = json.loads(file.read_text("utf-8"))["outputs"]
        for cell, raw in zip(executed(chapter), outputs, strict=True):
            cell.outputs = simplify(raw)
    return [chapter.path.stem for chapter, _ in todo]
