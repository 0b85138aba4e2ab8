"""Where the time of the chapters and of `make study` goes: `make profile`, or `python bench/chapters.py
23_importance "make study"` for some of them.

Writes chapters.md, the tables, and chapters.json, the numbers behind them. A chapter runs as in `make test`: in a
process
of its own with one thread, as many at once as there are cores. The study runs alone, with all cores, under cProfile.
"""

import cProfile
import json
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "nbs"), str(HERE.parent)]
STUDY = "make study"


def section_seconds(path: Path) -> dict[str, float]:
    "Seconds of each section of a chapter, run in this process as `nbdev_test` does."
    from _run import is_skipped
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor

    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    shell, found, section = CaptureShell(path, mpl_format="png"), {}, "top"
    for cell in NBProcessor(path, rm_directives=False).nb.cells:
        if cell.cell_type == "markdown":
            section = (re.findall(r"^#+ (.*)$", cell.source, re.M) or [section])[-1]
        if is_skipped(cell):
            continue
        start = time.perf_counter()
        shell.cell(cell)
        if shell.exc:
            raise shell.exc from None
        found[section] = found.get(section, 0.0) + time.perf_counter() - start
    return found


def study_seconds() -> dict[str, float]:
    "Seconds of the package's functions, with what they call, in a study of the bundled model in this process."
    from avss_nb.report import run_study

    with tempfile.TemporaryDirectory() as folder, cProfile.Profile() as profile:
        run_study("smollm2-135m", out=Path(folder) / "study", data=os.environ.get("AVSS_NB_DATA"))
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return {
        f"{Path(file).stem}.{name}": seconds
        for (file, _, name), (*_, seconds, _) in stats.items()
        if Path(file).parent.name == "avss_nb" and name[0] != "<"
    }


def apart(name: str, threads: int) -> dict[str, float]:
    "The same in a fresh process; the dearest first."
    done = subprocess.run(
        [sys.executable, __file__, "--one", name],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1"),
    )
    if done.returncode:
        raise SystemExit(f"{name} does not run\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {total(name, found):.0f} s", flush=True)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def total(name: str, found: dict[str, float]) -> float:
    "Seconds of a whole: sections follow each other, functions hold each other."
    return max(found.values()) if name == STUDY else sum(found.values())


def page(found: dict[str, dict[str, float]], machine: dict) -> str:
    "The page: one row per chapter with its two dearest sections, and one row per function of the study."
    chapters = {name: parts for name, parts in sorted(found.items()) if name != STUDY}
    lines = [
        "# Where the time goes",
        "",
        (
            "Written by `make profile`. {cpu}, {cores} cores, torch {versions[torch]}, transformers "
            "{versions[transformers]}, Python {python}."
        ).format_map(machine),
        "",
        "## Chapters",
        "",
        "Seconds of one thread, with another chapter beside it, as in `make test`.",
        "",
        "| chapter | seconds | its dearest sections |",
        "| --- | ---: | --- |",
    ]
    for name, parts in chapters.items():
        lines.append(
            
                f"| {name} | {total(name, parts):.0f} | "
                f"{'; '.join(f'{part} ({seconds:.0f})' for part, seconds in list(parts.items())[:2] if seconds >= 1)} "
                f"|"
            
        )
    lines.append(f"| all | {sum(total(name, parts) for name, parts in chapters.items()):.0f} | |")
    if STUDY in found:
        lines += [
            "",
            f"## `{STUDY}`",
            "",
            f"{total(STUDY, found[STUDY]):.0f} seconds under the profiler, alone, with all cores.",
            "",
            "| function, with what it calls | seconds |",
            "| --- | ---: |",
        ]
        lines += [f"| `{name}` | {seconds:.0f} |" for name, seconds in found[STUDY].items()]
    return "\n".join(lines) + "\n"


def main(names: list[str]):
    from _run import chapters
    from run import machine

    store = HERE / "chapters.json"
    found = json.loads(store.read_text()) if names and store.exists() else {}
    names = names or [*(path.stem for path in chapters()), STUDY]
    some = [name for name in names if name != STUDY]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found |= dict(zip(some, pool.map(lambda name: apart(name, 1), some)))
    if STUDY in names:
        found[STUDY] = dict(list(apart(STUDY, os.cpu_count() or 1).items())[:20])
    store.write_text(
        json.dumps(
            {name: {part: round(seconds, 1) for part, seconds in found[name].items()} for name in sorted(found)},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )
    (HERE / "chapters.md").write_text(page(found, machine()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(
            json.dumps(
                study_seconds()
                if sys.argv[2] == STUDY
                else section_seconds(HERE.parent / "nbs" / f"{sys.argv[2]}.ipynb")
            )
        )
    else:
        main(sys.argv[1:])
