"""Cases at the edge of what circuits and executions can be."""

import pennylane as qml
import pytest
import torch

from pennylane_qattn import Circuit, CircuitFeatureMap, Execution, FunctionAnsatz, make_executor
from pennylane_qattn.devices import ExecutionBudgetError, Meter, Runner
from pennylane_qattn.testing import assert_fold_matches

WEIGHTS = torch.tensor([[0.4, -1.1]], dtype=torch.float64)


def no_gates(weights, wires):
    pass


def padded_word(weights, wires):
    qml.PauliRot(weights[0], "XYI", wires=wires)
    qml.RY(weights[1], wires=wires[0])


@pytest.mark.parametrize("method", ["backprop", "adjoint", "parameter-shift", "spsa", "hadamard"])
def test_an_ansatz_without_gates(method):
    circuit = Circuit(4, ("ZI", "XX"), ansatz=FunctionAnsatz(no_gates, (2,)))
    x = torch.tensor([[[0.3, -0.2, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    results = []
    for execution in ("folded", Execution(executor="qnode", diff_method=method)):
        values = make_executor([circuit], execution).expectations(x, WEIGHTS)
        results.append((values.detach(), *torch.autograd.grad((values**2).sum(), x)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_single_rotation_with_an_identity_in_its_word():
    """PennyLane's formula for it drops the axis of a batch of one."""
    assert_fold_matches(Circuit(6, ("ZXI", "YIZ"), ansatz=FunctionAnsatz(padded_word, (2,))))


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (Execution(device="nosuch"), "unknown device 'nosuch'"),
        (Execution(device="lightning.qubit", diff_method="backprop"), "lightning.qubit has no backprop"),
        (Execution(gradient_options={"h": 1.0}), "backprop takes no gradient_options"),
        (Execution(executor="folded", device="lightning.qubit"), "run on no device; leave device out"),
        (Execution(executor="folded", diff_method="adjoint"), "run on no device; leave diff_method out"),
        (Execution(executor="qnode", device="null.qubit"), "gives no expectation values"),
        (
            Execution(executor="qnode", diff_method="finite-diff", gradient_options={"approx_order": "2"}),
            "approx_order|<",
        ),
    ],
)
def test_nothing_that_is_asked_for_is_passed_over(execution, message):
    with pytest.raises(ValueError, match=message):
        make_executor([Circuit(4, ("ZI",))], execution)


def test_auto_says_what_it_leaves():
    circuit = Circuit(4, ("ZI",))
    folded = make_executor([circuit], Execution(device="lightning.qubit", diff_method="adjoint"))
    assert folded.name == "folded"
    assert "executor qnode runs it on lightning.qubit" in folded.plan.explain()
    with_options = make_executor(
        [circuit], Execution(device="lightning.qubit", device_options={"c_dtype": "complex64"})
    )
    assert with_options.name == "qnode"


@pytest.mark.parametrize("options", [{"seed": 1}, {"shots": 1}])
def test_options_of_the_execution_are_no_device_options(options):
    with pytest.raises(ValueError, match="is no device_option"):
        Execution(device_options=options)


@pytest.mark.parametrize("plain", [{"foo": 1}, {"noise": {"x": 1}}, {"noise": None}])
def test_plain_data_that_describe_nothing(plain):
    with pytest.raises(ValueError, match="no description of an execution"):
        Execution.from_plain(plain)


def test_a_call_that_is_too_large_does_not_begin(monkeypatch):
    monkeypatch.setattr("pennylane_qattn.devices.MAX_TAPES", 4)
    runner = Runner("lightning.qubit", 1, {}, meter=Meter(6))
    tapes = [qml.tape.QuantumScript([qml.RX(0.1 * i, 0)], [qml.expval(qml.Z(0))]) for i in range(8)]
    with pytest.raises(ExecutionBudgetError, match="needs 8 more"):
        runner.run(tapes)
    assert runner.meter.executions == 0


def test_single_precision_takes_larger_steps():
    torch.manual_seed(0)
    features = CircuitFeatureMap(4, 1, 2, words=("ZI", "XX")).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64)

    def gradient():
        return torch.autograd.grad(features(x).sum(), features.weights)[0]

    exact = gradient()
    single = {"device": "lightning.qubit", "device_options": {"c_dtype": "complex64"}}
    features.set_execution(Execution(executor="qnode", diff_method="finite-diff", **single))
    assert "single precision" in features.executor.plan.explain()
    torch.testing.assert_close(gradient(), exact, rtol=0, atol=5e-4)
