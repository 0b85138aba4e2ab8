"""The worked examples of CONTRIBUTING.md: each is truly one small change."""

import multiprocessing
import re
import shutil
import sys
from contextlib import redirect_stdout
from copy import copy
from pathlib import Path

import torch

from avss_nb import data, importance, labeling
from conftest import ROOT
from tiny import batch_of, one_thread, tiny

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def test_examples_run(monkeypatch):
    for module, name in ((importance, "SCORES"), (data, "QUESTIONS"), (labeling, "LABEL_RULES")):
        monkeypatch.setattr(module, name, copy(getattr(module, name)))
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        exec(compile(code, "CONTRIBUTING.md", "exec"), dict(model=tiny("llama"), batches=[batch_of(5, 4)]))  # noqa: S102


CHECK = """
from tiny import batch_of, tiny
from avss_nb.metrics import collect_stats, variance
stats = collect_stats(tiny("llama"), [batch_of(5, 4)], points=("output", "doubled"))
print((variance(stats, point="doubled") / variance(stats, point="output")).round(3).unique().tolist())
"""


def check(package: Path, said: Path):
    "Run CHECK in this process, which holds the libraries already, with the package that stands in a folder."
    torch.set_num_threads(1)
    for name in [name for name in sys.modules if name == "tiny" or name.split(".")[0] == "avss_nb"]:
        del sys.modules[name]
    sys.path.insert(0, str(package))
    with said.open("w", encoding="utf-8") as file, redirect_stdout(file):
        exec(compile(CHECK, "CHECK", "exec"), {})  # noqa: S102


def test_a_reading_point_is_two_lines(tmp_path):
    "Applied to a copy of the package, and asked for."
    shutil.copytree(ROOT / "avss_nb", tmp_path / "avss_nb", ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    file, (diff,) = tmp_path / "avss_nb" / "hooks.py", blocks("diff")
    lines = diff.splitlines()
    for old, new in zip(lines[::2], lines[1::2]):
        source = file.read_text(encoding="utf-8")
        assert old[0] == "-" and new[0] == "+" and source.count(old[1:]) == 1, old
        file.write_text(source.replace(old[1:], new[1:]), encoding="utf-8")
    child = multiprocessing.get_context("fork").Process(target=check, args=(tmp_path, tmp_path / "said"))
    child.start()
    child.join()
    assert (tmp_path / "said").read_text(encoding="utf-8").strip() == "[4.0]"
