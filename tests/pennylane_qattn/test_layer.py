"""`CircuitLayer`, beside PennyLane's own `TorchLayer`."""

import copy
import pickle

import pennylane as qml
import pytest
import torch
from torch import nn

from pennylane_qattn import Circuit, CircuitLayer, Execution, set_execution

CIRCUIT = Circuit(5, ("XIZ", "ZII", "IYY"))
EXECUTIONS = [
    Execution(executor="folded"),
    Execution(executor="qnode"),
    Execution(executor="qnode", device="lightning.qubit"),
    Execution(executor="qnode", diff_method="parameter-shift"),
]


@pytest.fixture(params=EXECUTIONS, ids=lambda e: f"{e.executor}-{e.device}-{e.diff_method}")
def layer(request):
    torch.manual_seed(3)
    return CircuitLayer(CIRCUIT, request.param).double()


def plain_layer():
    wires = range(CIRCUIT.num_wires)

    @qml.qnode(qml.device("default.qubit", wires=3), interface="torch", diff_method="backprop")
    def qnode(inputs, weights):
        qml.AmplitudeEmbedding(inputs, wires=wires, pad_with=0.0, normalize=True)
        CIRCUIT.ansatz(weights, wires)
        return [qml.expval(word) for word in (qml.X(0) @ qml.Z(2), qml.Z(0), qml.Y(1) @ qml.Y(2))]

    return qml.qnn.TorchLayer(qnode, {"weights": CIRCUIT.weight_shape}).double()


def test_equals_pennylanes(layer):
    plain = plain_layer()
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for one in (layer, plain):
        x = inputs.clone().requires_grad_()
        values = one(x)
        found.append((values.detach(), *torch.autograd.grad((values * upstream).sum(), (x, one.weights))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_is_a_torch_layer_with_a_qnode(layer):
    assert isinstance(layer, qml.qnn.TorchLayer)
    assert list(layer.state_dict()) == ["weights"]
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    called = torch.stack(list(layer.qnode(x, layer.weights)))
    torch.testing.assert_close(called.double(), layer(x), rtol=0, atol=1e-6)  # lightning's QNodes give float32
    assert "qubits=3" in repr(layer)


def test_copies_work_after_a_run(layer):
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    value = layer(x)
    value.sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), value)
        assert other.qnode_weights["weights"] is other.weights
        with torch.no_grad():
            other.weights.add_(1.0)
        assert not torch.allclose(other(x), value)
    assert torch.equal(layer(x), value)


def test_angles_keep_their_precision(layer):
    weights = layer.weights.detach().float()
    half = layer.half()
    assert half.weights.dtype == torch.float64  # what it had, which is better than float32
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(6))
    exact = half(x.double())
    assert half(x.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x.double()).equal(exact)
    assert torch.equal(half.weights.float(), weights)


def test_changes_its_execution():
    layer = CircuitLayer(CIRCUIT, "folded")
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(7))
    values = layer(x)
    layer.set_execution(Execution(executor="qnode", device="lightning.qubit"))
    assert layer.executor.plan.device == "lightning.qubit"
    torch.testing.assert_close(layer(x), values)
    assert "lightning.qubit" in repr(layer.qnode)


def test_init_method_is_pennylanes():
    layer = CircuitLayer(CIRCUIT, init_method=nn.init.zeros_)
    assert not layer.weights.any()


def test_wrong_shape_is_one_line():
    with pytest.raises(ValueError, match=r"inputs must end in 5 features; got shape \(2, 4\)"):
        CircuitLayer(CIRCUIT)(torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_empty_batches(layer, shape):
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    values = layer(x)
    assert values.shape == (*shape[:-1], 3)
    values.sum().backward()
    assert x.grad.shape == shape


def test_layers_of_a_model_are_set_together():
    torch.manual_seed(8)
    model = nn.Sequential(CircuitLayer(CIRCUIT), nn.Linear(3, 5), CircuitLayer(CIRCUIT))
    model[2].load_state_dict(model[0].state_dict())
    plans = set_execution(model, Execution(shots=50, seed=1))
    assert [plan.device for plan in plans] == ["default.qubit"] * 2
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(model[0](x), model[2](x))  # shots of their own
    assert model[0].executor.meter is model[2].executor.meter
