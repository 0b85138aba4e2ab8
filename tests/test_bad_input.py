"""Wrong input ends in one clear line, at once, and leaves nothing half-written behind; so do a kill and a full disk."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import avss_nb.data
import avss_nb.report
from avss_nb.data import batches, load_questions, load_sentences, load_text
from avss_nb.importance import block_influence, leave_one_out, removal_losses
from avss_nb.metrics import LayerStats, avss, collect_stats, navss, sparsity
from avss_nb.models import blocks, convert_gguf, load_model
from avss_nb.pruning import select_layers
from avss_nb.surgery import skip_layers
from avss_nb.command import main
from avss_nb.report import run_study
from tiny import batch_of, one_thread, tiny

ROOT = Path(__file__).resolve().parent.parent


def one_line(raised, *parts: str) -> str:
    "The error's text: a single line that names each part."
    line = str(raised.value)
    assert line.strip() and "\n" not in line, line
    assert all(part in line for part in parts), line
    return line


def files(folder: Path) -> list[str]:
    "Everything below a folder, but lock files."
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    "A GGUF file of five random Llama blocks, with a tokenizer of bytes."
    path, model = tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama", vocab_size=300)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    tokens = [*bytes_to_unicode().values(), *(f"<{i}>" for i in range(42)), "<|endoftext|>", "ab"]
    for key, value in dict(
        block_count=5,
        context_length=128,
        embedding_length=32,
        feed_forward_length=64,
        head_count=4,
        head_count_kv=2,
        layer_norm_rms_eps=1e-5,
        rope_dimension_count=8,
        rope_freq_base=1e4,
        vocab_size=300,
        tokenizer_model="gpt2",
        token_list=tokens,
        token_types=[1] * 256 + [3] * 43 + [1],
        token_merges=["a b"],
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    ).items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", weight.detach().numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


@pytest.fixture(scope="module")
def model_folder(tiny_gguf, tmp_path_factory) -> Path:
    "The same model as a folder."
    return convert_gguf(tiny_gguf, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    "A fresh cache."
    monkeypatch.setenv("AVSS_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code: str, **environment) -> subprocess.Popen:
    "A Python process with this project on its path."
    env = (
        os.environ
        | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        | {k: str(v) for k, v in environment.items()}
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# unknown models and sets


@pytest.mark.parametrize("name", ["nonesuch", "nobody/nonesuch", "two words"])
def test_unknown_model(name):
    with pytest.raises(FileNotFoundError) as error:
        load_model(name)
    one_line(error, name, "smollm2-135m", "folder")


@pytest.mark.parametrize(
    "name", ["nonesuch/a/b", "./nonesuch", "~/nonesuch", "/nonesuch", "/nonesuch/m.gguf", "nonesuch.gguf", ""]
)
def test_path_without_a_model(name):
    with pytest.raises(FileNotFoundError) as error:
        load_model(name)
    one_line(error, "nonesuch" if name else "")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_model(tmp_path)
    one_line(error, str(tmp_path), "config.json")


def spoil(folder: Path, how: str):
    "Do one thing to a model folder that makes it unfit."
    if how == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    if how == "empty weights":
        (folder / "model.safetensors").write_bytes(b"")
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    if how == "cut config":
        (folder / "config.json").write_text('{"model_type"')
    if how == "cut tokenizer":
        (folder / "tokenizer.json").write_text("{")
    if how == "no tokenizer":
        [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]
    changes = {
        "unknown type": dict(model_type="nonesuch"),
        "no type": dict(model_type=None),
        "other width": dict(hidden_size=64, head_dim=16),
        "more blocks": dict(num_hidden_layers=7),
    }
    if how in changes:
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes[how]))


@pytest.mark.parametrize(
    "how",
    [
        "cut weights",
        "empty weights",
        "no weights",
        "cut config",
        "cut tokenizer",
        "no tokenizer",
        "unknown type",
        "no type",
        "other width",
        "more blocks",
    ],
)
def test_a_spoilt_model_folder(how, model_folder, tmp_path):
    "Named in one line; blocks that the file does not hold are not made up."
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path, how)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        load_model(tmp_path)
    one_line(error, str(tmp_path))


@pytest.mark.parametrize(
    "load, known",
    [
        (load_questions, ("atlas", "nq", "sciq", "triviaqa", "truthfulqa", "wikiqa", "squad", "popqa", "halueval")),
        (load_sentences, ("words", "sst2")),
        (load_text, ("pydoc", "wikitext2", "shakespeare")),
    ],
)
def test_unknown_set(load, known, tmp_path, monkeypatch):
    monkeypatch.setenv("AVSS_NB_DATA", str(tmp_path))
    with pytest.raises(ValueError) as error:
        load("nonesuch")
    one_line(error, "nonesuch", *known, str(tmp_path))
    monkeypatch.delenv("AVSS_NB_DATA")
    with pytest.raises(ValueError) as error:
        load("nonesuch")
    one_line(error, "nonesuch", *known, "AVSS_NB_DATA is not set")


@pytest.mark.parametrize("load, name", [(load_questions, "sciq"), (load_sentences, "sst2"), (load_text, "wikitext2")])
def test_data_folder_that_is_not_there(load, name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(name, path=tmp_path / "nonesuch")
    one_line(error, str(tmp_path / "nonesuch"))


@pytest.mark.parametrize("load, name", [(load_questions, "atlas"), (load_sentences, "words"), (load_text, "pydoc")])
@pytest.mark.parametrize("options", [dict(split="nonesuch"), dict(n=0), dict(n=-1), dict(n=10**6)], ids=str)
def test_wrong_part_of_a_set(load, name, options):
    with pytest.raises(ValueError) as error:
        load(name, **options)
    one_line(error, name, str(*options.values()))


# models, layers, fractions, thresholds


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())], ids=lambda m: type(m).__name__
)
def test_a_model_with_no_blocks(model):
    for call in (
        blocks,
        lambda m: collect_stats(m, [batch_of(3)]),
        lambda m: skip_layers(m, [0]),
        lambda m: block_influence(m, [batch_of(3)]),
    ):
        with pytest.raises(ValueError) as error:
            call(model)
        one_line(error, "no blocks", type(model).__name__)


@pytest.mark.parametrize("fraction", [0, 1, -0.25, 1.5, 25, float("nan"), float("inf")])
def test_fraction_outside(fraction):
    with pytest.raises(ValueError) as error:
        select_layers(pd.Series([1.0, 2, 3, 4]), fraction=fraction)
    one_line(error, "fraction", str(fraction))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["count", "mass", "published_code"])
def test_a_score_that_cannot_be_ranked(rule, bad):
    with pytest.raises(ValueError) as error:
        select_layers(pd.Series([1.0, 2, bad, 3, 4]), fraction=0.5, rule=rule)
    one_line(error, "layer", "2")


@pytest.mark.parametrize("layers", [[5], [-1], [99], [2, 2], [0, 1, 2, 3, 4], [1.5]], ids=str)
def test_wrong_layers(layers):
    with pytest.raises(ValueError) as error:
        skip_layers(tiny("llama"), layers)
    one_line(error, "layer")


@pytest.mark.parametrize("layers", [[5], [-1], [1, 1]], ids=str)
def test_wrong_layers_to_leave_out(layers):
    with pytest.raises(ValueError) as error:
        removal_losses(tiny("llama"), [batch_of(4)], layers=layers)
    one_line(error, "layer")


@pytest.fixture(scope="module")
def stats():
    return collect_stats(tiny("llama"), [batch_of(6, 4)], reduce=("elements", "samples", "neurons"))


@pytest.mark.parametrize("measure", [sparsity, avss, navss])
@pytest.mark.parametrize("reduce", ["elements", "samples", "neurons"])
@pytest.mark.parametrize(
    "threshold",
    [
        dict(eps=0),
        dict(eps=0.0),
        dict(eps=-1e-5),
        dict(eps=float("nan")),
        dict(tau=0),
        dict(tau=-0.1),
        dict(tau=float("nan")),
    ],
    ids=str,
)
def test_threshold_not_above_zero(stats, measure, reduce, threshold):
    with pytest.raises(ValueError) as error:
        measure(stats, reduce=reduce, **threshold)
    one_line(error, "above zero", *threshold)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("layer", [0, 3])
def test_activations_that_are_not_finite(layer, value):
    "The first such layer is named, though every later one is spoilt too, and reading ends there."
    model, walked = tiny("llama"), []
    blocks(model)[layer].mlp.down_proj.weight.data[0, 0] = float(value)

    def some():
        for batch in (batch_of(6, 4), batch_of(5)):
            walked.append(1)
            yield batch

    with pytest.raises(FloatingPointError) as error:
        collect_stats(model, some())
    one_line(error, f"layer {layer} ", "NaN or infinite")
    assert len(walked) == 1
    with pytest.raises(FloatingPointError) as error:
        block_influence(model, [batch_of(6, 4)])
    one_line(error, f"layer {layer} ")


def test_nothing_to_measure():
    for measure in (collect_stats, block_influence, leave_one_out):
        with pytest.raises(ValueError) as error:
            measure(tiny("llama"), [])
        one_line(error, "empty")


# texts


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize(
    "texts, named",
    [
        ([], "no text"),
        (["", "ab"], "text 0"),
        (["ab", ""], "text 1"),
        (["ab", " "], "text 1"),
        (["ab", "\n\t "], "text 1"),
        ("ab", "one string"),
        (dict(pydoc=["ab"]), "a mapping, and its keys are no texts"),
    ],
)
def test_empty_text(tokenizer, texts, named):
    with pytest.raises(ValueError) as error:
        batches(texts, tokenizer)
    one_line(error, named)


def test_texts_that_are_read_once(tokenizer):
    listed, once = (list(batches(texts, tokenizer)) for texts in (["ab", "ba"], iter(["ab", "ba"])))
    assert [b["input_ids"].tolist() for b in once] == [b["input_ids"].tolist() for b in listed]


def test_text_shorter_than_one_token(tokenizer):
    "A text of which nothing is left but special tokens."
    with pytest.raises(ValueError) as error:
        batches(["ab", "<1>"], tokenizer)
    one_line(error, "text 1")


def test_text_of_one_token(tokenizer):
    "It has statistics, and no perplexity."
    one = batches(["ab"], tokenizer)
    model = tiny("llama", vocab_size=300)
    assert collect_stats(model, one).get("output", "count").tolist() == [32] * 5
    with pytest.raises(ValueError) as error:
        leave_one_out(model, one)
    one_line(error, "nothing to predict")


@pytest.mark.parametrize(
    "options",
    [dict(padding_side="up"), dict(max_length=0), dict(batch_size=0), dict(overflow="drop"), dict(max_tokens=-1)],
    ids=str,
)
def test_wrong_batch_options(tokenizer, options):
    with pytest.raises(ValueError) as error:
        batches(["ab ab"], tokenizer, **options)
    one_line(error, str(*options.values()))


# no right and no space to write


def test_statistics_below_a_file(stats, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError) as error:
        stats.save(tmp_path / "file" / "stats.safetensors")
    one_line(error, str(tmp_path / "file"))
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_statistics_in_no_folder(stats, tmp_path):
    with pytest.raises(OSError) as error:
        stats.save(tmp_path / "nonesuch" / "stats.safetensors")
    one_line(error, str(tmp_path / "nonesuch"))
    assert files(tmp_path) == []


@contextmanager
def small_files():
    "Inside, no file may grow beyond 4 kB, as on a full disk. Not a fixture: pytest's own output may be a file."
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def test_statistics_on_a_full_disk(stats, tmp_path):
    "What was there before stays."
    (tmp_path / "stats.safetensors").write_text("old")
    with small_files(), pytest.raises(OSError) as error:
        stats.save(tmp_path / "stats.safetensors")
    one_line(error, str(tmp_path / "stats.safetensors"))
    assert files(tmp_path) == ["stats.safetensors"] and (tmp_path / "stats.safetensors").read_text() == "old"


def test_damaged_statistics(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    whole = path.read_bytes()
    for piece in (b"", whole[:7], whole[:1000], whole[:-1], b"x" * 1000):
        path.write_bytes(piece)
        with pytest.raises(ValueError) as error:
            LayerStats.load(path)
        one_line(error, str(path))


def test_conversion_on_a_full_disk(tiny_gguf, tmp_path):
    with small_files(), pytest.raises(OSError) as error:
        convert_gguf(tiny_gguf, cache=tmp_path / "cache")
    one_line(error, str(tmp_path / "cache"))
    assert files(tmp_path) == ["cache"]


def test_disk_full_of_tokenizer(tiny_gguf, cache, monkeypatch):
    "The model's file was written, the next one finds no space."

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(OSError) as error:
        load_model(tiny_gguf)
    one_line(error, "No space left on device", str(cache))
    assert files(cache) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_cache_that_cannot_be_made(tiny_gguf, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("AVSS_NB_CACHE", str(tmp_path / place))
    with pytest.raises(PermissionError) as error:
        load_model(tiny_gguf)
    one_line(error, str(tmp_path / place), "AVSS_NB_CACHE")
    assert (tmp_path / "file").read_text() == "mine"


def test_cache_without_the_right_to_write(tiny_gguf, cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError) as error:
        load_model(tiny_gguf)
    one_line(error, str(cache), "AVSS_NB_CACHE")


# a half-written cache


@pytest.mark.parametrize("size", [0, 3, 100, 20_000])
def test_cut_gguf(tiny_gguf, cache, tmp_path, size):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(ValueError) as error:
        load_model(path)
    one_line(error, str(path))
    assert files(cache) == []


KILLED = """
import os, signal, sys, transformers
from pathlib import Path
from avss_nb import models
def die(*args, **options): os.kill(os.getpid(), signal.SIGKILL)
if os.environ["MOMENT"] == "before the tokenizer": transformers.PreTrainedTokenizerBase.save_pretrained = die
else: Path.rename = die
models.load_model(os.environ["GGUF"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the tokenizer", "before the rename"])
def test_killed_while_converting(tiny_gguf, cache, moment):
    "The next start succeeds and cleans up; the one after finds all done."
    process = start(KILLED, MOMENT=moment, GGUF=tiny_gguf, AVSS_NB_CACHE=cache)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and any(".partial" in name for name in files(cache))
    model, _ = load_model(tiny_gguf)
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    assert not any("partial" in name for name in files(cache)) and len(blocks(model)) == 5
    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    load_model(tiny_gguf)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps


@pytest.mark.parametrize("how", ["cut", "removed", "no note"])
def test_a_damaged_cache_is_made_again(tiny_gguf, cache, how):
    load_model(tiny_gguf)
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    complete, weights = files(cache), folder / "model.safetensors"
    kept = weights.read_bytes()
    if how == "cut":
        weights.write_bytes(kept[: len(kept) // 2])
    if how == "removed":
        weights.unlink()
    if how == "no note":
        (folder / "complete.json").unlink()
    with pytest.warns(UserWarning, match="incomplete"):
        load_model(tiny_gguf)
    assert files(cache) == complete and weights.read_bytes() == kept


@pytest.mark.slow
def test_two_processes_convert_at_once(tiny_gguf, cache):
    code = (
        "import os; from avss_nb.models import load_model; "
        "print(load_model(os.environ['GGUF'])[0].config.num_hidden_layers)"
    )
    both = [start(code, GGUF=tiny_gguf, AVSS_NB_CACHE=cache) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "5\n"), err
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1 and not any("partial" in name for name in files(cache))


# the command


def command_fails(capsys, *arguments, naming: tuple = ()) -> str:
    "Run `avss study` with wrong arguments: status 2 or 1, one line on stderr, no traceback."
    try:
        status = main(["study", *(str(a) for a in arguments)])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("avss study: ")]
    assert status in (1, 2) and len(lines) == 1 and "Traceback" not in out + err and not out, out + err
    assert all(str(part) in lines[0] for part in naming), lines[0]
    return lines[0]


@pytest.fixture
def no_work(monkeypatch):
    "Whatever measures fails the test: errors come before long work."
    for name in ("collect_stats", "removal_losses", "measure_removal", "layer_scores"):
        monkeypatch.setattr(avss_nb.report, name, lambda *args, **options: pytest.fail("long work was begun"))


def test_command_with_an_unknown_model(capsys, no_work, tmp_path):
    for name in ("nonesuch", "nobody/nonesuch", tmp_path / "nonesuch"):
        command_fails(capsys, name, "--out", tmp_path / "out", naming=(name,))
    assert files(tmp_path) == []


def test_command_with_an_unknown_data_folder(capsys, no_work, model_folder, tmp_path):
    command_fails(
        capsys,
        model_folder,
        "--data",
        tmp_path / "nonesuch",
        "--out",
        tmp_path / "out",
        naming=(tmp_path / "nonesuch",),
    )
    assert files(tmp_path) == []


def test_command_with_an_empty_data_folder(capsys, no_work, model_folder, tmp_path, monkeypatch):
    "The benchmark files are not there, and the hub does not answer."

    def fail(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(avss_nb.data, "load_dataset", fail)
    (tmp_path / "data").mkdir()
    command_fails(
        capsys,
        model_folder,
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        naming=(tmp_path / "data", "wikitext2"),
    )
    assert files(tmp_path) == ["data"]


@pytest.mark.parametrize(
    "option, value",
    [
        ("--fraction", "0"),
        ("--fraction", "1"),
        ("--fraction", "nan"),
        ("--fraction", ".01"),
        ("--passages", "0"),
        ("--passages", "100000"),
        ("--questions", "-1"),
        ("--sentences", "99999"),
        ("--max-length", "1"),
        ("--dtype", "float99"),
        ("--device", "nonesuch"),
    ],
)
def test_command_with_a_wrong_value(capsys, no_work, model_folder, tmp_path, option, value):
    command_fails(capsys, model_folder, "--out", tmp_path / "out", option, value)
    assert files(tmp_path) == []


def test_command_with_an_encoder(capsys, no_work, model_folder, tmp_path):
    "A masked model has no perplexity."
    for part in (
        tiny("bert", vocab_size=300, max_position_embeddings=512),
        AutoTokenizer.from_pretrained(model_folder),
    ):
        part.save_pretrained(tmp_path / "bert")
    command_fails(capsys, tmp_path / "bert", "--out", tmp_path / "out", naming=("BertForMaskedLM",))
    assert not (tmp_path / "out").exists()


def test_command_that_may_not_write(capsys, no_work, model_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        command_fails(capsys, model_folder, "--out", out, naming=(tmp_path / "file",))
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_command_into_a_folder_of_something_else(capsys, no_work, model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    command_fails(capsys, model_folder, "--out", tmp_path / "out", naming=(tmp_path / "out",))
    assert files(tmp_path) == ["out", "out/thesis.txt"]


def test_command_without_space(capsys, no_work, model_folder, tmp_path, monkeypatch):
    "No space left, and an error before the work."

    def full(path):
        return type("Usage", (), dict(total=2**30, used=2**30 - 2**20, free=2**20))

    monkeypatch.setattr("shutil.disk_usage", full)
    command_fails(capsys, model_folder, "--out", tmp_path / "out", naming=(tmp_path / "out", "free"))
    assert files(tmp_path) == []


def test_space_that_runs_out_during_a_study(capsys, model_folder, tmp_path):
    "One line that names the file; what is there is complete, nothing else is left."
    with small_files():
        line = command_fails(
            capsys,
            model_folder,
            "--out",
            tmp_path / "out",
            "--passages",
            "2",
            "--max-length",
            "16",
            naming=(tmp_path / "out",),
        )
    assert files(tmp_path) == ["out", "out/settings.json"] and json.loads(
        (tmp_path / "out" / "settings.json").read_text()
    ), line


def test_command_with_a_broken_model(capsys, model_folder, tmp_path):
    "NaN in block 3: named, and nothing half-written."
    model, tokenizer = load_model(model_folder, device="cpu")
    blocks(model)[3].mlp.down_proj.weight.data.fill_(float("nan"))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "violation_rate")
    command_fails(
        capsys,
        tmp_path / "violation_rate",
        "--out",
        tmp_path / "out",
        "--passages",
        "2",
        "--max-length",
        "16",
        naming=("layer 3",),
    )
    assert not [name for name in files(tmp_path / "out") if name.endswith((".part", ".csv"))]


@pytest.mark.slow
def test_command_as_a_process(tmp_path):
    "The status reaches the shell."
    process = start(
        (
            "import os, sys; from avss_nb.command import main; sys.exit(main(['study', 'nonesuch', '--out', "
            "os.environ['OUT']]))"
        ),
        OUT=tmp_path / "out",
    )
    out, err = process.communicate()
    assert (
        process.returncode in (1, 2)
        and "Traceback" not in err
        and out == ""
        and "nonesuch" in err
        and files(tmp_path) == []
    )


def test_run_study_from_python(model_folder, tmp_path):
    with pytest.raises(ValueError) as error:
        run_study(model_folder, out=tmp_path / "out", fraction=2)
    one_line(error, "fraction", "2")
