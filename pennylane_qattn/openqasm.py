"""Circuits as OpenQASM 2.0 and 3.0 programs, for one input and trained angles.

PennyLane writes version 2.0. The gates used (`gates.GATE_SET`) are spelled alike in the standard libraries of both
versions, so that version 3.0 differs in its declarations and measurements only.

Qubit `q[i]` is wire `i`, the letter number `i` of a Pauli word. A word's expectation value is the mean over shots of
the product of `(-1) ** c[i]` over the wires on which it is not the identity.
"""

import re
from dataclasses import dataclass
from typing import Any

import pennylane as qml

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.gates import ansatz_operations, encoding_operations
from pennylane_qattn.observables import LETTERS, group_words, to_pennylane

#: Versions of OpenQASM that are written.
VERSIONS = ("2.0", "3.0")

_TO_VERSION_3 = (
    (re.compile(r"^OPENQASM 2\.0;", re.MULTILINE), "OPENQASM 3.0;"),
    (re.compile(r'^include "qelib1\.inc";', re.MULTILINE), 'include "stdgates.inc";'),
    (re.compile(r"^qreg q\[(\d+)\];", re.MULTILINE), r"qubit[\1] q;"),
    (re.compile(r"^creg c\[(\d+)\];", re.MULTILINE), r"bit[\1] c;"),
    (re.compile(r"^measure (\S+) -> (\S+);", re.MULTILINE), r"\2 = measure \1;"),
)
#: 1e-05 is a Python float and no OpenQASM 2.0 real, which has a decimal point.
_NO_POINT = re.compile(r"(?<![\w.])(\d+)(e[-+]?\d+)")


def to_openqasm(circuit: Circuit, inputs: Any, weights: Any, *, version: str = "2.0", basis: str | None = None) -> str:
    """The program that prepares the circuit's final state and, if asked to, measures all qubits.

    Args:
        circuit: what is run.
        inputs: the vector that is encoded, `(num_features,)`; the zero vector gives `|0...0>`.
        weights: the angles, of the shape `circuit.weight_shape`, radians.
        version: of OpenQASM, one of `VERSIONS`.
        basis: a letter X, Y or Z for each wire (or I, read as Z): the gates that turn this basis to the computational
            one, and a measurement of `q[i]` into `c[i]`, are added. `None`: neither.

    Raises:
        ValueError: for another version or basis, or a vector or angles that do not fit.
    """
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r} of OpenQASM; choose from {', '.join(VERSIONS)}")
    if basis is not None and (len(basis) != circuit.num_wires or set(basis) - set(LETTERS)):
        raise ValueError(f"a basis of {circuit.num_wires} qubits has {circuit.num_wires} letters of XYZ; got {basis!r}")
    wires = range(circuit.num_wires)
    measured = [] if basis is None else [qml.expval(to_pennylane(basis, wires))]
    tape = qml.tape.QuantumScript(
        [*encoding_operations(circuit, inputs), *ansatz_operations(circuit, weights)], measured
    )
    text = qml.to_openqasm(tape, wires=qml.wires.Wires(wires), rotations=basis is not None, measure_all=True)
    text = _NO_POINT.sub(r"\1.0\2", text)
    if basis is None:  # PennyLane declares the bits wherever it knows the wires
        text = re.sub(r"^(creg|measure) .*\n", "", text, flags=re.MULTILINE)
    if version == "3.0":
        for pattern, replacement in _TO_VERSION_3:
            text = pattern.sub(replacement, text)
    return text


@dataclass(frozen=True)
class Setting:
    """One measurement setting as a program.

    Attributes:
        basis: a letter X, Y or Z for each qubit.
        words: which of the circuit's words it measures.
        program: the whole text.
    """

    basis: str
    words: tuple[int, ...]
    program: str


def measurement_settings(circuit: Circuit, inputs: Any, weights: Any, *, version: str = "2.0") -> list[Setting]:
    """A program for each measurement setting; together they measure all words of the circuit.

    Arguments and errors are those of `to_openqasm`.
    """
    groups = group_words(circuit.words)
    found = []
    for number, (basis, members) in enumerate(groups, 1):
        listed = "".join(f"//   word {i}: {circuit.words[i]} = mean of {_product(circuit.words[i])}\n" for i in members)
        head = (
            f"// Measurement setting {number} of {len(groups)}: basis {basis}, one letter for each qubit, q[0] first.\n"
            f"// Expectation values of Pauli words, means over shots:\n{listed}"
        )
        found.append(
            Setting(basis, members, head + to_openqasm(circuit, inputs, weights, version=version, basis=basis))
        )
    return found


def word_bits(word: str) -> list[int]:
    """The bits, and qubits, whose parity is the value of a word."""
    return [i for i, letter in enumerate(word) if letter != "I"]


def _product(word: str) -> str:
    return "".join(f" (-1)^c[{i}]" for i in word_bits(word)).strip() or "1"
