"""Every score on tiny random models of 21 families, and leave-one-out by reuse compared with deletion."""

from copy import copy
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from avss_nb import importance
from avss_nb.data import as_batches
from avss_nb.evaluation import LinearProbe, row_losses
from avss_nb.hooks import read_activations, run_blocks
from avss_nb.importance import (
    angular_distance,
    block_influence,
    layer_scores,
    leave_one_out,
    register_score,
    score_names,
    shapley,
    sleb,
    sublayer_names,
    taylor,
)
from avss_nb.metrics import avss, collect_stats
from avss_nb.models import blocks
from avss_nb.surgery import PassThrough, skip_layers
from tiny import FAMILIES, MORE_FAMILIES, batch_of, one_thread, small_tokenizer, swept, tiny, without

ALL = [*FAMILIES, *MORE_FAMILIES]
ENCODERS = ["bert", "distilbert", "t5"]
NO_SUBLAYERS = dict(
    bert="BertLayer is no sum", distilbert="TransformerBlock is no sum", mamba="no 'attention' found in MambaBlock"
)
each_family = pytest.mark.parametrize("family", swept(ALL))
LABELS = [0, 1, 1, 0, 1]


def texts(side: str = "right") -> list[dict]:
    "Five texts in two batches."
    some = [batch_of(9, 3, 5, side=side, seed=1), batch_of(6, 7, side=side, seed=2)]
    some[1]["index"] = torch.tensor([3, 4])
    return some


def loss_of(family: str, model):
    "What the model is judged by: the next token, or a probe on its states."
    return LinearProbe(model, texts(), LABELS).losses if family in ENCODERS else row_losses


def mean_loss(model, loss) -> float:
    found = [loss(model, batch) for batch in texts()]
    return sum(nll.sum().item() for nll, _ in found) / sum(n.sum().item() for _, n in found)


@each_family
def test_every_score_is_finite_and_has_a_row_for_each_layer(family):
    model = tiny(family)
    scores = layer_scores(
        model,
        texts(),
        methods=[
            *score_names("stats"),
            "magnitude",
            "position",
            "random",
            *(["taylor", "leave_one_out", "sleb", "shapley"] if family not in ENCODERS else []),
        ],
    )
    assert scores.index.tolist() == list(range(5)) and np.isfinite(scores.drop(columns="avss_published_code")).all(
        axis=None
    )
    np.testing.assert_array_equal(scores.avss, avss(collect_stats(model, texts())))


@each_family
def test_sublayers(family):
    "Scored, or refused by name."
    model, methods = tiny(family), ["avss", "variance", "block_influence", "magnitude"]
    if family in NO_SUBLAYERS:
        with pytest.raises(ValueError, match=NO_SUBLAYERS[family]):
            layer_scores(model, texts(), methods=methods, layers=sublayer_names(model))
        return
    scores = layer_scores(model, texts(), methods=methods, layers=sublayer_names(model))
    assert scores.index.tolist() == sublayer_names(model) and (scores > 0).all(axis=None)
    base_model = layer_scores(model, texts(), methods=["magnitude"]).magnitude
    norms = [sum(p.abs().sum().item() for p in block.parameters() if p.dim() < 2) for block in blocks(model)]
    np.testing.assert_allclose(scores.magnitude.to_numpy().reshape(5, 2).sum(1) + norms, base_model, rtol=1e-6)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_leave_one_out_by_reuse_equals_deletion(family, side):
    model = tiny(family)
    loss = loss_of(family, model)

    def mean(m):
        found = [loss(m, b) for b in texts(side)]
        return sum(nll.sum().item() for nll, _ in found) / sum(n.sum().item() for _, n in found)

    wanted = [mean(without(model, [i])) - mean(model) for i in range(5)]
    np.testing.assert_allclose(leave_one_out(model, texts(side), loss=loss), wanted, rtol=1e-5, atol=2e-6)
    assert abs(np.array(wanted)).max() > 0.01


@each_family
def test_leave_one_out_of_sublayers_equals_skipping(family):
    model = tiny(family)
    if family == "mamba":
        with pytest.raises(ValueError, match="no 'attention' found in MambaBlock"):
            leave_one_out(model, texts(), layers=sublayer_names(model))
        return
    loss = loss_of(family, model)
    found = leave_one_out(model, texts(), layers=sublayer_names(model), loss=loss)
    for unit in sublayer_names(model):
        with skip_layers(model, [unit]):
            wanted = mean_loss(model, loss)
        np.testing.assert_allclose(found[unit], wanted - mean_loss(model, loss), rtol=1e-6, atol=1e-9)
    with skip_layers(model, ["attention.2", "mlp.2"]):
        both = mean_loss(model, loss)
    if family not in ("bert", "distilbert"):  # whose norms stay
        with skip_layers(model, [2]):
            np.testing.assert_allclose(both, mean_loss(model, loss), rtol=1e-5)


