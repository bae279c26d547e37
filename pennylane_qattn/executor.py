"""Executors: what runs the circuits of a layer. Here the interface, and the executor `folded`.

An executor gets the circuits of all heads, which differ in words and angles only, and computes expectation values or
states. Parameters and words belong to the feature map, never to the executor, so a model trained with one executor is
evaluated with another from the same checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.complex_numbers import real_and_imaginary
from pennylane_qattn.devices import Meter
from pennylane_qattn.encoding import AmplitudeEncoding
from pennylane_qattn.folding import Fold, Memory
from pennylane_qattn.measurement import WordMeasurement
from pennylane_qattn.planning import Execution, Plan, make_plan
from pennylane_qattn.quadratic import quadratic_forms
from pennylane_qattn.recipes import Forms


class Executor(ABC):
    """Runs circuits that share encoding and ansatz.

    Args:
        circuits: one per head.

    Attributes:
        name: what it is called.
        plan: what it does, and why.
        meter: counts the circuits that ran on a device.
    """

    name: str
    plan: Plan

    def __init__(self, circuits: Sequence[Circuit]):
        self.circuits = tuple(circuits)
        self.meter = Meter()

    @abstractmethod
    def expectations(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens words"]:
        """Expectation values of every head's words."""

    @abstractmethod
    def states(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens amplitudes"]:
        """Final states, real amplitudes followed by imaginary ones."""

    def recipe(self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]) -> Forms | None:
        """What a kernel makes the expectation values of by itself; `None`: `expectations` alone makes them."""
        return None

    def count(self, tokens: int, training: bool) -> int:
        """Device executions for so many tokens, at most; in training with gradients by inputs and angles."""
        return 0

    @abstractmethod
    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes ready for weights of that dtype and device, ahead of the first call; forgets what others needed."""


class FoldedExecutor(Executor):
    """Circuits as matrices in torch: exact, differentiable, no PennyLane call when run."""

    name = "folded"

    def __init__(self, circuits: Sequence[Circuit], plan: Plan | None = None):
        super().__init__(circuits)
        self.plan = plan or make_plan(Execution(executor="folded"), self.circuits)
        first = self.circuits[0]
        self._program = first.ansatz.program(first.num_wires)
        self._folds: dict[tuple[torch.dtype, torch.device], Fold] = {}
        self._readouts, self._states = Memory(), Memory()
        self._words = WordMeasurement([circuit.words for circuit in self.circuits], is_complex=True)

    def expectations(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens words"]:
        amplitudes, width, fold = self._prepared(x, weights)
        if self._words.serves(amplitudes):
            return self._words(amplitudes, self._state_rows(fold, weights, width))
        rows, signs = self._readouts(lambda: fold.readout(*fold.evolve(weights, width)), weights, width)
        return quadratic_forms(amplitudes, rows, signs)

    def recipe(self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]) -> Forms | None:
        is_as_written = type(self).expectations is FoldedExecutor.expectations and "expectations" not in vars(self)
        if not is_as_written or x.dtype != weights.dtype:
            return None
        encoding, fold = self.circuits[0].encoding, self._fold(weights.dtype, weights.device)
        is_raw = type(encoding) is AmplitudeEncoding
        amplitudes = x if is_raw else encoding.amplitudes(x)
        rows = self._state_rows(fold, weights, amplitudes.shape[-1])
        return Forms(amplitudes, is_raw, rows, self._words.pairs(x.dtype))

    def states(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens amplitudes"]:
        amplitudes, width, fold = self._prepared(x, weights)
        return amplitudes @ self._state_rows(fold, weights, width).transpose(1, 2)

    def _state_rows(self, fold: Fold, weights: Tensor, width: int) -> Float[Tensor, "heads rows amplitudes"]:
        """What takes amplitudes to the state, real amplitudes followed by imaginary ones."""

        def compute() -> Tensor:
            return torch.cat(real_and_imaginary(fold.states(weights, width)), dim=1)

        return self._states(compute, weights, width)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        if self._folds.keys() - {(dtype, device)}:
            self._folds = {key: fold for key, fold in self._folds.items() if key == (dtype, device)}
            self._readouts, self._states = Memory(), Memory()
            self._words.keep_only(dtype, device)
        self._fold(dtype, device)

    def _fold(self, dtype: torch.dtype, device: torch.device) -> Fold:
        if (dtype, device) not in self._folds:
            first = self.circuits[0]
            self._folds[dtype, device] = Fold(
                self._program,
                first.num_wires,
                [circuit.words for circuit in self.circuits],
                phases=first.encoding.phases(first.num_features),
                dtype=dtype,
                device=device,
            )
            self._words.prepare(dtype, device)
        return self._folds[dtype, device]

    def _prepared(self, x: Tensor, weights: Tensor) -> tuple[Tensor, int, Fold]:
        """The encoded amplitudes, how many there are, and the fold for these weights."""
        fold = self._fold(weights.dtype, weights.device)
        amplitudes = self.circuits[0].encoding.amplitudes(x)
        return amplitudes, amplitudes.shape[-1], fold
