"""Build the site into `_docs`, and `README.md` from `index.ipynb`.

    python nbs/_site.py                   the site and the README
    python nbs/_site.py readme            the README alone
    python nbs/_site.py --out some/folder the site alone, in another folder

With Quarto on the PATH, Quarto builds the site (`nbdev_docs`). Without it smalldocs does, from the same notebooks
and the
same `_quarto.yml`; its pages are then made to read without a network: formulas become MathML, nothing is loaded from
another host, and links to the documentation and the source stay inside the site.
"""

import argparse
import html
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from latex2mathml.converter import convert as mathml
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.quarto import nbdev_docs
from nbdev.serve import proc_nbs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from smalldocs.site import build as render_pages

NBS = Path(__file__).resolve().parent
ROOT = NBS.parent
IMAGES = "nbs/images"


# %% README


def directive(cell, name: str) -> str:
    "The value of a cell's `#| name: value` line, or nothing."
    return " ".join((cell.directives_ or {}).get(f"{name}:", [])).strip("\"'")


def shown_cells(cells) -> list:
    "The cells that a reader of the README sees, as their `#|` lines ask."
    shown = []
    for cell in cells:
        if cell.cell_type == "code":
            hidden = {"hide", "export", "exporti", "default_exp"} & (cell.directives_ or {}).keys()
            if hidden or directive(cell, "include") == "false":
                continue
            if directive(cell, "output") == "false":
                cell.outputs = []
            cell.metadata["transient"] = {"remove_source": directive(cell, "echo") == "false"}
            cell.source = re.sub(r"^(\s*#\s*\|.*\n?)+", "", cell.source)
            for n, output in enumerate(cell.outputs):
                if "data" in output:
                    output["metadata"]["filename"] = f"index-{cell.id}{f'-{n}' if n else ''}"
        shown.append(cell)
    return shown


def from_root(match: re.Match) -> str:
    "A link of the notebook as it must stand in a file one folder up."
    target, hash_, fragment = match[2].partition("#")
    path = (NBS / target).resolve()
    known = target and path.exists() and path.is_relative_to(ROOT)
    return f"{match[1]}{path.relative_to(ROOT).as_posix() if known else target}{hash_}{fragment}{match[3]}"


def readme(notebook: Path = NBS / "index.ipynb") -> tuple[str, dict[str, bytes]]:
    "README.md as the notebook gives it, and its figures by their path from the root."
    from nbconvert import MarkdownExporter  # seconds: only here

    nb = NBProcessor(notebook).nb
    alts = {
        f"index-{c.id}": directive(c, "fig-alt") or directive(c, "fig-cap") for c in nb.cells if c.cell_type == "code"
    }
    nb.cells = shown_cells(nb.cells)
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(
        nbformat.reads(nb2str(nb), as_version=4), {"output_files_dir": IMAGES}
    )
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"(\]\()([^)\s:]+)(\))", from_root, text)
    text = re.sub(r'(src=")([^":]+)(")', from_root, text)
    text = re.sub(r"(```python\n[^`]*)```\s+```python\n", r"\1", text)  # two cells with nothing between are one
    for name, alt in alts.items():
        text = text.replace(f"![png]({IMAGES}/{name}", f"![{alt or 'figure'}]({IMAGES}/{name}")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    return f"<!-- written from nbs/index.ipynb by nbs/_site.py -->\n\n{text}\n", resources["outputs"]


def write_readme():
    "Write README.md and its figures; figures that it no longer has go."
    text, figures = readme()
    for old in (ROOT / IMAGES).glob("index-*"):
        if f"{IMAGES}/{old.name}" not in figures:
            old.unlink()
    for name, data in figures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


# %% Site


def name_pages(proc: Path):
    "Give each processed notebook the name that Quarto gives its page: 13_metrics.ipynb becomes metrics.ipynb."
    names = {p.name: re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.name.lower()) for p in proc.glob("*.ipynb")}
    for path in [*proc.glob("*.ipynb"), proc / "_quarto.yml"]:
        text = path.read_text(encoding="utf-8")
        before = r"\]\(" if path.suffix == ".ipynb" else r"\b"
        text = re.sub(rf"(?<={before})({'|'.join(map(re.escape, names))})\b", lambda m: names[m[0]], text)
        path.write_text(text, encoding="utf-8")
        if path.name in names:
            path.rename(proc / names[path.name])


def as_mathml(match: re.Match) -> str:
    "The MathML of one formula that smalldocs left as TeX."
    tex = html.unescape(match[2]).strip()[2:-2].strip()
    tex = re.sub(r"\{aligned\}", "{align*}", tex)  # latex2mathml knows this one alone
    return f'<span class="math {match[1]}">{mathml(tex, display="block" if match[1] == "display" else "inline")}</span>'


def write_source_pages(out: Path) -> str:
    "Show the exported modules as pages of the site, with a link target a line."
    folder = out / "source"
    folder.mkdir(parents=True, exist_ok=True)
    lib = get_config().lib_path
    for module in sorted(lib.glob("*.py")):
        formatter = HtmlFormatter(
            full=True, title=f"{lib.name}/{module.name}", linenos="inline", lineanchors="L", encoding="utf-8"
        )
        (folder / f"{module.stem}.html").write_bytes(
            highlight(module.read_text(encoding="utf-8"), PythonLexer(), formatter)
        )
    return folder.name


def read_without_network(out: Path):
    "Make the pages under `out` need nothing but each other."
    config = get_config()
    docs = re.escape(f"{config.doc_host}{config.doc_baseurl}/")
    source = re.escape(f"{config.git_url}/blob/{config.branch}/{config.lib_path.name}/")
    source_folder = write_source_pages(out)
    for page in out.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r'<span class="math (inline|display)">(.*?)</span>', as_mathml, text, flags=re.DOTALL)
        text = re.sub(r"<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*></script>", "", text)
        text = re.sub(rf'(?<=href="){docs}', "", text)
        text = re.sub(rf"\[(`[^`\]]+`)\]\({docs}[^)]*\)", r"\1", text)  # nbdev's links in the comments of a signature
        text = re.sub(rf'(?<=href="){source}(\w+)\.py#L(\d+)', rf"{source_folder}/\1.html#L-\2", text)
        if loaded := re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text):
            raise SystemExit(f"{page.name} loads from another host: {loaded}")
        page.write_text(text, encoding="utf-8")
    for sheet in out.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        sheet.write_text(re.sub(r'@import\s+url\(["\']?https?:[^)]*\);?', "", text), encoding="utf-8")


def build_site(out: Path):
    "Build every page into the folder `out`, in place of what was there."
    os.chdir(ROOT)
    if shutil.which("quarto"):
        nbdev_docs.__wrapped__()
        built = get_config().doc_path
    else:
        proc = proc_nbs(n_workers=2, force=True)
        name_pages(proc)
        site = render_pages(proc, quiet=True)
        for warning in site.warnings:
            if not re.search("output-file is not read|html-math-method is ignored", warning):
                print(f"smalldocs: {warning}", file=sys.stderr)
        built = site.out
        read_without_network(built)
    if out != built:
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(built, out)


def main():
    "Do what the command line asks."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", default="site", choices=["site", "readme"])
    parser.add_argument("--out", type=Path, help="the site's folder (default: _docs)")
    args = parser.parse_args()
    if not args.out:
        write_readme()
    if args.what == "site":
        out = (args.out or get_config().doc_path).resolve()
        build_site(out)
        print(f"site: {out / 'index.html'}")


if __name__ == "__main__":
    main()
