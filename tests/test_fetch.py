"""Optional models: what is damaged, missing, too large or of an unknown kind is named before anything is converted, and
nothing of it is left."""

import hashlib
import re
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import avss_nb.fetch
import avss_nb.models
from avss_nb.command import main
from avss_nb.fetch import check_room, download_wheel, fetch_model, join_parts
from avss_nb.models import KNOWN_MODELS, OPTIONAL_MODELS, convert_gguf, load_model, resolve_model
from conftest import ROOT

CONTENT = b"GGUF" + bytes(range(256)) * 40
RIGHT = dict(size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
PARTS = CONTENT[:4000], CONTENT[4000:8000], CONTENT[8000:]


def wheel(folder: Path, number: int, *data: bytes) -> Path:
    "A wheel that holds some parts of a model; its code must never run."
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"toy_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(f"toy_part{number}/__init__.py", "raise SystemExit('imported')")
        for i, part in enumerate(data):
            made.writestr(f"toy_part{number}/data/part{number + i:02}.bin", part)
    return path


@pytest.fixture
def toy(monkeypatch, tmp_path):
    "A model of three wheels, to be fetched into an empty cache; where its wheels go."
    listed = ConfigParser()
    facts = dict(hub="none/none", what="a toy", parameters=9, terms="none", file="toy.gguf")
    wheels = "".join(f"\ntoy-part{n}==1.0 --hash=sha256:{'0' * 64}" for n in (1, 2, 3))
    listed["toy"] = facts | dict(bytes=RIGHT["size"], sha256=RIGHT["sha256"], wheels=wheels)
    for module in (avss_nb.fetch, avss_nb.models):
        monkeypatch.setattr(module, "OPTIONAL_MODELS", listed)
    monkeypatch.setitem(KNOWN_MODELS, "toy", "none/none")
    monkeypatch.setenv("AVSS_NB_CACHE", str(tmp_path))
    return tmp_path / "fetched" / "toy.wheels"


def left(folder: Path) -> list[str]:
    "What is in the cache, locks aside."
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_every_wheel_has_a_hash_and_every_model_its_facts():
    for name in OPTIONAL_MODELS.sections():
        model = OPTIONAL_MODELS[name]
        wheels = model["wheels"].split("\n")[1:]
        assert len(set(wheels)) == len(wheels) > 4
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in wheels)
        assert re.fullmatch("[0-9a-f]{64}", model["sha256"]) and model["file"].endswith(".gguf") and model["terms"]
        assert model.getint("bytes") < model.getint("parameters") < 4 * model.getint("bytes")
        assert KNOWN_MODELS[name] == model["hub"]
    assert (ROOT / "avss_nb" / "optional-models.txt").resolve() == ROOT / "optional-models.txt"


@pytest.mark.parametrize(
    "parts",
    [PARTS[:2], PARTS[::-1], (*PARTS, b"!"), (PARTS[0], PARTS[1], PARTS[2][:-1] + b"?")],
    ids=["a part is missing", "another order", "too long", "another content"],
)
def test_a_wrong_file_is_never_left(tmp_path, parts):
    wheels = [wheel(tmp_path / "wheels", n, part) for n, part in enumerate(parts, 1)]
    with pytest.raises(
        ValueError, match=r"model.gguf is not what it should be: [\d,]+ bytes for [\d,]+, or another hash"
    ):
        join_parts(wheels, tmp_path / "here" / "model.gguf", **RIGHT)
    assert left(tmp_path / "here") == []


def test_a_wheel_of_two_parts_and_one_that_is_no_archive(tmp_path):
    with pytest.raises(ValueError, match="toy_part1.* holds 2 parts of a model"):
        join_parts([wheel(tmp_path, 1, *PARTS[:2])], tmp_path / "model.gguf", **RIGHT)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match="broken.whl is damaged: delete it, and fetch it again"):
        join_parts([broken], tmp_path / "model.gguf", **RIGHT)


def test_half_of_the_parts(toy):
    "pip's reason is given, and the parts that came are kept for the next try."
    wheel(toy, 1, PARTS[0])
    wheel(toy, 2, PARTS[1])
    with pytest.raises(OSError, match=r"pip cannot fetch toy-part3==1.0: .") as caught:
        fetch_model("toy")
    assert "\n" not in str(caught.value)
    assert left(toy.parent) == [f"toy.wheels/toy_part{n}-1.0-py3-none-any.whl" for n in (1, 2)]


def test_what_was_fetched_is_found_by_its_name(toy, monkeypatch):
    for n, part in enumerate(PARTS, 1):
        wheel(toy, n, part)
    monkeypatch.setattr(avss_nb.fetch, "convert_gguf", lambda file: file)
    monkeypatch.setattr(avss_nb.models, "convert_gguf", lambda file: file)
    file = fetch_model("toy")
    assert file.read_bytes() == CONTENT and left(toy.parent) == ["toy.gguf"]
    monkeypatch.setattr(avss_nb.fetch, "download_wheel", lambda *args: pytest.fail("fetched again"))
    assert fetch_model("toy") == file and resolve_model("toy") == str(file)


def test_a_model_that_was_not_fetched(toy, capsys):
    with pytest.raises(FileNotFoundError, match="the model 'toy' is not here.*: avss ls models --fetch toy"):
        load_model("toy")
    assert main(["ls", "models", "--fetch", "gpt-5"]) == 2
    assert "no optional model 'gpt-5': there are toy" in capsys.readouterr().err


@pytest.mark.parametrize("short_of, error", [("disk", OSError), ("memory", MemoryError)])
def test_no_room(toy, monkeypatch, capsys, short_of, error):
    "Known before anything is fetched."
    monkeypatch.setattr(avss_nb.fetch, "download_wheel", lambda *args: pytest.fail("fetched"))
    if short_of == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), dict(free=1)))
    else:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), dict(available=1)))
    with pytest.raises(error, match="toy"):
        check_room("toy", toy.parent.parent)
    assert main(["ls", "models", "--fetch", "toy"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("toy: a toy. 0 MB in 3 wheels of a third party") and len(said) == 2
    assert left(toy.parent) == []


def test_a_wheel_of_another_hash_is_not_taken(tmp_path, monkeypatch):
    "pip compares: a wheel that lies in a folder at hand, and a hash that is not its own."
    (tmp_path / "here").mkdir()
    made = wheel(tmp_path / "index", 1, PARTS[0])
    with zipfile.ZipFile(made, "a") as more:
        more.writestr("toy_part1-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-part1\nVersion: 1.0\n")
        more.writestr("toy_part1-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        more.writestr("toy_part1-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    right = hashlib.sha256(made.read_bytes()).hexdigest()
    with pytest.raises(OSError, match="pip cannot fetch toy-part1==1.0"):
        download_wheel(f"toy-part1==1.0 --hash=sha256:{'0' * 64}", tmp_path / "here")
    assert left(tmp_path / "here") == []
    assert download_wheel(f"toy-part1==1.0 --hash=sha256:{right}", tmp_path / "here").read_bytes() == made.read_bytes()


def test_a_gguf_file_of_an_unknown_kind_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AVSS_NB_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "odd.gguf"
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "no_such_architecture")
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    with pytest.raises(ValueError, match="cannot read the GGUF file .*odd.gguf: .*no_such_architecture"):
        convert_gguf(file)
    assert left(tmp_path / "cache") == []
