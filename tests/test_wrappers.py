"""The same numbers through every wrapper: adapters, compiled, DataParallel, offloaded, in training; or an error."""

import json
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from torch import nn

from avss_nb.evaluation import check_causal, is_causal, option_logprobs, perplexity
from avss_nb.healing import heal
from avss_nb.hooks import capabilities, model_inputs, read_activations, relative_update
from avss_nb.importance import layer_scores, leave_one_out, sleb, taylor
from avss_nb.metrics import avss, collect_stats
from avss_nb.models import blocks, shared_copy, unwrap
from avss_nb.sparsity import load_sparse, make_sparse, realised_sparsity, sparsify
from avss_nb.surgery import prune_layers, skip_layers
from avss_nb.training import train_adapter, trainer_arguments
from tiny import TupleModel, batch_of, one_thread, tiny

BATCHES = [batch_of(9, 6, side="left"), batch_of(7, 8, 5, seed=1)]
METHODS = ["avss", "block_influence", "leave_one_out", "magnitude"]
SUBLAYERS = ["attention.1", "mlp.1", "attention.3", "mlp.3"]


def with_lora(model):
    "Untrained adapters: B is zero, so they add nothing."
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))


def compiled_in_place(model):
    model.compile(backend="eager")
    model(torch.arange(3, 9)[None])  # the graph is there before anything is hooked
    return model


def compiled(model):
    around = torch.compile(model, backend="eager")
    around(torch.arange(3, 9)[None])
    return around


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device="cpu")


WRAPPERS = dict(
    lora=with_lora,
    compiled=compiled,
    compiled_in_place=compiled_in_place,
    parallel=nn.DataParallel,
    training=lambda model: model.train(),
    compiled_lora_parallel=lambda model: nn.DataParallel(compiled(with_lora(model))),
    cpu_offload=lambda model: cpu_offload(model, execution_device="cpu"),
    disk_offload=on_disk,
)
FAMILIES = ("gpt2", "llama")
COMPILED = [name for name in WRAPPERS if "compiled" in name]  # each takes seconds to trace


def wrap(name: str, family: str, tmp_path):
    model = tiny(family, **(dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3) if family == "gpt2" else {}))
    return on_disk(model, tmp_path) if name == "disk_offload" else WRAPPERS[name](model)


MEASURES = dict(
    perplexity=lambda model: perplexity(model, BATCHES),
    stats=lambda model: avss(collect_stats(model, BATCHES)).to_numpy(),
    mlp_hidden=lambda model: collect_stats(model, BATCHES, points=["mlp_hidden"]).get("mlp_hidden", "sumsq"),
    leave_one_out=lambda model: leave_one_out(model, BATCHES).to_numpy(),
    sublayers=lambda model: leave_one_out(model, BATCHES, layers=SUBLAYERS).to_numpy(),
    sleb=lambda model: sleb(model, BATCHES, n=2),
    scores=lambda model: layer_scores(model, BATCHES, methods=["avss", "block_influence"]).to_numpy(),
)


@pytest.fixture(scope="module")
def plain():
    "Each measure of the base model of each family."
    return {
        (family, name): measure(wrap("parallel", family, None).module)
        for family in FAMILIES
        for name, measure in MEASURES.items()
    }


def is_long(wrapper: str, family: str) -> bool:
    "Whether a combination waits for the long run: of the compiled ones, the one with all wrappers stands for all."
    return wrapper in COMPILED and (family == "gpt2" or wrapper != "compiled_lora_parallel")


