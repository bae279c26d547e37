"""
Parameter-shift against adjoint
===============================

Both are exact. What they cost grows in another way with the size of the circuit: adjoint walks back through the circuit
once, in a simulator; parameter-shift runs other circuits, two for each angle, which any device can do.
"""

# %%
# First that they agree: gradients of a circuit on four qubits, by its angles, at the same point.

import matplotlib.pyplot as plt
import torch

from pennylane_qattn import Circuit, CircuitLayer, Execution
from pennylane_qattn.counting import training_executions

torch.manual_seed(0)
circuit = Circuit(16, ("ZIII", "XXII", "IYZX"))
x = torch.randn(3, 16, dtype=torch.float64)
angles = torch.rand(circuit.weight_shape, dtype=torch.float64)

gradients = {}
for method in ("adjoint", "parameter-shift"):
    layer = CircuitLayer(circuit, Execution(executor="qnode", device="lightning.qubit", diff_method=method)).double()
    layer.weights.data = angles.clone()
    layer(x).sum().backward()
    gradients[method] = layer.weights.grad.flatten()
print("largest difference", (gradients["adjoint"] - gradients["parameter-shift"]).abs().max().item())

# %%
# Then what they cost. ``training_executions`` counts without running anything. Widths of 4 to 1024 numbers are 2 to 10
# qubits, with three angles each.

widths = [2**n for n in range(2, 11)]
costs = {method: [] for method in gradients}
for method, totals in costs.items():
    for width in widths:
        wires = Circuit(width, ("Z" * (width.bit_length() - 1),))
        totals.append(training_executions(wires, method).total)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.plot(gradients["adjoint"], "o", label="adjoint")
left.plot(gradients["parameter-shift"], "x", label="parameter-shift")
left.set(xlabel="angle", ylabel="derivative", title="The same gradient, 4 qubits")
for method, totals in costs.items():
    right.plot(range(2, 11), totals, "o-", label=method)
right.set(xlabel="qubits", ylabel="circuits for one input", ylim=0, title="Executions, forward and backward")
for axes in (left, right):
    axes.legend()
plt.show()
