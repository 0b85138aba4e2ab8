"""Compensation beyond its chapter: families, wrappers, precisions, splits, saved folders, and bad input."""

import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

import avss_nb
from avss_nb.compensation import (
    METHODS,
    LeastSquares,
    Run,
    boundary_error,
    compensate,
    easiest_run,
    heal_block,
    removed_runs,
    restore,
    run_sums,
    scan_runs,
)
from avss_nb.evaluation import perplexity
from avss_nb.hooks import capabilities
from avss_nb.importance import leave_one_out
from avss_nb.models import blocks, load_model
from avss_nb.surgery import prune_layers, skip_layers
from tiny import FAMILIES, MORE_FAMILIES, VOCABULARY, batch_of, one_thread, small_tokenizer, tiny

CAUSAL = [f for f in (*FAMILIES, *MORE_FAMILIES) if f not in ("bert", "distilbert", "t5")]
QUICK = ("llama", "gpt2", "gpt_neox", "gemma2", "mamba")
NORM_BEHIND = ["gemma3_text", "gemma2", "olmo2"]  # between the down-projection and the stream
NO_MLP = ["mamba", "mixtral", "qwen3_moe"]
FOLDED = ["replace_me", "down_projection"]


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules="all-linear"))


def made(n: int = 10, side: str = "right") -> list[dict]:
    "Batches of random tokens, padded on a side: 69 tokens each."
    found = []
    for seed in range(n):
        batch, generator = batch_of(20, 20, 17, 12, side=side), torch.Generator().manual_seed(seed)
        ids = batch["input_ids"].clone()
        ids[batch["token_mask"]] = torch.randint(3, VOCABULARY, (69,), generator=generator)
        found.append(batch | dict(input_ids=ids))
    return found


