"""Killed at any moment, a run resumes to the same result; a full disk, a damaged file and other settings are reported,
and nothing is lost or mixed. The long sweeps are marked slow."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

import avss_nb.labeling
import avss_nb.shipping
import avss_nb.report
from avss_nb.ablations import run_variants
from avss_nb.contrastive import contrastive_tune
from avss_nb.runs import RunDirectory, cached_table, check_run
from avss_nb.labeling import generate_answers
from avss_nb.models import content_key, load_model
from avss_nb.healing import heal
from avss_nb.training import last_checkpoint
from avss_nb.scale import distributed_layer_scores
from avss_nb.report import measure, run_study, study_data
from conftest import ROOT
from nursery import ASKED, SMALL
from test_bad_input import files, model_folder as short_window, small_files, tiny_gguf
from test_contrastive import QUESTIONS, SHORT, Letters, chosen
from tiny import batch_of, one_thread, tiny

slow = pytest.mark.slow
LONG = dict(
    study=dict(changes=14, kills=14),
    prune=dict(changes=10, kills=8),
    answers=dict(changes=6, kills=14),
    variants=dict(changes=20, kills=12),
    tune=dict(changes=20, kills=10),
)


@pytest.fixture(scope="module")
def model_folder(short_window, tmp_path_factory) -> Path:
    "Five random Llama blocks with a tokenizer of bytes, and a window for a few answered examples."
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(short_window, folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | dict(max_position_embeddings=2048))
    )
    return folder


@pytest.fixture(scope="module")
def killed(model_folder, tmp_path_factory) -> tuple[Path, dict]:
    "Where runs that were killed again and again ended, and how often each was killed."
    place = tmp_path_factory.mktemp("killed")
    command = [sys.executable, Path(__file__).with_name("nursery.py"), place, model_folder, "0", json.dumps(LONG)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads(done.stdout.splitlines()[-1])


def kills(runs: dict) -> dict[str, int]:
    "How often each job was killed."
    return {name: sum(sum(run.values()) for run in found) for name, found in runs.items()}


@slow
def test_at_least_fifty_kills(killed):
    runs = killed[1]
    counts = kills(runs)
    assert sum(counts.values()) >= 50 and all(counts[name] >= LONG[name]["kills"] for name in LONG), counts
    for kind in ("changes", "torn", "time"):
        assert sum(run[kind] for found in runs.values() for run in found), runs


def contents(folder: Path) -> dict[str, bytes]:
    "Every file below a folder; of statistics the numbers, since their header has no order of its own."

    def of(file):
        return (
            b"".join(t.numpy().tobytes() for _, t in sorted(load_file(file).items()))
            if file.suffix == ".safetensors"
            else file.read_bytes()
        )

    return {name: of(folder / name) for name in files(folder) if (folder / name).is_file()}


@slow
@pytest.mark.parametrize("name", ["study", "prune", "answers", "variants"])
def test_a_killed_run_ends_with_the_same_files(killed, name):
    "To the last bit, and with nothing besides."
    place, runs = killed
    wanted = contents(place / f"{name}-whole")
    assert len(wanted) > 3
    for i in range(len(runs[name])):
        found = contents(place / f"{name}-{i}")
        assert sorted(found) == sorted(wanted) and not [n for n in wanted if found[n] != wanted[n]]


@slow
def test_killed_trainings_end_with_the_same_weights(killed):
    files_ = sorted(killed[0].glob("tune-*.weights"), reverse=True)
    wanted, *others = (torch.load(file, weights_only=True) for file in files_)
    assert others and all(torch.equal(weights[name], wanted[name]) for weights in others for name in wanted)


# ---- damaged files, other settings, no space


def spoil(file: Path, how: str):
    complete = file.read_bytes()
    if how == "cut":
        file.write_bytes(complete[: len(complete) // 2 - 1])
    if how == "row":
        file.write_bytes(b"".join(complete.splitlines(keepends=True)[:-1]))
    if how == "empty":
        file.write_bytes(b"")
    if how == "zeros":
        file.write_bytes(bytes(len(complete)))
    if how == "garbage":
        file.write_bytes(b"\xff\xd8" + os.urandom(200))
    if how == "foreign":
        file.write_text("name,price\ncow,3\n")


HOW = ["cut", *(pytest.param(how, marks=slow) for how in ("row", "empty", "zeros", "garbage", "foreign"))]


def refused_or_same(work, folder: Path, wanted: dict[str, bytes], spoilt: str) -> bool:
    """Run again over a spoilt file: an error that names it and the remedy, and nothing changed; or the same result.
    Then without it: the same result."""
    before = contents(folder) if not spoilt.endswith(".safetensors") else None
    try:
        work(folder)
    except ValueError as error:
        assert str(folder / spoilt) in str(error) and any(word in str(error) for word in ("delete", "make it again")), (
            error
        )
        if before:
            assert contents(folder) == before
        (folder / spoilt).unlink()
        work(folder)
        refused = True
    else:
        refused = False
    assert contents(folder) == wanted
    return refused


@pytest.fixture(scope="module")
def at_hand(model_folder):
    "Settings, data and model of a study."
    wanted = avss_nb.report.Settings(model=str(model_folder), **SMALL)
    return wanted, study_data(wanted), load_model(model_folder, device="cpu")


def put_at_hand(monkeypatch, data, parts):
    "From here on a study reads no data and loads no model of its own."
    monkeypatch.setattr(avss_nb.report, "study_data", lambda settings: data)
    monkeypatch.setattr(avss_nb.report, "load_model", lambda *args, **options: parts)


@pytest.fixture
def quick(at_hand, monkeypatch):
    "The settings of a study whose data and model are at hand."
    wanted, *held = at_hand
    put_at_hand(monkeypatch, *held)
    return wanted


@pytest.fixture(scope="module")
def whole(at_hand, tmp_path_factory) -> Path:
    "The folder of a study that was left alone."
    wanted, *held = at_hand
    out = tmp_path_factory.mktemp("whole") / "study"
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_at_hand(monkeypatch, *held)
        measure(wanted, out)
    return out


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["profile.csv", "losses/batch-0.csv", "scores.csv", "certainty.csv"])
def test_a_damaged_table_of_a_study(whole, quick, tmp_path, name, how):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    spoil(out / name, how)
    assert refused_or_same(lambda folder: measure(quick, folder), out, contents(whole), name)


@pytest.mark.parametrize("how", HOW)
def test_damaged_statistics_of_a_study(whole, quick, tmp_path, how):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    spoil(out / "stats.safetensors", how)
    (out / "profile.csv").unlink()
    assert refused_or_same(lambda folder: measure(quick, folder), out, contents(whole), "stats.safetensors")


def answered(out: Path, n: int = 8, **options):
    return generate_answers(
        tiny("llama", vocab_size=300),
        PADS,
        Dataset.from_list(ASKED[:n]),
        **dict(max_new_tokens=3, stop=(), out=out) | options,
    )


def ablated(out: Path, **options):
    variants = dict(top=[dict(layers=[2], rank=2)], base_model=None)
    return run_variants(
        tiny("llama"), Letters(), QUESTIONS, variants, chosen, seeds=(0,), out=out, **SHORT | dict(steps=2) | options
    )


@pytest.fixture(autouse=True, scope="module")
def small_chunks(model_folder):
    "Two questions a file."
    global PADS
    PADS, kept = load_model(model_folder, device="cpu")[1], avss_nb.labeling._CHUNK
    avss_nb.labeling._CHUNK = 2
    yield
    avss_nb.labeling._CHUNK = kept


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "work, name", [(answered, "00001.jsonl"), (ablated, "top-0-0.csv")], ids=["answers", "variants"]
)
def test_a_damaged_file_of_answers_and_variants(tmp_path, work, name, how):
    work(tmp_path / "out")
    wanted = contents(tmp_path / "out")
    spoil(tmp_path / "out" / name, how)
    assert refused_or_same(work, tmp_path / "out", wanted, name)


@pytest.mark.parametrize(
    "work, name", [(answered, "00001.jsonl"), (ablated, "top-0-0.csv")], ids=["answers", "variants"]
)
def test_cut_at_every_line_end(tmp_path, work, name):
    work(tmp_path / "out")
    lines = (tmp_path / "out" / name).read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    for n in range(len(lines)):
        (tmp_path / "out" / name).write_bytes(b"".join(lines[:n]))
        with pytest.raises(ValueError, match=f"{name} is damaged.*: delete it, and it is made again"):
            work(tmp_path / "out")


def is_damaged(file: Path, index) -> bool:
    try:
        cached_table(file, lambda: pytest.fail("it is there"), index=index)
    except ValueError as error:
        return f"{file} is damaged" in str(error)
    return False


@pytest.mark.parametrize(
    "table, index",
    [
        (pd.DataFrame(dict(x=[0.1, 1 / 3])).rename_axis("layer"), "layer"),
        (pd.DataFrame(dict(x=[])).rename_axis("layer"), "layer"),
        (
            pd.DataFrame(
                dict(a=["one\ntwo", "three, four"]),
                pd.MultiIndex.from_tuples([("p", 1), ("q\r\n", 2)], names=["set", "item"]),
            ),
            ["set", "item"],
        ),
    ],
    ids=["numbers", "no row", "texts of several lines"],
)
def test_a_table_that_was_cut_anywhere(tmp_path, table, index):
    file = tmp_path / "table.csv"
    pd.testing.assert_frame_equal(
        cached_table(file, lambda: table, index=index),
        table,
        check_exact=True,
        **({} if len(table) else dict(check_dtype=False, check_index_type=False)),
    )
    complete = file.read_bytes()
    for n in range(len(complete)):
        file.write_bytes(complete[:n])
        assert is_damaged(file, index), complete[:n]
    table.to_csv(file)  # as tables were written before
    assert not is_damaged(file, index)


def test_tables_of_a_study_cut_at_every_line_end(whole, tmp_path):
    tables = sorted(whole.rglob("*.csv"))
    assert len(tables) > 12
    for n, table in enumerate(tables):
        lines, file = table.read_bytes().splitlines(keepends=True), tmp_path / f"{n}.csv"
        for k in range(len(lines)):
            file.write_bytes(b"".join(lines[:k]))
            assert is_damaged(file, 0), (table, k)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "work, name", [(answered, "settings.json"), (ablated, "variants.json")], ids=["answers", "variants"]
)
def test_a_damaged_note_of_settings_is_not_guessed(tmp_path, work, name, how):
    work(tmp_path / "out")
    spoil(tmp_path / "out" / name, how)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{name} is damaged: delete"):
        work(tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", *(pytest.param(name, marks=slow) for name in ("optimizer.pt", "rng_state.pth"))]
    + ["adapter_model.safetensors"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, how):
    "The one before it is taken, and the training ends with the same weights."

    def tuned(out=None, **options):
        return contrastive_tune(
            tiny("llama"), Letters(), QUESTIONS, [3], out=out, **SHORT | dict(steps=4, save_every=1) | options
        )

    def stop(step, terms):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "out", on_step=stop)
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-3")
    spoil(tmp_path / "out" / "checkpoint-3" / name, how)
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    if how == "cut":
        assert all(
            torch.equal(p, q) for p, q in zip(tuned(tmp_path / "out").parameters(), tuned().parameters(), strict=True)
        )


@pytest.mark.parametrize(
    "work, change",
    [(answered, dict(seed=1)), (answered, dict(n=6)), (ablated, dict(learning_rate=1e-3)), (ablated, dict(steps=3))],
    ids=["answers, seed", "answers, questions", "variants, rate", "variants, steps"],
)
def test_other_settings_are_not_mixed_in(tmp_path, work, change):
    work(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run with .*choose another folder"):
        work(tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_other_settings_of_a_study(whole, quick, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run with .*passages=4.*choose another folder"):
        run_study(quick.model, out=tmp_path / "out", **SMALL | dict(passages=5))
    assert contents(tmp_path / "out") == before


def other_weights(folder: Path):
    "Another model of the same shapes at the same path."
    (file,) = folder.glob("*.safetensors")
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, metadata=dict(format="pt"))


def other_config(folder: Path):
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("2048", "1024"))


class Begun(Exception):
    "The run was let in."


def claimed(out: Path, model: Path):
    return measure(avss_nb.report.Settings(model=str(model), **SMALL), out)


def pruned(out: Path, model: Path):
    return avss_nb.shipping.prune_to_folder(model, out=out, **SMALL)


@pytest.mark.parametrize("change", [other_weights, other_config])
@pytest.mark.parametrize(
    "work, note", [(claimed, "out/settings.json"), (pruned, "out.partial/recipe.json")], ids=["study", "prune"]
)
def test_another_model_at_the_same_path(at_hand, model_folder, tmp_path, monkeypatch, work, note, change):
    "Refused, as is a note that knows no content; times of change do not count."

    def stop(*args, **options):
        raise Begun

    for module, first in ((avss_nb.report, "_measure_all"), (avss_nb.shipping, "cached_table")):
        monkeypatch.setattr(module, "study_data", lambda settings: at_hand[1])
        monkeypatch.setattr(module, first, stop)
    model, note = tmp_path / "model", tmp_path / note
    shutil.copytree(model_folder, model)

    def begun():
        with pytest.raises(Begun):
            work(tmp_path / "out", model)

    begun()
    before = note.read_bytes()
    for file in model.iterdir():
        os.utime(file, (0, 0))
    begun()
    change(model)
    with pytest.raises(ValueError, match="holds a run with content=.*choose another folder"):
        work(tmp_path / "out", model)
    assert note.read_bytes() == before
    old = json.loads(before)
    del old["settings"]["content"]
    note.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="holds a run with no content: choose another folder"):
        work(tmp_path / "out", model)


def tuned_in(out: Path, model):
    return contrastive_tune(model, Letters(), QUESTIONS, [3], out=out, **SHORT | dict(steps=2))


def healed_in(out: Path, model):
    return heal(model, PADS, ["So it goes. " * 20], out=out, steps=1, batch_size=1, max_length=8)


def taught_in(out: Path, model):
    return heal(
        tiny("llama", vocab_size=300),
        PADS,
        ["So it goes. " * 20],
        teacher=model,
        out=out,
        steps=1,
        batch_size=1,
        max_length=8,
    )


def scored_in(out: Path, model):
    return distributed_layer_scores(model, [batch_of(4, 3)], methods=["avss"], out=out)


def variants_in(out: Path, model):
    return run_variants(model, Letters(), QUESTIONS, dict(base_model=None), chosen, seeds=(0,), out=out, **SHORT)


@pytest.mark.parametrize("work", [tuned_in, healed_in, taught_in, scored_in, variants_in])
def test_another_model_of_the_same_shapes(tmp_path, work):
    model = tiny("llama", vocab_size=300) if work in (healed_in, taught_in) else tiny("llama")
    work(tmp_path / "out", model)
    work(tmp_path / "out", model)
    with torch.no_grad():
        next(model.parameters())[0] += 1
    with pytest.raises(ValueError, match="holds a run with .*choose another folder"):
        work(tmp_path / "out", model)


def test_notes_of_the_stored_studies_are_accepted():
    for note in (ROOT / "nbs" / "results").glob("*/settings.json"):
        assert "content" not in json.loads(note.read_text())["settings"]
    check_run(
        ROOT / "nbs" / "results" / "report",
        asdict(avss_nb.report.Settings(size="full", heal_steps=40, tune_steps=20, sparsity=0.5))
        | content_key("smollm2-135m"),
    )


@pytest.mark.parametrize("work", [answered, ablated], ids=["answers", "variants"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, work):
    "No space at the n-th file: an error that names it; with space again, the rest is made and nothing else."
    work(tmp_path / "whole")
    wanted, replace, room = contents(tmp_path / "whole"), os.replace, [0]

    def full(source, target):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    for n in range(len(wanted)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            room[0] = n
            with pytest.raises(OSError, match="cannot write .*No space left on device") as error:
                work(tmp_path / f"cut-{n}")
        kept = contents(tmp_path / f"cut-{n}")
        assert (
            str(tmp_path / f"cut-{n}") in str(error.value)
            and all(kept[name] == wanted[name] for name in kept.keys() & wanted.keys())
            and len(kept) >= n
            and not any(name.endswith(".part") for name in kept)
        )
        work(tmp_path / f"cut-{n}")
        assert contents(tmp_path / f"cut-{n}") == wanted


def test_files_that_may_not_grow(tmp_path):
    "As a quota does: the table is written completely, or not at all."
    table = pd.DataFrame(dict(x=range(5000))).rename_axis("layer")
    with small_files(), pytest.raises(OSError, match="cannot write .*table.csv"):
        cached_table(tmp_path / "table.csv", lambda: table)
    assert files(tmp_path) == []
    assert cached_table(tmp_path / "table.csv", lambda: table).equals(table)


@pytest.mark.parametrize("work", [answered, ablated], ids=["answers", "variants"])
def test_a_file_in_the_folders_place(tmp_path, work):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises((ValueError, OSError), match=str(tmp_path / "file")):
            work(out)
    assert contents(tmp_path) == dict(file=b"mine")


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    "Reported before the work, and by the folder's name; the superuser may write anywhere, so the refusal is faked."

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(avss_nb.labeling, "_answer_rows", lambda *args: pytest.fail("long work was begun"))
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'out'}: Permission denied"):
        answered(tmp_path / "out")
    assert files(tmp_path) == []


@slow
def test_a_folder_whose_note_was_being_written(tmp_path):
    "Killed at its first file: the folder is that run's."
    code = """
import os, sys
from avss_nb.models import atomic_write
def write(part):
    part.write_text('{"sett')
    os.kill(os.getpid(), 9)
atomic_write(sys.argv[1], write)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "settings.json"])
    assert len(files(tmp_path)) == 1
    assert files(RunDirectory.open(tmp_path, dict(seed=0)).folder) == ["settings.json"]
