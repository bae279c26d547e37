import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import AngleEncoding, CircuitFeatureMap
from pennylane_qattn.entanglement import CircuitStates, meyer_wallach


def random_states(rng, *shape, dtype=torch.float64):
    states = torch.randn(*shape, 2, generator=rng, dtype=dtype)
    return torch.view_as_complex(states / states.square().sum((-2, -1), keepdim=True).sqrt())


def product(*qubits):
    state = torch.ones(1, dtype=qubits[0].dtype)
    for qubit in qubits:
        state = torch.kron(state, qubit)
    return state


def packed(states):
    return torch.cat((states.real, states.imag), dim=-1)


def basis(num_wires, *places):
    state = torch.zeros(2**num_wires, dtype=torch.complex128)
    state[list(places)] = len(places) ** -0.5
    return state


# --- closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_wires", [1, 2, 3, 5])
def test_product_states_are_not_entangled(num_wires, rng):
    state = product(*random_states(rng, num_wires, 2))
    assert meyer_wallach(state).abs() < 1e-15


@pytest.mark.parametrize("num_wires", [2, 3, 5])
def test_ghz_states_are_fully_entangled(num_wires):
    assert meyer_wallach(basis(num_wires, 0, 2**num_wires - 1)).item() == pytest.approx(1, abs=1e-14)


def test_bell_pairs():
    bell = basis(2, 1, 2)
    assert meyer_wallach(product(bell, bell)).item() == pytest.approx(1, abs=1e-14)
    third = basis(1, 0)
    for state in (product(bell, third), product(third, bell), basis(3, 0b000, 0b101)):
        assert meyer_wallach(state).item() == pytest.approx(2 / 3, abs=1e-14)


@pytest.mark.parametrize("num_wires", [2, 3, 5])
def test_w_states(num_wires):
    state = basis(num_wires, *(2**wire for wire in range(num_wires)))
    expected = 4 * (num_wires - 1) / num_wires**2  # each wire is |1> with probability 1/n, without coherence
    assert meyer_wallach(state).item() == pytest.approx(expected, abs=1e-14)
    if num_wires == 3:
        assert expected == 8 / 9


def test_random_states_on_average(rng):
    n = 3
    mean = meyer_wallach(random_states(rng, 20011, 2**n)).mean().item()
    assert mean == pytest.approx((2**n - 2) / (2**n + 1), abs=3e-3)  # its standard error is 0.0008


def test_single_precision_near_product_states():
    angle = 1e-4
    state = torch.tensor([np.cos(angle), 0, 0, np.sin(angle)], dtype=torch.complex64)
    assert meyer_wallach(state).item() == pytest.approx(np.sin(2 * angle) ** 2, rel=1e-5)


# --- independent references -------------------------------------------------------------------------------------


def brennen(state):
    """2 (1 - mean of the purities), by partial traces of the density matrix."""
    n = int(np.log2(len(state)))
    tensor = state.reshape([2] * n)
    purities = []
    for wire in range(n):
        others = [axis for axis in range(n) if axis != wire]
        rho = np.tensordot(tensor, tensor.conj(), axes=(others, others))
        purities.append(np.trace(rho @ rho).real)
    return 2 * (1 - np.mean(purities))


@pytest.mark.parametrize("num_wires", [1, 2, 3, 5])
def test_against_partial_traces(num_wires, rng, dtype, close):
    states = random_states(rng, 3, 7, 2**num_wires, dtype=dtype)
    measured = meyer_wallach(states)
    assert measured.shape == (3, 7) and measured.dtype == dtype
    close(measured, [[brennen(state) for state in row] for row in states.numpy()], factor=5)
    close(meyer_wallach(packed(states)), measured)


def test_against_pennylane(rng):
    states = random_states(rng, 5, 8)
    purities = [qml.math.purity(qml.math.reduce_statevector(states, [wire]), [0]) for wire in range(3)]
    torch.testing.assert_close(meyer_wallach(states), 2 * (1 - torch.stack(purities).mean(0)))


def test_gradient(rng):
    states = packed(random_states(rng, 2, 8)).requires_grad_()
    assert torch.autograd.gradcheck(meyer_wallach, states)
    ground = torch.eye(8, dtype=torch.complex128)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(meyer_wallach(ground), ground)
    assert gradient.isfinite().all()


def test_no_states():
    assert meyer_wallach(torch.zeros(0, 3, 8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [
        (6, torch.complex64, "has 2\\^n amplitudes; got 6"),
        (1, torch.complex64, "got 1"),
        (2, torch.float32, "got 1"),
        (7, torch.float32, "followed by as many imaginary ones; got 7 in all"),
        (0, torch.complex64, "got 0"),
    ],
)
def test_what_is_no_state(size, dtype, message):
    with pytest.raises(ValueError, match=message):
        meyer_wallach(torch.ones(3, size, dtype=dtype))


# --- states of a feature map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("encoding", ["amplitude", "angle", AngleEncoding("X")], ids=str)
def test_states_of_a_feature_map(encoding, split, rng):
    torch.manual_seed(5)
    feature_map = CircuitFeatureMap(6, 2, 3, "strongly-entangling", encoding, split=split).double()
    x = torch.randn(3, 5, 6, generator=rng, dtype=torch.float64)
    states = CircuitStates(feature_map)
    inputs = states.inputs(x)
    encoded, final = states.encoded(inputs), states.final(inputs)
    assert encoded.shape[:2] == (2 if split else 1, 15) and final.shape[:2] == (2, 15)
    n = feature_map.num_wires
    for head, circuit in enumerate(feature_map.circuits):

        @qml.qnode(qml.device("default.qubit", wires=n))
        def state(features, weights, circuit=circuit):
            circuit.encoding.prepare(features, range(n))
            if weights is not None:
                circuit.ansatz(weights, list(range(n)))
            return qml.state()

        width = feature_map.in_features
        for token, embedding in enumerate(x.flatten(0, 1)):
            features = embedding[width * head : width * (head + 1)] if split else embedding
            torch.testing.assert_close(encoded[head if split else 0, token], state(features, None))
            torch.testing.assert_close(final[head, token], state(features, feature_map.weights[head]).detach())


def test_states_follow_the_angles(rng):
    feature_map = CircuitFeatureMap(4, 1, 2)
    states = CircuitStates(feature_map)
    inputs = states.inputs(torch.randn(1, 3, 4, generator=rng))
    with torch.no_grad():
        before = states.final(inputs)
        feature_map.weights.data += 1
        assert not torch.allclose(states.final(inputs), before)
