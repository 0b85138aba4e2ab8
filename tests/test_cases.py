"""Faults that users of comparable tools reported: the first table of cases.

Where it touches loading, reading, statistics, skipping and scores."""

from collections import Counter

import numpy as np
import pytest
import torch

import avss_nb.evaluation
from avss_nb.data import batches
from avss_nb.evaluation import perplexity
from avss_nb.hooks import POINTS, model_inputs, read_activations, run_blocks
from avss_nb.importance import block_influence, layer_scores, leave_one_out
from avss_nb.metrics import collect_stats, sparsity, variance
from avss_nb.models import blocks, load_model
from avss_nb.pruning import select_layers
from avss_nb.surgery import PassThrough, check_layers, skip_layers
from tiny import FAMILIES, batch_of, one_thread, tiny

METHODS = ["avss", "avss_output", "variance", "block_influence"]
decoders = pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
each_family = pytest.mark.parametrize("family", FAMILIES)


def widened(batch: dict, width: int, side: str) -> dict:
    "The same batch, padded further."
    more, at = width - batch["input_ids"].shape[1], 0 if side == "left" else 1

    def pad(t, fill):
        return torch.nn.functional.pad(t, (more, 0) if at == 0 else (0, more), value=fill)

    return dict(
        batch,
        input_ids=pad(batch["input_ids"], 1),
        attention_mask=pad(batch["attention_mask"], 0),
        token_mask=pad(batch["token_mask"], False),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bert"])
def test_padding_distorts_importance(family, side):
    "Unpadded, and padded to ten times the length."
    model, batch = tiny(family), batch_of(6, 6)
    wanted, found = (layer_scores(model, [b], methods=METHODS) for b in (batch, widened(batch, 60, side)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@decoders
def test_padding_moves_no_loss(family):
    model, wanted = tiny(family), None
    for batch in (batch_of(6, 6), widened(batch_of(6, 6), 60, "left"), widened(batch_of(6, 6), 60, "right")):
        found = np.array([perplexity(model, [batch]), *leave_one_out(model, [batch])])
        wanted = found if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@each_family
def test_batching_changes_scores(family):
    "Two texts as one batch and as two."
    model, both = tiny(family), batch_of(7, 4)
    one_by_one = [
        {k: v[i : i + 1, :n] if v.ndim == 2 else v[i : i + 1] for k, v in both.items()} for i, n in ((0, 7), (1, 4))
    ]
    methods = METHODS + ["leave_one_out"] * (family != "bert")
    together, apart = layer_scores(model, [both], methods=methods), layer_scores(model, one_by_one, methods=methods)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    for method in methods:
        assert select_layers(together[method]) == select_layers(apart[method])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "measure",
    [block_influence, leave_one_out, collect_stats, lambda m, b: layer_scores(m, b, methods=METHODS)],
    ids=["block_influence", "leave_one_out", "collect_stats", "layer_scores"],
)
def test_nan_ranked_as_unimportant(measure, value):
    "Layer 3 of a model is not finite, and neither is anything after it: the error names the first."
    model = tiny("llama")
    blocks(model)[3].mlp.down_proj.weight.data.fill_(float(value))
    with pytest.raises(FloatingPointError, match="text 0" if measure is leave_one_out else "layer 3"):
        measure(model, [batch_of(6, 4)])


@pytest.mark.parametrize("layer", [0, 3])
def test_a_loss_that_is_not_a_number_is_no_loss(layer, monkeypatch):
    "A model that is NaN only without one of its blocks: taking that one out is the worst, not the best."
    model, some, own = tiny("llama"), [batch_of(6, 4), batch_of(5)], avss_nb.evaluation._token_losses
    wanted = leave_one_out(model, some)

    def losses(model, batch, grad=False):
        stands_in = [isinstance(b, PassThrough) for b in blocks(model)]
        return own(model, batch) * (float("nan") if stands_in[layer] and not stands_in[layer + 1] else 1)

    monkeypatch.setattr(avss_nb.evaluation, "_token_losses", losses)
    increases = leave_one_out(model, some)
    assert increases[layer] == np.inf and increases.drop(layer).equals(wanted.drop(layer))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_perplexity_of_a_broken_model(value):
    "Not 1, and not the perplexity of the texts that came through."
    model, batch = tiny("llama"), batch_of(6, 4, 5)
    batch["input_ids"][1, 2] = 97
    model.get_input_embeddings().weight.data[97] = float(value)
    with pytest.raises(FloatingPointError, match="text 1"):
        perplexity(model, [batch])


def test_a_padding_position_with_a_zero_row_is_not_counted():
    "The zero row of a padding token: it has no relative update, and is nobody's business."
    model, batch, got = tiny("gemma3_text"), batch_of(6, 2), []
    blocks(model)[0].post_feedforward_layernorm.weight.data.fill_(99)
    with read_activations(model, ["relative_update"], lambda layer, point, a: got.append(a)):
        run_blocks(model, batch)
    assert (got[0][1, 2:] == 0).all()
    stats = collect_stats(model, [batch], reduce=("elements", "samples", "neurons"))
    assert all(
        np.isfinite(variance(stats, point="relative_update", reduce=reduce)).all()
        for reduce in ("elements", "samples", "neurons")
    )


@each_family
def test_output_0_of_a_bare_tensor(family):
    "A batch of 3×7: 21 tokens, not 7."
    model = tiny(family)
    stats = collect_stats(model, [batch_of(7, 7, 7)], points=POINTS, reduce=("elements", "neurons", "samples"))
    for point in POINTS:
        assert set(stats.get(point, "tokens")) == {21} and set(stats.get(point, "samples")) == {3}
    assert set(stats.get("output", "count")) == {21 * 32}


@pytest.mark.parametrize("family, norm", [("llama", "norm"), ("gpt2", "ln_f"), ("gpt_neox", "final_layer_norm")])
def test_last_hidden_state_is_post_norm(family, norm):
    "Statistics of the last block do not move with the final norm's weight."
    model, batch = tiny(family), batch_of(7, 4)
    before = collect_stats(model, [batch])
    model.base_model.get_submodule(norm).weight.data.mul_(100)
    after = collect_stats(model, [batch])
    assert variance(before, point="output").equals(variance(after, point="output")) and sparsity(before).equals(
        sparsity(after)
    )


@pytest.mark.parametrize(
    "family, options",
    [
        ("mixtral", dict(num_local_experts=4)),
        (
            "qwen2_moe",
            dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=32, decoder_sparse_step=1),
        ),
    ],
)
def test_mixture_of_experts(family, options):
    "Scores, skipping and reading points work; the router's shapes stay."
    model, batch = tiny(family, num_key_value_heads=2, num_experts_per_tok=2, **options), batch_of(7, 4)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    scores = layer_scores(model, [batch], methods=METHODS + ["leave_one_out"])
    assert (
        np.isfinite(scores).all(axis=None)
        and variance(collect_stats(model, [batch], points=["attention", "mlp"]), point="mlp").gt(0).all()
    )
    with torch.no_grad(), skip_layers(model, [1, 3]):
        assert torch.isfinite(model(**model_inputs(model, batch)).logits).all()
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing(family, reentrant):
    "Blocks run again during the backward pass: nothing is counted twice."
    model, batch, seen = tiny(family).train(), batch_of(6, 4), Counter()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    with read_activations(model, POINTS, lambda layer, point, a: seen.update({(layer, point): a.shape[:2].numel()})):
        model(**model_inputs(model, batch), labels=batch["input_ids"]).loss.backward()
    assert seen == {(layer, point): 12 for layer in range(5) for point in POINTS}
    assert all(p.grad is not None for p in blocks(model)[2].parameters())


@pytest.mark.parametrize("use_cache", [True, False])
@decoders
def test_generation_while_reading(family, use_cache):
    "With a cache each token is read once: 5 of the prompt and 7 of the 8 new ones."
    model, ids, seen = tiny(family), batch_of(5, 5)["input_ids"], Counter()
    with read_activations(
        model, ["output", "mlp_hidden"], lambda layer, point, a: seen.update({(layer, point): a.shape[:2].numel() // 2})
    ):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
            use_cache=use_cache,
        )
    assert set(seen.values()) == {5 + 7 if use_cache else sum(range(5, 13))}


@each_family
def test_removed_with_hooks_on(family):
    "The model fails inside, under a reader and a skip: no hook and no stand-in is left behind."
    model, batch = tiny(family), batch_of(6, 4)
    own = list(blocks(model))

    def fail(*args):
        raise RuntimeError("inside")

    handle = blocks(model)[2].register_forward_pre_hook(fail)
    for run in (
        lambda: collect_stats(model, [batch], points=POINTS),
        lambda: block_influence(model, [batch]),
        lambda: layer_scores(model, [batch], methods=["leave_one_out" if family != "bert" else "avss"]),
    ):
        with pytest.raises(RuntimeError, match="inside"), skip_layers(model, [1]):
            run()
        assert [a is b for a, b in zip(own, blocks(model))] == [True] * 5
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_in_the_reader_leaves_no_hook():
    model = tiny("llama")

    def fail(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), read_activations(model, POINTS, fail):
        run_blocks(model, batch_of(4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_read_stays_on_the_graph():
    model, kept = tiny("llama").train(), []
    with read_activations(model, POINTS, lambda layer, point, a: kept.append(a)):
        model(batch_of(6, 4)["input_ids"])
    assert len(kept) == 35 and not any(a.requires_grad or a.grad_fn for a in kept)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([30], "no layer 30.*0 to 29"),
        ([-1], "no layer -1"),
        ([3, 3], "layer 3 is named twice"),
        (range(30), "nothing would be left"),
        ([1.5], "1.5"),
        ([0, 31, -2], "no layer"),
    ],
)
def test_0_or_1_based_end_included_or_not(layers, message):
    with pytest.raises(ValueError, match=message):
        check_layers(layers, 30)


@pytest.mark.parametrize("layers", [[5], [-1], [1, 1], range(5)], ids=str)
def test_wrong_layers_are_refused_before_the_model_is_touched(layers):
    model = tiny("llama")
    own = list(blocks(model))
    with pytest.raises(ValueError):
        skip_layers(model, layers)
    assert [a is b for a, b in zip(own, blocks(model))] == [True] * 5


def test_published_selections():
    "Block Influence on the bundled model, as published for 7B models, takes neither the first block nor the last."
    model, tokenizer = load_model()
    text = " ".join(f"In {y} the river rose by {y % 7} feet, and the mill was closed." for y in range(1890, 1902))
    chosen = select_layers(block_influence(model, batches([text, text[300:], text[500:]], tokenizer, max_length=128)))
    assert len(chosen) == 7 and 0 not in chosen and 29 not in chosen
