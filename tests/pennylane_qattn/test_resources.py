"""Counts of circuits: against counts by hand, PennyLane's own specs, and what devices count when they run."""

import math

import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import (
    ATTENTION,
    Circuit,
    CircuitFeatureMap,
    FunctionAnsatz,
    StateFeatureMap,
    StronglyEntangling,
)
from pennylane_qattn.execution import Execution
from pennylane_qattn.gates import ansatz_operations, encoding_operations
from pennylane_qattn.planning import METHODS
from pennylane_qattn.resources import (
    circuit_groups,
    circuit_resources,
    inference_executions,
    shots_for_confidence,
    shots_for_standard_error,
    to_plain,
    training_executions,
)


def four_terms(weights, wires):
    qml.RX(weights[0], wires[0])
    qml.CRY(weights[1], wires=wires[:2])
    qml.IsingXX(weights[2], wires=wires[:2])


# --- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_qisa_by_hand(n):
    """3n rotations and n CNOTs, one after the other; RX and RY before them, one RY after the last."""
    found = circuit_resources(Circuit(2**n, ("Z" * n,)))
    cnots = n if n > 1 else 0
    assert (found.qubits, found.features, found.angles) == (n, 2**n, 3 * n)
    box = found.boxed
    assert (box.one_qubit, box.two_qubit, box.depth) == (3 * n, cnots, 1 + 2 + cnots + 1)
    counted = {"RX": n, "RY": 2 * n, "CNOT": n, "amplitude encoding": 1}
    assert box.by_name == (counted if n > 1 else {k: v for k, v in counted.items() if k != "CNOT"})
    gates = found.decomposed
    assert gates.one_qubit == 3 * n + 2**n - 1 and gates.two_qubit == cnots + 2**n - 2
    assert sum(gates.by_name.values()) == gates.one_qubit + gates.two_qubit


@pytest.mark.parametrize(("n", "depth"), [(1, 1), (2, 4), (3, 11)])
def test_depth_of_a_state_preparation_by_hand(n, depth):
    """Wire k takes 2^k rotations and as many CNOTs, its first rotation beside those of the wires before it."""
    gates = encoding_operations(Circuit(2**n, ("Z" * n,)), np.arange(1.0, 2**n + 1))
    assert qml.tape.QuantumScript(gates).graph.get_depth() == depth


def test_angle_encoding_by_hand():
    found = circuit_resources(Circuit(3, ("ZZI", "XIX", "ZII"), "angle"))
    assert found.boxed.one_qubit == 9 and found.decomposed.one_qubit == 12
    assert found.boxed.depth == found.decomposed.depth == 1 + 6
    assert (found.words, found.distinct_words, found.settings) == (3, 3, 2)


def test_against_specs_of_a_device():
    """What `lightning.qubit` would be sent, with and without the encoding decomposed."""
    circuit = Circuit(7, ("ZZI", "XIX", "ZII"), ansatz=StronglyEntangling(2))
    x, weights = torch.ones(7, dtype=torch.float64), torch.rand(circuit.weight_shape)
    found = circuit_resources(circuit)
    sent = qml.specs(circuit.qnode("lightning.qubit"), level="device")(x, weights).resources
    (box,) = set(sent.gate_types) - {"Rot", "CNOT"}
    assert sent.gate_types["Rot"] == 6 and found.boxed.by_name == {
        "CNOT": sent.gate_types["CNOT"],
        "RY": 6,
        "RZ": 12,  # a Rot is RZ RY RZ
        "amplitude encoding": sent.gate_types[box],
    }

    gates = [*encoding_operations(circuit, x), *ansatz_operations(circuit, weights)]

    @qml.qnode(qml.device("default.qubit"))
    def hardware():
        for gate in gates:
            qml.apply(gate)
        return qml.state()

    specs = qml.specs(hardware, level="top")().resources
    assert found.decomposed.by_name == specs.gate_types and found.decomposed.depth == specs.depth


def test_t_gates_are_the_estimators():
    circuit = Circuit(2, ("Z",))  # four rotations
    one = qml.estimator.estimate(lambda: qml.RZ(0.3, 0))().gate_counts["T"]
    assert circuit_resources(circuit).t_gates == 4 * one > 0


def test_words_that_come_twice_and_settings():
    found = circuit_resources(Circuit(4, ("ZI", "ZI", "IZ", "XI", "YY")))
    assert (found.words, found.distinct_words, found.settings) == (5, 4, 3)


