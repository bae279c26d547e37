r"""Feature maps computed otherwise, in float64: what those that are timed are held against.

Circuits on a simulator of PennyLane's, gate by gate; Pauli words as full matrices; linear and learned values as their
formulas stand. Nothing here folds a circuit or calls a kernel.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import pennylane as qml
import torch
from torch import Tensor, nn

from lightning_modules.benchmarks.dense_observables import word_matrix
from pennylane_qattn import Circuit, kernels
from pennylane_qattn.features import (
    CircuitFeatureMap,
    FeatureMap,
    LinearFeatureMap,
    PerHeadFeatureMap,
    QuadraticFeatureMap,
    StateFeatureMap,
)
from pennylane_qattn.value_maps import LearnedQuadraticFeatureMap


@contextlib.contextmanager
def kernels_left_out() -> Iterator[None]:
    """Within it, torch computes by itself what kernels compute otherwise."""
    before = os.environ.get(kernels.SWITCH)
    os.environ[kernels.SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[kernels.SWITCH]
        else:
            os.environ[kernels.SWITCH] = before


def _inputs_of_heads(feature_map: PerHeadFeatureMap, x: Tensor) -> Tensor:
    """What each head reads, `(#heads, batch, seq, inputs)`."""
    if not feature_map.split:
        return x[None]
    return x.unflatten(-1, (feature_map.num_heads, feature_map.in_features)).movedim(-2, 0)


def _linear(feature_map: LinearFeatureMap, x: Tensor) -> Tensor:
    weight, bias = (_plain(t) for t in (feature_map.linear.weight, feature_map.linear.bias))
    out = torch.einsum("btd,od->bto", x, weight) + (0 if bias is None else bias)
    return out.unflatten(-1, (feature_map.num_heads, feature_map.out_features)).transpose(1, 2)


def _on_a_simulator(feature_map: CircuitFeatureMap, x: Tensor) -> Tensor:
    inputs = _inputs_of_heads(feature_map, x).expand(feature_map.num_heads, -1, -1, -1).flatten(1, 2)
    run = _states if isinstance(feature_map, StateFeatureMap) else _expectations
    heads = [run(*of_head) for of_head in zip(feature_map.circuits, inputs, _plain(feature_map.weights), strict=True)]
    return torch.stack([features.unflatten(0, x.shape[:2]) for features in heads], dim=1)


def _expectations(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    return torch.stack(circuit.qnode("default.qubit", diff_method=None)(inputs, weights), dim=-1)


def _states(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    wires = list(range(circuit.num_wires))

    @qml.qnode(qml.device("default.qubit", wires=wires), interface="torch", diff_method=None)
    def state():
        circuit.encoding.prepare(inputs, wires)
        circuit.ansatz(weights, wires)
        return qml.state()

    final = state()
    return torch.cat((final.real, final.imag), dim=-1)


def _by_matrices(feature_map: QuadraticFeatureMap, x: Tensor) -> Tensor:
    u = torch.einsum("hbti,hoi->hbto", _inputs_of_heads(feature_map, x), _plain(feature_map.weight))
    u = nn.functional.pad(u, (0, 2**feature_map.num_wires - u.shape[-1]))
    heads = [
        torch.stack([((of_head @ word_matrix(word).real) * of_head).sum(-1) for word in words], dim=-1)
        for of_head, words in zip(u, feature_map.words, strict=True)
    ]
    return torch.stack(heads, dim=1)


def _learned(feature_map: LearnedQuadraticFeatureMap, x: Tensor) -> Tensor:
    inputs = _inputs_of_heads(feature_map, x)
    unit = inputs / inputs.norm(dim=-1, keepdim=True)
    seen = torch.einsum("hbti,hri->hbtr", unit, _plain(feature_map.weight)).square()
    return torch.einsum("hbtr,hro->bhto", seen, _plain(feature_map.readout_weight))


def _plain(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().double().cpu()


#: Features `(B, H, T, f)` of `x`, `(B, T, d)` in float64 on the CPU, by the class of the map.
REFERENCES: dict[type[FeatureMap], Callable[..., Tensor]] = {
    LinearFeatureMap: _linear,
    CircuitFeatureMap: _on_a_simulator,
    StateFeatureMap: _on_a_simulator,
    QuadraticFeatureMap: _by_matrices,
    LearnedQuadraticFeatureMap: _learned,
}
