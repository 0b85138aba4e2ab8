"The command `avss study`, from a model folder to a report, on a tiny random model."

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from conftest import check_page
from safetensors.torch import load_file
from transformers import BartConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

import avss_nb.command
import avss_nb.report
from avss_nb.data import load_questions
from avss_nb.command import main
from avss_nb.options import Settings
from avss_nb.report import (
    ANSWER_TABLES,
    QUICK,
    STAGES,
    _measured_choices,
    _Progress,
    load_study,
    memory_in_words,
    plan_in_words,
    run_study,
    still_to_come,
    wrong_answers,
)
from tiny import small_tokenizer, tiny

SMALL = [
    "--passages",
    "8",
    "--questions",
    "12",
    "--sentences",
    "12",
    "--max-length",
    "48",
    "--heal-steps",
    "2",
    "--tune-steps",
    "2",
    "--sparsity",
    ".5",
]
TABLES = [
    "profile",
    "scores",
    "removal",
    "sensitivity",
    "certainty",
    "converged",
    "answers",
    "hallucination",
    "detectors",
    "tuned",
    "sparse",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    "Eight random Llama blocks with a small tokenizer."
    folder, tokenizer = tmp_path_factory.mktemp("model"), small_tokenizer()
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


def command(model_folder, out):
    return [
        sys.executable,
        "-c",
        "import sys; from avss_nb.command import main; sys.exit(main())",
        "study",
        str(model_folder),
        "--out",
        str(out),
        *SMALL,
    ]


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    "A finished study, what the command printed, and its pages: how far the study was, what was to come, the HTML."
    out, pages, write = tmp_path_factory.mktemp("study") / "results", [], avss_nb.report.write_report

    def write_and_keep(study):
        page = write(study)
        pages.append((study.stage, still_to_come(study), page.read_text(encoding="utf-8")))
        return page

    said = SimpleNamespace(stdout=io.StringIO(), stderr=io.StringIO())
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said.stdout), redirect_stderr(said.stderr):
        patch.setattr(avss_nb.report, "write_report", write_and_keep)
        code = main(["study", str(model_folder), "--out", str(out), *SMALL])
    printed, logged = said.stdout.getvalue(), said.stderr.getvalue()
    return out, SimpleNamespace(returncode=code, stdout=printed, stderr=logged, pages=pages)


def tables(out):
    return {name: pd.read_csv(out / f"{name}.csv", dtype={"removes": str}) for name in TABLES}


def test_command_writes_the_results_folder(finished):
    out, run = finished
    assert run.returncode == 0, run.stderr
    assert "report.html" in run.stdout and "leave one out" in run.stderr
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "report.ipynb",
        "report.html",
        "results.json",
        "settings.json",
        "stats.safetensors",
        *(f"{t}.csv" for t in TABLES),
    }
    assert {
        f"figure-{n}.{kind}"
        for n in ("profile", "retention", "certainty", "sensitivity", "tuned", "sparse")
        for kind in ("png", "svg")
    } <= names
    assert not [p for p in out.rglob("*.part")]


def test_the_memory_it_takes_is_said_first(finished):
    out, run = finished
    assert "Memory" not in run.stdout
    before, planned, after = re.split(
        r"(?m)^(Memory: 0\.\d\d GB of weights; .* at work on statistics, .* on leave-one-out .* are free)$", run.stderr
    )
    assert planned and "reading layers" in after and "Loading" not in before