def logits(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[batch["token_mask"]]


def off(model, teacher) -> float:
    "Mean squared difference of the logits on other texts."
    texts = made(14)[10:]
    return float(np.mean([(logits(model, b) - logits(teacher, b)).float().pow(2).mean() for b in texts]))


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in CAUSAL]
)
@pytest.mark.parametrize("method", ["affine", *FOLDED])
def test_it_comes_back_from_its_folder(family, method, tmp_path):
    "Folded maps by the library alone, others with `load_model`; and without padding as with it."
    model = tiny(family)
    small = prune_layers(model, [2])
    one = [{**b, **{k: b[k][:1] for k in ("input_ids", "attention_mask", "token_mask", "index")}} for b in made(20)]
    texts = one if family == "mamba" else made()
    if method in FOLDED and family in (*NORM_BEHIND, *NO_MLP):
        with pytest.raises(ValueError, match="choose affine" if family in NORM_BEHIND else "no '(down|mlp)' found"):
            compensate(small, texts, teacher=model, method=method)
        return
    repaired = compensate(small, texts, teacher=model, method=method)
    repaired.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    unpadded = one[0]
    assert torch.equal(logits(stock, unpadded), logits(repaired if method in FOLDED else small, unpadded))
    assert (repaired.num_parameters() == small.num_parameters()) == (method in FOLDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avss_nb.models.check_tokenizer", lambda *args, **options: None)  # another vocabulary
        again, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(logits(again, unpadded), logits(repaired, unpadded))
    assert again.config.compensation["method"] == method


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", ["affine", *FOLDED])
def test_it_helps_on_other_texts(family, method):
    model = tiny(family)
    small = prune_layers(model, [1, 3])
    assert off(compensate(small, made(), teacher=model, method=method), model) < 0.8 * off(small, model)


def test_a_map_of_full_rank_is_the_whole_map():
    model = tiny("llama")
    small = prune_layers(model, [2])
    whole, cut = (compensate(small, made(), teacher=model, rank=rank) for rank in (None, 32))
    torch.testing.assert_close(logits(cut, made(1)[0]), logits(whole, made(1)[0]), rtol=1e-4, atol=1e-4)
    low = compensate(small, made(), teacher=model, rank=2)
    assert low.num_parameters() - small.num_parameters() == 2 * 2 * 32 + 32
    with pytest.raises(ValueError, match="only the affine map has a rank"):
        compensate(small, made(), teacher=model, method="scale", rank=2)


def test_split_order_and_padding_move_no_sum():
    model = tiny("llama")
    small, texts = prune_layers(model, [1, 2]), made()
    run, how = removed_runs(small, model)[0], METHODS["affine"](None)
    whole = sum_of(run_sums(small, model, run, texts, how))
    for parts in (texts[::-1], made(side="left")):
        other = sum_of(run_sums(small, model, run, parts, how))
        torch.testing.assert_close(other.xx, whole.xx, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.xy, whole.xy, rtol=1e-5, atol=1e-5)
        assert other.n == whole.n == 690
    apart = [sum_of(run_sums(small, model, run, some, how)) for some in (texts[:5], texts[5:])]
    torch.testing.assert_close((apart[0] + apart[1]).xx, whole.xx, rtol=1e-12, atol=1e-12)


def sum_of(parts) -> LeastSquares:
    return parts[0] + parts[1]


def test_later_maps_are_fitted_on_the_smaller_models_own_states():
    "With the second run's map fitted on the base model's states in their place, more is left."
    model = tiny("opt")
    both = compensate(prune_layers(model, [1, 3]), made(), teacher=model, ridge=1e-3)
    alone = compensate(prune_layers(model, [3]), made(), teacher=model, ridge=1e-3)
    last = blocks(both)[2].compensation, blocks(alone)[3].compensation
    assert not torch.allclose(last[0].down, last[1].down, atol=1e-3)
    with torch.no_grad():
        for name in ("down", "bias"):
            getattr(last[0], name).copy_(getattr(last[1], name))
    swapped = off(both, model)
    assert off(compensate(prune_layers(model, [1, 3]), made(), teacher=model, ridge=1e-3), model) < swapped


def test_the_callers_models_are_left_alone():
    model = tiny("llama").train()
    small = prune_layers(model, [2])
    before = [{name: p.clone() for name, p in m.state_dict().items()} for m in (model, small)]
    for method in METHODS:
        compensate(small, made(), teacher=model, method=method)
    for m, state in zip((model, small), before):
        assert all(torch.equal(p, state[name]) for name, p in m.state_dict().items())
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in m.modules())
        assert not hasattr(m.config, "compensation") and m.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype):
    "The map is computed in float32 beside weights of any kind."
    model = tiny("opt").to(dtype)
    small = prune_layers(model, [2])
    repaired = compensate(small, made(), teacher=model)
    assert blocks(repaired)[2].compensation.down.dtype == torch.float32
    assert logits(repaired, made(1)[0]).dtype == dtype and off(repaired, model) < off(small, model)


def test_a_compiled_teacher_is_the_model_inside():
    model = tiny("llama")
    small, compiled = prune_layers(model, [2]), torch.compile(model, backend="eager")
    one, other = (compensate(small, made(), teacher=teacher) for teacher in (model, compiled))
    torch.testing.assert_close(logits(one, made(1)[0]), logits(other, made(1)[0]))


def test_generation_with_and_without_a_cache():
    model = tiny("llama")
    repaired = compensate(prune_layers(model, [2]), made(), teacher=model)
    ids = made(1)[0]["input_ids"][:1, :6]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None)
    found = [repaired.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*found)


def test_the_easiest_run_has_least_to_lose():
    "A run that does nothing leaves nothing; a scan of the model sees it."
    model = tiny("opt")
    with torch.no_grad():
        for name, weight in blocks(model)[2].named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
                weight.zero_()
    scan = scan_runs(model, made(), n=1)
    assert scan.index.tolist() == [0, 1, 2, 3] and scan.loc[2].max() < 1e-12 < scan.drop(2).min(axis=None)
    assert easiest_run(scan, 1) == [2]


