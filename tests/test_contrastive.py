"""Contrastive training beyond its chapters: families, padding, precisions, processes that are killed, and what must
stay as it was. The long sweeps are marked slow."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import disk_offload
from datasets import Dataset
from transformers import AutoModelForCausalLM

from avss_nb.ablations import choose_variants, compare_variants, plot_variants, run_variants
from avss_nb.contrastive import (
    ContrastiveRecipe,
    FrozenPrefix,
    OBJECTIVES,
    _aligned,
    _answer_logprobs,
    _unwrapped,
    check_training,
    contrastive_losses,
    contrastive_rows,
    contrastive_cosines,
    contrastive_score,
    contrastive_tune,
    info_nce,
    likelihood_contrast,
    own_wrong_answers,
    prototype_loss,
    triplet_loss,
)
from avss_nb.evaluation import option_logprobs
from avss_nb.models import blocks
from tiny import FAMILIES, MORE_FAMILIES, QUICK, VOCABULARY, one_thread, swept, tiny

CAUSAL = [f for f in (*FAMILIES, *MORE_FAMILIES) if f not in ("bert", "distilbert", "t5")]
STATELESS = [f for f in CAUSAL if f != "mamba"]  # a state-space model reads its padding on the left
QUESTIONS = Dataset.from_list(
    [
        dict(
            id=str(i),
            question="What is " + "so " * (i % 3) + f"{i}?",
            answers=[f"it {i}", "them"],
            distractors=[f"no {i}", "she", "he or none"][: 1 + i % 3],
            context="",
            source="x",
        )
        for i in range(8)
    ]
)
SHORT = dict(template="{question}", steps=6, batch_size=2, rank=4, learning_rate=1e-2)


class Letters:
    "A tokenizer: a token a letter."

    eos_token_id, pad_token_id, padding_side, all_special_ids, is_fast = 2, 1, "right", [1, 2], True

    def __call__(self, text):
        return SimpleNamespace(input_ids=[3 + ord(c) % (VOCABULARY - 3) for c in text])


def tuned(model, layers=(2,), **options):
    return contrastive_tune(model, Letters(), QUESTIONS, layers, **SHORT | options)


def rows_of(questions=QUESTIONS):
    return contrastive_rows(Letters(), questions, template="{question}")[0]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- losses


@pytest.mark.parametrize("seed", range(3))
def test_info_nce_is_the_cross_entropy_of_the_cosines(seed):
    draw = torch.Generator().manual_seed(seed)
    a, p, n = torch.randn(4, 6, generator=draw), torch.randn(4, 6, generator=draw), torch.randn(4, 3, 6, generator=draw)
    keep, groups = torch.rand(4, 3, generator=draw) > 0.4, torch.tensor([0, 1, 0, 2])
    wanted, apart = [], []
    for i in range(4):
        others = [n[i, k] for k in range(3) if keep[i, k]] + [p[j] for j in range(4) if groups[j] != groups[i]]
        cosines = torch.stack([F.cosine_similarity(a[i], x, dim=0) for x in (p[i], *others)])
        wanted.append(F.cross_entropy(cosines[None] / 0.3, torch.tensor([0])))
        apart += (0.4 + cosines[1:] - cosines[0]).clamp_min(0).tolist()
    torch.testing.assert_close(
        info_nce(a, p, negatives=n, temperature=0.3, keep=keep, groups=groups, in_batch=True),
        torch.stack(wanted).mean(),
    )
    assert np.isclose(
        triplet_loss(a, p, negatives=n, margin=0.4, keep=keep, groups=groups, in_batch=True), np.mean(apart), rtol=1e-5
    )


@pytest.mark.parametrize(
    "loss", [partial(info_nce, temperature=0.5), partial(triplet_loss, margin=0.5)], ids=lambda f: f.func.__name__
)
def test_a_step_down_brings_the_answer_near_and_the_negative_away(loss):
    draw = torch.Generator().manual_seed(0)
    a, p, n = (torch.randn(5, *shape, generator=draw).requires_grad_() for shape in ((6,), (6,), (2, 6)))
    loss(a, p, n).backward()

    def near(a, p, n):
        return F.cosine_similarity(a, p).mean() - F.cosine_similarity(a[:, None], n, dim=-1).mean()

    with torch.no_grad():
        for moved in ((a - 0.01 * a.grad, p, n), (a, p - 0.01 * p.grad, n), (a, p, n - 0.01 * n.grad)):
            assert near(*moved) > near(a, p, n)
        torch.testing.assert_close(loss(3 * a, 0.2 * p, 9 * n), loss(a, p, n))


def test_half_precision_states_and_masked_negatives_have_finite_gradients():
    a, p, n = (torch.randn(3, *shape).bfloat16().requires_grad_() for shape in ((4,), (4,), (2, 4)))
    keep = torch.tensor([[True, True], [True, False], [False, False]])
    (info_nce(a, p, negatives=n, keep=keep) + triplet_loss(a, p, negatives=n, margin=2.0, keep=keep)).backward()
    assert (
        all(torch.isfinite(x.grad).all() for x in (a, p, n))
        and not n.grad[2].any()
        and not n.grad[1, 1].any()
        and n.grad[0].any()
    )


def test_prototypes_by_hand():
    draw = torch.Generator().manual_seed(1)
    states, classes = torch.randn(7, 5, generator=draw), torch.tensor([0, 1, 1, 0, 2, 1, 2])
    unit = F.normalize(states, dim=1)
    centre = torch.stack([unit[classes == c].mean(0) for c in range(3)])
    wanted = F.cross_entropy(F.cosine_similarity(unit[:, None], centre[None], dim=-1) / 0.2, classes)
    torch.testing.assert_close(prototype_loss(states, classes, temperature=0.2), wanted)
    with pytest.raises(ValueError, match=r"there are \[2, 0, 1\]"):
        prototype_loss(states[:3], torch.tensor([0, 0, 2]))


def test_likelihood_contrast_is_a_softmax():
    logprobs = torch.tensor([[-3.0, -1, -2], [-700.0, -701, -650]], dtype=torch.float64)
    keep = torch.tensor([[True, True], [True, False]])
    wanted = -np.mean([logprobs[0].softmax(0)[0].log().item(), logprobs[1, :2].softmax(0)[0].log().item()])
    assert np.isclose(likelihood_contrast(logprobs, keep=keep), wanted, rtol=1e-4)  # float32 of −701


# ---- rows


def test_false_negatives_and_repeats_are_dropped_and_counted():
    questions = [
        dict(
            id="q",
            question="Q",
            answers=["The Beatles", "Fab Four"],
            distractors=["beatles", "fab four", "Fab  Fours", "Queen", "queen ", " ", "Abba", "Kiss", "Who"],
        )
    ]
    rows, counts = contrastive_rows(Letters(), questions, negatives=2, template="{question}")
    assert counts == dict(questions=1, negatives=2, false_negatives=3, repeats=2, without=0)
    assert [r["answer"] for r in rows] == [
        Letters()(f" {a}\n").input_ids for a in ("The Beatles", "Queen", "Abba")
    ] and [r["gold"] for r in rows] == [True, False, False]


def test_own_wrong_answers_stand_first_and_leave_the_rest():
    answers = Dataset.from_list(
        [
            dict(id=i, answer=a, alias=l)
            for i, a, l in (
                ("0", "blue", "wrong"),
                ("1", "red", "wrong"),
                ("1", "pink", "wrong"),
                ("1", "pink", "wrong"),
                ("1", "it 1", "right"),
                ("2", "", "empty"),
            )
        ]
    )
    found = own_wrong_answers(QUESTIONS, answers)
    assert found["distractors"][:3] == [
        ["blue", "no 0"],
        ["pink", "red", "no 1", "she"],
        ["no 2", "she", "he or none"],
    ] and found.features == QUESTIONS.features.__class__(found.features)


# ---- the model's side


@pytest.mark.parametrize("family", swept(STATELESS))
def test_answers_have_the_probabilities_that_they_have_alone(family):
    model, rows = tiny(family), rows_of()
    with torch.no_grad():
        together = _answer_logprobs(model, _aligned(rows, 1)).sum(1)
        alone = torch.cat([_answer_logprobs(model, _aligned([r], 1)).sum(1) for r in rows])
        r = rows[3]
        ids = torch.tensor([r["prompt"] + r["answer"]])
        logp = (
            model(ids)
            .logits.log_softmax(-1)[0, len(r["prompt"]) - 1 : -1]
            .gather(1, ids[0, len(r["prompt"]) :, None])
            .sum()
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp, alone[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", [*OBJECTIVES, None], ids=str)
def test_losses_do_not_depend_on_the_other_questions_of_the_batch(objective):
    if objective == "prototype":
        pytest.skip("its poles are the batch's")
    model, rows = tiny("llama"), rows_of()

    def one(i):
        return [r for r in rows if r["question"] == i]

    with torch.no_grad():
        together = contrastive_losses(model, _aligned(one(1) + one(5), 1), [1, 3], objective=objective)
        apart = [contrastive_losses(model, _aligned(one(i), 1), [1, 3], objective=objective) for i in (1, 5)]
    if objective == "triplet":  # a mean over pairs
        n = [len(one(i)) - 1 for i in (1, 5)]
        wanted = sum(k * t["contrastive"] for k, t in zip(n, apart)) / sum(n)
    elif objective:
        wanted = sum(t["contrastive"] for t in apart) / 2
    if objective:
        torch.testing.assert_close(together["contrastive"], wanted, rtol=1e-4, atol=1e-5)
    sizes = [len(one(i)[0]["answer"]) for i in (1, 5)]
    torch.testing.assert_close(
        together["lm"], sum(k * t["lm"] for k, t in zip(sizes, apart)) / sum(sizes), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "family, point",
    [
        *(pytest.param(name, "output", marks=[] if name in QUICK else pytest.mark.slow) for name in STATELESS),
        ("llama", "relative_update"),
        pytest.param("llama", "update", marks=pytest.mark.slow),
        pytest.param("gpt2", "relative_update", marks=pytest.mark.slow),
    ],
)
def test_passing_over_the_frozen_blocks_changes_no_loss_and_no_weight(family, point):
    model, losses, after = tiny(family), {}, {}
    for reuse in (True, False):
        losses[reuse] = []
        after[reuse] = tuned(
            model,
            [3, 4],
            reuse=reuse,
            objective="info_nce",
            point=point,
            on_step=lambda step, terms: losses[reuse].append(terms["loss"]),
        )
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
    for p, q in zip(after[True].parameters(), after[False].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", swept(STATELESS))
def test_every_family_learns_in_the_named_blocks_alone_and_is_saved(family, tmp_path):
    model = tiny(family)
    before = weights(model)
    losses = []
    after = tuned(model, [1, 3], steps=16, on_step=lambda step, terms: losses.append(terms["loss"]))
    inside = {id(p) for i in (1, 3) for p in blocks(after)[i].parameters()}
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert changed and {name for name, p in after.named_parameters() if id(p) in inside} >= changed
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert (
        all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
        and not model.training
        and not after.training
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after(ids).logits)


def test_bfloat16():
    model, losses = tiny("llama").bfloat16(), []
    after = tuned(model, [3], steps=12, on_step=lambda step, terms: losses.append(terms["loss"]))
    assert {p.dtype for p in after.parameters()} == {torch.bfloat16} and np.mean(losses[-3:]) < np.mean(losses[:3])


def test_only_named_layers_are_trained():
    model = tiny("llama")
    before, after = weights(model), tuned(model, [2], targets=["q_proj", "mlp.up_proj"])
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.layers.2.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"}


def test_the_prefix_serves_every_variant_and_only_its_own_rows():
    model, rows = tiny("llama"), rows_of()
    prefix = FrozenPrefix(model, Letters(), rows, [2, 4, 0], batch_size=3)
    assert sorted(prefix.states) == [2, 4]
    for layer, options in ((2, {}), (4, dict(objective=None)), (0, {})):  # another batch size rounds otherwise
        for p, q in zip(
            tuned(model, [layer], reuse=prefix, **options).parameters(),
            tuned(model, [layer], **options).parameters(),
            strict=True,
        ):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="not for block 3"):
        tuned(model, [3], reuse=prefix)
    with pytest.raises(ValueError, match="other rows"):
        tuned(model, [2], reuse=prefix, negatives=1)


def test_offloaded_weights_are_refused_before_anything_runs(tmp_path):
    model = disk_offload(tiny("llama"), str(tmp_path), execution_device="cpu")
    with pytest.raises(ValueError, match="training needs weights in memory.*offloaded"):
        check_training(model, Letters(), QUESTIONS, [2], recipe=ContrastiveRecipe(**SHORT))


def test_an_error_in_training_leaves_everything_as_it_was():
    model = tiny("llama")
    before, state = (
        weights(model),
        (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()),
    )

    def stop(step, terms):
        if step == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tuned(model, on_step=stop)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters()) and not any(
        "lora" in n for n, _ in model.named_parameters()
    )
    assert not any(m._forward_hooks for m in model.modules()) and state == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
    )


def test_a_gradient_that_is_not_finite_takes_no_step(tmp_path):
    model = tiny("llama")

    def spoil(grad):
        return grad * float("nan")

    hook = blocks(model)[4].register_full_backward_hook(
        lambda m, gi, go: (torch.full_like(gi[0], float("nan")),) if gi[0] is not None else None
    )
    with pytest.raises(FloatingPointError, match="gradient of step 0 is not finite"):
        tuned(model, [2], out=tmp_path / "run", save_every=1)
    hook.remove()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_cosines_are_read_at_the_answer_whatever_the_batch():
    model = tiny("llama")
    table = Dataset.from_list([dict(prompt_tokens=r["prompt"], answer_tokens=r["answer"]) for r in rows_of()])
    found = contrastive_cosines(model, Letters(), table)
    pd.testing.assert_frame_equal(
        found, contrastive_cosines(model, Letters(), table, batch_size=1), rtol=1e-3, atol=1e-5
    )
    r, seen = table[2], {}
    hook = blocks(model)[3].register_forward_hook(
        lambda m, a, y: seen.update(y=(y if isinstance(y, torch.Tensor) else y[0])[0])
    )
    with torch.no_grad():
        model(torch.tensor([r["prompt_tokens"] + r["answer_tokens"]]))
    hook.remove()
    P = len(r["prompt_tokens"])
    assert np.isclose(found.loc[2, 3], F.cosine_similarity(seen["y"][P - 1], seen["y"][P:].mean(0), dim=0), rtol=1e-4)
    pd.testing.assert_series_equal(
        contrastive_score(model, Letters(), table, [1, 3]), 1 - found[[1, 3]].mean(axis=1), check_names=False
    )
    with pytest.raises(ValueError, match="answer 1 has no token"):
        contrastive_cosines(
            model,
            Letters(),
            Dataset.from_list([dict(prompt_tokens=[3], answer_tokens=[4]), dict(prompt_tokens=[3], answer_tokens=[])]),
        )


# ---- a killed run, and the table of the variants

CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_contrastive import *
torch.set_num_threads(1)
def slowly(step, terms):
    print(step, flush=True)
    if {slow}: time.sleep(.1)
items = all_variants({out!r}, slowly)
items.to_pickle({out!r} + ".table")
"""


