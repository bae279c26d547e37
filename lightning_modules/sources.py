r"""Random languages whose entropy is known exactly: Markov chains and unifilar hidden Markov sources.

A source is in a state :math:`s_t`, emits the symbol :math:`x_t` with probability :math:`E_{s_t x_t}`, and goes to the
state :math:`s_{t+1} = f(s_t, x_t)`. That state and symbol determine the next state is what unifilar means (Ash,
Information Theory, 1965). A Markov chain of order k is the source whose state is the k latest symbols. With the
stationary distribution :math:`\pi` of the states, the entropy rate is (Shannon 1948, section 7)

.. math:: h = -\sum_s \pi_s \sum_x E_{sx} \log E_{sx}.

Who sees only a window of the text does not know the state in which it begins. The best possible prediction starts from
:math:`b_0 = \pi` and learns of the state from the symbols (the forward filter):

.. math::
    P(x_t \mid x_0 \ldots x_{t-1}) = \sum_s b_t(s)\, E_{s x_t}, \qquad
    b_{t+1}(s') \propto \sum_{s:\, f(s, x_t) = s'} b_t(s)\, E_{s x_t}.

No predictor that is given the same window has a lower cross-entropy on average.
"""

import math
import string
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

#: The characters of drawn sources, as many of the first ones as are needed.
ALPHABET = string.ascii_letters + string.digits
#: States that the filter goes through for each symbol of each window.
MAX_STATES = 4096
#: Drawn probabilities are mixed with this weight of each symbol, so that none is impossible.
LEAST_PROBABILITY = 1e-6

_ELEMENTS = 1 << 20  # windows times states that the filter works on at once
_MAX_ELEMENTS = 1 << 24  # words times states that `expected_cross_entropy` may enumerate
_CHUNK = 1 << 20  # symbols drawn at once


