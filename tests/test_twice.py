"""No logic stands twice: no more than ten lines of code in a row are the same anywhere in package, tests, benches
and chapters, names and numbers aside."""

import io
import keyword
import tokenize
from collections.abc import Iterator

from nbdev.process import NBProcessor

import _run
from conftest import NBS, ROOT

MOST = 10
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def lines(source: str, names: bool) -> list[tuple[int, str]]:
    """The lines that do something, with their numbers: without comments and white space, `names` or not; docstrings
    and imports are none."""
    found, line, first = [], [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if line[0] not in ("import", "from", "<text>"):
                found.append((first, " ".join(line)))
            line = []
        elif token.type not in SKIPPED:
            if not line:
                first = token.start[0]
            text = "<text>" if token.type == tokenize.STRING and (not line or not names) else token.string
            line.append(
                "name"
                if not names and token.type == tokenize.NAME and not keyword.iskeyword(text)
                else "0"
                if not names and token.type == tokenize.NUMBER
                else text
            )
    return found


def sources() -> Iterator[tuple[str, str]]:
    "Everything that is written by hand, by its place; of the package the exported form of the chapters."
    for folder in ("avss_nb", "tests", "bench", "nbs"):
        for file in sorted((ROOT / folder).glob("*.py")):
            if file.name != "_modidx.py":
                yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
    for chapter in _run.chapters():
        for cell in NBProcessor(chapter).nb.cells:
            if (
                cell.cell_type == "code"
                and not {"export", "exporti", "exports", "default_exp"} & set(cell.directives_ or {})
                and not cell.source.lstrip().startswith(("%", "!"))
            ):
                yield f"{chapter.relative_to(NBS)}, cell {cell.id}", cell.source


def repeats(names: bool, most: int = MOST, of=None) -> list[str]:
    "Places at which more than so many lines stand that stand elsewhere too."
    seen, found = {}, []
    for place, source in of or sources():
        code = lines(source, names)
        for i in range(len(code) - most):
            here, run = (place, code[i][0]), "\n".join(text for _, text in code[i : i + most + 1])
            if run in seen and (seen[run][0] != place or here[1] - seen[run][1] > most):
                found.append(f"{place}, line {code[i][0]}: as {seen[run][0]}, line {seen[run][1]}")
            seen.setdefault(run, here)
    return found


def test_nothing_stands_twice():
    assert not repeats(names=True)


def test_nothing_stands_twice_under_other_names():
    assert not repeats(names=False)


def test_a_copy_is_found():
    "Under other names, with other white space and a comment; not when a line of it differs."
    code = "".join(f"a{i} = f(a{i}, {i}) if b else g[{'x' * (i % 3)!r}]\n" for i in range(11))
    copy = code.replace("a", "longer").replace(" = ", "  =  ").replace("\n", "   # as before\n")
    assert repeats(False, of=[("one", code), ("two", copy)]) and not repeats(True, of=[("one", code), ("two", copy)])
    assert repeats(True, of=[("one", code), ("two", code)]) and not repeats(
        False, of=[("one", code), ("two", copy.replace("else", "or", 1))]
    )
