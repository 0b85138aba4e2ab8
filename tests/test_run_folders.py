"""A folder of one run is never taken for another's: another model, state, data, function or setting is refused, or has
a file of its own; the same work resumes; several writers lose nothing."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict
from functools import partial

import pandas as pd
import pytest
import torch
from datasets import Dataset

import avss_nb.allocation
import avss_nb.pruning
import avss_nb.shipping
from avss_nb.ablations import run_variants
from avss_nb.allocation import measure_plans
from avss_nb.contrastive import contrastive_tune
from avss_nb.data import load_questions, load_sentences
from avss_nb.decoding import dola
from avss_nb.healing import heal
from avss_nb.labeling import BatchJudge, generate_answers, label_answers
from avss_nb.metrics import LayerStats
from avss_nb.models import atomic_write, model_key
from avss_nb.options import Settings
from avss_nb.pruning import measure_removal
from avss_nb.report import study_key
from avss_nb.runs import RunDirectory, check_run, key_of, run_key
from avss_nb.scale import map_between_processes
from avss_nb.sparsity import sparsify
from avss_nb.surgery import skip_layers
from nursery import SMALL
from test_bad_input import model_folder as short_window, tiny_gguf  # noqa: F401
from test_contrastive import QUESTIONS, SHORT, Letters
from test_endurance import Begun, at_hand, model_folder  # noqa: F401
from tiny import small_tokenizer, tiny

REFUSED = "holds a run with .*choose another folder"
TEXTS = ["Water boils at a hundred degrees.", "Ice floats on water."]
ASKED = [dict(id=f"q{i}", question=f"What is {i}?", answers=["x"]) for i in range(3)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def items():
    return dict(questions=load_questions("atlas", n=2), sentences=load_sentences("words", n=2))


# ---- the key of a model


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def state_of(model):
    return run_key("f", model=model)["model"]


def test_the_key_of_a_plain_model_stays():
    "Stored tables carry it."
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.25)
    assert model_key(model) == "Linear, 6 parameters, 396fd7232f31e681"


def test_an_adapter_counts_on_and_off():
    model = with_adapter(tiny("llama"))
    on = state_of(model)
    with model.disable_adapter():
        off = state_of(model)
    assert on != off and state_of(model) == on


def test_states_count():
    model = tiny("llama")
    keys = [state_of(model)]
    for p in (0.5, 0.25):
        with sparsify(model, p, rule="top_k"):
            keys.append(state_of(model))
    for layers in ([2], [3], ["mlp.2"], ["mlp.3"], ["attention.2"]):
        with skip_layers(model, layers):
            keys.append(state_of(model))
    for layers, alpha in (([1], 0.1), ([1], 0.2), ([2], 0.2)):
        with dola(model, layers, alpha=alpha):
            keys.append(state_of(model))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, result: result)
    keys.append(state_of(model))
    handle.remove()
    assert len(set(keys)) == len(keys) and state_of(model) == keys[0]


def test_a_key_of_a_run_sees_every_weight_and_the_configuration():
    model = tiny("llama")
    keys = [run_key("f", model=model)]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 3] += 1  # not among the first numbers
    keys.append(run_key("f", model=model))
    model.config.rope_theta = 5.0
    keys.append(run_key("f", model=model))
    keys.append(run_key("g", model=model))
    assert len({json.dumps(key) for key in keys}) == 4 and run_key("g", model=model) == keys[-1]


# ---- the key of functions and data


def measure_of(threshold):
    def measure(x):
        return x > threshold

    return measure


class Asker(BatchJudge):
    def __init__(self, right):
        self.right, self.asked = right, 0

    def batch(self, triples):
        self.asked += 1
        return [answer in self.right for _, answer, _ in triples]


def test_functions_are_known_by_what_they_do():
    assert key_of(measure_of(1)) == key_of(measure_of(1))
    others = [measure_of(1), measure_of(2), partial(max, 1), partial(max, 2), Asker("ab"), Asker("abc")]
    others += [lambda x: x + 1, lambda x: x + 2, lambda x, by=1: x + by, lambda x, by=2: x + by]
    others += [partial(map, lambda x: x + 1), partial(map, lambda x: x + 2)]  # inside of a partial
    others += [measure_of(Asker("a")), measure_of(Asker("b"))]  # an object in a closure
    others += [re.compile("a").search, re.compile("b").search]  # of an object in C
    keys = [key_of(f) for f in others]
    assert len(set(keys)) == len(keys)
    judge = Asker("ab")
    judge.batch([("q", "a", [])])
    assert key_of(judge) == key_of(Asker("ab"))


MINE = """
from avss_nb.runs import key_of
known = {"a", "b"}
def short(text):
    return text[:3]