@pytest.mark.parametrize(
    "wrapper, family",
    [
        pytest.param(wrapper, family, marks=pytest.mark.slow if is_long(wrapper, family) else ())
        for family in ("llama", "gpt2")
        for wrapper in WRAPPERS
    ],
)
def test_a_wrapped_model_measures_as_the_model_inside(wrapper, family, plain, tmp_path):
    model = wrap(wrapper, family, tmp_path)
    modes = [part.training for part in model.modules()]
    for name, measure in MEASURES.items():
        np.testing.assert_allclose(measure(model), plain[family, name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert modes == [part.training for part in model.modules()]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_removal_from_a_wrapped_model(wrapper, tmp_path):
    model, units = wrap(wrapper, "llama", tmp_path / "weights"), [1, "mlp.2", "attention.3"]
    if "lora" in wrapper:
        with pytest.raises(ValueError, match="merge_and_unload"):
            prune_layers(model, units)
        return
    small, wanted = prune_layers(model, units), prune_layers(tiny("llama"), units)
    assert type(small) is type(wanted)
    assert perplexity(small, BATCHES) == pytest.approx(perplexity(wanted, BATCHES), rel=1e-6)
    with skip_layers(model, units):
        assert perplexity(model, BATCHES) == pytest.approx(perplexity(wanted, BATCHES), rel=1e-6)
    if "offload" not in wrapper:  # the library does not save those, pruned or not
        small.save_pretrained(tmp_path / "small")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert perplexity(again, BATCHES) == pytest.approx(perplexity(wanted, BATCHES), rel=1e-6)
    assert perplexity(model, BATCHES) == pytest.approx(perplexity(tiny("llama"), BATCHES), rel=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_zeros_are_where_they_are_said_to_be(wrapper, tmp_path):
    model, dense = wrap(wrapper, "llama", tmp_path), tiny("llama")
    if "lora" in wrapper:
        with pytest.raises(ValueError, match="merge_and_unload"):
            sparsify(model, 0.5, rule="top_k")
        return
    with sparsify(dense, 0.5, rule="top_k"):
        wanted = perplexity(dense, BATCHES)
    assert abs(wanted - perplexity(dense, BATCHES)) > 1e-2
    with sparsify(model, 0.5, rule="top_k"):
        assert perplexity(model, BATCHES) == pytest.approx(wanted, rel=1e-6)
        assert (realised_sparsity(model, BATCHES).stack() == 0.5).all()
    assert perplexity(model, BATCHES) == pytest.approx(perplexity(dense, BATCHES), rel=1e-6)
    assert perplexity(make_sparse(model, 0.5, rule="top_k"), BATCHES) == pytest.approx(wanted, rel=1e-6)


def heal_a_little(model, tmp_path, **options):
    class Words:
        eos_token_id = 2

        def __call__(self, text):
            return transformers.BatchEncoding(dict(input_ids=[3 + ord(c) % 90 for c in text]))

    recipe = dict(steps=3, batch_size=2, max_length=8) | options
    return heal(model, Words(), ["Snow is white, and coal is black."] * 4, **recipe)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_healing_a_wrapped_model(wrapper, tmp_path):
    model = wrap(wrapper, "llama", tmp_path)
    if "lora" in wrapper or "offload" in wrapper:
        with pytest.raises(ValueError, match="merge_and_unload" if "lora" in wrapper else "offloaded"):
            heal_a_little(model, tmp_path)
        return
    after, wanted = heal_a_little(model, tmp_path), heal_a_little(tiny("llama"), tmp_path)
    for (name, p), q in zip(after.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("frozen", ["all", "norms", "none"])
def test_healing_leaves_what_was_frozen_frozen(frozen, tmp_path):
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen == "all" or frozen == "norms" and "norm" in name))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    after = heal_a_little(model, tmp_path)
    for one in (model, after):
        assert before == {name: p.requires_grad for name, p in one.named_parameters()}


def test_a_learned_prompt_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PromptTuningConfig.*outside of the layers"):
        perplexity(model, BATCHES)


# ---- whose weights


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("change", ["to", "requires_grad_", "half"])
def test_a_pruned_model_is_cast_alone(share, change):
    model = tiny("llama")
    small, before = prune_layers(model, [3, "mlp.1"], share=share), perplexity(model, BATCHES)
    small = small.to(torch.bfloat16) if change == "to" else small.half() if change == "half" else small
    small.requires_grad_(False)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    assert perplexity(model, BATCHES) == before


def test_a_pruned_model_is_trained_alone():
    model = tiny("llama")
    before, small = perplexity(model, BATCHES), prune_layers(model, [3])
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(0.5)
    assert perplexity(model, BATCHES) == before
    shared = {p.data_ptr() for p in prune_layers(model, [3], share=True).parameters()}
    assert shared <= {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("tie", [True, False])
def test_copies_are_tied_as_the_model_is(tie):
    model = tiny("llama", tie_word_embeddings=tie)
    for own in (True, False):
        twin = shared_copy(model, own=own)
        assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == tie


# ---- what a model can be asked


def bart():
    config = transformers.BartConfig(
        **dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=64, decoder_ffn_dim=64),
        **dict(encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.15),
    )
    return config


def bert(**options):
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(transformers.BertConfig(**sizes, **options)).eval()


AHEAD = dict(
    bart=lambda: transformers.BartForConditionalGeneration(bart()).eval(),
    t5=lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, num_layers=3, num_heads=4, d_ff=64, d_kv=8, vocab_size=99)
    ).eval(),
    bert=bert,
    xlnet=lambda: tiny("xlnet", d_model=32, n_layer=3, n_head=4, d_inner=64),
    masked=lambda: tiny("bert"),
)


