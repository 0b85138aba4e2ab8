"""The page that `make bench` writes, from its numbers."""

from statistics import median

TIME_BAR, ANSWERS_BAR, MEMORY_BAR = 1.10, 1.15, 32  # times the plain pass; MB above it
NAMES = dict(
    hidden_states="transformers {}, `output_hidden_states=True`",
    captum="captum {}, `LayerActivation`",
    nnsight_saved="nnsight {}, outputs saved",
    nnsight_reduced="nnsight {}, reduced inside the trace",
    collect_output="avss_nb, output alone",
)


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*titles) -> str:
    return row(*titles) + "\n" + row(*["---"] * len(titles))


def against(figure: float, bar: float, unit: str = "") -> tuple[str, str]:
    "A bar, and whether the figure meets it."
    return f"≤ {bar:g}{unit}" if unit else f"≤ {bar:.2f}", "yes" if figure <= bar else "**no**"


def at_least(figure: float, bar: float) -> tuple[str, str]:
    "A lower bar, and whether the figure meets it."
    return f"≥ {bar:g}", "yes" if figure >= bar else "**no**"


def ratios(over: list[float], under: list[float]) -> list[float]:
    "Ratio of each pair, ascending."
    return sorted(a / b for a, b in zip(over, under, strict=True))


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def above(peaks: list[float], forward: list[float]) -> float:
    "MB that a median peak lies above the plain pass's."
    return median(peaks) - median(forward)


def relative(values: list[float], true: list[float]) -> float:
    "Largest relative difference."
    return max(abs(v - t) / abs(t) for v, t in zip(values, true, strict=True))


def time_rows(results: dict) -> list[str]:
    taken = results["overhead"]
    to = {name: ratios(taken["collect"], taken[name]) for name in ("forward", "whole_forward")}
    label = dict(
        forward="Time of `collect_stats` over the pass through the blocks alone",
        whole_forward="Time of `collect_stats` over the whole forward pass, with the head",
    )
    return [row(label[name], spread(r), *against(median(r), TIME_BAR)) for name, r in to.items()]


def memory_rows(results: dict) -> list[str]:
    def label(rows, n):
        return f"Peak memory above the forward pass's own, {n} batch{'es' * (n > 1)} of {rows}×{results['length']}"

    def figure(peaks):
        return above(peaks["collect"], peaks["forward"])

    return [
        row(
            label(*results["sizes"][size]),
            f"{figure(peaks):.1f} MB (forward {median(peaks['forward']):.0f} MB)",
            *against(figure(peaks), MEMORY_BAR, " MB"),
        )
        for size, peaks in results["memory"].items()
    ]


def leave_one_out_rows(results: dict) -> list[str]:
    found = results["leave_one_out"]
    seconds, loss_increase = found["seconds"], found["loss_increase"]
    faster, over = seconds["naive"] / seconds["reused"], seconds["reused"] / seconds["minimum"]
    return [
        row(
            "Leave-one-out with reused hidden states: times faster than the naive way, 1,024 tokens",
            f"{faster:.2f} ({seconds['reused']:.0f} s, {seconds['naive']:.0f} s)",
            *at_least(faster, 1.5),
        ),
        row("… time over that of its block and head passes alone", f"{over:.3f}", *against(over, 1.15)),
        row(
            "… peak memory (the naive way's)",
            f"{found['peak']['reused']:.0f} MB ({found['peak']['naive']:.0f} MB)",
            "–",
            "",
        ),
        row(
            "… largest relative difference of a layer's loss increase",
            f"{relative(loss_increase['reused'], loss_increase['naive']):.1e}",
            *against(relative(loss_increase["reused"], loss_increase["naive"]), 1e-5, " "),
        ),
    ]


