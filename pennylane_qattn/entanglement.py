r"""Entanglement of the states that attention circuits work on: Meyer and Wallach's measure.

.. math::

    Q(\psi) = 2\Bigl(1 - \frac{1}{n} \sum_{k=1}^n \operatorname{tr} \rho_k^2\Bigr)
            = \frac{4}{n} \sum_{k=1}^n \det \rho_k,

with :math:`\rho_k` the reduced density matrix of wire :math:`k` (Meyer and Wallach, arXiv quant-ph/0108104; the first
form is Brennen's, quant-ph/0305094). It is 0 for product states alone and 1 where every wire by itself is fully mixed,
as in Bell and GHZ states; random states have :math:`(2^n - 2)/(2^n + 1)` on average. We compute the second form, equal
for unit vectors since :math:`\operatorname{tr}\rho_k = 1`: near product states it has no 1 to lose its digits in.
"""

import dataclasses

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from pennylane_qattn.execution import make_executor
from pennylane_qattn.features import CircuitFeatureMap


def meyer_wallach(
    states: Complex[Tensor, "*batch amplitudes"] | Float[Tensor, "*batch packed"],
) -> Float[Tensor, "*batch"]:
    """Meyer and Wallach's measure of entanglement, between 0 and 1; differentiable.

    Args:
        states: unit vectors of `2 ** n` complex amplitudes, the first wire being the most significant; or real vectors
            of twice that length, real amplitudes followed by imaginary ones, as `StateFeatureMap` gives them.

    Raises:
        ValueError: if they are no states of one or more qubits.
    """
    if not states.is_complex():
        if states.shape[-1] % 2:
            raise ValueError(
                f"real amplitudes must be followed by as many imaginary ones; got {states.shape[-1]} in all"
            )
        states = torch.complex(*states.chunk(2, dim=-1))
    dim = states.shape[-1]
    num_wires = dim.bit_length() - 1
    if num_wires < 1 or dim != 2**num_wires:
        raise ValueError(f"a state of n >= 1 qubits has 2^n amplitudes; got {dim}")
    determinants = []
    for wire in range(num_wires):
        zero, one = states.unflatten(-1, (2**wire, 2, dim // 2 ** (wire + 1))).unbind(-2)
        coherence = (zero.conj() * one).sum((-2, -1))
        determinants.append(_square(zero).sum((-2, -1)) * _square(one).sum((-2, -1)) - _square(coherence))
    return 4 * torch.stack(determinants).mean(0)


def _square(z: Tensor) -> Tensor:
    """The squared modulus, differentiable at 0."""
    return z.real.square() + z.imag.square()


class CircuitStates:
    """The states that the circuits of a feature map pass through on given embeddings.

    They are computed by folding, in whatever way the circuits are run: a device need not give its states away.

    Args:
        feature_map: its circuits, with the angles it has at the time of a call.

    Raises:
        ValueError: if the circuits are too large to fold.
    """

    def __init__(self, feature_map: CircuitFeatureMap):
        self.feature_map = feature_map
        word = "Z".ljust(feature_map.num_wires, "I")  # nothing is measured: one short word keeps the fold small
        circuits = [dataclasses.replace(circuit, words=(word,)) for circuit in feature_map.circuits]
        self._executor = make_executor(circuits, "folded")

    def inputs(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "#heads tokens inputs"]:
        """What each head encodes of the embeddings: all of them, or its slice."""
        tokens = x.flatten(0, 1).to(self.feature_map.weights.dtype)
        if not self.feature_map.split:
            return tokens[None]
        return tokens.unflatten(-1, (self.feature_map.num_heads, -1)).transpose(0, 1)

    def encoded(self, inputs: Float[Tensor, "#heads tokens inputs"]) -> Complex[Tensor, "#heads tokens amplitudes"]:
        """The states after the encoding."""
        circuit = self._executor.circuits[0]
        amplitudes = circuit.encoding.amplitudes(inputs)
        missing = 2**circuit.num_wires - amplitudes.shape[-1]
        states = torch.nn.functional.pad(amplitudes, (0, missing)) + 0j
        phases = circuit.encoding.phases(circuit.num_features)
        return states if phases is None else states * phases.to(device=states.device, dtype=states.dtype)

    def final(self, inputs: Float[Tensor, "#heads tokens inputs"]) -> Complex[Tensor, "heads tokens amplitudes"]:
        """The states after the ansatz, ahead of the measurement."""
        return torch.complex(*self._executor.states(inputs, self.feature_map.weights).chunk(2, dim=-1))
