import subprocess
import sys

import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import (
    ANSATZE,
    Ansatz,
    BasicEntangler,
    Circuit,
    CircuitFeatureMap,
    FunctionAnsatz,
    QISAAnsatz,
    StronglyEntangling,
    kernels,
    measurement,
)
from pennylane_qattn.ansatz import TracedAnsatz
from pennylane_qattn.execution import FoldedExecutor
from pennylane_qattn.program import Program
from pennylane_qattn.registry import from_plain
from pennylane_qattn.testing import assert_fold_matches


def zigzag(weights, wires):
    """A user's own circuit."""
    for wire, angle in zip(wires, weights[0], strict=True):
        qml.RY(torch.tanh(angle) * 2, wires=wire)
    for left, right in zip(wires, wires[1:], strict=False):
        qml.IsingZZ(weights[1, 0] * weights[1, 1], wires=[left, right])


@pytest.mark.parametrize(
    ("ansatz", "count"),
    [
        (QISAAnsatz(), 3 * 5),
        (QISAAnsatz(layers=2), 2 * 3 * 5),
        (StronglyEntangling(layers=2), 2 * 5 * 3),
        (BasicEntangler(layers=3), 3 * 5),
        (FunctionAnsatz(zigzag, (2, "wires")), 2 * 5),
    ],
)
def test_shape(ansatz, count):
    assert np.prod(ansatz.shape(5)) == count == np.prod(ansatz.program(5).shape)


def of_every_kind(num_wires):
    """One of every registered ansatz, by name."""
    own = FunctionAnsatz(zigzag, (2, "wires"))
    own.program(num_wires)
    found = [QISAAnsatz(layers=2), StronglyEntangling(layers=2), BasicEntangler(layers=2), own]
    by_name = {ansatz.name: ansatz for ansatz in (*found, from_plain(own.to_plain()))}
    assert by_name.keys() == set(ANSATZE)
    return by_name


@pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")
@pytest.mark.parametrize("name", list(ANSATZE))
def test_kernels_change_nothing(name, rng, monkeypatch):
    """What Numba compiles gives the values and gradients of torch alone."""
    torch.manual_seed(0)
    feature_map = CircuitFeatureMap(13, 3, 7, ansatz=of_every_kind(4)[name]).double()
    x = torch.randn(1, 5, 13, dtype=torch.float64, generator=rng).requires_grad_()
    ran = []
    monkeypatch.setattr(kernels, "run", lambda kernel, *rest, run=kernels.run: (ran.append(kernel), run(kernel, *rest)))
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        values = feature_map(x)
        found[switch] = (values.detach(), *torch.autograd.grad(values.sin().sum(), (x, feature_map.weights)))
        assert (measurement.measure in ran and measurement.measure_backward in ran) == (switch == "1")
        ran.clear()
    for one, other in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


COMPILED = """
import sys

import pennylane as qml
import torch
from pennylane_qattn import ANSATZE, CircuitFeatureMap, FunctionAnsatz
from pennylane_qattn.registry import from_plain

def zigzag(weights, wires):
    for wire, angle in zip(wires, weights[0]):
        qml.RY(torch.tanh(angle) * 2, wires=wire)
    for left, right in zip(wires, wires[1:]):
        qml.IsingZZ(weights[1, 0] * weights[1, 1], wires=[left, right])

own = FunctionAnsatz(zigzag, (2, "wires"))
own.program(3)
known = {"function": own, "traced": from_plain(own.to_plain())}
for name in ANSATZE:
    torch.manual_seed(0)
    torch._dynamo.reset()
    feature_map = CircuitFeatureMap(7, 2, 5, ansatz=known.get(name, name)).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    out, expected = torch.compile(feature_map, fullgraph=True, backend="aot_eager")(x), feature_map(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    found, wanted = (torch.autograd.grad(v.sin().sum(), (x, feature_map.weights)) for v in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    print(name)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiles_in_one_graph():
    """In a process of its own: shape-checked signatures do not compile."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(ANSATZE)


def test_published_gates_in_order():
    gates = QISAAnsatz().program(3).gates
    names = [(g.name, g.wires) for g in gates]
    rotations = [pair for w in range(3) for pair in (("RX", (w,)), ("RY", (w,)))]
    ring = [("CNOT", (0, 1)), ("CNOT", (1, 2)), ("CNOT", (2, 0))]
    assert names == [*rotations, *ring, *[("RY", (w,)) for w in range(3)]]
    assert QISAAnsatz().program(3).entries == (0, 3, 1, 4, 2, 5, 6, 7, 8)


def test_no_ring_on_one_wire():
    assert [g.name for g in QISAAnsatz().program(1).gates] == ["RX", "RY", "RY"]


def test_import_path():
    by_path = FunctionAnsatz(f"{__name__}:zigzag", (2, "wires"))
    assert by_path.shape(3) == (2, 3)
    assert FunctionAnsatz(f"{__name__}.zigzag", (2, "wires")).function is by_path.function