@pytest.mark.parametrize("name", AHEAD)
def test_a_model_that_reads_ahead_has_no_perplexity(name):
    model = AHEAD[name]()
    assert not is_causal(model)
    for measure in (perplexity, leave_one_out, taylor):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no causal language model.*LinearProbe"):
            measure(model, [batch_of(9)])
    with pytest.raises(ValueError, match="has no likelihood of options"):
        option_logprobs(model, None, [], [])


def test_asking_leaves_no_trace():
    model, decoder, ahead, seen = tiny("gpt2").train(), bert(is_decoder=True), bert(), []
    state = torch.get_rng_state()
    with read_activations(model, ["output"], lambda *activation: seen.append(activation)), skip_layers(model, [0]):
        assert is_causal(model)
        model_inputs(model, batch_of(5, 3, side="left"))
        assert is_causal(decoder)
    assert not seen and model.training and torch.equal(torch.get_rng_state(), state)
    with skip_layers(ahead, range(3), every=True):  # without any block nothing is read ahead
        assert not is_causal(ahead)


def test_a_question_that_cannot_be_asked_is_named(monkeypatch):
    model = tiny("gpt2")
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: torch.zeros(3) @ torch.zeros(4))
    with pytest.raises(ValueError, match="cannot find out whether GPT2LMHeadModel reads ahead: RuntimeError: incons"):
        is_causal(model)
    with pytest.raises(ValueError, match="whether GPT2LMHeadModel is changed by padding on the left: RuntimeError"):
        model_inputs(model, batch_of(5, 3, side="left"))


BLIND = dict(
    rwkv=lambda: tiny("rwkv", attention_hidden_size=32, context_length=64),
    xlstm=lambda: tiny("xlstm", num_heads=2),
    bart=lambda: transformers.BartForCausalLM(bart()).eval(),
)


@pytest.mark.parametrize("name", BLIND)
def test_padding_that_is_seen_is_refused(name):
    model = BLIND[name]()
    left, right = batch_of(9, 6, side="left"), batch_of(9, 6)
    for measure in (perplexity,) if name == "bart" else (perplexity, collect_stats, leave_one_out):
        family = type(model).__name__.removesuffix("ForCausalLM")
        with pytest.raises(ValueError, match=f"{family}.* does not leave out padding on the left.*one row"):
            measure(model, [left])
    rows = [{key: value[i : i + 1] for key, value in right.items()} for i in range(2)]
    rows[1] = {k: v[:, :6] if v.dim() == 2 else v for k, v in rows[1].items()}
    assert perplexity(model, [right]) == pytest.approx(perplexity(model, rows), rel=1e-5)


# ---- the stream


def test_a_token_without_an_embedding_decides_nothing():
    model, batch = tiny("llama"), batch_of(40)
    before = avss(collect_stats(model, [batch]))[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[batch["input_ids"][0, 17]] = 0
    assert avss(collect_stats(model, [batch]))[0] == pytest.approx(before, rel=0.2)
    x, y = torch.zeros(1, 2, 8), torch.ones(1, 2, 8)
    assert (relative_update(x, y) == 0).all()


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-25, 1e-38, 1.0])
def test_a_relative_update_has_no_scale(scale):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        x_there = (x * scale).to(dtype)
        update = relative_update(x_there, 2 * x_there)
        torch.testing.assert_close(update.square().mean(-1).sqrt(), torch.ones(2, 5), rtol=1e-5, atol=1e-5)


