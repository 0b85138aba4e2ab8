"""Measure this package side by side with other libraries: `make bench`.

Writes bench/results.md, the table, and bench/results.json, the numbers behind it. The rivals live in `.venv-bench`, made
here from bench/requirements.txt. Let the machine be quiet: what other processes took of it is measured and written down too.
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

import torch

import measure
from avss_nb.evaluation import text_losses
from avss_nb.importance import leave_one_out
from avss_nb.models import blocks, load_model
from avss_nb.pruning import skip_layers
from table import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RIVALS = ROOT/".venv-bench"
SIZES = dict(base=(8, 1), batches=(8, 8), rows=(64, 1))   # windows a batch, batches: the second and third have eight times the tokens
RIVAL_WORK = ("hidden_states", "captum", "nnsight_saved", "nnsight_reduced", "collect_output")   # of measure.py; the last is ours

# ---- processes

def rivals_python() -> Path:
    "The interpreter that has the rivals; set up anew when what describes it has changed."
    python, ready = RIVALS/"bin/python", RIVALS/"ready"
    sources = [HERE/"requirements.txt", ROOT/"constraints.txt", ROOT/"settings.ini"]
    if not ready.exists() or ready.stat().st_mtime < max(file.stat().st_mtime for file in sources):
        print("Setting up .venv-bench: about two minutes and 2 GB the first time", flush=True)
        subprocess.run([sys.executable, "-m", "venv", RIVALS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".", "-r", "bench/requirements.txt"], cwd=ROOT, check=True)
        ready.touch()
    return python

def apart(work: str, folder: str, size: tuple[int, int], length: int, pairs: int = 0, python: Path = sys.executable) -> dict:
    "What measure.py says about this work in a fresh process; `error`, its last line, where it failed."
    print(f"  {work}: {size[1]} × ({size[0]}×{length})", flush=True)
    command = [python, HERE/"measure.py", work, "--model", folder, "--rows", size[0], "--batches", size[1], "--length", length, "--pairs", pairs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"))
    if done.returncode: return dict(error=(done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])

# ---- the measurements

def overhead(model, data, rounds: int) -> dict:
    "Seconds of the pass through the blocks, of collecting, and of the pass with the head, interleaved."
    runs = {work: lambda f=measure.WORK[work]: f(model, data) for work in ("forward", "collect", "whole_forward")}
    measure.interleaved(runs, 1)
    return measure.interleaved(runs, rounds)

def memory(folder: str, length: int, repeats: int) -> dict:
    "Peak of the plain pass and of collecting at each size, each in fresh processes."
    return {size: {work: [apart(work, folder, SIZES[size], length)["peak"] for _ in range(repeats if size == "base" else 1)] for work in ("forward", "collect")}
            for size in SIZES}

def rivals(folder: str, length: int, pairs: int) -> dict:
    "Each library at the same work: variance of every block's output."
    python = rivals_python()
    return {work: apart(work, folder, SIZES["base"], length, pairs, python) for work in RIVAL_WORK}

def naive_leave_one_out(model, data) -> list[float]:
    "The damage of each layer from the whole model run anew without it."
    def loss():
        losses = text_losses(model, data)
        return losses.nll.sum() / losses.tokens.sum()
    whole, damages = loss(), []
    for layer in range(len(blocks(model))):
        with skip_layers(model, [layer]): damages.append(loss() - whole)
    return damages

def leave_one_out_both_ways(model, data) -> dict:
    "Seconds and damages of leave-one-out with and without reusing hidden states."
    found = {}
    seconds = {name: measure.seconds(lambda: found.update({name: list(run(model, data))})) for name, run in dict(reused=leave_one_out, naive=naive_leave_one_out).items()}
    return dict(seconds=seconds, damage=found)

def machine() -> dict:
    "What the numbers depend on."
    cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
                versions={name: version(name) for name in ("torch", "transformers")})

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs; prints the table and writes nothing")
    quick = parser.parse_args().quick
    length, rounds, repeats, pairs = (16, 2, 1, 1) if quick else (256, 9, 3, 3)
    torch.set_grad_enabled(False)
    model, tokenizer = measure.load()
    folder = model.config._name_or_path
    start, others = time.time(), measure.cpu_of_others()
    results = dict(machine=machine(), length=length, sizes=SIZES, overhead=overhead(model, measure.passages(tokenizer, *SIZES["base"], length), rounds))
    results["leave_one_out"] = leave_one_out_both_ways(model, measure.passages(tokenizer, 4, 1, length))
    results["others"] = (measure.cpu_of_others() - others) / (time.time() - start) / os.cpu_count()
    del model
    results["memory"] = memory(folder, length, repeats)
    results["rivals"] = rivals(folder, length, pairs)
    text = page(results)
    print(text)
    if not quick:
        (HERE/"results.md").write_text(text, encoding="utf-8")
        (HERE/"results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
