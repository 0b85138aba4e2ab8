"Several processes, one that dies, models that are split, offloaded and quantised, and plans."

import importlib.util
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from conftest import ROOT
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from tiny import batch_of, one_thread, small_tokenizer, tiny
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from avss_nb.eavss import answer_stats
from avss_nb.evaluation import row_losses
from avss_nb.hooks import input_device
from avss_nb.importance import angular_distance, layer_scores, leave_one_out, removal_losses
from avss_nb.metrics import REDUCTIONS, collect_stats
from avss_nb.models import blocks, load_model
from avss_nb.surgery import prune_layers, skip_layers
from avss_nb.cost import meta_model, memory_plan
from avss_nb.scale import (
    _gather_bytes,
    _packed,
    _read,
    _unpacked,
    _write,
    distributed_layer_scores,
    estimate,
    launch_processes,
    map_between_processes,
    rank_and_world_size,
    split_between_processes,
)

POINTS = ("output", "relative_update", "attention", "mlp_hidden")
TOKENIZER = SimpleNamespace(pad_token_id=1, padding_side="right")


def text_batches(n: int = 5) -> list[dict]:
    "Batches of one to three texts; the windows of text 0 lie in the first and in the last of them."
    made = [batch_of(*range(4 + i, 4 + i + 1 + i % 3), seed=i) for i in range(n)]
    for i, batch in enumerate(made):
        batch["index"] = torch.arange(len(batch["index"])) + 10 * (i % (n - 1) if n > 1 else 0)
    return made


