r"""Observables: Pauli words, drawn, parsed, grouped by common measurement basis, and written as signs.

A word is a string over `IXYZ`, one letter per wire, wire 0 first. QISA (arXiv 2603.03318) draws every letter as I with
probability 0.9 and X, Y or Z otherwise.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pennylane as qml

LETTERS = "IXYZ"
#: Probability of the identity on a wire, as published.
IDENTITY_PROBABILITY = 0.9


def draw_words(
    num_words: int,
    num_wires: int,
    seed: int | Sequence[int],
    identity_probability: float = IDENTITY_PROBABILITY,
) -> tuple[str, ...]:
    """Draws Pauli words; an all-identity word is drawn again, and a word may come twice.

    Args:
        num_words: how many.
        num_wires: length of each.
        seed: one or several non-negative integers.
        identity_probability: chance of I on each wire; X, Y and Z share the rest.
    """
    if num_words < 1 or num_wires < 1:
        raise ValueError(f"num_words and num_wires must be at least 1; got {num_words} and {num_wires}")
    if not 0 <= identity_probability < 1:
        raise ValueError(f"identity_probability must lie in [0, 1); got {identity_probability}")
    rng = np.random.default_rng(seed)
    words: list[str] = []
    while len(words) < num_words:
        identity = rng.random(num_wires) < identity_probability
        letters = np.where(identity, 0, rng.integers(1, 4, size=num_wires))
        if letters.any():
            words.append("".join(LETTERS[i] for i in letters))
    return tuple(words)


def check_words(words: Sequence[str], num_wires: int) -> tuple[str, ...]:
    """The words, if they are Pauli words on that many wires; `ValueError` otherwise."""
    if isinstance(words, str):
        raise ValueError(f"words are a sequence of Pauli words; got {words!r} by itself: write ({words!r},)")
    if not words:
        raise ValueError("at least one Pauli word is needed; got none")
    for word in words:
        if len(word) != num_wires or set(word) - set(LETTERS):
            raise ValueError(f"a Pauli word on {num_wires} wires has {num_wires} letters of IXYZ; got {word!r}")
    return tuple(words)


def encode_words(words: Sequence[str]) -> np.ndarray:
    """Letters as numbers 0 to 3: `(words, wires)`, uint8; the form a checkpoint keeps."""
    return np.array([[LETTERS.index(letter) for letter in word] for word in words], dtype=np.uint8)


def decode_words(codes: np.ndarray) -> tuple[str, ...]:
    """The inverse of `encode_words`."""
    return tuple("".join(LETTERS[i] for i in row) for row in np.asarray(codes))


def to_pennylane(word: str, wires: Sequence[int]) -> qml.operation.Operator:
    """The word as a PennyLane observable."""
    letters = {wire: letter for wire, letter in zip(wires, word, strict=True) if letter != "I"}
    if not letters:
        return qml.Identity(wires[0])
    return qml.pauli.PauliWord(letters).operation()


def group_words(words: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Groups words that commute wire by wire: one measurement setting serves a group.

    Returns:
        For each group its basis (a letter X, Y or Z per wire; Z where no word asks) and the indices of its words.
    """
    distinct = list(dict.fromkeys(words))
    if len(distinct) == 1:
        groups = [[0]]
    else:
        observables = [to_pennylane(word, range(len(word))) for word in distinct]
        partition = qml.pauli.compute_partition_indices(observables, grouping_type="qwc", method="dsatur")
        groups = sorted(sorted(group) for group in partition)
    found = []
    for group in groups:
        letters = [{distinct[i][wire] for i in group} - {"I"} for wire in range(len(distinct[0]))]
        basis = "".join(next(iter(wanted), "Z") for wanted in letters)
        members = {distinct[i] for i in group}
        found.append((basis, tuple(i for i, word in enumerate(words) if word in members)))
    return found


@lru_cache(maxsize=4096)
def word_signs(word: str) -> np.ndarray:
    """Eigenvalue (+1 or -1) of the word for each basis state of its measurement basis, `(2 ** wires,)`."""
    signs: np.ndarray = np.ones(1)
    for letter in word:
        signs = np.kron(signs, [1.0, 1.0] if letter == "I" else [1.0, -1.0])
    return signs


def word_action(word: str) -> tuple[np.ndarray, np.ndarray]:
    """The word as a signed permutation: `(P psi)[b] = phases[b] * psi[source[b]]`, both `(2 ** wires,)`."""
    source, phases = np.zeros(1, dtype=int), np.ones(1, dtype=complex)
    for letter in word:
        flip, on_zero, on_one = {"I": (0, 1, 1), "X": (1, 1, 1), "Y": (1, -1j, 1j), "Z": (0, 1, -1)}[letter]
        source = (2 * source[:, None] + (np.arange(2) ^ flip)).ravel()
        phases = np.kron(phases, [on_zero, on_one])
    return source, phases
