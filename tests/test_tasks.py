"""lm-eval's tasks on the benchmark files, and whether our own fast paths say the same of every item."""

import os

import numpy as np
import pandas as pd
import pytest
import torch

from avss_nb.data import batches, load_questions
from avss_nb.evaluation import multiple_choice
from avss_nb.evaluation import choose, option_logprobs, text_losses
from avss_nb.tasks import LOCAL_TASKS, evaluate_tasks, summarize_tasks, task_items
from avss_nb.models import load_model

DATA = os.environ.get("AVSS_NB_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="AVSS_NB_DATA names no folder of benchmark files")
N = 2


@pytest.fixture(scope="module")
def bundled():
    return load_model()


@pytest.fixture(scope="module")
def items(bundled):
    "A few items of each set; the texts and prompts are long, so the context is cut."
    return task_items(*bundled, [*LOCAL_TASKS], limit=N, max_length=512, batch_size=8, max_new_tokens=8)


def rows(task):
    file, read = LOCAL_TASKS[task]
    from pathlib import Path

    return read(Path(DATA) / file, Path(DATA))[:N]


def agree(items, task, table, decisions):
    theirs = items.loc[task]
    assert np.abs(table.logprob.to_numpy() - theirs.logprobs.explode().to_numpy(float)).max() < 1e-4
    assert list(decisions) == theirs.acc.tolist()


@pytest.mark.slow
@needs_data
def test_every_task_has_its_items(items):
    assert items.groupby(level="task").size().to_dict() == dict.fromkeys(LOCAL_TASKS, N)
    table = summarize_tasks(items)
    assert set(table.index) == {
        ("sciq", "acc"),
        ("sciq", "acc_norm"),
        ("truthfulqa_mc1", "acc"),
        ("truthfulqa_mc2", "acc"),
        ("nq_open", "exact_match"),
        ("triviaqa", "exact_match"),
        ("sst2", "acc"),
        ("wikitext", "word_perplexity"),
        ("wikitext", "byte_perplexity"),
        ("wikitext", "bits_per_byte"),
    }
    assert ((table.low <= table.value) & (table.value <= table.high)).all() and (table.n == N).all()
    for task in ("nq_open", "triviaqa"):
        assert not items.loc[task].answer.str.contains("[\n.,]").any()


@pytest.mark.slow
@needs_data
def test_sciq_to_the_item(bundled, items):
    docs = rows("sciq")
    prompts = [f"{d['support'].lstrip()}\nQuestion: {d['question']}\nAnswer:" for d in docs]
    table = option_logprobs(
        *bundled,
        prompts,
        [[f" {d[k]}" for k in ("distractor1", "distractor2", "distractor3", "correct_answer")] for d in docs],
    )
    agree(items, "sciq", table, [float(g.logprob.argmax() == 3) for _, g in table.groupby("item")])


@pytest.mark.slow
@needs_data
def test_sst2_to_the_item(bundled, items):
    docs = rows("sst2")
    prompts = [f"{d['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:" for d in docs]
    table = option_logprobs(*bundled, prompts, [[" negative", " positive"]] * N)
    agree(
        items,
        "sst2",
        table,
        [float(g.logprob.argmax() == d["label"]) for (_, g), d in zip(table.groupby("item"), docs)],
    )


@pytest.mark.slow
@needs_data
def test_truthfulqa_to_the_item(bundled, items):
    "The prompt of six examples is the harness's own; MC2 comes from logarithms here and from probabilities there."
    from avss_nb.tasks import _quiet
    from avss_nb.tasks import _task, _task_manager
    from pathlib import Path

    with _quiet():
        task = _task_manager().load(dict(group="all", task=[_task("truthfulqa_mc1", Path(DATA), 0)]))["tasks"][
            "truthfulqa_mc1"
        ]
    prompts = [task.doc_to_text(doc) for doc in rows("truthfulqa_mc1")]
    for which in ("mc1", "mc2"):
        sides = [d[f"{which}_targets"] for d in rows("truthfulqa_mc1")]
        table = option_logprobs(*bundled, prompts, [[f" {c}" for c in s["choices"]] for s in sides])
        ours = [
            multiple_choice(g.logprob[np.array(s["labels"]) == 1], g.logprob[np.array(s["labels"]) == 0])[which]
            for (_, g), s in zip(table.groupby("item"), sides)
        ]
        theirs = items.loc[f"truthfulqa_{which}"]
        assert np.abs(table.logprob.to_numpy() - theirs.logprobs.explode().to_numpy(float)).max() < 1e-4
        np.testing.assert_allclose(ours, theirs.acc, atol=1e-4)


@pytest.mark.slow
@needs_data
def test_wikitext_perplexity_is_that_of_our_own(bundled):
    "Documents of one window, so that both see the same context."
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    docs = rows("wikitext")[:1]
    found = task_items(*bundled, "wikitext", limit=1)
    text = wikitext_detokenizer(docs[0])
    ours = text_losses(bundled[0], batches([bundled[1].bos_token + text], bundled[1], max_length=8192))
    assert found.logprobs.iloc[0][0] == pytest.approx(-ours.nll.iloc[0], rel=1e-6)
    table = summarize_tasks(found)
    assert table.value["wikitext", "word_perplexity"] == pytest.approx(
        np.exp(ours.nll.iloc[0] / found.words.iloc[0]), rel=1e-5
    )


@needs_data
def test_articles_are_cut_at_titles_alone():
    docs = LOCAL_TASKS["wikitext"][1]
    from pathlib import Path

    pages = [d["page"] for d in docs(Path(DATA) / LOCAL_TASKS["wikitext"][0], Path(DATA))]
    assert (
        len(pages) == 60 and min(len(p.split()) for p in pages) > 300
    )  # two lines of formulas begin and end with `=`, too


@needs_data
def test_rows_are_those_of_the_files():
    "Questions and alias lists in the file's order, whatever the questions table makes of them."
    import json
    from pathlib import Path

    def lines(task):
        return [
            json.loads(line) for line in (Path(DATA) / LOCAL_TASKS[task][0]).read_text(encoding="utf-8").splitlines()
        ]

    def given(task):
        return LOCAL_TASKS[task][1](Path(DATA) / LOCAL_TASKS[task][0], Path(DATA))

    assert given("nq_open") == lines("nq_open")
    assert given("triviaqa") == [
        dict(question=r["question"].replace('""', '"'), answer=dict(aliases=r["golden_answers"]))
        for r in lines("triviaqa")
    ]
    mc = json.loads((Path(DATA) / LOCAL_TASKS["truthfulqa_mc1"][0]).read_text(encoding="utf-8"))
    assert [r["mc2_targets"] for r in given("truthfulqa_mc2")] == [
        dict(choices=list(r["mc2_targets"]), labels=list(r["mc2_targets"].values())) for r in mc
    ]


@needs_data
def test_examples_in_the_prompt_are_other_questions():
    from pathlib import Path
    from avss_nb.tasks import _triviaqa_shots

    asked = {
        r["question"].casefold()
        for r in LOCAL_TASKS["triviaqa"][1](Path(DATA) / LOCAL_TASKS["triviaqa"][0], Path(DATA))
    }
    shots = _triviaqa_shots(Path(DATA))
    assert len(shots) > 2000 and not asked & {s["question"].casefold() for s in shots}


def test_a_missing_file_is_asked_of_the_hub_and_named(bundled, tmp_path):
    with pytest.raises(FileNotFoundError, match="nq_open: neither all in the data folder"):
        task_items(*bundled, "nq_open", limit=1, path=tmp_path)


def test_the_model_is_left_as_it_was(bundled):
    model, tokenizer = bundled
    state = torch.random.get_rng_state()
    model.train()
    task_items(model, tokenizer, "words", limit=2)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    model.eval()


def test_it_runs_what_is_skipped(bundled):
    from avss_nb.surgery import prune_layers, skip_layers

    model, tokenizer = bundled
    with skip_layers(model, [3, 13]):
        skipped = task_items(model, tokenizer, "atlas", limit=1)
    pruned = task_items(prune_layers(model, [3, 13]), tokenizer, "atlas", limit=1)
    base_model = task_items(model, tokenizer, "atlas", limit=1)
    assert np.allclose(np.stack(skipped.logprobs), np.stack(pruned.logprobs), atol=1e-4) and not np.allclose(
        np.stack(base_model.logprobs), np.stack(pruned.logprobs), atol=0.1
    )


def test_evaluate_tasks_is_the_summary_of_the_items(bundled):
    table = evaluate_tasks(*bundled, "words", limit=4)
    pd.testing.assert_frame_equal(table, summarize_tasks(task_items(*bundled, ["words"], limit=4)))


def test_likelihoods_that_are_not_finite_name_the_item(bundled):
    model, tokenizer = bundled
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: torch.nan * logits)
    with pytest.raises(FloatingPointError, match="item 0 of atlas are not finite"):
        task_items(model, tokenizer, "atlas", limit=1)
    handle.remove()