# --- executions -------------------------------------------------------------------------------------------------


def test_executions_by_hand():
    circuit = Circuit(3, ("ZI", "XI", "IZ"))  # 2 qubits, 6 rotations, 2 settings
    assert inference_executions(circuit) == 1 and inference_executions(circuit, sampling=True) == 2

    def total(method, **options):
        found = training_executions(circuit, method, **options)
        return found and (found.forward, found.angles, found.inputs)

    assert total("backprop") == (1, 0, 0)
    assert total("adjoint") == (1, 1, 1)
    assert total("parameter-shift") == (1, 12, 1)
    assert total("parameter-shift", gives_states=False) == (1, 12, 6)
    assert total("parameter-shift", sampling=True) == (2, 24, 12)
    assert total("finite-diff") == (1, 12, 1)
    assert total("spsa", options={"num_directions": 5}) == (1, 10, 1)
    assert total("hadamard") == (1, 6, 1)
    assert total("adjoint", sampling=True) is total("backprop", sampling=True) is None


def test_rules_of_four_terms_by_hand():
    circuit = Circuit(3, ("ZI",), ansatz=FunctionAnsatz(four_terms, (3,)))
    assert training_executions(circuit, "parameter-shift").angles == 2 + 4 + 2
    assert training_executions(circuit, "hadamard").angles == 1 + 2 + 1


@pytest.mark.parametrize("encoding", ["amplitude", "angle"])
@pytest.mark.parametrize(
    ("method", "shots", "device"),
    [
        *((method, None, "default.qubit") for method in METHODS),
        *((method, 5, "default.qubit") for method in METHODS[2:]),
        ("adjoint", None, "lightning.qubit"),
        ("parameter-shift", None, "default.mixed"),
    ],
)
def test_what_a_device_counts(method, shots, device, encoding):
    """Forward and backward of distinct tokens; the device's own tracker counts tapes that are sampled."""
    options = {"num_directions": 2} if method == "spsa" else {}
    execution = Execution(
        executor="qnode", device=device, diff_method=method, shots=shots, gradient_options=options, seed=1
    )
    words = ("XI", "ZI", "IY", "ZI") if encoding == "amplitude" else ("XIII", "ZIZI", "IYIZ", "ZIZI")
    torch.manual_seed(0)
    features = CircuitFeatureMap(
        4, 1, 4, FunctionAnsatz(four_terms, (3,)), encoding, words=words, execution=execution
    ).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    features(x)  # the device is asked what it can do
    before = features.executor.meter.executions
    with qml.Tracker(features.executor.runner.device) as tracker:
        features(x).sum().backward()
    how = {"sampling": shots is not None, "gives_states": device != "default.mixed", "options": options}
    expected = training_executions(features.circuits[0], method, **how)
    used = features.executor.meter.executions - before
    # PennyLane's Hadamard test leaves out gates that no word of a setting can see
    assert used == 3 * expected.total or (method == "hadamard" and shots and used < 3 * expected.total)
    assert features.executor.count(3, training=True) == 3 * expected.total
    if shots:
        assert tracker.totals["executions"] == used
        assert tracker.totals["shots"] == 5 * used


@pytest.mark.parametrize("encoding", ["amplitude", "angle"])
@pytest.mark.parametrize("method", ["backprop", "parameter-shift"])
def test_what_a_device_counts_for_states(method, encoding):
    execution = Execution(executor="qnode", diff_method=method)
    torch.manual_seed(0)
    features = StateFeatureMap(
        4, 1, ansatz=FunctionAnsatz(four_terms, (3,)), encoding=encoding, execution=execution
    ).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    features(x).sum().backward()
    expected = training_executions(features.circuits[0], method, for_states=True)
    assert features.executor.meter.executions == 3 * expected.total
    assert training_executions(features.circuits[0], method, for_states=True, gives_states=False) is None


# --- shots ------------------------------------------------------------------------------------------------------


def test_shots_for_a_standard_error():
    assert shots_for_standard_error(0.1) == 100
    assert shots_for_standard_error(0.1, value=0.6) == 64
    assert shots_for_standard_error(0.1, value=-1.0) == 1
    rng = np.random.default_rng(4)
    shots = shots_for_standard_error(0.05, value=0.3)
    means = 2 * rng.binomial(shots, 0.65, size=20_000) / shots - 1
    assert abs(means.std() / 0.05 - 1) < 0.02


