"""The pages of `make bench` and `make profile`, on made-up numbers."""

import importlib.util

import pytest

from conftest import ROOT


def part_of_bench(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, chapters = part_of_bench("table"), part_of_bench("chapters")


@pytest.fixture
def results() -> dict:
    rival = dict(
        peak=150.0, seconds=dict(forward=[2.0, 2.0, 4.0], work=[3.0, 2.2, 8.0]), variance=[1.0, 2.0, 4.0], version="1.2"
    )
    return dict(
        machine=dict(cpu="a CPU", cores=2, threads=2, python="3.11", versions=dict(torch="2", transformers="5")),
        length=256,
        others=0.01,
        sizes=dict(base=(8, 1), batches=(8, 8)),
        overhead=dict(forward=[1.0, 1.0, 2.0], collect=[1.05, 1.2, 2.1], whole_forward=[2.0, 2.0, 2.0]),
        memory=dict(
            base=dict(forward=[100.0, 101.0, 140.0], collect=[105.0, 104.0, 90.0]),
            batches=dict(forward=[100.0], collect=[140.0]),
        ),
        leave_one_out=dict(
            seconds=dict(reused=30.0, naive=60.0, minimum=25.0),
            loss_increase=dict(reused=[1.0, 2.0], naive=[1.0, 2.5]),
            peak=dict(reused=300.0, naive=200.0),
        ),
        sleb=dict(
            seconds=dict(raced=20.0, naive=50.0),
            chosen=dict(raced=[1, 2], naive=[1, 3]),
            perplexity=dict(raced=10.05, naive=10.0),
            tokens=1024,
        ),
        decoding=dict(speedup=1.2, ideal=1.25, of_ideal=0.96),
        options=dict(seconds=dict(ours=[1.0, 2.0], lm_eval=[3.0, 6.0]), apart=2e-5, questions=64),
        sparsity=dict(
            dense=30.0,
            sparse={
                "0.5": dict(milliseconds=20.0, speedup=1.5, realised=0.51, ideal=1.65),
                "0.8": dict(milliseconds=31.0, speedup=0.97, realised=0.8, ideal=2.7),
                "masked": dict(milliseconds=32.0, speedup=0.94, realised=0.51, ideal=1.65),
            },
        ),
        healing=dict(seconds=dict(ours=[3.0, 3.0], plain=[2.0, 2.0], torch=[4.0, 4.0]), tokens=512),
        tuning=dict(
            seconds=dict(plain=[2.0, 3.0, 2.0], reused=[1.0, 1.0, 2.0]),
            losses=dict(plain=[2.0, 1.0], reused=[2.0, 1.00002]),
            layers=[20, 21, 22],
            questions=48,
            prefix=24.0,
        ),
        answers=dict(seconds=dict(forward=[1.0, 2.0, 1.0], collect=[1.1, 2.4, 1.12]), answers=64, tokens=3000),
        nulls={"None": [1.0, 1.5, 2.0], "question": [6.0, 6.0, 5.0]} | dict(answers=1000, times=1000),
        rivals=dict(
            hidden_states=rival | dict(variance=[1.0, 2.0, 1.0]),
            captum=dict(error="ImportError: no captum"),
            collect_output=rival,
        ),
    )


def test_every_figure_stands_beside_its_bar(results):
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.page(results).splitlines()
        if line.startswith("|")
    ]
    figures = {cells[0]: cells[1:] for cells in lines}
    assert figures["Time of `collect_stats` over the pass through the blocks alone"] == [
        "1.050 (1.050 to 1.200)",
        "≤ 1.10",
        "yes",
    ]
    assert figures["Peak memory above the forward pass's own, 1 batch of 8×256"] == [
        "3.0 MB (forward 101 MB)",
        "≤ 32 MB",
        "yes",
    ]
    assert figures["Peak memory above the forward pass's own, 8 batches of 8×256"][1:] == ["≤ 32 MB", "**no**"]
    assert figures["… largest relative difference of a layer's loss increase"][0::2] == ["2.0e-01", "**no**"]
    assert figures["Leave-one-out with reused hidden states: times faster than the naive way, 1,024 tokens"] == [
        "2.00 (30 s, 60 s)",
        "≥ 1.5",
        "yes",
    ]
    assert figures["… time over that of its block and head passes alone"] == ["1.200", "≤ 1.15", "**no**"]
    assert figures["SLEB for 2 blocks with reuse and a race: times faster than the naive way, 1,024 tokens"] == [
        "2.50 (20 s, 50 s)",
        "≥ 3",
        "**no**",
    ]
    assert figures["… held-out perplexity of its choice over that of the naive choice"] == [
        "+0.5% (10.1, 10.0)",
        "≤ +1 %",
        "yes",
    ]
    assert figures[
        (
            "Decoding without 7 of 30 blocks: speed-up over the base model, as a part of the ideal (ratio of the "
            "parameters)"
        )
    ] == ["0.960 (1.200 of 1.250)", "≥ 0.95", "yes"]
    assert figures["Decoding at 50% activation sparsity: times faster than dense"] == [
        "1.50 (20.0 ms, 30.0 ms)",
        "≥ 1.2",
        "yes",
    ] and figures["Decoding at 80% activation sparsity: times faster than dense"][1:] == ["≥ 1", "**no**"]
    assert (
        figures["… as a part of the limit from the parameters read, 51.0% of the projections' inputs being zero"]
        == ["0.91 (of 1.65)", "–", ""]
        and figures["… with masks and dense products instead"][0] == "0.94 (32.0 ms, 30.0 ms)"
    )
    assert figures[
        "Likelihoods of the options of 64 atlas questions: times faster than lm-eval, its set-up included"
    ] == ["3.000 (3.000 to 3.000)", "≥ 1", "yes"]
    assert figures["… over the same step with torch's `kl_div`"][0] == "0.750 (0.750 to 0.750)"
    assert figures[
        (
            "Contrastive training of blocks 20 to 22 of 30, the frozen ones below passed over: steps a second, times "
            "the plain Trainer's"
        )
    ] == ["2.000 (1.000 to 3.000)", "≥ 1.5", "yes"]
    assert (
        figures["… largest relative difference of a step's loss"] == ["2e-05", "≤ 1e-05", "**no**"]
        and figures["… epochs after which the one pass through the frozen blocks is paid for"][0] == "2.0"
    )
    assert figures[
        "Time of `answer_stats` over the pass through the blocks alone, 64 answers, 3,000 tokens with their prompts"
    ] == ["1.120 (1.100 to 1.200)", "≤ 1.15", "yes"]
    size = "of 1,000 answers × 30 layers × 2 points, 1,000 permutations and 1,000 bootstrap samples"
    assert figures[f"Profile {size}"] == ["1.50 s", "≤ 5 s", "yes"] and figures[f"Paired profile {size}"] == [
        "6.00 s",
        "≤ 5 s",
        "**no**",
    ]
    assert figures["transformers 1.2, `output_hidden_states=True`"] == [
        "1.500 (1.100 to 2.000)",
        "49 MB",
        "0e+00",
        "8e-01",
    ]
    assert figures["captum , `LayerActivation`"][0] == "failed: ImportError: no captum"


