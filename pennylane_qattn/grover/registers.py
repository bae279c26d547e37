r"""Simulators of one Grover search step: prepare, iterate, measure the key register.

A row may see :math:`n` keys, of which :math:`m` are marked, :math:`x_j \geq \tau`. The register is prepared uniform
over those :math:`n` keys alone, whether or not :math:`n` is a power of two; :math:`R` times the marked keys change
sign and the state is reflected about the uniform one; then the register is measured. With :math:`\sin^2\theta = m/n`
it shows a marked key with probability :math:`\sin^2((2R + 1)\theta)` (Boyer, Brassard, Hoyer, Tapp,
quant-ph/9605034).

Three simulators do this for many rows at a time, behind one interface, `Registers`:

- `StateVector`: all :math:`n` amplitudes, iteration by iteration; for small :math:`n`.
- `Subspace`: the state never leaves the plane spanned by the marked and by the unmarked keys, so two numbers are the
  whole state; exact for any :math:`n`.
- `Counting`: no keys at all, only :math:`n` and :math:`m`. What is drawn is how many of the marked keys are left and
  what was paid, by the law of the other two; a key is known by its place among the marked ones alone. Two integers a
  row, so that thousands of searches of :math:`2^{20}` keys fit.
"""

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Bool, Float, Int

#: More keys than that are refused by the state vector.
STATE_VECTOR_KEYS = 4096


def success_probability(
    num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"], iterations: Int[np.ndarray, "*rows"]
) -> Float[np.ndarray, "*rows"]:
    r""":math:`\sin^2((2R + 1)\theta)`, :math:`\sin^2\theta = m/n`: how often a marked key is measured."""
    check_counts(num_keys, num_marked)
    check_iterations(iterations)
    return np.sin((2 * iterations + 1) * grover_angle(num_keys, num_marked)) ** 2


def grover_state(
    marks: Bool[np.ndarray, "rows keys"],
    iterations: Int[np.ndarray, " rows"],
    allowed: Bool[np.ndarray, "rows keys"] | None = None,
) -> Float[np.ndarray, "rows keys"]:
    r"""The amplitudes after so many iterations, each carried out: signs, then the reflection about the uniform state.

    They are real. Keys that are not allowed keep the amplitude 0, and whether they are marked does not matter.
    """
    check_iterations(iterations)
    allowed = allowed_keys(marks, allowed)
    num_keys = allowed.sum(1)
    uniform = allowed / np.sqrt(num_keys)[:, None]
    state, signs = uniform.copy(), np.where(marks, -1.0, 1.0)
    for step in range(iterations.max(initial=0)):
        going = np.flatnonzero(iterations > step)
        flipped = signs[going] * state[going]
        along = (uniform[going] * flipped).sum(1, keepdims=True)
        state[going] = 2 * along * uniform[going] - flipped
    return state


class Registers(ABC):
    """One register of keys for each row, which can be prepared, iterated and measured; and which keys are marked.

    Attributes:
        name: of the simulator.
        names_keys: whether what is measured is a key. If not, it is the place of a marked key among the marked ones.
        num_keys: keys that a row may see.
        num_marked: those that are marked now. A search may not look; the simulation must.
    """

    name: str
    names_keys: bool
    num_keys: Int[np.ndarray, " rows"]
    num_marked: Int[np.ndarray, " rows"]

    @classmethod
    @abstractmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        """Rows with these keys marked; each may see its allowed keys, all of them if not told."""

    @classmethod
    @abstractmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        """Rows with so many keys, of which the first so many are marked."""

    @abstractmethod
    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        """Prepares, iterates and measures the registers of these rows, all different; what is found is one key each."""

    @abstractmethod
    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """The verification of a key: its score is read and compared."""

    @abstractmethod
    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        """From now on these marked keys count as not marked."""

    @abstractmethod
    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        """From now on only so many of the marked keys are, the first ones: a threshold has risen over sorted keys."""

    @abstractmethod
    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        """How often a marked key would be measured."""


class _NamedKeys(Registers):
    """Registers that hold a mark for every key."""

    names_keys = True

    def __init__(self, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None):
        self.allowed = allowed_keys(marks, allowed)
        self.marks = marks & self.allowed
        self.num_keys = self.allowed.sum(1)
        self.num_marked = self.marks.sum(1)

    @classmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        return cls(marks, allowed)

    @classmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        check_counts(num_keys, num_marked)
        place = np.arange(num_keys.max(initial=0))
        return cls(place < num_marked[:, None], place < num_keys[:, None])

    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return self.marks[rows, keys]

    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] -= self.marks[rows, keys]
        self.marks[rows, keys] = False

    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        self.marks[rows] &= self.marks[rows].cumsum(1) <= left[:, None]
        self.num_marked[rows] = self.marks[rows].sum(1)


