"""Measure this package side by side with other libraries: `make bench`.

Writes bench/results.md, the table, and bench/results.json, the numbers behind it. The rivals live in `.venv-bench`,
made
here from bench/requirements.txt. Let the machine be quiet: what other processes took of it is measured and written
down too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch

import measure
from avss_nb.contrastive import FrozenPrefix, contrastive_rows, contrastive_tune
from avss_nb.data import batch_rows, batches, load_questions, load_text
from avss_nb.eavss import AnswerStats, _answer_sums, answer_stats, hallucination_profile
from avss_nb.evaluation import option_logprobs, perplexity, row_losses, text_losses
from avss_nb.tasks import task_items
from avss_nb.hooks import run_blocks
from avss_nb.importance import leave_one_out, sleb
from avss_nb.models import blocks
from avss_nb.cost import decoding_cost
from avss_nb.healing import healing_loss
from avss_nb.surgery import prune_layers, skip_layers
from avss_nb.surgery import projections
from avss_nb.sparsity import make_sparse, mean_sparsity, projection_stats, uniform_plan
from table import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RIVALS = ROOT / ".venv-bench"
SIZES = dict(
    base=(8, 1), batches=(8, 8), rows=(64, 1)
)  # windows a batch, batches: the second and third have eight times the tokens
PARTS = (
    "overhead",
    "leave_one_out",
    "sleb",
    "decoding",
    "sparsity",
    "options",
    "healing",
    "tuning",
    "answers",
    "nulls",
    "memory",
    "rivals",
)  # in this order
HERE_PARTS = PARTS[:10]  # in this process
SEVEN = [3, 12, 13, 14, 17, 25, 26]
RIVAL_WORK = (
    "hidden_states",
    "captum",
    "nnsight_saved",
    "nnsight_reduced",
    "collect_output",
)  # of measure.py; the last is ours

# ---- processes


def rivals_python() -> Path:
    "The interpreter that has the rivals; set up anew when what describes it has changed."
    python, ready = RIVALS / "bin/python", RIVALS / "ready"
    sources = [HERE / "requirements.txt", ROOT / "constraints.txt", ROOT / "settings.ini"]
    if not ready.exists() or ready.stat().st_mtime < max(file.stat().st_mtime for file in sources):
        print("Setting up .venv-bench: about two minutes and 2 GB the first time", flush=True)
        subprocess.run([sys.executable, "-m", "venv", RIVALS], check=True)
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "-c",
                "constraints.txt",
                "-e",
                ".",
                "-r",
                "bench/requirements.txt",
            ],
            cwd=ROOT,
            check=True,
        )
        ready.touch()
    return python


def apart(
    work: str, folder: str, size: tuple[int, int], length: int, pairs: int = 0, python: Path = sys.executable
) -> dict:
    "What measure.py says about this work in a fresh process; `error`, its last line, where it failed."
    print(f"  {work}: {size[1]} × ({size[0]}×{length})", flush=True)
    command = [
        python,
        HERE / "measure.py",
        work,
        "--model",
        folder,
        "--rows",
        size[0],
        "--batches",
        size[1],
        "--length",
        length,
        "--pairs",
        pairs,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"),
    )
    if done.returncode:
        return dict(error=(done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


# ---- the measurements


def overhead(model, data, rounds: int) -> dict:
    "Seconds of the pass through the blocks, of collecting, and of the pass with the head, interleaved."
    runs = {work: lambda f=measure.WORK[work]: f(model, data) for work in ("forward", "collect", "whole_forward")}
    measure.interleaved(runs, 1)
    return measure.interleaved(runs, rounds)


def memory(folder: str, length: int, repeats: int) -> dict:
    "Peak of the plain pass and of collecting at each size, each in fresh processes."
    return {
        size: {
            work: [apart(work, folder, SIZES[size], length)["peak"] for _ in range(repeats if size == "base" else 1)]
            for work in ("forward", "collect")
        }
        for size in SIZES
    }


def rivals(folder: str, length: int, pairs: int) -> dict:
    "Each library at the same work: variance of every block's output."
    python = rivals_python()
    return {work: apart(work, folder, SIZES["base"], length, pairs, python) for work in RIVAL_WORK}


def naive_leave_one_out(model, data) -> list[float]:
    "The loss increase of each layer from the base model run anew without it."

    def loss():
        losses = text_losses(model, data)
        return losses.nll.sum() / losses.tokens.sum()

    whole, damages = loss(), []
    for layer in range(len(blocks(model))):
        with skip_layers(model, [layer]):
            damages.append(loss() - whole)
    return damages


def leave_one_out_both_ways(model, data, repeats: int) -> dict:
    """Median seconds, peak memory and loss increases of leave-one-out with and without reusing hidden states, and
    the seconds that its block and head passes alone take."""
    ways = dict(reused=leave_one_out, naive=naive_leave_one_out)
    plain = dict(
        blocks=lambda: [run_blocks(model, b) for b in data], whole=lambda: [row_losses(model, b) for b in data]
    )
    found, taken, peak, passes = {}, {name: [] for name in ways}, {}, {name: [] for name in plain}
    for _ in range(repeats):
        for name, seconds in measure.interleaved(plain, 3).items():
            passes[name] += seconds
        for name, run in ways.items():
            peak[name], (seconds, found[name]) = measure.peak_memory(lambda: timed(lambda: list(run(model, data))))
            taken[name].append(seconds)
    body, whole, n = median(passes["blocks"]), median(passes["whole"]), len(blocks(model))
    minimum = (n + n * (n - 1) / 2) / n * body + (n + 1) * (whole - body)
    return dict(
        seconds={name: median(seconds) for name, seconds in taken.items()} | dict(minimum=minimum),
        loss_increase=found,
        peak=peak,
    )


def timed(run) -> tuple[float, object]:
    "Seconds that a run takes, and its result."
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def naive_sleb(model, data, n: int) -> list[int]:
    "Greedy removal: each candidate of each round by a whole pass over all the text."
    gone = []
    for _ in range(n):
        cost = {}
        for layer in set(range(len(blocks(model)))) - set(gone):
            with skip_layers(model, [*gone, layer]):
                cost[layer] = text_losses(model, data).nll.sum()
        gone.append(min(cost, key=cost.get))
    return gone


def sleb_both_ways(model, tokenizer, data, held_out, n: int) -> dict:
    """Seconds and choices of SLEB with reuse and a race, and the plain way; held-out perplexity without the layers
    that each chose."""
    seconds, chosen = {}, {}
    for name, run in dict(raced=sleb, naive=naive_sleb).items():
        seconds[name], chosen[name] = timed(lambda: list(map(int, run(model, data, n))))

    def left(layers):
        with skip_layers(model, layers):
            return perplexity(model, held_out)

    return dict(
        seconds=seconds,
        chosen=chosen,
        perplexity={name: left(layers) for name, layers in chosen.items()},
        tokens=data.n_tokens,
    )


def sparse_decoding(model, data, shares: list[float], n_tokens: int, repeats: int) -> dict:
    """Milliseconds a token of the dense model, of sparse ones by columns and of one by masks alone, in turn; what
    the sparse ones left out while they decoded, and the limit from the parameters that are then read."""

    def plan(share):
        return uniform_plan(model, share)

    calibrated = {share: projection_stats(model, data, plan=plan(share)) for share in shares}
    models = {
        f"{share:g}": make_sparse(model, share, rule="threshold", stats=stats) for share, stats in calibrated.items()
    }
    models["masked"] = make_sparse(model, shares[0], rule="threshold", stats=calibrated[shares[0]], sparse_gemv=False)
    cost, of_maps = (
        decoding_cost(dict(dense=model) | models, n_tokens=n_tokens, repeats=repeats),
        sum(m.weight.numel() for block in blocks(model) for m in projections(block).values()),
    )
    found = {}
    for name, sparse in models.items():
        zeros, handles = {}, []
        for layer, block in enumerate(blocks(sparse)):
            for part, m in projections(block).items():
                handles.append(
                    m.register_forward_pre_hook(
                        lambda m, args, key=(layer, part): (
                            zeros.setdefault(key, []).append((m.sparse(args[0]) == 0).double().mean().item())
                            if args[0].shape[1] == 1
                            else None
                        )
                    )
                )
        decoding_cost({name: sparse}, n_tokens=n_tokens, repeats=1)
        for handle in handles:
            handle.remove()
        realised = mean_sparsity(
            model, pd.Series({key: float(np.mean(values)) for key, values in zeros.items()}).unstack()
        )
        found[name] = dict(
            milliseconds=cost.milliseconds[name],
            speedup=cost.speedup[name],
            realised=realised,
            ideal=model.num_parameters() / (model.num_parameters() - realised * of_maps),
        )
    return dict(dense=cost.milliseconds["dense"], sparse=found)


def options_both_ways(model, tokenizer, n: int, rounds: int) -> dict:
    "Seconds of the likelihoods of the atlas's options, by our fast path and by lm-eval, and the largest difference."
    atlas, found = load_questions("atlas").select(range(n)), {}
    prompts = [f"Question: {q}\nAnswer:" for q in atlas["question"]]
    options = [[f" {o}" for o in (a[0], *wrong)] for a, wrong in zip(atlas["answers"], atlas["distractors"])]

    def ours():
        found["ours"] = option_logprobs(model, tokenizer, prompts, options).logprob.tolist()

    def theirs():
        found["lm_eval"] = task_items(model, tokenizer, "atlas", limit=n, batch_size=32).logprobs.explode().tolist()

    runs = dict(ours=ours, lm_eval=theirs)
    measure.interleaved(runs, 1)
    seconds = measure.interleaved(runs, rounds)
    return dict(
        seconds=seconds,
        apart=max(abs(a - b) for a, b in zip(found["ours"], found["lm_eval"], strict=True)),
        questions=n,
    )


def healing_step(model, data, rounds: int) -> dict:
    """Seconds of distilling one batch, forward and backward; with torch's own divergence; and of the plain passes in
    it: the teacher's, the student's and the way back."""
    from peft import LoraConfig, get_peft_model

    small, ids = (
        get_peft_model(prune_layers(model, SEVEN), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
        data[0]["input_ids"],
    )

    def torchs(student, ids, teacher):
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        return torch.nn.functional.kl_div(
            student(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1),
            target,
            log_target=True,
            reduction="batchmean",
        )

    def plain():
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        logits = small(input_ids=ids, use_cache=False).logits
        logits.backward(torch.ones_like(logits))

    with torch.enable_grad():
        runs = dict(
            ours=lambda: healing_loss(small, ids, teacher=model).backward(),
            torch=lambda: torchs(small, ids, model).backward(),
            plain=plain,
        )
        measure.interleaved(runs, 1)
        return dict(seconds=measure.interleaved(runs, rounds), tokens=ids.numel())


def tuning_both_ways(model, tokenizer, layers: list[int], n: int, steps: int, rounds: int) -> dict:
    """Seconds a step of contrastive training with the frozen blocks passed over and by the plain Trainer, in turn;
    each step's loss; seconds of the one pass through the frozen blocks."""
    questions, found = (
        load_questions("atlas").select(range(n)),
        dict(layers=layers, questions=n, seconds=dict(reused=[], plain=[]), losses={}),
    )
    with torch.enable_grad():
        found["prefix"], prefix = timed(
            lambda: FrozenPrefix(model, tokenizer, contrastive_rows(tokenizer, questions)[0], layers[:1])
        )
        for way, reuse in [("reused", prefix), ("plain", False)] * rounds:
            times, found["losses"][way] = [], []
            contrastive_tune(
                model,
                tokenizer,
                questions,
                layers,
                steps=steps,
                reuse=reuse,
                on_step=lambda step, terms: (
                    times.append(time.perf_counter()),
                    found["losses"][way].append(terms["loss"]),
                ),
            )
            found["seconds"][way].append((times[-1] - times[0]) / (steps - 1))
    return found


