"""Circuits on devices, amplification and sparse products, on tiny sizes."""

import re

import pytest
import torch

from lightning_modules.benchmarks.grover import LargestTensor
from lightning_modules.benchmarks.result import Result
from pennylane_qattn import CircuitLayer
from pennylane_qattn.grover.score import AmplificationScore
from pennylane_qattn.grover.sparse import SparseAttention

GROVER = ("grover", "--length", "5", "--keys", "7", "--kept", "3", "--rounds", "2")


def test_devices(run):
    pairs = ("default.qubit:backprop", "lightning.qubit:parameter-shift")
    status, out, err = run("devices", "--tokens", "2", "--rounds", "2", "--pairs", *pairs)
    assert (status, err) == (0, "")
    backprop, shift = Result.read(run.folder / "devices.json").rows
    assert len(backprop["ratio"]) == len(backprop["plain"]) == len(backprop["ours"]) == 2
    for ratio, plain, ours in zip(backprop["ratio"], backprop["plain"], backprop["ours"], strict=True):
        assert ratio == pytest.approx(plain / ours)
    assert shift["plain"] == "raises NotImplementedError" and shift["ratio"] is None and len(shift["ours"]) == 2
    assert backprop["executions"] == "1, 0"
    assert "lightning.qubit" in out


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_devices_with_other_results_end_the_run(run, monkeypatch, what):
    right = CircuitLayer.forward

    def other(self, inputs):
        values = right(self, inputs)
        return 1.001 * values if what == "values" else values + 0.001 * (inputs - inputs.detach()).sum()

    monkeypatch.setattr(CircuitLayer, "forward", other)
    status, _, err = run("devices", "--tokens", "2", "--rounds", "1", "--pairs", "default.qubit:backprop")
    message = f"default.qubit:backprop: TorchLayer and CircuitLayer do not give the same {what}"
    assert (status, err) == (1, f"benchmark.py: error: {message}\n")


def test_grover(run):
    status, _, err = run(*GROVER)
    assert (status, err) == (0, "")
    layers = Result.read(run.folder / "grover-layers.json").rows
    assert layers[0]["inference"] == layers[0]["training"] == [1.0, 1.0]
    assert len({row["layer"] for row in layers}) == 7
    products = Result.read(run.folder / "grover-products.json").rows
    assert [row["product"] for row in products] == ["sparse", "dense", "dense, matrix ready"]
    # dense: the largest is what comes out, n x d; ready: the matrix itself, n x n
    assert [row["numbers"] for row in products[1:]] == [7 * 64, 7 * 7]


def test_products_that_differ_end_the_run(run, monkeypatch):
    right = SparseAttention.__matmul__
    monkeypatch.setattr(SparseAttention, "__matmul__", lambda self, v: right(self, v) * 1.01)
    status, _, err = run(*GROVER)
    assert (status, err) == (1, "benchmark.py: error: sparse: it is not the product that the others compute\n")


def test_layers_that_differ_end_the_run(run, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, *_, **__: None)  # each has weights of its own
    status, _, err = run(*GROVER)
    message = "softmax, fused: it is not the product that the others compute"
    assert (status, err) == (1, f"benchmark.py: error: {message}\n")


RIGHT = AmplificationScore.attend


def _sees_all(self, q, k, v, is_causal, visible):
    return RIGHT(self, q, k, v, False, visible)


@pytest.mark.parametrize(
    "attend, message",
    [
        (
            lambda *inputs: 0 * RIGHT(*inputs),
            " does not attend: the last token's outputs do not depend on those before",
        ),
        (_sees_all, " sees the future: outputs move by "),
        (lambda *inputs: RIGHT(*inputs).detach(), ": the parameter query_map.linear.weight gets no gradient"),
        (lambda *inputs: 1.01 * RIGHT(*inputs), " differs by .* from its weights and values written out"),
    ],
)
def test_an_amplification_with_a_fault_ends_the_run(run, monkeypatch, attend, message):
    monkeypatch.setattr(AmplificationScore, "attend", attend)
    status, _, err = run(*GROVER)
    assert status == 1 and re.match(f"benchmark.py: error: amplification, iterations per row{message}", err), err


def test_the_largest_tensor_is_seen():
    with LargestTensor() as seen:
        (torch.ones(3, 5) @ torch.ones(5, 7)).sum()
    assert seen.numbers == 35
