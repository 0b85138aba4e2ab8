"""Models that have lost layers for good: equal to skipping, and reloaded by the library alone, in 21 families."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from avss_nb.models import blocks
from avss_nb.surgery import prune_layers, skip_layers
from tiny import FAMILIES, MORE_FAMILIES, batch_of, one_thread, swept, tiny, without

ALL = [*FAMILIES, *MORE_FAMILIES]
ENCODERS = ["bert", "distilbert", "t5"]
each_family = pytest.mark.parametrize("family", swept(ALL))

RELOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder, kind in json.load(sys.stdin):
    batch = load_file(f"{folder}/batch.safetensors")
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad(): found = dict(logits=model.eval()(**batch)[0])
    if hasattr(model, "generate") and model.can_generate():
        common = dict(max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)
        for name, options in dict(greedy={}, beam=dict(num_beams=2)).items():
            for cache in (True, False):
                found[f"{name}.{cache}"] = model.generate(**batch, use_cache=cache, **options, **common)
    save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/found.safetensors")
assert "avss_nb" not in sys.modules
"""


def inputs(side: str) -> dict:
    "A batch of two rows, one of them padded."
    batch = batch_of(9, 6, side=side)
    return dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.fixture(scope="module")
def reloaded(request, tmp_path_factory):
    """For each family that this run asks for: its model, its pruned logits, and what another process finds that knows
    only transformers."""
    asked = {item.callspec.params["family"] for item in request.session.items if "reloaded" in item.fixturenames}
    root, jobs, kept = tmp_path_factory.mktemp("pruned"), [], {}
    for family in sorted(asked):
        model, batch = tiny(family), inputs("left" if family not in ENCODERS else "right")
        small, folder = prune_layers(model, [0, 3]), root / family
        small.save_pretrained(folder)
        save_file(batch, folder / "batch.safetensors")
        with torch.no_grad(), skip_layers(model, [0, 3]):
            skipped = model(**batch)[0]
        with torch.no_grad():
            pruned = small(**batch)[0]
        kept[family] = dict(model=model, skipped=skipped, pruned=pruned, folder=folder)
        jobs.append((str(folder), type(model).__name__))
    run = subprocess.run(
        [sys.executable, "-c", RELOAD], input=json.dumps(jobs), capture_output=True, text=True, cwd=root
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {family: found | load_file(found["folder"] / "found.safetensors") for family, found in kept.items()}


@each_family
def test_another_process_finds_the_same_logits(reloaded, family):
    found = reloaded[family]
    assert torch.equal(found["pruned"], found["skipped"]) and torch.equal(found["logits"], found["pruned"])
    with torch.no_grad():
        base_model = found["model"](**inputs("left" if family not in ENCODERS else "right"))[0]
    assert not torch.allclose(base_model, found["pruned"]) and len(blocks(found["model"])) == 5


@pytest.mark.parametrize("family", swept(f for f in ALL if f not in ENCODERS))
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_cached_and_uncached_text_is_the_same(reloaded, family, way):
    "Padding on the left, so that a lost position would show."
    assert reloaded[family][f"{way}.True"].tolist() == reloaded[family][f"{way}.False"].tolist()


@each_family
@pytest.mark.parametrize("layers", [[1, 2, 3], ["attention.1", "mlp.3"], [0, "mlp.2"]], ids=str)
def test_pruned_equals_skipped(family, layers):
    model, batch = tiny(family), inputs("right")
    if family == "mamba" and not all(isinstance(unit, int) for unit in layers):
        with pytest.raises(ValueError, match="MambaBlock"):
            prune_layers(model, layers)
        return
    before = {name: p.clone() for name, p in model.named_parameters()}
    small = prune_layers(model, layers)
    with torch.no_grad(), skip_layers(model, layers):
        skipped = model(**batch)[0]
    with torch.no_grad():
        assert torch.equal(small(**batch)[0], skipped)
    assert (
        all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        and model.config.num_hidden_layers == 5
    )


@pytest.mark.parametrize("encoder_layers", [5, 2])
@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus", "Blenderbot", "PLBart"])
def test_the_decoder_of_a_pair_alone(family, encoder_layers, tmp_path):
    "Its config names the layers of an encoder that is not there, too."
    sizes = dict(vocab_size=99, d_model=32, encoder_layers=encoder_layers, decoder_layers=5, decoder_ffn_dim=64)
    sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, init_std=0.15)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    model, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), inputs("right")["input_ids"][:1]
    small = prune_layers(model, [0, 3])
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = without(model, [0, 3])(ids).logits
        assert torch.equal(small(ids).logits, wanted) and torch.equal(again(ids).logits, wanted)
    assert len(blocks(again)) == 3 and len(blocks(model)) == 5
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, num_beams=1)
    assert again.generate(ids, **options).tolist() == again.generate(ids, use_cache=False, **options).tolist()


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_stored_once(tmp_path, tie):
    model = tiny("llama", tie_word_embeddings=tie)
    small = prune_layers(model, [1, 3])
    small.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in names) == (1 if tie else 2)
    again, batch = type(model).from_pretrained(tmp_path).eval(), inputs("right")
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], small(**batch)[0])
    assert (again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()) == tie


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_stay(tmp_path, dtype):
    small = prune_layers(tiny("llama").to(dtype), [2])
    small.save_pretrained(tmp_path)
    assert type(small).from_pretrained(tmp_path, dtype="auto").dtype == dtype


@pytest.mark.parametrize("family, kept_of", [("gemma3_text", "layer_types"), ("qwen3", "layer_types")])
def test_each_layer_keeps_its_own_type(family, kept_of):
    model = tiny(family)
    before = list(getattr(model.config, kept_of))
    assert getattr(prune_layers(model, [1, 3]).config, kept_of) == [before[i] for i in (0, 2, 4)]


def test_plain_layers_among_experts_stay_plain():
    "Every second layer of a Qwen3 mixture is plain: after a removal no such rule would say which."
    model = tiny("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    small, batch = prune_layers(model, [1, 2]), inputs("right")

    def kinds(m):
        return [type(block.mlp).__name__ for block in blocks(m)]

    assert kinds(small) == [kinds(model)[i] for i in (0, 3, 4)] and small.config.mlp_only_layers == [0, 1, 2]
    with torch.no_grad(), skip_layers(model, [1, 2]):
        skipped = model(**batch)[0]
    with torch.no_grad():
        assert torch.equal(small(**batch)[0], skipped)


def test_what_a_config_cannot_say_is_refused():
    by_number = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=99, scale_attn_by_inverse_layer_idx=True)
    )
    with pytest.raises(ValueError, match="skipped, not removed"):
        prune_layers(by_number, [1])
    both = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=3, num_heads=4, d_ff=64, d_kv=8, vocab_size=99))
    with pytest.raises(ValueError, match="skipped, not removed"):
        prune_layers(both, [1])
    odd = tiny("llama")
    blocks(odd)[2].self_attn.scaling = 7.0
    with pytest.raises(ValueError, match=r"would not bring back model.layers.1.self_attn.scaling = 7"):
        prune_layers(odd, [1])
    with skip_layers(odd, [1]), pytest.raises(ValueError, match="leave skip_layers first"):
        prune_layers(odd, [2])
