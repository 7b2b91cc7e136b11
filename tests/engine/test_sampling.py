import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine.sampling import Sampling, SamplingBatch, probabilities, sample
from retnet.engine.sampling_kernel import sampler
from retnet.settings import UserError

inf, nan = math.inf, math.nan


@pytest.fixture(scope="module")
def kernel():
    """Compiled, or read from the disk: by the first test that needs it."""
    if sampler() is None:
        pytest.skip("needs numba")


def brute_force(logits, sampling, seen):
    """One row, one token at a time, each rule as its definition says."""
    scores = list(logits)
    for token in seen:
        scores[token] = (
            scores[token] / sampling.repetition_penalty
            if scores[token] > 0
            else scores[token] * sampling.repetition_penalty
        )
    by_rank = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if sampling.temperature == 0:
        return [float(i == by_rank[0]) for i in range(len(scores))]

    def chances(kept):
        weights = {i: math.exp((scores[i] - scores[by_rank[0]]) / sampling.temperature) for i in kept}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    kept = by_rank[: sampling.top_k] if sampling.top_k else by_rank
    if sampling.top_p < 1:
        chance = chances(kept)
        mass = list(itertools.accumulate(chance[token] for token in kept))
        kept = [token for i, token in enumerate(kept) if i == 0 or mass[i - 1] < sampling.top_p]
    chance = chances(kept)
    kept = [i for i in kept if chance[i] >= sampling.min_p * max(chance.values())]
    chance = chances(kept)
    return [chance.get(i, 0.0) for i in range(len(scores))]


CASES = [
    Sampling(),
    *(Sampling(temperature=t) for t in (0, 0.3, 2.5)),
    *(Sampling(top_k=k) for k in (1, 4, 12, 1000)),
    *(Sampling(top_p=p) for p in (1e-9, 0.5, 0.93)),
    *(Sampling(min_p=p) for p in (0.05, 0.4, 1)),
    *(Sampling(repetition_penalty=r) for r in (0.5, 1.3, 50)),
    *(
        Sampling(t, k, p, m, r)
        for t, k, p, m, r in itertools.product((0.7, 1.5), (0, 6), (0.8, 1), (0, 0.1), (1, 1.5))
    ),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_every_filter_and_their_order_match_the_definitions(sampling):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(5, 12, generator=generator, dtype=torch.float64)
    seen = torch.rand(5, 12, generator=generator) < 0.4
    got = probabilities(logits, sampling, seen)
    for row in range(5):
        expected = brute_force(logits[row].tolist(), sampling, seen[row].nonzero().flatten().tolist())
        torch.testing.assert_close(
            got[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15
        )


@settings(deadline=None, max_examples=200)
@given(
    logits=st.lists(
        st.one_of(st.integers(-4, 4), st.floats(-1e4, 1e4), st.just(-inf)), min_size=2, max_size=9
    ).filter(lambda row: max(row) > -inf),
    temperature=st.floats(0, 1e3) | st.just(1e-300),
    top_k=st.integers(0, 10),
    top_p=st.floats(1e-12, 1),
    min_p=st.floats(0, 1),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_the_likeliest_always_stays_and_only_allowed_tokens_are_drawn(
    logits, temperature, top_k, top_p, min_p, draw
):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    row = torch.tensor([logits], dtype=torch.float64)
    chance = probabilities(row, sampling)[0]
    assert chance.sum().item() == pytest.approx(1)
    likeliest = ((row[0] - max(logits)) / (temperature or 1)).exp() == 1  # or as likely as it, to rounding
    assert chance[likeliest].max() > 0
    assert (chance[row[0] == -inf] == 0).all()
    if top_k:
        assert (chance > 0).sum() <= top_k
    for u in (0.0, draw, 1 - 2**-53):
        assert chance[sample(row, sampling, torch.tensor([u], dtype=torch.float64))] > 0


def test_draws_cover_the_distribution_exactly():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1]])
    sampling = Sampling(temperature=0.8, top_k=4)
    n = 20_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(sample(logits.expand(n, -1), sampling, draws), minlength=5)
    torch.testing.assert_close(counts / n, probabilities(logits, sampling)[0].float(), atol=1.01 / n, rtol=0)
    assert counts[1] == 0


def test_each_row_uses_its_own_draw():
    logits = torch.zeros(4, 8)
    draws = torch.tensor([0.99, 0.0, 0.5, 0.13], dtype=torch.float64)
    assert sample(logits, Sampling(), draws).tolist() == [7, 0, 4, 1]


def test_greedy_is_the_likeliest_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -5.0, -0.9]])
    draws = torch.tensor([0.99, 0.99], dtype=torch.float64)
    assert sample(logits, Sampling(temperature=0), draws).tolist() == [1, 2]
    seen = torch.tensor([[False, True, False], [False, False, True]])
    penal = Sampling(temperature=0, repetition_penalty=2)
    assert sample(logits, penal, draws, seen).tolist() == [2, 0]


def test_of_equal_tokens_top_k_keeps_those_with_the_smaller_ids():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    assert probabilities(logits, Sampling(top_k=2)).tolist() == [[0, 0.5, 0.5, 0, 0]]


def test_top_p_needs_no_more_than_what_reaches_it():
    assert probabilities(torch.zeros(1, 4), Sampling(top_p=0.5)).tolist() == [[0.5, 0.5, 0, 0]]


