"""Sparse projections in every family.

Thresholds, top-k, allocation, a product by columns, a folder that keeps them, and what is refused.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import avss_nb.allocation as allocation
import avss_nb.sparsity as sparsity
from avss_nb.data import load_questions, load_sentences
from avss_nb.hooks import model_inputs
from avss_nb.metrics import N_BINS, LayerStats, magnitude_bins
from avss_nb.models import blocks, load_model
from avss_nb.pruning import measure_removal, paired_difference
from avss_nb.surgery import skip_layers
from avss_nb.allocation import (
    _MAX_SPARSITY,
    _spectrum,
    acttail_plan,
    greedy_plan,
    hill_exponent,
    measure_plans,
    sparse_variants,
    weight_exponents,
)
from avss_nb.surgery import projections
from avss_nb.sparsity import (
    SPARSITY_RULES,
    SparseLinear,
    _column_product,
    _random_mask,
    calibrate_thresholds,
    densify_layer,
    load_sparse,
    make_sparse,
    mean_sparsity,
    projection_sizes,
    projection_stats,
    quantile,
    realised_sparsity,
    sparsify,
    sparsify_layer,
    top_k,
    uniform_plan,
)
from tiny import FAMILIES, MORE_FAMILIES, batch_of, one_thread, small_tokenizer, swept, tiny

ALL = [*FAMILIES, *MORE_FAMILIES]
DECODERS = ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "falcon", "bloom", "gemma3_text"]


def out(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**model_inputs(model, batch))[0]


def plan_of(model, share: float = 0.5) -> pd.DataFrame:
    return uniform_plan(model, share).drop(
        columns="dt_proj", errors="ignore"
    )  # Mamba reads this map's weight and never runs it


def sparse_projections(model) -> int:
    return sum(isinstance(m, SparseLinear) for m in model.modules())


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- which projections

EXPECTED = dict(
    llama="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    gpt2="c_attn attn.c_proj c_fc mlp.c_proj",
    gpt_neox="query_key_value dense dense_h_to_4h dense_4h_to_h",
    phi3="o_proj qkv_proj gate_up_proj down_proj",
    bert="query key value attention.output.dense intermediate.dense output.dense",
    mixtral="q_proj k_proj v_proj o_proj",
)


@pytest.mark.parametrize("family", EXPECTED)
def test_projections_by_name(family):
    assert list(projections(blocks(tiny(family))[2])) == EXPECTED[family].split()


@pytest.mark.parametrize("family", swept(ALL))
def test_every_linear_layer_once(family):
    block = blocks(tiny(family))[0]
    maps = projections(block)
    linear = [
        m
        for path, m in block.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and not path.endswith(("gate", "router"))
    ]
    assert len(maps) > 3 and {*map(id, maps.values())} == {*map(id, linear)}


# ---- calibration


@pytest.mark.parametrize("family", swept(ALL))
def test_calibration_is_the_same_in_any_batch(family):
    "Padding is not counted; batch size and padding side move a count or two across a bin's edge by rounding."
    model, one = tiny(family), None
    for given in (
        [batch_of(9, 4, 6)],
        [batch_of(9, 4, 6, side="left")],
        [
            {k: v[i : i + 1, :n] if v.dim() == 2 else v[i : i + 1] for k, v in batch_of(9, 4, 6).items()}
            for i, n in enumerate((9, 4, 6))
        ],
    ):
        stats = projection_stats(model, given)
        one = one or stats
        for name, sums in stats.sums.items():
            if name.endswith("count"):
                assert torch.equal(sums, one.sums[name])
            else:
                assert (sums - one.sums[name]).abs().sum() <= 0.004 * sums.sum() + 2
    assert stats.get(next(iter(projections(blocks(model)[0]))), "count")[0] == 19 * 32 and not hooks(model)


def test_histogram_is_that_of_the_inputs(tmp_path):
    model, batch, seen = tiny("llama"), batch_of(9, 4, 6), {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, key=(i, name): seen.update({key: a[0][batch["token_mask"]]}))
        for i, b in enumerate(blocks(model))
        for name, m in projections(b).items()
    ]
    stats = projection_stats(model, [batch])
    for handle in handles:
        handle.remove()
    for (layer, name), x in seen.items():
        assert torch.equal(
            stats.sums[f"{name}.hist"][layer], torch.bincount(magnitude_bins(x).flatten(), minlength=N_BINS)
        )
    stats.save(tmp_path / "s.safetensors")
    assert all(
        torch.equal(LayerStats.load(tmp_path / "s.safetensors").sums[name], value) for name, value in stats.sums.items()
    )
    twice = stats + stats
    assert np.array_equal(quantile(twice.get("q_proj", "hist"), 0.3), quantile(stats.get("q_proj", "hist"), 0.3))


@pytest.mark.parametrize("seed", range(5))
def test_quantile_is_within_its_bin(seed):
    """Of Gaussian, heavy-tailed, tiny and rectified values: less than 1/32 from the exact one, and the fraction
    below is
    off by less than the bin holds."""
    draw = torch.Generator().manual_seed(seed)
    for x in (
        torch.randn(20_000, generator=draw),
        torch.randn(20_000, generator=draw) ** 5,
        1e-9 * torch.rand(20_000, generator=draw),
        torch.randn(20_000, generator=draw).relu(),
        torch.randn(7, generator=draw),
    ):
        hist = torch.bincount(magnitude_bins(x), minlength=N_BINS).numpy()[None]
        for p in (0.01, 0.25, 0.5, 0.8, 0.99, 1.0):
            t, exact = quantile(hist, p)[0], np.quantile(x.abs().double().numpy(), p, method="inverted_cdf")
            assert abs(t - exact) <= exact / 32 + 1e-30, (p, t, exact)
            held = hist[0, magnitude_bins(torch.tensor([exact])).item()] / len(x)
            assert exact == 0 or abs((x.abs().double().numpy() <= t).mean() - p) <= held + 1e-9
    assert quantile(np.eye(2, N_BINS, 3000, dtype=int), [0.0, 0.5]).shape == (2,) and quantile(hist, 0.0)[0] == 0


# ---- rules


def test_top_k_by_hand():
    x = torch.tensor([[3.0, -1.0, 0.0, -4.0], [2.0, -2.0, 2.0, 2.0]])
    assert top_k(x, 2).tolist() == [[3, 0, 0, -4], [2, -2, 0, 0]]  # of equal ones the first
    assert torch.equal(top_k(x, 4), x) and torch.equal(top_k(x, 9), x) and not top_k(x, 0).any()
    assert top_k(torch.zeros(3, 5), 2).count_nonzero() == 0


@pytest.mark.parametrize("seed", range(10))
def test_top_k_with_ties(seed):
    "Exactly k are kept, none smaller than one left out, the first among equals; each token by itself."
    x = torch.randint(-3, 4, (4, 6, 12), generator=torch.Generator().manual_seed(seed)).float() + 0.5
    for k in range(13):
        kept = top_k(x, k)
        order = np.argsort(-x.abs().numpy(), axis=-1, kind="stable")[..., :k]
        expected = np.zeros(x.shape, bool)
        np.put_along_axis(expected, order, True, -1)
        assert np.array_equal(kept.numpy() != 0, expected) and torch.equal(
            kept[torch.from_numpy(expected)], x[torch.from_numpy(expected)]
        )


def test_random_mask_is_seeded():
    x = torch.ones(100, 100)
    assert (
        torch.equal(_random_mask(x, 0.3, 1), _random_mask(x, 0.3, 1))
        and not torch.equal(_random_mask(x, 0.3, 1), _random_mask(x, 0.3, 2))
        and abs(_random_mask(x, 0.3, 1).mean() - 0.7) < 0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule, value", [("threshold", 0.7), ("top_k", 5), ("random", 0.5)])
def test_a_sparse_layer_is_the_dense_layer_of_the_masked_input(rule, value, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 7).to(dtype), torch.randn(3, 4, 12).to(dtype)
    expected = linear(
        torch.where(x.abs() > 0.7, x, 0)
        if rule == "threshold"
        else top_k(x, 5)
        if rule == "top_k"
        else _random_mask(x, 0.5, 7 + 100_003)
    )
    sparsify_layer(linear, rule, value, seed=7)
    assert torch.equal(linear(x), expected) and isinstance(linear, nn.Linear)
    densify_layer(linear)
    assert type(linear) is nn.Linear and not {"rule", "value", "sparse_gemv"} & vars(linear).keys()


# ---- sparsify


@pytest.mark.parametrize("family", swept(ALL))
def test_sparsify_leaves_nothing(family):
    """Sparsity 0 is the same model bit for bit. Any other changes it inside, and leaves no hook, no class and no
    attribute, after an exception neither."""
    model, batch = tiny(family), batch_of(9, 4, 6)
    before, kinds = out(model, batch), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    stats = projection_stats(model, [batch])
    for rule in SPARSITY_RULES:
        with sparsify(model, uniform_plan(model, 0.0), rule=rule, stats=stats):
            assert torch.equal(out(model, batch), before)
        with pytest.raises(RuntimeError, match="inside"), sparsify(model, plan_of(model), rule=rule, stats=stats):
            assert sparse_projections(model) == plan_of(model).notna().sum().sum() and not torch.allclose(
                out(model, batch), before, atol=1e-3
            )
            raise RuntimeError("inside")
        assert torch.equal(out(model, batch), before)
    assert (
        not hooks(model)
        and [type(m) for m in model.modules()] == kinds
        and [set(vars(m)) for m in model.modules()] == attributes
    )


def test_an_unfinished_entry_is_undone():
    model = tiny("llama")
    sparsify_layer(blocks(model)[3].mlp.down_proj, "top_k", 3)
    with pytest.raises(ValueError, match="sparse already"):
        with sparsify(model, 0.5, rule="top_k"):
            pass
    assert sparse_projections(model) == 1


def test_only_what_the_plan_names():
    model, batch, seen = tiny("llama"), batch_of(9), {}
    plan = pd.DataFrame(dict(q_proj=[0.5, np.nan], down_proj=[0.0, 0.75]), index=[1, 4])
    for i, block in enumerate(blocks(model)):
        for name, m in projections(block).items():
            m.register_forward_hook(lambda m, a, y, key=(i, name): seen.update({key: isinstance(m, SparseLinear)}))
    with sparsify(model, plan, rule="top_k"):
        out(model, batch)
        realised = realised_sparsity(model, [batch])
    assert {key for key, sparse in seen.items() if sparse} == {(1, "q_proj"), (4, "down_proj")}
    assert realised.stack().dropna().to_dict() == {(1, "q_proj"): 0.5, (4, "down_proj"): 0.75}


@pytest.mark.parametrize("family", swept(ALL))
@pytest.mark.parametrize("side", ["left", "right"])
def test_realised_is_what_was_asked_for(family, side):
    """Top-k to the unit, thresholds on the dense model's own inputs to a point; padding is not counted. What a ReLU has
    set to zero is zero already."""
    model, batch = tiny(family), batch_of(40, 25, 33, side=side)
    plan, stats = plan_of(model).drop(columns=["fc2", "wo"], errors="ignore"), projection_stats(model, [batch])
    with sparsify(model, plan, rule="top_k"):
        assert (realised_sparsity(model, [batch]).stack().dropna() == 0.5).all()
    for name in {"fc2", "wo"} & set(projections(blocks(model)[0])):
        with sparsify(model, plan_of(model)[[name]], stats=stats):
            assert (realised_sparsity(model, [batch])[name] >= 0.49).all()
    for name in plan:  # one projection of the last block: nothing before it has changed
        with sparsify(model, plan[[name]].iloc[-1:], stats=stats):
            assert realised_sparsity(model, [batch])[name].iloc[0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi3", "bert", "mixtral"])
def test_calibration_of_the_sparse_model(family):
    """In the same single pass: every projection zeroes of that text what was asked for, while all others do. Calibrated
    on the dense model they zero more."""
    model, batch, passes = tiny(family), batch_of(40, 25, 33), []
    plan, before = plan_of(model), out(model, batch)
    handle = blocks(model)[0].register_forward_pre_hook(lambda *_: passes.append(1))
    stats = projection_stats(model, [batch], plan=plan)
    handle.remove()
    with sparsify(model, plan, stats=stats):
        realised = realised_sparsity(model, [batch])
    assert (
        (realised - 0.5).abs().max(axis=None) < 0.01
        and passes == [1]
        and not hooks(model)
        and torch.equal(out(model, batch), before)
    )
    with sparsify(model, plan, stats=projection_stats(model, [batch])):
        dense = realised_sparsity(model, [batch])
    assert (dense - 0.5).abs().max(axis=None) > 0.02


@pytest.mark.parametrize("rule", ["threshold", "top_k"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_answers_do_not_depend_on_the_batch(family, rule):
    model, stats = tiny(family), projection_stats(tiny(family), [batch_of(9, 4, 6)])
    with sparsify(model, 0.5, rule=rule, stats=stats):
        both = [
            out(model, b)[row][b["attention_mask"][row] == 1]
            for b in (batch_of(9, 4, 6), batch_of(9, 4, 6, side="left"))
            for row in range(3)
        ]
    for one, other in zip(both[:3], both[3:]):
        assert (one - other).abs().median() < 1e-4  # an input at the threshold may fall on either side of it


def test_skipped_layers_and_sparse_ones_in_either_order():
    model, batch = tiny("llama"), batch_of(9)
    with sparsify(model, 0.5, rule="top_k"), skip_layers(model, [1, 2]):
        one = out(model, batch)
    with skip_layers(model, [1, 2]), sparsify(model, 0.5, rule="top_k"):
        other = out(model, batch)
    assert torch.equal(one, other) and not sparse_projections(model)


# ---- the product by columns, and models that stay sparse


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_column_product(threads, bias):
    torch.manual_seed(0)
    weight, b, before = torch.randn(70, 40), torch.randn(70) if bias else None, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kept in (0, 1, 2, 13, 40):
            x = torch.zeros(1, 1, 40)
            x[..., torch.randperm(40)[:kept]] = torch.randn(kept)
            torch.testing.assert_close(
                _column_product(x, weight.t().contiguous(), b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rule", ["threshold", "top_k"])
@pytest.mark.parametrize("family", swept(DECODERS))
def test_decoding_by_columns_is_the_masked_dense_form(family, rule, monkeypatch):
    model, ids, calls = tiny(family), batch_of(12)["input_ids"], []
    stats, plain = projection_stats(model, [batch_of(9, 4, 6)]), sparsity._column_product
    sparse = make_sparse(model, 0.5, rule=rule, stats=stats)
    monkeypatch.setattr(sparsity, "_column_product", lambda *args: (calls.append(1), plain(*args))[1])
    with torch.no_grad():
        with sparsify(model, 0.5, rule=rule, stats=stats):
            masked = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                eos_token_id=None,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert not calls
        found = sparse.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            eos_token_id=None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(found.sequences, masked.sequences) and len(calls) == 7 * sparse_projections(sparse) > 0
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(masked.logits), rtol=1e-5, atol=1e-4)
    assert not sparse_projections(model)


def test_other_types_and_longer_inputs_take_the_dense_form(monkeypatch):
    monkeypatch.setattr(sparsity, "_column_product", None)
    with torch.no_grad():
        make_sparse(tiny("llama").bfloat16(), 0.5, rule="top_k")(torch.tensor([[5]]))
        make_sparse(tiny("llama"), 0.5, rule="top_k")(torch.tensor([[5, 6]]))
        make_sparse(tiny("llama"), 0.5, rule="top_k", sparse_gemv=False)(torch.tensor([[5]]))


@pytest.fixture
def folder(tmp_path):
    "A sparse model of five random blocks with a small tokenizer, and its folder."
    tokenizer = small_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    sparse = make_sparse(model, 0.5, rule="threshold", stats=projection_stats(model, [batch_of(9, 4, 6)]))
    for part in (sparse, tokenizer):
        part.save_pretrained(tmp_path)
    return model, sparse, tmp_path


def test_a_saved_model_is_as_sparse(folder):
    model, sparse, path = folder
    again, _ = load_sparse(path)
    batch = batch_of(9, 4, 6)
    assert torch.equal(out(again, batch), out(sparse, batch)) and sparse_projections(again) == 35
    torch.testing.assert_close(out(again, batch_of(1)), out(sparse, batch_of(1)), rtol=1e-5, atol=1e-5)  # by columns
    assert {p.suffix for p in path.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert torch.equal(out(load_model(path)[0], batch), out(model, batch)) and not hasattr(
        model.config, "activation_sparsity"
    )  # without it: the dense model
    assert {p.data_ptr() for p in make_sparse(model, 0.5, rule="top_k", sparse_gemv=False).parameters()} == {
        p.data_ptr() for p in model.parameters()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("activation_sparsity"), "holds no sparse model"),
        (lambda c: c["activation_sparsity"]["layers"].pop(), "4 layers for 5"),
        (lambda c: c["activation_sparsity"].update(rule="magic"), "rule 'magic'"),
        (lambda c: c["activation_sparsity"]["layers"][2].update(no_proj=1.0), "no projection 'no_proj'"),
    ],
    ids=range(4),
)
def test_a_folder_that_does_not_fit(folder, change, message):
    config = json.loads((folder[2] / "config.json").read_text())
    change(config)
    (folder[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_sparse(folder[2])


# ---- allocation


@pytest.mark.parametrize("lazy", [True, False])
def test_greedy_is_the_reference(lazy):
    "Each step adds the same weights and takes the projection of the least block error; written out with masks by hand."
    model, batch = tiny("llama"), batch_of(9, 4, 6)
    stats, step = projection_stats(model, [batch_of(9, 4, 6, seed=1)]), 0.05
    found = greedy_plan(model, [batch], stats=stats, sparsity=0.3, step=step, lazy=lazy)
    size, inputs = projection_sizes(model).iloc[2], {}
    block = blocks(model)[2]
    handle = block.register_forward_hook(lambda b, a, k, y: inputs.update(args=a, kwargs=k, y=y), with_kwargs=True)
    out(model.base_model, batch)
    handle.remove()

    def error(levels):
        with sparsify(model, pd.DataFrame([levels], index=[2]), stats=stats), torch.no_grad():
            y = block(*inputs["args"], **inputs["kwargs"])
        return ((y - inputs["y"])[batch["token_mask"]].norm() / inputs["y"][batch["token_mask"]].norm()).item()

    level = dict.fromkeys(size.index, 0.0)
    for number in range(1, 7):
        tries = {name: level | {name: level[name] + step * size.sum() / size[name]} for name in level}
        errors = {name: error(levels) for name, levels in tries.items() if levels[name] <= _MAX_SPARSITY}
        level, row = tries[best := min(errors, key=errors.get)], found.loc[(round(number * step, 10), 2)]
        if not lazy or row[list(level)].to_dict() == pytest.approx(level):
            assert row[list(level)].to_dict() == pytest.approx(level) and row.error == pytest.approx(
                errors[best], rel=1e-4
            )
    assert (
        mean_sparsity(model, found.loc[0.3][list(level)]) == pytest.approx(0.3)
        and found.loc[0.3].error.loc[2] <= 1.02 * errors[best]
    )
    assert not hooks(model) and not sparse_projections(model)


@pytest.mark.parametrize("family", swept(f for f in ALL if f != "mamba"))
def test_greedy_in_every_family(family):
    model, batch = tiny(family), batch_of(9, 4, 6)
    before = out(model, batch)
    found = greedy_plan(model, [batch], stats=projection_stats(model, [batch]), sparsity=0.4, step=0.04)
    assert mean_sparsity(model, found.loc[0.4].drop(columns="error")) == pytest.approx(0.4) and torch.equal(
        out(model, batch), before
    )
    errors = found.error.unstack("layer")
    assert len(errors) == 10 and (errors.iloc[-1] > errors.iloc[0]).all()


@pytest.mark.parametrize("density", [1.8, 2.5, 4.0])
def test_hill_of_a_pareto_sample(density):
    """P(λ > x) = x^−(α−1): the estimate is within four standard errors, (α − 1)/√k, in every one of twenty samples, and
    unbiased."""
    found = [hill_exponent(np.random.default_rng(seed).pareto(density - 1, 4000) + 1) for seed in range(20)]
    error = (density - 1) / 2000**0.5
    assert np.abs(np.array(found) - density).max() < 4 * error and abs(np.mean(found) - density) < error
    assert hill_exponent(7 * (np.random.default_rng(0).pareto(density - 1, 4000) + 1)) == pytest.approx(
        found[0]
    )  # no unit


def test_spectrum_is_that_of_the_weight():
    w = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for v in (w, w.T):
        assert _spectrum(v) == pytest.approx((torch.linalg.svdvals(w.double()) ** 2).sort().values.numpy(), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "mamba"])
def test_heavier_tails_are_spared(family, share):
    model = tiny(family)
    exponents = weight_exponents(model)
    plan = acttail_plan(model, exponents, share, spread=0.4)
    assert mean_sparsity(model, plan) * projection_sizes(model).sum().sum() == pytest.approx(
        share * projection_sizes(model).where(exponents.notna()).sum().sum(), rel=1e-6
    )
    pairs = pd.DataFrame(dict(a=exponents.stack(), p=plan.stack())).dropna().sort_values("a")
    assert (
        (pairs.p.diff().dropna() >= -1e-12).all()
        and pairs.p.between(0, _MAX_SPARSITY).all()
        and (pairs.p.nunique() > 5 or not share)
    )
    assert np.allclose(acttail_plan(model, exponents * 0 + 2, share).stack().dropna(), share)  # equal tails: uniform


# ---- measuring


def test_variants_zero_what_they_ask_for():
    """All four as many inputs, of a fraction that is no round number; by thresholds the first two, calibrated on the
    sparse model."""
    model, text, share = tiny("llama"), [batch_of(9, 4, 6)], 1 / 3
    path = greedy_plan(model, text, stats=projection_stats(model, text), sparsity=share, step=share / 10)
    exponents = weight_exponents(model)
    variants = {
        name: make()
        for name, make in sparse_variants(model, text, sparsity=share, path=path, exponents=exponents).items()
    }
    assert [(name, variant.get("rule", "threshold")) for name, variant in variants.items()] == [
        ("uniform", "threshold"),
        ("greedy", "threshold"),
        ("ActTail", "top_k"),
        ("random", "random"),
    ]
    for name, variant in variants.items():
        with sparsify(model, **variant):
            assert abs(mean_sparsity(model, realised_sparsity(model, text)) - share) < 0.02, name
        if "stats" in variant:
            assert all(
                torch.equal(sums, variant["stats"].sums[of])
                for of, sums in projection_stats(model, text, plan=variant["plan"]).sums.items()
            ), name


def test_plans_are_measured_as_removals_are(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    model, texts, questions = (
        tiny("llama", vocab_size=len(tokenizer)),
        ["Water boils at a hundred degrees.", "Ice floats on water."],
        load_questions("atlas", n=4),
    )
    variants = {
        "base_model": None,
        "half": dict(plan=0.5, rule="top_k"),
        "both": dict(plan=0.25, rule="top_k", skip=[2]),
        "short": dict(skip=[2]),
    }
    items = measure_plans(model, tokenizer, variants, texts, questions, out=tmp_path)
    pd.testing.assert_frame_equal(items, measure_plans(model, tokenizer, variants, texts, questions), check_dtype=False)
    monkeypatch.setattr(allocation, "measure_items", None)
    pd.testing.assert_frame_equal(
        items, measure_plans(model, tokenizer, variants, texts, questions, out=tmp_path), check_exact=True
    )  # what is stored is not measured again
    with pytest.raises(ValueError, match="no layer 9"):
        measure_plans(model, tokenizer, variants | dict(more=dict(skip=[9])), texts)
    removed = (
        measure_removal(model, tokenizer, dict(short=[2]), texts, questions, load_sentences("words", n=2))
        .loc["short"]
        .loc[["perplexity", "questions"]]
    )
    assert items.loc["short"].value.tolist() == removed.value.tolist()
    gain = paired_difference(items, "base_model", ["half", "both", "short", "base_model"])
    assert (
        gain.difference["perplexity", "base_model"] == 0
        and gain.notna().all(axis=None)
        and items.groupby("measure").size().to_dict() == dict(perplexity=8, questions=16)
    )


# ---- what is refused


@pytest.mark.parametrize(
    "plan, message",
    [
        (1.0, r"sparsity of q_proj in layer 0 is 1.0"),
        (-0.1, "is -0.1"),
        (pd.DataFrame(dict(q_proj=[0.5]), index=[5]), "no layer 5"),
        (pd.DataFrame(dict(c_attn=[0.5])), "layer 0 has no projection 'c_attn': there is q_proj"),
        (pd.DataFrame([[0.5, 0.5]], columns=["q_proj", "q_proj"]), "named twice"),
        (pd.DataFrame(dict(q_proj=[0.5, 0.5]), index=[1, 1]), "named twice"),
        (pd.DataFrame(dict(q_proj=[np.inf])), "is inf"),
    ],
    ids=range(7),
)
def test_bad_plan(plan, message):
    model = tiny("llama")
    for call in (sparsify, make_sparse):
        with pytest.raises(ValueError, match=message) as error:
            call(model, plan, rule="top_k")
        assert "\n" not in str(error.value)


def test_bad_calibration():
    model, batch = tiny("llama"), batch_of(5)
    stats = projection_stats(model, [batch])
    with pytest.raises(ValueError, match="thresholds come from a calibration"):
        sparsify(model, 0.5)
    with pytest.raises(ValueError, match="unknown rule 'topk'"):
        sparsify(model, 0.5, rule="topk")
    with pytest.raises(ValueError, match="5 layers, the model has 2"):
        sparsify(tiny("llama", num_hidden_layers=2), 0.5, stats=stats)
    with pytest.raises(ValueError, match="'q_proj' was not collected"):
        sparsify(model, 0.5, stats=projection_stats(tiny("gpt2"), [batch]))
    with skip_layers(model, [3]):
        without = projection_stats(model, [batch])
    with pytest.raises(ValueError, match="no calibration histogram for q_proj in layer 3"):
        sparsify(model, 0.5, stats=without)
    with pytest.raises(ValueError, match="no calibration histogram for layer 7"):
        calibrate_thresholds(stats, pd.DataFrame(dict(q_proj=[0.5]), index=[7]))
    with pytest.raises(ValueError, match="no calibration histogram for layer 3"):
        greedy_plan(model, [batch], stats=without)
    for given in ([], [batch | dict(token_mask=batch["token_mask"] & False)]):
        with pytest.raises(ValueError, match="no token was counted"):
            projection_stats(model, given)
    with pytest.raises(ValueError, match="no projection is sparse"):
        realised_sparsity(model, [batch])
    blocks(model)[2].mlp.up_proj.weight.data[0] = np.nan
    with pytest.raises(FloatingPointError, match="input of down_proj in layer 2"):
        projection_stats(model, [batch])
    assert not hooks(model)


def test_bad_allocation():
    model, batch = tiny("llama"), batch_of(5)
    stats = projection_stats(model, [batch])
    for bad in (dict(sparsity=1.0), dict(sparsity=0.5, step=0.6), dict(sparsity=0.5, step=0.0)):
        with pytest.raises(ValueError, match="lies in"):
            greedy_plan(model, [batch], stats=stats, **bad)
    with pytest.raises(ValueError, match="take a smaller one"):
        greedy_plan(model, [batch], stats=stats, sparsity=0.9, step=0.45)
    with pytest.raises(ValueError, match="there is no text"):
        greedy_plan(model, [], stats=stats)
    with pytest.raises(ValueError, match="at least two"):
        hill_exponent([1.0, 2.0])
    with pytest.raises(ValueError, match="not above 0"):
        hill_exponent([0.0, 0.0, 0.0, 1.0, 2.0])
    assert hill_exponent([1.0] * 8) == np.inf
    exponents = weight_exponents(model)
    with pytest.raises(ValueError, match="the sparsity is 1.0"):
        acttail_plan(model, exponents, 1.0)
    exponents.loc[3, "k_proj"] = np.inf
    with pytest.raises(ValueError, match="exponent of k_proj in layer 3 is not finite"):
        acttail_plan(model, exponents, 0.5)