@each_family
def test_greedy_removal_equals_the_plain_way(family):
    model = tiny(family)
    loss, removed = loss_of(family, model), []
    for _ in range(3):

        def cost(i):
            with skip_layers(model, [*removed, i]):
                return mean_loss(model, loss)

        removed.append(min((i for i in range(5) if i not in removed), key=cost))
    assert sleb(model, texts(), n=3, loss=loss, early_stop=None) == removed


def test_early_stopping_drops_only_those_clearly_above():
    "With a wide margin nobody drops out; with a narrow one fewer passes run, and those that cost least still go first."
    model, some, runs = tiny("llama"), [batch_of(9, 9, 9, 9, seed=i) for i in range(6)], []

    def loss(model, batch):
        "Each missing layer costs its own price, give or take what depends on the text."
        runs.append(1)
        removed = [
            i for i, block in enumerate(blocks(model)) if isinstance(block, PassThrough) and block.hidden is None
        ]
        noise = torch.rand(4, 5, generator=torch.Generator().manual_seed(int(batch["input_ids"].sum())))
        return sum(torch.tensor([5.0, 1.0, 3.0, 0.8, 4.0])[i] + noise[:, i] for i in removed).double(), torch.ones(4)

    counts, orders = {}, {}
    for early_stop in (None, 1e9, 3.0, 0.0):
        runs.clear()
        orders[early_stop] = sleb(model, some, n=2, early_stop=early_stop, loss=loss)
        counts[early_stop] = len(runs)
    assert counts[None] == counts[1e9] == 6 * (5 + 4) and counts[0.0] <= counts[3.0] < counts[None] / 2
    assert orders[None] == orders[1e9] == orders[3.0] == [3, 1]


@each_family
def test_shapley_values_add_up(family):
    model = tiny(family)
    loss = loss_of(family, model)
    found = shapley(model, texts(), loss=loss, worst=np.inf)
    with skip_layers(model, range(5), every=True):
        none = mean_loss(model, loss)
    np.testing.assert_allclose(found.shapley.sum(), none - mean_loss(model, loss), atol=1e-6)
    assert (found.se == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shapley_values_by_all_orders(family):
    model, value = tiny(family), {}
    for size in range(6):
        for order in permutations(range(5), size):
            if frozenset(order) in value:
                continue
            with skip_layers(model, [i for i in range(5) if i not in order], every=True):
                value[frozenset(order)] = -mean_loss(model, row_losses)
    wanted = [
        np.mean(
            [value[frozenset(o[: o.index(i) + 1])] - value[frozenset(o[: o.index(i)])] for o in permutations(range(5))]
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(shapley(model, texts(), worst=np.inf).shapley, wanted, rtol=1e-5, atol=1e-6)
    sampled = shapley(model, texts(), worst=np.inf, n_pairs=60, tolerance=0)
    assert (abs(sampled.shapley - wanted) <= 3 * sampled.se).all() and (sampled.se > 0).all()
    np.testing.assert_allclose(sampled.shapley.sum(), sum(wanted), rtol=1e-6)


def test_shapley_of_sublayers_and_of_a_few_layers():
    model = tiny("llama")
    few = sublayer_names(model)[:4]
    found = shapley(model, texts(), layers=few, worst=np.inf)
    with skip_layers(model, few):
        without_them = mean_loss(model, row_losses)
    np.testing.assert_allclose(found.shapley.sum(), without_them - mean_loss(model, row_losses), atol=1e-6)
    assert found.index.tolist() == few


def test_a_truncated_walk_still_adds_up():
    found = shapley(tiny("llama"), texts(), n_pairs=3, tolerance=0.5, worst=np.inf)
    np.testing.assert_allclose(
        found.shapley.sum(), shapley(tiny("llama"), texts(), worst=np.inf).shapley.sum(), atol=1e-6
    )


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "bert", "qwen3"))]
)
def test_taylor_against_finite_differences(family):
    "In double precision, each weight of one small tensor of each block."
    model = tiny(family).double()
    loss = LinearProbe(model, texts(), LABELS).losses if family == "bert" else row_losses
    found = taylor(model, texts(), loss=loss)
    block, wanted, h = blocks(model)[2], 0.0, 1e-3
    small = [p for p in block.parameters() if p.dim() == 1]
    for weight in small:
        for i, w in enumerate(weight.tolist()):
            sides = []
            for moved in (w + h, w - h):
                with torch.no_grad():
                    weight[i] = moved
                sides.append(mean_loss(model, loss))
            with torch.no_grad():
                weight[i] = w
            wanted += abs(w * (sides[0] - sides[1]) / (2 * h))
    for p in model.parameters():
        p.requires_grad_(any(p is s for s in small))
    nll, n = zip(*(loss(model, batch, grad=True) for batch in texts()))
    (sum(x.sum() for x in nll) / sum(int(x.sum()) for x in n)).backward()
    np.testing.assert_allclose(sum((p * p.grad).abs().sum().item() for p in small), wanted, rtol=2e-3)
    before = [p.requires_grad for p in model.parameters()]
    kept = [p.grad for p in model.parameters()]
    again = taylor(model, texts(), loss=loss)
    assert [p.requires_grad for p in model.parameters()] == before and all(
        a is p.grad for a, p in zip(kept, model.parameters())
    )
    np.testing.assert_allclose(again, found, rtol=1e-6)
    for p in model.parameters():
        p.requires_grad_(True)
        p.grad = None
    nll, n = zip(*(loss(model, batch, grad=True) for batch in texts()))
    (sum(x.sum() for x in nll) / sum(int(x.sum()) for x in n)).backward()
    np.testing.assert_allclose(
        found,
        [sum((p * p.grad).abs().sum().item() for p in b.parameters() if p.grad is not None) for b in blocks(model)],
        rtol=1e-4,
    )


