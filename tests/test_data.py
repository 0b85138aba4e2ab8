"""The readers of the named benchmark sets, on the files of AVSS_NB_DATA and on made rows in the hub's form."""
import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

import avss_nb.data
from avss_nb.data import QUESTION, SENTENCE, load_questions, load_sentences, load_text

files = pytest.mark.skipif(not os.environ.get("AVSS_NB_DATA"), reason="AVSS_NB_DATA names no folder with the benchmark files")


def fold(texts) -> list[str]: return [t.casefold().strip() for t in texts]


@files
@pytest.mark.parametrize("split, n, short, with_context", [("test", 1000, 9, 884), ("train", 2397, 10, 0)])
def test_sciq(split, n, short, with_context):
    rows = load_questions("sciq", split=split)
    assert rows.features == QUESTION and len(rows) == n == len(set(rows["id"])) == len(set(fold(rows["question"])))
    assert Counter(map(len, rows["distractors"])) == {3: n - short, 2: short}
    assert all(len(r["answers"]) == 1 and not set(fold(r["answers"])) & set(fold(r["distractors"])) for r in rows)
    assert all(len(set(fold(r["distractors"]))) == len(r["distractors"]) for r in rows)
    assert all(t.strip() for r in rows for t in (r["question"], *r["answers"], *r["distractors"]))
    assert sum(bool(c) for c in rows["context"]) == with_context and set(rows["source"]) == {"sciq"}


@files
def test_sciq_names_the_right_option():
    "Against the direct-answer file for the test part, and the row's own index for the training part."
    folder = Path(os.environ["AVSS_NB_DATA"])/"sciq"
    with open(folder/"test.csv", encoding="utf-8", newline="") as file: right = {r["question"]: r["correct_answer"] for r in csv.DictReader(file)}
    rows = [r for r in load_questions("sciq", split="test") if r["question"] in right]
    assert len(rows) == 884 and all(fold(r["answers"]) == fold([right[r["question"]]]) for r in rows)
    raw = json.loads((folder/"sciq.train.first2400.json").read_text(encoding="utf-8"))
    for r in load_questions("sciq", split="train"):
        options = [raw[r["id"].split("/")[-1]][f"option{i}"] for i in range(1, 5)]
        assert r["answers"] == [options[raw[r["id"].split("/")[-1]]["answer_index"] - 1]] and set(r["distractors"]) < set(options)


@files
@pytest.mark.parametrize("split, labels", [("dev", {1: 444, 0: 428}), ("test", {1: 909, 0: 912})])
def test_sst2(split, labels):
    rows = load_sentences("sst2", split=split)
    assert rows.features == SENTENCE and Counter(rows["label"]) == labels
    assert len(set(rows["text"])) == len(rows) and all(t.strip() for t in rows["text"])


@files
def test_no_row_is_on_both_sides():
    "The files themselves repeat 9 training sentences, share 2 with the test part, and share one question."
    train, dev, test = (load_sentences("sst2", split=s)["text"] for s in ("train", "dev", "test"))
    assert len(train) == len(set(train)) and not set(fold(train)) & (set(fold(dev)) | set(fold(test))) and not set(fold(dev)) & set(fold(test))
    assert not set(fold(load_questions("sciq", split="train")["question"])) & set(fold(load_questions("sciq", split="test")["question"]))


@files
@pytest.mark.parametrize("split, n_words, unknown", [("test", 241_211, 15_218), ("valid", 49_584, 2_756)])
def test_wikitext2(split, n_words, unknown):
    "No word of the file is lost or doubled."
    texts = load_text("wikitext2", split=split)
    assert sum(len(t.split()) for t in texts) == n_words and sum(t.count("<unk>") for t in texts) == unknown
    assert len(set(texts)) == len(texts) and min(map(len, texts[:-1])) >= 1300


@files
def test_shakespeare():
    train, test, whole = (load_text("shakespeare", split=s) for s in ("train", "test", None))
    assert sorted(train + test) == sorted(whole) and not set(train) & set(test) and min(len(train), len(test)) > 50
    assert sum(len(t.split()) for t in whole) == 48_251


@files
@pytest.mark.parametrize("load, name", [(load_questions, "sciq"), (load_sentences, "sst2"), (load_text, "wikitext2"), (load_text, "shakespeare")])
def test_draws(load, name):
    "A draw keeps the set's order, follows its seed, and repeats nothing."
    rows = [list(load(name, n=20, seed=seed)) for seed in (0, 0, 1)]
    whole = list(load(name))
    places = [whole.index(r) for r in rows[0]]
    assert rows[0] == rows[1] != rows[2] and places == sorted(set(places)) and len(places) == 20


