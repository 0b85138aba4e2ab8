"""The readers of the named benchmark sets, on the files of AVSS_NB_DATA and on made rows in the hub's form."""

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

import avss_nb.data
from avss_nb.benchmarks import options_alone, count_questions, usual_name
from avss_nb.data import (
    QUESTION,
    QUESTIONS,
    SENTENCE,
    distractor_kinds,
    load_questions,
    load_sentences,
    load_text,
    question_key,
    read_rows,
    split_half,
)
from conftest import NBS

REPOS = dict(
    nq="google-research-datasets/nq_open",
    sciq="allenai/sciq",
    triviaqa="mandarjoshi/trivia_qa",
    truthfulqa="truthfulqa/truthful_qa",
    wikiqa="microsoft/wiki_qa",
    squad="rajpurkar/squad",
    popqa="akariasai/PopQA",
    halueval="pminervini/HaluEval",
)
each_set = pytest.mark.parametrize("name", REPOS)
files = pytest.mark.skipif(
    not os.environ.get("AVSS_NB_DATA"), reason="AVSS_NB_DATA names no folder with the benchmark files"
)


def fold(texts) -> list[str]:
    return [t.casefold().strip() for t in texts]


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
    folder = Path(os.environ["AVSS_NB_DATA"]) / "sciq"
    with open(folder / "test.csv", encoding="utf-8", newline="") as file:
        right = {r["question"]: r["correct_answer"] for r in csv.DictReader(file)}
    rows = [r for r in load_questions("sciq", split="test") if r["question"] in right]
    assert len(rows) == 884 and all(fold(r["answers"]) == fold([right[r["question"]]]) for r in rows)
    raw = json.loads((folder / "sciq.train.first2400.json").read_text(encoding="utf-8"))
    for r in load_questions("sciq", split="train"):
        options = [raw[r["id"].split("/")[-1]][f"option{i}"] for i in range(1, 5)]
        assert r["answers"] == [options[raw[r["id"].split("/")[-1]]["answer_index"] - 1]] and set(
            r["distractors"]
        ) < set(options)


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
    assert (
        len(train) == len(set(train))
        and not set(fold(train)) & (set(fold(dev)) | set(fold(test)))
        and not set(fold(dev)) & set(fold(test))
    )
    assert not set(fold(load_questions("sciq", split="train")["question"])) & set(
        fold(load_questions("sciq", split="test")["question"])
    )


@files
@pytest.mark.parametrize("split, n_words, unknown", [("test", 241_211, 15_218), ("valid", 49_584, 2_756)])
def test_wikitext2(split, n_words, unknown):
    "No word of the file is lost or doubled."
    texts = load_text("wikitext2", split=split)
    assert sum(len(t.split()) for t in texts) == n_words and sum(t.count("<unk>") for t in texts) == unknown
    assert len(set(texts)) == len(texts) and min(map(len, texts[:-1])) >= 1300


@files
def test_shakespeare():
    train, test, everything = (load_text("shakespeare", split=s) for s in ("train", "test", None))
    assert sorted(train + test) == sorted(everything) and not set(train) & set(test) and min(len(train), len(test)) > 50
    assert sum(len(t.split()) for t in everything) == 48_251


@files
@pytest.mark.parametrize(
    "load, name",
    [(load_questions, "sciq"), (load_sentences, "sst2"), (load_text, "wikitext2"), (load_text, "shakespeare")],
)
def test_draws(load, name):
    "A draw keeps the set's order, follows its seed, and repeats nothing."
    rows = [list(load(name, n=20, seed=seed)) for seed in (0, 0, 1)]
    everything = list(load(name))
    places = [everything.index(r) for r in rows[0]]
    assert rows[0] == rows[1] != rows[2] and places == sorted(set(places)) and len(places) == 20


@files
def test_a_folder_may_be_given_instead(monkeypatch):
    folder = os.environ["AVSS_NB_DATA"]
    wanted = list(load_sentences("sst2"))
    monkeypatch.delenv("AVSS_NB_DATA")
    assert list(load_sentences("sst2", path=folder)) == wanted


def made_rows(repo: str, config: str | None = None, split: str | None = None) -> Dataset:
    "Rows as the hub has them."
    assert split in ("train", "validation", "test")
    if repo == "allenai/sciq":
        row = dict(
            question=f"What do cows eat in the {split} part?",
            distractor3="stones",
            distractor1="Grass",
            distractor2="iron",
            correct_answer="grass",
            support="Cows graze.",
        )
        other = dict(
            question="What is ice?",
            distractor3="gas",
            distractor1="fire",
            distractor2="fire",
            correct_answer="water",
            support="",
        )
        return Dataset.from_list([row, other, row] if split == "test" else [other, row, row])
    if repo == "stanfordnlp/sst2":
        return Dataset.from_list(
            [dict(idx=0, sentence="a fine day ", label=1), dict(idx=1, sentence="a dull day ", label=0)]
        )
    assert (repo, config) == ("Salesforce/wikitext", "wikitext-2-v1")
    return Dataset.from_dict(dict(text=["", " = Cows = \n", "", " Cows eat <unk> . \n", " They sleep . \n"]))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "No files, and a hub with made rows."
    monkeypatch.delenv("AVSS_NB_DATA", raising=False)
    monkeypatch.setattr(avss_nb.data, "load_dataset", made_rows)


@pytest.mark.parametrize("split", [None, "train", "test", "validation"])
def test_sciq_from_the_hub(hub, split):
    "Dropped: a distractor that equals the answer, a repeated distractor or question, and questions of the test part."
    rows = load_questions("sciq", split=split)
    first = (f"What do cows eat in the {split or 'test'} part?", ["grass"], ["iron", "stones"], "Cows graze.")
    assert rows.features == QUESTION and [
        (r["question"], r["answers"], r["distractors"], r["context"]) for r in rows
    ] == [first, *([("What is ice?", ["water"], ["fire", "gas"], "")] if split in (None, "test") else [])]


