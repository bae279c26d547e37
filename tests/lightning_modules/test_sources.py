"""Sources against a chain and a process worked out by hand, sums over all paths in plain Python, and long samples."""

import bisect
import functools
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from lightning_modules import sources
from lightning_modules.metrics import Excess
from lightning_modules.sources import ALPHABET, MAX_STATES, SOURCES, Source, hidden_markov, markov

DRAWN = {
    "chain": lambda seed=3: markov(order=2, symbols=3, concentration=0.5, seed=seed),
    "hidden": lambda seed=5: hidden_markov(states=5, symbols=3, concentration=0.4, seed=seed),
}


@pytest.fixture(params=DRAWN)
def source(request):
    return DRAWN[request.param]()


def two_symbols(p=0.3, q=0.6):
    """Order 1: p = P(b after a), q = P(a after b)."""
    table = torch.tensor([[1 - p, p], [q, 1 - q]], dtype=torch.float64)
    return Source("ab", table, torch.tensor([[0, 1], [0, 1]]))


def even_process():
    """Runs of b have even length: state 0 emits a or b alike, and after b state 1 has to emit another b."""
    table = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    return Source("ab", table, torch.tensor([[0, 1], [0, 0]]))


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities if p)


def probability(source, word):
    """Of a word at any place of the text: a sum over the states in which it may begin, in plain Python."""
    total = 0.0
    emission, successor, stationary = plain(source)
    for state, weight in enumerate(stationary):
        for symbol in word:
            weight *= emission[state][symbol]
            state = successor[state][symbol]
        total += weight
    return total


@functools.cache
def plain(source, steps=3000):
    """The tables as lists, and the stationary distribution by power iteration."""
    emission, successor = source.emission.numpy(), source.successor.numpy()
    distribution = np.full(len(emission), 1 / len(emission))
    for _ in range(steps):
        following = np.zeros_like(distribution)
        np.add.at(following, successor, distribution[:, None] * emission)
        distribution = following
    return emission.tolist(), successor.tolist(), distribution.tolist()


def windows_of(source, text, length, count=None):
    ids = torch.tensor([source.symbols.index(character) for character in text])
    windows = ids.unfold(0, length + 1, length + 1)[:count]
    return windows[:, :-1], windows[:, 1:]


# By hand


def test_a_chain_of_two_symbols_by_hand():
    source = two_symbols(p=0.3, q=0.6)
    assert source.stationary.tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-15)  # p : q = flow from a : flow from b
    assert source.entropy_rate == pytest.approx(2 / 3 * entropy(0.3, 0.7) + 1 / 3 * entropy(0.6, 0.4), rel=1e-14)
    inputs, targets = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 0]])
    assert source.cross_entropy(inputs, targets).exp().tolist() == [pytest.approx([1 / 0.3, 1 / 0.4, 1 / 0.6])]
    assert source.expected_cross_entropy(3).tolist() == pytest.approx([source.entropy_rate] * 3)


def test_a_chain_of_order_two_by_hand():
    """Contexts aa, ab, ba, bb; first a chain of order 1 in disguise, then one of order 2."""
    table = torch.tensor([[1 / 2, 1 / 2], [3 / 4, 1 / 4], [1 / 2, 1 / 2], [3 / 4, 1 / 4]], dtype=torch.float64)
    source = Source("ab", table, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))
    # Of order 1: a is followed by b with 1/2, b by a with 3/4, so a : b = 3 : 2.
    assert source.stationary.tolist() == pytest.approx([3 / 10, 3 / 10, 3 / 10, 1 / 10])
    assert source.entropy_rate == pytest.approx(3 / 5 * math.log(2) + 2 / 5 * entropy(1 / 4, 3 / 4))
    table = torch.cat([table[:3], table.new_tensor([[1 / 4, 3 / 4]])])
    source = Source("ab", table, source.successor)
    # Flow into and out of bb: P(ab) / 4 = P(bb) / 4; P(ba) = P(ab); P(aa) = P(ba). So all four are alike.
    assert source.stationary.tolist() == pytest.approx([1 / 4] * 4)
    after_b = (1 / 4 + 3 / 4) / 2  # a first b may stand behind a or behind b
    losses = source.cross_entropy(torch.tensor([[1, 1, 1]]), torch.tensor([[1, 1, 0]]))
    assert losses.tolist() == [pytest.approx([-math.log(after_b), -math.log(3 / 4), -math.log(1 / 4)])]


