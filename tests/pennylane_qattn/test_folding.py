"""Folded circuits against PennyLane's own QNode, and against dense NumPy matrices."""

import numpy as np
import pennylane as qml
import pytest
import torch
from dense_reference import qisa_unitary, qisa_values

from pennylane_qattn import (
    AmplitudeEncoding,
    AngleEncoding,
    BasicEntangler,
    Circuit,
    CircuitFeatureMap,
    FunctionAnsatz,
    QISAAnsatz,
    StateFeatureMap,
    StronglyEntangling,
)
from pennylane_qattn.execution import make_executor
from pennylane_qattn.executor import FoldedExecutor
from pennylane_qattn.folding import Memory, fuse
from pennylane_qattn.observables import draw_words


def computed(weights, wires):
    """A circuit with computed angles, many kinds of gates, and constants."""
    last = wires[-1]
    qml.Hadamard(wires[0])
    qml.Rot(torch.sin(weights[0]), weights[1] * weights[2], weights[0] + 1, wires=last)
    qml.PauliRot(weights[3], "XY", wires=[wires[0], last])
    qml.S(wires[0])
    qml.CRX(weights[4], wires=[last, wires[0]])
    qml.adjoint(qml.T)(last)
    qml.ISWAP([wires[0], last])
    qml.RX(0.3, wires=last)
    qml.MultiRZ(weights[5], wires=wires)
    qml.IsingXY(weights[2] / 3, wires=[wires[0], last])
    qml.CH([wires[0], last])
    qml.QubitUnitary(qml.matrix(qml.QFT([0, 1])), wires=[last, wires[0]])
    qml.GlobalPhase(weights[1])


ANSATZE = {
    "qisa": QISAAnsatz(),
    "qisa-2": QISAAnsatz(layers=2),
    "strongly-entangling": StronglyEntangling(layers=2),
    "basic-entangler": BasicEntangler(layers=2, rotation="Z"),
    "computed": FunctionAnsatz(computed, (6,)),
}


def batch_for(encoding, features, rng):
    """Random vectors, and with amplitude encoding the awkward ones."""
    x = torch.randn(3, features, dtype=torch.float64, generator=rng)
    if isinstance(encoding, AmplitudeEncoding):
        basis = torch.eye(features, dtype=torch.float64)
        flipped = -x[:1]
        holes = x[1:2].clone()
        holes[0, ::2] = 0.0
        holes[0, -1] = 1.0
        x = torch.cat((x, basis[:1], -2 * basis[-1:], flipped, holes))
    return x


def folded_and_pennylane(circuit, dtype, rng):
    """Values and gradients of a weighted sum, both ways: (values, input gradients, angle gradients)."""
    x = batch_for(circuit.encoding, circuit.num_features, rng)
    weights = torch.rand(1, *circuit.weight_shape, dtype=torch.float64, generator=rng) * 6
    upstream = torch.randn(len(x), len(circuit.words), dtype=torch.float64, generator=rng)

    def gradients(function, x, weights):
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        values = function(x, weights)
        (values * upstream.to(values.dtype)).sum().backward()
        return values.detach(), x.grad, weights.grad

    executor = FoldedExecutor([circuit])
    folded = gradients(lambda x, w: executor.expectations(x[None], w)[0], x.to(dtype), weights.to(dtype))
    node = circuit.qnode("default.qubit", diff_method="backprop")
    exact = gradients(lambda x, w: torch.stack(node(x, w[0]), dim=-1), x, weights)
    return folded, exact


@pytest.mark.parametrize("wires", [2, 3, 5, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ANSATZE)
@pytest.mark.parametrize(
    "encoding", [AmplitudeEncoding(), AngleEncoding(), AngleEncoding("X")], ids=["amp", "ry", "rx"]
)
def test_fold_equals_pennylane(encoding, name, wires, dtype, close, rng):
    features = 2**wires - 1 if isinstance(encoding, AmplitudeEncoding) else wires
    circuit = Circuit(features, draw_words(5, wires, seed=wires, identity_probability=0.4), encoding, ANSATZE[name])
    folded, exact = folded_and_pennylane(circuit, dtype, rng)
    for ours, theirs in zip(folded, exact, strict=True):
        close(ours, theirs, factor=20 if dtype == torch.float32 else 5)


@pytest.mark.parametrize("wires", [4, 6, 7])
def test_fold_equals_pennylane_published_circuit(wires, rng):
    circuit = Circuit(2**wires, draw_words(7, wires, seed=wires))
    folded, exact = folded_and_pennylane(circuit, torch.float64, rng)
    for ours, theirs in zip(folded, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 2, 3, 5, 7, 11])
def test_fold_equals_dense_numpy(features, dtype, close, rng):
    wires = AmplitudeEncoding().num_wires(features)
    words = draw_words(5, wires, seed=features)
    x = torch.randn(3, features, dtype=dtype, generator=rng)
    x[0] = 0.0
    angles = torch.rand(1, 1, 3, wires, dtype=dtype, generator=rng)
    values = FoldedExecutor([Circuit(features, words)]).expectations(x[None], angles)[0]
    expected = [qisa_values(row.double().numpy(), angles[0, 0].double().numpy(), words) for row in x]
    close(values, np.array(expected))


