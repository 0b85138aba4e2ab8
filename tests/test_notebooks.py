"""Every chapter runs from top to bottom, each in a process of its own, as nbdev runs it: from its stored tables, or
with AVSS_NB_FRESH=1 measured anew and compared with them."""

import multiprocessing
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from _run import chapters
from matplotlib_inline.config import InlineBackend
from nbdev.config import get_config
from nbdev.test import test_nb as run_cells

from conftest import ROOT, settle

MINUTES = 40  # the longest that one chapter may take

# One process loads the libraries once; each chapter's process is a fork of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["avss_nb.report", "avss_nb.tasks", "nbdev.test", "seaborn", "peft", "sklearn.linear_model"]
)


def run_chapter(chapter: Path, log: Path) -> None:
    """Run a chapter in this process, as nbdev_test does; leave with 1 where a cell fails, and its words in the log.
    Figures are drawn once each: to cut their margins off, as for reading, they would be drawn twice."""
    settle()
    InlineBackend.instance(print_figure_kwargs=dict(bbox_inches=None))
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        passed, _ = run_cells(chapter, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not passed)


@pytest.mark.chapter
@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_chapter_runs(chapter, tmp_path):
    process = FORKS.Process(target=run_chapter, args=(chapter, tmp_path / "log"))
    process.start()
    process.join(60 * MINUTES)
    if process.exitcode is None:
        process.terminate()
        pytest.fail(f"{chapter.name} took more than {MINUTES} minutes", pytrace=False)
    if process.exitcode:
        said = (tmp_path / "log").read_text(encoding="utf-8")
        pytest.fail(f"{chapter.name} does not run\n{said[-7000:]}", pytrace=False)
