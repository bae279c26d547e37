"""The kit for users: what is right passes, and each kind of mistake is found and named."""

import threading
from dataclasses import dataclass

import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import (
    ANSATZE,
    ENCODINGS,
    Ansatz,
    Attention,
    Circuit,
    Execution,
    FunctionAnsatz,
    QISAAnsatz,
    build_attention,
    set_execution,
)
from pennylane_qattn.devices import Runner
from pennylane_qattn.executor import FoldedExecutor
from pennylane_qattn.gradients import SPSA, FiniteDifference, ParameterShift
from pennylane_qattn.qnode import QNodeExecutor
from pennylane_qattn.tapes import Tapes
from pennylane_qattn.testing import (
    COMPARED,
    assert_fold_matches,
    assert_gradients_agree,
    assert_valid_attention,
    awkward_inputs,
    compare_gradients,
    device_precision,
)

DEVICES = ("default.qubit", "lightning.qubit")
AMPLITUDE = Circuit(3, ("XY", "ZI", "XY"))
ANGLE = Circuit(3, ("XYZ", "IZX"), encoding="angle")


# --- assert_gradients_agree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("circuit", [AMPLITUDE, ANGLE], ids=["amplitude", "angle"])
def test_right_gradients_agree(circuit, dtype):
    found = assert_gradients_agree(circuit, DEVICES, dtype=dtype)
    assert len(found) == 12
    assert [(row.device, row.method) for row in found.skipped] == [("lightning.qubit", "backprop")]
    assert "use adjoint or parameter-shift" in found.skipped[0].reasons[0]
    for row in found.of("agrees"):
        assert set(row.errors) == set(COMPARED) and row.executions > 0 and row.milliseconds > 0
        assert row.errors["values"] <= row.allowed["values"] == {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
        statistical = row.method == "spsa"
        assert (row.errors["gradient by angles"] > 1e-3) == statistical
    lines = str(found).splitlines()
    assert len(lines) == 13 and lines[0].split()[:3] == ["device", "method", "encoding"]
    assert any("skipped: lightning.qubit has no backprop" in line for line in lines)


def test_states_agree():
    found = assert_gradients_agree(AMPLITUDE, DEVICES, ["adjoint", "backprop"], for_states=True)
    assert all(row.errors["gradient by inputs"] < 1e-12 for row in found.of("agrees"))


def test_all_devices_and_methods_by_default(monkeypatch):
    installed = ["braket.aws.qubit", "default.qubit"]
    monkeypatch.setattr("pennylane_qattn.testing.installed_devices", lambda: installed)
    found = assert_gradients_agree(AMPLITUDE, gradient_options={"spsa": {"num_directions": 20}})
    assert [row.device for row in found] == [name for name in installed for _ in range(6)]
    assert {row.reasons for row in found.skipped} == {("no simulator of this machine; name it to have it compared",)}
    assert len(found.skipped) == 6


def test_single_precision_of_a_device_is_allowed_for():
    options = {"lightning.qubit": {"c_dtype": "complex64"}}
    assert device_precision(Runner("lightning.qubit", 2, options["lightning.qubit"])) is torch.float32
    assert device_precision(Runner("lightning.qubit", 2, {})) is torch.float64
    found = assert_gradients_agree(
        AMPLITUDE, "lightning.qubit", ["adjoint", "parameter-shift", "finite-diff"], device_options=options
    )
    assert 1e-9 < max(row.errors["values"] for row in found) < 1e-5
    assert found.rows[2].allowed["gradient by angles"] < 1e-3


def by_factor(cls, factor, monkeypatch):
    called = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda *args: [factor * jacobian for jacobian in called(*args)])