def reading_answers(model, tokenizer, n: int, rounds: int) -> dict:
    """Seconds of the pass through the blocks over answers with their prompts, and of collecting the answers'
    statistics, interleaved."""
    texts = [
        ids[: 40 + 5 + i % 11] for i, ids in enumerate(tokenizer(load_text("pydoc", split="train", n=n)).input_ids)
    ]  # answers of 5 to 15 tokens
    answers = dict(
        id=list(range(n)), prompt_tokens=[ids[:40] for ids in texts], answer_tokens=[ids[40:] for ids in texts]
    )
    runs = dict(
        forward=lambda: [
            run_blocks(model, batch) for batch in batch_rows(list(enumerate(texts)), tokenizer, batch_size=16)
        ],
        collect=lambda: answer_stats(model, tokenizer, answers),
    )
    measure.interleaved(runs, 1)
    return dict(seconds=measure.interleaved(runs, rounds), answers=n, tokens=sum(map(len, texts)))


def profiles(n: int, times: int, repeats: int) -> dict:
    """Seconds of the profiles at two points: answers of a made-up network of 30 layers, as many permutations and as
    many bootstrap samples."""
    owner, draw, sums = torch.arange(n).repeat_interleave(8), torch.Generator().manual_seed(0), {}
    for point in ("output", "relative_update"):
        layers = [_answer_sums(torch.randn(len(owner), 64, generator=draw), owner, n) for _ in range(30)]
        sums |= {f"{point}.{q}": torch.stack([layer[q] for layer in layers], 1) for q in layers[0]}
    stats, labels = AnswerStats(sums, [8] * n), np.arange(n) % 2 == 0
    runs = {
        within: lambda within=within: [
            hallucination_profile(
                stats, labels, groups=np.arange(n) // 4, n_permutations=times, n_resamples=times, point=p, within=within
            )
            for p in stats.points
        ]
        for within in (None, "question")
    }
    return {str(within): [timed(run)[0] for _ in range(repeats)] for within, run in runs.items()} | dict(
        answers=n, times=times
    )


