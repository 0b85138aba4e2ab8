"""Every exported name says what it does, what each argument is, and which errors it raises."""
import ast
import re

import pytest

from conftest import ROOT

MODULES = sorted(p for p in (ROOT/"avss_nb").glob("*.py") if not p.stem.startswith("_"))
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)

# What these are is the same everywhere, and said once.
GLOSSARY = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8").split("## Words that mean the same everywhere")[1]
COMMON = {"self", "args", "kwargs", *(word for line in GLOSSARY.splitlines() for part in line.removeprefix("- ").split("; ") for word in re.findall(r"`(\w+)`", part.split(": ")[0]))}


def exported(module) -> list[ast.FunctionDef | ast.ClassDef]:
    "The functions and classes of `__all__`, and the public methods of such classes."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = next(ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__all__")
    top = [s for s in tree.body if isinstance(s, ast.FunctionDef | ast.ClassDef) and s.name in names]
    return top + [m for c in top if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]


def said(node, source: list[str]) -> str:
    "Docstring and the comments of the signature."
    signature = "\n".join(source[node.lineno - 1:node.body[0].end_lineno])
    return (ast.get_docstring(node) or "") + " " + " ".join(re.findall(r"#(.*)", signature))


def arguments(node) -> list[ast.arg]:
    "None of a class."
    if isinstance(node, ast.ClassDef): return []
    a = node.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]


def is_property(node) -> bool: return any(ast.unparse(d) in ("property", "staticmethod") or ast.unparse(d).endswith(".setter") for d in node.decorator_list)


def no_docstring(node, source: list[str]) -> list[str]:
    "A property's name and type may be enough."
    return [] if ast.get_docstring(node) or isinstance(node, ast.FunctionDef) and is_property(node) and node.returns else ["has no docstring"]


def silent_arguments(node, source: list[str]) -> list[str]:
    "Each is described by a comment beside it, by its name in the docstring, by a type that says it (a choice, a flag), or as one of the words that mean the same everywhere."
    text = ast.get_docstring(node) or ""
    def described(a: ast.arg) -> bool:
        beside = re.search(r"[,)=:\w]\s*#\s*\S", source[a.end_lineno - 1][a.col_offset:]) is not None
        return bool(beside or a.arg in COMMON or re.search(rf"\b{re.escape(a.arg)}\b", text) or f"`{a.arg}" in text or re.search(r"[Oo]ptions (as|of|in)|options", text) and a.arg in ("options", "settings"))
    return [f"has an argument {a.arg}" for a in arguments(node) if not described(a)]


def silent_errors(node, source: list[str]) -> list[str]:
    "Each class of errors that a function itself raises stands in its docstring or beside its arguments."
    if isinstance(node, ast.ClassDef): return []
    raised, text = {ast.unparse(r.exc.func if isinstance(r.exc, ast.Call) else r.exc) for r in ast.walk(node) if isinstance(r, ast.Raise) and r.exc}, said(node, source)
    return [f"raises {e}" for e in sorted(raised) if e[0].isupper() and e not in text and not re.search(r"[Ee]rrors (as|of|in)", text)]


def silent_results(node, source: list[str]) -> list[str]:
    "What is returned has a type or a word."
    if isinstance(node, ast.ClassDef) or node.returns is not None: return []
    returns = any(isinstance(r, ast.Return) and r.value is not None for r in ast.walk(node))
    return ["returns something"] if returns and not re.search(r"[Cc]ontext manager|[Rr]eturns|: ", said(node, source)) else []


@each_module
@pytest.mark.parametrize("check", [no_docstring, silent_arguments, silent_errors, silent_results], ids=lambda f: f.__name__)
def test_what_is_exported_is_described(module, check):
    source = module.read_text(encoding="utf-8").splitlines()
    assert not (found := [f"{module.name}:{node.lineno} {node.name} {what}" for node in exported(module) for what in check(node, source)]), "\n".join(found)