@pytest.mark.parametrize(
    ("cls", "method", "factor"),
    [
        (ParameterShift, "parameter-shift", 1 + 1e-7),
        (FiniteDifference, "finite-diff", 1 + 1e-6),
        (SPSA, "spsa", -1.0),
        (SPSA, "spsa", 3.0),
        (SPSA, "spsa", 0.0),
    ],
)
@pytest.mark.parametrize("circuit", [AMPLITUDE, ANGLE], ids=["amplitude", "angle"])
def test_a_wrong_gradient_is_found(circuit, cls, method, factor, monkeypatch):
    by_factor(cls, factor, monkeypatch)
    with pytest.raises(AssertionError) as error:
        assert_gradients_agree(circuit, "default.qubit", method)
    first, *lines = str(error.value).splitlines()
    assert first == "values or gradients differ from the folded circuit:"
    about = f"default.qubit, {method}, {circuit.encoding.name} encoding: gradient by "
    assert all(line.startswith(about) and "allowed" in line for line in lines)
    assert {line.removeprefix(about).partition(":")[0] for line in lines} == (
        {"angles"} if circuit is AMPLITUDE else {"angles", "inputs"}
    )
    if method != "spsa":
        assert "at angle (0, " in lines[-1] and " instead of " in lines[-1]


@pytest.mark.parametrize("way", ["from_states", "polarisation"])
def test_a_wrong_gradient_of_encoded_states_is_found(way, monkeypatch):
    """Wrong at one input only: the zero vector gets a gradient that is not zero."""
    device = {"from_states": "lightning.qubit", "polarisation": "default.mixed"}[way]
    from pennylane_qattn import encoding

    backward = encoding._Normalise.backward

    def at_zero(ctx, upstream, of_inverse):
        inverse = ctx.saved_tensors[1]  # 0 of the zero vector
        return backward(ctx, upstream, of_inverse) + (inverse == 0) * 1e-6

    monkeypatch.setattr(encoding._Normalise, "backward", staticmethod(at_zero))
    expected = FoldedExecutor.expectations

    def right(self, x, weights):  # the reference must not share the mistake
        monkeypatch.setattr(encoding._Normalise, "backward", staticmethod(backward))
        return expected(self, x, weights)

    monkeypatch.setattr(FoldedExecutor, "expectations", right)
    called = QNodeExecutor.expectations

    def wrong(self, x, weights):
        monkeypatch.setattr(encoding._Normalise, "backward", staticmethod(at_zero))
        return called(self, x, weights)

    monkeypatch.setattr(QNodeExecutor, "expectations", wrong)
    message = "gradient by inputs: .* at input 'zero vector', entry 0: 9.99.*e-07 instead of 0"
    with pytest.raises(AssertionError, match=message):
        assert_gradients_agree(AMPLITUDE, device, "parameter-shift")


def test_wrong_values_are_found(monkeypatch):
    gathered = Tapes.gathered
    wrong = np.array([0, 1e-8, 0])  # in one word, so that which is the worst is no matter of rounding
    monkeypatch.setattr(Tapes, "gathered", lambda *args: gathered(*args) + wrong)
    with pytest.raises(AssertionError, match="values: largest error 1.0e-08, allowed 1.0e-09, at input .*, word ZI"):
        assert_gradients_agree(AMPLITUDE, "lightning.qubit", "adjoint")


def test_what_is_wrong_for_a_single_input_is_found(monkeypatch):
    run = QNodeExecutor.expectations

    def wrong(self, x, weights):
        return run(self, x, weights) + (x.shape[1] == 1)

    monkeypatch.setattr(QNodeExecutor, "expectations", wrong)
    with pytest.raises(AssertionError, match="at input 'random vector' alone, word"):
        assert_gradients_agree(AMPLITUDE, "lightning.qubit", "adjoint")


def test_nan_is_found(monkeypatch):
    by_factor(ParameterShift, np.nan, monkeypatch)
    with pytest.raises(AssertionError, match="gradient by angles: largest error inf"):
        assert_gradients_agree(AMPLITUDE, "lightning.qubit", "parameter-shift")


def test_a_device_that_fails_is_named(monkeypatch):
    def fail(*args):
        raise RuntimeError("the fridge\nis warm")

    monkeypatch.setattr(QNodeExecutor, "values", fail)
    with pytest.raises(AssertionError, match="lightning.qubit, spsa, .*: raised RuntimeError: the fridge is warm"):
        assert_gradients_agree(AMPLITUDE, "lightning.qubit", ["adjoint", "spsa"])
    outcomes = [row.outcome for row in compare_gradients(AMPLITUDE, DEVICES[1], ["backprop", "spsa"])]
    assert outcomes == ["skipped", "differs"]


