"""The files agree with each other: notebooks, package, README, site, settings and pins."""

import ast
import re
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
import yaml
from nbdev.process import NBProcessor
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import _map
import _run
import _site
from conftest import NBS, ROOT, copy_sources, run

CHAPTERS = _run.chapters()
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
settings = ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]


@cache
def code_cells(chapter: Path) -> list:
    "The code cells of a notebook, each with its directives."
    return [c for c in NBProcessor(chapter).nb.cells if c.cell_type == "code"]


def statements(cell) -> list:
    "What stands at the top level of a cell; nothing where IPython's own syntax is used."
    try:
        return ast.parse(cell.source).body
    except SyntaxError:
        return []


def where(cell) -> str:
    "How to find a cell."
    return f"cell {cell.idx_ + 1} ({cell.id}): {cell.source.strip().splitlines()[0] if cell.source.strip() else ''}"


@pytest.fixture
def copy(tmp_path) -> Path:
    "A copy of what the package is made from, to be changed at will."
    copy_sources(tmp_path, "CITATION.cff", "_quarto.yml", ignore=(".ipynb_checkpoints", "*.part"))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    "Every notebook and module under a folder."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".py", ".ipynb") and "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean"])
def test_leaves_no_diff(copy, command):
    before = contents(copy)
    run(Path(sys.executable).with_name(command), cwd=copy)
    after = contents(copy)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"{command} changes {changed}: run `make export`, and store outputs with `make run` alone"


def test_readme_is_the_index_notebook():
    text, figures = _site.readme()
    remedy = "run `make readme`"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, remedy
    stored = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT / _site.IMAGES).glob("index-*")}
    assert stored == figures, remedy


def test_badges_say_what_the_settings_say():
    licence = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["license"]
    for name, value in dict(python=f"{settings['min_python']}+", licence=licence).items():
        badge = (NBS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert re.findall(">([^<]+)</text>", badge) == [name, value]


@each_chapter
def test_stored_outputs_are_fit_to_keep(chapter):
    problems = [f"{where(cell)} {problem}" for cell in code_cells(chapter) for problem in _run.output_problems(cell)]
    problems += [
        f"{where(cell)} keeps its stderr"
        for cell in code_cells(chapter)
        if any(o.get("name") == "stderr" for o in cell.outputs)
    ]
    assert not problems, "\n".join(problems)


def shows_something(cell) -> bool:
    "Whether a cell surely has an output: it prints, or it ends in a value, or it opens a figure."
    body = statements(cell)
    if not body:
        return False
    calls = [n.value.func for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    prints = any(getattr(f, "id", "") in ("print", "display") for f in calls)
    value = (
        ast.Name
        | ast.Attribute
        | ast.Subscript
        | ast.Compare
        | ast.BinOp
        | ast.Tuple
        | ast.List
        | ast.Dict
        | ast.Constant
    )
    ends_in_value = (
        isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, value) and not cell.source.rstrip().endswith(";")
    )
    draws = any(
        isinstance(n, ast.Call) and ast.unparse(n.func) in ("plt.subplots", "plt.figure")
        for s in body
        if not isinstance(s, ast.FunctionDef | ast.ClassDef)
        for n in ast.walk(s)
    )
    return prints or ends_in_value or draws and "plt.close" not in cell.source


@each_chapter
def test_outputs_are_stored(chapter):
    missing = [
        where(cell)
        for cell in code_cells(chapter)
        if not _run.is_skipped(cell) and shows_something(cell) and not cell.outputs
    ]
    assert not missing, f"run `make run NBS={chapter.relative_to(ROOT)}`:\n" + "\n".join(missing)


@each_chapter
def test_title_cell_is_what_the_site_shows(chapter):
    "nbdev makes the first cell the page's title and subtitle, and drops every other line of it."
    first = NBProcessor(chapter).nb.cells[0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert (
        first.cell_type == "markdown" and len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> ")
    ), first.source


@each_chapter
def test_imports_stand_alone(chapter):
    """To document functions the site runs every cell that imports; one that shows something would show it anew, from
    another run."""
    mixed = [
        where(cell)
        for cell in code_cells(chapter)
        if cell.outputs and any(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements(cell))
    ]
    assert not mixed, "\n".join(mixed)


# The parts whose chapters are read from end to end; in part 9 and the index one looks things up.
READS_THROUGH = re.compile(r"[1-5]\d_|90_|91_|92_|96_")
reading_chapter = pytest.mark.parametrize(
    "chapter", [c for c in CHAPTERS if READS_THROUGH.match(c.name)], ids=lambda path: path.stem
)


def has_figure(cell) -> bool:
    "Whether a reader sees a picture: one that is stored, or one in the text."
    kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
    in_text = cell.cell_type == "markdown" and re.search(r"<svg|```\s*\{?mermaid|!\[", cell.source)
    return bool(kinds & {"image/png", "image/svg+xml"} or in_text)


@reading_chapter
def test_first_figure_comes_early(chapter):
    "Within the first 35 % of what is written, in characters."
    cells = NBProcessor(chapter).nb.cells
    figures = [number for number, cell in enumerate(cells) if has_figure(cell)]
    assert figures, "there is no figure"
    lengths = [len(cell.source) for cell in cells]
    before = sum(lengths[: figures[0]]) / sum(lengths)
    assert before <= 0.35, f"the first figure, {where(cells[figures[0]])}, comes after {before:.0%}"


@reading_chapter
def test_chapter_ends_with_what_was_learned(chapter):
    "The last text says what was learned, what to try, and what comes next."
    last = [cell for cell in NBProcessor(chapter).nb.cells if cell.cell_type == "markdown"][-1].source
    assert re.fullmatch(r"## What we learned\n.+\n## Try it\n.+\n\*\*Next\b.+", last, re.DOTALL), last


def module_of(chapter: Path) -> str | None:
    "The module that a chapter writes."
    return next(
        (
            cell.directives_["default_exp"][0]
            for cell in code_cells(chapter)
            if "default_exp" in (cell.directives_ or {})
        ),
        None,
    )


def imported_modules(cell, inside: bool = True) -> set[str]:
    "The modules of this package that a cell imports; `inside`: in its functions, too."
    nodes = [n for s in statements(cell) for n in (ast.walk(s) if inside else [s])]
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "avss_nb"]
    names += [f"avss_nb.{a.name}" for n in froms for a in n.names if not a.name.startswith("__")]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name.split(".")[1] for name in names if name.startswith("avss_nb.")}


