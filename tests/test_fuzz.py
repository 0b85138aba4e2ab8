"""Hostile input, more than ten thousand pieces of it, the same in every run: a valid result, or one error that names
the file; nothing hangs, is executed, or is written elsewhere."""

import json
import os
import pickle
import shutil
import signal
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes

from avss_nb.ablations import run_variants
from avss_nb.data import QUESTION, SENTENCE, load_questions, load_sentences, load_text, read_rows
from avss_nb.runs import RunDirectory, cached_table, check_run
from avss_nb.eavss import AnswerStats, hsav, answer_stats
from avss_nb.labeling import _Chunks
from avss_nb.metrics import LayerStats, collect_stats, variance
from avss_nb.models import load_model
from avss_nb.shipping import _own_scores
from avss_nb.allocation import measure_plans
from nursery import _place
from test_bad_input import model_folder, tiny_gguf
from test_contrastive import QUESTIONS, Letters
from tiny import batch_of, one_thread, tiny

INPUTS = {}  # test -> how many inputs it had


def many(n: int):
    "So many inputs, the same each time; what fails is not made smaller, since that takes minutes."
    return settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def hostile(n: int, *drawn, **named):
    "Two tests of one function: a quick one for every run, with one input of 25, and the long sweep (`…_all`, slow)."

    def make(function):
        sweep = pytest.mark.slow(many(n)(given(*drawn, **named)(function)))
        function.__globals__[f"{function.__name__}_all"] = sweep
        return many(max(5, n // 25))(given(*drawn, **named)(function))

    return make


WATCH = dict(folder=None, wrong=[])


def _watch(event: str, args: tuple):
    "Note what a reader must not do: write outside its folder, run a command, or look up what a pickle names."
    if WATCH["folder"] is None:
        return
    path = _place(event, args) if event != "os.mkdir" else str(args[0])
    if path is not None and not path.startswith((str(WATCH["folder"]), os.devnull)):
        WATCH["wrong"].append((event, path))
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        WATCH["wrong"].append((event, str(args)[:200]))


sys.addaudithook(_watch)


@contextmanager
def watched(folder: Path, test: str, seconds: int = 60):
    "Inside, one more input of a test; AssertionError for what must not happen, TimeoutError for a hang."

    def late(*args):
        raise TimeoutError(f"no end after {seconds} s")

    INPUTS[test] = INPUTS.get(test, 0) + 1
    WATCH.update(folder=folder, wrong=[])
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        WATCH["folder"] = None
    assert not WATCH["wrong"], WATCH["wrong"]


def clear(call, *named: str):
    """The result, or None where there was a clear error: of a class that callers expect, with a text that names the
    file."""
    try:
        return call()
    except TimeoutError:
        raise
    except (ValueError, OSError) as error:
        assert all(name in str(error) for name in named), repr(error)[:1000]
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# ---- what files hold

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "\n", "\r", '"', "a,b", "\t", "\ud800", "\u2028", "\ufeff", "nan", "-1", "x" * 200_000]
    ),
)
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, 1e308, -0.0, float("inf"), float("nan"), "1" * 5000]),
    TEXT,
)
VALUE = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6
)
GOOD = dict(
    question=st.just("Who lit it?"),
    answers=st.just(["a keeper"]),
    distractors=st.just(["a cook"]),
    text=st.just("a fine day"),
    label=st.sampled_from([0, 1]),
    id=st.just("q"),
    context=st.just(""),
)
ROW = st.fixed_dictionaries({}, optional={name: st.one_of(good, good, good, VALUE) for name, good in GOOD.items()})
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
DEEP = st.sampled_from(
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"question": ' + b"9" * 5000 + b"}",
        b"\0" * 4096,
        b"\xff\xfe",
        b"\r\n\r\n",
        b'{"a": 1e999}',
        b"3",
        b"null",
        b'"x"',
        b"[]",
        b"{}",
        b"[3]",
        b'{"a": 3}',
    ]
)


def spoilt(data: bytes, cut: int, put: bytes) -> bytes:
    "A file with some bytes in the middle replaced, or cut off there where there are none."
    at = cut % (len(data) + 1)
    return data[:at] + (put + data[at + len(put) :] if put else b"")


def files_of(rows) -> st.SearchStrategy[bytes]:
    "Whole files, files with a wrong piece, and bytes that are nothing."
    whole = st.builds(
        lambda text, encoding: text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "ignore"),
        rows,
        ENCODINGS,
    )
    return st.one_of(
        whole, st.builds(spoilt, whole, st.integers(0, 2000), st.binary(max_size=4)), st.binary(max_size=60), DEEP
    )


LINES = st.lists(ROW, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)))
WHOLE = st.one_of(
    st.lists(ROW, max_size=3), st.dictionaries(TEXT, ROW, max_size=3), st.builds(lambda r: dict(data=r), VALUE)
).map(json.dumps)
CELL = st.one_of(st.sampled_from(["a fine day", "1", "0", '"a, b"', '"']), TEXT.filter(lambda t: "\ud800" not in t))
TABLE = st.lists(st.lists(CELL, min_size=1, max_size=3), max_size=4).flatmap(
    lambda rows: st.sampled_from([",", "\t"]).map(lambda d: "\n".join(map(d.join, [["text", "label"], *rows])))
)