def some_answers(n: int = 7) -> Dataset:
    rng = np.random.default_rng(0)

    def ids(k: int) -> list[int]:
        return rng.integers(3, 99, k).tolist()

    return Dataset.from_list(
        [dict(id=f"q{i // 2}", prompt_tokens=ids(3 + i % 3), answer_tokens=ids(1 + i % 4)) for i in range(n)]
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 20), st.integers(1, 25))
def test_all_shares_are_all_items_and_none_twice(n_items, n):
    for items, plain in ((list(range(n_items)), list), (pd.DataFrame(dict(x=range(n_items))), lambda t: t.x.tolist())):
        shares = [plain(split_between_processes(items, rank=i, world_size=n)) for i in range(n)]
        assert sorted(sum(shares, [])) == list(range(n_items)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_a_dataset():
    data = Dataset.from_dict(dict(x=range(5)))
    parts = [split_between_processes(data, rank=i, world_size=3)["x"][:] for i in range(3)]
    assert parts == [[0, 3], [1, 4], [2]]
    assert len(split_between_processes(data, rank=6, world_size=7)) == 0


def everything(model, texts, answers) -> dict:
    "What several processes make together, as plain arrays and tables."
    stats = map_between_processes(lambda some: collect_stats(model, some, points=POINTS, reduce=REDUCTIONS), texts)
    of_answers = map_between_processes(
        lambda some: answer_stats(model, TOKENIZER, some, points=POINTS), answers, chunk=2
    )
    return dict(
        who=rank_and_world_size(),
        stats={k: t.numpy() for k, t in stats.sums.items()},
        of_answers={k: t.numpy() for k, t in of_answers.sums.items()},
        ids=of_answers.ids,
        lengths=of_answers.lengths,
        losses=map_between_processes(lambda some: removal_losses(model, some), texts, add=True),
        few=map_between_processes(lambda some: removal_losses(model, some), texts[:1]),
        scores=distributed_layer_scores(
            model,
            texts,
            methods=[
                "avss",
                "avss_published_code",
                "block_influence",
                "influence_downstream",
                "leave_one_out",
                "magnitude",
                "random",
            ],
        ),
    )


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_equal_one(n):
    model, texts, answers = tiny("llama"), text_batches(), some_answers()
    alone = everything(model, texts, answers)
    together = launch_processes(everything, model, texts, answers, world_size=n)
    assert [found["who"] for found in together] == [(i, n) for i in range(n)]
    plain = collect_stats(model, texts, points=POINTS, reduce=REDUCTIONS)
    of_answers = answer_stats(model, TOKENIZER, answers, points=POINTS)
    for found in together:
        for name, t in plain.sums.items():
            np.testing.assert_allclose(found["stats"][name], t, rtol=1e-9, atol=1e-9 * abs(t).max(), err_msg=name)
        for name in of_answers.sums:  # the same chunks: to the last bit
            np.testing.assert_array_equal(found["of_answers"][name], alone["of_answers"][name])
        found_sums = found["of_answers"]["output.sumsq"]
        np.testing.assert_allclose(found_sums, of_answers.sums["output.sumsq"], rtol=1e-5)  # other batches: float32
        assert found["ids"].tolist() == of_answers.ids.tolist()
        assert found["lengths"].tolist() == of_answers.lengths.tolist()
        pd.testing.assert_frame_equal(found["losses"], alone["losses"], check_exact=True)
        pd.testing.assert_frame_equal(found["losses"], removal_losses(model, texts), rtol=1e-9)
        pd.testing.assert_frame_equal(
            found["few"], removal_losses(model, texts[:1]), check_exact=True
        )  # one text: the others have nothing to do
        pd.testing.assert_frame_equal(
            found["scores"], layer_scores(model, texts, methods=list(found["scores"])), rtol=1e-9, check_dtype=False
        )
    for name in plain.sums:
        assert all((found["stats"][name] == together[0]["stats"][name]).all() for found in together)  # the same in each


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_scale import fatal_run
os.environ["TEST_KILLS"] = "1"
fatal_run({out!r})
"""


def fatal_run(out):
    "Losses of five batches; with TEST_KILLS, which is no part of the work, process 1 is killed in its second."
    model, texts = tiny("llama"), text_batches()

    def work(some):
        if os.environ.get("TEST_KILLS") and rank_and_world_size()[0] == 1 and some[0] is texts[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return removal_losses(model, some)

    return map_between_processes(work, texts, out=out, add=True)


@pytest.mark.slow
def test_a_killed_process_is_named_and_nothing_is_lost(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), out=str(out)))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(script),
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )
    assert (
        run.returncode != 0 and "rank      : 1 (local_rank: 1)" in run.stderr and "Signal 9 (SIGKILL)" in run.stderr
    ), run.stderr[-3000:]
    left = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert (
        "chunk-00001.arrow" in left
        and "chunk-00003.arrow" not in left
        and not any(name.endswith(".part") for name in left)
    )
    undisturbed = fatal_run(None)
    for table in launch_processes(fatal_run, out, world_size=3):
        pd.testing.assert_frame_equal(table, undisturbed, check_exact=True)  # another number of processes goes on
    assert {name: (out / name).stat().st_mtime_ns for name in left} == left  # nothing was made twice
    pd.testing.assert_frame_equal(undisturbed, removal_losses(tiny("llama"), text_batches()), rtol=1e-9)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW)], ids=["1", "0", "1b"])
def test_the_one_that_was_killed_is_named(victim):
    "Those that lose the connection must not be taken for the one that died."
    with pytest.raises(RuntimeError, match=f"^process {victim} of 2 was killed by SIGKILL"):
        launch_processes(killed, victim, world_size=2)


def killed(victim):
    _gather_bytes(b"all are there", 60)
    if rank_and_world_size()[0] == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    _gather_bytes(b"one is missing", 60)


def late():
    if rank_and_world_size()[0] == 1:
        time.sleep(60)
    map_between_processes(lambda some: removal_losses(tiny("llama"), some), text_batches(), add=True, timeout=1)


@pytest.mark.slow
def test_one_that_does_not_come_is_named():
    started = time.monotonic()
    with pytest.raises(
        RuntimeError,
        match=r"process 0 of 2 ended with TimeoutError: process 0 waited 1 s for the others in vain: .*Ranks 1 failed",
    ):
        launch_processes(late, world_size=2)
    assert time.monotonic() - started < 40


def other_model():
    n = 3 + rank_and_world_size()[0]
    return map_between_processes(lambda some: collect_stats(tiny("llama", num_hidden_layers=n), some), text_batches())


def other_items():
    texts = text_batches(3 + rank_and_world_size()[0])
    return map_between_processes(lambda some: removal_losses(tiny("llama"), some), texts, add=True)


def not_finite():
    model = tiny("llama")
    if rank_and_world_size()[0]:
        blocks(model)[2].mlp.down_proj.weight.data.fill_(torch.nan)
    return map_between_processes(lambda some: collect_stats(model, some), text_batches())


@pytest.mark.parametrize(
    "work, message",
    [
        (other_model, r"process 1 and process 0 do not belong together: output.count is \(4,\) and \(3,\)"),
        pytest.param(other_items, "process 1 has 4 items and process 0 has 3", marks=SLOW),
        pytest.param(
            not_finite,
            "process 1 of 2 ended with FloatingPointError: activations of layer 2 are NaN or infinite",
            marks=SLOW,
        ),
    ],
)
def test_errors_of_several_processes(work, message):
    with pytest.raises(RuntimeError, match=message):
        launch_processes(work, world_size=2)


def test_bad_input(tmp_path):
    model, texts = tiny("llama"), text_batches()

    def losses(some):
        return removal_losses(model, some)

    with pytest.raises(ValueError, match="nothing to do"):
        map_between_processes(losses, [])
    with pytest.raises(ValueError, match="a chunk has at least one item, not 0"):
        map_between_processes(losses, texts, chunk=0)
    with pytest.raises(ValueError, match="text 0 has rows from two chunks: say add=True"):
        map_between_processes(losses, texts)
    with pytest.raises(ValueError, match="gave a list"):
        map_between_processes(lambda some: some, texts)
    with pytest.raises(ValueError, match="'shapley' is not a sum over texts"):
        distributed_layer_scores(model, texts, methods=["avss", "shapley"])
    with pytest.raises(ValueError, match="there is no process -1 of 2"):
        split_between_processes(texts, rank=-1, world_size=2)
    with pytest.raises(ValueError, match="world_size is at least 1, not 0"):
        launch_processes(rank_and_world_size, world_size=0)
    map_between_processes(losses, texts, out=tmp_path / "run", add=True, settings=dict(model="tiny"))
    for other in (
        dict(items=text_batches(6)),
        dict(settings=dict(model="large")),
        dict(chunk=2),
        dict(items=[batch_of(5, seed=i) for i in range(5)]),
    ):
        with pytest.raises(ValueError, match="holds a run with"):
            map_between_processes(
                losses,
                other.pop("items", texts),
                out=tmp_path / "run",
                add=True,
                **dict(settings=dict(model="tiny")) | other,
            )
    (tmp_path / "run" / "chunk-00002.arrow").write_bytes(b"ARROW1")
    with pytest.raises(ValueError, match="chunk-00002.arrow is damaged: delete it"):
        map_between_processes(losses, texts, out=tmp_path / "run", add=True, settings=dict(model="tiny"))
    with pytest.raises(ValueError, match="holds something else"):
        map_between_processes(losses, texts, out=tmp_path, add=True)


TABLES = [
    pd.DataFrame({"a": [1.0, np.nan, np.inf], 3: [1, 2, 3]}, index=pd.Index([5, 2, 9], name="text")),
    pd.DataFrame(dict(answer=["", 'é\n"', "007"], ok=[True, False, True])),
    pd.DataFrame(
        dict(x=[0.1 + 0.2, 1e-300]), index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["set", "layer"])
    ),
    pd.DataFrame(dict(x=np.float32([1.1]))),
]


@pytest.mark.parametrize("table", TABLES, ids=["mixed columns", "unnamed index", "two levels", "float32"])
def test_tables_come_back_to_the_last_bit(table, tmp_path):
    _write(table, tmp_path / "a.arrow")
    again, n = _unpacked(_packed({4: table}, 9))
    for found in (_read(tmp_path / "a.arrow"), again[4]):
        pd.testing.assert_frame_equal(found, table, check_exact=True, check_index_type=False)
    assert n == 9


# --- larger than one device


def kept_on_disk(model, folder: Path, way: str):
    "The model with all or some of its weights elsewhere."
    model_layers = next(name for name, m in model.named_modules() if m is blocks(model))
    rest = {
        name.rsplit(".", 1)[0]
        for name, _ in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith(f"{model_layers}.")
    } | {"lm_head"}
    places = dict.fromkeys(rest, "cpu") | {f"{model_layers}.{i}": "disk" if i in (1, 3, 4) else "cpu" for i in range(5)}
    if way == "memory":
        return cpu_offload(deepcopy(model), torch.device("cpu"))
    if way == "disk":
        return disk_offload(deepcopy(model), folder, torch.device("cpu"))
    if way == "split":
        return dispatch_model(deepcopy(model), places, main_device="cpu", offload_dir=folder)
    model.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload"
    ).eval()


def check_same(model, other, batches: list[dict]):
    "Statistics, scores and skipping of two models are the same."
    stats = [collect_stats(m, batches, points=POINTS, reduce=REDUCTIONS) for m in (model, other)]
    for name in stats[0].sums:
        assert torch.equal(*(s.sums[name] for s in stats)), name
    of_answers = [answer_stats(m, TOKENIZER, some_answers(3), points=("relative_update",)) for m in (model, other)]
    assert torch.equal(*(s.sums["relative_update.sumsq"] for s in of_answers))
    methods = ["avss", "block_influence", "avss_downstream", "leave_one_out", "magnitude"]
    pd.testing.assert_frame_equal(
        *(layer_scores(m, batches, methods=methods) for m in (model, other)), check_exact=True
    )
    pd.testing.assert_series_equal(*(angular_distance(m, batches, n=2) for m in (model, other)), check_exact=True)
    pd.testing.assert_frame_equal(
        *(removal_losses(m, batches, layers=["attention.1", "mlp.3", 4]) for m in (model, other)), check_exact=True
    )
    base_model = [row_losses(m, batches[0])[0] for m in (model, other)]
    with skip_layers(model, [0, 3]), skip_layers(other, [0, 3]):
        left = [row_losses(m, batches[0])[0] for m in (model, other)]
    assert torch.equal(*left) and torch.equal(*base_model) and not torch.equal(left[0], base_model[0])
    assert torch.equal(row_losses(other, batches[0])[0], base_model[0])  # the blocks are back


@pytest.mark.parametrize(
    "family, way",
    [("llama", way) for way in ("disk", "split")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("llama", "memory"), ("llama", "loaded"), ("gpt2", "loaded"), ("gemma3_text", "split"))
    ],
)
def test_offloaded_models_give_the_same(family, way, tmp_path):
    model = tiny(family)
    other = kept_on_disk(model, tmp_path, way)
    assert any(p.is_meta for p in other.parameters()) and input_device(other) == torch.device("cpu")
    check_same(model, other, [batch_of(7, 5, 9), batch_of(3, 8, side="left", seed=1)])
    with pytest.raises(ValueError, match="taylor needs the gradients of weights that are in memory"):
        layer_scores(other, [batch_of(4)], methods=["taylor"])


class FakeDevices(TorchFunctionMode):
    "Tensors carry the name of a device, and an operation on two of them fails, as it would with GPUs."

    def __init__(self):
        super().__init__()
        self.places = WeakIdKeyDictionary()

    def place(self, t):
        return self.places.get(t, torch.device("cpu"))

    def put(self, value, place):
        for t in self.tensors(value):
            self.places[t] = place
        return value

    def tensors(self, value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [t for v in value for t in self.tensors(v)] if isinstance(value, list | tuple) else []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self.place(args[0])
        given = [a for a in args if isinstance(a, torch.device)] + [d for d in [kwargs.get("device")] if d is not None]

        def plain(a):
            return torch.device("cpu") if isinstance(a, torch.device) else a

        args, kwargs = (
            tuple(map(plain, args)) if given else args,
            {k: plain(v) if k == "device" else v for k, v in kwargs.items()},
        )
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            place = (
                torch.device(given[0])
                if given
                else torch.device("cpu")
                if func is torch.Tensor.cpu
                else self.place(args[0])
            )
            return self.put(
                func(*args, **kwargs).view_as(args[0]) if place != self.place(args[0]) else func(*args, **kwargs), place
            )
        here = {self.place(t) for t in self.tensors([args, kwargs]) if t.dim()}
        if func is torch.Tensor.__getitem__ and self.place(args[0]) in here:
            here -= {torch.device("cpu")} - {self.place(args[0])}  # indices may stay behind
        if len(here) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func.__name__} found {sorted(map(str, here))}"
            )
        if func is torch.Tensor.numpy and here - {torch.device("cpu")}:
            raise TypeError("can't convert a tensor of another device to numpy")
        place = torch.device(given[0]) if given else next(iter(here), torch.device("cpu"))
        return self.put(func(*args, **kwargs), place)


class Moves(ModelHook):
    "What accelerate does before a module: its arguments go to the device of its weights."

    def __init__(self, device):
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


def on_two_devices(model, devices: FakeDevices):
    "The embedding and three blocks on one device, two blocks, the norm and the head on another."
    split, first, second = deepcopy(model), torch.device("cpu", 1), torch.device("cpu", 2)
    later = {*blocks(split)[3:], split.model.norm, split.lm_head}
    for module in (split.model.embed_tokens, split.model.rotary_emb, *blocks(split), split.model.norm, split.lm_head):
        place = second if module in later else first
        for t in [*module.parameters(), *module.buffers()]:
            devices.places[t] = place
        add_hook_to_module(module, Moves(place))
    return split


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_split_over_two_devices(family):
    model, devices, batches = tiny(family), FakeDevices(), [batch_of(7, 5, 9), batch_of(3, 8, side="left", seed=1)]
    split = on_two_devices(model, devices)
    with devices:
        with pytest.raises(RuntimeError, match="same device"):
            split.model.norm.weight + split.model.embed_tokens.weight[0]
        assert input_device(split) == torch.device("cpu", 1)
        check_same(model, split, batches)


# --- eight and four bits


@pytest.mark.parametrize("bits", [8, 4, "torchao"])
def test_quantised_models(bits, tmp_path):
    pytest.importorskip("torchao" if bits == "torchao" else "bitsandbytes", reason="quantisers are no requirement")
    if bits == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
    config = (
        TorchAoConfig(Int8WeightOnlyConfig())
        if bits == "torchao"
        else BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    )
    model, batches = (
        tiny("llama", hidden_size=64, intermediate_size=128),
        [batch_of(7, 5, 9), batch_of(3, 8, side="left", seed=1)],
    )
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    stats = [collect_stats(m, batches, points=POINTS) for m in (model, other)]
    for point in POINTS:
        off = np.sqrt(stats[1].get(point, "sumsq") / stats[0].get(point, "sumsq")) - 1
        assert 0 < abs(off).max() < (0.25 if bits == 4 else 0.05), (point, off)
    with skip_layers(model, [1, 3]), skip_layers(other, [1, 3]):
        left = [row_losses(m, batches[0])[0] for m in (model, other)]
    torch.testing.assert_close(*left, rtol=0.2 if bits == 4 else 0.03, atol=0)
    assert np.isfinite(leave_one_out(other, batches)).all()
    for score in ("magnitude", "taylor"):
        with pytest.raises(ValueError, match=f"{score} reads the weights, and this model's are quantised"):
            layer_scores(other, batches, methods=[score])
    with pytest.raises(ValueError, match="are quantised: load it unquantised, remove the layers"):
        prune_layers(other, [1])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_a_missing_quantiser_is_named(tmp_path):
    tokenizer = small_tokenizer()
    for part in (tiny("llama", vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load the model .*bitsandbytes"):
        load_model(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# --- plans


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "opt"])
def test_estimates_count_what_torch_counts(family):
    model, batch = tiny(family), batch_of(12)
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of a CPU
    paper = estimate(model, tokens=12, max_length=12)
    pd.testing.assert_series_equal(
        paper, estimate(model.config, tokens=12, max_length=12), check_exact=True
    )  # no weights are needed
    assert paper.parameters == model.num_parameters() and all(p.is_meta for p in meta_model(model.config).parameters())
    leave_one_out(model, [batch])  # once a class, a block is tried for the form of what it returns
    for name, work in dict(
        statistics=lambda: collect_stats(model, [batch]), leave_one_out=lambda: removal_losses(model, [batch])
    ).items():
        with FlopCounterMode(display=False) as counter:
            work()
        assert abs(paper[f"flops_{name}"] / counter.get_total_flops() - 1) < 0.02, (
            name,
            paper[f"flops_{name}"],
            counter.get_total_flops(),
        )


def test_a_plan_is_in_proportion():
    model = tiny("llama")
    plan, twice = (
        memory_plan(model, batch_size=4, max_length=16),
        memory_plan(model.config, batch_size=8, max_length=16, dtype=torch.float32),
    )
    assert plan.loc["weights"].tolist() == [4 * model.num_parameters()] * 3
    for part in ("peak block activations", "inputs of all blocks"):
        assert (twice.loc[part] == 2 * plan.loc[part]).all()
    assert (twice.loc["statistics"] == plan.loc["statistics"]).all() and (
        plan.iloc[:-1].sum() == plan.loc["total"]
    ).all()
    stats = collect_stats(model, [batch_of(5)])
    assert (
        plan.loc["statistics", "disk"]
        >= sum(t.nbytes for t in stats.sums.values())
        > 0.99 * plan.loc["statistics", "disk"]
    )
    assert (
        memory_plan(model, bits=4).loc["weights", "disk"]
        < memory_plan(model, bits=8).loc["weights", "disk"]
        < memory_plan(model, dtype=torch.bfloat16).loc["weights", "disk"]
    )
    with pytest.raises(ValueError, match="bits is 8 or 4, not 16"):
        memory_plan(model, bits=16)
