"""Run chapters and store their outputs in them: the one writer of stored outputs.

    python nbs/_run.py                    every chapter, in reading order
    python nbs/_run.py nbs/13_metrics.ipynb nbs/22_pruning.ipynb
    AVSS_NB_FULL=1 AVSS_NB_MODEL=gemma3-270m python nbs/_run.py nbs/28_study_layers.ipynb

Each notebook runs in a process of its own, in the folder `nbs`, and skips the cells that `nbdev_test` skips. The same
run twice writes the same bytes. A notebook is written only when it ran through and its outputs are fit to keep: no
warning, no traceback, no path of this machine. Another model's tables (AVSS_NB_MODEL) are measured, and no output kept.
"""

import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from execnb.nbio import nb2str
from execnb.shell import CaptureShell
from fastcore.basics import str2bool
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

NBS = Path(__file__).resolve().parent


def chapters() -> list[Path]:
    "Every notebook of the project in reading order; names that begin with _ or . are no chapters."
    found = sorted(p for p in NBS.glob("*.ipynb") if p.name[0] not in "_.")
    return sorted(found, key=lambda p: p.name != "index.ipynb")


def is_skipped(cell) -> bool:
    "Whether `nbdev_test` would leave this cell alone."
    if cell.cell_type != "code" or "nbdev_export(" in cell.source:
        return True
    directives = cell.directives_ or {}
    return directives.get("eval:", [""])[:1] == ["false"] or bool(
        set(get_config().tst_flags.split()) & directives.keys()
    )


def skips_all(path: Path) -> bool:
    "Whether the notebook's front matter says `skip_exec: true`."
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    return str2bool(getattr(nb, "frontmatter_", {}).get("skip_exec", False))


def output_text(output: dict) -> str:
    "What one output shows, images left out."
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if not k.startswith("image/"))]
    return "".join("".join(p) if isinstance(p, list) else str(p) for p in parts)


def machine_path() -> re.Pattern:
    "A pattern for paths that tell where a notebook ran and have no place in a stored output."
    folders = {Path.home(), NBS.parent, Path(sys.prefix), Path(tempfile.gettempdir())}
    names = {"/home", "/root", "/Users", "/tmp", *map(str, folders), *(str(f.resolve()) for f in folders)} - {
        "/",
        "/usr",
    }
    return re.compile(
        rf"(?<![\w.:/])(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?:/[\w./-]*|(?![\w/-]))"
    )


def output_problems(cell) -> list[str]:
    "Why a code cell's outputs are not fit to keep: an error, a warning, a traceback, a path of this machine."
    problems = []
    for output in cell.get("outputs", []):
        text = output_text(output)
        words = ["Traceback", "Warning" if output.get("name") == "stderr" else "Warning: "]
        if output["output_type"] == "error":
            problems.append(f"raises {output['ename']}: {output['evalue']}")
        problems += [f"shows: {line.strip()}" for line in text.splitlines() if any(w in line for w in words)]
        problems += [f"shows the path {path}" for path in machine_path().findall(text)]
    return problems


def other_model() -> str:
    "The model that a study is to measure in the place of the bundled one, which its prose is about; empty without."
    return os.environ.get("AVSS_NB_MODEL", "")


def up_to_tables(cells: list) -> list:
    "The cells of a study up to the one that measures its tables."
    measuring = [
        number for number, cell in enumerate(cells, 1) if "AVSS_NB_FULL" in cell.source and cell.cell_type == "code"
    ]
    if not measuring:
        raise ValueError("a chapter that is no study takes no other model: leave AVSS_NB_MODEL out")
    return cells[: measuring[0]]


def run_notebook(path: Path) -> tuple[str, list[str]]:
    "Run one notebook in this process; give its new text and what is wrong with its outputs."
    os.environ["IN_TEST"] = "1"  # as nbdev_test: calls that would export or index do nothing
    config = get_config()
    nb = NBProcessor(path, rm_directives=False).nb
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    if other_model():
        try:
            nb.cells = up_to_tables(nb.cells)
        except ValueError as error:
            return "", [str(error)]
    shell = CaptureShell(path, mpl_format="png")
    sys.path.insert(0, str(config.config_path))
    try:
        if not skips_all(path):
            shell.run_all(nb, exc_stop=True, preproc=is_skipped)
    except Exception:
        return "", [shell.prettytb(fname=path.name)]
    problems = []
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code":
            continue
        problems += [f"cell {number} ({cell.id}) {p}" for p in output_problems(cell)]
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    clean_nb(
        nb,
        config.clear_all,
        config.allowed_metadata_keys.split(),
        config.allowed_cell_metadata_keys.split(),
        config.clean_ids,
    )
    return nb2str(nb), problems


def store(path: Path):
    "Run one notebook and put its outputs in its file, all or nothing; leave the process with 1 where that fails."
    start = time.perf_counter()
    text, problems = run_notebook(path)
    if problems:
        print(f"{path.name}: not stored\n  " + "\n  ".join(problems), file=sys.stderr)
        sys.exit(1)
    if other_model():
        print(f"{path.name}: tables of {other_model()}, {time.perf_counter() - start:.0f} s", flush=True)
        return
    changed = text != path.read_text(encoding="utf-8")
    if changed:
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    print(f"{path.name}: {'stored' if changed else 'as before'}, {time.perf_counter() - start:.0f} s", flush=True)


def main(names: list[str]) -> int:
    "Run the named notebooks, or all; give 1 where one of them failed."
    paths = [Path(n).resolve() for n in names] or chapters()
    os.chdir(NBS)
    os.environ["COLUMNS"] = "100"  # tables are as wide on every terminal
    failed = []
    for path in paths:
        process = multiprocessing.get_context("spawn").Process(target=store, args=(path,))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(path.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