@each_family
def test_angular_distance_is_the_angle_at_the_last_counted_token(family):
    model, some = tiny(family), texts()
    some[0]["token_mask"][0, 7:] = False
    angles = []
    for batch in some:
        states = {}
        with read_activations(model, ["input"], lambda layer, point, a: states.update({layer: a})):
            run_blocks(model, batch)
        for row, counted in enumerate(batch["token_mask"]):
            x = torch.stack([states[i][row, counted.nonzero().max()].double() for i in range(5)])
            angles.append(
                [
                    [torch.arccos(torch.cosine_similarity(x[i], x[i + n], dim=0)).item() / np.pi for i in range(5 - n)]
                    for n in (1, 3)
                ]
            )
    for n, wanted in zip((1, 3), zip(*angles)):
        np.testing.assert_allclose(angular_distance(model, some, n=n)[: 5 - n], np.mean(wanted, axis=0), atol=1e-4)


def test_scores_do_not_depend_on_batching():
    model, methods = tiny("llama"), [*score_names("stats"), "taylor", "leave_one_out", "shapley"]
    alone = [{k: v[i : i + 1] for k, v in batch.items()} for batch in texts() for i in range(len(batch["index"]))]
    for b in alone:
        b.update({k: v[:, : int(b["token_mask"].sum())] for k, v in b.items() if v.dim() == 2})
    np.testing.assert_allclose(
        layer_scores(model, alone, methods=methods), layer_scores(model, texts("left"), methods=methods), rtol=1e-4
    )


