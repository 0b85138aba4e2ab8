"""What two checkers find without running anything: ruff and mypy, as pyproject.toml sets them; and what a user's
checker sees."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

RUFF = ["ruff", "check", "--no-cache", "avss_nb", "tests", "bench", "nbs/_run.py", "nbs/_site.py", "nbs/_map.py"]
MYPY = ["mypy"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "What mypy has read, for the tests of this file alone."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPY_CACHE_DIR", str(tmp_path_factory.mktemp("mypy")))
        yield


@pytest.mark.parametrize("command", [RUFF, [*MYPY, "avss_nb"]], ids=lambda command: command[0])
def test_nothing_is_found(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check(script: Path, folder: Path) -> subprocess.CompletedProcess:
    "mypy on a script that stands somewhere else, against the package as it is installed."
    command = [sys.executable, "-m", *MYPY, "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_users_checker_sees_the_types(tmp_path):
    "A right script passes, and a wrong one does not: the package says that it is typed."
    script = tmp_path / "consumer.py"
    text = (ROOT / "tests" / "consumer.py").read_text(encoding="utf-8")
    script.write_text(text, encoding="utf-8")
    assert (done := check(script, tmp_path)).returncode == 0, done.stdout + done.stderr
    script.write_text(text.replace("fraction=fraction", 'fraction="a quarter"'), encoding="utf-8")
    done = check(script, tmp_path)
    assert 'Argument "fraction" to "select_layers" has incompatible type "str"' in done.stdout, done.stdout