def all_variants(out, on_step=None, steps=10):
    "Two variants with two seeds each, and the base model."
    top, last = dict(layers=[2, 3], rank=2), dict(layers=[4], rank=2, objective=None)
    variants = dict(top=[top], last=[last], base_model=None)
    options = SHORT | dict(steps=steps, save_every=2, on_step=on_step)
    return run_variants(tiny("llama"), Letters(), QUESTIONS, variants, chosen, seeds=(0, 1), out=out, **options)


def chosen(model):
    "A measure: log-probabilities of the right answers."
    with torch.no_grad():
        value = _answer_logprobs(model, _aligned([r for r in rows_of() if r["gold"]], 1)).sum(1)
    return pd.DataFrame(
        dict(set="x", measure="logprob", item=range(len(value)), value=value.double(), tokens=1)
    ).set_index(["set", "measure"])


def run(out, slow):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__), out=str(out), slow=slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_stopped_variants_resume_to_the_same_table(tmp_path):
    steps = []

    def stop(step, terms):
        steps.append(step)
        if len(steps) == 8:
            raise KeyboardInterrupt  # in the second training, after its second checkpoint

    with pytest.raises(KeyboardInterrupt):
        all_variants(tmp_path / "cut", stop, steps=5)
    assert [p.name for p in (tmp_path / "cut" / "training").iterdir()] == ["top-0-1"]
    assert (tmp_path / "cut" / "top-0-0.csv").exists()
    resumed = []
    items = all_variants(tmp_path / "cut", lambda step, terms: resumed.append(step), steps=5)
    assert resumed == [2, 3, 4, *range(5), *range(5)]
    pd.testing.assert_frame_equal(items, all_variants(tmp_path / "straight", steps=5), rtol=1e-6)


