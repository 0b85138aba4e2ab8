"""Every chapter runs from top to bottom, each in a process of its own, as nbdev runs it: from its stored tables, or
with AVSS_NB_FRESH=1
measured anew and compared with them."""

import subprocess
import sys
from pathlib import Path

import pytest
from _run import chapters

from conftest import ROOT

MINUTES = 40  # the longest that one chapter may take


@pytest.mark.chapter
@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_chapter_runs(chapter):
    command = [Path(sys.executable).with_name("nbdev_test"), "--path", chapter]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{chapter.name} took more than {MINUTES} minutes", pytrace=False)
    if run.returncode:
        pytest.fail(f"{chapter.name} does not run\n{run.stdout[-1000:]}{run.stderr[-6000:]}", pytrace=False)
    assert "Success." in run.stdout, f"nbdev_test ran nothing: {run.stdout}{run.stderr}"
