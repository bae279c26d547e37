import pytest

from pennylane_qattn import (
    ANSATZE,
    ATTENTION,
    QISA,
    VALUES,
    AmplitudeEncoding,
    Gaussian,
    Mechanism,
    StronglyEntangling,
)
from pennylane_qattn.registry import from_plain


@pytest.mark.parametrize("name", ATTENTION)
def test_plain_round_trip(name):
    mechanism = ATTENTION.build(name, head_dim=5, seed=7)
    plain = mechanism.to_plain()
    assert plain["kind"] == "attention" and plain["name"] == name and plain["head_dim"] == 5
    assert Mechanism.from_plain(plain) == mechanism


@pytest.mark.parametrize("values", VALUES)
def test_values_are_plain_and_come_back(values):
    mechanism = ATTENTION.build("scaled-dot", values=values, temperature="learned")
    plain = mechanism.to_plain()
    assert plain["values"] == values and plain["trainable"] is True
    assert Mechanism.from_plain(plain) == mechanism


def test_plain_data_from_before_an_option_was_there():
    plain = QISA(split=True).to_plain()
    for option in ("values", "trainable"):
        del plain[option]
    assert Mechanism.from_plain(plain) == QISA(split=True)


def test_nested_descriptions_are_plain_and_come_back():
    mechanism = QISA(ansatz=StronglyEntangling(layers=3), split=True)
    plain = mechanism.to_plain()
    assert plain["ansatz"] == {"kind": "ansatz", "name": "strongly-entangling", "layers": 3}
    assert from_plain(plain) == mechanism
    assert hash(mechanism) == hash(from_plain(plain))


def test_names_stand_for_descriptions():
    assert QISA(ansatz="strongly-entangling").ansatz == StronglyEntangling()
    assert QISA().encoding == AmplitudeEncoding()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ATTENTION.build("foo"),
            "unknown attention 'foo'; choose from classical, gaussian, grover, grover-sparse, ngram, overlap, qisa",
        ),
        (
            lambda: ATTENTION.build("qisa", foo=1),
            "attention 'qisa' has no option 'foo'; its options: ansatz, bias",
        ),
        (lambda: ATTENTION.build("qisa", split=3), "split must be true or false; got 3"),
        (lambda: ANSATZE.build("foo"), "unknown ansatz 'foo'"),
        (lambda: QISA(encoding="foo"), "unknown encoding 'foo'; choose from amplitude, angle"),
        (lambda: StronglyEntangling(layers=0), "layers must be an integer of at least 1; got 0"),
        (lambda: Gaussian(values="foo"), "values must be one of linear, circuit, quadratic, random-quadratic"),
        (lambda: from_plain({"name": "qisa"}), "needs the keys 'kind' and 'name'"),
        (lambda: from_plain({"kind": "os", "name": "system"}), "unknown kind of description 'os'"),
        (lambda: Mechanism.from_plain({"kind": "ansatz", "name": "qisa"}), "expected a description"),
        (lambda: ANSATZE.build("traced"), "ansatz 'traced'"),
    ],
)
def test_bad_input_is_one_line(build, message):
    with pytest.raises(ValueError, match=".*") as error:
        build()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="registered already"):
        ATTENTION.register(QISA)
