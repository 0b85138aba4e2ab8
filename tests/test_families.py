"""Blocks, reading points, statistics and skipping on tiny models of seven families, and of one no library knows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from avss_nb.hooks import POINTS, model_inputs, read_activations
from avss_nb.importance import block_influence, layer_scores, leave_one_out
from avss_nb.metrics import REDUCTIONS, collect_stats, sparsity, variance
from avss_nb.models import blocks, load_model
from avss_nb.surgery import PassThrough, skip_layers
from tiny import FAMILIES, VOCABULARY, TupleModel, batch_of, one_thread, tiny, without

LAYERS = dict(
    llama="model.layers",
    qwen3="model.layers",
    gemma3_text="model.layers",
    gpt2="transformer.h",
    gpt_neox="gpt_neox.layers",
    opt="model.decoder.layers",
    bert="bert.encoder.layer",
)
FINAL_NORM = dict(
    llama="model.norm",
    qwen3="model.norm",
    gemma3_text="model.norm",
    gpt2="transformer.ln_f",
    gpt_neox="gpt_neox.final_layer_norm",
    opt="model.decoder.final_layer_norm",
)
DOWN = dict(
    llama="mlp.down_proj",
    qwen3="mlp.down_proj",
    gemma3_text="mlp.down_proj",
    gpt2="mlp.c_proj",
    gpt_neox="mlp.dense_4h_to_h",
    opt="fc2",
    bert="output.dense",
)
DECODERS = [f for f in FAMILIES if f != "bert"]
each_family, each_decoder = pytest.mark.parametrize("family", FAMILIES), pytest.mark.parametrize("family", DECODERS)


def read(model, batch: dict, points=POINTS, **options):
    "Every activation at the points, by layer and point, and what the model returned."
    got = {}
    with (
        torch.no_grad(),
        read_activations(model, points, lambda layer, point, a: got.setdefault((layer, point), []).append(a)),
    ):
        result = model(**model_inputs(model, batch), **options)
    assert all(len(tensors) == 1 for tensors in got.values())
    return {key: tensors[0] for key, tensors in got.items()}, result


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(dict(rtol=1e-5, atol=1e-5) | tolerance))


@each_family
def test_blocks_are_the_layers(family):
    model = tiny(family)
    assert blocks(model) is model.get_submodule(LAYERS[family]) and len(blocks(model)) == 5
    assert blocks(model.base_model) is blocks(model)


@each_family
def test_every_point_has_the_batch_s_shape(family):
    got, _ = read(tiny(family), batch_of(6, 3, 5))
    assert {(layer, point): tuple(a.shape[:2]) for (layer, point), a in got.items()} == {
        (i, p): (3, 6) for i in range(5) for p in POINTS
    }


@each_family
def test_inputs_and_outputs_are_the_hidden_states(family):
    model, batch = tiny(family), batch_of(6, 3, 5, side="left")
    got, result = read(model, batch, ["input", "output"], output_hidden_states=True)
    for i in range(5):
        close(got[i, "input"], result.hidden_states[i], rtol=0, atol=0)
    for i in range(4):
        close(got[i, "output"], result.hidden_states[i + 1], rtol=0, atol=0)
    if family in FINAL_NORM:  # the last block's own output, before the final norm
        with torch.no_grad():
            close(model.get_submodule(FINAL_NORM[family])(got[4, "output"]), result.hidden_states[5])
        assert not torch.allclose(got[4, "output"], result.hidden_states[5], atol=1e-2)


@each_family
def test_updates_by_hand(family):
    batch = batch_of(6, 3, 5)
    got, _ = read(tiny(family), batch)
    for i in range(5):
        x, y, update, relative = (
            got[i, p][batch["token_mask"]].double().numpy() for p in ("input", "output", "update", "relative_update")
        )
        np.testing.assert_allclose(update, y - x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(relative, (y - x) / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5, atol=1e-6)


@each_decoder
def test_input_attention_and_mlp_add_up_to_the_output(family):
    "The attention half alone: the same block with its down projection silenced."
    model, batch = tiny(family), batch_of(6, 3, 5)
    got, _ = read(model, batch)
    for i, block in enumerate(blocks(model)):
        x, y, attention, mlp = (got[i, p] for p in ("input", "output", "attention", "mlp"))
        close(x + attention.view_as(x) + mlp.view_as(x), y)
        down = block.get_submodule(DOWN[family])
        kept = {name: p.detach().clone() for name, p in down.named_parameters()}
        for p in down.parameters():
            p.data.zero_()
        silenced, _ = read(model, batch, ["input", "output"])
        for name, p in down.named_parameters():
            p.data.copy_(kept[name])
        close(attention.view_as(x), silenced[i, "output"] - silenced[i, "input"])
        assert attention.abs().max() > 1e-2 and mlp.abs().max() > 1e-2


def test_bert_norms_the_sums_of_its_sublayers():
    model = tiny("bert")
    got, _ = read(model, batch_of(6, 3, 5))
    for i, block in enumerate(blocks(model)):
        with torch.no_grad():
            y = block.output.LayerNorm(
                block.attention.output.LayerNorm(got[i, "input"] + got[i, "attention"]) + got[i, "mlp"]
            )
        close(y, got[i, "output"])


@each_family
def test_mlp_hidden_is_what_the_down_projection_gets(family):
    model = tiny(family)
    got, _ = read(model, batch_of(6, 3, 5))
    for i, block in enumerate(blocks(model)):
        with torch.no_grad():
            half = block.get_submodule(DOWN[family])(got[i, "mlp_hidden"])
        if family == "gemma3_text":
            half = block.post_feedforward_layernorm(half)
        close(half.view_as(got[i, "mlp"]), got[i, "mlp"])


def naive(activations: list[np.ndarray], masks: list[np.ndarray], reduce: str, eps: float = None, tau: float = None):
    "σ² and S of one layer from all kept activations, (B, T, width) each, in float64."
    elements = np.concatenate([a[m].ravel() for a, m in zip(activations, masks)])
    if reduce == "neurons":
        elements = np.concatenate([a[m] for a, m in zip(activations, masks)]).mean(0)
    s = (abs(elements) < (eps or tau * np.sqrt((elements**2).mean()))).mean()
    if reduce == "samples":
        return np.mean(
            [
                row[counted].mean(0).var(ddof=1)
                for a, m in zip(activations, masks)
                for row, counted in zip(a, m)
                if counted.any()
            ]
        ), s
    return elements.var(), s


def kept_activations(model, some_batches: list[dict]):
    "Activations at every point, float64, and masks."
    masks = [b["token_mask"].numpy() for b in some_batches]
    runs = [read(model, b)[0] for b in some_batches]
    return {
        key: [run[key].double().numpy().reshape(*m.shape, -1) for run, m in zip(runs, masks)] for key in runs[0]
    }, masks


def uneven_batches(side: str) -> list[dict]:
    "Padded batches; one row has first positions that do not count, another counts nothing."
    some = [batch_of(9, 2, 5, side=side, seed=1), batch_of(4, 7, side=side, seed=2)]
    some[0]["token_mask"][0, :3] = False
    some[1]["token_mask"][0] = False
    return some


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_equal_naive_ones(family, side):
    model, some = tiny(family), uneven_batches(side)
    stats, (kept, masks) = collect_stats(model, some, points=POINTS, reduce=REDUCTIONS), kept_activations(model, some)
    for point in POINTS:
        assert (stats.get(point, "count") == 20 * kept[0, point][0].shape[-1]).all()
        for reduce in REDUCTIONS:
            for edge in (2.0**-6, 2.0**-3, 0.5):  # on a bin's edge the histogram is exact
                found = (
                    variance(stats, point=point, reduce=reduce),
                    sparsity(stats, point=point, reduce=reduce, eps=edge),
                )
                wanted = np.array([naive(kept[i, point], masks, reduce, eps=edge) for i in range(5)]).T
                np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
                np.testing.assert_allclose(found[1], wanted[1], atol=1e-12)
            wanted = [naive(kept[i, point], masks, reduce, tau=0.3)[1] for i in range(5)]
            np.testing.assert_allclose(
                sparsity(stats, point=point, reduce=reduce, tau=0.3), wanted, atol=0.012
            )  # one bin
        np.testing.assert_array_equal(
            stats.get(point, "exact"),
            [sum((abs(a[m]) < 1e-5).sum() for a, m in zip(kept[i, point], masks)) for i in range(5)],
        )


@each_family
def test_block_influence_equals_the_naive_one(family):
    model, some = tiny(family), uneven_batches("right")
    kept, masks = kept_activations(model, some)

    def one(i):
        x, y = (np.concatenate([a[m] for a, m in zip(kept[i, point], masks)]) for point in ("input", "output"))
        return 1 - ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()

    np.testing.assert_allclose(block_influence(model, some), [one(i) for i in range(5)], atol=1e-6)


@each_family
@pytest.mark.parametrize("layers", [[0], [4], [2], [1, 3], [0, 2, 4], [0, 1, 2, 3]], ids=str)
def test_skipping_equals_building_without(family, layers):
    model = tiny(family)
    for batch in (batch_of(7, 3, 5), batch_of(7, 3, 5, side="left")):
        inputs = model_inputs(model, batch)
        with torch.no_grad():
            built, base_model = without(model, layers)(**inputs).logits, model(**inputs).logits
        with torch.no_grad(), skip_layers(model, layers):
            skipped = model(**inputs).logits
        with torch.no_grad():
            after = model(**inputs).logits
        counted = batch["token_mask"]
        close(skipped[counted], built[counted], rtol=0, atol=0)
        close(after, base_model, rtol=0, atol=0)
        assert (skipped - base_model)[counted].abs().max() > 1e-3


def generate(model, ids, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
        **options,
    ).tolist()


@each_decoder
@pytest.mark.parametrize("layers", [[0], [4], [0, 1, 3]], ids=str)
def test_generation_while_skipping_equals_building_without(family, layers):
    model, ids = tiny(family), batch_of(5, 5)["input_ids"]
    expected = generate(without(model, layers), ids, use_cache=False)
    for options in (dict(use_cache=True), dict(use_cache=False), dict(cache_implementation="static")):
        PassThrough._as_tuple.clear()  # the first use of the family
        with skip_layers(model, layers):
            assert generate(model, ids, **options) == expected, options


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@each_decoder
def test_skipping_may_begin_after_the_prompt(family):
    "A cache that already holds the prompt, and a family that was not skipped before."
    model, ids = tiny(family), batch_of(6, 6)["input_ids"]
    PassThrough._as_tuple.clear()
    with torch.no_grad():
        first = [model(ids[:, :-1], use_cache=True) for _ in range(2)]
        with skip_layers(model, [1]):
            new, again = (model(ids[:, -1:], past_key_values=r.past_key_values).logits for r in first)
    close(new, again, rtol=0, atol=0)


@each_family
def test_skipping_runs_nothing_of_the_skipped_block(family):
    "A reader that was there before sees nothing of it."
    model, batch, seen = tiny(family), batch_of(6, 6), []
    PassThrough._as_tuple.clear()
    with read_activations(model, POINTS, lambda layer, point, a: seen.append((layer, point))), skip_layers(model, [2]):
        model(**model_inputs(model, batch))
    assert sorted(seen) == sorted((i, p) for i in (0, 1, 3, 4) for p in POINTS)


def test_skipping_leaves_the_random_numbers_alone():
    "Dropout falls on the same places in the first skipped run of a family and in the next."
    model, batch = tiny("gpt2", resid_pdrop=0.5).train(), batch_of(6, 6)

    def run():
        torch.manual_seed(1)
        with torch.no_grad(), skip_layers(model, [1]):
            return model(**model_inputs(model, batch)).logits

    PassThrough._as_tuple.clear()
    close(run(), run(), rtol=0, atol=0)


def naive_loss(model, some_batches) -> float:
    "Mean negative log-likelihood of counted tokens that have an attended token before them, float64."
    total = n = 0
    for b in some_batches:
        with torch.no_grad():
            logp = F.log_softmax(model(**model_inputs(model, b)).logits.double(), -1)
        for row in range(len(logp)):
            for t in range(1, logp.shape[1]):
                if b["token_mask"][row, t] and b["attention_mask"][row, t - 1]:
                    total, n = total - logp[row, t - 1, b["input_ids"][row, t]].item(), n + 1
    return total / n


@each_decoder
def test_leave_one_out_equals_building_without(family):
    model, some = tiny(family), uneven_batches("left")
    base_model = naive_loss(model, some)
    wanted = [naive_loss(without(model, [i]), some) - base_model for i in range(5)]
    np.testing.assert_allclose(
        leave_one_out(model, some), wanted, rtol=1e-5, atol=2e-6
    )  # 2e-6: float32 rounding of a loss of 5 nats
    assert abs(np.array(wanted)).max() > 0.01


def test_a_masked_model_has_no_perplexity():
    "It sees the token that it would have to predict."
    with pytest.raises(ValueError, match="BertForMaskedLM"):
        leave_one_out(tiny("bert"), [batch_of(5, 4)])


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_statistics(family, dtype):
    "To 1e-6 those of the model's own activations, and to its rounding those of the float32 model."
    model, some = tiny(family), uneven_batches("right")
    full = collect_stats(model, some, reduce=REDUCTIONS)
    half = collect_stats(model.to(dtype), some, reduce=REDUCTIONS)
    kept, masks = kept_activations(model, some)
    for point in ("output", "relative_update"):
        for reduce in REDUCTIONS:
            np.testing.assert_allclose(
                variance(half, point=point, reduce=reduce),
                [naive(kept[i, point], masks, reduce, eps=0.5)[0] for i in range(5)],
                rtol=1e-6,
            )
            np.testing.assert_allclose(
                variance(half, point=point, reduce=reduce),
                variance(full, point=point, reduce=reduce),
                rtol=8 * torch.finfo(dtype).eps,
            )


def test_batches_that_can_be_walked_once():
    "Any iterable will do where one walk is enough."
    model, some = tiny("llama"), uneven_batches("right")
    for measure in (collect_stats, block_influence, leave_one_out):
        once, often = measure(model, (b for b in some)), measure(model, some)
        assert variance(once).equals(variance(often)) if measure is collect_stats else once.equals(often)


@each_family
def test_modes_stay_as_they_were(family):
    model, batch = tiny(family).train(), batch_of(6, 4)
    blocks(model)[1].eval()
    before, config = {name: m.training for name, m in model.named_modules()}, model.config.to_dict()
    collect_stats(model, [batch], points=POINTS)
    layer_scores(model, [batch], methods=["avss", "block_influence"] + ["leave_one_out"] * (family != "bert"))
    with skip_layers(model, [1]):
        model(**model_inputs(model, batch))
    assert {name: m.training for name, m in model.named_modules()} == before and model.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(
        p.grad is None for p in model.parameters()
    )


def test_a_mode_set_while_skipping_reaches_the_skipped_block():
    model = tiny("llama").train()
    with skip_layers(model, [1]):
        model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("layers", [[0], [3], [0, 2]], ids=str)
def test_a_block_that_returns_a_tuple(layers):
    model, batch = TupleModel(), batch_of(6, 6)
    with torch.no_grad():
        hidden = model.embed(batch["input_ids"])
        for i, layer in enumerate(model.layers):
            hidden = hidden if i in layers else layer(hidden)[0]
        with skip_layers(model, layers):
            close(model(batch["input_ids"]), model.head(hidden), rtol=0, atol=0)


def test_statistics_of_a_block_that_returns_a_tuple():
    model, some = TupleModel(), [batch_of(6, 3), batch_of(4, 4, 2)]
    stats, (kept, masks) = collect_stats(model, some, points=POINTS), kept_activations(model, some)
    for point in POINTS:
        np.testing.assert_allclose(
            variance(stats, point=point),
            [naive(kept[i, point], masks, "elements", eps=1)[0] for i in range(4)],
            rtol=1e-6,
        )
    assert stats.get("output", "count").tolist() == [19 * 16] * 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "roberta"])
def test_padding_moves_nothing(family, side):
    model, sizes = tiny(family, **(dict(max_position_embeddings=64) if family == "roberta" else {})), (9, 2, 5)
    padded = batch_of(*sizes, side=side)
    alone = [
        dict(
            input_ids=ids[m][None],
            attention_mask=torch.ones(1, int(m.sum()), dtype=torch.long),
            token_mask=torch.ones(1, int(m.sum()), dtype=torch.bool),
        )
        for ids, m in zip(padded["input_ids"], padded["token_mask"])
    ]
    wanted, found = (collect_stats(model, some, points=POINTS, reduce=REDUCTIONS) for some in (alone, [padded]))
    for point in POINTS:
        for reduce in REDUCTIONS:
            np.testing.assert_allclose(
                variance(found, point=point, reduce=reduce), variance(wanted, point=point, reduce=reduce), rtol=1e-4
            )


@pytest.fixture(scope="module")
def words():
    "A tokenizer of 99 words."
    tokenizer = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2")


@each_family
def test_a_saved_folder_comes_back_as_its_own_class(family, words, tmp_path):
    model = tiny(family)
    for part in (model, words):
        part.save_pretrained(tmp_path)
    again, tokenizer = load_model(tmp_path, device="cpu")
    assert type(again) is type(model) and not again.training and tokenizer("w5 w7").input_ids == [5, 7]
    inputs = model_inputs(model, batch_of(5, 3))
    with torch.no_grad():
        close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_a_pickled_model_is_refused(words, tmp_path):
    model = tiny("llama")
    for part in (model.config, words):
        part.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((FileNotFoundError, ValueError), match="safetensors") as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
