"""What surrounds a text: first and end tokens, the split of prompt and answer, windows, and what is refused."""

import ast
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import avss_nb
from avss_nb.certainty import by_text, score_texts
from avss_nb.contrastive import ContrastiveRecipe, check_training, contrastive_rows
from avss_nb.data import TextTooLong, as_batches, batches, encode_pair, encode_text
from avss_nb.detection import answer_states
from avss_nb.eavss import answer_stats
from avss_nb.evaluation import LinearProbe, classify, option_logprobs, perplexity, row_losses, text_losses
from avss_nb.healing import heal
from avss_nb.importance import angular_distance, layer_scores, leave_one_out, removal_losses, score_names, sleb, taylor
from avss_nb.labeling import build_prompts, generate_answers
from avss_nb.metrics import collect_stats, navss, normalized_variance, variance
from avss_nb.models import check_tokenizer, load_model
from avss_nb.training import pack_texts
from tiny import VOCABULARY, batch_of, one_thread, tiny

TOKENS = ["<unk>", "<pad>", "</s>", "<s>", "\n", *map(chr, range(32, 126))]  # a token a letter
BOS, EOS = 3, 2
PROMPTS = ["What is the capital of France? It is", "The capital of Peru is"]
OPTIONS = [[" Paris", " London", " Berlin"], [" Lima", " Montevideo"]]
TEXTS = ["A lamp in the dark. The keeper lit it.", "It burns.", "a"]
QUESTIONS = [
    dict(id=f"q{i}", question=p, answers=[o[0].strip()], distractors=[x.strip() for x in o[1:]], source="", context="")
    for i, (p, o) in enumerate(zip(PROMPTS, OPTIONS))
]


@pytest.fixture(scope="module")
def bundled():
    return load_model()


@pytest.fixture(scope="module")
def closing(bundled):
    "The bundled tokenizer, with an end token behind every text."
    tokenizer = deepcopy(bundled[1])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def small(bundled):
    "A model of five blocks over the bundled tokenizer's vocabulary."
    return tiny("llama", vocab_size=len(bundled[1]))