def test_shots_for_a_confidence():
    shots = shots_for_confidence(0.1, 0.95, words=3)
    assert shots == math.ceil(200 * math.log(120))
    rng = np.random.default_rng(4)
    means = 2 * rng.binomial(shots, 0.5, size=(20_000, 3)) / shots - 1  # the worst value
    assert (np.abs(means).max(1) >= 0.1).mean() < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shots_for_standard_error(0.0), r"accuracy of an expectation value must lie in \(0, 1\]; got 0.0"),
        (lambda: shots_for_standard_error(0.1, 1.5), r"lies in \[-1, 1\]; got 1.5"),
        (lambda: shots_for_confidence(0.1, 1.0), r"confidence must lie in \(0, 1\); got 1.0"),
        (lambda: shots_for_confidence(0.1, words=0), "words must be at least 1; got 0"),
        (lambda: training_executions(Circuit(2, ("Z",)), "magic"), "unknown method 'magic'; choose from backprop"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- models -----------------------------------------------------------------------------------------------------


def layers(name, count=3, **options):
    mechanism = ATTENTION.build(name, **options)
    return [mechanism(6, 2, 7, layer=layer) for layer in range(count)]


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("classical", []),
        ("qisa-absorbed", []),
        ("qisa", [("value",)]),
        ("qsann", [("query", "key"), ("value",)]),
        ("qsann-multi", [("query", "key", "value")]),
        ("overlap", [("query", "key")]),
    ],
)
def test_groups_of_a_model(name, maps):
    groups = circuit_groups(iter(layers(name)))
    assert [group.maps for group in groups] == maps
    for group in groups:
        assert group.count == 3 * 2 * len(group.maps) == len(group.each)
        assert len(set(group.members)) == group.count
        assert {member[:2] for member in group.members} == {(layer, head) for layer in (1, 2, 3) for head in (1, 2)}


def test_totals_add_up():
    (group,) = circuit_groups(layers("qisa"))
    settings = [len({circuit.settings}) and circuit.settings for circuit in group.each]
    assert group.inference() == 6 and group.inference(sampling=True) == sum(settings)
    one = [training_executions(circuit, "parameter-shift", sampling=True) for circuit in group.circuits]
    step = group.training("parameter-shift", 5, sampling=True)
    assert step.total == 5 * sum(each.total for each in one)
    # 6 numbers in 3 qubits with 9 rotations: a forward pass, 18 shifted ones, 12 for the inputs, per setting
    assert step.total == 5 * sum(settings) * (1 + 18 + 12)


def test_what_json_holds():
    import json

    for name in ("qisa", "overlap"):
        (group,) = circuit_groups(layers(name))
        plain = json.loads(json.dumps(to_plain(group, tokens=5, directions=3)))
        assert len(plain["members"]) == plain["circuits"] == group.count
        steps = plain["executions_per_training_step"]
        assert list(steps) == list(METHODS)
        assert steps["backprop"]["sampling"] is None
        if name == "qisa":
            assert steps["spsa"]["exact"]["total"] == 5 * 6 * (1 + 6 + 1)
            assert plain["circuit"]["decomposed"]["two_qubit"] == 3 + 6
        else:
            assert plain["circuit"]["words"] == 0 and steps["adjoint"]["sampling"] is None


def test_a_large_model_is_counted_quickly():
    """GPT-1's width: ten qubits, a state preparation of 2,045 gates."""
    circuit = Circuit(768, ("Z" * 10,))
    found = circuit_resources(circuit)
    assert found.decomposed.by_name == {"CNOT": 1022 + 10, "RX": 10, "RY": 1023 + 20}
    assert circuit_resources(Circuit(768, ("X" * 10,))).decomposed is found.decomposed, "counted once"


def block(weights, wires):
    qml.BlockEncode(np.array([[0.1, 0.2], [0.3, 0.4]]), wires=wires[:2])


def test_a_gate_without_a_decomposition_is_refused_by_name():
    circuit = Circuit(4, ("ZI",), ansatz=FunctionAnsatz(block, (1,)))
    with pytest.raises(ValueError, match="^BlockEncode cannot be decomposed to Adjoint.*; write it with those$"):
        circuit_resources(circuit)