@pytest.mark.slow
def test_killed_variants_resume_to_the_same_table(tmp_path):
    first, seen = run(tmp_path / "cut", slow=True), 0
    for line in first.stdout:
        seen += line.strip().isdigit()
        if seen == 17:
            break  # in the second training
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [p.name for p in (tmp_path / "cut" / "training").iterdir()] == ["top-0-1"] and (
        tmp_path / "cut" / "top-0-0.csv"
    ).exists()
    second, straight = run(tmp_path / "cut", slow=False), run(tmp_path / "straight", slow=False)
    steps, errors = second.communicate()
    assert second.returncode == 0, errors
    assert straight.wait() == 0 and len(steps.split()) < 30 and steps.split()[0] in ("4", "6")
    pd.testing.assert_frame_equal(
        *(pd.read_pickle(tmp_path / f"{name}.table") for name in ("cut", "straight")), rtol=1e-6
    )


def test_variants_are_checked_before_anything_is_trained():
    model, steps = tiny("llama"), []

    def go(**variants):
        options = SHORT | dict(seeds=[0], on_step=lambda *step: steps.append(step))
        run_variants(model, Letters(), QUESTIONS, variants, chosen, **options)

    with pytest.raises(ValueError, match="no layer 7"):
        go(good=[dict(layers=[1])], bad=[dict(layers=[7])])
    with pytest.raises(ValueError, match="no linear layer 'query'"):
        go(good=[dict(layers=[1])], bad=[dict(layers=[1], targets=["query"])])
    assert not steps
    with pytest.raises(ValueError, match="k=6: this model has 5 layers"):
        choose_variants(pd.Series(range(5)), k=6)


