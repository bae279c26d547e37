"""
Fold a circuit
==============

PennyLane describes the circuit; folding turns it into one real matrix per input width. The features are then squares of
a matrix product, exact, differentiable, and without a simulator.
"""

# %%
# A circuit of your own, as PennyLane writes it. ``"wires"`` in the shape is the number of wires.

import matplotlib.pyplot as plt
import pennylane as qml
import torch

from pennylane_qattn import Circuit, FunctionAnsatz
from pennylane_qattn.execution import make_executor
from pennylane_qattn.folding import Fold

torch.manual_seed(0)


def ladder(weights, wires):
    for wire, angle in zip(wires, weights[0], strict=True):
        qml.RY(angle, wires=wire)
    for left, right in zip(wires, wires[1:], strict=False):
        qml.CNOT(wires=[left, right])
    for wire, angle in zip(wires, weights[1], strict=True):
        qml.RX(angle, wires=wire)


circuit = Circuit(8, ("ZII", "IZZ", "XXX"), ansatz=FunctionAnsatz(ladder, (2, "wires")))
weights = torch.rand(circuit.weight_shape, dtype=torch.float64) * 6.28
x = torch.randn(5, 8, dtype=torch.float64)
figure = circuit.draw()
figure.set_size_inches(7, 3)

# %%
# Folded by hand: with the matrix A of all measurement settings and the signs S of the words, the features of a
# normalised vector a are (A a)² S.

fold = Fold(circuit.ansatz.program(3), 3, [circuit.words], dtype=torch.float64, device=torch.device("cpu"))
matrix, signs = (part[0] for part in fold.readout(*fold.evolve(weights[None], 8)))
a = x / x.norm(dim=1, keepdim=True)
by_hand = (a @ matrix.T).square() @ signs

# %%
# The same numbers from the executor that models use, and from PennyLane's QNode.

folded = make_executor([circuit], "folded").expectations(x[None], weights[None])[0]
qnode = torch.stack(circuit.qnode()(x, weights), dim=-1)
print("by hand", (by_hand - qnode).abs().max().item(), "executor", (folded - qnode).abs().max().item())

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
left.imshow(matrix.T.numpy(), cmap="RdBu", vmin=-1, vmax=1)
left.set(title="A, transposed", xlabel="outcome of a setting: real parts, imaginary parts", ylabel="amplitude")
right.plot(qnode.flatten(), folded.flatten(), "o")
right.plot([-1, 1], [-1, 1], color="black", linewidth=0.8)
right.set(title="expectation values", xlabel="PennyLane's QNode", ylabel="folded")
plt.show()