def test_a_part_that_was_not_measured_yet_has_no_row(results):
    del results["sparsity"]
    assert "activation sparsity" not in table.page(results) and "Likelihoods of the options" in table.page(results)


def test_where_the_time_goes():
    "Sections follow each other and add up; functions hold each other, so the longest is the whole."
    found = {
        "23_importance": {"Two draws": 70.0, "Removal": 20.4, "Toys": 0.2},
        "10_models": {"top": 8.0},
        chapters.STUDY: {"study.run_study": 500.0, "study.measure": 400.0},
    }
    lines = chapters.page(
        found, dict(cpu="a CPU", cores=2, threads=2, python="3.11", versions=dict(torch="2", transformers="5"))
    ).splitlines()
    assert lines[2] == "Written by `make profile`. a CPU, 2 cores, torch 2, transformers 5, Python 3.11."
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1:5] == [
        "| --- | ---: | --- |",
        "| 10_models | 8 | top (8) |",
        "| 23_importance | 91 | Two draws (70); Removal (20) |",
        "| all | 99 | |",
    ]
    assert "500 seconds under the profiler, alone, with all cores." in lines and rows[-1] == "| `study.measure` | 400 |"


def test_a_chapter_is_timed_by_its_sections(capsys):
    found = chapters.apart("94_glossary", 1)
    assert found and min(found.values()) >= 0 and list(found.values()) == sorted(found.values(), reverse=True)
    assert capsys.readouterr().out.startswith("94_glossary: ")
    with pytest.raises(SystemExit, match="99_none does not run"):
        chapters.apart("99_none", 1)