@dataclass(frozen=True, eq=False)
class Source:
    """A stationary source of symbols; token ids are positions in `symbols`.

    Args:
        symbols: a character for each column of the tables, no two the same.
        emission: (states, symbols) probabilities of the symbols in each state; float64, rows sum to 1.
        successor: (states, symbols) the state after each state and symbol; int64.
        seed: of the text.
        description: the options that it was drawn with, for the record of a run.

    Raises:
        ValueError: one line, if the tables do not describe a source, or its states are not all visited again and again
            at irregular times (the chain must be irreducible and aperiodic).
    """

    symbols: str
    emission: Float64[Tensor, "states symbols"] = field(repr=False)
    successor: Int64[Tensor, "states symbols"] = field(repr=False)
    seed: int = 0
    description: str = ""

    def __post_init__(self) -> None:
        shape = tuple(self.emission.shape)
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_STATES:
            raise ValueError(f"emission must be (states, symbols) with 1 to {MAX_STATES} states; got the shape {shape}")
        if self.emission.dtype != torch.float64 or self.successor.dtype != torch.int64:
            raise ValueError(f"tables must be float64 and int64; got {self.emission.dtype} and {self.successor.dtype}")
        if self.successor.shape != shape:
            raise ValueError(f"emission and successor must agree in shape; got {shape} and {(*self.successor.shape,)}")
        if len(self.symbols) != shape[1] or len(set(self.symbols)) != shape[1]:
            raise ValueError(f"symbols must be {shape[1]} different characters, one a column; got {self.symbols!r}")
        sums = self.emission.sum(1)
        if not (self.emission >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-12):
            raise ValueError("the rows of emission must be probabilities that sum to 1")
        if self.successor.min() < 0 or self.successor.max() >= shape[0]:
            raise ValueError(f"the entries of successor must be states, 0 to {shape[0] - 1}")
        if (period := _period(self.successor.numpy(), self.emission.numpy() > 0)) != 1:
            problem = f"it comes back to a state only every {period} symbols" if period else "some cannot be reached"
            raise ValueError(f"every state must be reachable from every other, at irregular times; {problem}")

    @property
    def states(self) -> int:
        """The number of states."""
        return len(self.emission)

    @cached_property
    def stationary(self) -> Float64[Tensor, " states"]:
        """The distribution of the state at a place of the text about which nothing is known."""
        states = self.states
        transition = self.emission.new_zeros(states, states).scatter_add_(1, self.successor, self.emission)
        equations = transition.T - torch.eye(states, dtype=torch.float64)
        equations[-1] = 1.0  # one equation follows from the others; the sum takes its place
        right = self.emission.new_zeros(states)
        right[-1] = 1.0
        solution = torch.linalg.solve(equations, right).clamp(min=0) @ transition
        return solution / solution.sum()

    @cached_property
    def entropy_rate(self) -> float:
        """Nats per symbol: the mean cross-entropy of the best predictor that has seen an endless past."""
        return float(self.stationary @ torch.special.entr(self.emission).sum(1))

    def sample_text(self, length: int) -> str:
        """The first `length` symbols of the text that belongs to the seed, begun in the stationary distribution."""
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        # Plain lists: one step of the chain takes a fraction of a microsecond.
        random = np.random.default_rng((self.seed, 1))
        after, bounds = self.successor.tolist(), _bounds(self.emission)
        state = bisect_right(_bounds(self.stationary[None])[0], random.random())
        text = []
        for done in range(0, length, _CHUNK):
            draws = random.random(min(_CHUNK, length - done)).tolist()
            ids = []
            for draw in draws:
                symbol = bisect_right(bounds[state], draw)
                ids.append(symbol)
                state = after[state][symbol]
            text.append("".join(map(self.symbols.__getitem__, ids)))
        return "".join(text)

    def conditional(self, inputs: Int[Tensor, "windows seq"]) -> Float64[Tensor, "windows seq symbols"]:
        """Probabilities of the symbol after each prefix of each window, which begins at an unknown place of the text.

        Args:
            inputs: ids of the symbols; on any device.

        Returns:
            On the CPU, at position t the probabilities of the next symbol given the symbols 0 to t.

        Raises:
            ValueError: for ids that are no symbols, or a window that the source cannot produce.
        """
        return torch.cat([torch.stack(list(self._predictions(part)), 1) for part in self._parts(inputs)])

    def cross_entropy(
        self, inputs: Int[Tensor, "windows seq"], targets: Int[Tensor, "windows seq"]
    ) -> Float64[Tensor, "windows seq"]:
        """The lowest cross-entropy, in nats, that a predictor of each target from its window can have on average.

        Args:
            inputs: ids of the symbols of the windows; on any device.
            targets: ids of the symbols that follow each of them.

        Returns:
            `-log P(target t | inputs 0 to t)` of every window and place t, on the CPU.

        Raises:
            ValueError: as `conditional` does, or if the shapes differ.
        """
        if inputs.shape != targets.shape:
            raise ValueError(f"inputs and targets must agree in shape; got {(*inputs.shape,)} and {(*targets.shape,)}")
        parts = zip(self._parts(inputs), self._parts(targets), strict=True)
        return torch.cat([self._losses(*part) for part in parts])

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        wanted = targets.T[..., None]
        columns = [p.gather(1, ids)[:, 0] for p, ids in zip(self._predictions(inputs), wanted, strict=True)]
        return -torch.stack(columns, 1).log()

    def expected_cross_entropy(self, length: int) -> Float64[Tensor, " seq"]:
        """The mean of `cross_entropy` over all windows of the language, exactly: `H(x_{t+1} | x_0 ... x_t)`, in nats.

        It falls to the entropy rate, which a chain of order k reaches at position k - 1.

        Args:
            length: of the window.

        Raises:
            ValueError: if there are too many words to enumerate before all of them tell the state.
        """
        words = self.stationary[None]  # probability of each word together with the state after it
        values = torch.full((length,), self.entropy_rate, dtype=torch.float64)
        for position in range(length):
            if len(words) * self.emission.numel() > _MAX_ELEMENTS:
                raise ValueError(f"{self.symbols!r} has too many words of {position + 1} symbols to enumerate them all")
            longer = words[:, :, None] * self.emission
            flat = torch.zeros(len(words), len(self.symbols), self.states, dtype=torch.float64)
            flat.scatter_add_(2, self.successor.T.expand_as(flat), longer.mT)
            words = flat.flatten(0, 1)
            if int((words > 0).sum(1).max()) == 1:
                break
            values[position] = torch.special.entr(words @ self.emission).sum() - torch.special.entr(words.sum(1)).sum()
        return values

    def reordered(self, symbols: str) -> Self:
        """The same source with the ids of a vocabulary.

        Args:
            symbols: the characters of the vocabulary, in the order of their ids. Those that the source does not have
                get probability 0; those of the source that are missing get the ids behind.
        """
        symbols += "".join(symbol for symbol in self.symbols if symbol not in symbols)
        emission = self.emission.new_zeros(self.states, len(symbols))
        successor = self.successor.new_zeros(emission.shape)
        columns = [symbols.index(symbol) for symbol in self.symbols]
        emission[:, columns], successor[:, columns] = self.emission, self.successor
        return replace(self, symbols=symbols, emission=emission, successor=successor)

    def _parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Checked ids, in parts that the filter takes at once."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be integers of shape (windows, T); got {ids.dtype}, {tuple(ids.shape)}")
        ids = ids.detach().cpu().long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.symbols):
            raise ValueError(f"ids must lie between 0 and {len(self.symbols) - 1}; got {ids.min()} to {ids.max()}")
        return ids.split(max(1, _ELEMENTS // self.states))

    def _predictions(self, inputs: Tensor) -> Iterator[Tensor]:
        """Probabilities (windows, symbols) of what follows each symbol of the windows, position by position."""
        emission, successor = self.emission.T.contiguous(), self.successor.T.contiguous()
        belief = self.stationary.expand(len(inputs), -1)
        for ids in inputs.T:
            seen = belief * emission[ids]
            belief = torch.zeros_like(seen).scatter_add_(1, successor[ids], seen)
            total = belief.sum(1, keepdim=True)
            if not (total > 0).all():
                raise ValueError("a window holds symbols that the source never emits in this order")
            belief = belief / total
            yield belief @ self.emission


def markov(*, order: int = 3, symbols: int = 5, concentration: float = 0.3, seed: int = 0) -> Source:
    """A Markov chain with a drawn table.

    Args:
        order: symbols that the next one depends on.
        symbols: size of the alphabet; the table has symbols ** order rows.
        concentration: of the Dirichlet distribution of the rows: the lower, the more predictable.
        seed: of the table and the text.

    Raises:
        ValueError: one line naming the option that is out of range.
    """
    _check(("order", order, 1, 64), ("symbols", symbols, 2, len(ALPHABET)), ("seed", seed, 0, None))
    if order * math.log(symbols) > math.log(MAX_STATES) + 1e-9:
        raise ValueError(
            f"order {order} with {symbols} symbols has more than {MAX_STATES} contexts; lower one of the two"
        )
    contexts = symbols**order
    emission = _dirichlet(np.random.default_rng((seed, 0)), contexts, symbols, concentration)
    # The number of a context in base `symbols` has the latest symbol as its last digit.
    successor = (torch.arange(contexts)[:, None] * symbols + torch.arange(symbols)) % contexts
    options = f"order={order},symbols={symbols},concentration={concentration},seed={seed}"
    return Source(ALPHABET[:symbols], emission, successor, seed, f"markov:{options}")


def hidden_markov(*, states: int = 8, symbols: int = 5, concentration: float = 0.3, seed: int = 0) -> Source:
    """A unifilar source with drawn tables, whose state no fixed number of symbols need tell.

    Where each symbol leads is drawn uniformly, but for one symbol of each state, which leads on along a cycle through
    all of them.

    Args:
        states: of the source.
        symbols: size of the alphabet.
        concentration: of the Dirichlet distribution of the symbols in a state: the lower, the more predictable.
        seed: of the tables and the text.

    Raises:
        ValueError: one line naming the option that is out of range.
    """
    _check(("states", states, 1, MAX_STATES), ("symbols", symbols, 2, len(ALPHABET)), ("seed", seed, 0, None))
    random = np.random.default_rng((seed, 0))
    emission = _dirichlet(random, states, symbols, concentration)
    period = 0
    while period != 1:
        successor = random.integers(states, size=(states, symbols))
        cycle = random.permutation(states)
        successor[cycle, random.integers(symbols, size=states)] = np.roll(cycle, -1)
        period = _period(successor, np.ones_like(successor, dtype=bool))
    options = f"states={states},symbols={symbols},concentration={concentration},seed={seed}"
    return Source(ALPHABET[:symbols], emission, torch.from_numpy(successor), seed, f"hidden-markov:{options}")


def _check(*ranges: tuple[str, int, int, int | None]) -> None:
    for name, value, least, most in ranges:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer; got {value!r}")
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"between {least} and {most}"
            raise ValueError(f"{name} must be {limits}; got {value}")


def _dirichlet(random: np.random.Generator, rows: int, symbols: int, concentration: float) -> Tensor:
    if not 0.01 <= concentration <= 1000:
        raise ValueError(f"concentration must lie between 0.01 and 1000; got {concentration}")
    drawn = random.dirichlet(np.full(symbols, float(concentration)), size=rows)
    mixed = (1 - symbols * LEAST_PROBABILITY) * drawn + LEAST_PROBABILITY
    return torch.from_numpy(mixed / mixed.sum(1, keepdims=True))


def _period(successor: np.ndarray, possible: np.ndarray) -> int:
    """The period of a chain: 1 if it is aperiodic; 0 if it is not irreducible."""
    level = np.full(len(successor), -1)
    frontier, steps = np.array([0]), 0
    while len(frontier):
        level[frontier] = steps
        reached = np.unique(successor[frontier][possible[frontier]])
        frontier, steps = reached[level[reached] < 0], steps + 1
    returns, found = np.zeros(len(successor), dtype=bool), level == 0
    while (found & ~returns).any():
        returns |= found
        found = (returns[successor] & possible).any(1)
    if (level < 0).any() or not returns.all():
        return 0
    return int(np.gcd.reduce((level[:, None] + 1 - level[successor])[possible]))


def _bounds(probabilities: Tensor) -> list[list[float]]:
    """Cumulative sums of each row, such that a uniform draw below 1 finds a column of positive probability."""
    sums = probabilities.cumsum(1)
    # Rounding may leave the last sum a little below 1, and columns behind it may be impossible.
    return sums.masked_fill(sums >= sums[:, -1:], 1.0).tolist()


SOURCES: dict[str, Callable[..., Source]] = {"markov": markov, "hidden-markov": hidden_markov}
