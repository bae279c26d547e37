"""Folded circuits and their peers: the same numbers, or the run ends."""

import os

import numpy as np
import pytest
import torch
from dense_reference import qisa_values

from lightning_modules.benchmarks import peers
from lightning_modules.benchmarks.dense_observables import DenseObservables
from lightning_modules.benchmarks.references import kernels_left_out
from lightning_modules.benchmarks.result import CheckFailed, Result
from lightning_modules.benchmarks.torchlayer import refusal
from pennylane_qattn import kernels
from pennylane_qattn.observables import draw_words

TINY = ("peers", "--rounds", "2", "--features", "4", "--tokens", "4")


@pytest.mark.parametrize("features, wires", [(2, 1), (3, 2), (7, 3)])
def test_dense_observables_are_the_published_formula(features, wires):
    """Against NumPy, with words of all letters."""
    words = draw_words(5, wires, seed=1, identity_probability=0.3)
    layer = DenseObservables(features, words, torch.complex128).double()
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((4, features)), rng.uniform(0, 6, (3, wires))
    with torch.no_grad():
        layer.weights.copy_(torch.as_tensor(angles)[None])
        found = layer(torch.as_tensor(x))
    expected = [qisa_values(row, angles, words) for row in x]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_the_circuits():
    circuit = peers.circuit_of(16)
    assert (circuit.num_wires, len(circuit.words)) == (4, 16)
    assert peers.circuit_of(128).num_wires == 7
    assert circuit.words == draw_words(16, 4, seed=0)


def test_all_peers_are_timed(run):
    status, out, err = run(*TINY, "--pairs", "default.qubit:backprop", "lightning.qubit:parameter-shift")
    assert (status, err) == (0, "")
    result = Result.read(run.folder / "peers-2-qubits.json")
    rows = {(row["peer"], row["by"]): row for row in result.rows}
    folded = rows.pop((peers.FOLDED, ""))
    assert folded["ratio"] == [1.0, 1.0] and len(folded["per_second"]) == 2
    refused = rows.pop(("TorchLayer, the whole batch", "lightning.qubit:parameter-shift"))
    assert refused["per_second"] == "raises NotImplementedError" and refused["ratio"] is None
    names = ["dense observables, gate by gate", *["TorchLayer, the whole batch", "TorchLayer, token by token"]]
    expected = (["folded, here, without kernels"] if kernels.numba else []) + [*names, names[-1]]
    assert [name for name, _ in rows] == expected
    for row in rows.values():
        assert len(row["ratio"]) == 2 and 1 <= row["tokens"] <= 4 and float(row["error"]) < 1e-2
        for speed, own, ratio in zip(folded["per_second"], row["per_second"], row["ratio"], strict=True):
            assert ratio == pytest.approx(speed / own)
    assert "raises NotImplementedError" in out


def test_speeds_are_those_of_a_token(run, monkeypatch):
    """Every call takes two seconds, the first round, and four, the second; folded has four tokens, the others one."""
    monkeypatch.setattr(peers, "_tokens", lambda peer, inputs, options: 4 if peer.name == peers.FOLDED else 1)
    monkeypatch.setattr(peers, "interleaved_seconds", lambda functions, *_: {peer: [2.0, 4.0] for peer in functions})
    assert run(*TINY, "--pairs", "default.qubit:backprop")[0] == 0
    folded, *others = Result.read(run.folder / "peers-2-qubits.json").rows
    assert (folded["per_second"], folded["ratio"], folded["tokens"]) == ([2.0, 1.0], [1.0, 1.0], 4)
    assert {(*row["per_second"], *row["ratio"], row["tokens"]) for row in others} == {(0.5, 0.25, 4.0, 4.0, 1)}


def test_gradients_that_are_no_numbers_are_told(run):
    # with zeros among the amplitudes
    status, out, _ = run(*TINY, "--features", "3", "--pairs", "default.qubit:adjoint", "--rounds", "1")
    assert status == 0 and "NaN gradients" in out


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda layer: layer.weights.data.add_(0.01), "values differ by"),
        (lambda layer: layer.register_forward_hook(lambda *_: _[-1][:, 1:]), r"values are \(5, 2\), and \(5, 3\) here"),
        (
            lambda layer: layer.register_forward_pre_hook(lambda _, x: (x[0].detach() + 0 * x[0],)),
            "gradients by inputs",
        ),
        (lambda layer: layer.weights.register_hook(lambda gradient: gradient * 1.001), "gradients by angles"),
    ],
)
def test_a_peer_that_computes_something_else(fault, message):
    everyone = peers.peers(peers.circuit_of(3), [], "cpu", torch.float64)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peers.check(everyone, inputs)
    fault(everyone[-1].layer)
    with pytest.raises(CheckFailed, match=f"^dense observables, gate by gate: {message}"):
        peers.check(everyone, inputs)


def test_a_peer_that_computes_something_else_ends_the_run(run, monkeypatch):
    right = DenseObservables.forward
    monkeypatch.setattr(DenseObservables, "forward", lambda self, x: right(self, x) * 1.0001)
    status, _, err = run(*TINY, "--pairs", "default.qubit:backprop")
    assert status == 1 and "dense observables, gate by gate: values differ by" in err
    assert list(run.folder.iterdir()) == []


def test_kernels_are_left_out_and_come_back(monkeypatch):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    with kernels_left_out():
        assert os.environ[kernels.SWITCH] == "0" and not kernels.serve(torch.empty(0))
    assert kernels.SWITCH not in os.environ
    monkeypatch.setenv(kernels.SWITCH, "1")
    with pytest.raises(KeyError), kernels_left_out():
        raise KeyError
    assert os.environ[kernels.SWITCH] == "1"


def test_slow_peers_get_fewer_tokens(monkeypatch):
    """A second a token; a call may take five."""
    sizes = []

    class Slow:
        def run(self, inputs):
            sizes.append(len(inputs))

    class Options:
        tokens, seconds, device = 100, 5.0, "cpu"

    def seconds_of(function, synchronize):
        function()
        return float(sizes[-1])

    monkeypatch.setattr(peers, "seconds_of", seconds_of)
    assert peers._tokens(Slow(), torch.zeros(100, 1), Options) == 4
    assert sizes == [1, 1, 2, 4]
    Options.seconds = 1e6
    assert peers._tokens(Slow(), torch.zeros(100, 1), Options) == 100


def test_refusals():
    class Raises(torch.nn.Module):
        def forward(self, x):
            raise NotImplementedError

    inputs = torch.ones(2, 3)
    assert refusal(Raises(), inputs) == "raises NotImplementedError"
    assert refusal(torch.nn.ReLU(), inputs) == ""
    assert refusal(torch.nn.Threshold(0.0, 0.0), inputs * float("nan")) == "NaN gradients"