def test_streams_side_by_side_are_refused():
    class Four(nn.Module):
        def forward(self, hidden_states):
            return hidden_states * 2

    class Model(TupleModel):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Four() for _ in range(3))

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids)[None].repeat(4, 1, 1, 1)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.head(hidden[0])

    for points in (["output"], ["relative_update"]):
        with pytest.raises(ValueError, match=r"stream of Four has the shape \(4, 1, 9, 16\)"):
            collect_stats(Model(), [batch_of(9)], points=points)


def test_one_block_at_two_places_is_refused():
    model = tiny("llama")
    model.model.layers[3] = model.model.layers[1]
    for work in (blocks, lambda m: collect_stats(m, BATCHES), lambda m: prune_layers(m, [0])):
        with pytest.raises(ValueError, match="layers 1 and 3 of LlamaForCausalLM are one block"):
            work(model)
    model.model.layers[3] = deepcopy(model.model.layers[1])
    assert len(blocks(model)) == 5


# ---- sublayers

SUMS = dict(
    mpt=dict(d_model=32, n_heads=4, n_layers=4, expansion_ratio=2),
    glm4=dict(num_key_value_heads=2, head_dim=8),
    granite=dict(num_key_value_heads=2),
    llama=dict(),
)


@pytest.mark.parametrize("family", SUMS)
def test_sublayers_are_summands(family):
    model, got = tiny(family, **SUMS[family]), {}
    points = ("input", "attention", "mlp", "output")
    with torch.no_grad(), read_activations(model, points, lambda i, point, a: got.update({(i, point): a.clone()})):
        model(**model_inputs(model, batch_of(9)))
    for i in range(len(blocks(model))):
        x, a, m, y = (got[i, point] for point in points)
        torch.testing.assert_close(x + a + m, y, rtol=1e-4, atol=1e-4)
    small = prune_layers(model, ["attention.1", "mlp.1"])
    with skip_layers(model, ["attention.1", "mlp.1"]):
        skipped = perplexity(model, BATCHES)
    with skip_layers(model, [1]):
        assert skipped == pytest.approx(perplexity(model, BATCHES), rel=1e-5)
    assert skipped == pytest.approx(perplexity(small, BATCHES), rel=1e-5)


def test_scaled_sublayers_are_refused_alike():
    model = tiny("granite", num_key_value_heads=2, residual_multiplier=0.5)
    for work in (
        lambda: collect_stats(model, BATCHES, points=["attention"]),
        lambda: leave_one_out(model, BATCHES, layers=["mlp.1"]),
        lambda: prune_layers(model, ["mlp.1"]),
        lambda: skip_layers(model, ["attention.2"]),
    ):
        with pytest.raises(ValueError, match="adds 0.5 times what its sublayers give"):
            work()
    assert np.isfinite(leave_one_out(model, BATCHES)).all()


# ---- what a config says


def test_only_lists_of_layers_are_shortened():
    small = prune_layers(tiny("llama", num_hidden_layers=3, eos_token_id=[2, 3, 4]), [1])
    assert small.config.eos_token_id == [2, 3, 4] and small.generation_config.eos_token_id == [2, 3, 4]
    assert len(prune_layers(tiny("gemma3_text"), [1, 2]).config.layer_types) == 3


def test_the_plan_of_a_sparse_model_is_shortened(tmp_path):
    plan = pd.DataFrame(dict(q_proj=[0.25, 0.5, 0.75]), index=[0, 2, 4])
    sparse = make_sparse(tiny("llama"), plan, rule="top_k")
    small = prune_layers(sparse, [1, 2])
    assert [sorted(own) for own in small.config.activation_sparsity["layers"]] == [["q_proj"], [], ["q_proj"]]
    assert len(sparse.config.activation_sparsity["layers"]) == 5
    with skip_layers(sparse, [1, 2]):
        assert perplexity(small, BATCHES) == pytest.approx(perplexity(sparse, BATCHES), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "phi3", "mixtral"])
