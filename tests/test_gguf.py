"""A pruned model as a GGUF file: as transformers reads it, it is the same model; what a file cannot say is refused."""

import gguf
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from avss_nb.command import main
from avss_nb.compensation import compensate
from avss_nb.models import blocks, load_model, source_gguf
from avss_nb.shipping import prune_to_folder, save_gguf
from avss_nb.sparsity import make_sparse
from avss_nb.surgery import prune_layers
from tiny import one_thread, tiny

TOKENS = [*bytes_to_unicode().values(), *(f"<{i}>" for i in range(42)), "<|endoftext|>", "ab"]
SIZES = dict(block_count=6, context_length=2048, embedding_length=32, feed_forward_length=64, vocab_size=300)
SIZES |= dict(head_count=4, layer_norm_rms_eps=1e-6, rope_freq_base=1e4)
TOKENIZER = dict(tokenizer_model="gpt2", token_list=TOKENS, token_types=[1] * 256 + [3] * 43 + [1])
TOKENIZER |= dict(token_merges=["a b"], pad_token_id=256, bos_token_id=257, eos_token_id=258)
FAMILIES = dict(  # GGUF's architecture -> what the writer is told besides, and what transformers is
    llama=(dict(head_count_kv=2, rope_dimension_count=8), dict(num_key_value_heads=2)),
    qwen2=(dict(head_count_kv=2), dict(num_key_value_heads=2)),
    gemma2=(dict(head_count_kv=2, key_length=8, sliding_window=4), dict(num_key_value_heads=2, head_dim=8)),
    gpt2=(dict(layer_norm_eps=1e-5), dict(n_embd=32, n_layer=6, n_head=4, n_positions=1024)),
    lfm2=(
        dict(head_count_kv=[0, 2, 0, 0, 2, 0], shortconv_l_cache=3),
        dict(num_key_value_heads=2, full_attn_idxs=[1, 4], block_auto_adjust_ff_dim=False),
    ),
)
IDS = torch.arange(3, 40)[None]


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    "As llama.cpp's converter writes it."
    return weight.reshape(n_heads, 2, len(weight) // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def in_file(family: str, name: str, weight: np.ndarray) -> np.ndarray:
    "The numbers of a tensor as llama.cpp's converter writes them."
    if family == "llama" and ("attn_q" in name or "attn_k" in name):
        return permuted(weight, 4 if "attn_q" in name else 2)
    if family == "gemma2" and "norm" in name:
        return weight + 1
    if family == "gpt2" and weight.ndim == 2 and "blk" in name:
        return weight.T
    return weight.squeeze(1) if "shortconv.conv" in name else weight


def write(path, family: str = "llama", norms: bool = True, **more):
    "A GGUF file of six random blocks, with a tokenizer of bytes; `more` are keys as they are."
    told, built = FAMILIES[family]
    model = tiny(family, vocab_size=300, num_hidden_layers=6, tie_word_embeddings=True, **built)
    writer = GGUFWriter(path, family)
    for key, value in (SIZES | told | TOKENIZER).items():
        getattr(writer, f"add_{key}")(value)
    for key, value in more.items():
        is_list = isinstance(value, list)
        kind = gguf.GGUFValueType.ARRAY if is_list else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key.replace("__", "."), value, kind)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 6)
    for own, weight in model.named_parameters():
        if norms and weight.dim() == 1:
            nn.init.normal_(weight, 1, 0.2)
        name, _, end = own.rpartition(".")
        known = f"{names.get_name(name)}.{end}"
        writer.add_tensor(known, np.ascontiguousarray(in_file(family, known, weight.detach().numpy())))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVSS_NB_CACHE", str(tmp_path / "cache"))


def loaded(tmp_path, *args, **options):
    "A model from such a file, with its tokenizer."
    return load_model(write(tmp_path / "base.gguf", *args, **options), device="cpu")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def read(path):
    "The model that transformers makes of a file."
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def field(path, key: str):
    return GGUFReader(path).fields[key].contents()


LONG = [("qwen2", [1, 3]), ("gpt2", [1, 3]), ("gemma2", [1, 3]), ("lfm2", [1, 2])]
CUTS = [
    ("llama", [1, 3]),
    ("gemma2", [1, 2]),
    ("lfm2", [1, 3]),
    *(pytest.param(*cut, marks=pytest.mark.slow) for cut in LONG),
]