def test_the_interval_covers_the_gain():
    "Runs differ, questions differ; the true gain is .1."
    rng, covered = np.random.default_rng(0), []
    for _ in range(60):
        hard = rng.normal(0, 0.2, 80)

        def variant(mean, shift):
            return pd.concat(
                [
                    pd.DataFrame(
                        dict(
                            run=f"0-{s}",
                            set="x",
                            measure="f1",
                            item=range(80),
                            value=mean + hard + rng.normal(0, 0.1, 80) + rng.normal(0, 0.02),
                            tokens=1,
                        )
                    )
                    for s in range(6)
                ]
            )

        items = (
            pd.concat(dict(base_model=variant(0.5, 0), better=variant(0.6, 0)), names=["variant"])
            .reset_index("variant")
            .set_index(["variant", "run", "set", "measure"])
        )
        t = compare_variants(items, n_resamples=300).loc[("x", "f1", "better")]
        covered.append(t.gain_low <= 0.1 <= t.gain_high)
    assert sum(covered) >= 50


def test_perplexity_is_of_all_tokens_and_items_must_agree():
    def text(nll):
        return pd.DataFrame(
            dict(
                variant="base_model",
                run="0-0",
                set="text",
                measure="perplexity",
                item=[0, 1],
                value=nll,
                tokens=[10, 30],
            )
        ).set_index(["variant", "run", "set", "measure"])

    assert np.isclose(compare_variants(text([20.0, 90.0])).value.iloc[0], np.exp(110 / 40))
    other = text([20.0, 90.0]).assign(item=[0, 2]).rename(index=dict(base_model="other"))
    with pytest.raises(ValueError, match="different items"):
        compare_variants(pd.concat([text([20.0, 90.0]), other]))