def test_the_even_process_by_hand():
    """No finite number of symbols b tells the state."""
    source = even_process()
    assert source.stationary.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert source.entropy_rate == pytest.approx(2 / 3 * math.log(2))
    bs = torch.ones(1, 7, dtype=torch.int64)
    # Of the states in which b^n can be seen to begin, 0 has weight 2/3 * 2^-ceil(n/2) and 1 has 1/3 * 2^-floor(n/2).
    for n, p in enumerate(source.conditional(bs)[0, :, 1].tolist(), 1):
        weight = [2 / 3 * 2 ** -((m + 1) // 2) + 1 / 3 * 2 ** -(m // 2) for m in (n, n + 1)]
        assert p == pytest.approx(weight[1] / weight[0], rel=1e-14)
    known = source.conditional(torch.tensor([[0, 1, 1, 1, 1]]))
    assert known[0, :, 1].tolist() == pytest.approx([1 / 2, 1, 1 / 2, 1, 1 / 2])
    assert source.cross_entropy(torch.tensor([[0, 1]]), torch.tensor([[1, 0]])).tolist() == [[math.log(2), math.inf]]
    with pytest.raises(ValueError, match="never emits in this order"):
        source.conditional(torch.tensor([[1, 1, 1], [0, 1, 0]]))


# Against sums over all paths


def test_stationary_distribution_and_entropy_rate_by_power_iteration(source):
    distribution = np.array(plain(source)[2])
    np.testing.assert_allclose(source.stationary.numpy(), distribution, rtol=1e-11)
    rows = [entropy(*row) for row in source.emission.tolist()]
    assert source.entropy_rate == pytest.approx(distribution @ rows, rel=1e-12)


def test_the_filter_is_the_sum_over_all_start_states(source):
    words = torch.tensor(list(itertools.product(range(3), repeat=4)))
    known, losses = source.conditional(words[:, :-1]), source.cross_entropy(words[:, :-1], words[:, 1:])
    assert known.dtype == losses.dtype == torch.float64 and known.shape == (81, 3, 3) and losses.shape == (81, 3)
    for row, word in enumerate(words.tolist()):
        for t in range(3):
            before = probability(source, word[: t + 1])
            expected = [probability(source, [*word[: t + 1], symbol]) / before for symbol in range(3)]
            assert known[row, t].tolist() == pytest.approx(expected, rel=1e-11)
            assert float(losses[row, t]) == pytest.approx(-math.log(expected[word[t + 1]]), rel=1e-10)


def test_conditionals_multiply_to_the_probability_of_the_word(source):
    words = torch.randint(3, (11, 23), generator=torch.Generator().manual_seed(1))
    total = source.cross_entropy(words[:, :-1], words[:, 1:]).sum(1)
    for word, nats in zip(words.tolist(), total.tolist(), strict=True):
        expected = math.log(probability(source, word[:1])) - math.log(probability(source, word))
        assert nats == pytest.approx(expected, rel=1e-11)


def test_expected_cross_entropy_is_the_growth_of_the_entropy_of_words(source):
    def entropy_of_words(length):
        return entropy(*(probability(source, word) for word in itertools.product(range(3), repeat=length)))

    of_words = [entropy_of_words(length) for length in range(1, 6)]
    values = source.expected_cross_entropy(4).tolist()
    assert values == pytest.approx(np.diff(of_words).tolist(), rel=1e-10)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values)) and values[-1] >= source.entropy_rate - 1e-12


@pytest.mark.parametrize("order", [1, 2, 4])
def test_with_its_whole_context_a_chain_predicts_a_row_of_its_table(order):
    source = markov(order=order, symbols=5, seed=7)
    inputs = torch.randint(5, (13, 11), generator=torch.Generator().manual_seed(2))
    known = source.conditional(inputs)
    for word, rows in zip(inputs.tolist(), known, strict=True):
        for t in range(order - 1, 11):
            number = int("".join(map(str, word[t - order + 1 : t + 1])), base=5)
            torch.testing.assert_close(rows[t], source.emission[number], rtol=1e-12, atol=0)
    values = source.expected_cross_entropy(7)
    assert values[order - 1 :].tolist() == [source.entropy_rate] * (8 - order)
    assert (values[: order - 1] > source.entropy_rate + 1e-3).all()


def test_too_many_words_to_enumerate():
    with pytest.raises(ValueError, match="'abcdefgh' has too many words of 7 symbols"):
        hidden_markov(states=16, symbols=8).expected_cross_entropy(16)