def test_top_p_keeps_the_likeliest_even_where_probabilities_round_to_a_tie():
    logits = torch.tensor([[-3e-237, 0.0]], dtype=torch.float64)
    assert probabilities(logits, Sampling(top_p=0.25)).tolist() == [[0, 1]]


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999999])
def test_a_nucleus_of_any_size_is_that_of_the_whole_sorted_row(mass):
    generator = torch.Generator().manual_seed(2)
    spread = torch.tensor([[0.0], [0.01], [1.0], [4.0], [20.0]], dtype=torch.float64)
    logits = spread * torch.randn(5, 2000, generator=generator, dtype=torch.float64).round(decimals=2)
    together = probabilities(logits, Sampling(top_p=mass))
    for row in range(5):
        chances, order = logits[row].softmax(-1).sort(descending=True, stable=True)
        reached = mass * (1 - 1e-12)  # 1,800 times 1/2,000 is 0.9
        count = int((chances.cumsum(-1)[:-1] < reached).sum()) + 1
        assert together[row].nonzero()[:, 0].tolist() == sorted(order[:count].tolist())
        assert torch.equal(probabilities(logits[row : row + 1], Sampling(top_p=mass))[0], together[row])


def test_low_precision_logits_are_computed_in_double():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = probabilities(logits, Sampling(temperature=0.5))
    torch.testing.assert_close(got, (logits.double() / 0.5).softmax(-1))


@pytest.mark.parametrize("bad", [[nan, 0.0], [inf, 0.0], [-inf, -inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_without_meaning_are_refused(bad, temperature):
    logits = torch.tensor([[1.0, 2.0], bad])
    with pytest.raises(UserError, match="not finite"):
        sample(logits, Sampling(temperature), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", nan),
        ("temperature", inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 5e-324),
    ],
)
def test_values_out_of_range_name_field_and_value(field, value):
    with pytest.raises(UserError, match=rf"^{field} is {value}; it must be "):
        Sampling(**{field: value})


# -- the compiled kernel ----------------------------------------------------------------------------------------


def random_logits(rng, rows, vocab_size):
    """Normal ones, ones with many equals, and ones of which most are forbidden; on fp32's grid."""
    kinds = [
        rng.normal(size=(rows, vocab_size)) * rng.choice([0.1, 1, 5, 60]),
        rng.integers(-3, 3, (rows, vocab_size)).astype(float),
        np.where(rng.random((rows, vocab_size)) < 0.9, -inf, rng.normal(size=(rows, vocab_size))),
    ]
    logits = kinds[rng.integers(3)]
    logits[:, rng.integers(vocab_size)] = 0.5  # at least one that is allowed
    return torch.tensor(logits, dtype=torch.float32)


def random_samplings(rng, rows):
    return [
        Sampling(
            temperature=float(rng.choice([0, 0.01, 0.7, 1, 1, 3])),
            top_k=int(rng.choice([0, 0, 1, 2, 40, 10**6])),
            top_p=float(rng.choice([1, 1, 1e-9, 0.3, 0.9, 0.999999])),
            min_p=float(rng.choice([0, 0, 0.05, 1])),
        )
        for _ in range(rows)
    ]


@pytest.mark.usefixtures("kernel")
@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), vocab_size=st.sampled_from([1, 2, 63, 64, 65, 300, 5000, 150_000]))
def test_the_compiled_kernel_draws_what_the_definitions_say(seed, vocab_size):
    rng = np.random.default_rng(seed)
    rows = 3 if vocab_size > 10_000 else 7
    logits, samplings = random_logits(rng, rows, vocab_size), random_samplings(rng, rows)
    draws = torch.tensor(rng.choice([0, 0.5, 1 - 2**-53, *rng.random(4)], rows), dtype=torch.float64)
    batch = SamplingBatch(samplings, vocab_size)
    tokens = batch.sample(logits, draws)
    chances = batch.probabilities(logits)
    cumulative = chances.cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        assert chances[row, token] > 0
        if samplings[row].temperature > 0:
            below = cumulative[row, token - 1] if token else 0.0
            assert below - 1e-9 <= draws[row] <= cumulative[row, token] + 1e-9
    assert batch.sample(logits.double(), draws).tolist() == tokens.tolist()
    wide = torch.randn(rows, vocab_size + 3)
    wide[:, :vocab_size] = logits
    assert batch.sample(wide[:, :vocab_size], draws).tolist() == tokens.tolist()
    for row, token in enumerate(tokens.tolist()):  # alone as in company
        single = SamplingBatch(samplings[row : row + 1], vocab_size)
        assert single.sample(logits[row : row + 1], draws[row : row + 1]).tolist() == [token]


@pytest.mark.usefixtures("kernel")
def test_a_nucleus_of_equals_ends_where_its_mass_is_reached():
    """Three times a tenth is 0.3 or a bit more, as sums go: the definition and the kernel agree that it reaches 0.3."""
    for n in range(1, 24):
        for kept in range(1, n + 1):
            batch = SamplingBatch([Sampling(top_p=kept / n)], n)
            assert (batch.probabilities(torch.zeros(1, n)) > 0).tolist() == [[i < kept for i in range(n)]]
            last = torch.tensor([1 - 2**-53], dtype=torch.float64)
            assert batch.sample(torch.zeros(1, n), last).tolist() == [kept - 1]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_that_are_not_finite_get_no_token(compiled, temperature, monkeypatch):
    if not compiled:
        monkeypatch.setattr("retnet.engine.sampling.sampler", lambda: None)
    elif sampler() is None:
        pytest.skip("needs numba")
    logits = torch.randn(7, 90)
    logits[0, 3], logits[1, 4], logits[2], logits[3, 1], logits[4, 5] = nan, inf, -inf, -nan, -inf
    logits[5] = torch.tensor([-0.0, 0.0] * 45)
    batch = SamplingBatch([Sampling(temperature=temperature)] * 7, 90)
    tokens = batch.sample(logits, torch.full((7,), 0.0, dtype=torch.float64)).tolist()
    assert tokens[:4] == [-1] * 4
    assert min(tokens[4:]) >= 0
    assert tokens[5] == 0
