"""PennyLane's own `TorchLayer` of a circuit, by its documentation: what circuits are compared with."""

import argparse

import pennylane as qml
import torch
from pennylane.exceptions import QuantumFunctionError
from torch import Tensor, nn

from lightning_modules.timing import forward_and_backward
from pennylane_qattn import Circuit
from pennylane_qattn.devices import installed_devices
from pennylane_qattn.observables import to_pennylane
from pennylane_qattn.planning import METHODS


def pair(text: str) -> tuple[str, str]:
    """Reads `DEVICE:METHOD`.

    Raises:
        argparse.ArgumentTypeError: if there is no such device here, or no such method.
    """
    device, _, method = text.partition(":")
    if device not in (known := installed_devices()):
        raise argparse.ArgumentTypeError(f"unknown device {device!r}; choose from {', '.join(sorted(known))}")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"the method of {device} must be one of {', '.join(METHODS)}; got {method!r}")
    return device, method


def plain_layer(circuit: Circuit, device: str, method: str) -> qml.qnn.TorchLayer:
    """A `TorchLayer` of the circuit whose embedding normalises and pads; its angles are called `weights`.

    Raises:
        ValueError: if PennyLane makes no QNode of that device with that method.
    """
    wires = range(circuit.num_wires)

    def function(inputs, weights):
        qml.AmplitudeEmbedding(inputs, wires=wires, pad_with=0.0, normalize=True)
        circuit.ansatz(weights, wires)
        return [qml.expval(to_pennylane(word, wires)) for word in circuit.words]

    try:
        qnode = qml.QNode(function, qml.device(device, wires=circuit.num_wires), interface="torch", diff_method=method)
    except QuantumFunctionError:
        raise ValueError(f"PennyLane has no {method} on {device}; choose another method") from None
    return qml.qnn.TorchLayer(qnode, {"weights": circuit.weight_shape})


def refusal(layer: nn.Module, inputs: Tensor) -> str:
    """Why a layer cannot be trained on inputs that need gradients; empty if it can."""
    try:
        gradient = forward_and_backward(layer, inputs)
    except Exception as error:  # whatever PennyLane raises
        return f"raises {type(error).__name__}"
    return "" if torch.isfinite(gradient).all() else "NaN gradients"
