"""Faults are planted where they are said to be, and nowhere else; the model that they are planted in is unchanged."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from avss_nb.data import load_questions, load_text
from avss_nb.models import blocks
from avss_nb.nursery import FactRecipe, known_facts, train_facts
from avss_nb.planted import (
    ablated,
    asked_answers,
    at_prompt_end,
    between,
    comparable,
    conflicting_questions,
    layer_attribution,
    teach_conflict,
    with_noise,
)
from tiny import one_thread

STYLES = ["llama", "gpt_neox"]
QUESTIONS = load_questions("atlas").select(range(100))


@pytest.fixture(scope="module", params=STYLES)
def grown(request):
    "A small model that knows nothing yet, and its tokenizer."
    recipe = FactRecipe(style=request.param, steps=3, width=16, n_layers=3, batch_size=8)
    return train_facts(QUESTIONS, load_text("pydoc", split="train", n=2), recipe=recipe)


def changed(model, other) -> set[str]:
    "The parameters in which two models differ."
    pairs = zip(model.named_parameters(), other.parameters())
    return {name for (name, p), q in pairs if not torch.equal(p, q)}


def faults(model, tokenizer):
    "Every kind of fault in block 1."
    taught = teach_conflict(model, tokenizer, QUESTIONS, [1], wrong=conflicting_questions(QUESTIONS), steps=2)
    return dict(
        conflict=taught,
        half=between(model, taught, 0.5),
        noise=with_noise(model, 1, 1.0),
        ablation=ablated(model, 1, 0.5),
    )


def test_a_fault_is_in_one_mlp(grown):
    model, tokenizer = grown
    before, random = deepcopy(model), torch.random.get_rng_state()
    mlp = {name for name, p in model.named_parameters() for q in blocks(model)[1].mlp.parameters() if p is q}
    for name, faulty in faults(model, tokenizer).items():
        assert (found := changed(model, faulty)) and found <= mlp, name
        assert all(p.requires_grad for p in faulty.parameters()) and not faulty.training, name
    assert not changed(model, before) and torch.equal(random, torch.random.get_rng_state())


def test_doses(grown):
    "Dose 0 is the base model, 1 the other; an ablation of 1 is the block without its MLP."
    model, tokenizer = grown
    taught = faults(model, tokenizer)["conflict"]
    assert not changed(between(model, taught, 0), model) and not changed(between(model, taught, 1), taught)
    assert not changed(with_noise(model, 1, 0), model) and not changed(ablated(model, 1, 0), model)
    ids = torch.tensor([[5, 6, 7]])
    off = deepcopy(model)
    blocks(off)[1].mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    torch.testing.assert_close(ablated(model, 1, 1)(ids).logits, off(ids).logits)


def test_conflicts_are_a_share_of_the_questions():
    one, other = (conflicting_questions(QUESTIONS, share=0.3, seed=seed) for seed in (0, 1))
    assert len(one) == len(other) == 30 and one != other
    assert one == conflicting_questions(QUESTIONS.shuffle(seed=3), share=0.3, seed=0), "the order decides"


def test_attribution_has_a_row_per_layer(grown):
    "Every method gives every layer a finite number; what the labels cannot decide is the same under permuted ones."
    model, tokenizer = grown
    answers = asked_answers(model, tokenizer, QUESTIONS)
    two = answers.select([i for i, tokens in enumerate(answers["answer_tokens"]) if len(tokens) >= 2])
    two = two.remove_columns("label").add_column(
        "label", ["right", "wrong"] * (len(two) // 2) + ["right"] * (len(two) % 2)
    )
    table = layer_attribution(model, tokenizer, two, permuted=2)
    assert set(table.index.get_level_values("labels")) == {"own", "permuted 0", "permuted 1"}
    assert np.isfinite(table.loc["own"]).all(axis=None) and len(table.loc["own"]) == 3
    one = table.loc["own", "eavss, ratio | output | answer"]
    assert not np.allclose(one, table.loc["permuted 0", "eavss, ratio | output | answer"])


def test_at_the_prompts_end_all_read_one_token(grown):
    model, tokenizer = grown
    moved = at_prompt_end(asked_answers(model, tokenizer, QUESTIONS))
    assert {tuple(tokens) for tokens in moved["answer_tokens"]} == {(tokenizer(":").input_ids[0],)}


def test_only_facts_that_were_known_are_compared(grown):
    model, tokenizer = grown
    answers, some = asked_answers(model, tokenizer, QUESTIONS), set(QUESTIONS["id"][:50])
    assert set(comparable(answers, some)["id"]) <= some and len(comparable(answers, set())) == 0
    assert not known_facts(model, tokenizer, QUESTIONS).any()