def judge(question, answer, references):
    return short(answer) in known or answer in {"x", "y", "z"}
"""


def test_what_a_function_reads_of_its_module_counts(tmp_path, monkeypatch):
    def key_with(source, name):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return key_of(importlib.import_module(name).judge)

    changed = [MINE, MINE.replace('"b"', '"c"'), MINE.replace("[:3]", "[:4]"), MINE.replace('"z"', '"w"')]
    keys = [key_with(source, f"changed_{i}") for i, source in enumerate(changed)]
    assert len(set(keys)) == 4 and key_with("\n" + MINE, "moved") == keys[0]


def test_functions_have_the_same_key_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    environment = os.environ | dict(PYTHONHASHSEED="7")
    command = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = subprocess.run([sys.executable, "-c", "import mine; print(mine.key_of(mine.judge))"], **command)
    assert said.stdout.strip() == key_of(importlib.import_module("mine").judge), said.stderr


def test_every_number_of_data_counts():
    first, second = torch.zeros(2000), torch.zeros(2000)
    second[1000] = 1
    pairs = [
        ([dict(x=first)], [dict(x=second)]),
        (pd.DataFrame(dict(x=first)), pd.DataFrame(dict(x=second))),
        (first.numpy().reshape(2, -1), second.numpy().reshape(2, -1)),
        (torch.float32, torch.bfloat16),
        (dict(stats=LayerStats({"x.hist": first})), dict(stats=LayerStats({"x.hist": second}))),
    ]
    assert all(key_of(a) != key_of(b) and key_of(a) == key_of(a) for a, b in pairs)


# ---- folders


def test_keys_are_compared_both_ways(tmp_path):
    RunDirectory.open(tmp_path / "run", dict(seed=0))
    for key in (dict(seed=1), dict(seed=0, steps=3), dict()):
        with pytest.raises(ValueError, match=REFUSED):
            check_run(tmp_path / "run", key)
    with pytest.raises(ValueError, match="no steps"):
        RunDirectory.open(tmp_path / "run", dict(seed=0, steps=3))
    check_run(tmp_path / "run", dict(seed=0))


def test_removal_on_other_work_is_refused(tmp_path, model, tokenizer, items, monkeypatch):
    def removed(texts=TEXTS, max_length=256, of=model, **data):
        return measure_removal(of, tokenizer, dict(one=[2]), texts, out=tmp_path, max_length=max_length, **items | data)

    first = removed()
    for change in (
        dict(texts=TEXTS[:1] * 2),
        dict(max_length=4),
        dict(questions=load_questions("atlas", n=2, seed=5)),
        dict(of=with_adapter(tiny("llama", vocab_size=len(tokenizer)))),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            removed(**change)
    with sparsify(model, 0.5, rule="top_k"), pytest.raises(ValueError, match=REFUSED):
        removed()
    monkeypatch.setattr(avss_nb.pruning, "measure_items", lambda *args: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(removed(), first)  # what is stored is not measured again


def test_removal_with_the_adapter_off_is_refused(tmp_path, tokenizer, items):
    model = with_adapter(tiny("llama", vocab_size=len(tokenizer)))
    go = partial(measure_removal, model, tokenizer, dict(one=[2]), TEXTS, out=tmp_path, **items)
    first = go()
    with model.disable_adapter(), pytest.raises(ValueError, match=REFUSED):
        go()
    pd.testing.assert_frame_equal(go(), first)


def test_many_sublayers_have_a_file(tmp_path, tokenizer, items):
    model = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=32)
    many = [f"attention.{i}" for i in range(32)]
    choices = dict(all=many, fewer=many[:-1])
    found = measure_removal(model, tokenizer, choices, TEXTS, out=tmp_path, **items)
    pd.testing.assert_frame_equal(found, measure_removal(model, tokenizer, choices, TEXTS, out=tmp_path, **items))
    assert len(list(tmp_path.glob("*.csv"))) == 2


def test_plans_of_other_work(tmp_path, model, tokenizer, monkeypatch):
    def planned(p=0.5, texts=TEXTS, out=tmp_path, **options):
        return measure_plans(model, tokenizer, dict(plan=dict(plan=p, rule="top_k")), texts, out=out, **options)

    first = planned()
    pd.testing.assert_frame_equal(planned(p=0.25), planned(p=0.25, out=None), check_dtype=False)  # a file of its own
    with pytest.raises(ValueError, match=REFUSED):
        planned(texts=TEXTS[:1])
    with pytest.raises(ValueError, match=REFUSED):
        planned(max_length=4)
    with skip_layers(model, ["mlp.1"]), pytest.raises(ValueError, match=REFUSED):
        planned()
    monkeypatch.setattr(avss_nb.allocation, "measure_items", None)
    pd.testing.assert_frame_equal(planned(), first)


def constant(value, model):
    table = pd.DataFrame(dict(set="x", measure="m", item=[0], value=[value], tokens=1))
    return table.set_index(["set", "measure"])


def test_variants_with_another_measure_are_refused(tmp_path):
    def go(measure):
        options = SHORT | dict(seeds=(0,), out=tmp_path)
        return run_variants(tiny("llama"), Letters(), QUESTIONS, dict(base_model=None), measure, **options)

    first = go(partial(constant, 1.0))
    with pytest.raises(ValueError, match=REFUSED):
        go(partial(constant, 2.0))
    pd.testing.assert_frame_equal(go(partial(constant, 1.0)), first)


def test_answers_of_other_work_are_refused(tmp_path, model, tokenizer):
    def asked(**options):
        return generate_answers(model, tokenizer, Dataset.from_list(ASKED), max_new_tokens=2, out=tmp_path, **options)

    first = asked()
    with sparsify(model, 0.5, rule="top_k"), pytest.raises(ValueError, match=REFUSED):
        asked()
    with skip_layers(model, ["attention.1"]), pytest.raises(ValueError, match=REFUSED):
        asked()
    with dola(model, [1]), pytest.raises(ValueError, match=REFUSED):
        asked()
    with pytest.raises(ValueError, match=REFUSED):
        asked(temperature=0.2)
    assert asked()[:] == first[:]


def test_another_judge_of_the_same_name_is_refused(tmp_path):
    rows = [dict(id="a", question="q", answers=["x"], answer=answer) for answer in ("x", "y")]

    def judge_of(right):
        def judge(question, answer, references):
            return answer == right

        return judge

    first = label_answers(rows, rule=judge_of("x"), out=tmp_path / "v.json")["judge"][:]
    with pytest.raises(ValueError, match="another judge named 'judge': give another file"):
        label_answers(rows, rule=judge_of("y"), out=tmp_path / "v.json")
    assert label_answers(rows, rule=judge_of("x"), out=tmp_path / "v.json")["judge"][:] == first
    label_answers(rows, rule=Asker("x"), name="asker", out=tmp_path / "w.json")
    with pytest.raises(ValueError, match="another judge named 'asker'"):
        label_answers(rows, rule=Asker("y"), name="asker", out=tmp_path / "w.json")


def test_trainings_of_other_work_are_refused(tmp_path, tokenizer):
    def tuned(model):
        return contrastive_tune(model, Letters(), QUESTIONS, [3], out=tmp_path / "tune", **SHORT | dict(steps=1))

    def healed(model):
        options = dict(out=tmp_path / "heal", steps=1, batch_size=1, max_length=8)
        return heal(model, tokenizer, ["So it goes. " * 20], **options)

    for train, model in ((tuned, tiny("llama")), (healed, tiny("llama", vocab_size=len(tokenizer)))):
        train(model)
        train(model)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[5, 3] += 1  # not among the first numbers
        with pytest.raises(ValueError, match=REFUSED):
            train(model)


def test_another_function_over_the_same_items_is_refused(tmp_path):
    def counted(by, some):
        return pd.DataFrame(dict(x=[by * part for part in some]), index=pd.Index(some, name="text"))

    first = map_between_processes(partial(counted, 1), [1, 2, 3], out=tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        map_between_processes(partial(counted, 2), [1, 2, 3], out=tmp_path)
    pd.testing.assert_frame_equal(map_between_processes(partial(counted, 1), [1, 2, 3], out=tmp_path), first)


# ---- the commands


def test_a_study_counts_what_its_data_folder_holds():
    own, bundled = Settings(data="somewhere"), Settings()
    first, second = dict(held_out=["one"], names=dict(text="a")), dict(held_out=["two"], names=dict(text="a"))
    assert study_key(own, first) == study_key(own, dict(first)) != study_key(own, second)
    assert study_key(bundled, first) == asdict(bundled)  # stored studies carry it


def test_pruning_by_another_table_of_scores_is_refused(at_hand, model_folder, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise Begun

    monkeypatch.setattr(avss_nb.shipping, "study_data", lambda settings: at_hand[1])
    monkeypatch.setattr(avss_nb.shipping, "measure_removal", stop)
    table = pd.DataFrame(dict(mine=[1.0, 2, 3, 4, 5])).rename_axis("layer")

    def prune():
        options = dict(out=tmp_path / "out", score="mine", scores=tmp_path / "scores.csv")
        avss_nb.shipping.prune_to_folder(model_folder, **options, **SMALL)

    table.to_csv(tmp_path / "scores.csv")
    for _ in range(2):
        with pytest.raises(Begun):
            prune()
    table[::-1].reset_index(drop=True).rename_axis("layer").to_csv(tmp_path / "scores.csv")
    with pytest.raises(ValueError, match=REFUSED):
        prune()


# ---- several writers

WRITES = """
import sys
from pathlib import Path
from avss_nb.metrics import LayerStats
from avss_nb.models import atomic_write
for i in range(500):
    atomic_write(Path(sys.argv[1]) / f"{i % 5}.txt", lambda part: part.write_text(sys.argv[2] * 1000))
"""


def test_two_writers_lose_nothing(tmp_path):
    failed = []

    def write(letter):
        for i in range(500):
            try:
                atomic_write(tmp_path / f"{i % 5}.txt", lambda part: part.write_text(letter * 1000))
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and sorted(file.name for file in tmp_path.iterdir()) == [f"{i}.txt" for i in range(5)]
    assert all(len(set(file.read_text())) == 1 and file.stat().st_size == 1000 for file in tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_lose_nothing(tmp_path):
    commands = [[sys.executable, "-c", WRITES, str(tmp_path), letter] for letter in "ab"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{i}.txt" for i in range(5)]
    assert all(len(set(file.read_text())) == 1 and file.stat().st_size == 1000 for file in tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_killed_writer_left_is_removed(tmp_path):
    code = """
import os, sys
from avss_nb.metrics import LayerStats
from avss_nb.models import atomic_write
def write(part):
    part.write_text("half")
    os.kill(os.getpid(), 9)
atomic_write(sys.argv[1], write)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")])
    assert [file.suffix for file in tmp_path.iterdir()] == [".part"]
    atomic_write(tmp_path / "a.txt", lambda part: part.write_text("whole"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