@pytest.mark.parametrize(
    ("devices", "methods", "message"),
    [
        ("lightning.qubit", "backprop", "nothing was compared on device 'lightning.qubit': .* has no backprop; use"),
        (DEVICES[1:], ["backprop", "adjoint"], "nothing was compared on method 'backprop'"),
        (["nowhere.qubit", "default.qubit"], "adjoint", "device 'nowhere.qubit': unknown device"),
        ("default.qubit", "guessing", "unknown method 'guessing'; choose from backprop"),
        ([], None, "nothing was compared"),
    ],
)
def test_what_was_named_and_not_compared_is_refused(devices, methods, message):
    with pytest.raises(ValueError, match=message):
        assert_gradients_agree(AMPLITUDE, devices, methods)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype=torch.float16), "float32 or torch.float64; got torch.float16"),
        (dict(inputs=torch.zeros(2, 4)), r"inputs must be \(inputs, 3\), one or more; got \(2, 4\)"),
        (dict(inputs=torch.zeros(0, 3)), r"got \(0, 3\)"),
        (dict(weights=torch.zeros(2)), r"weights must be \(1, 3, 2\); got \(2,\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        assert_gradients_agree(AMPLITUDE, "default.qubit", "backprop", **options)


def test_inputs_and_weights_of_ones_own(monkeypatch):
    seen = []
    run = QNodeExecutor.expectations
    monkeypatch.setattr(QNodeExecutor, "expectations", lambda self, *args: seen.append(args) or run(self, *args))
    inputs, weights = torch.full((1, 3), 0.25), torch.full((1, 3, 2), 0.5)
    assert_gradients_agree(AMPLITUDE, "default.qubit", "backprop", inputs=inputs, weights=weights)
    assert torch.equal(seen[-1][0][0], inputs.double()) and torch.equal(seen[-1][1][0], weights.double())


def test_seeds_are_explicit():
    state = torch.random.get_rng_state()
    rows = [compare_gradients(AMPLITUDE, "default.qubit", "spsa", seed=seed).rows[0] for seed in (1, 1, 2)]
    errors = [row.errors["gradient by angles"] for row in rows]
    assert errors[0] == errors[1] != errors[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_awkward_inputs(size):
    vectors = awkward_inputs(size, torch.float32, seed=3)
    assert all(v.shape == (size,) and v.dtype == torch.float32 for v in vectors.values())
    assert not vectors["zero vector"].any()
    assert torch.equal(vectors["the same vector, signs flipped"].abs(), vectors["random vector"].abs())
    assert (vectors["last basis vector, negative"] == -torch.eye(size)[-1]).all()
    assert vectors["small vector"].norm() < 0.01
    again, other = awkward_inputs(size, torch.float32, seed=3), awkward_inputs(size, torch.float32, seed=4)
    assert torch.equal(again["random vector"], vectors["random vector"])
    assert not torch.equal(other["random vector"], vectors["random vector"])


# --- assert_fold_matches ----------------------------------------------------------------------------------------


def twisted(weights, wires):
    """A user's circuit with computed angles, a global phase and a fixed gate."""
    for wire, angle in zip(wires, weights, strict=True):
        qml.U3(angle, angle * 2, torch.sin(angle), wires=wire)
    qml.GlobalPhase(0.3)
    qml.S(wires[0])
    if len(wires) > 1:
        qml.CRY(weights[0] * weights[1], wires=wires[:2])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "ansatz",
    [*sorted(set(ANSATZE) - {"function", "traced"}), FunctionAnsatz(twisted, ("wires",))],
    ids=lambda ansatz: ansatz if isinstance(ansatz, str) else ansatz.label,
)
def test_folds_match(ansatz, encoding):
    circuit = Circuit(3, ("XYZ", "IIZ") if encoding == "angle" else ("XY", "ZI"), encoding, ansatz)
    assert 0 < assert_fold_matches(circuit) < 1e-12


@dataclass(frozen=True)
class FoldsAnother(QISAAnsatz):
    """Queues the published circuit, and folds one with another last gate."""

    def program(self, num_wires):
        def other(weights, wires):
            QISAAnsatz(self.layers)(weights, wires)
            qml.CZ(wires[:2])

        return FunctionAnsatz(other, self.shape(num_wires)).program(num_wires)


@dataclass(frozen=True)
class StoresAnother(QISAAnsatz):
    """Writes the same circuit with its angles doubled."""

    def to_plain(self):
        stored = FunctionAnsatz(lambda weights, wires: QISAAnsatz()(weights * 2, wires), self.shape(2))
        stored.program(2)
        return stored.to_plain()


def test_a_fold_of_another_circuit_is_found():
    # Z after a diagonal gate is what it was before: only the state shows the difference
    for words, shown in ((("XI", "ZI"), "values"), (("ZI",), "final states")):
        with pytest.raises(AssertionError) as error:
            assert_fold_matches(Circuit(3, words, ansatz=FoldsAnother()))
        first, *lines = str(error.value).splitlines()
        assert first == "the folded circuit differs from PennyLane's QNode:"
        assert any(line.startswith(f"qisa, amplitude encoding: {shown}: largest error") for line in lines)
        assert "'zero vector'" in str(error.value) or "at input" in str(error.value)


def test_a_stored_form_of_another_circuit_is_found():
    with pytest.raises(AssertionError, match="as a checkpoint holds it, folded, is another: values: largest error"):
        assert_fold_matches(Circuit(3, ("XI", "ZI"), ansatz=StoresAnother()))


def test_a_wrong_gradient_of_the_fold_is_found(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream / 2

    run = FoldedExecutor.expectations
    monkeypatch.setattr(FoldedExecutor, "expectations", lambda self, x, w: run(self, x, Halved.apply(w)))
    with pytest.raises(AssertionError) as error:
        assert_fold_matches(AMPLITUDE)
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith("qisa, amplitude encoding: gradient by angles: largest error")


class Unregistered(Ansatz):
    def shape(self, num_wires):
        return (num_wires,)

    def __call__(self, weights, wires):
        qml.RX(weights[0], wires[0])


def test_an_ansatz_without_a_name_is_refused_where_the_circuit_is_made():
    with pytest.raises(ValueError, match="Unregistered is no registered ansatz; register it, or choose from basic"):
        Circuit(3, ("XI",), ansatz=Unregistered())
    with pytest.raises(ValueError, match="AmplitudeEncoding is no registered ansatz"):
        ANSATZE.build(ENCODINGS.build("amplitude"))


# --- assert_valid_attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": False}], ids=["causal", "not causal"])
def test_a_right_attention_is_valid(options, dtype):
    module = build_attention("qisa", 6, 2, 11, dropout=0.5, **options).to(dtype).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = assert_valid_attention(module)
    assert len(found.made) + len(found.skipped) == 10
    causal = options.get("is_causal", True)
    assert found.skipped == ({} if causal else dict.fromkeys(("causality", "cache"), "the module is not causal"))
    assert module.training and all(p.grad is None for p in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert "causality" in str(found)


def test_an_attention_on_a_device_is_valid():
    module = build_attention("qsann", 4, 2, 5).double()
    set_execution(module, Execution(executor="qnode", device="lightning.qubit"))
    assert not assert_valid_attention(module, seq_len=3).skipped


class Mean(torch.nn.Module):
    """No more than a causal mean: neither heads nor weights nor a cache."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_what_a_module_does_not_have_is_skipped():
    found = assert_valid_attention(Mean(), embed_dim=5)
    assert found.skipped == {
        "attention weights": "the module has no weights(x)",
        "cache": "the module has no new_cache",
        "padding": "forward takes no key_padding_mask",
    }
    with pytest.raises(ValueError, match="Mean has no embed_dim; give"):
        assert_valid_attention(Mean())
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        assert_valid_attention(Mean(), embed_dim=5, seq_len=1)
    with pytest.raises(ValueError, match="float32 or float64 parameters; got torch.bfloat16"):
        assert_valid_attention(Mean().bfloat16(), embed_dim=5)


class Transposed(Attention):
    """The published leak: values are summed over the queries that see them."""

    def forward(self, x, *, key_padding_mask=None, cache=None):
        heads = self.weights(x).transpose(2, 3) @ self.value_map(x)
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class LeaksALittle(Attention):
    def forward(self, x, **options):
        return super().forward(x, **options) + 1e-4 * x.mean(1, keepdim=True)


class MixesRows(Attention):
    def forward(self, x, **options):
        return super().forward(x - 1e-3 * x.mean(0), **options)


class Restless(Attention):
    def forward(self, x, **options):
        return torch.nn.functional.dropout(super().forward(x, **options), 0.1)


class OtherShape(Attention):
    def forward(self, x, **options):
        return super().forward(x, **options)[..., :-1]


class OtherDtype(Attention):
    def forward(self, x, **options):
        return super().forward(x, **options).to(torch.bfloat16)


class Unnormalised(Attention):
    def weights(self, x, **options):
        return super().weights(x, **options) * 0.999


class Forgets(Attention):
    """Takes a cache and does not read it."""

    def forward(self, x, *, cache=None, **options):
        if cache is not None:
            super().forward(x, cache=cache, **options)
        return super().forward(x, **options)


class SeesPadding(Attention):
    def forward(self, x, *, key_padding_mask=None, **options):
        return super().forward(x, **options)


class SpikesAtZero(Attention):
    """The norm is not differentiable at the zero vector."""

    def forward(self, x, **options):
        return super().forward(x, **options) * x.square().sum(-1, keepdim=True).sqrt()


class KeepsAScale(Attention):
    """What it computes depends on a number that no state_dict holds."""

    def forward(self, x, **options):
        first = float(self.out_proj.weight.detach().flatten()[0])
        self.__dict__.setdefault("scale", first)
        return super().forward(x, **options) * self.scale


BROKEN = {
    Transposed: ("causality", "a token moves an output before it by"),
    LeaksALittle: ("causality", "a token moves an output before it by"),
    MixesRows: ("rows of a batch", "rows beside one that was changed: largest error"),
    Restless: ("evaluation repeats", "a second call in evaluation mode: largest error"),
    OtherShape: ("shape and dtype", "expected the shape (3, 7, 6); got (3, 7, 5)"),
    OtherDtype: ("shape and dtype", "expected torch.float32; got torch.bfloat16"),
    Unnormalised: ("attention weights", "sums of the rows: largest error 1.0e-03"),
    Forgets: ("cache", "with a cache, [1, 1, 1, 1, 1, 1, 1] tokens at a time: largest error"),
    SeesPadding: ("padding", "tokens beside padding: largest error"),
    SpikesAtZero: ("gradients", "that of the input is not finite"),
}


def broken(cls):
    torch.manual_seed(0)
    module = build_attention("qisa", 6, 2, 11)
    module.__class__ = cls
    return module


@pytest.mark.parametrize("cls", BROKEN)
def test_a_broken_attention_is_found(cls):
    check, message = BROKEN[cls]
    with pytest.raises(AssertionError) as error:
        assert_valid_attention(broken(cls))
    first, *lines = str(error.value).splitlines()
    assert first == f"{cls.__name__} is no valid attention:"
    assert any(line.startswith(f"{check}: {message}") for line in lines)
    if cls in (Unnormalised, Forgets, SeesPadding, SpikesAtZero):
        assert len(lines) == 1


def test_a_parameter_without_gradient_is_found():
    module = broken(Attention)
    module.spare = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="gradients: spare has none"):
        assert_valid_attention(module)
    module.spare.requires_grad_(False)
    assert_valid_attention(module)


def test_a_number_outside_the_state_dict_is_found():
    with pytest.raises(AssertionError, match="state_dict: a module that loads it: largest error"):
        assert_valid_attention(broken(KeepsAScale))


def test_a_module_that_cannot_be_copied_is_found():
    module = broken(Attention)
    module.lock = threading.Lock()
    with pytest.raises(AssertionError, match="deepcopy and pickle: TypeError: cannot pickle"):
        assert_valid_attention(module)


def test_shots_do_not_repeat():
    module = build_attention("qisa", 4, 1, 5)
    set_execution(module, Execution(executor="qnode", shots=10))
    with pytest.raises(AssertionError, match="evaluation repeats: a second call"):
        assert_valid_attention(module, seq_len=2)
