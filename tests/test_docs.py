"""Every exported name says what it does, what each argument is, and which errors it raises; the front page is short."""

import ast
import re

import pytest

from conftest import ROOT

MODULES = sorted(p for p in (ROOT / "avss_nb").glob("*.py") if not p.stem.startswith("_"))
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)

# What these are is the same everywhere, and said once.
GLOSSARY = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Words that mean the same everywhere")[1]
COMMON = {
    "self",
    "cls",
    "args",
    "kwargs",
    *(
        word
        for line in GLOSSARY.splitlines()
        for part in line.removeprefix("- ").split("; ")
        for word in re.findall(r"`(\w+)`", part.split(": ")[0])
    ),
}


def exported(module) -> list[ast.FunctionDef | ast.ClassDef]:
    "The functions and classes of `__all__`, and the public methods of such classes."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = next(
        ast.literal_eval(s.value)
        for s in tree.body
        if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__all__"
    )
    top = [s for s in tree.body if isinstance(s, ast.FunctionDef | ast.ClassDef) and s.name in names]
    return top + [
        m
        for c in top
        if isinstance(c, ast.ClassDef)
        for m in c.body
        if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")
    ]


def said(node, source: list[str]) -> str:
    "Docstring and the comments of the signature."
    signature = "\n".join(source[node.lineno - 1 : node.body[0].end_lineno])
    return (ast.get_docstring(node) or "") + " " + " ".join(re.findall(r"#(.*)", signature))


def arguments(node) -> list[ast.arg]:
    "None of a class."
    if isinstance(node, ast.ClassDef):
        return []
    a = node.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]


def is_property(node) -> bool:
    return any(
        ast.unparse(d) in ("property", "staticmethod") or ast.unparse(d).endswith(".setter")
        for d in node.decorator_list
    )


def no_docstring(node, source: list[str]) -> list[str]:
    "A property's name and type may be enough."
    return (
        []
        if ast.get_docstring(node) or isinstance(node, ast.FunctionDef) and is_property(node) and node.returns
        else ["has no docstring"]
    )


def silent_arguments(node, source: list[str]) -> list[str]:
    """Each is described by a comment beside it, by its name in the docstring, by a type that says it (a choice, a
    flag), or as one of the words that mean the same everywhere."""
    text = ast.get_docstring(node) or ""

    def described(a: ast.arg) -> bool:
        beside = re.search(r"[,)=:\w]\s*#\s*\S", source[a.end_lineno - 1][a.col_offset :]) is not None
        return bool(
            beside
            or a.arg in COMMON
            or re.search(rf"\b{re.escape(a.arg)}\b", text)
            or f"`{a.arg}" in text
            or re.search(r"[Oo]ptions (as|of|in)|options", text)
            and a.arg in ("options", "settings")
        )

    return [f"has an argument {a.arg}" for a in arguments(node) if not described(a)]


def silent_errors(node, source: list[str]) -> list[str]:
    "Each class of errors that a function itself raises stands in its docstring or beside its arguments."
    if isinstance(node, ast.ClassDef):
        return []
    raised, text = (
        {
            ast.unparse(r.exc.func if isinstance(r.exc, ast.Call) else r.exc)
            for r in ast.walk(node)
            if isinstance(r, ast.Raise) and r.exc
        },
        said(node, source),
    )
    return [
        f"raises {e}"
        for e in sorted(raised)
        if e[0].isupper() and e not in text and not re.search(r"[Ee]rrors (as|of|in)", text)
    ]


def silent_results(node, source: list[str]) -> list[str]:
    "What is returned has a type or a word."
    if isinstance(node, ast.ClassDef) or node.returns is not None:
        return []
    returns = any(isinstance(r, ast.Return) and r.value is not None for r in ast.walk(node))
    return (
        ["returns something"]
        if returns and not re.search(r"[Cc]ontext manager|[Rr]eturns|: ", said(node, source))
        else []
    )


@each_module
@pytest.mark.parametrize(
    "check", [no_docstring, silent_arguments, silent_errors, silent_results], ids=lambda f: f.__name__
)
def test_what_is_exported_is_described(module, check):
    source = module.read_text(encoding="utf-8").splitlines()
    assert not (
        found := [
            f"{module.name}:{node.lineno} {node.name} {what}"
            for node in exported(module)
            for what in check(node, source)
        ]
    ), "\n".join(found)


# ---- shapes, units, sources

ARRAY = re.compile(r"\b(Tensor|ndarray|DataFrame|Series)\b")
SIZE = r"(\w+|\d+|\.\.\.)( ?[+−] ?\d+)?"
SHAPE = re.compile(
    rf"\b(a|an|one|each) (row|column)\b|\brows? an? |× rules|\bindex\b|\b[Pp]er (first "
    rf")?(layer|item|question)\b|\bscalars?\b|\bsame shape\b"
    rf"|\b[Aa]s `\w+`|\btables? `[\w, ]+` of a `Study`|\((\.\.\.|{SIZE},|{SIZE}(, {SIZE})+)\)"
)


@each_module
def test_arrays_and_tables_say_their_shape(module):
    "A tensor or an array its sizes, a table or a series what a row is (`per layer`: index `layer`)."
    source = module.read_text(encoding="utf-8").splitlines()
    missing = [
        f"{module.name}:{n.lineno} {n.name}"
        for n in exported(module)
        if isinstance(n, ast.FunctionDef)
        and n.returns
        and ARRAY.search(ast.unparse(n.returns))
        and not SHAPE.search(said(n, source))
    ]
    assert not missing, "\n".join(missing)