def write(place: Path, name: str, data: bytes) -> Path:
    (place / name).write_bytes(data)
    return place / name


QUESTIONS_READ, SENTENCES_READ = (
    (lambda t: t.features == QUESTION and all(r["question"].strip() and isinstance(r["answers"], list) for r in t)),
    (lambda t: t.features == SENTENCE and all(r["text"].strip() for r in t)),
)
FILES = {
    "questions.jsonl": (load_questions, files_of(LINES), QUESTIONS_READ),
    "sentences.csv": (load_sentences, files_of(TABLE), SENTENCES_READ),
    "sentences.tsv": (load_sentences, files_of(TABLE), SENTENCES_READ),
    "text.txt": (load_text, files_of(TEXT), lambda t: all(isinstance(x, str) and x.strip() for x in t)),
}


@hostile(1050, drawn=st.data())
@pytest.mark.parametrize("name", FILES)
def test_files_of_data(place, name, drawn):
    load, files, good = FILES[name]
    data = drawn.draw(files)
    with watched(place, name):
        file = write(place, name, data)
        found = clear(lambda: load("mine", path=file), str(file))
    assert found is None or good(found)


@hostile(
    1500,
    files_of(WHOLE),
    st.sampled_from([None, "data"]),
    st.sampled_from([dict(question=str), dict(answers=list[str]), dict(label=int), dict(id=dict)]),
    st.sampled_from(["json", "jsonl", "csv"]),
)
def test_files_of_json(place, data, inside, columns, form):
    "Every column that was asked for is there and of its kind."
    with watched(place, "json"):
        file = write(place, f"rows.{form}", data)
        found = clear(lambda: read_rows(file, columns, inside=inside), str(file))
    ((name, kind),) = columns.items()
    assert found is None or found and all(isinstance(r[name], getattr(kind, "__origin__", kind)) for r in found)


# ---- tables, notes and checkpoints

NUMBERS = st.lists(st.one_of(st.floats().map(repr), CELL), max_size=4).map(
    lambda v: "layer,avss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(v))
)


@hostile(1000, files_of(NUMBERS))
def test_tables_of_scores(place, data):
    with watched(place, "scores"):
        file = write(place, "scores.csv", data)
        found = clear(lambda: _own_scores(file, "avss", 3), str(file))
    assert found is None or found.index.tolist() == [0, 1, 2]


@hostile(1000, files_of(NUMBERS), st.sampled_from(["layer", ["set", "measure"]]))
def test_cached_tables(place, data, index):
    with watched(place, "stored tables"):
        file = write(place, "stored.csv", data)
        found = clear(
            lambda: cached_table(file, lambda: pytest.fail("it is there"), index=index), str(file), "delete it"
        )
    assert found is None or isinstance(found, pd.DataFrame) and list(found.index.names) == [index]
    assert file.read_bytes() == data


@hostile(
    1000, st.one_of(files_of(VALUE.map(json.dumps)), files_of(st.builds(lambda v: json.dumps(dict(settings=v)), VALUE)))
)
def test_notes_of_settings(place, data):
    "A folder is claimed only with the settings that its note holds."
    with watched(place, "settings"):
        folder = place / "run"
        folder.mkdir(exist_ok=True)
        file = write(folder, "settings.json", data)
        found = clear(lambda: RunDirectory.open(folder, dict(seed=0)) and True, str(folder))
    if found:
        assert json.loads(data.decode("utf-8"))["settings"].items() <= dict(seed=0).items()
    assert file.read_bytes() == data and os.listdir(folder) == ["settings.json"]


@hostile(500, files_of(LINES))
def test_kept_answers(place, data):
    folder = place / "answers"
    with watched(place, "answers"):
        chunks = _Chunks(folder, dict(seed=0))  # claimed once, then its own
        file = write(folder, "00000.jsonl", data)
        found = clear(lambda: chunks(0, data.count(b"\n"), lambda: pytest.fail("it is there")), str(file), "delete it")
    assert found is None or all(isinstance(r, dict) for r in found)


LLAMA = tiny("llama")
LAYERS = collect_stats(LLAMA, [batch_of(4, 3)])
ANSWERS = answer_stats(
    LLAMA,
    type("Pads", (), dict(pad_token_id=1, padding_side="right"))(),
    dict(id=["a", "b"], prompt_tokens=[[3], [4]], answer_tokens=[[5, 6], [7]]),
    points=("output",),
)
SIZES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(
    st.one_of(st.sampled_from([*LAYERS.sums, "lengths", "output", "..", "hist"]), st.text(max_size=6)),
    st.builds(
        lambda s, d: torch.zeros(s, dtype=d),
        SIZES,
        st.sampled_from([torch.float64, torch.int64, torch.int8, torch.bfloat16]),
    ),
    max_size=3,
)
NOTES = st.dictionaries(
    st.sampled_from(["format", "ids", "tokens", "version"]),
    st.sampled_from(["avss_nb.LayerStats", "avss_nb.AnswerStats", "answer", "[]", "[1]", '["a", "b"]', "{", "", "9"]),
    max_size=4,
)


