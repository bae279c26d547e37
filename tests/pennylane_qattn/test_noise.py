"""Shots and noise: unbiased, as large as they must be, seeded; and noise against Kraus operators in NumPy."""

import itertools

import dense_reference as dense
import numpy as np
import pytest
import torch
from circuit_cases import ANSAETZE, ENCODED, WORDS, dense_circuit, qnodes, run, upstream_of

from pennylane_qattn import CircuitFeatureMap, Noise, set_execution

NOISES = {
    "depolarizing": Noise(depolarizing=0.07),
    "damping": Noise(amplitude_damping=0.11),
    "readout": Noise(readout=0.05),
    "all": Noise(depolarizing=0.03, amplitude_damping=0.05, readout=0.02),
}
SAMPLING = ("default.qubit", "lightning.qubit", "default.mixed")


def feature_map(encoding="amplitude", ansatz="qisa", heads=1, **options):
    torch.manual_seed(9)
    chosen, features = ENCODED[encoding]
    options = {"words": WORDS[chosen.num_wires(features)], **options}
    return CircuitFeatureMap(features, heads, 1, ansatz=ANSAETZE[ansatz], encoding=chosen, **options).double()


def tokens(features, count=2):
    x = torch.randn(1, count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return x / x.norm(dim=-1, keepdim=True)


def kraus(noise):
    return {"p": noise.depolarizing, "damping": noise.amplitude_damping, "readout": noise.readout}


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    "encoding, ansatz, kind",
    [
        ("amplitude", "qisa", "depolarizing"),
        ("angle-X", "qisa", "damping"),
        ("angle-X", "qisa", "readout"),
        ("amplitude", "odd-gates", "all"),
        ("angle-Y", "basic-entangler", "all"),
        ("angle-X", "strongly-entangling", "all"),
    ],
)
def test_noise_equals_kraus(encoding, ansatz, kind):
    module, noise = feature_map(encoding, ansatz), NOISES[kind]
    x = tokens(module.in_features, count=1)
    circuit = dense_circuit(encoding, ansatz, module.num_wires)
    angles = module.weights[0].detach().numpy()

    def function(x, angles):
        return dense.noisy_values(circuit, x, angles, module.words[0], **kraus(noise))

    upstream = upstream_of(module(x).detach())[0, 0].numpy()
    exact = np.stack([function(row, angles) for row in x[0].numpy()])
    pairs = list(zip(x[0].numpy(), upstream, strict=True))
    by_input = [dense.derivatives(lambda v: function(v, angles), row) @ up for row, up in pairs]
    by_angle = sum(dense.derivatives(lambda v, row=row: function(row, v), angles) @ up for row, up in pairs)
    for method in ("backprop", "parameter-shift", "hadamard"):
        if ansatz == "odd-gates" and method != "parameter-shift":
            continue
        set_execution(module, qnodes("default.mixed", method, noise=noise))
        ours = run(module, x)
        np.testing.assert_allclose(ours[0][0, 0], exact, atol=1e-9)
        np.testing.assert_allclose(ours[1][0], by_input, atol=1e-9)
        np.testing.assert_allclose(ours[2][0], by_angle, atol=1e-9)
    folded = dense.noisy_values(circuit, x[0, 0].numpy(), angles, module.words[0])
    assert np.abs(folded - exact[0]).max() > 0.01  # the noise is felt


def resting(words, wires=1, **options):
    """The published circuit with all angles zero: 3 rotations on each wire, after the preparation."""
    module = CircuitFeatureMap(2**wires, 1, 1, words=words, **options).double()
    torch.nn.init.zeros_(module.weights)
    return module


