"""Children that are killed: runs are forked from one process with everything imported, and get SIGKILL at a moment
drawn by a seed, until they finish."""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer

import avss_nb.labeling
import avss_nb.report
import avss_nb.shipping
from avss_nb.ablations import run_variants
from avss_nb.contrastive import contrastive_tune
from avss_nb.labeling import generate_answers
from avss_nb.models import load_model
from avss_nb.report import Settings, measure, study_data
from test_contrastive import QUESTIONS, SHORT, Letters, chosen
from tiny import tiny

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is one for all processes, and stays locked when its holder is killed
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def _place(event: str, args: tuple) -> str | None:
    "The path that an event is about to change, None for one that changes nothing."
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return str(args[0])
    return str(args[0]) if event in CHANGES else None


def kill_before_change(folder: Path, n: int, torn: bool):
    "Kill this process before its n-th change below a folder; `torn`: what was last written is there by half."
    seen, last, armed = 0, None, True

    def hook(event: str, args: tuple):
        nonlocal seen, last, armed
        path = _place(event, args) if armed else None
        if path is None or not path.startswith(str(folder)):
            return
        seen += 1
        if seen == n:
            armed = False
            if torn and last and os.path.isfile(last):
                os.truncate(last, os.path.getsize(last) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open":
            last = path

    sys.addaudithook(hook)


def child(
    job: Callable[[Path], None], folder: Path, before: Callable[[], None] = lambda: None, patience: float = 60
) -> int:
    "Fork a process that does the job; its id. One that hangs is killed after `patience` seconds."
    if pid := os.fork():
        return pid
    signal.alarm(int(patience))
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        before()
        job(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def endure(job: Callable[[Path], None], folder: Path, dice: random.Random, most_changes: int, seconds: float) -> dict:
    """Start, kill, start again until the job ends by itself: how often it was killed, and between two changes or at a
    point in time."""
    counts, first = dict(changes=0, torn=0, time=0), iter((1, 2, 3, 4))  # the first changes claim the folder
    while True:
        early = next(first, None)
        kind = dice.choice(("changes", "torn", "time")) if early is None else "torn"
        if kind == "time":
            pid = child(job, folder)
            time.sleep(dice.uniform(0, 0.6 * seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            n = early or dice.randint(2, most_changes)
            pid = child(job, folder, lambda: kill_before_change(folder, n, kind == "torn"))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return counts
        if status != -signal.SIGKILL:
            raise SystemExit(f"after {counts} kills the run in {folder} ended with {status}")
        counts[kind] += 1


def undisturbed(job: Callable[[Path], None], folder: Path) -> float:
    "Seconds of a run that is left alone."
    start = time.perf_counter()
    if status := os.waitstatus_to_exitcode(os.waitpid(child(job, folder), 0)[1]):
        raise SystemExit(f"the undisturbed run in {folder} ended with {status}")
    return time.perf_counter() - start


SMALL = dict(passages=4, questions=6, sentences=4, max_length=16, device="cpu")
ASKED = [
    dict(id=f"q{i}", question=f"{i} {'or ' * (i % 3)}so?", answers=["x"], distractors=["y"], source="t")
    for i in range(40)
]


def jobs(model_folder: str) -> dict[str, Callable[[Path], None]]:
    "What is run: each leaves its result as files."
    wanted = Settings(model=model_folder, **SMALL)
    data, parts = study_data(wanted), load_model(model_folder, device="cpu")
    llama, tokenizer = tiny("llama"), AutoTokenizer.from_pretrained(model_folder)
    for module in (avss_nb.report, avss_nb.shipping):
        module.study_data = lambda settings: data
        module.load_model = lambda *args, **options: parts
    avss_nb.labeling._CHUNK = 2

    def study(out: Path):
        measure(wanted, out)

    def prune(out: Path):
        if not out.exists():
            avss_nb.shipping.prune_to_folder(model_folder, out=out, **SMALL)

    def answers(out: Path):
        generate_answers(parts[0], tokenizer, Dataset.from_list(ASKED), n_samples=1, max_new_tokens=6, stop=(), out=out)

    trainings = dict(
        top=[dict(layers=[2, 3], rank=2)], last=[dict(layers=[4], rank=2, objective=None)], base_model=None
    )

    def variants(out: Path):
        run_variants(
            llama, Letters(), QUESTIONS, trainings, chosen, seeds=(0,), out=out, **SHORT | dict(steps=6, save_every=2)
        )

    def tune(out: Path):
        torch.save(
            contrastive_tune(
                llama, Letters(), QUESTIONS, [3], out=out, **SHORT | dict(steps=6, save_every=2)
            ).state_dict(),
            f"{out}.weights",
        )

    return dict(study=study, prune=prune, answers=answers, variants=variants, tune=tune)


if __name__ == "__main__":
    place, model_folder, seed, plan = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    counts, dice = {}, random.Random(seed)
    for name, job in jobs(model_folder).items():
        if name not in plan:
            continue
        seconds = undisturbed(job, place / f"{name}-whole")
        counts[name] = []
        while sum(sum(t.values()) for t in counts[name]) < plan[name]["kills"]:
            counts[name].append(
                endure(job, place / f"{name}-{len(counts[name])}", dice, plan[name]["changes"], seconds)
            )
        print(name, round(seconds, 1), counts[name], round(time.process_time(), 1), file=sys.stderr, flush=True)
    print(json.dumps(counts))
