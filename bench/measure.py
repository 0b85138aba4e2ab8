"""One measurement in a process of its own: what reading the activations costs beside the plain pass.

    python bench/measure.py collect --rows 8 --batches 1 --pairs 3

prints one line of JSON: peak memory above the loaded model (MB), seconds of each pass, variance of each block's output.
"""

import argparse
import json
import os
import time
from itertools import islice
from importlib.metadata import version
from pathlib import Path

import torch

from avss_nb.data import batches, load_text
from avss_nb.hooks import model_inputs, run_blocks
from avss_nb.metrics import collect_stats, variance
from avss_nb.models import blocks, load_model

# ---- the work: each function runs all batches; those that read the activations return the variance of each block's
# output


def forward(model, data):
    "The plain pass through the blocks: what everything else is compared with."
    for batch in data:
        run_blocks(model, batch)


def whole_forward(model, data):
    "The pass with the output head, as a user runs the model."
    for batch in data:
        model(**model_inputs(model, batch))


def collect(model, data):
    "This package: two reading points, sums and histogram."
    return variance(collect_stats(model, data), point="output").tolist()


def collect_output(model, data):
    "This package, reading the blocks' outputs alone, as the others do."
    return variance(collect_stats(model, data, points=("output",)), point="output").tolist()


def hidden_states(model, data):
    "transformers' own way."

    def read(inputs):
        return model.base_model(**inputs, output_hidden_states=True).hidden_states[1:]

    return pool(moments(read(inputs)) for inputs in body_inputs(model, data))


def captum(model, data):
    "captum's LayerActivation over all blocks at once."
    from captum.attr import LayerActivation

    def run(ids, mask):
        return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    reader = LayerActivation(run, list(blocks(model)))
    return pool(
        moments(reader.attribute(batch["input_ids"], additional_forward_args=(batch["attention_mask"],)))
        for batch in data
    )


def nnsight_saved(model, data):
    "nnsight, each block's output saved, and reduced after the trace."
    import nnsight

    body = nnsight.NNsight(model.base_model)

    def read(inputs):
        with body.trace(**inputs):
            outputs = nnsight.save([])
            for layer in body.layers:
                outputs.append(layer.output)
        return outputs

    return pool(moments(read(inputs)) for inputs in body_inputs(model, data))


def nnsight_reduced(model, data):
    "nnsight, each block's output reduced inside the trace."
    import nnsight

    body = nnsight.NNsight(model.base_model)

    def read(inputs):
        with body.trace(**inputs):
            found = nnsight.save([])
            for layer in body.layers:
                found.append(torch.var_mean(layer.output, correction=0))
        return found

    return pool(read(inputs) for inputs in body_inputs(model, data))


WORK = {
    f.__name__: f
    for f in (forward, whole_forward, collect, collect_output, hidden_states, captum, nnsight_saved, nnsight_reduced)
}

LIBRARIES = dict(
    hidden_states="transformers", captum="captum", nnsight_saved="nnsight", nnsight_reduced="nnsight"
)  # where the work is not ours


def body_inputs(model, data):
    return (model_inputs(model.base_model, batch) for batch in data)


def moments(outputs) -> list[tuple]:
    "Variance and mean of each block's output."
    return [torch.var_mean(output, correction=0) for output in outputs]


def pool(moments_of_batches) -> list[float]:
    "Variance of each block over batches of equal size."
    var, mean = torch.tensor(list(moments_of_batches), dtype=torch.float64).unbind(-1)
    return ((var + mean**2).mean(0) - mean.mean(0) ** 2).tolist()


# ---- the measures


def passages(tokenizer, rows: int, n_batches: int, length: int = 256):
    "Batches of full windows of pydoc: no padding, so that every library does the same work."
    texts = load_text("pydoc", split="train")
    long = (i for i, ids in enumerate(tokenizer(texts).input_ids) if len(ids) >= length)
    texts = [texts[i] for i in islice(long, rows * n_batches)]
    data = list(batches(texts, tokenizer, max_length=length, batch_size=rows, overflow="truncate"))
    assert len(data) == n_batches and all(
        batch["token_mask"].shape == (rows, length) and batch["token_mask"].all() for batch in data
    )
    return data


def memory_now(field: str) -> float:
    "`VmRSS` (resident now) or `VmHWM` (its peak) of this process in MB, from Linux."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_memory(run) -> tuple[float, object]:
    """Peak of resident memory while `run` runs, above what there was before (MB), and its result. The kernel's peak
    is reset first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_now("VmRSS")
    result = run()
    return memory_now("VmHWM") - before, result


def seconds(run) -> float:
    "Wall time of one run."
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(runs: dict, rounds: int) -> dict[str, list[float]]:
    "Seconds of each run in each round; every other round goes in the opposite order."
    taken = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            taken[name].append(seconds(runs[name]))
    return taken


def cpu_of_others() -> float:
    "CPU seconds since the machine started that were not idle and not this process's."
    ticks = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def load(model_folder: str = None):
    """The model with its weights in memory of its own: pages of the mapped file come and go, and would be charged to
    a later pass."""
    model, tokenizer = load_model(model_folder or "smollm2-135m", device="cpu")
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--model", help="a model folder; default: the bundled model")
    parser.add_argument("--rows", type=int, default=8, help="windows a batch")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--pairs", type=int, default=0, help="timed pairs with the plain pass, after the memory")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load(given.model)
    data, work = passages(tokenizer, given.rows, given.batches, given.length), WORK[given.work]
    for run in (forward, work):
        run(model, passages(tokenizer, 1, 1, 16))
    peak, variances = peak_memory(lambda: work(model, data))
    taken = interleaved(dict(forward=lambda: forward(model, data), work=lambda: work(model, data)), given.pairs)
    print(
        json.dumps(
            dict(peak=peak, seconds=taken, variance=variances, version=version(LIBRARIES.get(given.work, "torch")))
        )
    )


if __name__ == "__main__":
    main()
