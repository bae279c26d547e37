"""Amplification as circuits on devices: the same numbers and gradients as the closed form, with counted executions."""

import math

import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import CircuitLayer, Execution, Noise
from pennylane_qattn.counting import training_executions
from pennylane_qattn.grover.amplification import amplified, amplify, amplify_phase, fixed_point, mean_mark
from pennylane_qattn.grover.circuits import (
    MAX_KEYS,
    Amplification,
    RowExecutor,
    diagonal,
    multiplexed_ry,
    phase_of_zero,
    prepare_uniform,
    row_circuit,
    walsh_hadamard,
)


def matrix(queue, num_wires: int) -> np.ndarray:
    with qml.queuing.AnnotatedQueue() as recorded:
        queue()
    return qml.matrix(qml.tape.QuantumScript.from_queue(recorded), wire_order=range(num_wires))


def marks(rows: int, keys: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(31 * rows + keys)
    return torch.rand(rows, keys, dtype=torch.float64, generator=generator) * 0.9 + 0.05


def angles_of(f: torch.Tensor, oracle: str) -> torch.Tensor:
    return math.pi * f if oracle == "phase" else 2 * f.sqrt().asin()


def expected(f: torch.Tensor, iterations: torch.Tensor, oracle: str, delta: float | None = None) -> torch.Tensor:
    count = torch.full((len(f), 1), float(f.shape[-1]), dtype=f.dtype)
    rounds, most = iterations[:, None], int(iterations.max())
    if oracle == "phase":
        return amplify_phase(f, torch.ones_like(f), count, rounds, most)
    mean = mean_mark(f, count)
    if delta is not None:
        a, b = (factor.abs() for factor in fixed_point(mean, 2 * most + 1, delta))
    else:
        a, b = amplified(mean, rounds, most)
    return amplify(f, torch.ones_like(f), count, a, b)


# --- pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_keys, num_wires", [(2, 1), (3, 2), (4, 2), (5, 3), (7, 3), (8, 3)])
def test_uniform_state_over_the_keys_alone(num_keys, num_wires):
    prepared = matrix(lambda: prepare_uniform(num_keys, range(num_wires)), num_wires)
    np.testing.assert_allclose(prepared[:num_keys, 0], num_keys**-0.5, atol=1e-12)
    np.testing.assert_allclose(prepared[num_keys:, 0], 0, atol=1e-12)
    inverse = matrix(lambda: prepare_uniform(num_keys, range(num_wires), back=True), num_wires)
    np.testing.assert_allclose(inverse @ prepared, np.eye(2**num_wires), atol=1e-12)


@pytest.mark.parametrize("controls", [1, 2, 3])
def test_multiplexer_turns_each_key_by_its_angle(controls):
    angles = torch.as_tensor(np.random.default_rng(controls).uniform(-3, 3, 2**controls))
    found = matrix(lambda: multiplexed_ry(angles, range(controls), controls), controls + 1)
    blocks = np.zeros((2 ** (controls + 1), 2 ** (controls + 1)))
    for key, angle in enumerate(angles.tolist()):
        half = angle / 2
        rotation = [[math.cos(half), -math.sin(half)], [math.sin(half), math.cos(half)]]
        blocks[2 * key : 2 * key + 2, 2 * key : 2 * key + 2] = rotation
    np.testing.assert_allclose(found, blocks, atol=1e-12)


@pytest.mark.parametrize("num_wires", [1, 2, 3])
def test_diagonal_has_each_keys_phase(num_wires):
    phases = torch.as_tensor(np.random.default_rng(num_wires).uniform(-3, 3, 2**num_wires))
    found = np.diag(matrix(lambda: diagonal(phases, range(num_wires)), num_wires))
    np.testing.assert_allclose(found / found[0], np.exp(1j * (phases - phases[0]).numpy()), atol=1e-12)


@pytest.mark.parametrize("num_wires", [1, 2, 3])
def test_phase_of_zero(num_wires):
    found = matrix(lambda: phase_of_zero(0.7, range(num_wires)), num_wires)
    wanted = np.ones(2**num_wires, dtype=complex)
    wanted[0] = np.exp(-0.7j)
    np.testing.assert_allclose(found, np.diag(wanted), atol=1e-12)


def test_walsh_hadamard_is_the_matrix_of_signs():
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(3, 8)))
    signs = [[(-1) ** (row & column).bit_count() for column in range(8)] for row in range(8)]
    torch.testing.assert_close(walsh_hadamard(x), x @ torch.tensor(signs, dtype=torch.float64))


# --- values and gradients ---------------------------------------------------------------------------------------