def bytes_of(stats, place: Path) -> bytes:
    stats.save(place / "saved")
    return (place / "saved").read_bytes()


@pytest.fixture(scope="module")
def saved(place) -> dict[type, bytes]:
    return {type(s): bytes_of(s, place) for s in (LAYERS, ANSWERS)}


HEADER = st.builds(
    lambda n, body: struct.pack("<Q", n) + body,
    st.one_of(st.integers(0, 300), st.sampled_from([2**63, 2**40])),
    st.one_of(st.binary(max_size=40), VALUE.map(lambda v: json.dumps(v).encode())),
)


@hostile(
    1700,
    st.sampled_from([LayerStats, AnswerStats]),
    st.integers(0, 10**6),
    st.binary(max_size=3),
    st.one_of(st.none(), st.none(), HEADER, st.builds(to_bytes, TENSORS, NOTES)),
    st.booleans(),
)
def test_statistics(place, saved, kind, cut, put, other, early):
    "Cut short, with wrong bytes, of other tensors, or none at all: what is read can be asked."
    with watched(place, "statistics"):
        file = write(
            place,
            "stats.safetensors",
            other if other is not None else spoilt(saved[kind], cut % 3000 if early else cut, put),
        )
        found = clear(lambda: kind.load(file), str(file))
        if found is not None:
            repr(found), found.points, found.n_layers
            if kind is LayerStats:
                clear(lambda: variance(found, point="output"))
            else:
                clear(lambda: hsav(found, ["right", "wrong"], point="output"))


# ---- models and names


class Evil:
    "A pickle that runs a command."

    def __reduce__(self):
        return os.system, ("true",)


SPOILS = st.one_of(
    st.tuples(
        st.just("config.json"),
        files_of(
            st.dictionaries(
                st.sampled_from(
                    [
                        "model_type",
                        "architectures",
                        "auto_map",
                        "num_hidden_layers",
                        "vocab_size",
                        "dtype",
                        "quantization_config",
                        "tokenizer_class",
                    ]
                ),
                st.one_of(
                    st.sampled_from(
                        [
                            "llama",
                            "gpt2",
                            ["LlamaForCausalLM"],
                            dict(AutoConfig="evil.Evil", AutoModelForCausalLM="evil.Evil"),
                            -1,
                            0,
                            3,
                            "../evil",
                        ]
                    ),
                    LEAF.filter(lambda v: not isinstance(v, int) or abs(v) < 100),
                ),
                max_size=4,
            ).map(json.dumps)
        ),
    ),
    st.tuples(
        st.sampled_from(
            [
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
                "model.safetensors.index.json",
            ]
        ),
        files_of(VALUE.map(json.dumps)),
    ),
)


@hostile(40, SPOILS)
def test_model_folders(place, model_folder, spoil):
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    (folder / "evil.py").write_text("import os; os.system('true')\nclass Evil: pass\n")
    with watched(place, "models"):
        write(folder, *spoil)
        clear(lambda: load_model(folder, device="cpu"), str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused(place, model_folder, name):
    folder = place / "pickled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    with watched(place, "models"):
        write(folder, name, pickle.dumps(Evil()))
        assert clear(lambda: load_model(folder, device="cpu"), str(folder)) is None


NAMES = st.one_of(
    st.sampled_from(
        [
            "..",
            "../x",
            "../../etc/passwd",
            "/etc/passwd",
            "a/../../b",
            "a\0b",
            "\0",
            "",
            ".",
            "~/x",
            "~nobody/x",
            "C:\\x",
            "a\nb",
            "%2e%2e/x",
            "x" * 5000,
            "\ud800",
        ]
    ),
    st.text(max_size=8),
)


@hostile(600, NAMES)
def test_names_of_sets(place, name):
    with watched(place, "names"):
        for load in (load_questions, load_sentences, load_text):
            clear(lambda: load(name, path=place))
        clear(lambda: load_text("shakespeare", path=name))


@hostile(60, NAMES)
def test_names_of_models(place, name):
    with watched(place, "names"):
        assert clear(lambda: load_model(name)) is None


@hostile(200, NAMES)
def test_names_of_variants(place, name):
    "A name that would leave the folder is refused before anything is measured."

    def items(*args):
        return pd.DataFrame(dict(set="x", measure="m", item=[0], value=[1.0], tokens=1)).set_index(["set", "measure"])

    folder = place / "variants" / "inner"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    with watched(folder, "names"):
        clear(lambda: run_variants(LLAMA, Letters(), QUESTIONS, {name: None}, items, out=folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("avss_nb.allocation.measure_items", items)
            clear(lambda: measure_plans(LLAMA, Letters(), {name: None}, [], out=folder))


def test_some_hundred_inputs():
    "Counted where they are given; the other tests of this file come first."
    assert sum(INPUTS.values()) >= 400, INPUTS


@pytest.mark.slow
def test_at_least_ten_thousand_inputs():
    "The long sweeps of this file come first."
    assert sum(INPUTS.values()) >= 10_000, INPUTS