def test_one_qubit_by_hand():
    # RY(t)|0> = (cos t/2, sin t/2): <Z> = cos t, <X> = sin t
    angles = torch.tensor([0.0, 0.4, 0.5], dtype=torch.float64).reshape(1, 1, 3, 1)
    values = FoldedExecutor([Circuit(1, ("Z", "X", "Y"))]).expectations(torch.full((1, 1, 1), 3.0).double(), angles)
    torch.testing.assert_close(values[0, 0], torch.tensor([np.cos(0.9), np.sin(0.9), 0.0]))


def test_gradcheck(rng):
    executor = FoldedExecutor([Circuit(5, ("XYZ", "ZII", "IXI")), Circuit(5, ("IIZ", "YII", "IZX"))])
    x = torch.randn(1, 3, 5, dtype=torch.float64, generator=rng).requires_grad_()
    weights = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=rng).requires_grad_()
    assert torch.autograd.gradcheck(executor.expectations, (x, weights))
    assert torch.autograd.gradgradcheck(executor.expectations, (x, weights))


def test_zero_vector_measures_the_ground_state(dtype, close, rng):
    circuit = Circuit(5, draw_words(5, 3, seed=1))
    weights = torch.rand(1, 1, 3, 3, dtype=dtype, generator=rng).requires_grad_()
    x = torch.zeros(1, 2, 5, dtype=dtype).requires_grad_()
    executor = FoldedExecutor([circuit])
    values = executor.expectations(x, weights)
    basis = torch.eye(5, dtype=dtype)[:1].expand(1, 2, 5)
    close(values, executor.expectations(basis, weights).detach())
    values.sum().backward()
    assert (x.grad == 0).all() and torch.isfinite(weights.grad).all()


def test_states_are_pennylanes(rng):
    feature_map = StateFeatureMap(6, 2, ansatz=ANSATZE["computed"]).double()
    x = torch.randn(1, 1, 6, dtype=torch.float64, generator=rng)
    state = feature_map(x)[0, 1, 0]

    @qml.qnode(qml.device("default.qubit", wires=3))
    def exact(x, weights):
        AmplitudeEncoding().prepare(x, range(3))
        computed(weights, [0, 1, 2])
        return qml.state()

    expected = exact(x[0, 0], feature_map.weights[1].detach())
    ours = torch.complex(*state.detach().chunk(2))
    # a global phase is not a matter of the state
    assert abs(abs(torch.vdot(ours, expected)) - 1) < 1e-12


def test_published_circuit_folds_into_three_steps():
    kinds = [type(step).__name__ for step in fuse(QISAAnsatz().program(5))]
    assert kinds == ["_Local", "_Monomial", "_Local"]


def test_unitary_of_the_published_circuit(rng):
    fold_map = StateFeatureMap(8, 1).double()
    angles = fold_map.weights.detach()
    x = torch.eye(8, dtype=torch.float64)[None]
    columns = torch.complex(*fold_map(x)[0, 0].detach().chunk(2, dim=-1)).numpy().T
    np.testing.assert_allclose(columns, qisa_unitary(angles[0, 0].numpy()), atol=1e-12)


def test_pennylane_is_not_called_when_run(monkeypatch, rng):
    feature_map = CircuitFeatureMap(6, 2, 5)
    for name in ("RX", "RY", "CNOT"):
        monkeypatch.setattr(qml, name, None)
    monkeypatch.setattr(qml.tape, "QuantumScript", None)
    assert feature_map(torch.randn(2, 3, 6, generator=rng)).shape == (2, 2, 3, 5)


def test_a_memory_is_shared_by_threads(monkeypatch):
    """Another caller whose weights are others may come in between at any point: each has the result of its own."""
    memory, equal = Memory(), torch.equal
    ours, others = torch.zeros(3), torch.ones(3)

    def interrupted(*pair):
        found = equal(*pair)
        monkeypatch.undo()
        assert memory(lambda: "theirs", others) == "theirs"
        return found

    with torch.no_grad():
        assert memory(lambda: "ours", ours) == "ours"
        monkeypatch.setattr(torch, "equal", interrupted)
        assert memory(lambda: "ours", ours) == "ours"
        assert memory(lambda: "made anew", others) == "theirs"
        assert memory(lambda: "made anew", ours) == "made anew"


def test_too_large_a_fold_is_refused():
    with pytest.raises(ValueError, match="folding 1 circuits of 16 qubits takes .* GiB; use amplitude encoding"):
        make_executor([Circuit(16, ("Z" * 16,), "angle")], "folded")


def test_unknown_executor():
    with pytest.raises(ValueError, match="unknown executor 'foo'; choose from auto, folded, qnode"):
        make_executor([Circuit(2, ("Z",))], "foo")
