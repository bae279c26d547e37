"""A circuit as a torch layer of its own, for models that are not made here."""

import math
from typing import Any

import pennylane as qml
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.devices import Meter
from pennylane_qattn.execution import make_executor
from pennylane_qattn.executor import Executor, FoldedExecutor
from pennylane_qattn.planning import Execution
from pennylane_qattn.precision import at_least_float32
from pennylane_qattn.qnode import QNodeExecutor
from pennylane_qattn.transforms import without_autocast


class CircuitLayer(qml.qnn.TorchLayer):
    """PennyLane's `TorchLayer` of a `Circuit`, `(..., features)` -> `(..., words)`, run as an `Execution` says.

    It is a `TorchLayer` (with its QNode in `qnode`) that differs where PennyLane's falls short (0.45): batches of
    inputs that need gradients work with every method; an amplitude-encoded input has a finite gradient everywhere;
    one vector-Jacobian product is taken instead of a row per observable; equal inputs run forward once; angles keep
    their precision whatever that of the input; and the layer can be copied, pickled and sent to another process.

    Args:
        circuit: what is run.
        execution: how, or the name of an executor.
        init_method: of the angles, as for `TorchLayer`; by default uniform in [0, 2 pi).

    Shapes:
        `weights`: `circuit.weight_shape`, radians.

    Raises:
        ValueError: if it cannot be run so; the message names what can.

    >>> layer = CircuitLayer(Circuit(4, ("ZI", "XX")), Execution(executor="qnode", device="lightning.qubit"))
    >>> layer(torch.randn(3, 5, 4)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(self, circuit: Circuit, execution: Execution | str = "auto", init_method: Any = None):
        self._executor = make_executor([circuit], execution)
        super().__init__(_qnode(self._executor), {"weights": circuit.weight_shape}, init_method)

    @property
    def circuit(self) -> Circuit:
        """What is run."""
        return self._executor.circuits[0]

    @property
    def executor(self) -> Executor:
        """What runs it; `executor.plan.explain()` says why."""
        return self._executor

    def make_executor(self, execution: Execution | str, index: int = 0, meter: Meter | None = None) -> Executor:
        """An executor for this circuit; `index` sets the shots of several layers apart, and `meter` counts for all."""
        return make_executor([self.circuit], execution, index, meter=meter)

    def set_execution(self, execution: Execution | str) -> None:
        """Runs the circuit that way from now on; the angles stay as they are.

        `pennylane_qattn.set_execution` does so for all layers of a model, and sets their shots apart.
        """
        self.use(self.make_executor(execution), execution)

    def use(self, executor: Executor, execution: Execution | str, index: int = 0) -> None:
        """Runs the circuit by that executor, which was made for it."""
        self._executor = executor
        self.qnode = _qnode(executor)

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch words"]:
        if inputs.shape[-1] != self.circuit.num_features:
            raise ValueError(
                f"inputs must end in {self.circuit.num_features} features; got shape {tuple(inputs.shape)}"
            )
        with without_autocast(inputs.device):
            dtype = torch.promote_types(torch.promote_types(inputs.dtype, self.weights.dtype), torch.float32)
            rows = inputs.reshape(1, math.prod(inputs.shape[:-1]), inputs.shape[-1]).to(dtype)
            values = self._executor.expectations(rows, self.weights[None].to(dtype))
        return values[0].reshape(*inputs.shape[:-1], len(self.circuit.words)).to(inputs.dtype)

    def _apply(self, fn, recurse=True):
        return super()._apply(at_least_float32(fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "qnode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "qnode", _qnode(state["_executor"]))
        super().__setstate__(state)

    def __repr__(self) -> str:
        circuit = self.circuit
        return (
            f"CircuitLayer(features={circuit.num_features}, words={len(circuit.words)}, qubits={circuit.num_wires}, "
            f"ansatz={circuit.ansatz.label}, encoding={circuit.encoding.name}, executor={self._executor.name})"
        )

    __str__ = __repr__


def _qnode(executor: Executor) -> qml.QNode:
    if isinstance(executor, QNodeExecutor):
        return executor.qnode()
    assert isinstance(executor, FoldedExecutor)
    return executor.circuits[0].qnode()