@pytest.mark.parametrize("free, warned", [(10**12, False), (10**6, True)])
def test_memory_of_the_bundled_model(monkeypatch, capsys, tmp_path, free, warned):
    "Before anything is measured; more than is free is a warning, no refusal."
    monkeypatch.setattr(avss_nb.report, "_free", lambda settings: free)

    def measured(*args, **options):
        raise OSError("measured")

    monkeypatch.setattr(avss_nb.report, "measure_in_stages", measured)
    assert main(["study", "smollm2-135m", "--size", "full", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    first, *rest, last = said.err.splitlines()
    assert (
        first.startswith("Memory: 0.54 GB of weights; 0.59 GB at work on statistics, 0.85 GB on leave-one-out")
        and last == "avss study: measured"
        and not said.out
    )
    assert len(rest) == warned and all(line.startswith("Warning: that is more than is free") for line in rest)


def test_memory_of_a_mixture_of_experts_is_not_planned(tmp_path):
    MixtralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
    ).save_pretrained(tmp_path)
    assert memory_in_words(Settings(str(tmp_path))).startswith(
        "Memory: no plan for this model (no 'down' found in MixtralDecoderLayer"
    )


def test_results_are_plain_numbers(finished):
    out, _ = finished
    results = json.loads(
        (out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert (
        results["n_layers"] == 8
        and len(results["loss_increase"]) == 8
        and len(results["removal"]["avss"]["removes"]) == 2
    )
    assert results["versions"]["torch"] == torch.__version__ and results["device"] and results["settings"]["seed"] == 0
    assert load_file(out / "stats.safetensors")["output.hist"].shape == (8, 8192)


def test_the_healed_model_is_compared_with_the_others(finished):
    out, _ = finished
    study = load_study(out)
    healed, pruned = (study.removal.loc[m] for m in ("avss_healed", "avss"))
    assert healed.removes == pruned.removes and healed.perplexity != pruned.perplexity
    assert "After 2 steps of distillation" in (out / "report.html").read_text() and not (out / "healing").exists()


def test_contrastive_training_is_compared_with_the_base_model(finished):
    out, _ = finished
    study = load_study(out)
    assert [*study.tuned.index.unique("variant")] == [
        "LM loss only",
        "base_model",
        "last",
        "random",
    ]  # no right answers: nothing to rank by
    blocks_ = study.tuned.blocks.groupby("variant").first()
    assert (
        blocks_["last"] == blocks_["LM loss only"] == "7"
        and len(blocks_["random"].split("; ")) == 2
        and set(study.tuned.n) == {8, 12}
    )
    margin = study.tuned.value.loc["atlas", "margin"]
    assert (
        margin.nunique() == 4
        and "Fewer wrong answers" in (out / "report.html").read_text()
        and not (out / "tuning").exists()
    )


def test_questions_that_do_not_fit_the_window():
    "Tables without rows, which `measure` can store."
    tokenizer, data = (
        small_tokenizer(),
        dict(questions=load_questions("atlas", n=2), examples=load_questions("atlas", split="train", n=4)),
    )
    found = wrong_answers(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=48), tokenizer, data, seed=0)
    assert {name: [*table.index.names] for name, table in found.items()} == {
        name: [index] if isinstance(index, str) else index for name, index in ANSWER_TABLES.items()
    }
    assert {name: [*table.columns] for name, table in found.items()} == dict(
        answers=["asked"],
        hallucination=["value", "low", "high", "p", "q"],
        detectors=["auroc", "auroc_low", "auroc_high"],
    )
    assert not any(map(len, found.values()))


def test_report_reads_well_in_a_browser(finished, browser):
    out, _ = finished
    assert check_page(browser, (out / "report.html").as_uri()) == []
    assert "Which layers matter" in browser.page_source and browser.page_source.count("<img") == 6
    report = nbformat.read(out / "report.ipynb", as_version=4)
    assert not any(
        o.output_type in ("error", "stream") for c in report.cells if c.cell_type == "code" for o in c.outputs
    )


@pytest.mark.slow
def test_second_run_measures_nothing_again(finished, model_folder):
    out, _ = finished
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.csv")}
    page = (out / "report.html").stat().st_mtime_ns
    assert main(["study", str(model_folder), "--out", str(out), *SMALL]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.csv")} == stamps
    assert (out / "report.html").stat().st_mtime_ns > page


@pytest.mark.slow
def test_killed_study_resumes_to_the_same_tables(finished, model_folder, tmp_path):
    "Killed as soon as the first losses are stored, then run again."
    out, base_model = tmp_path / "results", tables(finished[0])
    process = subprocess.Popen(command(model_folder, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(out.glob("losses/*.csv")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "results.json").exists()
    assert subprocess.run(command(model_folder, out), capture_output=True).returncode == 0
    for name, table in tables(out).items():
        pd.testing.assert_frame_equal(table, base_model[name], rtol=1e-5)  # a process of its own: other threads


def test_whole_model_is_the_yardstick(finished):
    study = load_study(finished[0])
    base_model = study.removal.loc["base_model"]
    assert base_model.perplexity_retained == 1 and base_model.questions_raw == 1
    assert study.loss_increase.index.tolist() == list(range(8))


def test_other_settings_do_not_mix(finished, model_folder):
    with pytest.raises(ValueError, match="holds a run with .*questions=12"):
        run_study(str(model_folder), out=finished[0])


def test_unfinished_study_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished study"):
        load_study(tmp_path)


def test_a_page_after_each_stage(finished):
    "Each takes the place of the one before it, shows what is measured and says what is still to come."
    out, run = finished
    stages, to_come, pages = zip(*run.pages)
    assert stages == (1, 2, 3, 4) and [bool(words) for words in to_come] == [True, True, True, False]
    assert ["Still to come" in page for page in pages] == [True, True, True, False]
    sections = ("Which can be pruned", "Does a score correlate", "After pruning", "How certain is the choice")
    for n, page in enumerate(pages, 1):
        assert [section in page for section in sections] == [i < n for i in range(len(sections))]
    assert not list(out.rglob("*.part"))


def test_all_choices_of_layers_are_measured_under_one_key(monkeypatch, tmp_path):
    "A key reads every weight of the model."
    asked = []

    def measured(model, tokenizer, choices, *tests, progress, **options):
        asked.append((list(choices), list(progress(choices))))
        return pd.DataFrame()

    monkeypatch.setattr(avss_nb.report, "measure_removal", measured)
    names = ["base_model", *(name for name in QUICK if name not in ("leave_one_out", "random_0"))]
    scores = pd.DataFrame({name: range(8) for name in [*names[1:], "leave_one_out"]}, dtype=float)
    bench = dict(table=lambda name, make: scores, out=tmp_path, model=None, tokenizer=None)
    work = SimpleNamespace(
        **bench,
        settings=Settings(heal_steps=0),
        data=dict(held_out=[], questions=None, sentences=None),
        progress=_Progress(pd.Series({"removing layers": 8.0})),
    )
    _measured_choices(work)
    assert len(asked) == 1 and asked[0][0] == asked[0][1] and {"base_model", *QUICK} == set(asked[0][0])
    assert work.progress.bar.total == pytest.approx(0)  # nothing was measured


def test_scores_alone_are_printed_and_written(model_folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Lamps are lit at dusk. " * 40)
    arguments = ["score", str(model_folder), "--scores", "avss,leave_one_out", "--text", str(tmp_path / "mine.txt")]
    assert main([*arguments, "--max-length", "32", "--out", str(tmp_path / "scores.csv")]) == 0
    printed, table = capsys.readouterr().out, pd.read_csv(tmp_path / "scores.csv", index_col="layer")
    assert [*table.columns] == ["avss", "leave_one_out"] and len(table) == 8
    assert printed.split()[:2] == ["avss", "leave_one_out"] and len(printed.splitlines()) == 10


def test_a_reader_that_has_seen_enough(monkeypatch, capsys):
    "`avss ls scores | head -1` says nothing of a broken pipe."
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["ls", "scores"]) == 0
    monkeypatch.undo()
    assert not capsys.readouterr().err


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    "Of a process that died, say: a run that was cut short is no success."

    def broken(names=None):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(avss_nb.command.LISTS, "scores", broken)
    assert main(["ls", "scores"]) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_nothing_is_loaded_for_a_plan(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(avss_nb.report, "load_model", lambda *args, **options: pytest.fail("loaded"))
    out = str(tmp_path / "out")
    for command, *more in (("study", "--out", out), ("score",), ("prune", "--out", out)):
        assert main([command, str(model_folder), *more, "--dry-run"]) == 0
        memory, minutes = capsys.readouterr().out.splitlines()
        assert memory.startswith("Memory: ") and minutes.startswith("Time: about ")
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_the_layers_that_are_loaded(tmp_path, monkeypatch):
    "Of BART those of the decoder, which reads the text alone."
    config = dict(vocab_size=99, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2)
    BartConfig(**config, encoder_layers=5, decoder_layers=2).save_pretrained(tmp_path)
    seen, plan = [], avss_nb.report.work_plan

    def noting(settings, n_layers, **more):
        seen.append(n_layers)
        return plan(settings, n_layers, **more)

    monkeypatch.setattr(avss_nb.report, "work_plan", noting)
    assert "Time: about" in plan_in_words(Settings(model=str(tmp_path)))
    assert seen == [2]


def test_help_imports_nothing_heavy():
    for command in ([], ["study"], ["score"], ["prune"], ["ls"]):
        code = f"from avss_nb.command import main; main({[*command, '--help']})"
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith("usage: avss") and not re.search(r"\| +(torch|pandas|numpy)\n", done.stderr)


def test_a_fault_of_ours_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(avss_nb.report, "run_study", lambda **options: {}["lost"])
    assert main(["study", "smollm2-135m", "--out", "nowhere"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == [
        "avss study: unexpected KeyError: 'lost' (run it again with --debug to see where)"
    ]
    with pytest.raises(KeyError):
        main(["study", "smollm2-135m", "--out", "nowhere", "--debug"])


@pytest.mark.parametrize("package, extra", [("matplotlib", "report"), ("periodictable", "demo")])
def test_a_missing_extra_is_named_before_work(monkeypatch, capsys, tmp_path, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(avss_nb.report, "load_model", lambda *args, **options: pytest.fail("loaded"))
    assert main(["study", "smollm2-135m", "--out", str(tmp_path / "out")]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"avss study: {package} is not installed: pip install 'avss_nb[{extra}]'"
    assert not list(tmp_path.iterdir())