@pytest.mark.parametrize("rows", [110, 80])
def test_a_resized_vocabulary_is_no_obstacle(family, rows, tmp_path):
    model, batch = tiny(family), batch_of(9)
    model.resize_token_embeddings(rows)
    batch["input_ids"] %= 80
    small = prune_layers(model, [1])
    with skip_layers(model, [1]):
        wanted = perplexity(model, [batch])
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert perplexity(small, [batch]) == wanted == perplexity(again, [batch])


@pytest.mark.parametrize("layers", [[0, 1, 2], [3], [1], [0]], ids=str)
def test_numbers_of_layers_inside_a_config(layers):
    "Zamba2's shared blocks are told by their numbers: as skipped, or refused."
    kinds = ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba", "mamba"]
    mamba = dict(mamba_d_state=8, mamba_headdim=8, mamba_ngroups=1, n_mamba_heads=8, mamba_expand=2, chunk_size=8)
    shared = dict(num_mem_blocks=1, adapter_rank=4, attention_head_dim=16, kv_channels=16, attention_hidden_size=64)
    model = tiny("zamba2", num_hidden_layers=7, layers_block_type=kinds, **mamba, **shared)
    try:
        small = prune_layers(model, layers)
    except ValueError as error:
        assert "Zamba2ForCausalLM cannot lose these layers" in str(error)
        return
    with skip_layers(model, layers):
        assert perplexity(small, [batch_of(9)]) == pytest.approx(perplexity(model, [batch_of(9)]), rel=1e-5)


# ---- what the sweep over families found


def test_layers_are_those_of_the_text():
    "An image encoder of as many layers, and wider, is none of them."
    vision = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
    model = tiny("git", num_hidden_layers=3, vision_config=vision | dict(intermediate_size=128))
    assert blocks(model) is model.git.encoder.layer
    assert perplexity(prune_layers(model, [1]), BATCHES) != perplexity(model, BATCHES)


def small_bart(kind: str):
    torch.manual_seed(0)
    config = bart()
    config.decoder_layers = 2
    return getattr(transformers, kind)(config).eval()


def test_layers_that_read_earlier_keys_are_told():
    "Gemma-3n's last layers read the keys and values of earlier ones; without that, each hands on its output alone."
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = dict(vocab_size=99, vocab_size_per_layer_input=99, hidden_size=32, hidden_size_per_layer_input=8)
    sizes |= dict(intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes |= dict(laurel_rank=4, activation_sparsity_pattern=None, layer_types=kinds)
    for shared, said in ((2, "no"), (0, "yes")):
        torch.manual_seed(0)
        config = transformers.Gemma3nTextConfig(**sizes, num_kv_shared_layers=shared)
        model = transformers.Gemma3nForCausalLM(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.15) if weight.dim() > 1 else None
        assert capabilities(model)["hands on a layer's output alone"] == said


def test_a_layer_that_runs_twice_is_told():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None):
            super().forward(input_ids, attention_mask)
            return super().forward(input_ids, attention_mask)

    sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes)
    assert capabilities(Twice(config).eval())["runs each layer once"] == "no"
    assert capabilities(transformers.LlamaForCausalLM(config).eval())["runs each layer once"] == "yes"


def test_statistics_of_a_decoder_in_a_wrapper():
    "BartForCausalLM's body names no inputs."
    model, seen = small_bart("BartForCausalLM"), []
    hook = blocks(model)[1].register_forward_hook(lambda *args: seen.append(args[-1]))
    found = collect_stats(model, [batch_of(9)])
    hook.remove()
    output = (seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]).double()
    assert found.get("output", "sumsq")[1] == pytest.approx(output.square().sum().item(), rel=1e-6)


def test_a_model_that_needs_two_texts_is_refused():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not run on a text alone.*get_encoder"):
        collect_stats(AHEAD["t5"](), [batch_of(9)])
    assert np.isfinite(avss(collect_stats(AHEAD["t5"]().get_encoder(), [batch_of(9)]))).all()