def test_refusals():
    model = tiny("llama")
    small = prune_layers(model, [2])
    with pytest.raises(ValueError, match="tokens in 2 batches, without every fifth, do not determine"):
        compensate(small, made(2), teacher=model)
    few = [batch_of(2) for _ in range(10)]
    with pytest.raises(ValueError, match="16 tokens in 10 batches, .* a map from 64 numbers: give at least 64 tokens"):
        compensate(small, few, teacher=model, method="down_projection")
    with pytest.raises(ValueError, match="unknown method 'magic': known are scale, affine"):
        compensate(small, made(), teacher=model, method="magic")
    with pytest.raises(ValueError, match="nothing follows layer 4"):
        compensate(prune_layers(model, [4]), made(), teacher=model)
    with pytest.raises(ValueError, match="nothing stands before layer 0"):
        compensate(prune_layers(model, [0]), made(), teacher=model, method="replace_me")
    with pytest.raises(ValueError, match="there is nothing to compensate"):
        compensate(model, made(), teacher=model)
    with pytest.raises(ValueError, match="block 0 of the model is none of the teacher's"):
        compensate(small, made(), teacher=tiny("gpt2"))
    with pytest.raises(ValueError, match="is none of the teacher's"):
        compensate(compensate(small, made(), teacher=model), made(), teacher=model)
    with pytest.raises(ValueError, match="without adapters"):
        compensate(with_adapter(small), made(), teacher=model)


def test_the_first_block_can_go():
    model = tiny("opt")
    small = prune_layers(model, [0])
    assert off(compensate(small, made(), teacher=model), model) < off(small, model)


def test_what_is_not_finite_is_named():
    model = tiny("llama")
    small = prune_layers(model, [2])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 2, output: a state is not finite"):
        compensate(small, made(), teacher=model)


def test_a_folder_without_its_maps_is_refused(tmp_path):
    model = tiny("llama", vocab_size=len(small_tokenizer()))
    repaired = compensate(prune_layers(model, [2]), made(), teacher=model)
    small = prune_layers(model, [2])
    small.config.compensation = repaired.config.compensation
    for part in (small, small_tokenizer()):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lack the map before block 2"):
        load_model(tmp_path, device="cpu")


def test_texts_and_the_short_way_in(tmp_path, capsys):
    "As the design writes it; and loading says nothing of maps that are put back."
    tokenizer = small_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    texts = [f"Water number {i} boils at {i * 7} degrees, and ice floats on it in winter." for i in range(60)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repaired = avss_nb.compensate(prune_layers(model, [2]), tokenizer, texts, teacher=model)
    for part in (repaired, tokenizer):
        part.save_pretrained(tmp_path)
    again, _ = avss_nb.load_model(tmp_path, device="cpu")
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, repaired(ids).logits)
    with pytest.raises(ValueError, match="does not exist|cannot|would not bring back"):
        prune_layers(again, [1])


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_leave_one_out_of_a_compensated_model_is_skipping(family):
    "A block that is skipped takes its map with it, whether states are reused or not."
    model = tiny(family)
    repaired = compensate(prune_layers(model, [2]), made(), teacher=model)
    texts = made(12)[10:]
    wanted = []
    for layer in range(4):
        with skip_layers(repaired, [layer]):
            wanted.append(np.log(perplexity(repaired, texts)) - np.log(perplexity(model, texts)))
    with skip_layers(repaired, []):
        base = np.log(perplexity(repaired, texts)) - np.log(perplexity(model, texts))
    np.testing.assert_allclose(leave_one_out(repaired, texts), np.array(wanted) - base, atol=1e-5)
    assert capabilities(repaired)["adds up its sublayers"] == "no"


def test_a_map_that_accelerate_would_pass_by_is_refused(tmp_path):
    "Its hooks put a forward of their own into each block; offloaded after the map is there, it is run."
    model = tiny("llama")
    repaired = compensate(prune_layers(model, [2]), made(), teacher=model)
    wanted = logits(repaired, made(1)[0])
    repaired.save_pretrained(tmp_path)
    stock = cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), execution_device="cpu")
    with pytest.raises(ValueError, match="layer 2 is moved by accelerate, .* leave device_map out"):
        restore(stock, tmp_path)
    torch.testing.assert_close(logits(cpu_offload(repaired, execution_device="cpu"), made(1)[0]), wanted)


