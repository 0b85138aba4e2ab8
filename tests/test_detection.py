"""Detectors of wrong answers: known values, parity with scikit-learn, and nothing learnt from the tested answers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from avss_nb.detection import (
    _draws,
    _mean_and_ends,
    _measures,
    _split,
    answer_states,
    auroc,
    detector_scores,
    eavss_detector,
    eavss_ranking,
    eigenscore,
    evaluate_detectors,
    mahalanobis_detector,
    out_of_fold,
    prediction_rejection_ratio,
    probe_detector,
    probe_ranking,
    probe_scores,
    ranking_value,
    risk_coverage,
    semantic_entropy,
)
from avss_nb.hooks import read_activations
from tiny import VOCABULARY, one_thread, tiny

quick = settings(deadline=None, max_examples=80, derandomize=True)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def made(n=80, seed=0, per_question=2):
    "Labels and questions: `per_question` answers each, of mixed labels."
    wrong = np.random.default_rng(seed).random(n) < 0.4
    return wrong, [f"q{i // per_question}" for i in range(n)]


# ---- values that must be right


def test_prr_of_the_definitions():
    assert prediction_rejection_ratio([0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0]) == pytest.approx(1)


def test_eigenscore_of_the_definitions():
    assert eigenscore([[1, 2, 3], [1, 2, 4]]) == pytest.approx(-0.5311, abs=5e-5)


def test_eigenscore_is_the_published_codes_form():
    z = noise(5, 64)
    singular = np.linalg.svd(torch.cov(torch.tensor(z)).numpy() + 1e-3 * np.eye(5))[1]
    assert eigenscore(z) == pytest.approx(np.mean(np.log10(singular)), rel=1e-9)


def test_semantic_entropy_by_hand():
    assert semantic_entropy(["a"] * 5) == 0
    assert semantic_entropy(list("abcd")) == pytest.approx(np.log(4))
    assert semantic_entropy(list("aabb")) == pytest.approx(np.log(2))
    assert semantic_entropy(list("aaab")) == pytest.approx(0.5623, abs=5e-5)
    assert semantic_entropy(list("ab"), logprobs=[np.log(0.6), np.log(0.2)]) == pytest.approx(0.5623, abs=5e-5)
    assert semantic_entropy(list("ab"), logprobs=[-1000, -1000]) == pytest.approx(np.log(2))  # no underflow
    assert semantic_entropy(["", None, ""]) == pytest.approx(
        semantic_entropy(list("aba"))
    )  # anything hashable is a cluster


scores_and_labels = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40
).filter(lambda rows: {w for _, w, n in rows if n} == {True, False})


@quick
@given(scores_and_labels)
def test_measures_agree_with_scikit_learn(rows):
    "With ties and with weights, some of them zero."
    scores, wrong, weights = (np.array(x) for x in zip(*rows))
    found = _measures(scores.astype(float), wrong, weights[None])[:, 0]
    assert found[0] == pytest.approx(roc_auc_score(wrong, scores, sample_weight=weights))
    assert found[1] == pytest.approx(average_precision_score(wrong, scores, sample_weight=weights))
    assert found[2] == pytest.approx(
        prediction_rejection_ratio(np.repeat(scores, weights), 1.0 - np.repeat(wrong, weights))
    )  # a weight is a repetition


@quick
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=6).filter(
        lambda rows: len({q for _, q in rows}) > 1
    )
)
def test_prr_is_the_mean_over_all_orders_of_ties(rows):
    "The area by hand, averaged over every order in which equal scores could stand."
    scores, quality = (np.array(x, float) for x in zip(*rows))
    k = np.arange(1, len(quality) + 1)
    orders = [
        order for order in itertools.permutations(range(len(scores))) if (np.diff(scores[list(order)]) >= 0).all()
    ]
    area = np.mean([(quality[list(order)].cumsum() / k).mean() for order in orders])
    best = (np.sort(quality)[::-1].cumsum() / k).mean()
    assert prediction_rejection_ratio(scores, quality) == pytest.approx(
        (area - quality.mean()) / (best - quality.mean()), abs=1e-9
    )


def test_a_constant_detector_is_uninformative():
    wrong, groups = made()
    table = evaluate_detectors(pd.DataFrame(dict(same=np.ones(80))), wrong, groups=groups, n_resamples=50)
    assert table.auroc.same == 0.5 and table.auroc_low.same == table.auroc_high.same == 0.5
    np.testing.assert_allclose(table[["prr", "prr_low", "prr_high"]], 0, atol=1e-12)
    assert table.auprc.same == pytest.approx(wrong.mean())


def test_higher_is_more_uncertain_and_positive_is_hallucinated():
    labels = ["wrong", "right", "wrong", "right"]
    assert auroc([4, 1, 3, 2], labels) == 1 and auroc([1, 4, 2, 3], labels) == 0
    assert auroc([4, 1, 3, 2], [True, False, True, False]) == 1
    long_and_unsure = pd.DataFrame([row("a", 0, "x", [-3.0] * 5), row("b", 0, "x", [-0.1])])
    scores = detector_scores(long_and_unsure)
    assert (scores.loc[0] > scores.loc[1]).all()


def test_risk_coverage_and_prr_are_one_curve():
    wrong, _ = made(50)
    scores = np.random.default_rng(1).integers(6, size=50)
    curve, area = risk_coverage(scores, wrong)
    assert (
        curve.coverage.iloc[-1] == 1
        and curve.risk.iloc[-1] == pytest.approx(wrong.mean())
        and (curve.best <= curve.risk + 1e-12).all()
    )
    assert prediction_rejection_ratio(scores, ~wrong) == pytest.approx(
        (wrong.mean() - area) / (wrong.mean() - curve.best.mean())
    )


# ---- detectors of the answer alone


def row(id, sample, answer, logprobs):
    "A row of an answer table."
    return dict(
        id=id,
        sample=sample,
        answer=answer,
        answer_tokens=[7] * len(logprobs),
        logprobs=logprobs,
        entropies=[-x for x in logprobs],
    )


SAMPLES = [
    row("a", 0, "Lima", [-0.1, -0.5]),
    row("a", 1, "Lima.", [-1.0]),
    row("a", 2, "Quito", [-1.0, -2.0]),
    row("a", 3, " lima", [-3.0]),
    row("b", 0, "Rome", [-0.2]),
    row("b", 1, "Rome", [-0.3]),
    row("b", 2, "rome", [-0.3, -0.2]),
]


def test_scores_by_hand():
    scores = detector_scores(Dataset.from_list(SAMPLES))
    assert scores.columns.tolist() == [
        "length",
        "neg_mean_logprob",
        "neg_min_logprob",
        "perplexity",
        "mean_entropy",
        "max_entropy",
        "semantic_entropy",
    ]
    np.testing.assert_allclose(
        scores.loc[0].to_numpy(float),
        [2, 0.3, 0.5, np.exp(0.3), 0.3, 0.5, -2 / 3 * np.log(2 / 3) - 1 / 3 * np.log(1 / 3)],
    )
    np.testing.assert_allclose(scores.semantic_entropy[4:], 0, atol=1e-12)


def test_the_greedy_answer_is_no_sample_and_none_means_no_column():
    assert "semantic_entropy" not in detector_scores(Dataset.from_list([SAMPLES[0], SAMPLES[4]]))
    changed = [row("a", 0, "Bogota", [-0.1, -0.5]), *SAMPLES[1:]]
    assert detector_scores(pd.DataFrame(changed)).semantic_entropy.equals(
        detector_scores(pd.DataFrame(SAMPLES)).semantic_entropy
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_and_samples_does_not_matter(seed):
    states, order = noise(7, 5, 30), np.random.default_rng(seed).permutation(7)
    table = pd.DataFrame(SAMPLES)
    there, moved = detector_scores(table, states=states), detector_scores(table.loc[order], states=states[order])
    assert "eigenscore" in there
    np.testing.assert_allclose(moved.to_numpy(), there.loc[order].to_numpy(), rtol=1e-9)
    assert there.eigenscore[0] == pytest.approx(
        eigenscore(states[[1, 2, 3], 2])
    )  # the middle layer, without the greedy answer
    assert detector_scores(table, states=states, layer=4).eigenscore[4] == pytest.approx(eigenscore(states[[5, 6], 4]))


def test_normalize_decides_what_is_one_meaning():
    assert detector_scores(pd.DataFrame(SAMPLES), normalize=lambda text: text).semantic_entropy[0] == pytest.approx(
        np.log(3)
    )
    assert detector_scores(pd.DataFrame(SAMPLES), normalize=lambda text: "").semantic_entropy[0] == 0


def test_undefined_scores_are_nan_and_then_named():
    rows = [*SAMPLES, row("c", 0, "", []), row("c", 1, "x", [-1.0])]
    scores = detector_scores(
        pd.DataFrame(rows), states=np.concatenate([noise(7, 3, 9), np.full((1, 3, 9), np.nan), noise(1, 3, 9)])
    )
    assert (
        scores.loc[7].isna().tolist() == [False] + [True] * 7
        and scores.loc[8, ["semantic_entropy", "eigenscore"]].isna().all()
    )
    labels = ["right", "wrong"] * 4 + ["right"]
    with pytest.raises(FloatingPointError, match="'neg_mean_logprob' gives answer 7 the score nan"):
        evaluate_detectors(scores, labels)
    left = labels[:7] + ["empty", "refused"]
    table = evaluate_detectors(scores, left, n_resamples=20)
    assert table.left_out.eq(2).all() and table.n.eq(7).all() and table.wrong.eq(3).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logprobs=[-0.1]), ValueError, "answer 2 has 2 tokens and 1 log-probabilities"),
        (dict(entropies=[0.1, np.nan]), FloatingPointError, "entropies of answer 2"),
        (dict(logprobs=[-np.inf, -1.0]), FloatingPointError, "log-probabilities of answer 2"),
    ],
)
def test_bad_answers_are_named(change, error, message):
    rows = [*SAMPLES[:2], SAMPLES[2] | change, *SAMPLES[3:]]
    with pytest.raises(error, match=message):
        detector_scores(pd.DataFrame(rows))
    with pytest.raises(ValueError, match="no column 'logprobs'"):
        detector_scores(pd.DataFrame(rows).drop(columns="logprobs"))
    with pytest.raises(ValueError, match="states of 7 answers are needed"):
        detector_scores(pd.DataFrame(SAMPLES), states=noise(6, 3, 9))


# ---- states of answers


def drawn_answers(*lengths, seed=0):
    "Prompts and answers of random tokens."
    draw = np.random.default_rng(seed)
    return [
        dict(
            prompt_tokens=draw.integers(3, VOCABULARY, 2 + i % 4).tolist(),
            answer_tokens=draw.integers(3, VOCABULARY, n).tolist(),
        )
        for i, n in enumerate(lengths)
    ]


class Pads:
    pad_token_id = 1

    def __init__(self, side):
        self.padding_side = side


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_each_answer_alone(family, side):
    model, rows = tiny(family), drawn_answers(4, 1, 0, 6, 2)
    found = answer_states(model, Pads(side), pd.DataFrame(rows), at=("last", "mean"), batch_size=3)
    assert found["last"].shape == (5, 5, 32) and np.isnan(found["last"][2]).all() and np.isnan(found["mean"][2]).all()
    for i in (0, 1, 3, 4):
        seen, r = {}, rows[i]
        with torch.no_grad(), read_activations(model, ["output"], lambda layer, point, a: seen.update({layer: a[0]})):
            model(torch.tensor([r["prompt_tokens"] + r["answer_tokens"]]))
        answer = torch.stack([seen[layer][len(r["prompt_tokens"]) :] for layer in range(5)])
        np.testing.assert_allclose(found["mean"][i], answer.mean(1), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["last"][i], answer[:, -1], rtol=1e-3, atol=1e-4)
    alone = answer_states(model, Pads(side), Dataset.from_list(rows), at="mean", batch_size=1)
    np.testing.assert_allclose(alone, found["mean"], rtol=1e-3, atol=1e-4)


def test_a_state_that_is_not_finite_is_named_and_no_hook_stays():
    model, rows = tiny("llama"), drawn_answers(3, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 2: the state of answer 0"):
        answer_states(model, Pads("left"), pd.DataFrame(rows))
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="not 'first'"):
        answer_states(model, Pads("left"), pd.DataFrame(rows), at="first")
    with pytest.raises(ValueError, match="none of 1 answers has a token"):
        answer_states(model, Pads("left"), pd.DataFrame(drawn_answers(0)))
    with pytest.raises(ValueError, match="no column 'prompt_tokens'"):
        answer_states(model, Pads("left"), pd.DataFrame(rows)[["answer_tokens"]])


# ---- nothing is learnt from what is tested


@pytest.mark.parametrize("n_folds", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_no_question_is_on_both_sides(n_folds, seed):
    wrong, groups = made(90, seed, per_question=3)
    groups = np.array(groups)
    codes = pd.factorize(groups)[0]
    rows = np.flatnonzero(np.arange(90) % 7 > 0)
    folds = _split(wrong, rows, codes, n_folds, seed)
    assert sorted(np.concatenate([test for _, test in folds])) == rows.tolist()
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test]) and sorted([*train, *test]) == rows.tolist()
        assert 0 < wrong[test].sum() < len(test)


def detectors_of(states, wrong, groups):
    "Every kind of fitted detector."
    return dict(
        probe=probe_detector(states, wrong, groups=groups),
        one=probe_detector(states, wrong, groups=groups, layer=1),
        mahalanobis=mahalanobis_detector(states, wrong, layer=1),
        eavss=eavss_detector(states[..., 0], wrong, k=2),
        ranked=eavss_detector(states[..., 0], wrong, k=1, ranking=probe_ranking(states, wrong, groups=groups)),
    )


def test_labels_of_the_test_half_are_never_used():
    wrong, groups = made(80)
    states = noise(80, 4, 6)
    train, test = _split(wrong, np.arange(80), pd.factorize(np.array(groups))[0], 2, 0)[0]
    other = wrong.copy()
    other[test] = ~other[test]
    there, flipped = detectors_of(states, wrong, groups), detectors_of(states, other, groups)
    for name in there:
        np.testing.assert_array_equal(there[name](train, test), flipped[name](train, test), err_msg=name)
    moved = states.copy()
    moved[test[1:]] += 100  # nor what else is tested
    for name, detector in detectors_of(moved, wrong, groups).items():
        np.testing.assert_allclose(detector(train, test)[0], there[name](train, test)[0], err_msg=name)


def test_the_leaky_trap():
    "A thousand layers of noise: chosen and tested on the same answers a discovery, tested on others worth nothing."
    honest, leaky = [], []
    for draw in range(20):
        features, wrong = noise(100, 1000, seed=draw), np.arange(100) % 5 < 2
        detector = eavss_detector(features, wrong, k=3)
        honest.append(
            evaluate_detectors(
                pd.DataFrame(index=range(100)), wrong, fitted=dict(eavss=detector), seeds=range(4), n_resamples=20
            ).auroc.eavss
        )
        leaky.append(auroc(detector(np.arange(100), np.arange(100)), wrong))
    assert abs(np.mean(honest) - 0.5) < 0.04 and np.mean(leaky) > 0.7


def test_probes_find_nothing_in_noise_and_the_planted_layer():
    found = []
    for draw in range(20):
        wrong, groups = made(60, draw)
        found.append(auroc(probe_scores(noise(60, 1, 30, seed=draw), wrong, groups=groups)[0], wrong))
    assert abs(np.mean(found) - 0.5) < 0.06
    wrong, groups = made(100)
    states = noise(100, 5, 8)
    states[:, 3, 0] += 3 * wrong
    by_layer = probe_scores(states, wrong, groups=groups).apply(lambda column: auroc(column, wrong))
    assert by_layer.idxmax() == 3 and by_layer[3] > 0.9 and by_layer.index.tolist() == list(range(5))
    assert probe_scores(states, wrong, groups=groups, layers=[3, 1]).columns.tolist() == [3, 1]
    table = evaluate_detectors(
        pd.DataFrame(dict(length=noise(100))),
        wrong,
        groups=groups,
        fitted=detectors_of(states, wrong, groups),
        seeds=range(3),
        n_resamples=50,
    )
    assert table.auroc.probe > 0.9 and table.index[0] == "length"


def test_an_answers_own_question_is_out_of_its_fold():
    "Answers to one question share a state: a probe that saw the question would know its label."
    wrong = np.repeat(np.random.default_rng(0).random(40) < 0.5, 3)
    states = np.repeat(noise(40, 1, 60), 3, axis=0)
    by_question = auroc(probe_scores(states, wrong, groups=np.repeat(np.arange(40), 3), C=1.0)[0], wrong)
    by_answer = auroc(probe_scores(states, wrong, groups=None, C=1.0)[0], wrong)
    assert by_question < 0.7 and by_answer > 0.9


def test_direction_is_chosen_on_train():
    wrong, _ = made(60)
    features = noise(60, 1) - 2 * wrong[:, None]  # hallucinated is lower
    assert auroc(out_of_fold(eavss_detector(features, wrong, k=1), wrong), wrong) > 0.85
    np.testing.assert_allclose(
        eavss_ranking(features, wrong)(np.arange(60)), abs(features[wrong].mean() - features[~wrong].mean())
    )


# ---- the table


def test_length_comes_first_and_unfitted_detectors_are_tested_on_all():
    wrong, groups = made(80)
    scores = pd.DataFrame(dict(other=noise(80) + wrong, length=noise(80, seed=1) + 0.5 * wrong))
    table = evaluate_detectors(scores, wrong, groups=groups, seeds=range(4), n_resamples=200)
    assert table.index.tolist() == ["length", "other"]
    for name in scores:
        assert table.auroc[name] == pytest.approx(roc_auc_score(wrong, scores[name])) and table.auprc[
            name
        ] == pytest.approx(average_precision_score(wrong, scores[name]))
        assert (
            table.auroc_low[name] < table.auroc[name] < table.auroc_high[name]
            and table.auroc_seed_low[name] < table.auroc_seed_high[name]
        )
    pd.testing.assert_frame_equal(
        table, evaluate_detectors(scores, wrong, groups=groups, seeds=range(4), n_resamples=200)
    )
    assert not table.equals(evaluate_detectors(scores, wrong, groups=groups, seeds=range(4), n_resamples=200, seed=1))


def test_with_a_fitted_detector_all_are_tested_on_the_same_halves():
    wrong, groups = made(80)
    scores, codes = pd.DataFrame(dict(length=noise(80) + wrong)), pd.factorize(np.array(groups))[0]

    def same(train, test):
        return scores.length.to_numpy()[test]

    table = evaluate_detectors(scores, wrong, groups=groups, fitted=dict(same=same), seeds=range(3), n_resamples=50)
    np.testing.assert_array_equal(table.loc["length"], table.loc["same"])
    halves = [_split(wrong, np.arange(80), codes, 2, s)[0][1] for s in range(3)]
    each = [roc_auc_score(wrong[test], scores.length[test]) for test in halves]
    assert table.auroc.length == pytest.approx(np.mean(each)) and (
        table.auroc_seed_low.length,
        table.auroc_seed_high.length,
    ) == pytest.approx((min(each), max(each)))


def test_answers_of_one_question_are_drawn_together():
    draws = _draws(np.array([0, 0, 1, 2, 2, 2]), 500, 0)
    assert (
        (draws[0] == 1).all()
        and (draws[:, 0] == draws[:, 1]).all()
        and (draws[:, 3] == draws[:, 5]).all()
        and (draws[:, [0, 2, 3]].sum(1) == 3).all()
    )
    wrong = np.repeat(np.arange(40) % 5 < 2, 4)
    scores = pd.DataFrame(dict(length=np.repeat(noise(40), 4) + wrong))

    def width(groups):
        row = evaluate_detectors(scores, wrong, groups=groups).loc["length"]
        return row.auroc_high - row.auroc_low

    assert width(np.repeat(np.arange(40), 4)) > 1.5 * width(None)


@pytest.mark.parametrize(
    "labels, counts",
    [
        (["wrong"] * 4, "4 hallucinated and 0 faithful"),
        ([False] * 4, "0 hallucinated and 4 faithful"),
        (["right", "empty", "refused", "right"], "0 hallucinated and 2 faithful"),
    ],
)
def test_one_class_is_an_error_with_its_counts(labels, counts):
    scores = pd.DataFrame(dict(length=[1.0, 2, 3, 4]))
    for call in (
        lambda: auroc(scores.length, labels),
        lambda: evaluate_detectors(scores, labels),
        lambda: out_of_fold(None, labels),
        lambda: ranking_value(noise(4, 3), labels, k=1, baseline=[scores.length]),
        lambda: probe_scores(noise(4, 2, 3), labels),
    ):
        with pytest.raises(ValueError, match=counts):
            call()


def test_four_answers_are_enough_and_one_of_a_class_is_not():
    table = evaluate_detectors(dict(a=[4, 1, 3, 2], length=[1, 1, 1, 1]), ["wrong", "right", "wrong", "right"])
    assert table.auroc.tolist() == [0.5, 1] and table.index[0] == "length"
    with pytest.raises(ValueError, match="missing from 3.% of the resamples"):
        _mean_and_ends(np.array([[0.5] * 65 + [np.nan] * 35]), 0.95)


def test_too_few_questions_of_a_class_are_counted():
    with pytest.raises(ValueError, match="1 with hallucinated answers and 3 with faithful answers"):
        evaluate_detectors(pd.DataFrame(dict(length=[1.0, 2, 3, 4])), [True, False, False, False])
    with pytest.raises(ValueError, match="missing from 50% of the resamples"):
        _mean_and_ends(np.array([[0.5, np.nan]]), 0.95)
    assert _mean_and_ends(np.array([[0.5, 0.4] * 5, [0.7, np.nan] + [0.4] * 8]), 0.5)[0] == 0.6


def test_bad_input_is_named():
    wrong, groups = made(20)
    scores = pd.DataFrame(dict(length=noise(20), odd=noise(20)))
    scores.loc[13, "odd"] = np.nan
    with pytest.raises(FloatingPointError, match="'odd' gives answer 13 the score nan"):
        evaluate_detectors(scores, wrong, groups=groups)
    with pytest.raises(FloatingPointError, match="'mine' gives answer"):
        evaluate_detectors(
            scores[["length"]], wrong, groups=groups, fitted=dict(mine=lambda train, test: np.full(len(test), np.inf))
        )
    with pytest.raises(ValueError, match="'length' is a column of scores and a fitted"):
        evaluate_detectors(scores[["length"]], wrong, groups=groups, fitted=dict(length=lambda train, test: test))
    with pytest.raises(ValueError, match="20 answers, and 19 labels"):
        evaluate_detectors(scores, wrong[:19])
    with pytest.raises(ValueError, match="20 answers, and 3 groups"):
        evaluate_detectors(scores[["length"]], wrong, groups=groups[:3])
    with pytest.raises(ValueError, match="answer 4 has no question"):
        evaluate_detectors(scores[["length"]], wrong, groups=[*groups[:4], None, *groups[5:]])
    with pytest.raises(ValueError, match="label of answer 1 is 'hallucinated'"):
        evaluate_detectors(scores, ["right", "hallucinated"] * 10)
    with pytest.raises(ValueError, match="label of answer 0 is 1"):
        auroc([1, 2], [1, 0])
    with pytest.raises(ValueError, match="no layer 7"):
        probe_detector(noise(20, 3, 4), wrong, layer=7)(np.arange(10), np.arange(10, 20))
    states = noise(20, 3, 4)
    states[5, 1] = np.nan
    for detector in (probe_detector(states, wrong, layer=1), mahalanobis_detector(states, wrong, layer=1)):
        with pytest.raises(FloatingPointError, match="answer 5 are not all finite"):
            detector(np.arange(10), np.arange(10, 20))
    with pytest.raises(FloatingPointError, match="answer 5 are not all finite"):
        eavss_detector(states[..., 0], wrong, k=1)
    with pytest.raises(FloatingPointError, match="ranking of layer 2"):
        eavss_detector(noise(20, 3), wrong, k=1, ranking=lambda rows: np.array([1, 2, np.nan]))(
            np.arange(10), np.arange(10, 20)
        )


# ---- does the ranking mean anything?


def planted(n=200, n_layers=8, layer=2, seed=0):
    "Labels, features with one layer that tells more, and a baseline that tells a little."
    draw = np.random.default_rng(seed)
    wrong, features = draw.random(n) < 0.4, draw.normal(size=(n, n_layers))
    features[:, layer] += 1.5 * wrong
    return wrong, features, wrong + draw.normal(size=n)


def test_a_layer_that_means_something_is_found_and_adds():
    wrong, features, length = planted()
    table = ranking_value(
        features, wrong, groups=None, ranking=None, k=1, baseline=(length, noise(200)), seeds=range(5)
    )
    assert table.index.tolist() == ["baseline", "eavss, top 1", "eavss, bottom 1", "last 1", "random 1"]
    top = table.loc["eavss, top 1"]
    assert (
        top.layers == [2]
        and top.low > 0.03
        and top.over_random_low > 0
        and top.auroc == pytest.approx(table.auroc.baseline + top.adds)
    )
    assert abs(table.adds["eavss, bottom 1"]) < 0.03 and table.adds["baseline"] == table.low["baseline"] == 0


def test_noise_adds_nothing_however_many_layers_there_are():
    "Layers picked from 300 of noise cost what random layers cost, no more: they are picked where they are not fitted."
    found = []
    for seed in range(8):
        wrong, _, length = planted(120, seed=seed)
        found.append(
            ranking_value(
                noise(120, 300, seed=seed), wrong, k=2, baseline=[length], seeds=range(2), n_random=2, n_resamples=10
            ).loc["eavss, top 2", ["adds", "over_random"]]
        )
    adds, over_random = np.mean(np.array(found, float), 0)
    assert -0.05 < adds < 0.01 and abs(over_random) < 0.02


def test_a_constant_layer_adds_exactly_nothing():
    wrong, _, length = planted(60)
    table = ranking_value(np.ones((60, 4)), wrong, k=2, baseline=[length], seeds=range(2), n_random=2, n_resamples=20)
    np.testing.assert_allclose(table[["adds", "low", "high", "over_random"]].astype(float), 0, atol=1e-9)


def test_rivals_and_the_rows_that_a_ranking_may_see():
    wrong, features, length = planted(80)
    seen = []

    def watch(rows):
        seen.append(rows)
        return np.arange(8.0)

    labels = np.where(wrong, "wrong", "right").astype(object)
    labels[:5] = "refused"
    table = ranking_value(
        features,
        labels,
        groups=np.arange(80) // 2,
        ranking=dict(mine=watch, first=lambda rows: -np.arange(8.0)),
        k=2,
        baseline=pd.DataFrame(dict(length=length)),
        seeds=range(3),
        n_random=2,
        n_resamples=20,
    )
    assert (
        table.layers["mine, top 2"] == [6, 7] == table.layers["last 2"]
        and table.layers["mine, bottom 2"] == [0, 1] == table.layers["first, top 2"]
    )
    assert table.adds["mine, top 2"] == table.adds["last 2"]  # the same layers, the same number
    assert len(seen) == 3 and all(5 <= rows.min() and 25 < len(rows) < 50 for rows in seen)
    with pytest.raises(ValueError, match="'short' has 3 layers, the features have 8"):
        ranking_value(features, wrong, ranking=dict(short=lambda rows: np.arange(3.0)), k=1, baseline=[length])


def test_one_set_out_ranks_on_the_others_alone():
    wrong, features, length = planted(150)
    sets = np.repeat(["a", "b", "c"], 50)
    groups = np.arange(150).astype(object)
    groups[0], groups[60] = "shared", "shared"  # one question in two sets
    seen = []

    def watch(rows):
        seen.append(set(rows.tolist()))
        return eavss_ranking(features, wrong)(rows)

    table = ranking_value(features, wrong, groups=groups, ranking=watch, k=1, baseline=[length], sets=sets)
    assert seen == [set(range(50, 150)) - {60}, set(range(150)) - set(range(50, 100)) - {0}, set(range(100))]
    np.testing.assert_allclose(table[["a", "b", "c"]].mean(axis=1), table.adds.astype(float), atol=1e-12)
    few = wrong & ((sets != "b") | (np.arange(150) < 55))
    with pytest.raises(ValueError, match="set 'b': 5 parts need 5 questions of each class: there are"):
        ranking_value(features, few, groups=groups, k=1, baseline=[length], sets=sets)
    with pytest.raises(ValueError, match="set 'b': 0 hallucinated and 50 faithful"):
        ranking_value(features, wrong & (sets != "b"), groups=groups, k=1, baseline=[length], sets=sets)


def test_bad_input_of_ranking_value():
    wrong, features, length = planted(40)
    for baseline in ((), [length[:9]], [length, length[:9]]):
        with pytest.raises(ValueError, match="baseline"):
            ranking_value(features, wrong, k=1, baseline=baseline)
    with pytest.raises(ValueError, match="k is between 1 and 8"):
        ranking_value(features, wrong, k=9, baseline=[length])
    with pytest.raises(FloatingPointError, match="answer 3 are not all finite"):
        ranking_value(np.where(np.arange(40)[:, None] == 3, np.nan, features), wrong, k=1, baseline=[length])
