"""After pruning: the same items for every choice, by hand, and after a kill."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import avss_nb.pruning
from avss_nb.data import load_questions, load_sentences
from avss_nb.models import atomic_write
from avss_nb.runs import cached_table
from avss_nb.evaluation import answer_questions
from avss_nb.pruning import chance_level, measure_removal, paired_difference, retention_table
from avss_nb.surgery import skip_layers
from tiny import one_thread, small_tokenizer

TEXTS = ["Water boils at a hundred degrees.", "Ice floats, since it is lighter than the water that it was made of."]
CHOICES = {"base_model": [], "one": [2], "same": (2,), "mlp": ["mlp.1"]}


@pytest.fixture(scope="module")
def sets():
    "Five random Llama blocks with a small tokenizer, two texts, questions and words."
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=len(tokenizer),
            initializer_range=0.15,
        )
    ).eval()
    return model, tokenizer, TEXTS, load_questions("atlas", n=6), load_sentences("words", n=8)


@pytest.fixture(scope="module")
def items(sets):
    model, tokenizer, *data = sets
    return measure_removal(model, tokenizer, CHOICES, *data)


def test_items_are_those_of_the_model_without_the_layers(sets, items):
    model, tokenizer, texts, questions, words = sets
    assert items.loc["one"].groupby("measure").size().to_dict() == dict(perplexity=2, questions=6, sentiment=8)
    with skip_layers(model, [2]):
        right = answer_questions(model, tokenizer, questions)
    assert items.loc[("one", "questions")].value.tolist() == right.correct.tolist()
    pd.testing.assert_frame_equal(items.loc["one"], items.loc["same"])
    assert not np.allclose(*(items.loc[(name, "perplexity")].value for name in ("one", "mlp")))
    assert items.groupby("choice").removes.first().to_dict() == dict(base_model="", one="2", same="2", mlp="mlp.1")


def test_a_killed_run_goes_on(sets, items, tmp_path, monkeypatch):
    model, tokenizer, *data = sets
    plain, begun = avss_nb.pruning.measure_items, []

    def measure(*args):
        begun.append(args[5])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(avss_nb.pruning, "measure_items", measure)
    with pytest.raises(KeyboardInterrupt):
        measure_removal(model, tokenizer, CHOICES, *data, out=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base_model.csv", "settings.json"]
    resumed = measure_removal(model, tokenizer, CHOICES, *data, out=tmp_path)
    assert begun == [(), (2,), (2,), ("mlp.1",)]  # the base model once, equal choices once
    pd.testing.assert_frame_equal(resumed, items, check_exact=True)


def test_the_caller_may_walk_the_choices(sets, items):
    "Equal choices are one step of the walk."
    model, tokenizer, *data = sets
    walked = []

    def walk(choices):
        for layers in choices:
            walked.append(layers)
            yield layers

    pd.testing.assert_frame_equal(measure_removal(model, tokenizer, CHOICES, *data, progress=walk), items)
    assert walked == [(), (2,), ("mlp.1",)]


def test_wrong_choices_are_refused_before_anything_runs(sets, monkeypatch):
    model, tokenizer, *data = sets
    monkeypatch.setattr(avss_nb.pruning, "measure_items", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="no layer 5"):
        measure_removal(model, tokenizer, dict(base_model=[], wrong=[5]), *data)


def made(nll: list[float], right: list[float], tokens=(10, 30)) -> pd.DataFrame:
    "Items of one choice."
    rows = [("perplexity", i, v, n) for i, (v, n) in enumerate(zip(nll, tokens))] + [
        ("questions", i, v, np.nan) for i, v in enumerate(right)
    ]
    return pd.DataFrame(rows, columns=["measure", "item", "value", "tokens"]).assign(removes="").set_index("measure")


def test_differences_by_hand():
    both = pd.concat(dict(a=made([10.0, 60], [1, 1, 0, 1]), b=made([20.0, 90], [1, 0, 0, 0])), names=["choice"])
    found = paired_difference(both, "a", ["b", "a"])
    assert found.difference["perplexity", "b"] == pytest.approx((10 + 30) / 40)  # nats/token
    assert found.difference["questions", "b"] == pytest.approx(0.5)
    assert (found.xs("a", level="other") == 0).all(axis=None)
    back = paired_difference(both, "b", ["a"])
    np.testing.assert_allclose(back.difference, -found.xs("b", level="other").difference)
    np.testing.assert_allclose(back.low, -found.xs("b", level="other").high, atol=0.26)  # other draws of four items
    assert found.low["perplexity", "b"] == pytest.approx(1) and found.high["perplexity", "b"] == pytest.approx(
        1
    )  # 10/10 and 30/30


def test_pairs_keep_what_items_share():
    "Two choices that are right on the same questions differ nowhere, however wide the interval of each is."
    right = [1.0, 0] * 20
    both = pd.concat(dict(a=made([1.0, 2], right), b=made([1.0, 2], right)), names=["choice"])
    assert (paired_difference(both, "a", ["b"])[["low", "high"]] == 0).all(axis=None)


def test_different_items_are_no_pairs():
    short = made([1.0, 2], [1, 0])
    both = pd.concat(dict(a=made([1.0, 2], [1, 0, 1]), b=short), names=["choice"])
    with pytest.raises(ValueError, match="different items"):
        paired_difference(both, "a", ["b"])


def test_retention_table_by_hand():
    def sentiment(right):
        return pd.DataFrame(dict(measure="sentiment", item=range(4), value=right, tokens=np.nan, removes="")).set_index(
            "measure"
        )

    both = pd.concat(
        dict(
            base_model=pd.concat([made([10.0, 30], [1, 1, 1, 0]), sentiment([1.0, 1, 1, 1])]),
            cut=pd.concat([made([20.0, 60], [1, 1, 0, 0]), sentiment([1.0, 1, 1, 0])]),
        ),
        names=["choice"],
    )
    table = retention_table(both, chance=0.25)
    assert table.perplexity["cut"] == pytest.approx(np.exp(2)) and table.perplexity_retained["cut"] == pytest.approx(
        np.exp(-1)
    )
    assert table.questions_raw["cut"] == pytest.approx(0.5 / 0.75) and table.questions_corrected[
        "cut"
    ] == pytest.approx(0.25 / 0.5)
    assert table.sentiment_corrected["cut"] == pytest.approx(0.5) and table.questions_corrected["base_model"] == 1


def test_no_ability_cannot_be_retained():
    sentiment = pd.DataFrame(
        dict(measure="sentiment", item=range(4), value=[1.0, 0, 1, 0], tokens=np.nan, removes="")
    ).set_index("measure")
    both = pd.concat(dict(base_model=pd.concat([made([10.0, 30], [1, 1, 1, 0]), sentiment])), names=["choice"])
    assert np.isnan(retention_table(both, chance=0.25).sentiment_corrected["base_model"])


def test_chance_counts_each_questions_options():
    questions = load_questions("atlas", n=6)
    assert chance_level(questions) == pytest.approx(np.mean([1 / (1 + len(q["distractors"])) for q in questions]))


def test_errors_while_making_are_the_makers_own(tmp_path):
    def missing():
        raise FileNotFoundError("no such benchmark")

    with pytest.raises(FileNotFoundError, match="^no such benchmark"):
        cached_table(tmp_path / "a.csv", missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a.csv", lambda part: part.write_text(""))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