TEXTS = [f"Water number {i} boils at {i * 7} degrees, and ice floats on it in winter." for i in range(60)]


def of_words(family: str, **changes):
    "A tiny model that reads the small tokenizer's tokens."
    return tiny(family, vocab_size=len(small_tokenizer()), **changes)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_one_block_learns_to_stand_for_a_run(family, tmp_path):
    "The error at the boundary falls; all other weights are the base model's; the library alone reloads it."
    model, losses = of_words(family), []
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = dict(teacher=model, steps=25, max_length=16, learning_rate=1e-2)
    settings |= dict(on_step=lambda step, loss: losses.append(loss))
    found = heal_block(prune_layers(model, [1, 2, 3]), small_tokenizer(), TEXTS, **settings)
    untrained = prune_layers(model, [2, 3])
    own, theirs = found.state_dict(), untrained.state_dict()
    changed = [name for name in own if not torch.equal(own[name], theirs[name])]
    assert changed and all(".layers.1." in name for name in changed) and len(blocks(found)) == 3
    where = dict(layer=1, teacher=model, run=Run(1, 3, 1))
    other = batch_of(20, 16, seed=3)
    with torch.no_grad():
        left = [float(boundary_error(part, other, **where)) for part in (found, untrained)]
    assert left[0] < 0.9 * left[1] and losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(weight, before[name]) and weight.requires_grad for name, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in found.parameters()) and not found.training
    found.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, other), logits(found, other))


def test_the_error_at_the_boundary_by_hand():
    "Padding does not count, and a block of the base model in its own place is exact."
    model = tiny("llama")
    small, batch = prune_layers(model, [2]), batch_of(9, 5)
    with torch.no_grad():
        x, y = (
            run(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[i]
            for run, i in ((small, 2), (model, 3))
        )
        found = boundary_error(small, batch, layer=1, teacher=model, run=Run(1, 2, 1))
        x, y = x[batch["token_mask"]], y[batch["token_mask"]]
        wanted = ((x - y) / y.pow(2).mean(1, keepdim=True).sqrt()).pow(2).mean()
        torch.testing.assert_close(found, wanted)
        plain = boundary_error(small, batch, layer=1, teacher=model, run=Run(1, 2, 1), relative=False)
        torch.testing.assert_close(plain, (x - y).pow(2).mean())
        assert boundary_error(model, batch, layer=2, teacher=model, run=Run(1, 2, 1)) == 0


def test_a_block_that_cannot_stand_in_is_refused():
    model, tokenizer = of_words("llama"), small_tokenizer()
    for layers, reason in (([2], "layer 2 is out alone"), ([3, 4], "nothing follows layer 4")):
        with pytest.raises(ValueError, match=reason):
            heal_block(prune_layers(model, layers), tokenizer, TEXTS, teacher=model)
    with pytest.raises(ValueError, match="training text is too short"):
        heal_block(prune_layers(model, [1, 2]), tokenizer, TEXTS[:1], teacher=model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        heal_block(prune_layers(model, [1, 2]), tokenizer, TEXTS, teacher=model, max_length=16)


def test_texts_of_one_kind_are_warned_of():
    "Given by kind they are read like a list; a scan reads them, too, and not the names of the kinds."
    model, tokenizer = of_words("llama"), small_tokenizer()
    small = prune_layers(model, [2])
    with pytest.warns(UserWarning, match="all texts are of one kind, physics: what is fitted to them hardly helps"):
        one = compensate(small, tokenizer, dict(physics=TEXTS), teacher=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = compensate(small, tokenizer, dict(odd=TEXTS[::2], even=TEXTS[1::2]), teacher=model)
        plain = compensate(small, tokenizer, [*TEXTS[::2], *TEXTS[1::2]], teacher=model)
        scans = [scan_runs(model, tokenizer, texts, n=2) for texts in (dict(odd=TEXTS[::2], even=TEXTS[1::2]), TEXTS)]
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(two(ids).logits, plain(ids).logits) and not torch.equal(one(ids).logits, small(ids).logits)
    assert scans[0].shape == scans[1].shape and (scans[0] / scans[1]).stack().between(0.5, 2).all()
