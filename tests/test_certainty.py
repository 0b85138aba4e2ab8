"""Scores under any weights of the texts equal scores of the texts themselves; intervals and convergence by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from avss_nb.certainty import TextScores, by_text, score_certainty, score_texts, converged_after, convergence
from avss_nb.importance import layer_scores, removal_losses, score_names
from tiny import batch_of, one_thread, tiny

METHODS = [*score_names("stats", "downstream"), "leave_one_out"]


def numbered(*groups: tuple) -> list[dict]:
    "Batches of the given lengths; texts are numbered through."
    some, start = [], 0
    for i, lengths in enumerate(groups):
        batch = batch_of(*lengths, seed=i)
        batch["index"] = torch.arange(start, start := start + len(lengths))
        some.append(batch)
    return some


@pytest.mark.parametrize(
    "family, weights",
    [("llama", [1, 1, 1, 1]), ("gpt2", [2, 0, 1, 1]), ("gemma3_text", [0, 3, 0, 1]), ("llama", [0, 3, 0, 1])],
    ids=str,
)
def test_weights_are_what_they_say(family, weights):
    "A text of weight 2 is that text read twice, one of weight 0 is not read."
    model, some = tiny(family), numbered((8, 5), (6, 7))
    parts = dict(by_text(some))
    wanted = layer_scores(model, [parts[i] for i, w in enumerate(weights) for _ in range(w)], methods=METHODS)
    found = score_texts(model, some, methods=METHODS).reweighted(np.array(weights), METHODS)
    np.testing.assert_allclose(
        found.drop(columns="avss_published_code"), wanted.drop(columns="avss_published_code"), rtol=1e-4, atol=1e-6
    )


def test_a_text_of_several_rows_is_one_text():
    model, some = tiny("llama"), numbered((8, 5), (6, 7))
    some[0]["index"][:] = 0
    some[1]["index"][:] = torch.tensor([0, 4])
    texts = score_texts(model, some, methods=METHODS)
    assert texts.tokens.to_dict() == {0: 19, 4: 7} and texts.losses.index.tolist() == [0, 4]


def test_losses_that_are_there_are_used():
    model, some = tiny("llama"), numbered((8, 5), (6, 7))
    losses = removal_losses(model, some)
    assert score_texts(model, some, methods=["leave_one_out"], losses=losses).losses is losses
    with pytest.raises(ValueError, match="other texts"):
        score_texts(model, some[:1], methods=["leave_one_out"], losses=losses)


def made(costs: list[list[float]], tokens: int = 10) -> TextScores:
    "Texts with the given loss without each layer; the base model loses nothing."
    losses = pd.DataFrame(costs).rename_axis("text").assign(tokens=tokens, base_model=0.0)
    return TextScores(losses.tokens, {}, losses)


def test_certainty_of_a_certain_and_of_an_open_case():
    certain = score_certainty(made([[1.0, 2, 3, 4]] * 6), methods=["leave_one_out"]).loc["leave_one_out"]
    assert certain.lowest.tolist() == [1, 0, 0, 0] and (certain.low == certain.high).all()
    np.testing.assert_allclose(certain.score, [0.1, 0.2, 0.3, 0.4])
    open_case = score_certainty(made([[1.0, 2, 9, 9], [2.0, 1, 9, 9]] * 10), methods=["leave_one_out"]).loc[
        "leave_one_out"
    ]
    assert 0.3 < open_case.lowest[0] < 0.7 and open_case.lowest[2] == 0 and open_case.lowest.sum() == pytest.approx(1)
    assert (open_case.low < open_case.score)[:2].all() and (open_case.score < open_case.high)[:2].all()


def test_the_seed_decides():
    texts = made(np.random.default_rng(0).random((8, 5)).tolist())
    same, again, other = (score_certainty(texts, methods=["leave_one_out"], n_resamples=50, seed=s) for s in (0, 0, 1))
    assert same.equals(again) and not same.equals(other)


def test_convergence_by_hand():
    "Layer 0 looks cheapest until the dear text is read, whose cost outweighs all others."
    course = convergence(
        made([[50.0, 9, 30, 30], [1.0, 9, 30, 30], [1.0, 9, 30, 30]]),
        methods=["leave_one_out"],
        fraction=0.25,
        n_orders=40,
    )
    found = course.xs("leave_one_out").found.unstack("n_texts")
    assert (
        (found[3] == 1).all()
        and set(found[1]) == {0.0, 1.0}
        and (found[1] <= found[2]).all()
        and (found[2] <= found[3]).all()
    )
    after = converged_after(course).loc["leave_one_out"]
    assert after["most"] == 30 and after["median"] in (10, 20, 30)


@pytest.mark.parametrize(
    "family, methods, message",
    [
        ("llama", ["taylor"], "'taylor' does not add up"),
        ("llama", ["avs"], "'avs' does not add up"),
        ("bert", ["leave_one_out"], "no causal language model"),
    ],
)
def test_bad_input_is_named(family, methods, message):
    with pytest.raises(ValueError, match=message):
        score_texts(tiny(family), numbered((8, 5)), methods=methods)


def test_one_text_says_nothing_of_the_spread():
    with pytest.raises(ValueError, match="at least two texts"):
        score_texts(tiny("llama"), numbered((8,)), methods=["avss"])