UNITS = dict(
    loss="nats|cosine",
    losses="nats",
    nll="nats",
    logprob="nats",
    logprobs="nats",
    entropy="nats",
    entropies="nats",
    loss_increase="nats",
    perplexity=r"\bexp\b|nats|[Oo]ld",
    leave_one_out="nats|bytes",
    seconds="[Ss]econds",
    milliseconds="milliseconds",
    timeout="seconds",
    bytes="[Bb]ytes",
    memory="[Bb]ytes|GB",
    gb="of weights",
    flops="flops",
    hours="hours",
    learning_rate="peak",
    max_length="tokens",
    max_tokens="tokens|positions",
    tokens="[Tt]okens?",
    n_tokens="[Tt]okens|decoded",
    prompt_tokens="tokens|prompt",
    max_new_tokens="tokens?|answer",
)


FUNCTIONS = {n.name for m in MODULES for n in exported(m)}


def unit(name: str) -> str | None:
    "What a name asks for: by itself, or by its last word (`summed_loss`)."
    return UNITS.get(name) or UNITS.get(name.split("_")[-1])


@each_module
def test_numbers_with_a_unit_say_it(module):
    """Arguments in the comment beside them (or the docstring), names of functions and of what they return anywhere
    in what is said."""
    source, missing = module.read_text(encoding="utf-8").splitlines(), []
    for node in exported(module):
        if not isinstance(node, ast.FunctionDef):
            continue
        text, end = said(node, source), source[node.body[0].lineno - 2]
        names = (
            {node.name}
            | {a.arg for a in arguments(node) if a.arg not in COMMON}
            | set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", end.partition("#")[2])))) - FUNCTIONS
        )
        missing += [
            f"{module.name}:{node.lineno} {node.name}: {name}"
            for name in sorted(names)
            if (u := unit(name)) and not re.search(u, text) and not is_property(node)
        ]
    assert not missing, "\n".join(missing)


# Functions that are a formula or an algorithm somebody published, or our version of one.
FORMULAS = dict(
    intervals="permutation_p_value false_discovery_rate minimum_detectable_effect",
    metrics="variance normalized_variance sparsity avss navss cavss",
    hooks="relative_update",
    importance="block_influence angular_distance taylor leave_one_out sleb shapley downstream_stats",
    evaluation="multiple_choice retention",
    confidence="expected_calibration_error calibration",
    eavss="eavss hsav hss hallucination_profile",
    detection=(
        "prediction_rejection_ratio semantic_entropy eigenscore probe_detector eavss_ranking mahalanobis_detector"
    ),
    contrastive="info_nce triplet_loss prototype_loss likelihood_contrast contrastive_tune contrastive_cosines",
    decoding="contrast exit_logits dola dola_generate contrast_candidates majority_vote abstain jensen_shannon",
    labeling="normalize_answer token_f1 rouge_l nli_judge similarity_judge rule_agreement",
    pruning="select_layers",
    healing="healing_loss heal",
    sparsity="calibrate_thresholds top_k",
    allocation="greedy_plan hill_exponent weight_exponents acttail_plan",
    cost="memory_plan",
    scale="estimate",
)
SOURCE = re.compile(
    r"arXiv \d{4}\.\d{5}|[Oo]ur (reading|arithmetic|null|addition|own)|is ours|are ours|\beq\. |[Aa]lgorithm "
    r"\d|\bet al\. \d{4}|, \d{4}\)|\((AVSS|DoLa|SLEB|Shortened "
    r"LLaMA|ShortGPT)\b|\bSQuAD\b|TruthfulQA's|DoLa's|`rouge_score`|scikit-learn|SAPLMA"
)


@each_module
def test_formulas_name_their_source(module):
    "The paper and its equation, or that it is our reading."
    source, nodes = module.read_text(encoding="utf-8").splitlines(), {n.name: n for n in exported(module)}
    names = FORMULAS.get(module.stem, "").split()
    assert set(names) <= nodes.keys()
    missing = [
        f"{module.name}:{nodes[name].lineno} {name}" for name in names if not SOURCE.search(said(nodes[name], source))
    ]
    assert not missing, "\n".join(missing)


def test_every_score_has_a_source():
    "What a table of scores offers by name is among the formulas, or needs none."
    from avss_nb.importance import score_names

    plain = {"magnitude", "position", "random"}
    assert set(score_names("run")) - plain <= set(FORMULAS["importance"].split())


def test_help_shows_what_an_argument_is():
    "The comments beside arguments reach `help()`, of functions and of methods."
    import avss_nb as av
    from avss_nb.runs import RunDirectory

    assert "teacher: the base model" in av.heal.__doc__
    assert "key: settings, model, data" in RunDirectory.open.__func__.__doc__


# ---- the front page

FRONT = (ROOT / "README.md").read_text(encoding="utf-8")


def words_before(mark: str) -> int:
    "How many words stand before the first place that a pattern finds."
    return len(FRONT[: re.search(mark, FRONT).start()].split())


def test_the_front_page_is_short():
    "Words as `wc -w` counts them, with tables and code; numbers wherever a reader sees digits, in names too."
    seen = re.sub(r"\]\([^)]*\)", "]", FRONT)
    assert len(FRONT.split()) <= 650
    assert len(re.findall(r"\d+(?:[.,]\d+)*", seen)) <= 60


def test_the_front_page_comes_to_the_point():
    assert words_before(r"!\[[^\]]*\]\([^)]*\.png\)") <= 120
    assert words_before(r"```python\n") <= 300
