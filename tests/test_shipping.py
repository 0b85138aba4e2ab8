"""The command `avss prune`, from a model folder to a smaller one that transformers loads alone."""

import json

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import avss_nb.report
import avss_nb.shipping
from avss_nb.command import main
from avss_nb.models import blocks
from avss_nb.surgery import skip_layers
from avss_nb.shipping import prune_to_folder
from tiny import one_thread, small_tokenizer

SMALL = dict(passages=4, questions=6, sentences=6, max_length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eight random Llama blocks with a small tokenizer."
    folder, tokenizer = tmp_path_factory.mktemp("model") / "random-llama", small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory):
    return prune_to_folder(folder, out=tmp_path_factory.mktemp("out") / "smaller", **SMALL)


def failed(capsys, *arguments) -> str:
    "Run the command where it must fail: status 2 and one line on stderr."
    assert main(["prune", *(str(a) for a in arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("avss prune: ")]
    assert len(lines) == 1
    return lines[0]


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_folder_holds_the_model_without_its_lowest_layers(folder, pruned):
    scores = pd.read_csv(pruned / "layer_scores.csv", index_col="layer").avss
    lowest = sorted(scores.nsmallest(2).index)
    base_model, small = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, pruned))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), skip_layers(base_model, lowest):
        wanted = base_model(ids).logits
    with torch.no_grad():
        assert torch.equal(small(ids).logits, wanted)
    assert len(blocks(small)) == 6 and len(blocks(base_model)) == 8
    card = (pruned / "README.md").read_text()
    assert (
        f"layers {', '.join(map(str, lowest))} " in card
        and "random-llama without 2 of its 8 layers" in card
        and str(folder.parent) not in card
    )
    assert files(pruned.parent) == ["smaller"]


def test_the_card_says_what_was_measured(pruned):
    left, card = pd.read_csv(pruned / "retention.csv", index_col=0), (pruned / "README.md").read_text()
    assert (
        f"| {left.perplexity['base_model']:,.3f} | {left.perplexity['pruned']:,.3f} | "
        f"{left.perplexity_retained['pruned']:.2f} ["
    ) in card


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_folder(folder, pruned, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(avss_nb.shipping, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_to_folder(folder, out=tmp_path / "smaller", **SMALL)
    assert files(tmp_path) == ["smaller.partial"] and not (tmp_path / "smaller.partial" / "model").exists()
    monkeypatch.undo()
    monkeypatch.setattr(avss_nb.shipping, "layer_scores", lambda *args, **options: pytest.fail("measured twice"))
    again = prune_to_folder(folder, out=tmp_path / "smaller", **SMALL)
    assert files(again) == files(pruned) and files(tmp_path) == ["smaller"]
    for name in ("model.safetensors", "retention.csv", "layer_scores.csv", "README.md", "config.json"):
        assert (again / name).read_bytes() == (pruned / name).read_bytes(), name


def test_another_unfinished_run_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "recipe.json").write_text(json.dumps(dict(settings=dict(score="sleb"))))
    assert "holds a run with score='sleb'" in failed(capsys, folder, "--out", tmp_path / "a")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine.txt").write_text("precious")
    assert "holds something else" in failed(capsys, folder, "--out", tmp_path / "b")
    assert (tmp_path / "b.partial" / "mine.txt").read_text() == "precious"


def test_a_folder_that_is_there_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert "exists: choose another" in failed(capsys, folder, "--out", tmp_path / "mine")
    assert files(tmp_path) == ["mine"] and files(tmp_path / "mine") == []


def test_a_full_disk_leaves_nothing_that_looks_whole(folder, tmp_path, capsys, monkeypatch):
    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    line = failed(
        capsys,
        folder,
        "--out",
        tmp_path / "smaller",
        *(a for k, v in SMALL.items() for a in (f"--{k.replace('_', '-')}", v)),
    )
    assert "No space left on device" in line and files(tmp_path) == ["smaller.partial"]


def test_a_folder_that_does_not_bring_the_model_back_is_refused(folder, tmp_path, monkeypatch):
    plain = LlamaForCausalLM.save_pretrained

    def wrong(self, *args, **options):
        self.model.norm.weight.data += 1
        plain(self, *args, **options)
        self.model.norm.weight.data -= 1

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", wrong)
    with pytest.raises(RuntimeError, match="does not bring back"):
        prune_to_folder(folder, out=tmp_path / "smaller", **SMALL)
    assert not (tmp_path / "smaller").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("layer,mine\n0,1\n1,2\n", "scores 2 layers and the model has layers 0 to 7"),
        ("layer,other\n0,1\n", "no column 'mine'"),
        ("mine\n1\n", "cannot read the scores"),
        (None, "cannot read the scores"),
    ],
)
def test_scores_of_another_model_are_refused(folder, tmp_path, capsys, text, message):
    file = tmp_path / "scores.csv"
    if text:
        file.write_text(text)
    assert message in failed(capsys, folder, "--out", tmp_path / "new", "--scores", file, "--score", "mine")
    assert files(tmp_path) == (["scores.csv"] if text else [])


