"""OpenQASM programs, run by a small interpreter in NumPy, and by Qiskit where it is installed."""

import numpy as np
import pennylane as qml
import pytest
import torch
from dense_reference import amplitude_state, kron, qisa_unitary, qisa_values, ry, word_matrix
from qasm_interpreter import parity, probabilities, run

from pennylane_qattn import AngleEncoding, Circuit, FunctionAnsatz
from pennylane_qattn.gates import encoding_operations, state_operations
from pennylane_qattn.observables import draw_words
from pennylane_qattn.openqasm import VERSIONS, measurement_settings, to_openqasm, word_bits
from pennylane_qattn.program import FIXED, ROTATIONS

both = pytest.mark.parametrize("version", VERSIONS)


def numbers(size, seed=5):
    return np.random.default_rng(seed).normal(size=size)


def angles(circuit, seed=7):
    return torch.as_tensor(np.random.default_rng(seed).uniform(-7, 7, size=circuit.weight_shape))


def values_of(settings, words, version):
    """Expectation values from the bits that the programs measure."""
    found = {}
    for setting in settings:
        joint = probabilities(setting.program, version)
        for i in setting.words:
            assert i not in found
            found[i] = parity(joint, word_bits(words[i]))
    return [found[i] for i in range(len(words))]


@both
@pytest.mark.parametrize("num_features", [1, 2, 3, 5, 7, 13])
def test_qisa_against_a_dense_reference(num_features, version):
    n = max(1, (num_features - 1).bit_length())
    circuit = Circuit(num_features, draw_words(11, n, 3, identity_probability=0.4))
    x, weights = numbers(num_features), angles(circuit)
    expected = qisa_values(x, weights[0].numpy(), circuit.words)
    state, measured = run(to_openqasm(circuit, x, weights, version=version), version)
    assert measured is None
    np.testing.assert_allclose(
        state, qisa_unitary(weights[0].numpy()) @ amplitude_state(x, n), atol=1e-13, err_msg="also in phase"
    )
    settings = measurement_settings(circuit, x, weights, version=version)
    np.testing.assert_allclose(values_of(settings, circuit.words, version), expected, atol=1e-13)


@pytest.mark.parametrize(
    "x",
    [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, -2],
        [-1, 0, 0, 0, 0],
        [0, -3, 0, 0, 0],
        [0, 0, 0, 1e-300, -1e-300],
        [1e200, -1e200, 1, 0, 0],
        [1, 1e-9, 0, -1e-9, 1e-5],
        [-1, -2, -3, -4, -5],
    ],
)
def test_inputs_at_which_a_tree_of_angles_might_break(x):
    circuit = Circuit(5, draw_words(7, 3, 2, identity_probability=0.3))
    weights = angles(circuit)
    text = to_openqasm(circuit, x, weights)
    state, _ = run(text, "2.0")
    scaled = np.array(x) / max(1e-300, np.abs(x).max())
    np.testing.assert_allclose(state, qisa_unitary(weights[0].numpy()) @ amplitude_state(scaled, 3), atol=1e-13)
    assert text.count("\n") == to_openqasm(circuit, numbers(5), weights).count("\n"), "all inputs have the same gates"


def test_angle_encoding():
    for axis, turn in (("Y", ry), ("X", None)):
        circuit = Circuit(3, ("XYZ", "IIZ", "ZIX"), AngleEncoding(axis), "strongly-entangling")
        x, weights = numbers(3), angles(circuit)
        expected = circuit.qnode(interface=None)(torch.as_tensor(x), weights)
        settings = measurement_settings(circuit, x, weights)
        np.testing.assert_allclose(values_of(settings, circuit.words, "2.0"), expected, atol=1e-13)
        if turn:  # the encoding alone, in NumPy
            gates = encoding_operations(circuit, x)
            state = qml.matrix(qml.tape.QuantumScript(gates), wire_order=range(3))[:, 0]
            np.testing.assert_allclose(state, kron([turn(angle) for angle in x])[:, 0], atol=1e-14)


@pytest.mark.parametrize("name", sorted(ROTATIONS | FIXED))
def test_every_gate_of_an_ansatz(name):
    gate = getattr(qml, name)
    size = gate.num_wires or 3

    def ansatz(weights, wires):
        for wire in wires:
            qml.RY(weights[1] + wire, wire)
            qml.RX(weights[2] - wire, wire)
        on = [wires[i] for i in (2, 0, 1, 3)[:size]]
        if name == "PauliRot":
            gate(weights[0], "XYZ", wires=on)
        else:
            gate(*([weights[0]] if name in ROTATIONS else []), wires=on)

    circuit = Circuit(13, ("XYIZ", "ZZXX", "IYIY", "ZIII", "IIZI"), ansatz=FunctionAnsatz(ansatz, (3,)))
    x, weights = numbers(13), angles(circuit)
    expected = circuit.qnode(interface=None)(torch.as_tensor(x), weights)
    state, _ = run(to_openqasm(circuit, x, weights), "2.0")
    found = [(state.conj() @ word_matrix(word) @ state).real for word in circuit.words]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_constant_matrices(size):
    rng = np.random.default_rng(size)
    matrix = np.linalg.qr(rng.normal(size=(2**size,) * 2) + 1j * rng.normal(size=(2**size,) * 2))[0]

    def ansatz(weights, wires):
        qml.RX(weights[0], wires[0])
        qml.QubitUnitary(matrix, wires=wires[:size])

    circuit = Circuit(7, ("XYZ", "ZIX", "YYI"), ansatz=FunctionAnsatz(ansatz, (1,)))
    x, weights = numbers(7), angles(circuit)
    state, _ = run(to_openqasm(circuit, x, weights), "2.0")
    found = [(state.conj() @ word_matrix(word) @ state).real for word in circuit.words]
    np.testing.assert_allclose(found, circuit.qnode(interface=None)(torch.as_tensor(x), weights), atol=1e-12)


