"""Properties of the layer statistics and of the choice of layers, on generated inputs."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from avss_nb.data import batches
from avss_nb.metrics import (
    EXACT_EPS,
    N_BINS,
    REDUCTIONS,
    LayerStats,
    RunningSums,
    bin_edges,
    cavss,
    collect_stats,
    magnitude_bins,
    navss,
    normalized_variance,
    share_below,
    sparsity,
    variance,
)
from avss_nb.models import load_model
from avss_nb.pruning import select_layers
from tiny import one_thread

quick = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
EDGES = bin_edges()


class Times(nn.Module):
    "A block that returns its input times a factor."

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states):
        return hidden_states * self.factor


class Table(nn.Module):
    "A model whose hidden states are the rows of a table: token t enters block 0 as row t, and leaves it as it came."

    def __init__(self, rows: np.ndarray):
        super().__init__()
        self.embed, self.layers = (
            nn.Embedding.from_pretrained(torch.tensor(rows)),
            nn.ModuleList([Times(1.0), Times(-0.5)]),
        )

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def batch_of(rows: list[list[int]], width: int, left: bool, uncounted: set[int] = frozenset()) -> dict:
    "A padded batch of token rows; tokens in `uncounted` are attended but do not count."

    def pad(row, fill):
        filling = [fill] * (width - len(row))
        return filling + row if left else row + filling

    mask = torch.tensor([pad([1] * len(r), 0) for r in rows])
    count = torch.tensor([pad([int(t not in uncounted) for t in r], 0) for r in rows]).bool()
    return dict(input_ids=torch.tensor([pad(r, 0) for r in rows]), attention_mask=mask, token_mask=count)


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0, 2**-17, EXACT_EPS, -EXACT_EPS, 1e-40, -1e30, 1e30]),
    st.floats(-3, 3, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
)


@st.composite
def split_tables(draw):
    "A table, its tokens cut into texts, the texts dealt into batches in two ways, and the tokens that do not count."
    table = draw(arrays(np.float32, st.tuples(st.integers(3, 12), st.integers(2, 6)), elements=numbers.map(np.float32)))
    tokens = list(range(len(table)))
    cuts = sorted(draw(st.sets(st.integers(1, len(tokens) - 1))))
    texts = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)])]

    def deal():
        order = draw(st.permutations(texts))
        ends = sorted(draw(st.sets(st.integers(1, len(order) - 1)))) if len(order) > 1 else []
        parts = [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)])]
        return [batch_of(p, max(map(len, p)) + draw(st.integers(0, 2)), draw(st.booleans()), skipped) for p in parts]

    skipped = draw(st.sets(st.sampled_from(tokens), max_size=len(tokens) - 1))
    return table, deal(), deal(), skipped


def same(a: LayerStats, b: LayerStats, scale: np.ndarray):
    "Counts equal, sums equal to 1e-9 of what was added up."
    assert a.sums.keys() == b.sums.keys()
    for name, x in a.sums.items():
        y = b.sums[name]
        if not x.is_floating_point():
            assert torch.equal(x, y), name
        else:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * scale if name.endswith("sum") else 0.0, msg=name)


@quick
@given(split_tables(), st.randoms(use_true_random=False))
def test_any_split_and_order_adds_up_to_the_same(case, random):
    table, one_way, other_way, _ = case
    model, points = Table(table), ("input", "output", "update")
    whole = collect_stats(model, one_way, points=points, reduce=REDUCTIONS)
    pieces = [collect_stats(model, [b], points=points, reduce=REDUCTIONS) for b in other_way if b["token_mask"].any()]
    random.shuffle(pieces)
    while len(pieces) > 1:  # added up pair by pair, in any order
        pieces.append(pieces.pop(random.randrange(len(pieces))) + pieces.pop(random.randrange(len(pieces))))
    with tempfile.TemporaryDirectory() as folder:
        pieces[0].save(Path(folder) / "stats.safetensors")
        again = LayerStats.load(Path(folder) / "stats.safetensors")
    same(again, pieces[0], 0.0)
    same(again, whole, float(abs(table).astype(float).sum()))


@quick
@given(split_tables())
def test_sums_by_hand(case):
    table, some, _, skipped = case
    counted = table[[t for t in range(len(table)) if t not in skipped]].astype(float)
    stats = collect_stats(Table(table), some, points=("output",), reduce=REDUCTIONS)
    for layer, values in enumerate((counted, counted * -0.5)):
        f32 = values.astype(np.float32).astype(float)  # half of a subnormal is rounded
        assert stats.get("output", "count")[layer] == f32.size and stats.get("output", "tokens")[layer] == len(f32)
        assert stats.get("output", "exact")[layer] == (abs(f32.astype(np.float32)) < np.float32(EXACT_EPS)).sum()
        np.testing.assert_array_equal(
            stats.get("output", "hist")[layer],
            np.histogram(abs(f32), EDGES[EDGES < np.inf])[0].tolist() + [0] * (N_BINS - (EDGES < np.inf).sum() + 1),
        )
        np.testing.assert_allclose(stats.get("output", "sumsq")[layer], (f32**2).sum(), rtol=1e-12)
        np.testing.assert_allclose(
            stats.get("output", "sum")[layer], f32.sum(), rtol=1e-12, atol=1e-12 * abs(f32).sum()
        )
        np.testing.assert_allclose(
            stats.get("output", "neuron_sum")[layer], f32.sum(0), rtol=1e-12, atol=1e-12 * abs(f32).sum()
        )
        texts = [
            table[b["input_ids"][r][b["token_mask"][r]].numpy()].astype(float) * (1.0, -0.5)[layer]
            for b in some
            for r in range(len(b["input_ids"]))
            if b["token_mask"][r].any()
        ]
        assert stats.get("output", "samples")[layer] == len(texts)
        np.testing.assert_allclose(
            stats.get("output", "sample_variance")[layer],
            sum(t.mean(0).var(ddof=1) for t in texts),
            rtol=1e-9,
            atol=1e-70,
        )


def test_some_blocks_have_the_sums_that_they_have_among_all():
    "Also after they are stored; and what is collected of other blocks is not added."
    table = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    model, some = Table(table), [batch_of([[0, 1, 2], [3, 4, 5]], 3, False)]
    every, last = collect_stats(model, some), collect_stats(model, some, layers=[1])
    assert every.layers is None and last.layers == [1] and variance(last).index.tolist() == [1]
    for name, sums in every.sums.items():
        assert torch.equal(last.sums[name], sums[1:]), name
    np.testing.assert_allclose(every.get("stream", "cosine_distance"), [0, 2 * 6], atol=1e-5)
    np.testing.assert_allclose(every.get("stream", "angle"), [0, 2], atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        last.save(Path(folder) / "one.safetensors")
        again = LayerStats.load(Path(folder) / "one.safetensors")
    assert again.layers == [1]
    for call in (lambda: again + every, lambda: collect_stats(model, some, layers=[2])):
        with pytest.raises(ValueError, match="cannot be added|there is no block 2"):
            call()


def test_one_neuron_or_no_token_gives_no_warning(recwarn):
    stats = RunningSums(REDUCTIONS)
    stats.add(torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    stats.add(torch.ones(2, 3, 1), torch.zeros(2, 3, dtype=torch.bool))
    assert stats.values["sample_variance"] == 0 and stats.values["samples"] == 2 and not recwarn.list


@quick
@given(arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
def test_bins_of_any_float(bits):
    "Every bit pattern of a finite float32, subnormal and negative ones too."
    a = bits.view(np.float32)
    a = a[np.isfinite(a)]
    np.testing.assert_array_equal(
        magnitude_bins(torch.tensor(a)).numpy(), np.searchsorted(EDGES, abs(a).astype(float), side="right") - 1
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bins_of_other_types(dtype):
    a = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(magnitude_bins(a), magnitude_bins(a.float()))


positive = st.one_of(st.floats(1e-7, 1e3), st.sampled_from([1e-45, 1e-38, 1e30, 1e300]))


@quick
@given(
    arrays(np.float32, st.integers(1, 200), elements=numbers.map(np.float32)),
    st.lists(positive, min_size=2, max_size=6, unique=True),
)
def test_share_below_is_off_by_less_than_its_bin(a, thresholds):
    hist = np.bincount(magnitude_bins(torch.tensor(a)).numpy(), minlength=N_BINS)[None]
    shares = [share_below(hist, np.array([eps]))[0] for eps in sorted(thresholds)]
    for eps, share in zip(sorted(thresholds), shares):
        inside = hist[0, min(np.searchsorted(EDGES, eps, side="right") - 1, N_BINS - 1)] / len(a)
        assert abs(share - (abs(a.astype(float)) < eps).mean()) <= inside + 1e-12 and 0 <= share <= 1
    assert all(np.diff(shares) >= -1e-12)


@quick
@given(
    arrays(np.float32, st.integers(50, 400), elements=st.floats(np.float32(0.01), 4, width=32), unique=True),
    st.floats(0.05, 0.95),
)
def test_exact_quantiles_come_back(a, q):
    hist = np.bincount(magnitude_bins(torch.tensor(a)).numpy(), minlength=N_BINS)[None]
    eps = np.quantile(a.astype(float), q)
    inside = hist[0, np.searchsorted(EDGES, eps, side="right") - 1] / len(a)
    assert abs(share_below(hist, np.array([eps]))[0] - q) <= inside + 1 / len(a)


@quick
@given(
    arrays(np.float32, st.tuples(st.integers(2, 8), st.integers(2, 8)), elements=st.floats(-3, 3, width=32)),
    st.sampled_from([0.01, 0.5, 2.0]),
)
def test_normalised_quantities_sum_to_one(table, tau):
    if abs(table).max() < 1e-3 or table.var() < 1e-6:
        return  # constant: there is nothing to share out
    stats = collect_stats(Table(table), [batch_of([list(range(len(table)))], len(table), False)], points=("output",))
    assert normalized_variance(stats, point="output").sum() == pytest.approx(1)
    assert sparsity(stats, point="output", tau=tau).between(0, 1).all()
    if (sparsity(stats, point="output", tau=tau) > 0).all():
        shares, cumulated = navss(stats, point="output", tau=tau), cavss(stats, point="output", tau=tau)
        assert (
            shares.sum() == pytest.approx(1)
            and cumulated.iloc[-1] == pytest.approx(1)
            and (cumulated.diff().dropna() >= 0).all()
        )
        np.testing.assert_allclose(cumulated, np.cumsum(shares))


@pytest.fixture(scope="module")
def bundled():
    "The bundled model, its tokenizer, texts of uneven length and their statistics one by one, unpadded."
    model, tokenizer = load_model()
    texts = [
        "one",
        "a b c d e f g",
        "the quick brown fox jumps over the lazy dog",
        "numbers: " + " ".join(map(str, range(12))),
        "Why? Because it is so, and not otherwise.",
    ]
    stats = collect_stats(
        model,
        batches(texts, tokenizer, batch_size=1, max_length=16),
        points=("output", "relative_update"),
        reduce=REDUCTIONS,
    )
    return model, tokenizer, texts, stats


@settings(
    deadline=None, max_examples=5, derandomize=True, phases=[Phase.generate]
)  # to shrink a failure would take minutes
@given(data=st.data())
def test_batching_moves_nothing(bundled, data):
    "Padding side, batch size or token budget, sorting and order, on the real model."
    model, tokenizer, texts, alone = bundled
    options = dict(padding_side=data.draw(st.sampled_from(["left", "right"])), sort=data.draw(st.booleans()))
    options |= data.draw(
        st.sampled_from(
            [dict(batch_size=1), dict(batch_size=2), dict(batch_size=5), dict(batch_size=8), dict(max_tokens=40)]
        )
    )
    made = batches(data.draw(st.permutations(texts)), tokenizer, max_length=16, **options)
    assert all(b["attention_mask"][:, -1 if options["padding_side"] == "left" else 0].all() for b in made)
    other = collect_stats(model, made, points=("output", "relative_update"), reduce=REDUCTIONS)
    for point in alone.points:
        assert (other.get(point, "count") == alone.get(point, "count")).all()
        for reduce in REDUCTIONS:
            np.testing.assert_allclose(
                variance(other, point=point, reduce=reduce), variance(alone, point=point, reduce=reduce), rtol=1e-4
            )
        np.testing.assert_allclose(sparsity(other, point=point), sparsity(alone, point=point), rtol=1e-4, atol=2e-5)


scores = st.lists(st.floats(0, 1e6), min_size=2, max_size=60).map(lambda x: pd.Series(x, dtype=float))


def chosen_or_none(scores, fraction, rule):
    "The layers, or none where the choice is less than one layer."
    try:
        return select_layers(scores, fraction=fraction, rule=rule)
    except ValueError as error:
        assert "less than one layer" in str(error)
        return []


@quick
@given(scores, st.integers(1, 99))
def test_count_takes_the_floor_of_the_fraction(s, percent):
    chosen = chosen_or_none(s, percent / 100, "count")
    assert len(chosen) == percent * len(s) // 100 and chosen == sorted(set(chosen))
    kept = s.drop(chosen)
    if len(chosen):
        assert s[chosen].max() <= kept.min()
    ties = s.index[s == s[chosen].max()] if chosen else []
    assert list(ties[: len(set(ties) & set(chosen))]) == [
        i for i in ties if i in chosen
    ]  # of equal scores the earlier goes first


@quick
@given(scores.filter(lambda s: s.sum() > 1e-3), st.integers(1, 99))
def test_mass_and_authors_stay_below_the_fraction(s, percent):
    total, limit = s.sum(), percent / 100
    mass, authors = (chosen_or_none(s, limit, rule) for rule in ("mass", "published_code"))
    assert s[mass].sum() / total <= limit + 1e-9 and s[authors].sum() / total <= limit + 1e-9
    rest = s.drop(mass)
    assert (s[mass].sum() + rest.min()) / total > limit - 1e-9 and (not mass or s[mass].max() <= rest.min())
    assert authors == list(range(len(authors))) and s.iloc[: len(authors) + 1].sum() / total > limit - 1e-9


@pytest.mark.parametrize("rule, expected", [("count", [1, 3]), ("mass", [0, 1, 3, 5]), ("published_code", [0, 1])])
def test_choice_by_hand(rule, expected):
    assert select_layers(pd.Series([4.0, 1, 8, 2, 9, 3, 7, 6]), fraction=0.25, rule=rule) == expected


def test_a_fraction_that_floating_point_falls_short_of():
    "0.29 · 100 is 28.999999999999996 in floating point."
    assert len(select_layers(pd.Series(np.arange(100.0)), fraction=0.29)) == 29