@each_chapter
def test_chapter_imports_from_chapters_above(chapter):
    """A module imports from chapters above it alone. What a chapter shows, and what a function imports when it is
    called,
    may also use the reference part; and every chapter may keep its tables by `runs`."""
    if chapter.name == "index.ipynb":
        return  # the index shows all of it
    above = {module_of(c) for c in CHAPTERS if c.name <= chapter.name and c.name != "index.ipynb"}
    reference = {module_of(c) for c in CHAPTERS if c.name.startswith("9")}
    wrong = []
    for cell in code_cells(chapter):
        is_exported = bool({"export", "exporti"} & (cell.directives_ or {}).keys())
        late = imported_modules(cell) - above - reference - (set() if is_exported else {"runs"})
        late |= imported_modules(cell, inside=False) - above if is_exported else set()
        if late:
            wrong.append(f"{where(cell)} imports {sorted(late)}")
    assert not wrong, "\n".join(wrong)


def test_no_private_name_crosses_modules():
    private = []
    for module in (ROOT / "avss_nb").glob("[!_]*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("avss_nb")):
                private += [f"{module.name}: {a.name}" for a in node.names if re.match("_[^_]", a.name)]
    assert not private


def test_map_of_the_modules_is_drawn_from_their_imports():
    assert _map.FILE.read_text(encoding="utf-8") == _map.drawing(), "run `python nbs/_map.py`"


def test_modules_are_exported_from_chapters():
    modules = {p.stem for p in (ROOT / "avss_nb").glob("*.py") if not p.stem.startswith("_")}
    assert modules == {module_of(c) for c in CHAPTERS} - {None}


def test_site_lists_every_chapter_in_order():
    def pages(contents):
        return [page for item in contents for page in (pages(item["contents"]) if isinstance(item, dict) else [item])]

    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert pages(config["website"]["sidebar"]["contents"]) == [c.name for c in CHAPTERS]
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_results_list_every_chapter_in_order():
    listed = NBProcessor(NBS / "93_results.ipynb").nb.cells
    (table,) = [cell.source for cell in listed if "## The chapters" in cell.source]
    links = re.findall(r"^\| \[[^\]]+\]\((\w+\.ipynb)\)", table, re.M)
    assert links == [c.name for c in CHAPTERS if c.name != "index.ipynb"]


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if "_study_" in c.name], ids=lambda c: c.stem)
def test_a_study_takes_a_model(chapter):
    "What comes before its tables names no model; the cell that measures them is the last that another model runs."
    kept = _run.up_to_tables(NBProcessor(chapter).nb.cells)
    code = "\n".join(cell.source for cell in kept if cell.cell_type == "code")
    assert "study_folder(" in kept[-1].source and "load_model(studied_model())" in code.replace(
        "partial(load_model, studied_model())", "load_model(studied_model())"
    )
    assert "load_model()" not in code and "smollm2" not in code and "results/study_" not in code


def test_gallery_shows_figures_as_they_stand():
    def images(chapter):
        return [
            o["data"]["image/png"].strip()
            for cell in code_cells(chapter)
            for o in cell.outputs
            if "image/png" in o.get("data", {})
        ]

    stored = {image for chapter in CHAPTERS if chapter.stem != "95_gallery" for image in images(chapter)}
    shown = images(NBS / "95_gallery.ipynb")
    assert len(shown) == 10 and stored.issuperset(shown), "run `make run NBS=nbs/95_gallery.ipynb`"


def test_pins_agree_with_settings():
    lines = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {canonicalize_name(r.name): next(iter(r.specifier)) for r in lines}
    assert all(pin.operator == "==" for pin in pins.values())
    for line in (settings["requirements"] + settings["dev_requirements"]).split():
        needed = Requirement(line)
        pin = pins.get(canonicalize_name(needed.name))
        assert pin, f"constraints.txt has no version of {needed.name}"
        assert needed.specifier.contains(pin.version, prereleases=True), f"constraints.txt has {pin} for {needed}"