@pytest.mark.parametrize("p", [0.01, 0.3, 0.75])
def test_depolarizing_shrinks_the_bloch_vector(p):
    module = resting(["X", "Y", "Z"])
    x = torch.tensor([[[0.6, 0.8]]], dtype=torch.float64)
    set_execution(module, qnodes("default.mixed", noise=Noise(depolarizing=p)))
    expected = torch.tensor([0.96, 0.0, -0.28], dtype=torch.float64) * (1 - 4 * p / 3) ** 4
    torch.testing.assert_close(module(x)[0, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probability", [0.02, 0.4, 1.0])
def test_damping_falls_to_the_ground_state(probability):
    module = resting(["X", "Z"])
    x = torch.tensor([[[0.6, 0.8]]], dtype=torch.float64)
    set_execution(module, qnodes("default.mixed", noise=Noise(amplitude_damping=probability)))
    stays = (1 - probability) ** 4
    expected = torch.tensor([0.96 * stays**0.5, 1 - 2 * 0.64 * stays], dtype=torch.float64)
    torch.testing.assert_close(module(x)[0, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shots", [None, 20_000])
def test_readout_errors_shrink_a_word_by_its_weight(shots):
    words = ["ZII", "IZZ", "ZZZ", "XII", "III"]
    module = feature_map(words=words)
    x = tokens(5, count=1)
    exact = module(x).detach()[0, 0, 0]
    set_execution(module, qnodes("default.mixed", "parameter-shift", noise=Noise(readout=0.1), shots=shots))
    expected = exact * torch.tensor([0.8, 0.8**2, 0.8**3, 0.8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(module(x)[0, 0, 0], expected, rtol=0, atol=5 / shots**0.5 if shots else 1e-12)


def test_a_coin_for_a_reader_reads_nothing():
    module = feature_map(words=["ZII", "XYZ"], execution=qnodes("default.mixed", noise=Noise(readout=0.5)))
    values, by_input, by_angle = run(module, tokens(5))
    assert values.abs().max() < 1e-12 and by_input.abs().max() < 1e-12 and by_angle.abs().max() < 1e-12


def test_no_noise_on_a_mixed_device_is_no_noise():
    module = feature_map(heads=2)
    expected = run(module, tokens(5))
    set_execution(module, qnodes("default.mixed", noise=Noise()))
    for ours, theirs in zip(run(module, tokens(5)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_noise_at_awkward_inputs_is_finite():
    x = torch.zeros(1, 3, 5, dtype=torch.float64)
    x[0, 1, 4], x[0, 2, 1] = -1e30, 1e-30
    for method in ("backprop", "parameter-shift"):
        module = feature_map(execution=qnodes("default.mixed", method, noise=NOISES["all"]))
        values, by_input, by_angle = run(module, x)
        assert values.isfinite().all() and by_input.isfinite().all() and by_angle.isfinite().all()
        assert not by_input[0, 0].any() and by_angle.any()


# ---------------------------------------------------------------- shots: values


@pytest.mark.parametrize("device", SAMPLING)
def test_error_bars_shrink_with_the_root_of_shots(device):
    # N copies of one token: their mean is within 5 standard errors of the exact value, their variance is (1 - f^2) / S,
    # which N numbers tell to sqrt(2 / N)
    copies = 150
    module = feature_map()
    x = tokens(5, count=1).expand(1, copies, 5)
    exact = module(x).detach()[0, 0, 0]
    for shots in (30, 300, 3000):
        set_execution(module, qnodes(device, shots=shots, seed=shots))
        with torch.no_grad():
            values = module(x)[0, 0]
        variance = (1 - exact.square()) / shots
        assert ((values.mean(0) - exact).abs() <= 5 * (variance / copies).sqrt()).all()
        torch.testing.assert_close(values.var(0), variance, rtol=5 * (2 / copies) ** 0.5, atol=0)


def test_noise_and_shots_together():
    copies, shots = 300, 100
    module, noise = feature_map("angle-Y", "qisa"), NOISES["all"]
    x = tokens(3, count=1).expand(1, copies, 3)
    circuit = dense_circuit("angle-Y", "qisa", 3)
    exact = dense.noisy_values(
        circuit, x[0, 0].numpy(), module.weights[0].detach().numpy(), module.words[0], **kraus(noise)
    )
    exact = torch.from_numpy(exact)
    set_execution(module, qnodes("default.mixed", noise=noise, shots=shots))
    values = module(x).detach()[0, 0]
    variance = (1 - exact.square()) / shots
    assert ((values.mean(0) - exact).abs() <= 5 * (variance / copies).sqrt()).all()
    torch.testing.assert_close(values.var(0), variance, rtol=5 * (2 / copies) ** 0.5, atol=0)


@pytest.mark.parametrize("device", SAMPLING)
def test_the_seed_decides(device):
    x = tokens(5, count=3)

    def sample(seed, index=0):
        module = feature_map()
        module.set_execution(qnodes(device, shots=20, seed=seed), index)
        return torch.stack([module(x).detach(), module(x).detach()])

    first = sample(3)
    assert torch.equal(first, sample(3))
    assert not torch.equal(first[0], first[1])  # a second call draws anew
    assert not torch.equal(first, sample(4)) and not torch.equal(first, sample(3, index=1))


@pytest.mark.parametrize("device", SAMPLING)
def test_two_maps_of_a_model_have_noise_of_their_own(device):
    model = torch.nn.ModuleList([feature_map(), feature_map()])
    x = tokens(5, count=3)
    assert torch.equal(model[0](x), model[1](x))
    set_execution(model, qnodes(device, shots=20, seed=1))
    once = [part(x).detach() for part in model]
    assert not torch.equal(*once)
    set_execution(model, qnodes(device, shots=20, seed=1))
    assert all(torch.equal(part(x), before) for part, before in zip(model, once, strict=True))


def test_heads_with_the_same_circuit_have_noise_of_their_own():
    module = feature_map(heads=2)
    with torch.no_grad():
        module.weights[1] = module.weights[0]
    set_execution(module, qnodes(shots=20))
    first, second = module(tokens(5, count=3))[0]
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- shots: gradients


@pytest.mark.parametrize("device", SAMPLING)
@pytest.mark.parametrize("encoding", ["amplitude", "angle-X"])
def test_sampled_gradients_are_unbiased(device, encoding):
    copies, shots = 60, 400
    wires = 3 if encoding == "amplitude" else 2
    module = feature_map(encoding, words=["Z" + "X" * (wires - 1)])
    x = tokens(module.in_features, count=1).expand(1, copies, -1)
    upstream = torch.full((1, 1, copies, 1), 1 / copies, dtype=torch.float64)
    _, exact_by_input, exact_by_angle = run(module, x, upstream)
    set_execution(module, qnodes(device, "parameter-shift", shots=shots, seed=2))
    _, by_input, by_angle = run(module, x, upstream)
    # (f+ - f-)/2 of two values with variances of at most 1 / shots has one of at most 1 / (2 shots)
    limit = 5 * (1 / (2 * shots * copies)) ** 0.5
    assert ((by_angle - exact_by_angle).abs() <= limit).all()
    assert exact_by_angle.abs().max() > 3 * limit
    each, exact = by_input[0] * copies, exact_by_input[0, 0] * copies
    if encoding == "amplitude":
        # an entry of the gradient by the state: (n+^2 f+ - n-^2 f-)/2 with n+-^2 = 2 +- 2 psi; then it is projected
        psi = x[0, 0]
        entry = ((2 + 2 * psi).square() + (2 - 2 * psi).square()) / (4 * shots)
        variance = (torch.eye(5).double() - torch.outer(psi, psi)).square() @ entry
    else:
        variance = torch.full_like(exact, 1 / (2 * shots))
    assert ((each.mean(0) - exact).abs() <= 5 * (variance / copies).sqrt()).all()
    assert (each.var(0) <= variance * (1 + 5 * (2 / copies) ** 0.5)).all() and (each.var(0) > variance / 50).all()


@pytest.mark.parametrize("device, method", [*itertools.product(SAMPLING, ["finite-diff", "spsa", "hadamard"])])
def test_other_methods_sample_too(device, method):
    # steps so large that the noise does not drown the slope; the bias of h = 0.3 is at most h^2 / 6 for each value
    options = {"finite-diff": {"h": 0.3}, "spsa": {"h": 0.3, "num_directions": 20}, "hadamard": {}}[method]
    module = feature_map("angle-X", words=["ZX"])
    x = tokens(2, count=1)
    _, _, exact = run(module, x)
    set_execution(module, qnodes(device, method, shots=2000, gradient_options=options))
    by_angle = run(module, x)[2]
    size = exact.norm() if method == "spsa" else 0.0
    limit = 5 * (1 / (0.6**2 * 1000) + size**2 / 20) ** 0.5 + 0.015
    assert by_angle.isfinite().all() and ((by_angle - exact).abs() <= limit).all()
