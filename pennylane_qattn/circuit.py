"""The description of a circuit, encoding x ansatz x observables, and its PennyLane QNode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pennylane as qml
import torch

from pennylane_qattn.ansatz import ANSATZE, Ansatz
from pennylane_qattn.encoding import ENCODINGS, Encoding
from pennylane_qattn.observables import check_words, to_pennylane


@dataclass(frozen=True)
class Circuit:
    """A variational circuit that turns a feature vector into expectation values.

    Args:
        num_features: length of the vector that is encoded.
        words: the observables, one Pauli word each; the number of outputs.
        encoding: an `Encoding` or its name.
        ansatz: an `Ansatz` or its name.
    """

    num_features: int
    words: tuple[str, ...]
    encoding: Encoding | str = "amplitude"
    ansatz: Ansatz | str = "qisa"

    def __post_init__(self) -> None:
        if self.num_features < 1:
            raise ValueError(f"num_features must be at least 1; got {self.num_features}")
        object.__setattr__(self, "encoding", ENCODINGS.build(self.encoding))
        object.__setattr__(self, "ansatz", ANSATZE.build(self.ansatz))
        object.__setattr__(self, "words", check_words(self.words, self.num_wires))

    @property
    def num_wires(self) -> int:
        """Number of qubits."""
        return self.encoding.num_wires(self.num_features)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the angles."""
        return self.ansatz.shape(self.num_wires)

    def quantum_function(self, inputs: Any, weights: Any) -> list:
        """Queues encoding, ansatz and measurements: the body of the QNode."""
        wires = range(self.num_wires)
        self.encoding.prepare(inputs, wires)
        cast(Ansatz, self.ansatz)(weights, list(wires))
        return [qml.expval(to_pennylane(word, wires)) for word in self.words]

    def qnode(self, device: Any = "default.qubit", **options: Any) -> Callable[..., Any]:
        """A PennyLane QNode `f(inputs, weights)` that returns one expectation value per word.

        Args:
            device: a PennyLane device, or its name.
            **options: passed to `qml.QNode`, for instance `diff_method`.
        """
        if isinstance(device, str):
            device = qml.device(device, wires=self.num_wires)
        return qml.QNode(self.quantum_function, device, **{"interface": "torch", **options})

    def draw(self, **options: Any) -> Any:
        """A matplotlib figure of the circuit, with the encoding as one box."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(self.weight_shape, generator=generator)
        inputs = torch.ones(self.num_features)
        options = {"decimals": None, "level": "top", **options}
        figure, _ = qml.draw_mpl(self.qnode(), **options)(inputs, weights)
        return figure
