"""Which stored numbers move with the processor's kernels, and by how much: `python bench/kernels.py [chapter …]`.

Every table of the chapters is measured anew under several sets of kernels, with one and with two threads, and compared
with what is stored. Writes kernels.json and kernels.md. All chapters take some hours; a run that was stopped resumes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KERNELS = {
    "own": {},
    "AVX2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "plain": dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2"),
}
THREADS = (1, 2)


def chapters(names: list[str]) -> list[str]:
    "The chapters that store tables, or those of them that are named."
    stored = {file.parent.name for file in (ROOT / "nbs" / "results").glob("*/*.json")}
    found = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb") if path.stem in stored)
    return [name for name in found if not names or name in names]


def moved(stored: Path, fresh: Path) -> list[dict]:
    "For each column of numbers of a chapter's tables: its largest difference, as a part of its largest value."
    rows = []
    for file in sorted(stored.glob("*.csv")):
        old, new = pd.read_csv(file), pd.read_csv(fresh / file.name)
        for column in old.select_dtypes("number"):
            off, size = (new[column] - old[column]).abs().max(), old[column].abs().max()
            rows.append(dict(table=file.stem, column=column, relative=float(off / size) if size else float(off)))
    return rows


def measure(chapter: str, kernels: str, threads: int) -> dict:
    "Measure a chapter's tables anew in a copy of the project: whether it passes, and what moved."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "_docs", "_proc"))
        environment = os.environ | KERNELS[kernels] | dict(OMP_NUM_THREADS=str(threads))
        environment |= dict(AVSS_NB_FRESH="store", PYTHONPATH=str(ROOT))
        command = [Path(sys.executable).with_name("nbdev_test"), "--path", f"{chapter}.ipynb"]
        done = subprocess.run(command, cwd=copy / "nbs", env=environment, capture_output=True, text=True)
        tables = [folder / "nbs" / "results" / chapter for folder in (ROOT, copy)]
        return dict(passed=done.returncode == 0, error=done.stderr[-800:], moved=moved(*tables))


def row(chapter: str, runs: dict[str, dict]) -> str:
    "One line of the table: what moved most in each run, and whether every assertion held."
    cells = []
    for run in runs.values():
        largest = max(run["moved"], key=lambda m: m["relative"], default=None)
        shown = (
            "nothing" if not largest or not largest["relative"] else f"{largest['column']} {largest['relative']:.1e}"
        )
        cells.append(shown + ("" if run["passed"] else " *red*"))
    return f"| {chapter} | " + " | ".join(cells) + " |"


def page(results: dict[str, dict[str, dict]]) -> str:
    "kernels.md: a row is a chapter, a column a set of kernels with a number of threads."
    names = list(next(iter(results.values()), {}))
    lines = [
        "# What moves with the kernels",
        "",
        "Written by `python bench/kernels.py`. For each chapter: the column of a stored table that moved most when it",
        "was measured anew, and by which part of its largest value; *red* where an assertion did not hold.",
        "",
        "| chapter | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    return "\n".join(lines + [row(chapter, runs) for chapter, runs in sorted(results.items())]) + "\n"


def main(names: list[str]) -> None:
    "Measure what is not measured yet, and write both files after each run."
    file = HERE / "kernels.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for chapter in chapters(names):
        for kernels in KERNELS:
            for threads in THREADS:
                runs = results.setdefault(chapter, {})
                run = f"{kernels}, {threads} thread{'s' * (threads > 1)}"
                if run not in runs:
                    runs[run] = measure(chapter, kernels, threads)
                    file.write_text(json.dumps(results, indent=1), encoding="utf-8")
                    (HERE / "kernels.md").write_text(page(results), encoding="utf-8")
                    print(f"{chapter}, {run}: {'passed' if runs[run]['passed'] else 'RED'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
