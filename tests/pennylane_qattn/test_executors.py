"""Values and gradients of circuits on every device, by every method, against folding; and folding against NumPy."""

import itertools

import dense_reference as dense
import numpy as np
import pytest
import torch
from circuit_cases import (
    ANSAETZE,
    DENSE_GATES,
    ENCODED,
    EXACT,
    QUICK,
    WORDS,
    assert_all_close,
    dense_circuit,
    device_params,
    expected_to_work,
    pairs,
    qnodes,
    run,
    run_or_refuse,
    upstream_of,
)

from pennylane_qattn import (
    ANSATZE,
    ENCODINGS,
    AmplitudeEncoding,
    CircuitFeatureMap,
    QISAAnsatz,
    StateFeatureMap,
    set_execution,
)
from pennylane_qattn import devices as devices_module
from pennylane_qattn import qnode as qnode_module
from pennylane_qattn.devices import installed_devices
from pennylane_qattn.planning import METHODS

#: Every ansatz with amplitude encoding, and every encoding with some of them.
CASES = [
    *(("amplitude", name) for name in ANSAETZE),
    ("angle-Y", "qisa"),
    ("angle-Y", "odd-gates"),
    ("angle-X", "strongly-entangling"),
    ("angle-X", "four-terms"),
]


def feature_map(encoding="amplitude", ansatz="qisa", heads=2, cls=CircuitFeatureMap, seed=3, **options):
    torch.manual_seed(seed)
    chosen, features = ENCODED[encoding]
    if cls is CircuitFeatureMap:
        options = {"out_features": 1, "words": WORDS[chosen.num_wires(features)], **options}
    return cls(features, heads, ansatz=ANSAETZE[ansatz], encoding=chosen, **options).double()