class StateVector(_NamedKeys):
    """Every amplitude, and every iteration carried out; time of order n times the iterations."""

    name = "state-vector"

    def __init__(self, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None):
        if marks.shape[1] > STATE_VECTOR_KEYS:
            raise ValueError(
                f"a state vector takes at most {STATE_VECTOR_KEYS} keys; got {marks.shape[1]}: use Subspace, also exact"
            )
        super().__init__(marks, allowed)

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        cumulative = self._probabilities(rows, iterations).cumsum(1)
        drawn = rng.random(len(rows)) * cumulative[:, -1]
        return (cumulative > drawn[:, None]).argmax(1)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return (self._probabilities(rows, iterations) * self.marks[rows]).sum(1)

    def _probabilities(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, "some keys"]:
        return grover_state(self.marks[rows], iterations, self.allowed[rows]) ** 2


class Subspace(_NamedKeys):
    """The exact plane of marked and unmarked keys: whether a marked key is found is drawn, then which of its kind."""

    name = "subspace"

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        hit = rng.random(len(rows)) < self.success_probability(rows, iterations)
        kind = self.marks[rows] == hit[:, None]
        kind &= self.allowed[rows]
        cumulative = kind.cumsum(1)
        place = (rng.random(len(rows)) * cumulative[:, -1]).astype(np.int64)
        return (cumulative > place[:, None]).argmax(1)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return _sure(self.num_keys[rows], self.num_marked[rows], iterations)


class Counting(Registers):
    """Two integers a row and no keys.

    A marked key that is measured is given by its place among the marked keys left, uniform below `num_marked`; one that
    is not marked by `num_keys`, a place that no marked key has. Marked keys are alike to the oracle, so the calls
    and the places have the law of the other simulators, and whoever has a list of marked keys can name them.
    """

    name = "counting"
    names_keys = False

    def __init__(self, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]):
        check_counts(num_keys, num_marked)
        self.num_keys, self.num_marked = num_keys.astype(np.int64), num_marked.astype(np.int64)

    @classmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        allowed = allowed_keys(marks, allowed)
        return cls(allowed.sum(1), (marks & allowed).sum(1))

    @classmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        return cls(num_keys, num_marked)

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        hit = rng.random(len(rows)) < self.success_probability(rows, iterations)
        place = (rng.random(len(rows)) * self.num_marked[rows]).astype(np.int64)
        return np.where(hit, place, self.num_keys[rows])

    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return keys < self.num_marked[rows]

    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] -= keys < self.num_marked[rows]

    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] = np.minimum(self.num_marked[rows], left)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return _sure(self.num_keys[rows], self.num_marked[rows], iterations)


SIMULATORS: dict[str, type[Registers]] = {kind.name: kind for kind in (StateVector, Subspace, Counting)}


def grover_angle(
    num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"]
) -> Float[np.ndarray, "*rows"]:
    return np.arcsin(np.sqrt(num_marked / num_keys))


def _sure(
    num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"], iterations: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The success probability, without a remainder of rounding where the outcome is certain."""
    probability = success_probability(num_keys, num_marked, iterations)
    return np.where(num_marked == 0, 0.0, np.where(num_marked == num_keys, 1.0, probability))


def allowed_keys(
    like: Bool[np.ndarray, "rows keys"] | Float[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None
) -> Bool[np.ndarray, "rows keys"]:
    allowed = np.ones(like.shape, dtype=bool) if allowed is None else allowed
    if not allowed.any(1).all():
        row = int(np.flatnonzero(~allowed.any(1))[0])
        raise ValueError(f"every row must be allowed at least one key; row {row} has none")
    return allowed


def check_counts(num_keys: np.ndarray, num_marked: np.ndarray) -> None:
    if num_keys.min(initial=1) < 1:
        raise ValueError(f"a row must have at least one key; got n = {num_keys.min()}")
    if num_marked.min(initial=0) < 0 or (num_marked > num_keys).any():
        raise ValueError("marked keys must be between 0 and the number of keys in every row; got some outside")


def check_iterations(iterations: np.ndarray) -> None:
    if iterations.min(initial=0) < 0:
        raise ValueError(f"the number of iterations must be 0 or more; got R = {iterations.min()}")
