import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import ENCODINGS, AmplitudeEncoding, AngleEncoding
from pennylane_qattn.encoding import _unit_and_scale, normalise


@pytest.mark.parametrize(("features", "wires"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (128, 7)])
def test_amplitude_wires(features, wires):
    assert AmplitudeEncoding().num_wires(features) == wires


def test_normalise_is_torch_normalise(dtype, close, rng):
    x = torch.randn(3, 5, 7, dtype=dtype, generator=rng)
    close(normalise(x), torch.nn.functional.normalize(x.double(), dim=-1))


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e20, 1e35])
def test_normalise_does_not_depend_on_the_scale(scale, rng):
    x = torch.randn(4, 5, generator=rng)
    torch.testing.assert_close(normalise(x * scale), normalise(x), rtol=1e-5, atol=1e-6)


def test_zero_vector_is_the_ground_state_with_gradient_zero(dtype):
    x = torch.zeros(2, 5, dtype=dtype)
    x[1, 3] = 2.0
    x.requires_grad_()
    unit = AmplitudeEncoding().amplitudes(x)
    assert unit.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    unit.square().sum(0).mul(torch.arange(1, 6, dtype=dtype)).sum().backward()
    assert x.grad[0].tolist() == [0.0] * 5
    assert torch.isfinite(x.grad).all()


def test_normalise_gradients_first_and_second(rng):
    x = torch.randn(3, 5, dtype=torch.float64, generator=rng).requires_grad_()
    x.data[0, 2] = 0.0
    assert torch.autograd.gradcheck(normalise, x)
    assert torch.autograd.gradgradcheck(normalise, x)
    own = torch.autograd.functional.jacobian(normalise, x)
    plain = torch.autograd.functional.jacobian(lambda v: _unit_and_scale(v)[0], x)
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)


def test_normalise_keeps_what_it_gives_and_not_what_it_got(rng):
    """The joint vectors of several tokens are needed by nobody else."""
    kept = []
    x = torch.randn(7, 11, generator=rng).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        normalise(x)
    assert sorted(kept) == [7, 77]


def test_higher_derivatives_of_normalise(rng):
    """The second and third, along a line, against those of the formula; and of the zero vector, 0."""
    x, way = torch.randn(2, 5, dtype=torch.float64, generator=rng), torch.randn(5, dtype=torch.float64, generator=rng)
    x[1] = 0

    def derivatives(function):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value, found = (function(x + t * way * torch.tensor([[1.0], [0.0]])) * torch.arange(10.0).view(2, 5)).sum(), []
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            found.append(value.detach())
        return torch.stack(found)

    found, wanted = derivatives(normalise), derivatives(lambda v: _unit_and_scale(v)[0])
    assert (wanted != 0).all()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_normalise_under_torch_func(rng):
    x = torch.randn(5, dtype=torch.float64, generator=rng)
    torch.testing.assert_close(torch.func.jacrev(normalise)(x), torch.func.jacfwd(normalise)(x))


def test_nan_is_not_hidden():
    assert normalise(torch.tensor([1.0, float("nan")])).isnan().any()


@pytest.mark.parametrize("encoding", [AmplitudeEncoding(), AngleEncoding(), AngleEncoding("X")], ids=repr)
@pytest.mark.parametrize("features", [1, 2, 3, 5])
def test_amplitudes_are_the_state_pennylane_prepares(encoding, features, rng):
    x = torch.randn(features, dtype=torch.float64, generator=rng)
    wires = range(encoding.num_wires(features))

    @qml.qnode(qml.device("default.qubit", wires=wires))
    def prepared():
        encoding.prepare(x, wires)
        return qml.state()

    amplitudes = encoding.amplitudes(x).to(torch.complex128)
    phases = encoding.phases(features)
    if phases is not None:
        amplitudes = amplitudes * phases[: len(amplitudes)]
    state = np.zeros(2 ** len(wires), dtype=complex)
    state[: len(amplitudes)] = amplitudes.numpy()
    np.testing.assert_allclose(state, prepared(), atol=1e-12)


def test_z_rotation_is_refused():
    with pytest.raises(ValueError, match="rotation must be 'X' or 'Y'; got 'Z'"):
        ENCODINGS.build("angle", rotation="Z")