def sleb_rows(results: dict) -> list[str]:
    found = results["sleb"]
    seconds, left = found["seconds"], found["perplexity"]
    faster, worse = seconds["naive"] / seconds["raced"], left["raced"] / left["naive"] - 1
    return [
        row(
            (
                f"SLEB for {len(found['chosen']['raced'])} blocks with reuse and a race: times faster than the naive "
                f"way, {found['tokens']:,} tokens"
            ),
            f"{faster:.2f} ({seconds['raced']:.0f} s, {seconds['naive']:.0f} s)",
            *at_least(faster, 3),
        ),
        row(
            "… held-out perplexity of its choice over that of the naive choice",
            f"{worse:+.1%} ({left['raced']:.1f}, {left['naive']:.1f})",
            "≤ +1 %",
            "yes" if worse <= 0.01 else "**no**",
        ),
    ]


def decoding_rows(results: dict) -> list[str]:
    found = results["decoding"]
    return [
        row(
            (
                "Decoding without 7 of 30 blocks: speed-up over the base model, as a part of the ideal (ratio of the "
                "parameters)"
            ),
            f"{found['of_ideal']:.3f} ({found['speedup']:.3f} of {found['ideal']:.3f})",
            *at_least(found["of_ideal"], 0.95),
        )
    ]


def sparsity_rows(results: dict) -> list[str]:
    if (found := results.get("sparsity")) is None:
        return []  # measured by `make bench` since activation sparsity is there

    def figure(f):
        return f"{f['speedup']:.2f} ({f['milliseconds']:.1f} ms, {found['dense']:.1f} ms)"

    rows = []
    for name, f in found["sparse"].items():
        if name == "masked":
            rows.append(row("… with masks and dense products instead", figure(f), "–", ""))
        else:
            rows += [
                row(
                    f"Decoding at {float(name):.0%} activation sparsity: times faster than dense",
                    figure(f),
                    *at_least(round(f["speedup"], 2), {"0.5": 1.2}.get(name, 1)),
                ),
                row(
                    (
                        f"… as a part of the limit from the parameters read, {f['realised']:.1%} of the projections' "
                        f"inputs being zero"
                    ),
                    f"{f['speedup'] / f['ideal']:.2f} (of {f['ideal']:.2f})",
                    "–",
                    "",
                ),
            ]
    return rows


def options_rows(results: dict) -> list[str]:
    found = results["options"]
    faster = ratios(found["seconds"]["lm_eval"], found["seconds"]["ours"])
    return [
        row(
            (
                f"Likelihoods of the options of {found['questions']} atlas questions: times faster than lm-eval, its "
                f"set-up included"
            ),
            spread(faster),
            *at_least(median(faster), 1),
        ),
        row(
            "… largest difference of an option's log-likelihood",
            f"{found['apart']:.0e} nats",
            *against(found["apart"], 1e-4, " nats"),
        ),
    ]


def healing_rows(results: dict) -> list[str]:
    found = results["healing"]
    over = {name: ratios(found["seconds"]["ours"], found["seconds"][name]) for name in ("plain", "torch")}
    return [
        row(
            (
                f"A step of distillation, {found['tokens']} tokens: time over the teacher's pass, the student's and "
                f"the way back"
            ),
            spread(over["plain"]),
            "–",
            "",
        ),
        row("… over the same step with torch's `kl_div`", spread(over["torch"]), "–", ""),
    ]


def tuning_rows(results: dict) -> list[str]:
    found = results["tuning"]
    faster, layers = ratios(found["seconds"]["plain"], found["seconds"]["reused"]), found["layers"]
    saved = (median(found["seconds"]["plain"]) - median(found["seconds"]["reused"])) * found["questions"] / 4
    return [
        row(
            (
                f"Contrastive training of blocks {layers[0]} to {layers[-1]} of 30, the frozen ones below passed over: "
                f"steps a second, times the plain Trainer's"
            ),
            spread(faster),
            *at_least(median(faster), 1.5),
        ),
        row(
            "… largest relative difference of a step's loss",
            f"{relative(found['losses']['reused'], found['losses']['plain']):.0e}",
            *against(relative(found["losses"]["reused"], found["losses"]["plain"]), 1e-5, " "),
        ),
        row(
            "… epochs after which the one pass through the frozen blocks is paid for",
            f"{found['prefix'] / saved:.1f}",
            "–",
            "",
        ),
    ]