def machine() -> dict:
    "What the numbers depend on."
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions={name: version(name) for name in ("torch", "transformers")},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that all of it runs; prints the table and writes nothing",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="measure these anew, and take the others from results.json",
    )
    given = parser.parse_args()
    quick, only = given.quick, given.only
    length, rounds, repeats, pairs = (16, 2, 1, 1) if quick else (256, 9, 3, 3)
    torch.set_grad_enabled(False)
    model, tokenizer = measure.load()
    folder = model.config._name_or_path

    def passages(split, length):
        return batches(
            load_text("pydoc", split=split, n=16), tokenizer, max_length=length, overflow="truncate", batch_size=4
        )

    parts = dict(
        overhead=lambda: overhead(model, measure.passages(tokenizer, *SIZES["base"], length), rounds),
        leave_one_out=lambda: leave_one_out_both_ways(model, measure.passages(tokenizer, 4, 1, length), repeats),
        sleb=lambda: sleb_both_ways(
            model, tokenizer, passages("train", length // 4), passages("test", length), 2 if quick else 7
        ),
        decoding=lambda: (
            decoding_cost(
                dict(whole=model, pruned=prune_layers(model, SEVEN)), n_tokens=4 if quick else 32, repeats=repeats + 2
            )
            .loc["pruned"]
            .to_dict()
        ),
        sparsity=lambda: sparse_decoding(
            model, measure.passages(tokenizer, 16, 1, length // 4), [0.5, 0.65, 0.8], 4 if quick else 32, repeats + 2
        ),
        options=lambda: options_both_ways(model, tokenizer, 4 if quick else 64, repeats),
        healing=lambda: healing_step(model, measure.passages(tokenizer, 4, 1, length // 2), repeats + 2),
        tuning=lambda: tuning_both_ways(
            model, tokenizer, list(range(20, 25)), 8 if quick else 48, 3 if quick else 13, 1 if quick else 3
        ),
        answers=lambda: reading_answers(model, tokenizer, 8 if quick else 64, rounds),
        nulls=lambda: profiles(*((40, 20) if quick else (1000, 1000)), repeats),
        memory=lambda: memory(folder, length, repeats),
        rivals=lambda: rivals(folder, length, pairs),
    )
    results = dict(machine=machine(), length=length, sizes=SIZES)
    if set(only) != set(PARTS):
        kept = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
        elsewhere = kept.pop("elsewhere", {}) | {part: results["machine"] for part in only}
        results = kept | dict(elsewhere={part: m for part, m in elsewhere.items() if m != kept["machine"]})
    start, others = time.time(), measure.cpu_of_others()
    for part in HERE_PARTS:
        if part in only:
            results[part] = parts[part]()
    if set(only) & set(HERE_PARTS):
        results["others"] = (measure.cpu_of_others() - others) / (time.time() - start) / os.cpu_count()
    del model  # what follows runs in processes of its own
    for part in PARTS[len(HERE_PARTS) :]:
        if part in only:
            results[part] = parts[part]()
    text = page(results)
    print(text)
    if not quick:
        (HERE / "results.md").write_text(text, encoding="utf-8")
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