def tokens(features, batch=2, seq=2, seed=5):
    """Random vectors, the first once more at the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, features, dtype=torch.float64, generator=generator)
    x[-1, -1] = x[0, 0]
    return x


def difference_tolerance(upstream, h=1e-4):
    """Of central differences: h^2 / 6 times the third derivative, which is at most 2^3 (an angle is 2 weights)."""
    return float(8 * h**2 / 6 * upstream.abs().sum()) + 1e-9


def test_cases_cover_the_registries():
    assert {ENCODED[name][0].name for name in ENCODED} == set(ENCODINGS)
    assert set(ANSATZE) - {"function", "traced"} <= set(ANSAETZE) and set(ANSAETZE) == set(DENSE_GATES)


@pytest.mark.parametrize("encoding, ansatz", [*itertools.product(ENCODED, ANSAETZE)])
def test_folded_equals_dense_numpy(encoding, ansatz):
    module = feature_map(encoding, ansatz, heads=1)
    x = tokens(module.in_features, batch=1, seq=1)
    values, by_input, by_angle = run(module, x)
    upstream = upstream_of(values)[0, 0, 0].numpy()
    circuit = dense_circuit(encoding, ansatz, module.num_wires)
    point, angles = x[0, 0].numpy(), module.weights[0].detach().numpy()

    def function(x, angles):
        return dense.noisy_values(circuit, x, angles, module.words[0])

    np.testing.assert_allclose(values[0, 0, 0], function(point, angles), atol=1e-12)
    exact = dense.derivatives(lambda x: function(x, angles), point) @ upstream
    np.testing.assert_allclose(by_input[0, 0], exact, atol=1e-12)
    exact = dense.derivatives(lambda angles: function(point, angles), angles) @ upstream
    np.testing.assert_allclose(by_angle[0], exact, atol=1e-12)


def everything():
    """Devices x methods x cases; with the slow tests: slow or new devices, and most cases of slow methods."""
    for device, method, case in itertools.product(installed_devices(), METHODS, CASES):
        often = method in ("backprop", "adjoint") or case in (("amplitude", "qisa"), ("angle-X", "four-terms"))
        often |= method == "parameter-shift" and "odd-gates" in case
        if method != "spsa":  # which has tests of its own
            yield pytest.param(device, method, *case, marks=[] if often and device in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("device, method, encoding, ansatz", [*everything()])
def test_device_equals_folded(device, method, encoding, ansatz):
    module = feature_map(encoding, ansatz)
    if not run_or_refuse(module, qnodes(device, method), expected_to_work(device, method, ansatz)):
        return
    x = tokens(module.in_features)
    actual = run(module, x)
    set_execution(module, "folded")
    expected = run(module, x)
    tolerance = 1e-9 if method in EXACT else difference_tolerance(upstream_of(expected[0]))
    assert_all_close(actual[:1], expected[:1], 1e-9)
    assert_all_close(actual, expected, tolerance)
    if method not in EXACT and encoding == "amplitude":
        assert_all_close(actual[:2], expected[:2], 1e-9)  # encoded states are differentiated exactly


@pytest.mark.parametrize("encoding", ["amplitude", "angle-X"])
@pytest.mark.parametrize("device, method", pairs([method for method in METHODS if method != "spsa"]))
def test_device_equals_folded_in_float32(device, method, encoding):
    module = feature_map(encoding, "strongly-entangling").float()
    if not run_or_refuse(module, qnodes(device, method), expected_to_work(device, method)):
        return
    x = tokens(module.in_features).float()
    actual = run(module, x)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    set_execution(module, "folded")
    assert_all_close(actual, run(module, x), 1e-5)


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("device", device_params())
def test_spsa_moves_along_one_direction(device, encoding):
    # For one token and one direction d of signs the estimate is d (d . g): d can be read off, up to a sign.
    module = feature_map(encoding, "qisa", heads=1)  # its angles are its weights
    run_or_refuse(module, qnodes(device, "spsa", seed=11), True)
    x = tokens(module.in_features, batch=1, seq=1)
    values, by_input, by_angle = run(module, x)
    set_execution(module, "folded")
    exact_values, exact_by_input, exact_by_angle = run(module, x)
    assert_all_close([values], [exact_values], 1e-9)
    if encoding == "amplitude":
        assert_all_close([values, by_input], [exact_values, exact_by_input], 1e-9)
    estimate, exact = by_angle.flatten(), exact_by_angle.flatten()
    if encoding != "amplitude":
        estimate, exact = (torch.cat((a.flatten(), b)) for a, b in ((by_input, estimate), (exact_by_input, exact)))
    direction = estimate.sign()
    torch.testing.assert_close(estimate, direction * (direction @ exact), rtol=0, atol=1e-4)
    assert not torch.allclose(estimate, exact, atol=0.05)


def test_spsa_is_unbiased_over_many_directions():
    module = feature_map("angle-X", "qisa", heads=1)
    x = tokens(2, batch=1, seq=1)
    _, exact_by_input, exact_by_angle = run(module, x)
    directions = 300
    set_execution(module, qnodes("lightning.qubit", "spsa", seed=4, gradient_options={"num_directions": directions}))
    _, by_input, by_angle = run(module, x)
    estimate = torch.cat((by_input.flatten(), by_angle.flatten()))
    exact = torch.cat((exact_by_input.flatten(), exact_by_angle.flatten()))
    # one direction d gives d (d . g): entry i is off by the sum of d_i d_j g_j over the other entries
    error = ((exact.square().sum() - exact.square()) / directions).sqrt()
    assert ((estimate - exact).abs() <= 5 * error + 1e-5).all()
    assert error.max() < exact.abs().max() / 5  # the bound says something


@pytest.mark.parametrize("encoding, ansatz", [*itertools.product(ENCODED, ["qisa", "odd-gates"])])
@pytest.mark.parametrize(
    "device, method", [("default.qubit", "backprop"), ("default.qubit", "parameter-shift"), ("lightning.qubit", "auto")]
)
def test_states_equal_folded(device, method, encoding, ansatz):
    module = feature_map(encoding, ansatz, cls=StateFeatureMap)
    x = tokens(module.in_features)
    expected = run(module, x)
    set_execution(module, qnodes(device, method))
    assert_all_close(run(module, x), expected, 1e-9)


@pytest.mark.parametrize(
    "device, method, ansatz",
    [
        ("lightning.qubit", "adjoint", "qisa"),
        ("lightning.qubit", "adjoint", "four-terms"),
        ("default.qubit", "parameter-shift", "qisa"),
        ("default.mixed", "parameter-shift", "odd-gates"),
        ("default.mixed", "backprop", "qisa"),
        ("lightning.qubit", "hadamard", "qisa"),
    ],
)
@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
def test_gradcheck(device, method, ansatz, cls):
    if cls is StateFeatureMap and (device == "default.mixed" or method == "hadamard" or ansatz == "four-terms"):
        return
    torch.manual_seed(2)
    options = {"words": ["ZI", "XY"], "out_features": 1} if cls is CircuitFeatureMap else {}
    module = cls(3, 1, ansatz=ANSAETZE[ansatz], execution=qnodes(device, method), **options).double()
    x = tokens(3, batch=1, seq=2)
    x[0, 0, 1] = 0.0

    def function(x, weights):
        return torch.func.functional_call(module, {"weights": weights}, (x,))

    weights = module.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), weights))


# ---------------------------------------------------------------- shapes, heads, what needs a gradient


@pytest.mark.parametrize("device, method", [("lightning.qubit", "adjoint"), ("default.mixed", "parameter-shift")])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("encoding", ["amplitude", "angle"])
def test_heads_split_or_whole(device, method, split, encoding):
    torch.manual_seed(0)
    module = CircuitFeatureMap(9 if split else 3, 3, 5, encoding=encoding, split=split, seed=4).double()
    x = tokens(module.embed_dim, batch=2, seq=3)
    expected = run(module, x)
    set_execution(module, qnodes(device, method))
    assert_all_close(run(module, x), expected, 1e-9)


@pytest.mark.parametrize("features", [1, 2, 7, 11, 13])
@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit"])
def test_widths(device, features):
    torch.manual_seed(features)
    module = CircuitFeatureMap(features, 1, 7, seed=features).double()
    x = tokens(features, batch=1, seq=3)
    expected = run(module, x)
    set_execution(module, qnodes(device, "adjoint"))
    assert_all_close(run(module, x), expected, 1e-9)


@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
@pytest.mark.parametrize("batch, seq", [(0, 3), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("split", [False, True])
def test_empty_and_single_batches(cls, batch, seq, split):
    options = {"out_features": 5} if cls is CircuitFeatureMap else {}
    for device, method in (("default.qubit", "backprop"), ("lightning.qubit", "adjoint")):
        module = cls(6, 2, split=split, execution=qnodes(device, method), **options).double()
        x = torch.ones(batch, seq, 6, dtype=torch.float64)
        values, by_input, by_angle = run(module, x)
        assert values.shape == (batch, 2, seq, module.out_features) and by_input.shape == x.shape
        if not batch * seq:
            assert not by_angle.any()


@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit", "default.mixed"])
@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
def test_batches_in_parts(monkeypatch, device, cls):
    if cls is StateFeatureMap and device == "default.mixed":
        return
    module = feature_map(cls=cls, heads=1)
    x = tokens(5, batch=1, seq=7)
    expected = run(module, x)
    monkeypatch.setattr(qnode_module, "MAX_AMPLITUDES", 4 * 8)
    monkeypatch.setattr(devices_module, "MAX_TAPES", 3)
    for method in ("auto", "parameter-shift"):
        set_execution(module, qnodes(device, method))
        assert_all_close(run(module, x), expected, 1e-9)


@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
@pytest.mark.parametrize("encoding", ["amplitude", "angle-X"])
@pytest.mark.parametrize(
    "device, method",
    [("lightning.qubit", "adjoint"), ("default.mixed", "parameter-shift")],
)
def test_only_what_requires_a_gradient_is_run(device, method, encoding, cls):
    if cls is StateFeatureMap and device == "default.mixed":
        return
    module = feature_map(encoding, "four-terms", cls=cls)
    x = tokens(module.in_features)
    _, by_input, by_angle = run(module, x)
    set_execution(module, qnodes(device, method))
    meter = module.executor.meter
    circuits = 2 * 3  # heads, distinct inputs

    def executions(input_wanted, angles_wanted):
        before = meter.executions
        module.weights.requires_grad_(angles_wanted).grad = None
        moving = x.clone().requires_grad_(input_wanted)
        values = module(moving)
        if input_wanted or angles_wanted:
            values.backward(upstream_of(values))
        if input_wanted:
            torch.testing.assert_close(moving.grad, by_input, rtol=1e-9, atol=1e-9)
        if angles_wanted:
            torch.testing.assert_close(module.weights.grad, by_angle, rtol=1e-9, atol=1e-9)
        return meter.executions - before

    forward = executions(False, False)
    both, inputs, angles = executions(True, True), executions(True, False), executions(False, True)
    assert forward == circuits < inputs <= both and forward < angles
    if method == "adjoint" and encoding != "amplitude" and cls is CircuitFeatureMap:
        # one sweep serves both; if inputs are wanted it is a token's own
        assert angles == 2 * circuits and inputs == both == circuits + 2 * 4
    else:
        assert inputs - forward + angles - forward == both - forward


@pytest.mark.parametrize("device, method", [("lightning.qubit", "adjoint"), ("default.mixed", "hadamard")])
def test_words_that_say_little(device, method):
    for words in (["III"], ["ZII"], ["XYZ", "III", "XYZ", "XYZ"]):
        module = feature_map(words=words)
        x = tokens(5)
        expected = run(module, x)
        set_execution(module, qnodes(device, method))
        assert_all_close(run(module, x), expected, 1e-9)


class Turned(AmplitudeEncoding):
    """Amplitudes with fixed phases, and one number left out."""

    def phases(self, num_features):
        return torch.exp(1j * torch.arange(2 ** self.num_wires(num_features), dtype=torch.float64))

    def amplitudes(self, x):
        return super().amplitudes(x)


@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
@pytest.mark.parametrize(
    "device, method",
    [
        ("default.qubit", "backprop"),
        ("default.qubit", "adjoint"),
        ("lightning.qubit", "adjoint"),
        ("lightning.qubit", "parameter-shift"),
        ("default.mixed", "parameter-shift"),
        ("default.mixed", "backprop"),
    ],
)
def test_an_encoding_with_phases(device, method, cls):
    if cls is StateFeatureMap and device == "default.mixed":
        return
    torch.manual_seed(3)
    options = {"words": WORDS[3], "out_features": 1} if cls is CircuitFeatureMap else {}
    module = cls(5, 2, encoding=Turned(), **options).double()
    x = tokens(5)
    expected = run(module, x)
    set_execution(module, qnodes(device, method))
    assert_all_close(run(module, x), expected, 1e-9)


@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_more_wires_than_needed(device):
    module = feature_map()
    x = tokens(5)
    expected = run(module, x)
    for method in ("auto", "parameter-shift"):
        set_execution(module, qnodes(device, method, device_options={"wires": 5}))
        assert_all_close(run(module, x), expected, 1e-9)


# ---------------------------------------------------------------- amplitude-encoded inputs that are awkward


def awkward(scale_tiny, scale_huge):
    """Zero vector, zero entries, signs, basis states, tiny and huge vectors; 5 of 8 amplitudes, so padded too."""
    generator = torch.Generator().manual_seed(8)
    plain, other = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    holes = other * torch.tensor([1.0, 0, 0, 1, 0])
    basis = torch.eye(5, dtype=torch.float64)
    rows = [
        plain * 0,
        holes,
        plain,
        -plain,
        plain.abs(),
        basis[0],
        -2 * basis[4],
        plain * scale_tiny,
        other * scale_huge,
    ]
    return torch.stack(rows)[None]


@pytest.mark.parametrize("device, method", pairs(METHODS))
def test_awkward_amplitudes(device, method):
    module = feature_map(ansatz="strongly-entangling", heads=1)
    if not run_or_refuse(module, qnodes(device, method), expected_to_work(device, method)):
        return
    x = awkward(1e-30, 1e30)
    values, by_input, by_angle = run(module, x)
    assert values.isfinite().all() and by_input.isfinite().all() and by_angle.isfinite().all()
    norms = x.norm(dim=-1, keepdim=True)
    circuit = dense_circuit("amplitude", "strongly-entangling", 3)
    angles = module.weights[0].detach().numpy()
    upstream = upstream_of(values).numpy()[0, 0]
    for row, vector in enumerate(x[0]):
        unit = (vector / norms[0, row] if row else torch.eye(5)[0].double()).numpy()
        exact = dense.noisy_values(circuit, unit, angles, module.words[0])
        np.testing.assert_allclose(values[0, 0, row], exact, atol=1e-9)
        if row:  # a gradient scales as 1 / norm
            by_unit = dense.derivatives(lambda v: dense.noisy_values(circuit, v, angles, module.words[0]), unit)
            scaled = by_input[0, row] * norms[0, row]
            np.testing.assert_allclose(scaled, by_unit @ upstream[row], atol=1e-9)
    assert not by_input[0, 0].any()
    if method in EXACT:
        set_execution(module, "folded")
        torch.testing.assert_close(by_angle, run(module, x)[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device, method", [("lightning.qubit", "adjoint"), ("default.mixed", "parameter-shift")])
def test_awkward_amplitudes_in_float32(device, method):
    module = feature_map().float()
    x = awkward(1e-30, 1e30).float()
    expected = run(module, x)
    set_execution(module, qnodes(device, method))
    actual = run(module, x)
    norms = x.double().norm(dim=-1, keepdim=True)
    assert all(tensor.isfinite().all() for tensor in actual)
    scaled = [(a, (b.double() * norms).float(), c) for a, b, c in (actual, expected)]
    assert_all_close(*scaled, 2e-5)


def test_a_zero_upstream_runs_nothing_backwards():
    module = feature_map(execution=qnodes("lightning.qubit", "adjoint"))
    values = module(tokens(5).requires_grad_())
    before = module.executor.meter.executions
    values.backward(torch.zeros_like(values))
    assert module.executor.meter.executions == before and not module.weights.grad.any()


@pytest.mark.parametrize("size", [1e-100, 1e-12, 1e12])
def test_gradients_scale_with_upstream(size):
    module = feature_map(execution=qnodes("lightning.qubit", "adjoint"))
    x = tokens(5)
    _, by_input, by_angle = run(module, x)
    values = module(x)
    _, small_by_input, small_by_angle = run(module, x, upstream_of(values) * size)
    torch.testing.assert_close(small_by_input / size, by_input, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(small_by_angle / size, by_angle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("upstream", [float("nan"), float("inf")])
@pytest.mark.parametrize("device, method", [("lightning.qubit", "adjoint"), ("default.mixed", "parameter-shift")])
def test_an_infinite_loss_gives_no_finite_gradient(device, method, upstream):
    # a GradScaler, or anomaly detection, must be able to see it
    module = feature_map(execution=qnodes(device, method))
    weight = torch.ones(2, 2, 2, 5, dtype=torch.float64)
    weight[0, 0, 1, 2] = upstream
    _, by_input, by_angle = run(module, tokens(5), weight)
    assert not by_input[0, 1].isfinite().all() and by_input[1].isfinite().all()
    assert not by_angle[0].isfinite().all() and by_angle[1].isfinite().all()


def test_layers_of_qisa_with_more_layers():
    torch.manual_seed(1)
    module = CircuitFeatureMap(5, 1, 3, ansatz=QISAAnsatz(layers=2)).double()
    x = tokens(5)
    expected = run(module, x)
    set_execution(module, qnodes("lightning.qubit"))
    assert_all_close(run(module, x), expected, 1e-9)
