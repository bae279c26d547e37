"""Runs OpenQASM programs in NumPy: neither PennyLane nor torch nor the package is imported here.

It knows the few statements that are wanted, by the grammars of versions 2.0 (arXiv 1707.03429) and 3.0, and refuses all
others. Qubit 0 is the most significant.
"""

import re

import numpy as np
from dense_reference import cnot, on_wire, rx, ry

_X = np.array([[0, 1], [1, 0]])
_Z = np.diag([1, -1])
_FIXED = {
    "x": _X,
    "y": np.array([[0, -1j], [1j, 0]]),
    "z": _Z,
    "h": (_X + _Z) / np.sqrt(2),
    "s": np.diag([1, 1j]),
    "sdg": np.diag([1, -1j]),
    "t": np.diag([1, np.exp(0.25j * np.pi)]),
    "tdg": np.diag([1, np.exp(-0.25j * np.pi)]),
    "id": np.eye(2),
}
_TURNED = {"rx": rx, "ry": ry, "rz": lambda angle: np.diag(np.exp([-0.5j * angle, 0.5j * angle]))}
#: A real number as both grammars write it: with a decimal point.
_REAL = r"-?(?:\d+\.\d*|\d*\.\d+)(?:[eE][-+]?\d+)?"
_HEADS = {
    "2.0": ["OPENQASM 2.0;", 'include "qelib1.inc";', r"qreg q\[(\d+)\];", r"creg c\[(\d+)\];"],
    "3.0": ["OPENQASM 3.0;", 'include "stdgates.inc";', r"qubit\[(\d+)\] q;", r"bit\[(\d+)\] c;"],
}
_MEASURE = {"2.0": r"measure q\[(\d+)\] -> c\[(\d+)\];", "3.0": r"c\[(\d+)\] = measure q\[(\d+)\];"}


def run(text: str, version: str) -> tuple[np.ndarray, list[int] | None]:
    """The final state, and for each bit the qubit that it is measured from; `None` without measurements."""
    lines = [line for line in text.splitlines() if line and not line.startswith("//")]
    opening, library, qubits, bits = _HEADS[version]
    assert lines[:2] == [opening, library]
    n = int(re.fullmatch(qubits, lines[2])[1])
    rest = lines[3:]
    measured: dict[int, int] | None = None
    if rest and (declared := re.fullmatch(bits, rest[0])):
        assert int(declared[1]) == n
        measured, rest = {}, rest[1:]
    state = np.zeros(2**n, dtype=complex)
    state[0] = 1
    for line in rest:
        if found := re.fullmatch(_MEASURE[version], line):
            first, second = int(found[1]), int(found[2])
            bit, qubit = (second, first) if version == "2.0" else (first, second)
            measured[bit] = qubit
            continue
        assert not measured, "a gate after a measurement"
        state = _gate(line, n) @ state
    return state, None if measured is None else [measured[bit] for bit in range(n)]


def _gate(line: str, n: int) -> np.ndarray:
    found = re.fullmatch(rf"(\w+)(?:\(({_REAL})\))? q\[(\d+)\](?:,q\[(\d+)\])?;", line)
    assert found, f"not understood: {line}"
    name, angle, first, second = found.groups()
    wire = int(first)
    if second is None:
        return on_wire(_FIXED[name] if angle is None else _TURNED[name](float(angle)), wire, n)
    other = int(second)
    assert angle is None and wire != other and max(wire, other) < n
    if name == "cx":
        return cnot(wire, other, n)
    if name == "cz":
        turn = on_wire(_FIXED["h"], other, n)
        return turn @ cnot(wire, other, n) @ turn
    assert name == "swap", f"unknown gate {name}"
    return cnot(wire, other, n) @ cnot(other, wire, n) @ cnot(wire, other, n)


def probabilities(text: str, version: str) -> np.ndarray:
    """Probability of every value of the bits, `c[0]` first: an array of shape `(2, 2, ...)`."""
    state, measured = run(text, version)
    joint = (np.abs(state) ** 2).reshape((2,) * len(measured))
    return joint.transpose(measured)


def parity(joint: np.ndarray, bits: list[int]) -> float:
    """Mean of the product of (-1) to the power of these bits."""
    for bit in range(joint.ndim):
        signs = np.array([1, -1]) if bit in bits else np.ones(2)
        joint = joint * signs.reshape([2 if axis == bit else 1 for axis in range(joint.ndim)])
    return float(joint.sum())
