"""Layer contrast in every family, batch and padding, compared with a reference in numpy; reranking; and thresholds that
keep their promise."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as sps

import avss_nb.decoding as decoding
from avss_nb.decoding import (
    _given,
    _penalized,
    abstain,
    contrast,
    contrast_candidates,
    exit_logits,
    gain_table,
    held_out_risk,
    jensen_shannon,
    dola,
    dola_generate,
    majority_vote,
    rerank,
)
from avss_nb.evaluation import cache_argument, returned_cache, option_logprobs
from avss_nb.hooks import model_inputs, read_activations
from avss_nb.labeling import ANSWER, generate_answers
from avss_nb.models import blocks
from test_labeling import ASKED, BOS, CAUSAL, EOS, letters
from tiny import batch_of, one_thread, swept, tiny

GENERATION = dict(template="Q{question}A", max_new_tokens=6, stop=("zz",))


def model_of(family):
    return tiny(family, bos_token_id=BOS, eos_token_id=EOS)


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


HEADS = dict(
    llama=lambda m, h: m.lm_head(m.model.norm(h)),
    qwen3=lambda m, h: m.lm_head(m.model.norm(h)),
    gpt2=lambda m, h: m.lm_head(m.transformer.ln_f(h)),
    gpt_neox=lambda m, h: (getattr(m, "embed_out", None) or m.lm_head)(m.gpt_neox.final_layer_norm(h)),
    opt=lambda m, h: m.lm_head(m.model.decoder.final_layer_norm(h)),
    gemma2=lambda m, h: 30 * torch.tanh(m.lm_head(m.model.norm(h)) / 30),
    mamba=lambda m, h: m.lm_head(m.backbone.norm_f(h)),
)


def reference(family: str, model, text: list[int], layers: list[int], alpha: float, penalty: float = 1.0) -> np.ndarray:
    "(V,) contrasted scores of the token after a text: no padding, no cache, norm and head by name, in numpy."
    found, model_layers = {}, blocks(model)
    handles = [
        model_layers[l].register_forward_hook(
            lambda m, a, out, l=l: found.update({l: out if torch.is_tensor(out) else out[0]})
        )
        for l in layers
    ]
    try:
        with torch.no_grad():
            logits = [
                model(torch.tensor([text])).logits[0, -1],
                *(HEADS[family](model, found[l][0, -1]) for l in layers),
            ]
    finally:
        for handle in handles:
            handle.remove()
    logp, *others = (log_softmax(l.detach().double().numpy()) for l in logits)

    def distance(logq):
        m = np.logaddexp(logp, logq) - math.log(2)
        return (np.exp(logp) * (logp - m)).sum() / 2 + (np.exp(logq) * (logq - m)).sum() / 2

    scores = logp - max(others, key=distance)
    scores[np.exp(logp) < alpha * np.exp(logp).max()] = -np.inf
    for token in set(text) if penalty != 1 else ():
        scores[token] *= 1 / penalty if scores[token] > 0 else penalty
    return scores


# ---- layer contrast


@pytest.mark.parametrize("layers", [[2], [0, 1, 3]], ids=["static", "dynamic"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", HEADS)
def test_scores_are_those_of_the_reference(family, side, layers):
    "Every position of every row, whatever else is in the batch."
    model, batch = model_of(family), batch_of(9, 4, 6, side=side)
    with dola(model, layers, alpha=0.2), torch.no_grad():
        scores = model(**model_inputs(model, batch)).logits
    for row, mask, found in zip(batch["input_ids"], batch["attention_mask"] == 1, scores):
        text = row[mask].tolist()
        for n, own in enumerate(found[mask].numpy(), 1):
            np.testing.assert_allclose(own, reference(family, model, text[:n], layers, 0.2), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", swept(CAUSAL))
def test_generation_in_any_batch(family):
    "In every family, greedy and drawn: the same tokens in any batch; the numbers are those of one pass over the row."
    model, tokenizer = model_of(family), letters()
    alone = dola_generate(model, tokenizer, ASKED, [0, 2], n_samples=1, batch_size=1, **GENERATION)
    together = dola_generate(model, tokenizer, ASKED, [0, 2], n_samples=1, batch_size=32, **GENERATION)
    for name in ("answer", "answer_tokens", "prompt_tokens", "sample", "id"):
        assert together[name][:] == alone[name][:], name
    assert together.features == ANSWER and sum(map(len, alone["answer_tokens"])) > 20
    for row in alone.select(range(4)):
        n, ids = len(row["answer_tokens"]), torch.tensor([row["prompt_tokens"] + row["answer_tokens"]])
        if not n:
            continue
        with dola(model, [0, 2]), torch.no_grad():
            logp = model(ids).logits[0, -n - 1 : -1].log_softmax(-1)
        assert row["logprobs"] == pytest.approx(logp[torch.arange(n), ids[0, -n:]].tolist(), abs=5e-4)
    assert not model._forward_hooks and not any(b._forward_hooks for b in blocks(model))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_greedy_is_the_reference_token_by_token(family, penalty):
    model, tokenizer = model_of(family), letters()
    answers = dola_generate(model, tokenizer, ASKED, [0, 1, 3], repetition_penalty=penalty, **GENERATION)
    steps = 0
    for row in answers:
        text = row["prompt_tokens"][:]
        for token, logp in zip(row["answer_tokens"], row["logprobs"]):
            scores = reference(family, model, text, [0, 1, 3], 0.1, penalty)
            assert token == scores.argmax() and logp == pytest.approx(log_softmax(scores)[token], abs=2e-3)
            text, steps = [*text, token], steps + 1
    assert steps > 10
    plain = generate_answers(model, tokenizer, ASKED, **GENERATION)
    assert plain["answer_tokens"][:] != answers["answer_tokens"][:]


def test_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    ids, scores = (
        torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0)),
        torch.randn(3, 20, generator=torch.Generator().manual_seed(1)),
    )
    assert torch.allclose(
        _penalized(scores[:, None], ids, None, torch.tensor([5]), 1.2)[:, 0],
        RepetitionPenaltyLogitsProcessor(1.2)(ids, scores.clone()),
    )


def test_alpha_one_is_greedy():
    model, tokenizer = model_of("llama"), letters()
    assert (
        dola_generate(model, tokenizer, ASKED, [1], alpha=1.0, **GENERATION)["answer_tokens"][:]
        == generate_answers(model, tokenizer, ASKED, **GENERATION)["answer_tokens"][:]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_options_under_contrast(family):
    "With a cache (plain) and without (Gemma's sliding window): what the reference sums up."
    model, tokenizer = model_of(family), letters()
    prompts, options = ["Who?", "Where to, then?"], [[" me", " you", "x"], [" up", " down"]]
    with dola(model, [0, 3], alpha=0):
        table = option_logprobs(model, tokenizer, prompts, options)
    head = "llama" if family != "gpt2" else "gpt2"
    for row in table.itertuples():
        start, ids = (
            len(tokenizer(prompts[row.item]).input_ids),
            tokenizer(prompts[row.item] + options[row.item][row.option]).input_ids,
        )
        expected = sum(
            log_softmax(reference(head, model, ids[:n], [0, 3], 0.0))[ids[n]] for n in range(start, len(ids))
        )
        assert row.logprob == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("family", swept(CAUSAL))
def test_reads_out_every_family(family):
    "After the last block: the model's own logits."
    model, found = model_of(family), {}
    batch = batch_of(7, 7)
    with torch.no_grad(), read_activations(model, ["output"], lambda layer, point, a: found.update({layer: a})):
        own = model(batch["input_ids"]).logits
    assert torch.allclose(exit_logits(model, found[4]), own, atol=1e-4) and not torch.allclose(
        exit_logits(model, found[1]), own, atol=0.1
    )
    assert all(type(b).__name__ != "PassThrough" for b in blocks(model))


def test_layers_are_read_out_together_or_one_by_one(monkeypatch):
    model, batch = model_of("llama"), batch_of(7, 5)
    with dola(model, [0, 1, 3]), torch.no_grad():
        together = model(**model_inputs(model, batch)).logits
    for at_once in (1, 30):
        monkeypatch.setattr("avss_nb.decoding._AT_ONCE", at_once)
        with dola(model, [0, 1, 3]), torch.no_grad():
            assert torch.allclose(model(**model_inputs(model, batch)).logits, together, atol=1e-4)


def test_hooks_are_gone_after_an_exception():
    model, batch = model_of("llama"), batch_of(5)
    before = model(batch["input_ids"]).logits

    def fail(*_):
        raise RuntimeError("inside")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        with dola(model, 1):
            model(batch["input_ids"])
    handle.remove()
    assert (
        not model._forward_hooks
        and not any(b._forward_hooks for b in blocks(model))
        and torch.equal(model(batch["input_ids"]).logits, before)
    )


def test_a_model_that_cannot_be_read_out():
    model = model_of("llama")
    handle = model.register_forward_hook(lambda m, a, out: out.__setitem__("logits", out.logits.flip(-1)))
    with pytest.raises(ValueError, match="cannot be read out of an earlier block"):
        with dola(model, 1), torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
    handle.remove()
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ([], {}, "no layer"),
        ([5], {}, "no layer 5"),
        (-1, {}, "no layer -1"),
        ([1, 1], {}, "named twice"),
        ([4], {}, "last one"),
        (["mlp.1"], {}, "whole blocks"),
        ([1], dict(alpha=1.5), "alpha"),
        ([1], dict(alpha=math.nan), "alpha"),
        ([1], dict(repetition_penalty=0.0), "repetition_penalty"),
    ],
    ids=str,
)
def test_bad_contrast(layers, options, message):
    model, calls = model_of("llama"), []
    model.register_forward_hook(lambda *a: calls.append(1))
    with pytest.raises(ValueError, match=message) as error:
        dola_generate(model, letters(), ASKED, layers, **options)
    assert "\n" not in str(error.value) and not calls


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_no_causal_decoder(family):
    with pytest.raises(ValueError, match="no causal decoder"):
        dola(tiny(family), 1)


def test_all_blocks_may_be_candidates_and_the_penalty_needs_the_text():
    model = model_of("llama")
    with dola(model, range(5)), torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        past = returned_cache(model(torch.tensor([[5, 6]]), use_cache=True))
    with pytest.raises(ValueError, match="whole text"):
        with dola(model, 1, repetition_penalty=1.2), torch.no_grad():
            model(torch.tensor([[7]]), **{cache_argument(model): past})


def test_answers_are_kept_by_setting(tmp_path):
    "A folder of one contrast is not resumed by another."
    model, tokenizer = model_of("llama"), letters()
    first = dola_generate(model, tokenizer, ASKED, [1], out=tmp_path, **GENERATION)
    assert dola_generate(model, tokenizer, ASKED, 1, out=tmp_path, **GENERATION)[:] == first[:]
    with pytest.raises(ValueError):
        dola_generate(model, tokenizer, ASKED, [2], out=tmp_path, **GENERATION)


def test_divergence_by_scipy():
    from scipy.spatial.distance import jensenshannon

    p, q = np.random.default_rng(0).dirichlet(np.ones(9), (2, 5))
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(p, q)]
    assert jensen_shannon(torch.tensor(p).log(), torch.tensor(q).log()).tolist() == pytest.approx(expected)
    assert contrast(torch.tensor(p).log(), torch.tensor(q).log(), alpha=0).numpy() == pytest.approx(np.log(p / q))


def test_candidates():
    assert contrast_candidates(12, "low") == [1, 3] and contrast_candidates(12, "high") == [5, 7, 9]
    for n in (6, 7, 30, 41, 80):
        both = contrast_candidates(n, "low") + contrast_candidates(n, "high")
        assert both == sorted(set(both)) and n - 1 not in both and all(b % 2 for b in both)
    with pytest.raises(ValueError, match="'low' or 'high'"):
        contrast_candidates(30, "middle")


# ---- rerank


def made_answers():
    return pd.DataFrame(
        dict(
            id=["q2", "q1", "q2", "q1", "q1"],
            answer=["Oslo", "Lima", "the oslo", "Quito", "Lima."],
            answers=[["x"]] * 5,
            sample=[0, 0, 1, 1, 2],
        )
    )


def test_rerank_takes_the_least_uncertain_and_the_first_of_equals():
    answers = made_answers()
    assert rerank(answers, [1, 1, 1, 0, 0])["answer"][:] == ["Oslo", "Quito"]
    assert rerank(answers, [2, 3, 1, 3, 2.5])["answer"][:] == ["the oslo", "Lima."]
    chosen = rerank(answers, majority_vote(answers))
    assert chosen["answer"][:] == ["Oslo", "Lima"] and set(chosen.column_names) == set(answers)
    assert majority_vote(answers).tolist() == pytest.approx([-1, -2 / 3, -1, -1 / 3, -2 / 3])


@pytest.mark.parametrize(
    "scores, error, message",
    [
        ([1, 2], ValueError, "5 answers, and 2 scores"),
        ([1, 2, math.nan, 3, 4], FloatingPointError, "answer 2"),
        ([1, None, 2, 3, 4], FloatingPointError, "answer 1"),
        ([1, 2, math.inf, 3, 4], FloatingPointError, "answer 2"),
    ],
    ids=str,
)
def test_bad_rerank(scores, error, message):
    with pytest.raises(error, match=message):
        rerank(made_answers(), scores)


def test_gain_is_paired():
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.5
    table = gain_table(pd.DataFrame(dict(base=base, same=base, better=base | (rng.random(200) < 0.1))), against="base")
    assert table.loc["same", ["gain", "gain_low", "gain_high"]].tolist() == [0, 0, 0]
    assert (
        0
        < table.gain_low.better
        < table.gain.better
        < table.gain_high.better
        < 0.15
        < table.high.better - table.low.better + 0.05
    )
    with pytest.raises(ValueError, match="column 'bad' has no number for question 1"):
        gain_table(pd.DataFrame(dict(base=[0, 1], bad=[1, np.nan])), against="base")


# ---- abstain

RISKS = dict(
    honest=lambda s: s,
    steep=lambda s: s > 0.4,
    overconfident=lambda s: np.where(s < 0.1, 0.8, s),
    useless=lambda s: np.full_like(s, 0.5),
    borderline=lambda s: np.full_like(s, 0.301),
    ties=lambda s: s,
)
FINE = (np.arange(10_000) + 0.5) / 10_000


@pytest.mark.parametrize("confidence", [0.8, pytest.param(0.95, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", RISKS)
@pytest.mark.parametrize(
    "grid",
    [pytest.param(None, id="by number", marks=pytest.mark.slow), pytest.param(np.linspace(0.05, 1, 20), id="grid")],
)
def test_the_promise_is_kept(kind, confidence, grid):
    "Of 300 calibration sets the true risk is above the one asked for in no more than 1 − confidence, but for luck."
    violation_rate, n, risk = 0, 300, 0.3
    for seed in range(n):
        rng = np.random.default_rng(seed)
        s = rng.random(120)
        if kind == "ties":
            s = np.ceil(s * 10) / 10 - 1e-9
        wrong = rng.random(120) < (RISKS[kind](s) if kind != "ties" else s)
        rule = abstain(s, wrong, risk, confidence=confidence, grid=grid)
        all_s = FINE if kind != "ties" else np.arange(1, 11) / 10 - 1e-9
        below = all_s < rule.threshold
        violation_rate += below.any() and RISKS[kind](all_s[below]).mean() > risk
    assert sps.binomtest(violation_rate, n, 1 - confidence, alternative="greater").pvalue > 0.001, violation_rate / n


def test_the_first_failure_ends_it():
    "What would pass again behind it is not looked at."
    wrong = np.zeros(400, bool)
    wrong[30:60] = True
    assert sps.binomtest(30, 400, 0.3, alternative="less").pvalue < 1e-9
    for grid in (None, [20, 30, 60, 200, 400]):
        assert 0 < abstain(np.arange(400.0), wrong, 0.3, grid=grid).coverage < 0.1


def test_a_good_score_is_used():
    "Coverage comes near to what the truth would allow (.6 for a risk of s/2 up to .3)."
    rng = np.random.default_rng(0)
    s = rng.random(4000)
    rule = abstain(s, rng.random(4000) < s, 0.3)
    assert (
        0.48 < rule.coverage <= 0.6
        and rule.bound <= 0.3
        and rule.wrong / rule.answered < 0.3
        and rule(s).mean() == rule.coverage
    )


def test_bound_is_the_binomial_test():
    rng = np.random.default_rng(1)
    s = rng.random(200)
    rule = abstain(s, rng.random(200) < s / 2, 0.3, confidence=0.9)
    assert sps.binomtest(rule.wrong, rule.answered, 0.3, alternative="less").pvalue <= 0.1
    assert rule.bound == pytest.approx(
        sps.binomtest(rule.wrong, rule.answered, alternative="less").proportion_ci(0.9).high
    )


def test_nothing_reaches_it():
    rule = abstain(np.arange(50.0), ["wrong"] * 50, 0.3)
    assert (
        (rule.threshold, rule.coverage, rule.answered) == (-math.inf, 0, 0)
        and math.isnan(rule.bound)
        and not rule([-1e9]).any()
    )
    assert abstain([1.0], ["right"], 0.3).coverage == 0


def test_empty_and_refused_are_left_out():
    labels = ["right"] * 30 + ["empty", "refused"]
    assert abstain([*np.arange(30.0), math.nan, math.nan], labels, 0.2).n == 30


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(risk=0), ValueError, "risk and confidence"),
        (dict(risk=1.0), ValueError, "risk and confidence"),
        (dict(confidence=1), ValueError, "risk and confidence"),
        (dict(risk=math.nan), ValueError, "risk"),
        (dict(labels=["right"]), ValueError, "3 scores, and 1 labels"),
        (dict(labels=["empty"] * 3), ValueError, "none of 3"),
        (dict(labels=["good"] * 3), ValueError, "label of answer 0"),
        (dict(scores=[1, math.nan, 2]), FloatingPointError, "answer 1"),
        (dict(steps=0), ValueError, "steps"),
    ],
    ids=str,
)
def test_bad_abstain(given, error, message):
    with pytest.raises(error, match=message):
        abstain(**dict(scores=[1, 2, 3], labels=["right", "wrong", "right"], risk=0.3) | given)


def test_held_out_halves():
    "No question on both sides; a good score answers much and seldom exceeds the risk, a useless one gives no answer."
    rng = np.random.default_rng(0)
    s, groups = np.repeat(rng.random(200), 2), np.repeat(np.arange(200), 2)
    wrong = rng.random(400) < s
    table, given = held_out_risk(
        pd.DataFrame(dict(good=s, useless=rng.random(400))), wrong, 0.3, groups=groups, seeds=range(40)
    )
    assert (
        0.2 < table.coverage.good < 0.5
        and table.risk.good < 0.3
        and table.violation_rate.good < 0.3
        and table.no_answer_rate.useless > 0.8
    )
    assert given.shape == (400, 2) and given.good[s < 0.1].mean() > 0.8 > 0.1 > given.good[s > 0.8].mean()
    with pytest.raises(ValueError, match="400 labels, and 3 groups"):
        held_out_risk(pd.DataFrame(dict(good=s)), wrong, 0.3, groups=[1, 2, 3])


@pytest.mark.parametrize("learns", [False, True])
def test_no_question_in_two_parts(learns, monkeypatch):
    "Learned from, calibrated on, tested on: each answer once, and all answers to a question together."
    groups, seen = np.repeat(np.arange(60), 2), {}

    def detector(learn, rows):
        seen["learn"] = learn
        return rows.astype(float)

    def watch(scores, labels, **options):
        seen["known"] = scores.astype(int)
        return abstain(scores, labels, **options)

    monkeypatch.setattr(decoding, "abstain", watch)
    for seed in range(5):
        given = _given(
            detector if learns else np.arange(120.0),
            np.arange(120) % 2 == 0,
            np.arange(120) > 3,
            groups,
            seed,
            risk=0.3,
        )
        parts = [
            set(groups[rows])
            for rows in (seen.get("learn", np.array([], int)), seen["known"], np.flatnonzero(np.isfinite(given)))
        ]
        assert (
            sum(map(len, parts)) == len(set.union(*parts)) == 58
            and len(parts[2]) in (28, 29, 30)
            and (len(parts[0]) > 10) == learns
        )
