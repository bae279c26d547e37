"""Re-uploaded circuits against PennyLane's QNodes, gate by gate."""

import pennylane as qml
import pytest
import torch

from pennylane_qattn import (
    AngleEncoding,
    Execution,
    Gaussian,
    Noise,
    ReuploadedFeatureMap,
    StronglyEntangling,
    build_attention,
    set_execution,
)
from pennylane_qattn.observables import to_pennylane


def by_pennylane(feature_map: ReuploadedFeatureMap, head: int, x: torch.Tensor) -> torch.Tensor:
    wires = range(feature_map.num_wires)

    @qml.qnode(qml.device("default.qubit", wires=feature_map.num_wires), interface="torch", diff_method="backprop")
    def circuit(vector, weights, scale):
        padded = torch.nn.functional.pad(vector, (0, 2 ** len(wires) - len(vector)))
        qml.StatePrep(padded / padded.norm(), wires=wires)
        feature_map.ansatz(weights[0], list(wires))
        qml.DiagonalQubitUnitary(torch.exp(1j * scale * padded), wires=wires)
        feature_map.ansatz(weights[1], list(wires))
        return [qml.expval(to_pennylane(word, wires)) for word in feature_map.words[head]]

    rows = [torch.stack(circuit(v, feature_map.weights[head], feature_map.phase_scale[head])) for v in x]
    return torch.stack(rows)


@pytest.mark.parametrize("embed_dim, split", [(2, False), (5, False), (6, True)])
@pytest.mark.parametrize("ansatz", ["qisa", StronglyEntangling(layers=2)])
def test_values_and_gradients_are_those_of_pennylane(embed_dim, split, ansatz):
    torch.manual_seed(embed_dim)
    heads = 2
    feature_map = ReuploadedFeatureMap(embed_dim, heads, 3, ansatz, split=split, seed=4).double()
    with torch.no_grad():
        feature_map.phase_scale.copy_(torch.tensor([0.7, -1.9]))
    x = torch.randn(1, 3, embed_dim, dtype=torch.float64, requires_grad=True)
    learned = [x, feature_map.weights, feature_map.phase_scale]
    values = feature_map(x)
    width = embed_dim // heads if split else embed_dim
    parts = [x[0, :, head * width : (head + 1) * width] if split else x[0] for head in range(heads)]
    expected = torch.stack([by_pennylane(feature_map, head, part) for head, part in enumerate(parts)])[None]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(values)
    gradients = [torch.autograd.grad((v * upstream).sum(), learned) for v in (values, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_without_phases_it_is_one_longer_circuit():
    torch.manual_seed(0)
    feature_map = ReuploadedFeatureMap(5, 1, 4).double()
    with torch.no_grad():
        feature_map.phase_scale.zero_()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(feature_map(x), feature_map(3 * x), rtol=0, atol=1e-12)  # of the direction alone
    with torch.no_grad():
        feature_map.phase_scale.fill_(1.0)
    assert (feature_map(x) - feature_map(3 * x)).abs().max() > 0.01


def test_zero_padded_and_zero_vectors_have_finite_gradients():
    torch.manual_seed(0)
    feature_map = ReuploadedFeatureMap(3, 1, 4).double()
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    x[0, 1, 0] = 1.0
    x.requires_grad_()
    values = feature_map(x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert values.isfinite().all() and gradient.isfinite().all()


def test_words_and_scale_travel_in_the_checkpoint():
    feature_map = ReuploadedFeatureMap(4, 2, 5, seed=1)
    other = ReuploadedFeatureMap(4, 2, 5, seed=2)
    assert other.words != feature_map.words
    other.load_state_dict(feature_map.state_dict())
    assert other.words == feature_map.words
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(other(x), feature_map(x))


def test_it_is_run_folded_and_says_so():
    attention = build_attention("gaussian", 4, 1, 8, values="reuploaded-circuit")
    (plan,) = set_execution(attention, "folded")
    assert plan.executor == "folded"
    for execution in (Execution(executor="qnode"), Execution(shots=10), Execution(noise=Noise(readout=0.1))):
        with pytest.raises(ValueError, match="re-uploaded circuits are run folded only"):
            set_execution(attention, execution)


def test_frozen_and_refused():
    frozen = Gaussian(values="reuploaded-circuit", trainable=False)(4, 1, 8)
    assert not any("weights" in name or "phase" in name for name, p in frozen.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="encodes amplitudes; got encoding 'angle'"):
        ReuploadedFeatureMap(4, 1, 3, encoding=AngleEncoding())