@pytest.mark.parametrize("family, layers", CUTS)
def test_it_is_read_back(cache, tmp_path, family, layers):
    "To the last bit in float32, as near as its numbers are in float16."
    base, tokenizer = loaded(tmp_path, family)
    small = prune_layers(base, layers)
    if family == "gemma2" and layers == [1, 3]:  # two layers of the same kind are neighbours now
        with pytest.raises(ValueError, match="kinds of layers by position"):
            save_gguf(small, tokenizer, tmp_path / "new.gguf")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "cache"]
        return
    whole = read(save_gguf(small, tokenizer, tmp_path / "new.gguf", dtype="float32"))
    torch.testing.assert_close(logits(whole), logits(small), rtol=1e-5, atol=1e-5)
    half = read(save_gguf(small, tokenizer, tmp_path / "half.gguf"))
    assert 1e-6 < (logits(half) - logits(small)).abs().max() < 2e-2 * logits(small).std()
    assert len(blocks(half)) == 4 and field(tmp_path / "half.gguf", f"{family}.block_count") == 4
    assert field(tmp_path / "half.gguf", "tokenizer.ggml.tokens") == TOKENS


PER_LAYER = dict(
    llama__attention__sliding_window_pattern=[True, False, True, False, False, True],
    llama__swiglu_clamp_exp=[0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
    llama__attention__layer_kinds=[0, 10, 20, 30, 40, 50],
)


def test_what_is_said_of_each_layer_is_said_of_those_that_are_left(cache, tmp_path):
    "Arrays of three kinds, counts from either end, and one array that is as long by chance."
    more = PER_LAYER | dict(llama__leading_dense_block_count=2, llama__attention__shared_kv_layers=3)
    base, tokenizer = loaded(tmp_path, **more, llama__rope__dimension_sections=[1, 2, 3, 4, 5, 6])
    path = save_gguf(prune_layers(base, [1, 4]), tokenizer, tmp_path / "new.gguf")
    for key, values in PER_LAYER.items():
        assert field(path, key.replace("__", ".")) == [values[i] for i in (0, 2, 3, 5)], key
    assert field(path, "llama.rope.dimension_sections") == [1, 2, 3, 4, 5, 6]
    assert field(path, "llama.leading_dense_block_count") == 1
    assert field(path, "llama.attention.shared_kv_layers") == 2
    kinds = {tensor.name.split(".", 2)[-1]: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["attn_q.weight"] == "F16" and kinds["ffn_norm.weight"] == "F32"


def test_a_layer_that_was_trained(cache, tmp_path):
    "It is between its neighbours: written where these layers are alike, refused where they are not."
    base, tokenizer = loaded(tmp_path, **PER_LAYER)
    small = prune_layers(base, [1])
    for weight in blocks(small)[1].parameters():
        weight.data += 0.01
    with pytest.raises(ValueError, match="layers 1 to 2 of base.gguf differ in .*, and which of them layer 1 was"):
        save_gguf(small, tokenizer, tmp_path / "new.gguf")
    alike = dict(llama__attention__sliding_window_pattern=[True, False, False, False, False, True])
    base, tokenizer = loaded(tmp_path, **alike)
    small = prune_layers(base, [1])
    for weight in blocks(small)[1].parameters():
        weight.data += 0.01
    path = save_gguf(small, tokenizer, tmp_path / "new.gguf", dtype="float32")
    assert field(path, "llama.attention.sliding_window_pattern") == [True, False, False, False, True]
    torch.testing.assert_close(logits(read(path)), logits(small), rtol=1e-5, atol=1e-5)


def batches_of(n: int) -> list[dict]:
    "Batches of random tokens."
    made = []
    for seed in range(n):
        ids = torch.randint(3, 250, (4, 20), generator=torch.Generator().manual_seed(seed))
        made.append(dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_mask=ids > 0))
    return made


def test_a_map_is_written_where_it_is_folded(cache, tmp_path):
    base, tokenizer = loaded(tmp_path, **PER_LAYER)
    small = prune_layers(base, [2, 3])
    folded = compensate(small, batches_of(10), teacher=base, method="down_projection")
    path = save_gguf(folded, tokenizer, tmp_path / "new.gguf", dtype="float32")
    torch.testing.assert_close(logits(read(path)), logits(folded), rtol=1e-5, atol=1e-5)
    assert field(path, "llama.attention.layer_kinds") == [0, 10, 40, 50]
    affine = compensate(small, batches_of(10), teacher=base, method="affine")
    with pytest.raises(ValueError, match="a map stands between two layers, .*: choose method down_projection"):
        save_gguf(affine, tokenizer, tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "more, reason",
    [
        (dict(llama__full_attention_interval=4), "full_attention_interval = 4 tells layers by their position"),
        (dict(llama__attention__sliding_window_pattern=[True, False]), "has 2 entries for 6 layers"),
        (dict(split__count=2), "is one part of a model"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_told(cache, tmp_path, more, reason):
    base, tokenizer = loaded(tmp_path, **more)
    with pytest.raises(ValueError, match=reason):
        save_gguf(prune_layers(base, [1]), tokenizer, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_what_a_file_cannot_say_is_refused(cache, tmp_path):
    base, tokenizer = loaded(tmp_path)
    small, new = prune_layers(base, [1]), tmp_path / "new.gguf"
    elsewhere = tiny("llama", vocab_size=300)
    alien = prune_layers(base, [1])
    alien.resize_token_embeddings(310, mean_resizing=False)
    untied = prune_layers(base, [1])
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight * 2)
    huge = prune_layers(base, [1])
    huge.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    refused = [
        (elsewhere, {}, "is not known to come from a GGUF file: name that file"),
        (
            tiny("gpt_neox", vocab_size=300),
            dict(like=tmp_path / "base.gguf"),
            "no GGUF names are known|has no tensor|differ",
        ),
        (make_sparse(small, 0.5, rule="top_k"), {}, "inputs are set to zero while this model runs"),
        (get_peft_model(prune_layers(base, [1]), LoraConfig(target_modules="all-linear")), {}, "without adapters"),
        (cpu_offload(prune_layers(base, [1]), execution_device="cpu"), {}, "some weights are offloaded"),
        (alien, {}, r"token_embd.weight has the shape \(300, 32\) in base.gguf, and \(310, 32\) in the model"),
        (untied, {}, "base.gguf has no tensor like the model's lm_head.weight"),
        (huge, {}, r"up_proj.weight holds 1e\+06, which float16 does not: choose float32"),
        (small, dict(dtype="int8"), "is written in float16 or float32, not int8"),
        (small, dict(path=tmp_path / "base.gguf"), "is the file that the model came from"),
    ]
    for model, options, reason in refused:
        with pytest.raises(ValueError, match=reason) as raised:
            save_gguf(model, tokenizer, **dict(path=new) | options)
        assert "\n" not in str(raised.value)
    tokenizer.add_tokens(["ice"])
    assert source_gguf(base.config.name_or_path) == tmp_path / "base.gguf" and not new.exists()


def test_by_the_command(cache, tmp_path, capsys):
    "A folder and a file; a file that is there, and a model that came from none, are refused before anything is done."
    base = write(tmp_path / "base.gguf", **PER_LAYER)
    small = ["--passages=4", "--questions=6", "--sentences=6", "--max-length=32"]
    asked = ["prune", str(base), "--out", str(tmp_path / "out"), "--gguf", str(tmp_path / "new.gguf"), *small]
    assert main(asked) == 0
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    difference = logits(read(tmp_path / "new.gguf")) - logits(folder)
    assert difference.abs().max() < 1e-2 * logits(folder).std()
    asked[3] = str(tmp_path / "again")
    assert main(asked) == 2 and "new.gguf exists: choose another file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not known to come from a GGUF file"):
        prune_to_folder(tmp_path / "out", out=tmp_path / "again", gguf=tmp_path / "other.gguf")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


@pytest.mark.slow
def test_the_bundled_model(tmp_path):
    "Two layers fewer, in float16."
    base, tokenizer = load_model(device="cpu")
    small = prune_layers(base, [5, 20])
    path = save_gguf(small, tokenizer, tmp_path / "small.gguf")
    assert field(path, "llama.block_count") == 28 and field(path, "general.file_type") == 1
    assert path.stat().st_size < 2.05 * small.num_parameters()
    found, wanted = logits(read(path)), logits(small)
    assert (found - wanted).abs().max() < 1e-2 * wanted.std() and torch.equal(found.argmax(-1), wanted.argmax(-1))
