"""Draw the map of the modules from their imports, as `nbs/images/modules.svg`.

    python nbs/_map.py

A row is a module, in the order of the chapters; a dot says that it imports the module of that column. All dots lie
below
the diagonal: a module imports from chapters above it alone.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "nbs" / "images" / "modules.svg"
PARTS = {
    "1": ("Measure", "#0173b2"),
    "2": ("Which layers matter", "#de8f05"),
    "3": ("Hallucination", "#029e73"),
    "4": ("Activation sparsity", "#cc78bc"),
    "5": ("Use it", "#ca9161"),
    "9": ("Reference", "#949494"),
}
CELL, LEFT, TOP = 17, 190, 104


def modules() -> dict[str, str]:
    "Each module and its chapter, in reading order."
    found = {}
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        name = re.search(r"#\| default_exp (\w+)", notebook.read_text(encoding="utf-8"))
        if name:
            found[name[1]] = notebook.stem
    return found


def imports(module: str) -> set[str]:
    "The modules of this package that a module imports at its top."
    tree = ast.parse((ROOT / "avss_nb" / f"{module}.py").read_text(encoding="utf-8"))
    named = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name.removeprefix("avss_nb.") for name in named} - {module}


def text(x: float, y: float, words: str, **style: str) -> str:
    "A line of text."
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{words}</text>'


def row(number: int, name: str, chapter: str, names: list[str]) -> list[str]:
    "One module: its name, its column's name, and a dot for each module that it imports."
    y, color = TOP + number * CELL, PARTS[chapter[0]][1]
    middle = LEFT + (number + 0.5) * CELL
    drawn = [text(LEFT - 8, y + 12, f"{chapter.split('_')[0]} {name}", text_anchor="end", fill=color)]
    turn = f"rotate(-60 {middle:g} {TOP - 6})"
    drawn.append(text(middle, TOP - 6, name, fill=color, transform=turn))
    width = (number + 1) * CELL
    drawn.append(f'<rect x="{LEFT}" y="{y}" width="{width}" height="{CELL - 1}" fill="{color}" opacity="0.08"/>')
    for other in sorted(imports(name) & set(names), key=names.index):
        x = LEFT + (names.index(other) + 0.5) * CELL
        title = f"<title>{name} imports {other}</title>"
        drawn.append(f'<circle cx="{x:g}" cy="{y + CELL / 2 - 0.5:g}" r="4.5" fill="{color}">{title}</circle>')
    return drawn


def drawing() -> str:
    "The whole map as SVG."
    chapters = modules()
    names = list(chapters)
    size = LEFT + len(names) * CELL + 90, TOP + len(names) * CELL + 16
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
            f'font-size="12">'
        ),
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        text(8, 20, "A dot: the module of this row", fill="#333"),
        text(8, 36, "imports that of the column", fill="#333"),
    ]
    for number, (name, chapter) in enumerate(chapters.items()):
        lines += row(number, name, chapter, names)
    for place, (title, color) in enumerate(PARTS.values()):
        lines.append(text(LEFT + 210, TOP + 14 + place * 18, title, fill=color, font_weight="bold"))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
    print(f"{FILE.relative_to(ROOT)}: {len(modules())} modules", file=sys.stderr)