def letters(shape="$A", n_tokens=VOCABULARY, **special):
    "A tokenizer of letters whose post-processor has this shape."
    vocabulary = dict(zip([*TOKENS, "<image>"][:n_tokens], range(n_tokens)))
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    if shape != "$A":
        core.post_processor = processors.TemplateProcessing(single=shape, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>") | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def rows_of(made) -> list:
    return [ids for _, ids in made.rows]


# ---- the end token


def test_an_appended_end_token_is_never_scored(small, bundled, closing):
    "The same options, classes and losses as from the tokenizer that appends none."
    plain = bundled[1]
    for function, *given in (
        (option_logprobs, PROMPTS, OPTIONS),
        (classify, Dataset.from_dict(dict(text=TEXTS, label=[0, 1, 0]))),
        (text_losses, TEXTS),
    ):
        pd.testing.assert_frame_equal(function(small, closing, *given), function(small, plain, *given))


def test_an_appended_end_token_is_never_counted_or_trained_on(bundled, closing):
    plain, questions = bundled[1], Dataset.from_list(QUESTIONS)
    for options in (dict(), dict(max_length=4), dict(max_length=4, overflow="truncate")):
        assert batches(TEXTS, closing, **options).rows == batches(TEXTS, plain, **options).rows
    assert contrastive_rows(closing, questions) == contrastive_rows(plain, questions)
    assert build_prompts(closing, QUESTIONS) == build_prompts(plain, QUESTIONS)
    packed = [pack_texts(TEXTS * 9, tokenizer, 16, 2) for tokenizer in (closing, plain)]
    assert packed[0].equal(packed[1])


@pytest.mark.parametrize("shape", ["$A", "$A </s>", "<s> $A </s>"])
def test_the_texts_own_tokens_stay(shape):
    "An end token or a first token that the text itself holds, as a chat template writes them."
    tokenizer = letters(shape)
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<s>", "</s>"]))
    first = [BOS] * ("<s>" in shape)
    assert encode_text(tokenizer, "ab</s>")[-1] == EOS and encode_text(tokenizer, "ab")[-1] != EOS
    assert encode_text(tokenizer, "<s>ab") == [BOS, *encode_text(tokenizer, "ab")[len(first) :]]
    assert (
        encode_text(tokenizer, "ab", bos=True).count(BOS) == encode_text(tokenizer, "<s>ab", bos=True).count(BOS) == 1
    )
    assert rows_of(batches(["ab</s>"], tokenizer, bos=False)) == [encode_text(tokenizer, "ab</s>")]


def test_an_encoders_separators_stay():
    "What an encoder was trained with is as it was, in whole texts and in windows."
    tokenizer = load_model("minilm-l6")[1]
    for length in (256, 5):
        cut = tokenizer(TEXTS, truncation=True, max_length=length, return_overflowing_tokens=True)
        assert rows_of(batches(TEXTS, tokenizer, max_length=length)) == cut.input_ids
    with pytest.raises(ValueError, match="max_length is at least 3"):
        batches(TEXTS, tokenizer, max_length=2)


@pytest.mark.parametrize("length", [1, 2, 5, 256])
def test_windows_are_the_tokenizers_own(bundled, length):
    cut = bundled[1](TEXTS, truncation=True, max_length=length, return_overflowing_tokens=True)
    assert rows_of(batches(TEXTS, bundled[1], max_length=length)) == cut.input_ids


def test_slow_tokenizers():
    "One in Python, which cuts no windows of its own and appends an end token."
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast and tokenizer("ab").input_ids[-1] == tokenizer.eos_token_id
    own = tokenizer("abcdefg", add_special_tokens=False).input_ids
    assert rows_of(batches(["abcdefg"], tokenizer, max_length=3)) == [own[:3], own[3:6], own[6:]]
    assert rows_of(batches(["abcdefg"], tokenizer, max_length=3, overflow="truncate")) == [own[:3]]
    model = tiny("llama", vocab_size=400)
    assert np.isfinite(perplexity(model, tokenizer, TEXTS)) and len(leave_one_out(model, tokenizer, TEXTS)) == 5
    assert option_logprobs(model, tokenizer, ["ab"], [["cd", "e"]]).tokens.tolist() == [2, 1]


# ---- the first token


@pytest.mark.parametrize("measure", ["batches", "perplexity", "option_logprobs"])
def test_a_first_token_that_is_put_nowhere(measure):
    "One warning a call; with `bos` it is there once, and there is none."
    model, tokenizer = tiny("llama"), letters()
    run = dict(
        batches=lambda **bos: batches(TEXTS, tokenizer, **bos),
        perplexity=lambda **bos: perplexity(model, tokenizer, TEXTS, **bos),
        option_logprobs=lambda **bos: option_logprobs(model, tokenizer, ["ab", "c"], [["d", "e"], ["f"]], **bos),
    )[measure]
    with pytest.warns(UserWarning, match="first token, '<s>', and puts it nowhere: say bos=True") as said:
        without = run()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(bos=False)
        found = run(bos=True)
    if measure == "batches":
        assert all(row[0] == BOS and row.count(BOS) == 1 for row in rows_of(found))
    elif measure == "perplexity":
        assert found == perplexity(model, letters("<s> $A"), TEXTS) != without
    else:
        assert found.equals(option_logprobs(model, letters("<s> $A"), ["ab", "c"], [["d", "e"], ["f"]]))


@pytest.mark.parametrize("special", [dict(bos_token=None), dict(bos_token="</s>")], ids=["none", "the end token's"])
def test_no_warning_without_a_first_token_of_its_own(special, bundled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(TEXTS, letters(**special))
        batches(TEXTS, bundled[1])  # its first token marks the turns of a chat
        batches(TEXTS, letters("<s> $A"))


def test_a_first_token_that_is_not_there():
    with pytest.raises(ValueError, match="no first token"):
        batches(TEXTS, letters(bos_token=None), bos=True)
    with pytest.raises(ValueError, match="no first token"):
        build_prompts(letters(bos_token=None), QUESTIONS, bos=True)


def test_each_window_has_its_first_token():
    made = rows_of(batches(["abcdefg"], letters("<s> $A </s>"), max_length=4))
    assert [row[0] for row in made] == [BOS] * 3 and [len(row) for row in made] == [4, 4, 2]
    assert not any(EOS in row for row in made)


# ---- prompt and answer


PAIRS = [
    ("Answer:", " Paris"),
    ("Answer: ", "Paris"),
    ("Answer:", "Paris"),
    ("Answer:  ", " Paris"),
    ("Answer:\n", "Paris"),
    ("One\n\n", "\nTwo"),
    ("The year was 19", "14"),
    ("It was in New", "foundland"),
    ("The answer is un", "believable"),
    ("x", "\n"),
    ("naïve caf", "é au lait"),
]


@pytest.mark.parametrize("prompt, answer", PAIRS)
def test_the_split_is_lm_evals(bundled, prompt, answer):
    from lm_eval.api.model import TemplateLM

    class Split(TemplateLM):
        eot_token_id = _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return bundled[1].encode(string)

    assert encode_pair(bundled[1], prompt, answer) == Split()._encode_pair(prompt, answer)


def test_a_prompt_that_ends_in_a_space(small, bundled):
    "The space belongs to the answer: the same as written there."
    spaced = option_logprobs(small, bundled[1], ["Answer: "], [["Paris", "Berlin"]])
    assert spaced.equals(option_logprobs(small, bundled[1], ["Answer:"], [[" Paris", " Berlin"]]))


@pytest.mark.parametrize(
    "template, stop",
    [
        ("In {question}", ("\nIn ",)),
        ('"{question}"\nIt is', ('\n"',)),
        ("- {question}", ("\n- ",)),
        ("{context}\nQ: {question}\nA:", ("Q:",)),
        ("{question}", ()),
        (None, ("Question:",)),
    ],
)
def test_the_words_that_open_a_question(template, stop):
    from avss_nb.labeling import _question_opener

    assert _question_opener("completion", template) == stop and _question_opener("chat", template) == ()


def test_a_templates_own_words_as_a_stop(bundled):
    asked = [dict(id="a", question="which country is New Delhi? New Delhi is the capital of", answers=["India"])]
    answer = generate_answers(*bundled, asked, template="In {question}", max_new_tokens=3)[0]["answer"]
    assert answer.startswith("India")


# ---- windows


ANSWERS = Dataset.from_dict(
    dict(id=["a"], prompt_tokens=[[5] * 60], answer_tokens=[[6] * 9], question=["b"], answer=["c"])
)
LONG = "a" * 69


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, tokenizer: perplexity(model, tokenizer, [LONG]),
        lambda model, tokenizer: row_losses(model, batch_of(69, 4)),
        lambda model, tokenizer: leave_one_out(model, [batch_of(69, 4)]),
        lambda model, tokenizer: layer_scores(model, (b for b in [batch_of(4), batch_of(69)])),
        lambda model, tokenizer: collect_stats(model, batches(["a", LONG], tokenizer)),
        lambda model, tokenizer: angular_distance(model, tokenizer, [LONG]),
        lambda model, tokenizer: taylor(model, tokenizer, [LONG]),
        lambda model, tokenizer: sleb(model, tokenizer, [LONG], n=1),
        lambda model, tokenizer: LinearProbe(model, [batch_of(69, 4)], [0, 1]),
        lambda model, tokenizer: option_logprobs(model, tokenizer, ["b", LONG], [["c"], ["d"]]),
        lambda model, tokenizer: generate_answers(
            model, tokenizer, [dict(id="q", question=LONG, answers=["a"])], max_new_tokens=1
        ),
        lambda model, tokenizer: answer_stats(model, tokenizer, ANSWERS),
        lambda model, tokenizer: answer_states(model, tokenizer, ANSWERS),
        lambda model, tokenizer: heal(model, tokenizer, [LONG] * 20, max_length=69),
        lambda model, tokenizer: check_training(
            model,
            tokenizer,
            Dataset.from_list([q | dict(question=LONG) for q in QUESTIONS]),
            [1],
            recipe=ContrastiveRecipe(batch_size=2),
        ),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_longer_than_the_window(family, measure):
    "One line wherever it is too long, before any work."
    model = tiny(family, **(dict(max_position_embeddings=64) if family == "llama" else {}))
    model.register_forward_pre_hook(lambda module, args, kwargs: pytest.fail("it runs"), with_kwargs=True)
    with pytest.raises(TextTooLong, match=r"^[^\n]* tokens:.* does not fit the model's 64; shorten it[^\n]*$"):
        measure(model, letters("<s> $A"))


def test_the_window_of_a_model_that_counts_from_its_padding():
    "RoBERTa's positions begin after its padding token: 64 embeddings hold 62 tokens."
    model = tiny("roberta", max_position_embeddings=64)
    assert len(collect_stats(model, [batch_of(62)]).sums)
    with pytest.raises(TextTooLong, match="does not fit the model's 62"):
        collect_stats(model, [batch_of(63)])


def test_windows_without_a_counted_token():
    "A window of one token whose first is not counted: left out of the angle, as of everything else."
    model = tiny("llama")
    made = batches(
        ["abcdefg", "hijkl", "mn"], letters("$A", bos_token=None), max_length=3, skip_first=True, batch_size=2
    )
    assert any(not row.any() for batch in made for row in batch["token_mask"])
    some = [b | {k: v[b["token_mask"].any(1)] for k, v in b.items()} for b in made if b["token_mask"].any()]
    assert all(row.any() for batch in some for row in batch["token_mask"])
    wanted = angular_distance(model, some)
    np.testing.assert_allclose(angular_distance(model, made), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        layer_scores(model, made, methods="angular_distance")["angular_distance"], wanted, rtol=1e-6
    )
    with pytest.raises(ValueError, match="all false"):
        angular_distance(model, [dict(batch_of(3), token_mask=torch.zeros(1, 3, dtype=torch.bool))])


def test_a_probe_is_not_fitted_to_nothing():
    "A row without a counted token has no mean state: it is neither learnt nor predicted, and costs nothing."
    model, batch = tiny("bert"), batch_of(5, 4, 6, 3)
    hidden = dict(batch, token_mask=batch["token_mask"] & (torch.arange(4) < 3)[:, None])
    probe, wanted = LinearProbe(model, [hidden], [0, 1, 0, 1]), LinearProbe(model, [batch_of(5, 4, 6)], [0, 1, 0])
    assert torch.allclose(probe.weight, wanted.weight, atol=1e-4)
    assert probe.predict(model, [hidden]).index.tolist() == [0, 1, 2]
    nll, n = probe.losses(model, hidden)
    assert n.tolist() == [1, 1, 1, 0] and nll[3] == 0


# ---- documented keys and options


def without_index(batch: dict) -> dict:
    return {name: values for name, values in batch.items() if name != "index"}


@pytest.mark.parametrize("kind", [list, iter])
def test_an_index_is_optional(kind):
    "Each row is a text."
    model = tiny("llama")
    with_index = [batch_of(7, 4), batch_of(5, seed=1) | dict(index=torch.tensor([2]))]
    bare = [without_index(batch) for batch in with_index]
    methods = [name for name in score_names() if name not in ("shapley", "avss_downstream", "influence_downstream")]
    for measure in (
        leave_one_out,
        text_losses,
        removal_losses,
        taylor,
        angular_distance,
        lambda m, b: layer_scores(m, b, methods=methods),
        lambda m, b: sleb(m, b, n=2),
        lambda m, b: score_texts(m, b).reweighted(np.array([1, 2, 3]), ["avss", "leave_one_out"]),
        lambda m, b: LinearProbe(m, b, [0, 1, 0]).predict(m, bare),
        lambda m, b: [text for text, _ in by_text(b)],
    ):
        found, wanted = measure(model, kind(bare)), measure(model, with_index)
        assert found == wanted if isinstance(found, list) else found.equals(wanted)
    with pytest.raises(ValueError, match="some batches have an `index`"):
        text_losses(model, [with_index[0], bare[1]])


def test_misspelt_options():
    "A name that nothing knows is an error; so is an option of batches that are made already."
    model, stats = tiny("llama"), collect_stats(tiny("llama"), [batch_of(6, 4)])
    for score in (variance, normalized_variance, navss):
        with pytest.raises(TypeError, match="ponit"):
            score(stats, ponit="output")
    for options in (dict(max_lenth=3), dict(skip_first=True)):
        with pytest.raises(TypeError, match=next(iter(options))):
            perplexity(model, [batch_of(6, 4)], **options)
        with pytest.raises(TypeError, match=next(iter(options))):
            as_batches([batch_of(6, 4)], **options)


def swallowing(tree: ast.Module) -> list[str]:
    "Public functions that take any name and do nothing with it."
    found = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.args.kwarg and not function.name.startswith("_"):
            names = {
                node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)
            }
            if function.args.kwarg.arg not in names:
                found.append(function.name)
    return found


def test_no_function_swallows_names():
    files = sorted(Path(avss_nb.__file__).parent.glob("*.py"))
    assert {file.stem: names for file in files if (names := swallowing(ast.parse(file.read_text())))} == {}


# ---- vocabulary


def test_an_extra_token_never_produced():
    "A tokenizer with 100 tokens and 99 embedding rows is a warning; a text that holds the token, an error."
    model, tokenizer = tiny("llama"), letters("<s> $A", VOCABULARY + 1)
    assert len(tokenizer) == 100 and model.get_input_embeddings().num_embeddings == 99
    with pytest.warns(UserWarning, match="100 tokens but the model embeds 99.*'<image>'"):
        assert check_tokenizer(tokenizer, model=model)["vocabulary"] == 100
    assert np.isfinite(perplexity(model, tokenizer, ["abc"]))
    with pytest.raises(ValueError, match="text 1 has the token 99, which the model does not embed"):
        perplexity(
            model, [batch_of(4), dict(batch_of(3), input_ids=torch.tensor([[5, 99, 6]]), index=torch.tensor([1]))]
        )
    with pytest.raises(ValueError, match="do not belong together"):
        check_tokenizer(load_model()[1], model=model)
