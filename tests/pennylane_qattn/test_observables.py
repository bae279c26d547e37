import numpy as np
import pennylane as qml
import pytest
from dense_reference import word_matrix

from pennylane_qattn.observables import (
    check_words,
    decode_words,
    draw_words,
    encode_words,
    group_words,
    to_pennylane,
    word_signs,
)


def test_drawing_follows_the_published_odds():
    words = draw_words(20_000, 5, seed=3)
    letters = np.array([list(word) for word in words])
    assert not (letters == "I").all(1).any()
    # odds of I given that not all five letters are I
    expected = (0.9 - 0.9**5) / (1 - 0.9**5)
    assert abs((letters == "I").mean() - expected) < 0.005
    others = letters[letters != "I"]
    for letter in "XYZ":
        assert abs((others == letter).mean() - 1 / 3) < 0.02


def test_drawing_is_repeatable_and_seeds_differ():
    assert draw_words(7, 3, seed=(1, 2)) == draw_words(7, 3, seed=(1, 2))
    assert draw_words(7, 3, seed=(1, 2)) != draw_words(7, 3, seed=(1, 3))


def test_codes_round_trip():
    words = draw_words(11, 6, seed=0)
    assert decode_words(encode_words(words)) == words


@pytest.mark.parametrize("word", ["X", "IZ", "YX", "IYZX"])
def test_pennylane_operator_is_the_dense_word(word):
    matrix = qml.matrix(to_pennylane(word, range(len(word))), wire_order=range(len(word)))
    np.testing.assert_allclose(matrix, word_matrix(word))


@pytest.mark.parametrize("wires", [1, 3, 5])
def test_groups_share_a_basis_and_cover_every_word_once(wires):
    words = draw_words(23, wires, seed=wires)
    groups = group_words(words)
    assert sorted(i for _, members in groups for i in members) == list(range(len(words)))
    for basis, members in groups:
        assert set(basis) <= set("XYZ") and len(basis) == wires
        for i in members:
            assert all(a in ("I", b) for a, b in zip(words[i], basis, strict=True))


def test_duplicates_share_a_group():
    assert group_words(["XI", "XI", "XI"]) == [("XZ", (0, 1, 2))]


def test_signs_are_the_eigenvalues():
    np.testing.assert_allclose(np.diag(word_signs("ZIZ")), word_matrix("ZIZ"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_words(["XQ"], 2), "2 letters of IXYZ; got 'XQ'"),
        (lambda: check_words(["XYZ"], 2), "2 letters of IXYZ; got 'XYZ'"),
        (lambda: check_words([], 2), "at least one Pauli word"),
        (lambda: check_words("ZI", 2), r"got 'ZI' by itself: write \('ZI',\)"),
        (lambda: draw_words(0, 2, 0), "at least 1; got 0 and 2"),
        (lambda: draw_words(1, 2, 0, 1.0), r"lie in \[0, 1\); got 1.0"),
    ],
)
def test_bad_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
