"""Options behind one prompt give the likelihoods of whole rows: in every family, skipped or whole, in any batch."""

from types import SimpleNamespace

import pytest
import torch

from avss_nb.evaluation import _after_prompts, option_logprobs
from avss_nb.data import batch_rows
from avss_nb.surgery import skip_layers
from tiny import FAMILIES, MORE_FAMILIES, VOCABULARY, one_thread, swept, tiny

CAUSAL = [f for f in (*FAMILIES, *MORE_FAMILIES) if f not in ("bert", "distilbert", "t5")]
PROMPTS, OPTIONS = ["abcd", "efghijkl", "abcd"], [["x", "yz", "uvw"], ["mnop", "q"], ["rst", "yz"]]


class Letters:
    "A tokenizer: a token a letter."

    pad_token_id, padding_side = 1, "left"

    def __call__(self, text):
        return SimpleNamespace(input_ids=[3 + ord(c) % (VOCABULARY - 3) for c in text])


def by_hand(model):
    "Each prompt and option in a row of its own."
    found = []
    for prompt, options in zip(PROMPTS, OPTIONS):
        for option in options:
            ids = torch.tensor([Letters()(prompt + option).input_ids])
            with torch.no_grad():
                logp = model(ids).logits[0].log_softmax(-1)
            found.append(sum(logp[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
    return found


@pytest.mark.parametrize("skipped", [[], [0, 3]], ids=str)
@pytest.mark.parametrize("family", swept(CAUSAL))
def test_every_family(family, skipped):
    model = tiny(family)
    with skip_layers(model, skipped):
        for batch_size in (1, 2, 32):
            found = option_logprobs(model, Letters(), PROMPTS, OPTIONS, batch_size=batch_size)
            assert found.logprob.tolist() == pytest.approx(by_hand(model), abs=2e-4), batch_size
    assert found.tokens.tolist() == [1, 2, 3, 4, 1, 3, 2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_these_read_a_prompt_once(family):
    model, tokens = tiny(family), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    option_logprobs(model, Letters(), PROMPTS, OPTIONS)
    handle.remove()
    assert tokens == [(2, 8), (5, 3)]  # two different prompts, then the five options of more than one token


def test_a_window_is_no_plain_cache():
    batch = next(iter(batch_rows([(0, [5, 6, 7])], Letters())))
    assert _after_prompts(tiny("gemma3_text"), batch)[1] is None and _after_prompts(tiny("mamba"), batch)[1] is None
    assert _after_prompts(tiny("llama"), batch)[1] is not None