def test_generation_of_an_encoder_and_decoder_that_skips():
    model, ids = small_bart("BartForConditionalGeneration"), batch_of(7)["input_ids"]
    with skip_layers(model, [1]):
        with_cache, without = (
            model.generate(ids, max_new_tokens=6, num_beams=1, use_cache=use) for use in (True, False)
        )
    assert with_cache.tolist() == without.tolist()


@pytest.mark.parametrize("rows", [1, 9])
def test_a_stream_of_other_tokens_is_refused(rows):
    "XLNet's is turned, tokens first: nine rows of nine tokens have the same shape."
    model = tiny("xlnet", d_model=32, n_layer=3, n_head=4, d_inner=64)
    with pytest.raises(ValueError, match="tokens are not those of the text"):
        collect_stats(model, [batch_of(*[9] * rows)])


def test_blocks_that_return_a_dict_are_refused_by_that_name():
    "SqueezeBERT's: its encoder calls their `forward` past all hooks, and takes what it needs by name."
    sizes = dict(hidden_size=32, embedding_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
    config = transformers.SqueezeBertConfig(vocab_size=99, **sizes, **groups)
    model, batch = transformers.SqueezeBertForMaskedLM(config).eval(), batch_of(9)
    with pytest.raises(ValueError, match="was seen to run: .* past all hooks, as SqueezeBERT does"):
        collect_stats(model, [batch])
    for unit, name in ((1, "SqueezeBertModule"), ("attention.1", "SqueezeBertSelfAttention")):
        with pytest.raises(ValueError, match=f"^{name} returns a dict .*nothing can stand in for it"):
            with skip_layers(model, [unit]):
                model(batch["input_ids"])
    with pytest.raises(ValueError, match="^SqueezeBertModule returns a dict"):
        prune_layers(model, [1])


def test_a_block_that_runs_twice_in_a_pass_is_refused():
    model = tiny("dory", num_hidden_layers=4, num_key_value_heads=2, head_dim=8)
    for work in (collect_stats, leave_one_out):
        with pytest.raises(ValueError, match="a DoryDecoderLayer, runs more than once in one pass"):
            work(model, [batch_of(9)])
    two = tiny("llama")
    with read_activations(two, ["output"], lambda *activation: None):
        for part in (two, two.model, two):  # passes of their own, of the whole and of a part
            part(batch_of(5)["input_ids"])


class HandsOn(TupleModel):
    "Each block also returns a state, made of the one that it was given, for the next."

    class Block(nn.Module):
        def __init__(self, width: int, needs: bool):
            super().__init__()
            self.linear, self.needs = nn.Linear(width, width), needs

        def forward(self, hidden_states, state=None, notes=None):
            if self.needs and notes is not None:
                hidden_states = hidden_states + notes["first"]
            elif notes is not None:
                notes["first"] = hidden_states
            state = hidden_states[..., :3] if state is None else state + hidden_states[..., :3].tanh()
            return hidden_states + self.linear(hidden_states) * state.mean(-1, keepdim=True), state

    def __init__(self, notes: bool):
        super().__init__()
        self.layers = nn.ModuleList(self.Block(16, i == 3) for i in range(4))
        self.notes = notes

    def forward(self, input_ids, attention_mask=None):
        hidden, state, notes = self.embed(input_ids), None, {} if self.notes else None
        for layer in self.layers:
            hidden, state = layer(hidden, state, notes)
        return self.head(hidden)


@pytest.mark.parametrize("layer", range(4))
def test_a_skipped_block_hands_on_the_state_that_it_was_given(layer):
    "Zaya's routers, RWKV's states."
    model, ids = HandsOn(notes=False), batch_of(9)["input_ids"]
    with torch.no_grad():
        with skip_layers(model, [layer]):
            skipped = model(ids)
        del model.layers[layer]
        torch.testing.assert_close(skipped, model(ids))


def test_a_layer_that_others_cannot_do_without_is_refused():
    "Gemma-3n's keys and values, HY-V4's indices."
    model, ids = HandsOn(notes=True), batch_of(9)["input_ids"]
    with pytest.raises(ValueError, match=r"HandsOn does not run without \[0, 1, 2\].*KeyError: 'first'"):
        with skip_layers(model, [0, 1, 2]):
            model(ids)
    with skip_layers(model, [1]):
        model(ids)
    with pytest.raises(ZeroDivisionError), skip_layers(model, [1]):
        1 / 0  # noqa: B018


def test_a_model_is_asked_only_about_errors_of_its_own(monkeypatch):
    model, ids = HandsOn(notes=True), batch_of(9)["input_ids"]
    runs, own = [], model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: runs.append(1) or own(input_ids))
    with pytest.raises(KeyError, match="mine"), skip_layers(model, [0, 1, 2]):
        raise KeyError("mine")
    assert not runs
    with pytest.raises(ValueError, match=r"without \[0, 1, 2\]"), skip_layers(model, [0, 1, 2]):
        try:
            model(ids)
        except KeyError as error:
            raise RuntimeError("said in other words") from error
    assert len(runs) == 3  # the caller's run, one without these layers, one with them


