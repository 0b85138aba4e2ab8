"""Healing beyond its chapter: families, precisions, a process that is killed, and what must stay as it was."""

import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from avss_nb.models import blocks
from avss_nb.cost import decoding_cost
from avss_nb.healing import heal, healing_loss
from avss_nb.surgery import prune_layers
from avss_nb.training import last_checkpoint
from tiny import FAMILIES, MORE_FAMILIES, VOCABULARY, batch_of, one_thread, swept, tiny

CAUSAL = [f for f in (*FAMILIES, *MORE_FAMILIES) if f not in ("bert", "distilbert", "t5")]
TEXT = ["Snow is white, grass is green, and coal is black.", "One two three four five six seven."] * 8
SHORT = dict(steps=6, batch_size=2, max_length=8, rank=4, learning_rate=1e-2)


class Letters:
    "A tokenizer: a token a letter."

    eos_token_id = 2

    def __call__(self, text):
        return SimpleNamespace(input_ids=[3 + ord(c) % (VOCABULARY - 3) for c in text])


ROWS = torch.tensor([Letters()(text).input_ids[:32] for text in TEXT[:2]])


def healed(model, teacher=None, **options):
    return heal(model, Letters(), TEXT, teacher=teacher, **SHORT | options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", swept(CAUSAL))
def test_every_family_learns_from_its_teacher_and_leaves_it_alone(family, tmp_path):
    base_model = tiny(family)
    small, before = prune_layers(base_model, [1]), weights(base_model)
    after = healed(small, base_model, steps=12, learning_rate=3e-3)
    with torch.no_grad():
        assert healing_loss(after, ROWS, teacher=base_model) < healing_loss(small, ROWS, teacher=base_model)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in base_model.named_parameters())
    assert not base_model.training and not after.training and len(blocks(after)) == 4
    after.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = batch_of(9)["input_ids"]
    with torch.no_grad():
        found, wanted, unhealed = (m(ids).logits for m in (again, after, small))
    assert torch.equal(found, wanted) and not torch.allclose(wanted, unhealed, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    base_model = tiny("llama").to(dtype)
    small = prune_layers(base_model, [1])
    after = healed(small, base_model, steps=12, learning_rate=3e-3)
    assert {p.dtype for p in after.parameters()} == {dtype}
    with torch.no_grad():
        assert healing_loss(after, ROWS, teacher=base_model) < 0.95 * healing_loss(small, ROWS, teacher=base_model)


def test_a_healed_model_has_weights_of_its_own():
    base_model = tiny("llama")
    small = prune_layers(base_model, [1])
    after = healed(small, base_model)
    theirs = {p.data_ptr() for model in (base_model, small) for p in model.parameters()}
    assert not [name for name, p in after.named_parameters() if p.data_ptr() in theirs]


def test_a_teacher_that_is_the_model_itself_teaches_nothing():
    base_model, losses = tiny("llama"), []
    healed(base_model, base_model, on_step=lambda step, loss: losses.append(loss))
    assert abs(losses[0]) < 1e-5


def test_an_error_in_training_leaves_the_models_as_they_were():
    base_model = tiny("llama")
    small, before = prune_layers(base_model, [1]), weights(base_model)

    def stop(step, loss):
        if step == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        healed(small, base_model, on_step=stop)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in base_model.named_parameters())
    assert not any("lora" in name for name, _ in small.named_parameters())


def test_the_callers_random_numbers_go_on():
    base_model = tiny("llama")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    healed(prune_layers(base_model, [1]), base_model)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_healing import healed, prune_layers, tiny
torch.set_num_threads(1)
def slowly(step, loss):
    print(step, flush=True)
    if {slow}: time.sleep(.2)
base_model = tiny("llama")
after = healed(prune_layers(base_model, [1]), base_model, out={out!r}, steps=20, save_every=4, on_step=slowly)
torch.save(after.state_dict(), {out!r} + ".weights")
"""


def run(out, slow: bool) -> subprocess.Popen:
    code = CHILD.format(tests=os.path.dirname(__file__), out=str(out), slow=slow)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    first = run(tmp_path / "cut", slow=True)
    for line in first.stdout:
        if line.strip() == "10":
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert last_checkpoint(tmp_path / "cut").endswith("checkpoint-8")
    unfinished = tmp_path / "cut" / "checkpoint-12"  # a checkpoint that was being written
    unfinished.mkdir(exist_ok=True)
    second, straight = run(tmp_path / "cut", slow=False), run(tmp_path / "straight", slow=False)
    steps = second.communicate()[0].split()
    assert second.returncode == 0 and steps[0] == "8" and steps[-1] == "19", steps
    assert straight.wait() == 0
    cut, base_model = (torch.load(tmp_path / f"{name}.weights", weights_only=True) for name in ("cut", "straight"))
    assert all(torch.equal(cut[name], base_model[name]) for name in base_model)


def test_a_finished_run_is_not_run_again(tmp_path):
    base_model, steps = tiny("llama"), []
    options = dict(out=tmp_path / "run", save_every=3)
    first = healed(prune_layers(base_model, [1]), base_model, **options)
    again = healed(prune_layers(base_model, [1]), base_model, on_step=lambda step, loss: steps.append(step), **options)
    assert not steps and all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))


@pytest.mark.parametrize("change", [dict(seed=1), dict(rank=2), dict(steps=7)], ids=str)
def test_a_folder_of_another_run_is_left_alone(tmp_path, change):
    base_model = tiny("llama")
    healed(prune_layers(base_model, [1]), base_model, out=tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="holds a run with"):
        healed(prune_layers(base_model, [1]), base_model, out=tmp_path / "run", **change)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_costs_of_a_cache_that_is_not_keys_and_values():
    with pytest.raises(ValueError, match="holds no keys and values"):
        decoding_cost(dict(base_model=tiny("mamba")), repeats=1, n_tokens=2)


def test_cost_counts_shared_weights_once():
    base_model = tiny("llama", tie_word_embeddings=True)
    cost = decoding_cost(
        dict(base_model=base_model, small=prune_layers(base_model, [1])), repeats=1, n_tokens=2, prompt_tokens=3
    )
    assert cost.weight_bytes["base_model"] == 4 * base_model.num_parameters() == 4 * cost.parameters["base_model"]
    assert cost.cache_bytes.tolist() == [
        n * 2 * 2 * 8 * 4 * 5 for n in (5, 4)
    ]  # blocks × keys and values × heads × width × bytes × tokens