def test_a_users_ansatz_is_stored_as_traced_gates():
    ansatz = FunctionAnsatz(zigzag, (2, "wires"))
    assert_fold_matches(Circuit(5, ("XYZ", "ZIX"), ansatz=ansatz))  # and what is read back, folded and by PennyLane
    plain = ansatz.to_plain()
    assert plain["name"] == "traced" and plain["origin"].endswith(":zigzag") and len(plain["source_sha256"]) == 64
    read = from_plain(plain)
    assert isinstance(read, TracedAnsatz) and read.to_plain() == plain and read.shape(3) == (2, 3)


def test_data_cannot_ask_for_an_import():
    plain = {"kind": "ansatz", "name": "function", "function": "antigravity:fly_by", "weight_shape": [1]}
    with pytest.raises(ValueError, match="'function' is not read from data, since that would import code"):
        from_plain(plain)
    assert "antigravity" not in sys.modules


def test_traced_ansatz_knows_its_wires():
    ansatz = FunctionAnsatz(zigzag, (2, "wires"))
    ansatz.program(3)
    with pytest.raises(ValueError, match=r"was traced for \[3\] wires, not for 4"):
        from_plain(ansatz.to_plain()).program(4)


@pytest.mark.parametrize("name", sorted(set(ANSATZE) - {"function", "traced"}))
def test_program_round_trip(name):
    program = ANSATZE.build(name).program(3)
    assert Program.from_plain(program.to_plain()) == program


def branch(weights, wires):
    if weights[0] > 0:
        qml.RX(weights[0], wires=wires[0])


def item(weights, wires):
    qml.RX(float(weights[0]), wires=wires[0])


def numpy_angle(weights, wires):
    qml.RX(weights.detach().numpy()[0] * 2, wires=wires[0])


def numpy_branch(weights, wires):
    if weights.detach().numpy()[0] > 0:
        qml.RX(weights[0], wires=wires[0])
    else:
        qml.RY(weights[0], wires=wires[0])


def measures(weights, wires):
    qml.RX(weights[0], wires=wires[0])
    qml.expval(qml.Z(wires[0]))


def mid_circuit(weights, wires):
    qml.RX(weights[0], wires=wires[0])
    qml.measure(wires[0])


def noisy(weights, wires):
    qml.DepolarizingChannel(0.1, wires=wires[0])


def elsewhere(weights, wires):
    qml.RX(weights[0], wires=17)


def more_angles(weights, wires):
    qml.RX(weights[1], wires=wires[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (more_angles, "cannot be run on weights of shape (1,): index 1 is out of bounds"),
        (branch, "must not depend on the values of the angles"),
        (item, "must not depend on the values of the angles"),
        (numpy_angle, "in a way that torch does not see"),
        (numpy_branch, "in a way that torch does not see"),
        (measures, "must not measure"),
        (mid_circuit, "no unitary gate"),
        (noisy, "no unitary gate"),
        (elsewhere, "acts on wires [17]"),
    ],
)
def test_circuits_that_cannot_be_folded_are_refused(function, message):
    with pytest.raises(ValueError, match=function.__name__) as error:
        FunctionAnsatz(function, (1,)).program(2)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FunctionAnsatz("no.such:thing", (1,)), "cannot import 'no.such:thing'"),
        (lambda: FunctionAnsatz("thing", (1,)), "cannot import 'thing'"),
        (lambda: FunctionAnsatz(zigzag, (0,)), "takes positive integers"),
        (lambda: BasicEntangler(rotation="Q"), "rotation must be"),
        (lambda: TracedAnsatz("a:b", "", ({"num_wires": 1},)), "not a traced ansatz"),
    ],
)
def test_bad_ansatz(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stored_program_cannot_call_anything_else():
    plain = FunctionAnsatz(zigzag, (2, "wires"))
    program = plain.program(2).to_plain()
    program["angles"]["nodes"][0][0] = "from_file.default"
    with pytest.raises(ValueError, match="may not call 'from_file.default'"):
        Program.from_plain(program)


def test_stored_gates_are_checked():
    program = QISAAnsatz().program(2).to_plain()
    program["gates"][0]["gate"] = "eval"
    with pytest.raises(ValueError, match="a gate is unknown"):
        Program.from_plain(program)


def test_computed_angles_are_not_taken_for_weights():
    """At weights 0, 1 the angles are 0, 1 too, and only there."""
    ansatz = FunctionAnsatz(lambda weights, wires: [qml.RX(w**3, wires=0) for w in weights], (2,))
    program = ansatz.program(1)
    assert program.entries is None
    torch.testing.assert_close(program.angles(torch.tensor([[2.0, 3.0]])), torch.tensor([[8.0, 27.0]]))


class Subclass(Ansatz):
    def shape(self, num_wires):
        return (num_wires,)

    def __call__(self, weights, wires):
        for wire, angle in zip(wires, weights, strict=True):
            qml.RZ(angle, wires=wire)


def test_a_class_of_ones_own_folds(rng):
    values = FoldedExecutor([Circuit(4, ("XI",), ansatz=ANSATZE.build("basic-entangler"))])
    assert values
    program = Subclass().program(2)
    assert [g.name for g in program.gates] == ["RZ", "RZ"]
