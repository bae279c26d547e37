"""Circuits, devices and methods that the tests of the executors run over, and how they are compared."""

import dataclasses
import re

import dense_reference as dense
import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import ANSATZE, AmplitudeEncoding, AngleEncoding, Execution, FunctionAnsatz
from pennylane_qattn.devices import installed_devices

#: Methods that are exact, and what works where. A pair that is lost, or gained, is to be seen here.
EXACT = {"backprop", "adjoint", "parameter-shift", "hadamard"}
VALUES_ALONE = {"parameter-shift", "finite-diff", "spsa", "hadamard"}
WORKS = {
    "default.qubit": VALUES_ALONE | {"backprop", "adjoint"},
    "default.mixed": VALUES_ALONE | {"backprop"},
    "lightning.qubit": VALUES_ALONE | {"adjoint"},
    "lightning.kokkos": VALUES_ALONE | {"adjoint"},
    "reference.qubit": VALUES_ALONE,
}
#: Devices that are quick enough to be tried with everything.
QUICK = ("default.qubit", "default.mixed", "lightning.qubit")


def four_terms(weights, wires):
    """Controlled and exchanging gates, which have two frequencies, at computed angles; every method can do it."""
    a, b = wires[0], wires[-1]
    qml.CRX(weights[0] * 2, wires=[a, b])
    qml.CRot(weights[1], torch.sin(weights[2]), weights[3], wires=[b, a])
    qml.IsingXY(weights[4] + weights[0], wires=[a, b])
    qml.MultiRZ(weights[5], wires=wires)
    qml.SingleExcitation(weights[1] * weights[2], wires=[b, a])
    qml.Hadamard(a)
    qml.CRY(0.3, wires=[a, b])
    qml.RX(weights[3], wires=b)


def four_terms_gates(angles, n):
    a, b = 0, n - 1
    return [
        (dense.controlled(dense.rx(2 * angles[0])), [a, b]),
        (dense.controlled(dense.rot(angles[1], np.sin(angles[2]), angles[3])), [b, a]),
        (dense.ising_xy(angles[4] + angles[0]), [a, b]),
        (dense.pauli_rotation("Z" * n, angles[5]), list(range(n))),
        (dense.single_excitation(angles[1] * angles[2]), [b, a]),
        (dense.HADAMARD, [a]),
        (dense.controlled(dense.ry(0.3)), [a, b]),
        (dense.rx(angles[3]), [b]),
    ]


def odd_gates(weights, wires):
    """Gates that some devices and methods do not know or get wrong."""
    a, b = wires[0], wires[-1]
    qml.PauliRot(weights[0], "XY", wires=[a, b])
    qml.PSWAP(weights[1] / 2, wires=[a, b])
    qml.RY(weights[3], wires=a)
    qml.PhaseShift(weights[2], wires=b)
    qml.ControlledPhaseShift(weights[0] * weights[3], wires=[b, a])
    qml.RX(weights[1], wires=b)
    qml.ISWAP(wires=[a, b])
    qml.RY(weights[2], wires=a)


def odd_gates_gates(angles, n):
    a, b = 0, n - 1
    return [
        (dense.pauli_rotation("XY", angles[0]), [a, b]),
        (dense.pswap(angles[1] / 2), [a, b]),
        (dense.ry(angles[3]), [a]),
        (dense.phase_shift(angles[2]), [b]),
        (dense.controlled(dense.phase_shift(angles[0] * angles[3])), [b, a]),
        (dense.rx(angles[1]), [b]),
        (dense.ISWAP, [a, b]),
        (dense.ry(angles[2]), [a]),
    ]


#: Every ansatz of the registry that needs no options, and two of a user.
NAMED = [
    name
    for name, cls in ANSATZE.items()
    if not any(f.init and f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(cls))
]
ANSAETZE = {name: ANSATZE.build(name) for name in NAMED} | {
    "four-terms": FunctionAnsatz(four_terms, (6,)),
    "odd-gates": FunctionAnsatz(odd_gates, (4,)),
}
DENSE_GATES = {
    "qisa": dense.qisa_gates,
    "strongly-entangling": dense.strongly_entangling_gates,
    "basic-entangler": dense.basic_entangler_gates,
    "four-terms": four_terms_gates,
    "odd-gates": odd_gates_gates,
}
#: Encodings and how many features they get here.
ENCODED = {
    "amplitude": (AmplitudeEncoding(), 5),
    "angle-Y": (AngleEncoding("Y"), 3),
    "angle-X": (AngleEncoding("X"), 2),
}
DENSE_ENCODINGS = {
    "amplitude": dense.amplitude_encoding,
    "angle-Y": dense.angle_encoding("Y"),
    "angle-X": dense.angle_encoding("X"),
}
WORDS = {2: ("ZI", "XY", "IY", "XX", "XY"), 3: ("ZII", "XYZ", "IIY", "XXI", "XYZ")}


def dense_circuit(encoding: str, ansatz: str, n: int):
    def circuit(x, angles):
        state, gates = DENSE_ENCODINGS[encoding](x, n)
        return state, [*gates, *DENSE_GATES[ansatz](angles, n)]

    return circuit


def device_params():
    """Installed devices; what is slow, or new, runs with the slow tests."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in installed_devices()]


def pairs(methods, often=("backprop", "adjoint", "parameter-shift")):
    """Devices with methods; pairs of slow or new devices, and of methods not in `often`, run with the slow tests."""
    return [
        pytest.param(device, method, marks=[] if device in QUICK and method in often else pytest.mark.slow)
        for device in installed_devices()
        for method in methods
    ]


def expected_to_work(device: str, method: str, ansatz: str = "qisa") -> bool | None:
    """Whether it must work; `None` for a device that is not known here."""
    if device not in WORKS:
        return None
    if ansatz == "odd-gates" and (
        method in ("adjoint", "hadamard") or (device, method) == ("default.mixed", "backprop")
    ):
        return False
    return method in WORKS[device]


def qnodes(device: str = "default.qubit", diff_method: str = "auto", **options) -> Execution:
    return Execution(executor="qnode", device=device, diff_method=diff_method, **options)


def one_line(message: object) -> None:
    """It is one line and says what to do instead."""
    text = str(message)
    assert "\n" not in text and len(text) < 250, text
    assert re.search(
        r"; (use|pip install|leave|installed here|choose|got|its options|lower|look)|: leave|, or ", text
    ), text


def run_or_refuse(module, execution, must_work: bool | None):
    """Sets the execution; checks that what must work does and that what is refused is refused in one line."""
    if must_work:
        module.set_execution(execution)
        return True
    try:
        module.set_execution(execution)
    except ValueError as error:
        one_line(error)
        return False
    assert must_work is None, f"{execution.device} with {execution.diff_method} works now: list it"
    return True


def run(module, x, upstream=None):
    """Values, and gradients of a weighted sum by inputs and by angles."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    values = module(x)
    upstream = upstream_of(values) if upstream is None else upstream
    values.backward(upstream)
    return values.detach(), x.grad, module.weights.grad.clone()


def upstream_of(values):
    generator = torch.Generator().manual_seed(77)
    return torch.randn(values.shape, dtype=torch.float64, generator=generator).to(values.dtype)


def assert_all_close(actual, expected, tolerance):
    for name, ours, theirs in zip(("values", "by inputs", "by angles"), actual, expected, strict=False):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
