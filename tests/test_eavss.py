"""Statistics of answers compared with a plain double loop, and profiles on inputs whose effect is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy import stats as sps

from avss_nb.eavss import (
    MODES,
    N_COARSE,
    AnswerStats,
    _answer_sums,
    _Design,
    answer_sparsity,
    answer_stats,
    answer_variance,
    coarse_bins,
    coarse_edges,
    eavss,
    flip_labels,
    hallucination_profile,
    hsav,
    hss,
)
from avss_nb.hooks import POINTS, read_activations
from avss_nb.metrics import LayerStats, avss, collect_stats, sparsity, variance
from avss_nb.models import blocks
from tiny import FAMILIES, TupleModel, VOCABULARY, batch_of, one_thread, swept, tiny

FEW = [*FAMILIES, "bloom", "gptj", "falcon", "phi3", "mixtral", "mamba"]
LENGTHS = [(5, 4), (3, 1), (9, 2), (4, 7), (6, 1), (2, 3), (7, 5)]  # tokens of prompt and answer


def pads(side: str = "left", token: int = 1):
    return SimpleNamespace(pad_token_id=token, padding_side=side)


def answers_of(lengths=LENGTHS, seed: int = 0) -> Dataset:
    "Answers of random tokens, two to a question."
    rng = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            dict(
                id=f"q{i // 2}",
                sample=i % 2,
                prompt_tokens=rng.integers(3, VOCABULARY, p).tolist(),
                answer_tokens=rng.integers(3, VOCABULARY, a).tolist(),
            )
            for i, (p, a) in enumerate(lengths)
        ]
    )


def same(a: AnswerStats, b: AnswerStats, rtol: float = 1e-4):
    """The same answers in the same order. A value at a bin's edge may fall on either side when a matrix product
    rounds differently."""
    assert (a.ids.tolist(), a.lengths.tolist(), a.tokens, a.sums.keys()) == (
        b.ids.tolist(),
        b.lengths.tolist(),
        b.tokens,
        b.sums.keys(),
    )
    for point in a.points:
        assert (a.get(point, "count") == b.get(point, "count")).all()
        np.testing.assert_allclose(a.get(point, "sumsq"), b.get(point, "sumsq"), rtol=rtol)
        np.testing.assert_allclose(
            a.get(point, "sum"), b.get(point, "sum"), rtol=rtol, atol=rtol * a.get(point, "sumsq").max() ** 0.5 * 10
        )
        moved = abs(a.get(point, "hist").astype(int) - b.get(point, "hist")).sum(-1) / 2
        assert (a.get(point, "hist").sum(-1) == a.get(point, "count")).all() and (
            moved <= 1 + 0.02 * a.get(point, "count")
        ).all()


# statistics


@pytest.mark.parametrize("family", swept(FEW))
def test_equal_to_a_double_loop(family):
    "Each answer alone, unpadded; every element of every answer token looked at by itself."
    model, answers, points = tiny(family), answers_of(), ("output", "relative_update")
    stats, first = answer_stats(model, pads("right"), answers, points=points, tokens=("answer", "first"), batch_size=3)
    for i, row in enumerate(answers):
        seen, ids = {}, torch.tensor([row["prompt_tokens"] + row["answer_tokens"]])
        with (
            torch.no_grad(),
            read_activations(model, points, lambda layer, point, a: seen.update({(layer, point): a[0].double()})),
        ):
            model(ids)
        for (layer, point), a in seen.items():
            for found, tokens in ((stats, a[len(row["prompt_tokens"]) :]), (first, a[len(row["prompt_tokens"])][None])):
                n = total = squares = 0
                for token in tokens.tolist():
                    for value in token:
                        n, total, squares = n + 1, total + value, squares + value**2
                assert found.get(point, "count")[i, layer] == n
                np.testing.assert_allclose(found.get(point, "sumsq")[i, layer], squares, rtol=1e-4)
                np.testing.assert_allclose(
                    found.get(point, "sum")[i, layer], total, rtol=1e-4, atol=1e-3 * squares**0.5
                )
                np.testing.assert_allclose(
                    answer_variance(found, point=point).loc[i, layer], tokens.var(unbiased=False), rtol=1e-4
                )
                counted = torch.bincount(coarse_bins(tokens.float()).flatten(), minlength=N_COARSE).numpy()
                assert abs(found.get(point, "hist")[i, layer] - counted).sum() <= 2 + 0.02 * n


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3_text"])
def test_any_batch_padding_and_order(family, side):
    model, answers = tiny(family), answers_of()
    alone = answer_stats(model, pads(), answers, batch_size=1)
    for options in (dict(batch_size=2), dict(batch_size=7), dict(max_tokens=40)):
        same(answer_stats(model, pads(side), answers, **options), alone)
    order = [3, 0, 6, 2, 5, 1, 4]
    same(answer_stats(model, pads(side), answers.select(order), batch_size=3), alone.select(order))
    same(answer_stats(model, pads(), answers, batch_size=3, padding_side=side), alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_anything(side):
    "Garbage beside the answer is neither attended nor counted."
    model, answers = tiny("llama"), answers_of()
    same(
        answer_stats(model, pads(side, token=77), answers, batch_size=7),
        answer_stats(model, pads(side, token=5), answers, batch_size=7),
        rtol=1e-9,
    )


def test_answer_tokens_alone():
    """Another prompt's tokens are not in the sums: a table model gives each token the same activations wherever it
    stands."""

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.layers = (
                torch.nn.Embedding(VOCABULARY, 8),
                torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()]),
            )

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    answers, model = answers_of(), Table()
    other = answers.map(lambda row: dict(prompt_tokens=[98] * (1 + len(row["prompt_tokens"]) % 4)))
    a, b = (answer_stats(model, pads(), x, points=["output"]) for x in (answers, other))
    for name, t in a.sums.items():
        assert torch.equal(t, b.sums[name]), name
    expected = [model.embed(torch.tensor(row["answer_tokens"])).double().square().sum().item() for row in answers]
    np.testing.assert_allclose(a.get("output", "sumsq")[:, 1], expected, rtol=1e-12)
    first = answer_stats(model, pads(), answers, points=["output"], tokens="first")
    np.testing.assert_allclose(
        first.get("output", "sumsq")[:, 0],
        [model.embed(torch.tensor(row["answer_tokens"][0])).double().square().sum().item() for row in answers],
        rtol=1e-12,
    )
    assert first.lengths.tolist() == a.lengths.tolist() == [n for _, n in LENGTHS]


def test_every_point_and_a_family_that_no_library_knows():
    stats = answer_stats(tiny("llama"), pads(), answers_of(), points=POINTS)
    assert stats.points == list(POINTS) and stats.get("mlp_hidden", "count")[:, 0].tolist() == [
        64 * n for _, n in LENGTHS
    ]
    stats = answer_stats(TupleModel(), pads("right"), answers_of(), points=("output", "relative_update"))
    assert (len(stats), stats.n_layers) == (7, 4)


def test_a_table_of_any_kind():
    answers = answers_of()
    same(answer_stats(tiny("llama"), pads(), answers.to_pandas()), answer_stats(tiny("llama"), pads(), answers))


def test_nothing_is_left_behind():
    model = tiny("llama")
    answer_stats(model, pads(), answers_of())
    blocks(model)[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        answer_stats(model, pads(), answers_of())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision():
    "A bfloat16 model's statistics are those of its float32 self to its rounding."
    full, half = (
        answer_stats(tiny("llama").to(dtype), pads(), answers_of()) for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(answer_variance(half, point="output"), answer_variance(full, point="output"), rtol=0.1)
    assert half.get("output", "sumsq").dtype == np.float64


def counted(answers):
    "Each answer as a batch; its own tokens count."
    for row in answers:
        ids = torch.tensor([row["prompt_tokens"] + row["answer_tokens"]])
        yield dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_mask=torch.arange(ids.shape[1])[None] >= len(row["prompt_tokens"]),
        )


def test_equal_to_layer_statistics_over_the_same_tokens():
    "chapter Metrics counts the same positions by a mask"
    model, answers = tiny("llama"), answers_of()
    direct, pooled = collect_stats(model, counted(answers)), answer_stats(model, pads(), answers, batch_size=1).pooled()
    assert isinstance(pooled, LayerStats)
    for point in direct.points:
        np.testing.assert_allclose(variance(pooled, point=point), variance(direct, point=point), rtol=1e-9)
        for eps in (1e-5, 0.25, 0.5, 1.0):  # the published one, and edges of bins
            np.testing.assert_allclose(
                sparsity(pooled, point=point, eps=eps), sparsity(direct, point=point, eps=eps), rtol=1e-9
            )
            if eps > 1e-5:
                np.testing.assert_allclose(
                    avss(pooled, point=point, eps=eps), avss(direct, point=point, eps=eps), rtol=1e-9
                )
        assert abs(sparsity(pooled, point=point, tau=0.3) - sparsity(direct, point=point, tau=0.3)).max() < 0.01


def test_a_token_without_an_embedding_has_no_relative_update():
    "As in chapter Metrics: it is not counted there; an answer of nothing else is refused by name."
    model, answers = tiny("llama"), answers_of()
    zero = answers[3]["answer_tokens"][2]
    with torch.no_grad():
        model.get_input_embeddings().weight[zero] = 0
    stats, direct = answer_stats(model, pads(), answers, batch_size=3), collect_stats(model, counted(answers))
    pooled = stats.pooled()
    for point in direct.points:
        assert (pooled.get(point, "count") == direct.get(point, "count")).all()
        np.testing.assert_allclose(variance(pooled, point=point), variance(direct, point=point), rtol=1e-6)
    lengths = [n for _, n in LENGTHS]
    found, held = stats.get("relative_update", "count"), [row["answer_tokens"].count(zero) for row in answers]
    assert (found[:, 0] == 32 * (np.array(lengths) - held)).all() and held[3]
    assert (found[:, 1] == 32 * np.array(lengths)).all()
    alone = answers.map(lambda row: dict(answer_tokens=[zero] if row["id"] == "q2" else row["answer_tokens"]))
    with pytest.raises(ValueError, match=r"the answer to 'q2' .* layer 0: .* zero there"):
        answer_stats(model, pads(), alone)
    assert answer_stats(model, pads(), alone, points=["output", "update"]).get("update", "count").all()


def test_join_select_save_load(tmp_path):
    model, answers = tiny("llama"), answers_of()
    whole = answer_stats(model, pads(), answers, batch_size=1)
    parts = [answer_stats(model, pads(), answers.select(rows), batch_size=1) for rows in ([0, 1], [2, 3, 4], [5, 6])]
    joined = parts[0] + parts[1] + parts[2]
    joined.save(tmp_path / "answers.safetensors")
    for other in (
        joined,
        AnswerStats.load(tmp_path / "answers.safetensors"),
        whole.select(np.ones(7, bool)),
        whole.select(slice(None)),
    ):
        assert (other.ids.tolist(), other.lengths.tolist(), other.tokens) == (
            whole.ids.tolist(),
            whole.lengths.tolist(),
            "answer",
        )
        for name, t in whole.sums.items():
            assert torch.equal(other.sums[name], t), name
    for rows in ([4, 1], np.arange(7) % 2 == 0, [True] * 3 + [False] * 4, pd.Series([6]), slice(2, 4)):
        assert (
            whole.select(rows).lengths.tolist()
            == whole.lengths[np.asarray(rows) if not isinstance(rows, slice) else rows].tolist()
        )
    for wrong in (
        answer_stats(model, pads(), answers, tokens="first"),
        answer_stats(model, pads(), answers, points=["output"]),
    ):
        with pytest.raises(ValueError, match="cannot be joined"):
            whole + wrong
    raw = (tmp_path / "answers.safetensors").read_bytes()
    for piece in (b"", raw[:1000], raw[:-1]):
        (tmp_path / "cut").write_bytes(piece)
        with pytest.raises(ValueError, match="cut"):
            AnswerStats.load(tmp_path / "cut")
    collect_stats(model, [batch_of(4)]).save(tmp_path / "layers")
    with pytest.raises(ValueError, match="holds no answer statistics"):
        AnswerStats.load(tmp_path / "layers")
    with pytest.raises(OSError, match="no folder"):
        whole.save(tmp_path / "nonesuch" / "x")


@pytest.mark.parametrize("spoil", [dict(count=0), dict(count=-3), dict(sumsq=-1.0)], ids=str)
@pytest.mark.filterwarnings("error")
def test_sums_of_nothing_are_refused(tmp_path, spoil):
    "A file whose counts are not above zero, or whose squares are below it, is damaged; nothing takes a root of it."
    stats = answer_stats(tiny("llama"), pads(), answers_of())
    labels = np.arange(len(stats)) % 2 == 0
    ((quantity, value),) = spoil.items()
    for name, t in stats.sums.items():
        if name.endswith(f".{quantity}"):
            t.fill_(value)
    with pytest.raises(ValueError, match="no activation to compare"):
        eavss(stats, labels)
    stats.save(tmp_path / "spoilt")
    with pytest.raises(ValueError, match="spoilt is damaged"):
        AnswerStats.load(tmp_path / "spoilt")


@pytest.mark.filterwarnings("error")
def test_no_answer_is_refused_without_a_warning():
    none = answer_stats(tiny("llama"), pads(), answers_of()).select(slice(0))
    with pytest.raises(ValueError, match="no activation to compare"):
        answer_sparsity(none)
    assert answer_variance(none).shape == (0, 5)


def test_one_set_of_options():
    "What one measure takes all take, and what none takes is refused."
    stats, labels = null_stats(80, 0), np.arange(80) % 2 == 0
    for measure in (hsav, hss, eavss, hallucination_profile):
        for options in (dict(tau=0.3), dict(eps=0.25), dict(within="length"), dict(groups=range(80)), dict(mode="gap")):
            assert len(measure(stats, labels, point="output", **options)) == 6
        with pytest.raises(TypeError, match="taus"):
            measure(stats, labels, point="output", taus=0.3)
        with pytest.raises(ValueError, match="unknown mode 'mean'"):
            measure(stats, labels, mode="mean")


def test_storage_is_compact():
    stats = answer_stats(tiny("llama"), pads(), answers_of())
    assert 1000 * 30 * 2 * sum(t[0].nbytes for t in stats.sums.values()) / (5 * 2) < 80e6


@pytest.mark.parametrize("exponent", range(-30, 20, 7))
def test_bins_hold_what_their_edges_say(exponent):
    a = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2.0**exponent
    edges, at, size = coarse_edges(), coarse_bins(a).numpy(), a.abs().numpy()
    assert len(edges) == N_COARSE + 1 and (edges[at] <= size).all() and (size < edges[at + 1]).all()


# measures


def made(
    scale: np.ndarray, lengths: np.ndarray, rng, ids=None, width: int = 16, factor: float = 1.0, point: str = "output"
) -> AnswerStats:
    "Statistics of Gaussian activations, answer i's with spread `scale[i, layer]`."
    owner = torch.from_numpy(np.repeat(np.arange(len(scale)), lengths))
    layers = []
    for layer in range(scale.shape[1]):
        a = (
            rng.normal(size=(len(owner), width)).astype(np.float32)
            * scale[owner.numpy(), layer, None].astype(np.float32)
            * np.float32(factor)
        )
        layers.append(_answer_sums(torch.from_numpy(a), owner, len(scale)))
    return AnswerStats({f"{point}.{q}": torch.stack([sums[q] for sums in layers], 1) for q in layers[0]}, lengths, ids)


def null_stats(n: int, seed: int, n_layers: int = 6, per_question: int = 1, factor: float = 1.0) -> AnswerStats:
    """Answers whose spread depends on the answer and its question, alike in neighbouring layers as in a real network,
    and on nothing else."""
    rng = np.random.default_rng(seed)
    common = (
        rng.normal(0, 0.3, (n, 1))
        + np.repeat(rng.normal(0, 0.3 * (per_question > 1), n // per_question), per_question)[:, None]
    )
    return made(
        np.exp(common + rng.normal(0, 0.05, (n, n_layers))),
        rng.integers(1, 6, n),
        rng,
        np.repeat(np.arange(n // per_question), per_question),
        64,
        factor,
    )


@pytest.fixture(scope="module")
def coin():
    return np.random.default_rng(9).random(80) < 0.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [dict(tau=0.05), dict(tau=0.4), dict(eps=0.25)], ids=str)
def test_measures_by_their_definition(mode, threshold, coin):
    "From elements, kept and pooled by label."
    rng, delta = np.random.default_rng(1), 1e-6
    each = [rng.normal(0.2, 1 + 0.3 * wrong, (2 + i % 3, 64)).astype(np.float32) for i, wrong in enumerate(coin)]
    owner = torch.arange(80).repeat_interleave(torch.tensor([len(a) for a in each]))
    sums = _answer_sums(torch.from_numpy(np.concatenate(each)), owner, 80)
    stats = AnswerStats({f"output.{q}": t[:, None] for q, t in sums.items()}, [len(a) for a in each])
    h, f, everything = (
        np.concatenate([a.ravel() for a, wrong in zip(each, coin) if wrong in who]).astype(float)
        for who in ([True], [False], [True, False])
    )
    eps = threshold.get("eps") or threshold["tau"] * np.sqrt((everything**2).mean())
    v, s = [x.var() for x in (h, f)], [(abs(x) < eps).mean() for x in (h, f)]
    expected = dict(
        ratio=(np.log(v[0] / v[1]), np.log(s[0] / s[1])),
        gap=(abs(v[0] - v[1]), abs(s[0] - s[1])),
        conditional=(v[0], s[0]),
    )[mode]
    a, b, both = (
        measure(stats, coin, mode=mode, point="output", delta=delta, **threshold)[0] for measure in (hsav, hss, eavss)
    )
    np.testing.assert_allclose(a, expected[0], rtol=1e-9)
    np.testing.assert_allclose(
        b, expected[1], rtol=1e-9 if "eps" in threshold else 0.03, atol=0 if "eps" in threshold else 0.01
    )
    assert both == (a - b if mode == "ratio" else a / (b + delta))


@pytest.mark.parametrize("within", [None, "length"])
def test_exchanging_the_groups_flips_the_sign(coin, within):
    stats = null_stats(80, 0)
    for measure in (hsav, hss, eavss):
        a, b = (measure(stats, labels, point="output", within=within) for labels in (coin, ~coin))
        assert (a == -b).all() and (a != 0).all()
    a, b = (
        hallucination_profile(stats, labels, point="output", within=within, n_permutations=200, n_resamples=100)
        for labels in (coin, ~coin)
    )
    np.testing.assert_allclose(a.p, b.p)
    np.testing.assert_allclose(a.low, -b.high, rtol=1e-9)
    for measure in (hsav, hss, eavss):
        assert (
            measure(stats, coin, mode="gap", point="output") == measure(stats, ~coin, mode="gap", point="output")
        ).all()


def test_activations_in_another_unit(coin):
    """A power of two changes nothing, ten almost nothing: where the threshold lies in its bin. The variance does not
    know the difference."""
    one, eight, ten = (null_stats(80, 0, factor=factor) for factor in (1, 8, 10))
    for measure in (hsav, hss, eavss):
        assert (measure(one, coin, point="output") == measure(eight, coin, point="output")).all()
    np.testing.assert_allclose(hsav(ten, coin, point="output"), hsav(one, coin, point="output"), atol=1e-6)
    noise = np.sqrt(2 / (0.04 * one.get("output", "count")[:, 0].sum() / 2))  # of HSS, from the counts alone
    assert abs(eavss(ten, coin, point="output") - eavss(one, coin, point="output")).max() < noise / 2


def test_labels_in_words_and_what_is_left_out(coin):
    stats, words = null_stats(80, 0), ["wrong" if c else "right" for c in coin]
    assert (eavss(stats, words, point="output") == eavss(stats, coin, point="output")).all()
    words[3], words[11] = "empty", "refused"
    kept = np.arange(80) % 80 != 3
    kept[11] = False
    some = eavss(stats, words, point="output")
    np.testing.assert_allclose(some, eavss(stats.select(kept), coin[kept], point="output"), rtol=1e-12)
    assert some.attrs["counts"] == dict(right=words.count("right"), wrong=words.count("wrong"), empty=1, refused=1)
    for form in (pd.Series(coin), torch.tensor(coin), coin.tolist()):
        assert (eavss(stats, form, point="output") == eavss(stats, coin, point="output")).all()


def test_edges_of_the_formula():
    """One group constant, or never near zero: infinite, with the sign that says which; both: no difference. Never
    ranked."""

    def stats_of(h, f):
        return AnswerStats(
            {
                f"output.{q}": torch.stack([s[q] for s in (_answer_sums(torch.tensor([h, f]), torch.arange(2), 2),)], 1)
                for q in ("count", "sum", "sumsq", "exact", "hist")
            },
            [1, 1],
        )

    labels, options = [True, False], dict(point="output", eps=0.5)
    constant = stats_of([3.0, 3.0, 3.0, 3.0], [1.0, -1.0, 0.0, 0.0])
    assert hsav(constant, labels, **options)[0] == -np.inf and hss(constant, labels, **options)[0] == -np.inf
    assert hsav(stats_of([3.0, 3.0], [2.0, 2.0]), labels, **options)[0] == 0
    never = stats_of([1.0, -1.0, 0.0, 0.0], [1.0, -1.0, 2.0, -2.0])
    assert hss(never, labels, **options)[0] == np.inf and eavss(never, labels, **options)[0] == -np.inf
    nowhere = stats_of([1.0, -1.0], [2.0, -2.0])
    assert np.isnan([hss(nowhere, labels, **options)[0], eavss(nowhere, labels, **options)[0]]).all() and hsav(
        nowhere, labels, **options
    )[0] == -2 * np.log(2)
    zero = stats_of([0.0, 0.0], [0.0, 0.0])
    assert eavss(zero, labels, point="output")[0] == 0 and hss(zero, labels, mode="conditional", point="output")[0] == 1
    rng = np.random.default_rng(0)
    scale = np.ones((30, 4))
    scale[:, 2] = 0
    with pytest.raises(ValueError, match=r"layers \[0, 1, 3\].*larger eps, or tau"):
        hallucination_profile(made(scale, np.ones(30, int), rng), np.arange(30) % 2 == 0, point="output", eps=1e-7)
    assert hallucination_profile(
        made(scale, np.ones(30, int), rng),
        np.arange(30) % 2 == 0,
        point="output",
        tau=0.3,
        n_resamples=50,
        n_permutations=50,
    ).loc[2, ["value", "p"]].tolist() == [0, 1]


# nulls


def shuffles(stats: AnswerStats, permute, n: int = 200, **options) -> pd.DataFrame:
    "p (and the smallest q) of n profiles with labels that mean nothing."
    rows = []
    for seed in range(n):
        found = hallucination_profile(
            stats,
            permute(np.random.default_rng(seed)),
            point="output",
            n_permutations=199,
            n_resamples=0,
            seed=seed,
            **options,
        )
        rows.append(found.p.tolist() + [found.q.min()])
    return pd.DataFrame(rows, columns=[*range(stats.n_layers), "q"])


def by_answer(rng):
    return rng.permutation(np.arange(90) % 2 == 0)


def by_question(rng):
    return np.repeat(rng.permutation(np.arange(45) % 3 == 0), 2)


def in_questions(rng):
    return rng.permuted(np.tile([True, False, False], (30, 1)), axis=1).ravel()


def mixed(rng):
    return rng.random(90) < np.repeat(rng.choice([0.05, 0.95], 45), 2)


SLOW = ["unpaired", "samples of a question alike", "samples of a question mixed"]


@pytest.mark.parametrize(
    "design",
    ["unpaired, length-matched", "paired", *(pytest.param(design, marks=pytest.mark.slow) for design in SLOW)],
)
def test_shuffled_labels_find_nothing(design):
    "p is uniform, and at q < .05 fewer than 5 % of the runs find anything."
    stats, permute, options = {
        "unpaired": (null_stats(90, 1), by_answer, {}),
        "unpaired, length-matched": (null_stats(90, 1), by_answer, dict(within="length")),
        "samples of a question alike": (null_stats(90, 2, per_question=2), by_question, {}),
        "samples of a question mixed": (null_stats(90, 2, per_question=2), mixed, {}),
        "paired": (null_stats(90, 3, per_question=3), in_questions, dict(within="question")),
    }[design]
    found = shuffles(stats, permute, **options)
    for layer in (0, 3):
        assert sps.kstest(found[layer], "uniform").pvalue > 0.01
    assert (found.q < 0.05).mean() < 0.05


@pytest.mark.slow
def test_samples_taken_for_independent_answers_find_too_much():
    "Why questions are permuted as blocks: without them, labels that mean nothing are found far too often."
    stats = null_stats(120, 2, per_question=6)

    def permute(rng):
        return np.repeat(rng.permutation(np.arange(20) % 2 == 0), 6)

    assert (shuffles(stats, permute, 100, groups=range(120))[0] < 0.05).mean() > 0.15
    assert (shuffles(stats, permute, 100)[0] < 0.05).mean() < 0.1


@pytest.mark.parametrize("within", [None, "question", "length"])
def test_permutations_stay_within_the_design(within):
    """Each stratum keeps its labels; answers of a question (in a stratum) keep theirs together, though not their
    order; much else moves."""
    rng = np.random.default_rng(0)
    ids, lengths, wrong = np.sort(rng.integers(0, 30, 100)), rng.integers(1, 4, 100), rng.random(100) < 0.4
    design = _Design(made(np.ones((100, 1)), lengths, rng, ids), wrong, within=within)
    permuted, block = design.permuted(300, rng), design.strata * 1000 + design.questions
    assert (np.sort(permuted, 1) == np.arange(len(design.rows))).all()
    labels = design.wrong[permuted]
    for stratum in np.unique(design.strata):
        assert (labels[:, design.strata == stratum].sum(1) == design.wrong[design.strata == stratum].sum()).all()
    content = sorted(tuple(sorted(design.wrong[block == b])) for b in np.unique(block))
    for permutation in labels[:20]:
        assert sorted(tuple(sorted(permutation[block == b])) for b in np.unique(block)) == content
    assert len(np.unique(labels, axis=0)) > 290
    traded = np.mean([len(np.unique(labels[:, block == b].sum(1))) > 1 for b in np.unique(block)])
    assert traded == 0 if within == "question" else traded > 0.5


def test_conditional_and_gap_have_a_null_too():
    for mode in ("gap", "conditional"):
        found = shuffles(null_stats(90, 4), by_answer, 100, mode=mode, measure="hsav")
        assert sps.kstest(found[0], "uniform").pvalue > 0.01


# power


def planted(
    seed: int, effect: float = 1.35, n: int = 100, n_layers: int = 6, layer: int = 3
) -> tuple[AnswerStats, np.ndarray]:
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.4
    scale = np.exp(rng.normal(0, 0.2, (n, n_layers)))
    scale[wrong, layer] *= effect
    return made(scale, rng.integers(1, 6, n), rng), wrong


def test_a_planted_effect_is_found_where_it_is():
    found = [
        hallucination_profile(*planted(seed), point="output", measure=measure, n_permutations=400, n_resamples=0).q
        < 0.05
        for seed in range(30)
        for measure in ("hsav",)
    ]
    rate = np.mean(found, axis=0)
    assert rate[3] > 0.9 and np.delete(rate, 3).max() <= 0.1


def test_a_single_layer_of_thirty_can_be_found():
    "The smallest p is fine enough for Benjamini and Hochberg over a network."
    found = hallucination_profile(*planted(0, effect=2.0, n_layers=30, layer=17), point="output")
    assert found.index[found.q < 0.05].tolist() == [17] and found.p[17] == 1 / 1001


def test_intervals_cover_what_was_planted():
    inside = []
    for seed in range(100):
        stats, wrong = planted(seed, n_layers=2, layer=1)
        found = hallucination_profile(
            stats, wrong, point="output", measure="hsav", n_permutations=1, n_resamples=300, seed=seed
        )
        inside.append((found.low < [0, 2 * np.log(1.35)]) & (found.high > [0, 2 * np.log(1.35)]))
    assert (np.mean(inside, axis=0) >= 0.85).all() and np.mean(inside) < 1


def test_paired_effect_beneath_larger_differences_between_questions():
    """Right and wrong samples of a question differ a little, questions a lot; wrong answers come more often from the
    loud ones."""
    rng = np.random.default_rng(0)
    question = np.repeat(rng.normal(0, 1, 60), 4)
    wrong = rng.random(240) < 1 / (1 + np.exp(-question))
    scale = np.exp(np.stack([question, question + 0.3 * wrong], 1))
    stats = made(scale, np.full(240, 3), rng, np.repeat(np.arange(60), 4))
    loose, paired = (
        hallucination_profile(stats, wrong, point="output", measure="hsav", within=within)
        for within in (None, "question")
    )
    assert loose.value[0] > 0.3 and abs(paired.value[0]) < 0.15 and paired.low[0] < 0 < paired.high[0]
    assert paired.q[1] < 0.01 < 0.05 < paired.q[0] and paired.low[1] < 0.6 < paired.high[1]


def test_a_template_that_hallucinates_is_not_a_layer():
    "Two prompt templates: one is louder and brings more wrong answers. Compared within templates, nothing is left."
    rng = np.random.default_rng(0)
    template = np.repeat(["A", "B"], 60)
    wrong = rng.random(120) < np.where(template == "A", 0.75, 0.25)
    stats = made(np.where(template == "A", 1.5, 1.0)[:, None] * np.ones((1, 3)), np.full(120, 3), rng)
    assert (hallucination_profile(stats, wrong, point="output", measure="hsav").q < 0.01).all()
    assert (hallucination_profile(stats, wrong, point="output", measure="hsav", within=template).q > 0.05).all()


def test_groups_are_respected():
    """Each answer twice in its question: nothing is learnt, and the interval stays. Taken for new answers they would
    shrink it."""
    rng = np.random.default_rng(0)
    stats = made(np.exp(rng.normal(0, 0.3, (60, 3))), rng.integers(1, 6, 60), rng, ids=[f"q{i}" for i in range(60)])
    labels, options = rng.permutation(np.arange(60) % 2 == 0), dict(point="output", n_permutations=200)
    once, twice = (
        hallucination_profile(stats, labels, **options),
        hallucination_profile(stats + stats, np.tile(labels, 2), **options),
    )
    np.testing.assert_allclose(twice[["value", "low", "high"]], once[["value", "low", "high"]], rtol=1e-9, atol=1e-12)
    apart = hallucination_profile(stats + stats, np.tile(labels, 2), groups=range(120), **options)
    assert ((apart.high - apart.low) < 0.85 * (once.high - once.low)).all()
    assert twice.attrs["compared"] == dict(wrong=60, right=60, questions=60)
    named = hallucination_profile(stats, labels, groups=stats.ids, **options)
    pd.testing.assert_frame_equal(named, once)


def test_the_same_seed_gives_the_same_table(coin):
    stats = null_stats(80, 0)
    a, b, c = (
        hallucination_profile(stats, coin, point="output", seed=seed, n_permutations=300, n_resamples=300)
        for seed in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(a, b)
    assert (a.value == c.value).all() and (a.low != c.low).any() and (a.p != c.p).any()
    np.testing.assert_allclose(a.value, eavss(stats, coin, point="output"), rtol=1e-9)
    np.testing.assert_allclose(a.q, sps.false_discovery_control(a.p))
    assert a.index.name == "layer" and list(a) == ["value", "low", "high", "p", "q"]


def test_label_noise_shrinks_the_effect(coin):
    stats, wrong = planted(0, effect=1.2, n=600)
    value = {
        share: np.mean([hsav(stats, flip_labels(wrong, share, seed=seed), point="output")[3] for seed in range(10)])
        for share in (0, 0.25, 0.5)
    }
    assert abs(value[0.25] / value[0] - 0.5) < 0.1 and abs(value[0.5] / value[0]) < 0.1
    words = ["right", "empty", "wrong", "refused", "right", "wrong"]
    assert (
        flip_labels(words, 1) == ["wrong", "empty", "right", "refused", "wrong", "right"]
        and flip_labels(words, 0) == words
        and words[0] == "right"
    )
    assert sum(a != b for a, b in zip(flip_labels(coin, 0.25), coin)) == 20


# bad input


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr("avss_nb.eavss.run_blocks", lambda *args: pytest.fail("long work was begun"))


def test_an_answer_of_no_tokens(no_work):
    answers = answers_of([(3, 2), (4, 0), (2, 1), (5, 0)])
    with pytest.raises(ValueError, match=r"answer 1 \('q0'\) has no token \(2 of 4 answers\).*answers.filter"):
        answer_stats(tiny("llama"), pads(), answers)
    answer = answers.filter(lambda row: len(row["answer_tokens"]) > 0)
    assert len(answer) == 2


@pytest.mark.parametrize("column", ["id", "prompt_tokens", "answer_tokens"])
def test_a_column_is_missing(no_work, column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        answer_stats(tiny("llama"), pads(), answers_of().remove_columns(column))


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(tokens="last"), "'last'"),
        (dict(tokens=()), "nothing"),
        (dict(points=("outputs",)), "outputs"),
        (dict(batch_size=0), "batch_size"),
        (dict(padding_side="up"), "up"),
    ],
    ids=str,
)
def test_wrong_options(no_work, options, named):
    with pytest.raises(ValueError, match=named):
        answer_stats(tiny("llama"), pads(), answers_of(), **options)


def test_nothing_to_read(no_work):
    with pytest.raises(ValueError, match="empty"):
        answer_stats(tiny("llama"), pads(), answers_of().select([]))
    with pytest.raises(ValueError, match=r"answer 1 .* 70 tokens.* the model's 64"):
        answer_stats(tiny("gpt2"), pads(), answers_of([(3, 2), (60, 10)]))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_activations_that_are_not_finite(value):
    model = tiny("llama")
    blocks(model)[3].mlp.down_proj.weight.data[0, 0] = float(value)
    with pytest.raises(FloatingPointError, match="layer 3 are NaN or infinite at 'output'"):
        answer_stats(model, pads(), answers_of())


@pytest.mark.parametrize(
    "labels, named",
    [
        (None, "no labels"),
        ("alias", "no labels"),
        (answers_of(), "no labels"),
        (["right"] * 79, "79 labels for 80"),
        (["right"] * 79 + ["maybe"], "label of answer 79 is 'maybe'"),
        ([None] * 80, "label of answer 0 is None"),
        ([0, 1] * 40, "label of answer 0 is 0"),
        (["right"] * 80, "80 right, 0 wrong"),
        ([True] * 80, "0 right, 80 wrong"),
        (["wrong"] * 70 + ["empty"] * 10, "0 right, 70 wrong, 10 empty"),
        (["empty"] * 80, "80 empty"),
    ],
    ids=lambda x: str(x)[:40],
)
@pytest.mark.parametrize("measure", [eavss, hallucination_profile])
def test_wrong_labels(measure, labels, named):
    with pytest.raises(ValueError, match=named):
        measure(null_stats(80, 0), labels, point="output")


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(n_permutations=0), "n_permutations=0"),
        (dict(n_resamples=-1), "n_resamples=-1"),
        (dict(level=1), "level=1"),
        (dict(mode="mean"), "'mean'"),
        (dict(measure="avss"), "'avss'"),
        (dict(point="update"), "'update' was not collected"),
        (dict(tau=0), "above zero, not tau=0"),
        (dict(eps=-1), "above zero, not eps=-1"),
        (dict(eps=float("nan")), "above zero"),
        (dict(eps=1e9), "layer 0 .* histogram resolves"),
        (dict(eps=1e-12), "histogram resolves"),
        (dict(groups=[1, 2]), "groups has 2 values for 80"),
        (dict(within="day"), "'day'"),
        (dict(within=[1]), "within has 1 values"),
        (dict(within="question"), "no stratum of within=question"),
    ],
    ids=str,
)
def test_wrong_profile_options(coin, options, named):
    with pytest.raises(ValueError, match=named):
        hallucination_profile(null_stats(80, 0), coin, **(dict(point="output") | options))


def test_too_few():
    stats = null_stats(80, 0)
    with pytest.raises(ValueError, match="9 wrong and 71 right .*at least 10"):
        hallucination_profile(stats, [True] * 9 + [False] * 71, point="output")
    assert (
        len(hallucination_profile(stats, [True] * 10 + [False] * 70, point="output", n_permutations=20, n_resamples=20))
        == 6
    )
    with pytest.raises(ValueError, match="to 8 questions"):
        hallucination_profile(stats, np.arange(80) % 20 < 10, groups=np.arange(80) // 10, point="output")
    with pytest.raises(ValueError, match="cannot be permuted in this design"):
        hallucination_profile(
            null_stats(90, 0),
            np.repeat([True, False], [60, 30]),
            groups=np.arange(90) // 60,
            point="output",
            min_answers=1,
        )