def test_a_model_without_some_layers_is_left_as_it_was():
    model = tiny("llama").train()
    before = [*blocks(model)]
    for run in (
        lambda: leave_one_out(model, texts(), layers=sublayer_names(model)),
        lambda: sleb(model, texts(), n=2),
        lambda: shapley(model, texts(), worst=np.inf),
        lambda: taylor(model, texts()),
    ):
        run()
    assert all(a is b for a, b in zip(before, blocks(model))) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(
        p.grad is None and p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda m: layer_scores(m, texts(), methods=["sleb"], layers=["attn.1"]), "not 'attn.1'"),
        (lambda m: layer_scores(m, texts(), layers=[0, 0]), "layer 0 is named twice"),
        (lambda m: layer_scores(m, texts(), layers=["mlp.7"]), "there is no layer 7"),
        (lambda m: angular_distance(m, texts(), n=6), "between 1 and the number of layers 5, not 6"),
        (lambda m: angular_distance(m, []), "batches are empty"),
        (lambda m: shapley(m, []), "batches are empty"),
        (lambda m: taylor(m, []), "batches are empty"),
        (lambda m: sleb(m, texts(), n=5), "between 1 and 4, not 5"),
        (lambda m: sleb(m, [], n=2), "batches are empty"),
        (lambda m: shapley(m, texts(), n_pairs=1), "two pairs"),
        (lambda m: skip_layers(m, [2.5]), "not 2.5"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run(tiny("llama"))


@pytest.mark.parametrize(
    "score",
    [
        taylor,
        lambda m, b: sleb(m, b, n=2),
        shapley,
        leave_one_out,
        lambda m, b: layer_scores(m, b, methods=[*score_names("stats")]),
    ],
    ids=["taylor", "sleb", "shapley", "leave_one_out", "statistics"],
)
def test_a_layer_that_is_not_finite_is_never_ranked(score):
    model = tiny("llama")
    for weight in blocks(model)[3].mlp.parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        score(model, texts())


def test_shapley_counts_nothing_worse_than_guessing():
    "By default a team that is worse than guessing among all 99 tokens counts as guessing."
    model = tiny("llama")

    def value(units):
        with skip_layers(model, units, every=True):
            return -min(mean_loss(model, row_losses), np.log(99))

    bounded, free = shapley(model, texts()), shapley(model, texts(), worst=np.inf)
    np.testing.assert_allclose(bounded.shapley.sum(), value([]) - value(range(5)), atol=1e-6)
    assert abs(bounded.shapley.sum() - free.shapley.sum()) > 0.01
    assert (shapley(model, texts(), worst=1.0).shapley == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma3_text", "falcon", "bloom"])
def test_sublayers_turn_the_stream_by_hand(family):
    "From the block's input and the sublayer's own contribution; here the block runs with the sublayer alone."
    model, some = tiny(family), texts()
    x, y, lone = {}, {}, {}
    with read_activations(
        model,
        ["input", "output"],
        lambda layer, point, a: (x if point == "input" else y).setdefault(layer, []).append(a),
    ):
        for batch in some:
            run_blocks(model, batch)
    found = layer_scores(model, some, methods=["block_influence", "variance"], layers=sublayer_names(model))
    for layer in range(5):
        with (
            skip_layers(model, [f"mlp.{layer}"]),
            read_activations(model, ["output"], lambda i, point, a: lone.setdefault(i, []).append(a)),
        ):
            lone.clear()
            for batch in some:
                run_blocks(model, batch)
        for unit, pairs in (
            (f"attention.{layer}", zip(x[layer], lone[layer])),
            (f"mlp.{layer}", zip(lone[layer], y[layer])),
        ):
            a, b = (
                torch.cat([t[batch["token_mask"]] for t, batch in zip(side, some)]).double() for side in zip(*pairs)
            )
            assert found.block_influence[unit] == pytest.approx(
                (1 - torch.cosine_similarity(a, b, dim=-1)).mean().item(), abs=1e-5
            )
            relative = (b - a) / a.square().mean(-1, keepdim=True).sqrt()
            assert found.variance[unit] == pytest.approx(relative.var(correction=0).item(), rel=1e-3)


def test_a_reader_that_was_there_before_sees_the_sublayer_as_zero():
    model, seen = tiny("llama"), {}
    with (
        read_activations(
            model, ["attention", "mlp"], lambda layer, point, a: seen.update({f"{point}.{layer}": a.abs().max().item()})
        ),
        skip_layers(model, ["attention.1", "mlp.3"]),
    ):
        run_blocks(model, texts()[0])
    assert [unit for unit in sublayer_names(model) if seen[unit] == 0] == ["attention.1", "mlp.3"]


def test_some_layers_have_the_scores_that_they_have_among_all():
    model, some = tiny("llama"), [1, "attention.2", "mlp.2", 4]
    names = ["avss", "block_influence", "avss_downstream", "magnitude", "leave_one_out"]
    blocks_only = layer_scores(model, texts(), methods=names)
    parts, mixed = (layer_scores(model, texts(), methods=names, layers=x) for x in (sublayer_names(model), some))
    assert mixed.index.tolist() == some and mixed.index.name == "layer"
    np.testing.assert_allclose(mixed.loc[[1, 4]], blocks_only.loc[[1, 4]], rtol=1e-6)
    np.testing.assert_allclose(mixed.loc[some[1:3]], parts.loc[some[1:3]], rtol=1e-6)


def test_a_registered_score_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(importance, "SCORES", copy(importance.SCORES))
    with pytest.raises(ValueError, match="unknown source 'weights'"):
        register_score("weights", source="weights")

    @register_score("first", source="run")
    def first(model, batches, *, layers):
        return pd.Series([layer == 0 for layer in layers], dtype=float)

    assert score_names()[-1] == "first" and score_names("run")[-1] == "first" and "first" not in score_names("stats")
    assert layer_scores(tiny("llama"), texts(), methods="first")["first"].tolist() == [1, 0, 0, 0, 0]


def test_texts_are_made_into_batches():
    tokenizer = small_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    some = ["a lamp in the dark", "the keeper lit it"]
    made = as_batches(tokenizer, some)
    for score in (block_influence, leave_one_out, taylor, angular_distance):
        assert score(model, tokenizer, some).equals(score(model, made))