def test_a_layer_that_a_text_does_not_run_has_no_leave_one_out():
    "Mllama's cross-attention waits for an image."
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=99)
    config = transformers.models.mllama.MllamaTextConfig(**sizes, num_key_value_heads=2, cross_attention_layers=[3])
    config.pad_token_id = 1
    model = transformers.MllamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="layer 3 of MllamaForCausalLM was never run on this text"):
        leave_one_out(model, [batch_of(9)])


LONG = dict(attention_window=[4, 4, 4], num_hidden_layers=3, max_position_embeddings=64)


def test_windows_of_layers_are_shortened():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "longformer", vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=64, **LONG
    )
    model, ids = transformers.LongformerForMaskedLM(config).eval(), batch_of(8)["input_ids"]
    small = prune_layers(model, [1])
    with torch.no_grad(), skip_layers(model, [1]):
        torch.testing.assert_close(small(ids).logits, model(ids).logits)
    assert len(small.config.attention_window) == 2


def test_a_config_that_names_no_number_of_layers_is_refused():
    sizes = dict(vocab_size=99, hidden_size=32, num_encoder_layers=3, num_decoder_layers=3, decoder_ffn_dim=64)
    config = transformers.ProphetNetConfig(**sizes, num_decoder_attention_heads=4, num_encoder_attention_heads=4)
    model = transformers.ProphetNetForCausalLM(config).eval()
    with pytest.raises(ValueError, match="ProphetNetConfig cannot describe fewer layers") as error:
        prune_layers(model, [1])
    assert "\n" not in str(error.value)


def test_a_config_that_builds_no_model_is_refused(monkeypatch):
    model = tiny("llama")

    class Strict(type(model)):
        def __init__(self, config):
            if config.num_hidden_layers < 5:
                raise KeyError("a table\nof layers")
            super().__init__(config)

    strict = Strict(model.config).eval()
    with pytest.raises(ValueError, match="Strict cannot lose these layers.*a model that can be built") as error:
        prune_layers(strict, [1])
    assert "\n" not in str(error.value)


def test_what_a_model_keeps_of_its_last_run_is_no_setting():
    "RecurrentGemma's states."
    model = tiny("llama")
    wanted = perplexity(prune_layers(model, [1]), BATCHES)
    model.model.layers[0].mlp.intermediate_size = torch.zeros(3)
    assert perplexity(prune_layers(model, [1]), BATCHES) == wanted


def test_a_cache_that_keeps_nothing_of_a_block():
    "Nemotron-H has blocks without attention."

    class Nothing(transformers.DynamicCache):
        def update(self, *args, **kwargs):
            raise NotImplementedError("this layer stores no cache")

    model = tiny("llama")
    cache, stand_in = Nothing(config=model.config), None
    with skip_layers(model, [1]):
        stand_in = blocks(model)[1]
    stand_in._pad_cache(cache, torch.zeros(1, 3, 32))
    assert cache.get_seq_length() == 0