def test_windows_do_not_depend_on_those_beside_them(source, monkeypatch):
    inputs = torch.randint(3, (29, 7), generator=torch.Generator().manual_seed(3))
    targets = inputs.roll(1, 0)
    losses, known = source.cross_entropy(inputs, targets), source.conditional(inputs)
    monkeypatch.setattr(sources, "_ELEMENTS", 5 * source.states)
    torch.testing.assert_close(source.cross_entropy(inputs, targets), losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(source.conditional(inputs), known, rtol=1e-14, atol=0)
    torch.testing.assert_close(source.cross_entropy(inputs[11:12].int(), targets[11:12]), losses[11:12])


# Samples


def test_a_text_is_a_pure_function_of_the_seed_and_begins_alike_at_any_length(monkeypatch):
    text = markov(seed=1).sample_text(1009)
    assert len(text) == 1009 and text == markov(seed=1).sample_text(1009) != markov(seed=2).sample_text(1009)
    assert set(text) <= set(ALPHABET[:8])
    monkeypatch.setattr(sources, "_CHUNK", 7)
    assert markov(seed=1).sample_text(31) == text[:31]


def test_a_sample_follows_the_table():
    source = markov(order=2, symbols=4, concentration=0.7, seed=11)
    text = source.sample_text(100_000)
    counts = Counter(zip(text, text[1:], text[2:], strict=False))
    squares = 0.0
    for context, row in zip(itertools.product(ALPHABET[:4], repeat=2), source.emission.tolist(), strict=True):
        seen = [counts[(*context, symbol)] for symbol in ALPHABET[:4]]
        squares += sum((n - p * sum(seen)) ** 2 / (p * sum(seen)) for n, p in zip(seen, row, strict=True) if p > 1e-4)
    assert squares < 48 + 5 * math.sqrt(2 * 48)  # chi-squared of 16 rows with 3 degrees of freedom each


def test_samples_begin_in_the_stationary_distribution():
    table = two_symbols(p=0.02, q=0.01)  # it forgets its beginning in some 30 symbols
    firsts = [Source("ab", table.emission, table.successor, seed).sample_text(1) for seed in range(1000)]
    assert 1 / 3 == pytest.approx(firsts.count("a") / 1000, abs=4 * math.sqrt(2 / 9 / 1000))


def test_impossible_symbols_are_never_drawn():
    table = torch.tensor([[0.0, 0.1, 0.2, 0.7, 0.0]], dtype=torch.float64)
    text = Source("vwxyz", table, torch.zeros(1, 5, dtype=torch.int64)).sample_text(1000)
    assert set(text) == set("wxy")
    runs = even_process().sample_text(999).strip("b").split("a")
    assert {len(run) % 2 for run in runs} == {0} and max(map(len, runs)) > 6


@pytest.mark.parametrize("name", SOURCES)
def test_log_likelihood_of_a_long_text_is_the_entropy_rate(name):
    """Shannon, McMillan and Breiman: with its past known, a text costs the entropy rate per symbol."""
    source = SOURCES[name](seed=2)
    inputs, targets = windows_of(source, source.sample_text(60_000), 29_999)
    groups = source.cross_entropy(inputs, targets)[:, 99:].reshape(-1, 100).mean(1)
    error = float(groups.std()) / math.sqrt(len(groups))
    assert float(groups.mean()) == pytest.approx(source.entropy_rate, abs=4 * error) and error < 0.01


def excess_of(losses, optimal):
    metric = Excess()
    metric.update(losses, optimal)
    return {name: value.tolist() for name, value in metric.compute().items()}


def ngram_losses(source, train, inputs, targets, order):
    """-log of smoothed counts of what follows the latest `order` symbols, backing off to fewer by interpolation."""
    counts = defaultdict(Counter)
    for length in range(order + 1):
        for i in range(length, len(train)):
            counts[train[i - length : i]][train[i]] += 1
    symbols = len(source.symbols)

    def predict(past, symbol):
        guess = 1 / symbols
        for length in range(len(past) + 1):
            seen = counts[past[len(past) - length :]]
            guess = (seen[symbol] + 2 * guess) / (seen.total() + 2)
        return guess

    texts = ["".join(source.symbols[i] for i in row) for row in inputs.tolist()]
    return torch.tensor(
        [
            [
                -math.log(predict(text[max(0, t + 1 - order) : t + 1], source.symbols[goal]))
                for t, goal in enumerate(goals)
            ]
            for text, goals in zip(texts, targets.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("name", SOURCES)
def test_no_predictor_that_learns_from_the_text_is_better_than_the_optimum(name):
    source = SOURCES[name](symbols=5, seed=3)
    text = source.sample_text(60_000)
    inputs, targets = windows_of(source, text[40_000:], 16, count=1024)
    optimal = source.cross_entropy(inputs, targets)
    values = {k: excess_of(ngram_losses(source, text[:40_000], inputs, targets, k), optimal) for k in range(5)}
    for value in values.values():
        assert value["excess"] > -4 * value["excess_error"]
    assert min(value["excess"] for value in values.values()) < 0.1 < values[0]["excess"]
    late = excess_of(optimal[:, 8:], torch.full_like(optimal[:, 8:], source.entropy_rate))
    if name == "markov":
        assert abs(late["excess"]) < 4 * late["excess_error"] < 0.05
        expected = source.expected_cross_entropy(16)
        errors = optimal.std(0) / math.sqrt(len(optimal))
        assert ((optimal.mean(0) - expected).abs() < 4 * errors).all()
    else:  # the window does not tell the whole of the past
        assert -4 * late["excess_error"] < late["excess"] < 0.05


# Vocabularies


def test_reordered_for_a_vocabulary(source):
    other = source.reordered("zcaxb")
    assert other.symbols == "zcaxb" and other.entropy_rate == pytest.approx(source.entropy_rate, rel=1e-13)
    inputs = torch.randint(3, (7, 11), generator=torch.Generator().manual_seed(4))
    renamed = torch.tensor([2, 4, 1])[inputs]  # a, b, c
    known = other.conditional(renamed)
    torch.testing.assert_close(known[..., [2, 4, 1]], source.conditional(inputs), rtol=1e-13, atol=0)
    assert not known[..., [0, 3]].any()
    assert set(other.sample_text(101)) <= set("abc")


def test_a_vocabulary_without_a_rare_symbol_keeps_its_probability(source):
    other = source.reordered("ba")
    assert other.symbols == "bac"
    inputs = torch.tensor([[1, 0, 0, 1]])  # a b b a
    torch.testing.assert_close(other.conditional(1 - inputs)[..., [1, 0, 2]], source.conditional(inputs))


# Drawn tables


@pytest.mark.parametrize("concentration", [0.01, 0.3, 1, 1000.0])
@pytest.mark.parametrize("name", SOURCES)
def test_every_symbol_is_possible_and_tables_depend_on_the_seed(name, concentration):
    first, again, other = (SOURCES[name](concentration=concentration, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.emission, again.emission) and torch.equal(first.successor, again.successor)
    assert not torch.equal(first.emission, other.emission)
    assert float(first.emission.min()) > 0.9e-6
    assert (first.stationary > 0).all() and float(first.stationary.sum()) == pytest.approx(1)
    following = torch.zeros_like(first.stationary)
    following.index_add_(0, first.successor.flatten(), (first.stationary[:, None] * first.emission).flatten())
    torch.testing.assert_close(following, first.stationary, rtol=1e-9, atol=1e-15)


def test_concentration_orders_the_entropy():
    rates = [markov(symbols=8, concentration=c).entropy_rate for c in (0.01, 0.3, 1, 1000.0)]
    assert rates == sorted(rates) and rates[0] < 0.2 and rates[-1] == pytest.approx(math.log(8), abs=0.001)
    # Rows of a flat Dirichlet distribution over K symbols have H_K - 1 nats on average, H_K the harmonic number.
    flat = markov(order=4, symbols=7, concentration=1).emission
    rows = torch.special.entr(flat).sum(1)
    assert float(rows.mean()) == pytest.approx(sum(1 / k for k in range(2, 8)), abs=4 * float(rows.std()) / 49)


@pytest.mark.parametrize("seed", range(20))
def test_hidden_tables_reach_every_state_from_every_state(seed):
    source = hidden_markov(states=7, symbols=2, seed=seed)
    steps = torch.zeros(7, 7, dtype=torch.float64).scatter_(1, source.successor, 1.0)
    assert (torch.linalg.matrix_power(steps, 7 * 7) > 0).all()  # Wielandt: (n - 1)^2 + 1 steps are enough


def test_the_largest_and_smallest_sources():
    assert markov(order=12, symbols=2).states == markov(order=2, symbols=62).states + 252 == MAX_STATES
    assert hidden_markov(states=1, symbols=2).states == 1
    assert hidden_markov(states=MAX_STATES, symbols=2).states == MAX_STATES


def test_the_highest_draw_finds_a_possible_symbol():
    rows = table([0.1] * 10 + [0.0], [0.0, 0.7, 0.1, 0.2] + [0.0] * 7)
    for row, last in zip(sources._bounds(rows), (9, 3), strict=True):
        assert bisect.bisect_right(row, math.nextafter(1.0, 0.0)) == last
    assert float(rows[0].cumsum(0)[-1]) < 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("markov", {"order": 0}, "order must be between 1 and 64; got 0"),
        ("markov", {"order": 2.0}, "order must be an integer; got 2.0"),
        ("markov", {"order": True}, "order must be an integer; got True"),
        ("markov", {"symbols": 1}, "symbols must be between 2 and 62; got 1"),
        ("markov", {"symbols": 63}, "symbols must be between 2 and 62; got 63"),
        ("markov", {"order": 13, "symbols": 2}, "order 13 with 2 symbols has more than 4096 contexts"),
        ("markov", {"seed": -1}, "seed must be at least 0; got -1"),
        ("markov", {"concentration": 0.001}, "concentration must lie between 0.01 and 1000; got 0.001"),
        ("markov", {"concentration": math.nan}, "concentration must lie between 0.01 and 1000; got nan"),
        ("hidden-markov", {"states": 0}, "states must be between 1 and 4096; got 0"),
        ("hidden-markov", {"states": 4097}, "states must be between 1 and 4096; got 4097"),
        ("hidden-markov", {"symbols": 1}, "symbols must be between 2 and 62"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError) as error:
        SOURCES[name](**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("symbols", "emission", "successor", "message"),
    [
        ("ab", table([0.5, 0.6]), [[0, 0]], "probabilities that sum to 1"),
        ("ab", table([1.5, -0.5]), [[0, 0]], "probabilities that sum to 1"),
        ("ab", table([math.nan, 0.5]), [[0, 0]], "probabilities that sum to 1"),
        ("aa", table([0.5, 0.5]), [[0, 0]], "2 different characters, one a column; got 'aa'"),
        ("abc", table([0.5, 0.5]), [[0, 0]], "2 different characters, one a column; got 'abc'"),
        ("ab", table([0.5, 0.5]), [[0, 1]], "must be states, 0 to 0"),
        ("ab", table([0.5, 0.5]), [[0, -1]], "must be states, 0 to 0"),
        ("ab", table([0.5, 0.5]), [[0], [0]], "agree in shape"),
        ("ab", table([0.5, 0.5]).float(), [[0, 0]], "must be float64 and int64"),
        ("ab", table(0.5, 0.5), [0, 0], "emission must be (states, symbols)"),
        ("ab", table([0.5, 0.5], [0.5, 0.5]), [[0, 0], [1, 1]], "some cannot be reached"),
        ("ab", table([0.5, 0.5], [0.5, 0.5]), [[1, 1], [1, 1]], "some cannot be reached"),
        ("ab", table([1.0, 0.0], [0.5, 0.5]), [[0, 1], [1, 0]], "some cannot be reached"),
        ("ab", table([0.5, 0.5], [0.5, 0.5]), [[1, 1], [0, 0]], "only every 2 symbols"),
    ],
)
def test_tables_that_are_no_source(symbols, emission, successor, message):
    with pytest.raises(ValueError) as error:
        Source(symbols, emission, torch.tensor(successor))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([[0, 1, 3]], [[0, 1, 2]], "ids must lie between 0 and 2; got 0 to 3"),
        ([[0, 1, 2]], [[0, -1, 2]], "ids must lie between 0 and 2; got -1 to 2"),
        ([[0, 1, 2]], [[0, 1]], "inputs and targets must agree in shape; got (1, 3) and (1, 2)"),
        ([0, 1, 2], [0, 1, 2], "ids must be integers of shape (windows, T); got torch.int64, (3,)"),
        ([[0.0, 1.0]], [[0.0, 1.0]], "ids must be integers of shape (windows, T); got torch.float32, (1, 2)"),
    ],
)
def test_wrong_windows(source, inputs, targets, message):
    with pytest.raises(ValueError) as error:
        source.cross_entropy(torch.tensor(inputs), torch.tensor(targets))
    assert message in str(error.value)


def test_a_text_needs_a_length(source):
    with pytest.raises(ValueError, match="length must be at least 1; got 0"):
        source.sample_text(0)
