"""What two checkers find without running anything: ruff and mypy, as pyproject.toml sets them."""

import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "avss_nb", "tests", "bench", "nbs/_run.py", "nbs/_site.py"],
        ["mypy", "--no-incremental", "avss_nb"],
    ],
    ids=lambda c: c[0],
)
def test_nothing_is_found(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
