"""Code that a newcomer reads aloud: short lines, short cells, one statement a line, and the field's words."""

import ast
import csv
import re
import subprocess
import sys

import pytest
from nbdev.process import NBProcessor

import _run
from conftest import NBS, ROOT

CHAPTERS = _run.chapters()
MODULES = sorted(p for p in (ROOT / "avss_nb").glob("*.py") if not p.stem.startswith("_"))
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
LONGEST_LINE, LONGEST_CELL = 120, 25


def test_lines_and_statements():
    """Of package, tests, benches and the code of notebooks: at most 120 characters, one statement, no lambda with a
    name."""
    notebooks = sorted(str(path) for path in NBS.glob("*.ipynb"))
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--line-length", str(LONGEST_LINE)]
    command += ["--output-format", "concise", "--select", "E501,E701,E702,E731", "--exclude", "_modidx.py"]
    done = subprocess.run(
        [*command, "avss_nb", "tests", "bench", "nbs", *notebooks], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    wrong = [line for line in done.stdout.splitlines() if re.match(r"\S+:\d+:\d+: |\S+ipynb:cell", line)]
    wrong = [line for line in wrong if not exported_names(line)]
    assert not wrong, "\n".join(wrong)


def exported_names(finding: str) -> bool:
    "Whether a finding is about the list of names that nbdev writes at the top of a module."
    file, line = finding.split(":")[:2]
    if not file.startswith("avss_nb/"):
        return False
    return (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1].startswith("__all__")


def exported(chapter) -> list:
    "The cells that a chapter exports, with their lines of code."
    cells = [cell for cell in NBProcessor(chapter).nb.cells if cell.cell_type == "code"]
    return [cell for cell in cells if {"export", "exporti"} & (cell.directives_ or {}).keys()]


def lines_of(cell) -> list[str]:
    "Without the `#|` lines."
    return [line for line in cell.source.strip("\n").splitlines() if not line.startswith("#|")]


@each_chapter
def test_exported_cells_are_short(chapter):
    long = []
    for cell in exported(chapter):
        if len(lines_of(cell)) > LONGEST_CELL:
            long.append(f"{cell.id}: {len(lines_of(cell))} lines, {lines_of(cell)[0]}")
    assert not long, "\n".join(long)


# What the first edition called things (left column of the table of words), as patterns for public places.
HOME_MADE = [
    r"by lot",
    r"look(s|ing)? ahead",
    r"avss_ahead|influence_ahead|read_ahead|FROM_AHEAD",
    r"leave-one-out damage|the damage",
    r"(?<!base )whole model|untouched|nothing removed",
    r"\barms?\b|run_arms",
    r"language-model term alone",
    r"\bown words\b",
    r"right choices|by choosing",
    r"inputs left out",
    r"\bpiles? of (blocks|layers)|\bpile\b",
    r"nats? a token|\ba row an?\b|bins a doubling",
    r"four times in five",
    r"\bsettl(ed|ing)\b",
    r"\bcorrections\b",
    r"\bdealt\b|\b_dealt\b",
    r"AVSS, output\b|avss_authors",
    r"\bgolds\b",
    r"\bsuspicious\b|\bcalm\b",
    r"old / new|\bold over new\b",
    r"_own_dice|_twin\b|_silence\b",
    r"claim_folder|check_folder|stored_table|write_whole",
    r"layer_contrast",
    r"can go\b(?! wrong)",
    r"score(s)? knows?\b",
    r"\bclear of zero\b|cannot be told from",
    r"\bruins?\b|\bwrecks?\b",
    r"\bcards\b",
    r"\bby_column\b",
]
HOME_MADE = re.compile("|".join(HOME_MADE))


def found(text: str, where: str) -> list[str]:
    "The home-made words in a text, with some of what is around them."
    return [f"{where}: …{text[max(0, m.start() - 30) : m.end() + 30]}…" for m in HOME_MADE.finditer(text)]


@each_module
def test_modules_speak_the_fields_words(module):
    "Names, docstrings, comments beside arguments, errors, columns and labels: everything but the code's own grammar."
    assert not (words := found(module.read_text(encoding="utf-8"), module.name)), "\n".join(words)


@each_chapter
def test_chapters_speak_the_fields_words(chapter):
    "Headings, prose, labels, and the tables that are shown."
    words = []
    for cell in NBProcessor(chapter).nb.cells:
        if cell.cell_type == "markdown" or cell.cell_type == "code":
            words += found(cell.source, cell.id)
        for output in getattr(cell, "outputs", []):
            words += found(_run.output_text(output), f"{cell.id}, output")
    assert not words, "\n".join(words)


def test_stored_tables_speak_the_fields_words():
    words = []
    for file in sorted((NBS / "results").rglob("*.csv")):
        with open(file, encoding="utf-8", newline="") as rows:
            for row in csv.reader(rows):
                labels = " | ".join(cell for cell in row if not re.fullmatch(r"[-\d.e+]*", cell))
                words += found(labels, file.name)
    assert not words, "\n".join(words[:20])


def test_a_home_made_word_is_found():
    assert found("removed by lot", "here") and found("the whole model", "there") and not found("the base model", "x")