def test_scores_of_your_own(folder, tmp_path):
    pd.DataFrame(dict(mine=[5, 1, 5, 5, 0, 5, 5, 5])).rename_axis("layer").to_csv(tmp_path / "scores.csv")
    out = prune_to_folder(
        folder, out=tmp_path / "new", score="mine", scores=tmp_path / "scores.csv", dtype="bfloat16", **SMALL
    )
    assert (
        "Removed: layers 1, 4 (counted from 0), the lowest by `mine` of a given table."
        in (out / "README.md").read_text()
    )
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--score", "avs"], "unknown score 'avs'"),
        (["--fraction", "0.05"], "less than one layer"),
        (["--fraction", "2"], "between 0 and 1"),
        (["--data", "/no/where"], "no data folder"),
    ],
)
def test_bad_options_are_named(folder, tmp_path, capsys, arguments, message):
    assert message in failed(capsys, folder, "--out", tmp_path / "new", *arguments) and files(tmp_path) == []


@pytest.mark.slow
def test_a_healed_model_has_its_own_column_and_goes_on_after_a_kill(folder, pruned, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(avss_nb.shipping, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_to_folder(folder, out=tmp_path / "smaller", heal_steps=3, **SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(avss_nb.report, "measure_items", lambda *args: pytest.fail("measured twice"))
    healed = prune_to_folder(folder, out=tmp_path / "smaller", heal_steps=3, **SMALL)
    assert files(healed) == files(pruned) and files(tmp_path) == ["smaller"]
    card, left = (healed / "README.md").read_text(), pd.read_csv(healed / "retention.csv", index_col=0)
    assert (
        "Then healed: 3 steps of 512 tokens of pydoc" in card
        and "| measured on other text | base model | pruned | healed | retained |" in card
        and "Nothing was trained" not in card
    )
    assert (
        left.index.tolist() == ["base_model", "pruned", "healed"]
        and f"{left.perplexity['healed']:,.3f} | {left.perplexity_retained['healed']:.2f} [" in card
    )
    small, unhealed = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (healed, pruned))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert not torch.allclose(small(ids).logits, unhealed(ids).logits, atol=1e-4)
    assert [p.shape for p in small.parameters()] == [p.shape for p in unhealed.parameters()]


def test_too_little_text_to_heal_on_is_told_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        avss_nb.shipping, "study_data", lambda settings: dict(train=["Too short."], calibration=[], names={})
    )
    monkeypatch.setattr(
        avss_nb.shipping, "layer_scores", lambda *args, **options: pytest.fail("measured before it was told")
    )
    with pytest.raises(ValueError, match="training text is too short"):
        prune_to_folder(folder, out=tmp_path / "smaller", heal_steps=3, **SMALL)
    assert files(tmp_path) == []


def test_a_repaired_model_is_loaded_by_the_library_alone(folder, tmp_path, capsys):
    "A quarter of the blocks in a row, and a down-projection that is not the base model's."
    out = tmp_path / "repaired"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["prune", str(folder), "--out", str(out), "--repair", *options]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "the neighbours that a linear map replaces best on" in card and "by least squares" in card
    small, base = (LlamaForCausalLM.from_pretrained(part) for part in (out, folder))
    note = small.config.compensation["runs"][0]
    first, last = note["removed"]
    assert (last - first, len(blocks(small)), note["before"]) == (1, 6, first)
    down = [blocks(m)[first - 1].mlp.down_proj.weight for m in (small, base)]
    assert not torch.equal(*down) and 0 < note["left"] < 1
    table = pd.read_csv(out / "retention.csv", index_col="method")
    assert table.index.tolist() == ["base_model", "pruned", "repaired"]
    assert "leave scores and heal_steps out" in failed(
        capsys, folder, "--out", tmp_path / "two", "--repair", "--heal-steps=2"
    )