@files
def test_a_folder_may_be_given_instead(monkeypatch):
    folder = os.environ["AVSS_NB_DATA"]
    wanted = list(load_sentences("sst2"))
    monkeypatch.delenv("AVSS_NB_DATA")
    assert list(load_sentences("sst2", path=folder)) == wanted


def made_rows(repo: str, config: str | None = None, split: str | None = None) -> Dataset:
    "Rows as the hub has them."
    assert split in dict(sciq=["train", "validation", "test"], sst2=["train", "validation", "test"], wikitext=["train", "validation", "test"])[repo.split("/")[1]]
    if repo == "allenai/sciq":
        row = dict(question="What do cows eat?", distractor3="stones", distractor1="Grass", distractor2="iron", correct_answer="grass", support="Cows graze.")
        other = dict(question="What is ice?", distractor3="gas", distractor1="fire", distractor2="fire", correct_answer="water", support="")
        return Dataset.from_list([row, other, row])
    if repo == "stanfordnlp/sst2": return Dataset.from_list([dict(idx=0, sentence="a fine day ", label=1), dict(idx=1, sentence="a dull day ", label=0)])
    assert (repo, config) == ("Salesforce/wikitext", "wikitext-2-v1")
    return Dataset.from_dict(dict(text=["", " = Cows = \n", "", " Cows eat <unk> . \n", " They sleep . \n"]))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "No files, and a hub with made rows."
    monkeypatch.delenv("AVSS_NB_DATA", raising=False)
    monkeypatch.setattr(avss_nb.data, "load_dataset", made_rows)


@pytest.mark.parametrize("split", [None, "train", "test", "validation"])
def test_sciq_from_the_hub(hub, split):
    "The distractor that equals the answer, the repeated distractor and the repeated question are dropped."
    rows = load_questions("sciq", split=split)
    assert rows.features == QUESTION and [(r["question"], r["answers"], r["distractors"], r["context"]) for r in rows] == [
        ("What do cows eat?", ["grass"], ["iron", "stones"], "Cows graze."), ("What is ice?", ["water"], ["fire", "gas"], "")]


@pytest.mark.parametrize("split", [None, "train", "dev"])
def test_sst2_from_the_hub(hub, split):
    rows = load_sentences("sst2", split=split)
    assert rows.features == SENTENCE and list(rows) == [dict(text="a fine day", label=1), dict(text="a dull day", label=0)]


def test_sst2_of_the_hub_has_no_labels_for_test(hub, monkeypatch):
    "The hub hides them as -1: such rows are no test."
    monkeypatch.setattr(avss_nb.data, "load_dataset", lambda *args, **options: Dataset.from_list([dict(idx=0, sentence="a fine day", label=-1)]))
    with pytest.raises(ValueError, match="sst2.*label"): load_sentences("sst2", split="test")


@pytest.mark.parametrize("split", [None, "train", "test", "valid"])
def test_wikitext2_from_the_hub(hub, split):
    assert load_text("wikitext2", split=split) == ["= Cows =\n\nCows eat <unk> .\n\nThey sleep ."]


def test_an_empty_folder_leads_to_the_hub(hub, tmp_path):
    assert len(load_questions("sciq", path=tmp_path)) == 2 and len(load_sentences("sst2", path=tmp_path)) == 2


@pytest.mark.parametrize("load, name, repo", [(load_questions, "sciq", "allenai/sciq"), (load_sentences, "sst2", "stanfordnlp/sst2"), (load_text, "wikitext2", "Salesforce/wikitext")])
@pytest.mark.parametrize("folder", [True, False])
def test_a_hub_that_does_not_answer(hub, monkeypatch, tmp_path, load, name, repo, folder):
    def fail(*args, **options): raise ConnectionError("no route\nto the hub")
    monkeypatch.setattr(avss_nb.data, "load_dataset", fail)
    if folder: monkeypatch.setenv("AVSS_NB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error: load(name)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in (name, repo, str(tmp_path) if folder else "AVSS_NB_DATA is not set"))


def test_an_error_without_words_is_still_one_line(hub, monkeypatch):
    def fail(*args, **options): raise ConnectionError
    monkeypatch.setattr(avss_nb.data, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match="allenai/sciq"): load_questions("sciq")


def test_shakespeare_needs_the_folder(hub):
    with pytest.raises(FileNotFoundError, match="AVSS_NB_DATA is not set"): load_text("shakespeare")