def test_variants_are_drawn_from_the_top():
    """In the table's order without the variant that they are compared with, or in a given one; a variant that one
    measure does not move is there."""
    index = pd.MultiIndex.from_product(
        [["x"], ["mc1", "margin"], ["late", "early", "base_model"]], names=["set", "measure", "variant"]
    )
    table = pd.DataFrame(dict(gain=[0.0, 0.2, 0, 0.3, 0.4, 0]), index).assign(
        gain_low=lambda t: t.gain * 0.9, gain_high=lambda t: t.gain * 1.1
    )

    def shown(panels, order=None):
        drawn = [ax.lines[1] for ax in plot_variants(table, panels, order=order)]
        return [[*zip(line.get_ydata(orig=True), line.get_xdata())][::-1] for line in drawn]

    assert shown([("x", "mc1"), ("x", "margin")]) == [[("late", 0), ("early", 0.2)], [("late", 0.3), ("early", 0.4)]]
    (ax,) = plot_variants(table, {("x", "margin"): "nats"}, axes=None, order=["base_model", "early"])
    assert shown({("x", "margin"): "nats"}, ["base_model", "early"]) == [[("base_model", 0), ("early", 0.4)]] and (
        ax.get_title(),
        ax.get_xlabel(),
    ) == ("nats", "")