def test_complex_states_are_prepared_too():
    rng = np.random.default_rng(1)
    state = rng.normal(size=8) + 1j * rng.normal(size=8)
    state /= np.linalg.norm(state)
    gates = qml.tape.QuantumScript(state_operations(state, range(3)))
    np.testing.assert_allclose(qml.matrix(gates, wire_order=range(3))[:, 0], state, atol=1e-14)


def test_both_versions_have_the_same_gates_and_numbers_with_a_point():
    circuit = Circuit(3, ("XY",))
    weights = torch.tensor([[[1e-05, 2.0], [3.0, -1e-07], [1e22, 0.0]]], dtype=torch.float64)
    texts = [to_openqasm(circuit, [1.0, 2.0, 3.0], weights, version=version, basis="XY") for version in VERSIONS]
    gates = [[line for line in text.splitlines() if re_gate(line)] for text in texts]
    assert gates[0] == gates[1] and len(gates[0]) == 5 + 8 + 1 + 3
    assert "rx(1.0e-05) q[0];" in gates[0] and "ry(-1.0e-07) q[1];" in gates[0] and "ry(1.0e+22) q[0];" in gates[0]
    run(texts[0], "2.0")


def re_gate(line):
    return line.endswith(";") and "q[" in line and not any(word in line for word in ("qreg", "qubit", "measure"))


def test_what_a_setting_says():
    circuit = Circuit(3, ("XI", "IZ", "ZZ", "XI"))
    first, second = measurement_settings(circuit, [1.0, 2.0, 3.0], angles(circuit), version="3.0")
    assert (first.basis, first.words, second.basis, second.words) == ("XZ", (0, 1, 3), "ZZ", (2,))
    assert first.program.startswith("// Measurement setting 1 of 2: basis XZ")
    assert "//   word 3: XI = mean of (-1)^c[0]\n" in first.program
    assert "//   word 2: ZZ = mean of (-1)^c[0] (-1)^c[1]\n" in second.program


def test_bad_input():
    circuit = Circuit(3, ("XI",))
    weights = angles(circuit)
    for arguments, options, message in [
        (([1.0, 2.0, 3.0], weights), {"version": "1.0"}, "unknown version '1.0' of OpenQASM; choose from 2.0, 3.0"),
        (([1.0, 2.0, 3.0], weights), {"basis": "XYZ"}, "a basis of 2 qubits has 2 letters of XYZ; got 'XYZ'"),
        (([1.0, 2.0, 3.0], weights), {"basis": "XQ"}, "a basis of 2 qubits has 2 letters of XYZ; got 'XQ'"),
        (([1.0, 2.0], weights), {}, "encodes 3 numbers"),
        (([1.0, float("nan"), 3.0], weights), {}, "not finite"),
        (([1.0, 2.0, 3.0], weights[0]), {}, r"angles of shape \(1, 3, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_openqasm(circuit, *arguments, **options)


# --- another SDK ------------------------------------------------------------------------------------------------


def qiskit_parser(version):
    pytest.importorskip("qiskit", reason="Qiskit is not installed: pip install qiskit qiskit-qasm3-import")
    if version == "2.0":
        from qiskit import qasm2

        return lambda text: qasm2.loads(text, strict=True)
    pytest.importorskip("qiskit_qasm3_import", reason="Qiskit needs qiskit-qasm3-import to read OpenQASM 3")
    from qiskit import qasm3

    return qasm3.loads


@both
@pytest.mark.parametrize(("encoding", "ansatz"), [("amplitude", "qisa"), ("angle", "strongly-entangling")])
def test_qiskit_simulates_the_same_values(version, encoding, ansatz):
    parse = qiskit_parser(version)
    from qiskit.quantum_info import SparsePauliOp, Statevector

    num_features = 13 if encoding == "amplitude" else 3
    probe = Circuit(num_features, ("Z" * (4 if encoding == "amplitude" else 3),), encoding, ansatz)
    circuit = Circuit(num_features, draw_words(11, probe.num_wires, 3, 0.4), encoding, ansatz)
    x, weights = numbers(num_features), angles(circuit)
    expected = [float(v) for v in circuit.qnode(interface=None)(torch.as_tensor(x), weights)]

    state = Statevector(parse(to_openqasm(circuit, x, weights, version=version)))
    # Qiskit's labels have qubit 0 last
    found = [state.expectation_value(SparsePauliOp(word[::-1])).real for word in circuit.words]
    np.testing.assert_allclose(found, expected, atol=1e-12)

    measured = {}
    for setting in measurement_settings(circuit, x, weights, version=version):
        parsed = parse(setting.program)
        assert parsed.num_clbits == circuit.num_wires and parsed.count_ops()["measure"] == circuit.num_wires
        parsed.remove_final_measurements()
        outcomes = Statevector(parsed).probabilities_dict()  # keys have bit 0 last
        for i in setting.words:
            bits = word_bits(circuit.words[i])
            measured[i] = sum(p * (-1) ** sum(int(key[::-1][b]) for b in bits) for key, p in outcomes.items())
    np.testing.assert_allclose([measured[i] for i in range(11)], expected, atol=1e-12)
