"""Tiny random models of many families, and batches for them, with no downloads."""

from copy import deepcopy
from functools import cache

import pytest
import torch
import transformers
from torch import nn

from avss_nb.data import load_questions, load_text
from avss_nb.models import blocks
from avss_nb.nursery import fact_tokenizer

FAMILIES = dict(
    llama=dict(num_key_value_heads=2),
    qwen3=dict(num_key_value_heads=2, head_dim=8),
    gemma3_text=dict(
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
    gpt2=dict(n_embd=32, n_layer=5, n_head=4, n_positions=64),
    gpt_neox=dict(max_position_embeddings=64),
    opt=dict(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    bert=dict(max_position_embeddings=64),
)
MORE_FAMILIES = dict(  # for what concerns scores
    mistral=dict(num_key_value_heads=2, sliding_window=4),
    qwen2=dict(num_key_value_heads=2),
    phi3=dict(num_key_value_heads=2),
    gemma2=dict(num_key_value_heads=2, head_dim=8, sliding_window=4),
    gptj=dict(n_embd=32, n_layer=5, n_head=4, rotary_dim=4, n_positions=64),
    bloom=dict(n_layer=5, n_head=4),
    falcon=dict(new_decoder_architecture=False),
    stablelm=dict(num_key_value_heads=2),
    olmo2=dict(num_key_value_heads=2),
    mixtral=dict(num_key_value_heads=2, num_local_experts=4),
    qwen3_moe=dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    mamba=dict(),
    distilbert=dict(dim=32, n_layers=5, n_heads=4, hidden_dim=64, max_position_embeddings=64),
    t5=dict(d_model=32, num_layers=5, num_heads=4, d_ff=64, d_kv=8),
)
VOCABULARY = 99


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models of width 32 are slower on several threads than on one."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@cache
def small_tokenizer():
    "A tokenizer of a thousand pieces with an end token: logits over the bundled one's 49,152 take most of the time."
    tokenizer = fact_tokenizer(load_questions("atlas", n=40), load_text("pydoc", n=20))
    tokenizer.add_special_tokens(dict(eos_token="<|end|>"))
    return tokenizer


def tiny(family: str, **changes):
    "A random model with a language-model head: five blocks of width 32 with weights large enough to matter."
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        initializer_range=0.15,
    )
    config = transformers.AutoConfig.for_model(family, **(sizes | (FAMILIES | MORE_FAMILIES).get(family, {}) | changes))
    auto = dict(
        bert=transformers.AutoModelForMaskedLM,
        distilbert=transformers.AutoModelForMaskedLM,
        t5=transformers.AutoModelForTextEncoding,
    ).get(family, transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def batch_of(*lengths: int, side: str = "right", seed: int = 0) -> dict:
    "One batch of random tokens, one row per length, padded at `side` with token 1."
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.full((len(lengths), width), 1), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = torch.randint(3, VOCABULARY, (n,), generator=generator), 1
    return dict(input_ids=ids, attention_mask=mask, token_mask=mask.bool(), index=torch.arange(len(lengths)))


def relative_bias(block):
    "What T5 keeps in its first block for all blocks; None in other families."
    if not hasattr(block, "layer"):
        return None
    return getattr(getattr(block.layer[0], "SelfAttention", None), "relative_attention_bias", None)


def without(model, layers):
    "A copy of the model that is built without some of its blocks."
    shorter = deepcopy(model)
    stack, config = blocks(shorter), shorter.config
    if 0 in layers and (bias := relative_bias(stack[0])):
        heir = stack[min(set(range(len(stack))) - set(layers))].layer[0].SelfAttention
        heir.relative_attention_bias, heir.has_relative_attention_bias = bias, True
    for layer in sorted(layers, reverse=True):
        del stack[layer]
    for index, block in enumerate(stack):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = [t for i, t in enumerate(config.layer_types) if i not in layers]
    config.num_hidden_layers = len(stack)
    return shorter


class TupleBlock(nn.Module):
    "A block of the older style: a second positional argument, and a tuple (hidden state, attention map) as its result."

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states, attention_mask=None):
        a = hidden_states + self.attn(hidden_states)
        return a + self.mlp(a), hidden_states.mean(-1)


class TupleModel(nn.Module):
    "A family that no library knows; its own forward unpacks what a block returns."

    def __init__(self, n_layers: int = 4, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(TupleBlock(width) for _ in range(n_layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden, attention_map = layer(hidden, attention_mask)
        return self.head(hidden)


QUICK = ("llama", "gpt2", "gemma3_text", "bert")


def swept(families) -> list:
    "Families as parameters of a test: a few in every run, the others in the long sweep."
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families]