METHODS = [
    ("default.qubit", "backprop"),
    ("default.qubit", "adjoint"),
    ("lightning.qubit", "adjoint"),
    ("lightning.qubit", "parameter-shift"),
    ("default.mixed", "backprop"),
    pytest.param("reference.qubit", "parameter-shift", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("oracle, delta", [("amplitude", None), ("amplitude", 0.4), ("phase", None)])
@pytest.mark.parametrize("device, method", METHODS)
def test_values_gradients_and_executions(device, method, oracle, delta):
    # three key qubits of which two basis states are no keys, two iterations
    keys, rounds = 6, 2
    f = marks(2, keys).requires_grad_()
    iterations = torch.full((2,), rounds)
    upstream = torch.as_tensor(np.random.default_rng(2).normal(size=(2, keys)))
    wanted = expected(f, iterations, oracle, delta)
    (gradient,) = torch.autograd.grad((wanted * upstream).sum(), f)

    execution = Execution(executor="qnode", device=device, diff_method=method)
    executor = RowExecutor(Amplification(rounds, oracle, delta), False, keys, execution)
    found, with_one = executor.probabilities(angles_of(f, oracle), iterations)
    assert with_one is None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    (by_device,) = torch.autograd.grad((found * upstream).sum(), f)
    torch.testing.assert_close(by_device, gradient, rtol=0, atol=1e-9)

    rotations = 2 * rounds * 7 if oracle == "phase" else 2 * (2 * rounds + 1) * 8
    per_row = {"backprop": 1, "adjoint": 2, "parameter-shift": rotations + 1}[method]
    assert executor.meter.executions == 2 * per_row
    circuit = row_circuit(keys, Amplification(rounds, oracle, delta))
    assert training_executions(circuit, method).total == per_row


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_joint_with_the_ancilla_gives_the_conditional_distribution(iterations):
    f = marks(3, 5)
    executor = RowExecutor(Amplification(iterations), True, 5, "qnode")
    found, with_one = executor.probabilities(angles_of(f, "amplitude"), torch.full((3,), iterations))
    torch.testing.assert_close(found, expected(f, torch.full((3,), iterations), "amplitude"), rtol=0, atol=1e-10)
    share = with_one / with_one.sum(-1, keepdim=True)
    torch.testing.assert_close(share, f / f.sum(-1, keepdim=True), rtol=0, atol=1e-10)


def test_rows_of_several_iterations_come_back_in_their_order():
    f, iterations = marks(5, 7), torch.tensor([2, 0, 1, 2, 0])
    found, _ = RowExecutor(Amplification(), False, 7, "qnode").probabilities(angles_of(f, "amplitude"), iterations)
    torch.testing.assert_close(found, expected(f, iterations, "amplitude"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_keys, iterations", [(16, 3), (24, 2), (32, 4), (33, 4), (64, 4)])
def test_long_rows(num_keys, iterations):
    f = (marks(2, num_keys) * 0.1).requires_grad_()
    rounds = torch.full((2,), iterations)
    wanted = expected(f, rounds, "amplitude")
    upstream = torch.as_tensor(np.random.default_rng(num_keys).normal(size=(2, num_keys)))
    (gradient,) = torch.autograd.grad((wanted * upstream).sum(), f)
    executor = RowExecutor(Amplification(iterations), False, num_keys, Execution(executor="qnode"))
    found, _ = executor.probabilities(angles_of(f, "amplitude"), rounds)
    (by_device,) = torch.autograd.grad((found * upstream).sum(), f)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(by_device, gradient, rtol=0, atol=1e-10)


def test_single_precision():
    f = marks(2, 13).float() * 0.2
    rounds = torch.full((2,), 4)
    found, _ = RowExecutor(Amplification(4), False, 13, "qnode").probabilities(angles_of(f, "amplitude"), rounds)
    wanted = expected(f.double(), rounds, "amplitude")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(expected(f, rounds, "amplitude").double(), wanted, rtol=1e-4, atol=1e-6)


def test_shots_sample_the_distribution_and_repeat():
    f, rounds = marks(2, 6) * 0.4, torch.full((2,), 1)
    wanted = expected(f, rounds, "amplitude")
    execution = Execution(executor="qnode", shots=4000, seed=5)
    found, again = (
        RowExecutor(Amplification(1), False, 6, execution).probabilities(angles_of(f, "amplitude"), rounds)[0]
        for _ in range(2)
    )
    assert torch.equal(found, again)
    assert (found >= -1e-12).all()  # all words share their shots, so this is a histogram
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((found - wanted).abs() < 4.5 * error).all()
    assert (found != wanted).any()


def test_noise_spoils_it_as_far_as_it_should():
    f, rounds = (torch.arange(4) == 2).double()[None] * 0.999 + 0.0005, torch.tensor([1])
    execution = Execution(executor="qnode", device="default.mixed", noise=Noise(readout=0.1))
    found, _ = RowExecutor(Amplification(1), False, 4, execution).probabilities(angles_of(f, "amplitude"), rounds)
    clean = expected(f, rounds, "amplitude")
    # a bit is read wrongly one time in ten: 2 is read as 0 or 3 in 9 of a hundred each, as 1 in one
    flip = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(found, clean @ torch.kron(flip, flip), rtol=0, atol=1e-10)


def test_folded_amplitudes_are_those_of_the_device():
    x = angles_of(marks(4, 5), "amplitude")
    circuit = row_circuit(5, Amplification(2), joint=True)
    folded, on_device = (CircuitLayer(circuit, executor).double() for executor in ("folded", "qnode"))
    torch.testing.assert_close(folded(x), on_device(x), rtol=0, atol=1e-10)


def test_limits():
    with pytest.raises(ValueError, match=f"2 to {MAX_KEYS} keys; got {MAX_KEYS + 1}"):
        row_circuit(MAX_KEYS + 1, Amplification())
    with pytest.raises(ValueError, match="adjoint needs exact values"):
        RowExecutor(Amplification(), False, 4, Execution(executor="qnode", diff_method="adjoint", shots=10))
