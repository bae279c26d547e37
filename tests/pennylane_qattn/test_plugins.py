"""Devices of PennyLane's partners, which are slow: values and gradients of one small circuit each.

Two of them come with the extra `test`; `bash scripts/test.sh --plugins` installs the others and runs this.
"""

import pytest
import torch

from pennylane_qattn import CircuitFeatureMap, Execution, Noise
from pennylane_qattn.devices import installed_devices

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),  # the plugins warn of much that is theirs
]

#: Device, its options, and how far from exact its arithmetic is.
LIGHT = [("lightning.kokkos", {}, 1e-12), ("qulacs.simulator", {}, 1e-12)]
HEAVY = [
    ("cirq.simulator", {}, 1e-12),
    ("cirq.mixedsimulator", {}, 5e-6),
    ("qiskit.aer", {}, 1e-12),
    ("braket.local.qubit", {"backend": "braket_sv"}, 1e-12),
    ("braket.local.qubit", {"backend": "braket_dm"}, 1e-12),
]
DEVICES = [
    pytest.param(
        device,
        marks=pytest.mark.plugins if device in HEAVY else [],
        id="-".join([device[0], *device[1].values()]),
    )
    for device in (*LIGHT, *HEAVY)
]
WORDS = {"amplitude": ("ZI", "XY"), "angle": ("ZI", "XY")}


def feature_map(encoding: str) -> CircuitFeatureMap:
    torch.manual_seed(5)
    features = 3 if encoding == "amplitude" else 2
    return CircuitFeatureMap(
        features, 1, 2, encoding=encoding, ansatz="strongly-entangling", words=WORDS[encoding]
    ).double()


def run(module, x):
    x = x.clone().requires_grad_()
    values = module(x)
    upstream = torch.tensor([1.0, -0.7], dtype=torch.float64)
    return values.detach(), *torch.autograd.grad((values * upstream).sum(), (x, module.weights))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param[0] not in installed_devices():
        pytest.skip(f"{request.param[0]} is not installed; bash scripts/test.sh --plugins installs it")
    return request.param


@pytest.mark.parametrize("method", ["auto", "parameter-shift", "finite-diff", "hadamard"])
@pytest.mark.parametrize("encoding", ["amplitude", "angle"])
def test_equals_folded(device, method, encoding):
    name, options, tolerance = device
    module = feature_map(encoding)
    x = torch.tensor([[[0.3, 0.0, -0.8][: module.embed_dim]]], dtype=torch.float64)
    expected = run(module, x)
    gradient_options = {}
    if method == "finite-diff":
        gradient_options = {"h": 1e-4 if tolerance < 1e-9 else 1e-2}
        tolerance = 1e-7 if tolerance < 1e-9 else 2e-3
    module.set_execution(
        Execution(
            executor="qnode",
            device=name,
            device_options=options,
            diff_method=method,
            gradient_options=gradient_options,
        )
    )
    for found, wanted in zip(run(module, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["backprop", "adjoint"])
def test_methods_that_are_not_there_are_refused(device, method):
    name, options, _ = device
    execution = Execution(executor="qnode", device=name, device_options=options, diff_method=method)
    if (name, method) == ("lightning.kokkos", "adjoint"):
        assert feature_map("angle").set_execution(execution) is None
        return
    with pytest.raises(ValueError, match=f"{name} has no {method}; use (adjoint or )?parameter-shift"):
        feature_map("angle").set_execution(execution)


def test_shots(device):
    name, options, _ = device
    module = feature_map("angle")
    x = torch.tensor([[[0.3, -0.8]]], dtype=torch.float64)
    exact = module(x)
    shots = 2000
    execution = Execution(executor="qnode", device=name, device_options=options, shots=shots, seed=3)
    module.set_execution(execution)
    sampled = module(x)
    assert ((sampled - exact).abs() < 5 / shots**0.5).all()
    assert not torch.equal(sampled, exact)
    if module.executor.runner.repeats:
        module.set_execution(execution)
        assert torch.equal(module(x), sampled)
    else:
        assert "do not repeat" in module.executor.plan.explain()


def test_preparing_states_for_shots_works_or_is_refused(device):
    name, options, _ = device
    execution = Execution(executor="qnode", device=name, device_options=options, shots=5)
    if name.startswith("cirq"):
        with pytest.raises(ValueError, match="cannot run this circuit .*StatePrep.*use another device or encoding"):
            feature_map("amplitude").set_execution(execution)
    else:
        module = feature_map("amplitude")
        module.set_execution(execution)
        assert module(torch.ones(1, 1, 3, dtype=torch.float64)).isfinite().all()


def test_noise(device):
    """Depolarizing noise as on default.mixed, or refused."""
    name, options, tolerance = device
    noise = Noise(depolarizing=0.1, amplitude_damping=0.05)
    execution = Execution(executor="qnode", device=name, device_options=options, noise=noise)
    module = feature_map("angle")
    x = torch.tensor([[[0.3, -0.8]]], dtype=torch.float64)
    if options.get("backend") == "braket_dm":
        module.set_execution(execution)
        found = module(x)
        module.set_execution(Execution(device="default.mixed", noise=noise))
        torch.testing.assert_close(found, module(x), rtol=0, atol=max(tolerance, 1e-9))
    else:
        with pytest.raises(ValueError, match=f"{name} simulates no noise channels; use default.mixed"):
            module.set_execution(execution)