@pytest.mark.parametrize("split", [None, "train", "dev"])
def test_sst2_from_the_hub(hub, split):
    rows = load_sentences("sst2", split=split)
    assert rows.features == SENTENCE and list(rows) == [
        dict(text="a fine day", label=1),
        dict(text="a dull day", label=0),
    ]


def test_sst2_of_the_hub_has_no_labels_for_test(hub, monkeypatch):
    "The hub hides them as -1: such rows are no test."
    monkeypatch.setattr(
        avss_nb.data,
        "load_dataset",
        lambda *args, **options: Dataset.from_list([dict(idx=0, sentence="a fine day", label=-1)]),
    )
    with pytest.raises(ValueError, match="sst2.*label"):
        load_sentences("sst2", split="test")


@pytest.mark.parametrize("split", [None, "train", "test", "valid"])
def test_wikitext2_from_the_hub(hub, split):
    assert load_text("wikitext2", split=split) == ["= Cows =\n\nCows eat <unk> .\n\nThey sleep ."]


def test_an_empty_folder_leads_to_the_hub(hub, tmp_path):
    assert len(load_questions("sciq", path=tmp_path)) == 2 and len(load_sentences("sst2", path=tmp_path)) == 2


@pytest.mark.parametrize(
    "load, name, repo",
    [
        *((load_questions, *pair) for pair in REPOS.items()),
        (load_sentences, "sst2", "stanfordnlp/sst2"),
        (load_text, "wikitext2", "Salesforce/wikitext"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_a_hub_that_does_not_answer(hub, monkeypatch, tmp_path, load, name, repo, folder):
    def fail(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(avss_nb.data, "load_dataset", fail)
    if folder:
        monkeypatch.setenv("AVSS_NB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    line = str(error.value)
    assert "\n" not in line and all(
        part in line for part in (name, repo, str(tmp_path) if folder else "AVSS_NB_DATA is not set")
    )


def test_an_error_without_words_is_still_one_line(hub, monkeypatch):
    def fail(*args, **options):
        raise ConnectionError

    monkeypatch.setattr(avss_nb.data, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match="allenai/sciq"):
        load_questions("sciq")


def test_shakespeare_needs_the_folder(hub):
    with pytest.raises(FileNotFoundError, match="AVSS_NB_DATA is not set"):
        load_text("shakespeare")


# the benchmark sets' files

DATA = Path(os.environ.get("AVSS_NB_DATA") or ".")


@files
@each_set
@pytest.mark.parametrize("split", [None, "train", "test"])
def test_a_set_by_its_name(name, split):
    rows = load_questions(name, split=split)
    assert (
        rows.features == QUESTION
        and len(rows) > 100
        and set(rows["source"]) == {name}
        and len(set(rows["id"])) == len(rows)
    )
    listed = rows.to_list()
    assert len({(question_key(r["question"]), r["context"]) for r in listed}) == len(rows)
    for r in listed:
        assert r["answers"] and all(t.strip() for t in (r["question"], *r["answers"], *r["distractors"]))
        assert len(set(r["answers"])) == len(r["answers"]) and len(set(fold(r["distractors"]))) == len(r["distractors"])
    kinds = Counter(kind for r in listed for kind in distractor_kinds(r["answers"], r["distractors"]))
    assert not kinds["equal"] and not (kinds["near"] and name in ("nq", "triviaqa"))
    assert (sum(kinds.values()) > 0) == (
        name not in ("squad", "popqa") and (name, split) not in [("triviaqa", None), ("triviaqa", "test")]
    )
    if split == "test":
        drawn = [load_questions(name, split=split, n=20, seed=3).to_list() for _ in range(2)]
        assert drawn[0] == drawn[1]


@files
@each_set
def test_no_question_is_on_both_sides(name):
    everything, train, test = (
        [question_key(q) for q in load_questions(name, split=split)["question"]] for split in (None, "train", "test")
    )
    assert not set(train) & set(test)
    if QUESTIONS[name].halved:
        assert Counter(train) + Counter(test) == Counter(everything) and 0.4 < len(train) / len(everything) < 0.6
    else:
        assert test == everything


def written(column: str, value: float) -> str:
    "A number as the chapter's table has it."
    if np.isnan(value):
        return "–"
    return f"{value:.1f}" if column in ("answers", "words_right", "words_wrong") else f"{int(value):,}"


@files
def test_accuracies_by_form_alone_are_those_that_are_stored():
    "And the classifier has to do with form: with one option's form for all there is nothing to tell."
    stored = pd.read_csv(NBS / "results" / "options_alone" / "accuracy.csv", index_col="set")
    sciq = load_questions("sciq", split="test")
    found = options_alone(sciq)
    assert found["questions"] == stored.questions["sciq"] and found["chance"] == pytest.approx(stored.chance["sciq"])
    assert found["accuracy"] == pytest.approx(stored.accuracy["sciq"], abs=0.02)
    same = options_alone([row | dict(answers=["0"], distractors=["0"]) for row in sciq.select(range(40))])
    assert same["accuracy"] == 0.5


def test_few_options_are_not_judged():
    with pytest.raises(ValueError, match="9 questions have a wrong option: ten are needed"):
        options_alone([dict(answers=["a"], distractors=["b"])] * 9 + [dict(answers=["a"], distractors=[])])


@files
def test_counts_of_the_chapter():
    "The chapter's table is what the files give."
    chapter = json.loads((NBS / "90_benchmarks.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    found = count_questions()
    assert header == ["set", "part", *found.columns] and len(lines) == len(found)
    for line, (index, row) in zip(lines, found.iterrows()):
        assert line == [*index, *(written(column, value) for column, value in row.items())]
    nq, trivia, popqa, halueval, wikiqa, squad = (
        found.loc[key]
        for key in (
            ("nq", "all"),
            ("triviaqa", "train"),
            ("popqa", "all"),
            ("halueval", "all"),
            ("wikiqa", "all"),
            ("squad", "all"),
        )
    )
    for claim in (
        "911 rows",
        "77 % of them, the first alias of the file in 27 %",
        f"NQ's {nq.rows:,.0f} machine-made false answers {nq.equal:.0f} equal a right one and {nq.near:.0f} more",
        f"TriviaQA's 2,500 it is {trivia.equal:.0f} and {trivia.near:.0f}. "
        f"Another {nq.naming:.0f} and {trivia.naming:.0f} of",
        f"{trivia.repeats:.0f} rows of TriviaQA's training file repeat",
        f"{trivia.elsewhere:.0f} of its questions are in the test sample: 175 letter by letter, 19 more",
        f"{popqa.repeats:.0f} pairs",
        f"{halueval.words_right:.1f} words on average, its hallucinated ones {halueval.words_wrong:.1f}",
        f"{wikiqa.unanswered:.0f} of WikiQA's {wikiqa.rows:.0f}",
        "6,165 sentences; a reader that takes quotes for quotes finds 6,116",
        f"{squad.rows:,.0f} questions of SQuAD",
    ):
        assert claim in text, claim


@files
def test_counts_of_the_data_folders_own_page():
    counts = count_questions()
    assert counts.loc["nq", "all"][["rows", "equal"]].tolist() == [3610, 243] and counts.loc["triviaqa", "train"][
        ["rows", "repeats", "equal"]
    ].tolist() == [2500, 146, 911]
    assert counts.loc["wikiqa", "all"][["rows", "unanswered", "questions"]].tolist() == [633, 390, 243]
    assert counts.repeats.loc[["popqa", "sciq", "truthfulqa", "halueval"]].tolist() == [14, 0, 2, 0, 0]
    assert counts.loc["halueval", "all"][["words_right", "words_wrong"]].round(1).tolist() == [2.2, 10.7]
    raw = [
        fold(r["question"] for r in read_rows(DATA / "triviaqa" / f, dict(question=str)))
        for f in ("triviaqa.test.subsample1000.jsonl", "TriviaQA.first2500.csv")
    ]
    assert len(set(raw[0]) & set(raw[1])) == 175
    assert (
        len(set(map(question_key, raw[0])) & set(map(question_key, raw[1])))
        == counts.elsewhere["triviaqa", "train"]
        == 194
    )


@files
def test_the_usual_name_is_what_a_machine_says():
    rows = [
        (r["answer"].split("; "), r["false_answer"])
        for r in read_rows(DATA / "triviaqa/TriviaQA.first2500.csv", dict(answer=str, false_answer=str))
    ]
    predicted = [(aliases, name) for aliases, name in rows if distractor_kinds(aliases, [name]) == ["equal"]]

    def agrees(choose) -> float:
        kinds = [distractor_kinds([choose(aliases)], [name])[0] for aliases, name in predicted]
        return np.mean([kind in ("equal", "near") for kind in kinds])

    assert (
        len(predicted) == 911
        and round(agrees(usual_name), 2) == 0.77
        and round(agrees(lambda aliases: aliases[0]), 2) == 0.27
    )


@files
def test_nq_joins_false_answers_by_question():
    "A false answer stands with its own question, references in the file's order."
    rows = {r["question"]: r for r in load_questions("nq")}
    lines = [
        json.loads(line)
        for line in (DATA / "nq_open/NQ-open.dev.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    false = pd.read_csv(DATA / "nq_open/Natural_Questions.csv", keep_default_na=False).false_answer
    assert len(rows) == len(lines) == len(false)
    for line, wrong in zip(lines, false):
        row = rows[line["question"]]
        assert row["answers"] == list(dict.fromkeys(line["answer"])) and row["distractors"] == [wrong] * (
            distractor_kinds(row["answers"], [wrong])[0] in ("", "names")
        )


@files
def test_truthfulqa_says_what_the_multiple_choice_file_says():
    mc = {
        question_key(r["question"]): r
        for r in json.loads((DATA / "truthfulqa/mc_task.json").read_text(encoding="utf-8"))
    }
    rows = load_questions("truthfulqa")
    assert len(rows) == len(mc) == 817
    for r in rows:
        targets = mc[question_key(r["question"])]
        assert question_key(r["answers"][0]) == question_key(next(iter(targets["mc1_targets"])))  # the best one
        right, wrong = (
            {question_key(t) for t, label in targets["mc2_targets"].items() if label == side} for side in (1, 0)
        )
        ours = {question_key(t) for t in r["answers"]}
        assert (
            ours - right <= {"unknown"} and right <= ours
        )  # true and false in two rows: there the file keeps the false one
        assert {question_key(t) for t in r["distractors"]} == wrong - {"unknown" if "unknown" in ours else ""}


@files
def test_wikiqa_keeps_every_sentence():
    table = pd.read_csv(DATA / "wikiqa/WikiQA-test.tsv", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    with open(DATA / "wikiqa/WikiQA-test.tsv", encoding="utf-8", newline="") as file:
        assert len(table) == 6165 and len(list(csv.DictReader(file, delimiter="\t"))) == 6116
    rows = {r["id"]: r for r in load_questions("wikiqa", unanswered=True)}
    assert len(rows) == 633 and sum(not r["answers"] for r in rows.values()) == 390
    for id, part in table.groupby("QuestionID"):
        for column, label in (("answers", 1), ("distractors", 0)):
            assert (
                rows[f"wikiqa/{id}"][column]
                == list({" ".join(s.casefold().split()): s for s in part.Sentence[part.Label == label][::-1]}.values())[
                    ::-1
                ]
            )


@files
def test_squad_popqa_and_halueval_row_by_row():
    squad = load_questions("squad")
    assert all(a in r["context"] for r in squad for a in r["answers"]) and Counter(map(len, squad["answers"])) == {
        1: 1183,
        2: 2,
    }
    raw = {
        f"popqa/{r['id']}": r
        for r in map(
            json.loads, (DATA / "popqa/popqa.test.subsample1000.jsonl").read_text(encoding="utf-8").splitlines()
        )
    }
    rows = load_questions("popqa")
    assert all(
        r["answers"][0] == raw[r["id"]]["metadata"]["obj"] and set(raw[r["id"]]["golden_answers"]) <= set(r["answers"])
        for r in rows
    )
    merged = {question_key(r["question"]): set(r["answers"]) for r in rows}
    assert all(
        set(r["golden_answers"]) <= merged[question_key(r["question"])] for r in raw.values()
    )  # no reference is lost
    raw = list(map(json.loads, (DATA / "halueval/qa_data.first1000.json").read_text(encoding="utf-8").splitlines()))
    assert [(r["question"], *r["answers"], *r["distractors"], r["context"]) for r in load_questions("halueval")] == [
        (r["question"], r["right_answer"], r["hallucinated_answer"], r["knowledge"]) for r in raw
    ]


@files
def test_triviaqa_has_no_quotes_of_a_csv_file():
    raw = [
        json.loads(line)
        for line in (DATA / "triviaqa/triviaqa.test.subsample1000.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    rows, quoted = load_questions("triviaqa"), 0
    for r, line in zip(rows, raw):
        if '""' in line["question"]:
            quoted += 1
            assert r["question"] == next(csv.reader([line["question"]]))[0]  # what a CSV reader makes of it
        else:
            assert r["question"] == line["question"]
        references = list(dict.fromkeys(next(csv.reader([a]))[0] if '""' in a else a for a in line["golden_answers"]))
        assert r["answers"][0] in references and r["answers"][1:] == [a for a in references if a != r["answers"][0]]
    assert quoted == 67 and not any(
        '""' in t
        for split in ("train", "test")
        for r in load_questions("triviaqa", split=split)
        for t in (r["question"], *r["answers"], *r["distractors"])
    )


# files made up here, one small file for each real one

WHO = "Who lit the lamp?"
OPTIONS = "Answer1: Ada\nAnswer2: Bo\nAnswer3: Cy\nAnswer4: Di\n\nAnswer format: …"
ROWS = {  # file -> its rows; tables have a line of names
    "nq_open/NQ-open.dev.jsonl": [
        dict(question=WHO, answer=["Ada", "A. Wick"]),
        dict(question="Where?", answer=["Quill"]),
    ],
    "nq_open/Natural_Questions.csv": [
        dict(question="Where?", answer="Quill", false_answer="Penn"),
        dict(question=WHO, answer="Ada", false_answer="ADA "),
    ],
    "sciq/sciq_test_mc.json": [
        dict(
            instruction=f"The question: {q}\n\n" + OPTIONS,
            answer=f"answer{i}",
        )
        for i, q in enumerate((WHO, "Where?"), 1)
    ],
    "sciq/test.csv": [
        dict(question=WHO, correct_answer="Ada", support="Ada did."),
        dict(question="Where?", correct_answer="Bo", support="With Bo."),
    ],
    "sciq/sciq.train.first2400.json": {
        str(k): dict(question=q, option1="a", option2="b", option3="c", option4="d", answer_index=2)
        for k, q in enumerate((WHO, "When?"))
    },
    "triviaqa/triviaqa.test.subsample1000.jsonl": [
        dict(id="t1", question=WHO, golden_answers=["WICK", "Wick"]),
        dict(id="t2", question="Where?", golden_answers=["Quill"]),
    ],
    "triviaqa/TriviaQA.first2500.csv": [
        dict(question="who lit the lamp", answer="Wick", false_answer="Bo"),
        dict(question="When?", answer="1901; In 1901", false_answer="1902"),
    ],
    "truthfulqa/TruthfulQA.csv": [
        {"Question": q, "Best Answer": "Ada", "Correct Answers": "Ada;Ada did", "Incorrect Answers": "Bo; No one; "}
        for q in (WHO, "Where?")
    ],
    "wikiqa/WikiQA-test.tsv": [
        dict(QuestionID=f"Q{i}", Question=q, Sentence=f'"Sentence {k} .', Label=str(k))
        for i, q in enumerate((WHO, "Where?"))
        for k in (0, 1)
    ],
    "squad_xquad_en/xquad.en.json": dict(
        data=[
            dict(
                paragraphs=[
                    dict(
                        context="Ada lit it.",
                        qas=[
                            dict(id=f"s{i}", question=q, answers=[dict(text="Ada", answer_start=0)])
                            for i, q in enumerate((WHO, "Where?"))
                        ],
                    )
                ]
            )
        ]
    ),
    "popqa/popqa.test.subsample1000.jsonl": [
        dict(id=f"p{i}", question=q, metadata=dict(obj="Ada"), golden_answers=["A. Wick", "Ada"])
        for i, q in enumerate((WHO, "Where?"))
    ],
    "halueval/qa_data.first1000.json": [
        dict(knowledge="Ada lit it.", question=q, right_answer="Ada", hallucinated_answer="Bo lit it.")
        for q in (WHO, "Where?")
    ],
}
OWNER = {file: dict(nq_open="nq", squad_xquad_en="squad").get(file.split("/")[0], file.split("/")[0]) for file in ROWS}


def split_of(file: str) -> str | None:
    return "train" if "first2" in file else None


def as_text(file: str, rows) -> str:
    if file.endswith((".csv", ".tsv")):
        lines = [list(rows[0]), *(list(r.values()) for r in rows)]
        if file.endswith(".tsv"):
            return "".join("\t".join(cells) + "\n" for cells in lines)
        return "".join(",".join(f'"{c}"' for c in cells) + "\n" for cells in lines)
    if file.endswith(".jsonl") or file.startswith("halueval"):
        return "".join(json.dumps(r) + "\n" for r in rows)
    return json.dumps(rows, indent=1)


def renamed(rows, column: str):
    "The rows with that column under another name, however deep it is."
    if isinstance(rows, list):
        return [renamed(r, column) for r in rows]
    if isinstance(rows, dict):
        return {("renamed" if k == column else k): renamed(v, column) for k, v in rows.items()}
    return rows


@pytest.fixture
def folder(monkeypatch, tmp_path):
    "A data folder with made files, and a hub that may not be asked."

    def asked(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(avss_nb.data, "load_dataset", asked)
    monkeypatch.setenv("AVSS_NB_DATA", str(tmp_path))
    for file, rows in ROWS.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(as_text(file, rows), encoding="utf-8")
    return tmp_path


def test_made_files_are_read(folder):
    found = {name: [(r["question"], r["answers"], r["distractors"]) for r in load_questions(name)] for name in REPOS}
    assert found == dict(
        nq=[(WHO, ["Ada", "A. Wick"], []), ("Where?", ["Quill"], ["Penn"])],
        sciq=[(WHO, ["Ada"], ["Bo", "Cy", "Di"]), ("Where?", ["Bo"], ["Ada", "Cy", "Di"])],
        triviaqa=[(WHO, ["Wick", "WICK"], []), ("Where?", ["Quill"], [])],
        truthfulqa=[(q, ["Ada", "Ada did"], ["Bo", "No one"]) for q in (WHO, "Where?")],
        wikiqa=[(q, ['"Sentence 1 .'], ['"Sentence 0 .']) for q in (WHO, "Where?")],
        squad=[(q, ["Ada"], []) for q in (WHO, "Where?")],
        popqa=[(q, ["Ada", "A. Wick"], []) for q in (WHO, "Where?")],
        halueval=[(q, ["Ada"], ["Bo lit it."]) for q in (WHO, "Where?")],
    )
    assert [(r["question"], r["answers"], r["distractors"]) for r in load_questions("triviaqa", split="train")] == [
        ("When?", ["1901", "In 1901"], ["1902"])
    ]
    assert load_questions("sciq", split="train")["question"][:] == ["When?"] and load_questions("sciq")["context"][
        :
    ] == ["Ada did.", "With Bo."]


def test_repeats_near_ones_and_other_passages(folder):
    "References of repeats count together, also against earlier false answers; another passage is another question."
    rows = [
        ("When?", "1901; In 1901", "1902"),
        ("when", "1902", "The 1903s"),
        ("Why?", "Lanterns", "A lantern"),
        ("why", "Lamps", "A 1901"),
        ("When", "1904", "a bell"),
    ]
    (folder / "triviaqa/TriviaQA.first2500.csv").write_text(
        as_text("t.csv", [dict(zip(("question", "answer", "false_answer"), r)) for r in rows]), encoding="utf-8"
    )
    assert [(r["id"], r["answers"], r["distractors"]) for r in load_questions("triviaqa", split="train")] == [
        ("triviaqa/train/0", ["1901", "In 1901", "1902", "1904"], ["The 1903s", "a bell"]),
        ("triviaqa/train/2", ["Lanterns", "Lamps"], ["A 1901"]),
    ]
    assert count_questions("triviaqa").loc["triviaqa", "train"].iloc[:8].tolist() == [5, 3, 0, 0, 2, 1, 1, 3]
    wrong = [
        dict(question=WHO, answer="Ada", false_answer="The Ad"),
        dict(question="Where?", answer="Quill", false_answer="The Quill."),
    ]
    (folder / "nq_open/Natural_Questions.csv").write_text(as_text("n.csv", wrong), encoding="utf-8")
    assert load_questions("nq")["distractors"][:] == [["The Ad"], []]
    passages = [
        dict(
            context=c,
            qas=[
                dict(id=f"{c}{i}", question=q, answers=[dict(text=c[i])])
                for i, q in enumerate((WHO, "who lit the LAMP"))
            ],
        )
        for c in ("ab", "cd")
    ]
    (folder / "squad_xquad_en/xquad.en.json").write_text(
        json.dumps(dict(data=[dict(paragraphs=passages)])), encoding="utf-8"
    )
    assert [(r["id"], r["answers"], r["context"]) for r in load_questions("squad")] == [
        ("squad/ab0", ["a", "b"], "ab"),
        ("squad/cd0", ["c", "d"], "cd"),
    ]
    assert sorted(len(QUESTIONS["squad"](split, folder)) for split in ("train", "test")) == [0, 2]


COLUMNS = [
    ("nq_open/NQ-open.dev.jsonl", "question"),
    ("nq_open/NQ-open.dev.jsonl", "answer"),
    ("nq_open/Natural_Questions.csv", "question"),
    ("nq_open/Natural_Questions.csv", "false_answer"),
    ("sciq/sciq_test_mc.json", "instruction"),
    ("sciq/sciq_test_mc.json", "answer"),
    ("sciq/test.csv", "question"),
    ("sciq/test.csv", "support"),
    *(("sciq/sciq.train.first2400.json", c) for c in ("question", "option1", "option4", "answer_index")),
    *(("triviaqa/triviaqa.test.subsample1000.jsonl", c) for c in ("id", "question", "golden_answers")),
    *(("triviaqa/TriviaQA.first2500.csv", c) for c in ("question", "answer", "false_answer")),
    *(("truthfulqa/TruthfulQA.csv", c) for c in ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")),
    *(("wikiqa/WikiQA-test.tsv", c) for c in ("QuestionID", "Question", "Sentence", "Label")),
    *(
        ("squad_xquad_en/xquad.en.json", c)
        for c in ("data", "paragraphs", "context", "qas", "id", "question", "answers", "text")
    ),
    *(("popqa/popqa.test.subsample1000.jsonl", c) for c in ("id", "question", "metadata", "obj", "golden_answers")),
    *(("halueval/qa_data.first1000.json", c) for c in ("knowledge", "question", "right_answer", "hallucinated_answer")),
]


@pytest.mark.parametrize("file, column", COLUMNS)
def test_a_renamed_column_is_named(folder, file, column):
    (folder / file).write_text(as_text(file, renamed(ROWS[file], column)), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_questions(OWNER[file], split=split_of(file))
    assert (
        "\n" not in str(error.value)
        and str(folder / file) in str(error.value)
        and f"no column '{column}'" in str(error.value)
    )


@pytest.mark.parametrize("file", ROWS)
@pytest.mark.parametrize("how", ["cut", "not UTF-8"])
def test_a_corrupted_line_has_its_number(folder, file, how):
    "The last line loses its end, or has a byte that is no text."
    text = as_text(file, ROWS[file]).rstrip("\n").encode()
    start = text.rindex(b"\n") + 1
    line = text[start:] if len(text) - start > 3 else b""
    number = text.count(b"\n") + 1
    if how == "cut":
        spoilt = text[:start] + line[: len(line) // 2]  # a whole JSON text lacks its last bracket
    else:
        spoilt = text[:start] + b"\xff" + line
    if how == "cut" and file.endswith(".tsv"):
        spoilt = text[:start] + line[: line.index(b"\t", line.index(b"\t") + 1)]
    (folder / file).write_bytes(spoilt)
    with pytest.raises(ValueError) as error:
        load_questions(OWNER[file], split=split_of(file))
    assert "\n" not in str(error.value) and re.search(
        rf"{re.escape(str(folder / file))}, line {number} ", str(error.value)
    )


@pytest.mark.parametrize("file", ROWS)
@pytest.mark.parametrize("start, end", [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_a_byte_order_mark_and_other_line_ends(folder, file, start, end):
    wanted = list(load_questions(OWNER[file], split=split_of(file)))
    (folder / file).write_bytes((start + as_text(file, ROWS[file]).replace("\n", end)).encode())
    assert list(load_questions(OWNER[file], split=split_of(file))) == wanted


@pytest.mark.parametrize(
    "file, spoil, says",
    [
        (
            "nq_open/NQ-open.dev.jsonl",
            lambda r: r[1].update(answer="Quill"),
            "'answer' of line 2 is not a list of texts",
        ),
        (
            "nq_open/NQ-open.dev.jsonl",
            lambda r: r[1].update(answer=[1901]),
            "'answer' of line 2 is not a list of texts",
        ),
        ("nq_open/NQ-open.dev.jsonl", lambda r: r.__setitem__(1, ["Where?"]), "line 2 is a list"),
        ("nq_open/Natural_Questions.csv", lambda r: r[0].update(false_answer=" "), "'false_answer' of line 2 is empty"),
        (
            "sciq/sciq_test_mc.json",
            lambda r: r[1].update(answer="answer5"),
            "entry 1 has no question with four options",
        ),
        (
            "sciq/sciq_test_mc.json",
            lambda r: r[0].update(instruction="Who?"),
            "entry 0 has no question with four options",
        ),
        (
            "sciq/sciq.train.first2400.json",
            lambda r: r["1"].update(answer_index=5),
            "'answer_index' of entry '1' is 5, not 1 to 4",
        ),
        (
            "sciq/sciq.train.first2400.json",
            lambda r: r["1"].update(answer_index="second"),
            "'answer_index' of entry '1' is not of the kind int",
        ),
        ("wikiqa/WikiQA-test.tsv", lambda r: r[3].update(Label="yes"), "'Label' of line 5 is not of the kind int"),
        ("wikiqa/WikiQA-test.tsv", lambda r: r[3].update(Label="2"), "label of question Q1 is 2, not 0 or 1"),
        (
            "popqa/popqa.test.subsample1000.jsonl",
            lambda r: r[1].update(metadata="{}"),
            "'metadata' of line 2 is not of the kind dict",
        ),
        ("halueval/qa_data.first1000.json", lambda r: r.clear(), "holds no row"),
    ],
)
def test_a_row_of_another_kind(folder, file, spoil, says):
    rows = json.loads(json.dumps(ROWS[file]))
    spoil(rows)
    (folder / file).write_text(as_text(file, rows), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_questions(OWNER[file], split=split_of(file))
    assert (str(folder / file) in str(error.value) or "label of" in says) and says in str(error.value)


@each_set
def test_an_unknown_split_is_named_before_anything_is_read(folder, monkeypatch, name):
    monkeypatch.setattr(avss_nb.data, "read_rows", lambda *args, **options: pytest.fail("a file was read"))
    with pytest.raises(ValueError) as error:
        load_questions(name, split="nonesuch")
    assert (
        "nonesuch" in str(error.value)
        and name in str(error.value)
        and "train" in str(error.value)
        and "test" in str(error.value)
    )


def test_nq_without_the_file_of_false_answers(folder):
    (folder / "nq_open/Natural_Questions.csv").unlink()
    assert load_questions("nq")["distractors"][:] == [[], []]


def test_own_files(folder):
    "Own questions and sentences are checked as well."
    own = folder / "own.jsonl"
    own.write_text(
        '{"question": "2 + 2?", "answers": ["4"], "distractors": ["5", "4", "5"], "context": null}\n\n'
        '{"question": "a\u2028b?", "answers": ["b"]}\n',
        encoding="utf-8",
    )
    assert [(r["question"], r["distractors"]) for r in load_questions("own", path=own)] == [
        ("2 + 2?", ["5"]),
        ("a\u2028b?", []),
    ]
    for text, says in (
        ('{"question": "2 + 2?"}', "no column 'answers'"),
        ('{"question": "2 + 2?", "answers": "4"}', "not a list of texts"),
        ('{"question": "2 + 2?", "answers": ["4"], "distractors": "5"}', "'distractors' of line 1"),
    ):
        own.write_text(text)
        with pytest.raises(ValueError, match=says):
            load_questions("own", path=own)
    table = folder / "own.csv"
    table.write_text('label,text\n1,None\n0,"a, b"\n')
    assert list(load_sentences("own", path=table)) == [dict(text="None", label=1), dict(text="a, b", label=0)]
    table.write_text("label,words\n1,fine\n")
    with pytest.raises(ValueError, match="own.csv has no column 'text'"):
        load_sentences("own", path=table)


# the hub's form of each set

HUB = {  # (repository, config, split) -> rows
    ("google-research-datasets/nq_open", None, "validation"): [dict(question=WHO, answer=["Ada", "A. Wick"])],
    ("google-research-datasets/nq_open", None, "train"): [
        dict(question=WHO.upper(), answer=["Ada"]),
        dict(question="when?", answer=["1901"]),
    ],
    ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation"): [
        dict(
            question=WHO,
            question_id="tc_1",
            answer=dict(aliases=["A. Wick", "Ada"], value="Ada", normalized_value="ada", type="Thing"),
            entity_pages=dict(title=[]),
        )
    ],
    ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "train"): [
        dict(question=q, question_id=f"tc_{i}", answer=dict(aliases=["1901"], value="In 1901"))
        for i, q in enumerate(("who lit the lamp", "When?"))
    ],
    ("truthfulqa/truthful_qa", "generation", "validation"): [
        dict(
            type="A",
            question=WHO,
            best_answer="Ada",
            correct_answers=["Ada did", "Ada"],
            incorrect_answers=["Bo", "ada "],
            source="",
        )
    ],
    ("microsoft/wiki_qa", None, "test"): [
        dict(question_id=f"Q{i}", question=q, document_title="D", answer=f"Sentence {k} .", label=k if i else 0)
        for i, q in enumerate(("Where?", WHO))
        for k in (0, 1)
    ],
    ("microsoft/wiki_qa", None, "validation"): [
        dict(question_id=f"Q{i}", question=q, document_title="D", answer="It was so .", label=1)
        for i, q in enumerate(("When?", WHO))
    ],
    ("microsoft/wiki_qa", None, "train"): [
        dict(question_id=f"Q{i}", question=q, document_title="D", answer="It was so .", label=1)
        for i, q in enumerate(("when", "Why?", "Where?"))
    ],
    ("rajpurkar/squad", None, "validation"): [
        dict(
            id="5a",
            title="Lamps",
            question=WHO,
            context="Ada lit it.",
            answers=dict(text=["Ada lit", "Ada", "Ada"], answer_start=[0, 0, 0]),
        )
    ],
    ("rajpurkar/squad", None, "train"): [
        dict(
            id=f"5{i}",
            title="Lamps",
            question=q,
            context="It was lit in 1901.",
            answers=dict(text=["1901"], answer_start=[14]),
        )
        for i, q in enumerate((WHO, "When?"))
    ],
    ("akariasai/PopQA", None, "test"): [
        dict(
            id=i,
            question=WHO,
            subj="lamp",
            prop="lighter",
            obj=o,
            s_pop=3,
            possible_answers=json.dumps([f"{o[0]}. Wick", o]),
        )
        for i, o in enumerate(("Ada", "Bo"))
    ],
    ("pminervini/HaluEval", "qa", "data"): [
        dict(knowledge="Ada lit it.", question=WHO, right_answer="Ada", hallucinated_answer="Bo lit it.")
    ],
    ("allenai/sciq", None, "test"): [
        dict(question=WHO, correct_answer="Ada", distractor1="Bo", distractor2="Cy", distractor3="Di", support="")
    ],
}


@pytest.fixture
def made_hub(hub, monkeypatch):
    monkeypatch.setattr(
        avss_nb.data, "load_dataset", lambda repo, config=None, split=None: Dataset.from_list(HUB[repo, config, split])
    )


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("nq", ("nq/0", ["Ada", "A. Wick"], [], "")),
        ("sciq", ("sciq/test/0", ["Ada"], ["Bo", "Cy", "Di"], "")),
        ("triviaqa", ("triviaqa/tc_1", ["Ada", "A. Wick"], [], "")),
        ("truthfulqa", ("truthfulqa/0", ["Ada", "Ada did"], ["Bo"], "")),
        ("wikiqa", ("wikiqa/Q1", ["Sentence 1 ."], ["Sentence 0 ."], "")),
        ("squad", ("squad/5a", ["Ada", "Ada lit"], [], "Ada lit it.")),
        ("popqa", ("popqa/0", ["Ada", "A. Wick", "Bo", "B. Wick"], [], "")),
        ("halueval", ("halueval/0", ["Ada"], ["Bo lit it."], "Ada lit it.")),
    ],
)
def test_each_set_from_the_hub(made_hub, name, wanted):
    rows = load_questions(name)
    assert rows.features == QUESTION and list(rows) == [
        dict(
            zip(("id", "question", "answers", "distractors", "context", "source"), (wanted[0], WHO, *wanted[1:], name))
        )
    ]


@pytest.mark.parametrize(
    "name, split, wanted",
    [
        ("nq", "official train", ["when?"]),
        ("triviaqa", "train", ["When?"]),
        ("wikiqa", "official validation", ["When?"]),
        ("wikiqa", "official train", ["Why?"]),
        ("squad", "official train", ["When?"]),
    ],
)
def test_official_parts_of_the_hub_lack_the_questions_of_the_others(made_hub, name, split, wanted):
    "A question is dropped even where the other part has it in other case and punctuation, or has no answer to it."
    assert load_questions(name, split=split)["question"][:] == wanted


def test_answers_of_the_hub_that_are_no_json(hub, monkeypatch):
    rows = [row | dict(possible_answers="['Ada']") for row in HUB["akariasai/PopQA", None, "test"]]
    monkeypatch.setattr(avss_nb.data, "load_dataset", lambda *args, **options: Dataset.from_list(rows))
    with pytest.raises(ValueError, match="akariasai/PopQA: 'possible_answers' are no JSON list"):
        load_questions("popqa")


@each_set
def test_a_renamed_column_of_the_hub_is_named(hub, monkeypatch, name):
    monkeypatch.setattr(
        avss_nb.data,
        "load_dataset",
        lambda repo, config=None, split=None: Dataset.from_list(
            [{("asked" if k == "question" else k): v for k, v in row.items()} for row in HUB[repo, config, split]]
        ),
    )
    with pytest.raises(ValueError, match="no column 'question'") as error:
        load_questions(name)
    assert REPOS[name] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, repo, column", [("triviaqa", "mandarjoshi/trivia_qa", "value"), ("squad", "rajpurkar/squad", "text")]
)
def test_a_renamed_inner_column_of_the_hub_is_named(hub, monkeypatch, name, repo, column):
    monkeypatch.setattr(
        avss_nb.data,
        "load_dataset",
        lambda repo, config=None, split=None: Dataset.from_list(renamed(HUB[repo, config, split], column)),
    )
    with pytest.raises(ValueError, match=f"{repo}.* has no column '{column}'"):
        load_questions(name)


@pytest.mark.parametrize("name", [name for name in REPOS if QUESTIONS[name].halved])
def test_a_question_is_on_one_side_wherever_it_is_read(made_hub, monkeypatch, folder, name):
    "The halves of a set from the hub and from files agree."

    def side():
        return [
            split
            for split in ("train", "test")
            if WHO in {r["question"] for r in QUESTIONS[name](split, avss_nb.data.data_folder())}
        ]

    local = side()
    monkeypatch.delenv("AVSS_NB_DATA")
    monkeypatch.setattr(
        avss_nb.data, "load_dataset", lambda repo, config=None, split=None: Dataset.from_list(HUB[repo, config, split])
    )
    assert len(local) == 1 and side() == local


# keys, halves


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("Who lit it?", " who  LIT it", True),
        ("who's it", "who’s it", True),
        ("well-known", "well known", True),
        ("C", "C++", False),
        ("Beyonce", "Beyoncé", False),
        ("Beyoncé", "Beyonce\u0301", True),
        ("?", "!", False),
        ("किताब", "कताब", False),
        ("1914–18", "1914-18", True),
    ],
)
def test_when_two_questions_are_the_same(one, other, same):
    assert (question_key(one) == question_key(other)) == same


@pytest.mark.parametrize(
    "answers, distractor, kind",
    [
        (["March\xa01"], "march 1 ", "equal"),
        (["Lanterns"], "A lantern.", "near"),
        (["the 1920s"], "1920", "near"),
        (["Çete"], "A cete", "near"),
        (["boss"], "bos", ""),
        (["C"], "Cs", ""),
        (["AB+"], "AB-", ""),
        (["#"], "*", ""),
        (["a"], "the", ""),
        (["Canada"], "Cnd", ""),
        (["Quill"], "It is not Quill!", "names"),
        (["Quill"], "Quillmark", ""),
        (["New Quill"], "Quill", ""),
    ],
)
def test_kinds_of_distractors(answers, distractor, kind):
    assert distractor_kinds(["something else", *answers], [distractor]) == [kind]


@pytest.mark.parametrize(
    "aliases, name",
    [
        (["QUILL", "Quill"], "Quill"),
        (["quill Light", "Quill Light"], "Quill Light"),
        (["NATO", "Nato (pact)"], "NATO"),
        (["Lamps And Oil", "Lamps and Oil"], "Lamps and Oil"),
        (["Only (one)"], "Only (one)"),
        (["クイル", "Kuiru"], "Kuiru"),
        (["12", "Twelve", "twelve things"], "Twelve"),
        ([""], ""),
    ],
)
def test_usual_name(aliases, name):
    assert usual_name(aliases) == name


def test_halves_by_question():
    table = Dataset.from_dict(
        dict(question=[f"Question {i // 3}" + "?!"[: i % 3] for i in range(600)], n=list(range(600)))
    )
    for seed in (0, 1):
        first, second = split_half(table, seed=seed)
        assert (
            sorted(first["n"][:] + second["n"][:]) == list(range(600))
            and first["n"][:] == sorted(first["n"])
            and 200 < len(first) < 400
        )
        assert not {question_key(q) for q in first["question"]} & {question_key(q) for q in second["question"]}
    assert split_half(table, seed=0)[0]["n"][:] != split_half(table, seed=1)[0]["n"][:]


@files
def test_a_half_can_be_halved_again():
    assert all(
        0.35 < len(half) / len(load_questions(name, split=split)) < 0.65
        for name in ("nq", "truthfulqa")
        for split in ("train", "test")
        for half in split_half(load_questions(name, split=split))
    )


@each_set
def test_drawn_rows_are_answered(folder, name):
    "`n` counts what stays."
    assert len(load_questions(name, n=1)) == 1
    with pytest.raises(ValueError, match="has 2 questions"):
        load_questions(name, n=3)