def answers_rows(results: dict) -> list[str]:
    read, nulls = results["answers"], results["nulls"]
    over, size = (
        ratios(read["seconds"]["collect"], read["seconds"]["forward"]),
        (
            f"{nulls['answers']:,} answers × 30 layers × 2 points, {nulls['times']:,} permutations and "
            f"{nulls['times']:,} bootstrap samples"
        ),
    )
    return [
        row(
            (
                f"Time of `answer_stats` over the pass through the blocks alone, {read['answers']} answers, "
                f"{read['tokens']:,} tokens with their prompts"
            ),
            spread(over),
            *against(median(over), ANSWERS_BAR),
        ),
        *(
            row(f"{title} of {size}", f"{median(nulls[key]):.2f} s", *against(median(nulls[key]), 5, " s"))
            for key, title in {"None": "Profile", "question": "Paired profile"}.items()
        ),
    ]


def rival_row(name: str, found: dict, results: dict, ours: list[float]) -> str:
    title = NAMES[name].format(found.get("version", ""))
    if "error" in found:
        return row(title, f"failed: {found['error']}", "", "", "")
    memory = above([found["peak"]], results["memory"]["base"]["forward"])
    return row(
        title,
        spread(ratios(found["seconds"]["work"], found["seconds"]["forward"])),
        f"{memory:.0f} MB",
        f"{relative(found['variance'][:-1], ours[:-1]):.0e}",
        f"{relative(found['variance'][-1:], ours[-1:]):.0e}",
    )


def page(results: dict) -> str:
    "The whole page."
    m, rivals = results["machine"], results["rivals"]
    elsewhere = "".join(
        f" {part.replace('_', '-')} on another machine: {o['cpu']}, {o['cores']} cores, {o['threads']} threads."
        for part, o in results.get("elsewhere", {}).items()
    )
    ours, last, size = (
        rivals["collect_output"]["variance"],
        rivals["hidden_states"]["variance"],
        f"{results['sizes']['base'][0]}×{results['length']}",
    )
    parts = [time_rows, memory_rows, leave_one_out_rows, sleb_rows, decoding_rows, sparsity_rows, options_rows]
    rows = [row for part in [*parts, healing_rows, tuning_rows, answers_rows] for row in part(results)]
    columns = "time ratio", "memory above the pass", "variance off, all layers but the last"
    return f"""# Measurements

Written by `make bench`. {m["cpu"]}, {m["cores"]} cores, torch {m["versions"]["torch"]} with {m["threads"]} threads, \
transformers {m["versions"]["transformers"]}, Python {m["python"]}.
SmolLM2-135M-Instruct in float32 on full windows of pydoc, so nothing is padding. While the times were taken other \
processes used {results["others"]:.1%} of the CPU.{elsewhere}

## Against the bars

`collect_stats` at two reading points (`output`, `relative_update`): float64 sums and the histogram.

{head("measured", "figure", "bar", "met")}
{chr(10).join(rows)}

## Next to other libraries

The same work for each: the variance of every block's output, one batch of {size} tokens, no output head. Time is over \
the plain pass through the blocks, memory above it; the variance is compared with avss_nb's.

{head("library", *columns, "variance off, last layer")}
{chr(10).join(rival_row(name, found, results, ours) for name, found in rivals.items())}

The last hidden state of `output_hidden_states` comes after the final norm: it gives the last layer a variance of \
{last[-1]:.4g}, and the block's output has {ours[-1]:.4g}.

How it was measured:

- Time: median ratio of {len(results["overhead"]["forward"])} rounds in one process after a warm-up, runs in turn and \
every other round in the opposite order (in brackets the smallest and largest); \
{len(rivals["collect_output"]["seconds"]["work"])} pairs for each library, in a process of its own. Leave-one-out: the \
median of 3 runs each way, in turn.
- Memory: every figure from a fresh process, `VmHWM` of /proc/self/status (the kernel's own peak, reset after loading, \
a tiny warm-up and one read of every weight) less the resident memory before; median of \
{len(results["memory"]["base"]["forward"])} processes for the first size, one for the others. glibc's allocator as it \
comes.
- The table's numbers in full: results.json.
"""
