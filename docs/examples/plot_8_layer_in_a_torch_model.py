"""
One layer in a plain torch model
================================

``CircuitLayer`` is a layer like any other: here between two linear layers of a classifier, trained by a loop of torch
alone.
"""

# %%
# Two moons: points on two half circles, to be told apart.

import matplotlib.pyplot as plt
import torch
from torch import nn

from pennylane_qattn import Circuit, CircuitLayer

torch.manual_seed(0)
angle = torch.rand(400) * torch.pi
label = torch.arange(400) % 2
circle = torch.stack((angle.cos(), angle.sin()), 1)
moons = torch.where(label[:, None] == 0, circle, torch.tensor([1.0, 0.5]) - circle)
x = moons + 0.12 * torch.randn(400, 2)

# %%
# Four numbers are the amplitudes of two qubits; three Pauli words are what comes out.

circuit = CircuitLayer(Circuit(4, ("ZI", "IZ", "XX")))
model = nn.Sequential(nn.Linear(2, 4), circuit, nn.Linear(3, 1))
print(circuit, "runs", circuit.executor.plan.explain())

optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for _ in range(300):
    optimizer.zero_grad()
    loss = nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], label.float())
    loss.backward()
    optimizer.step()
accuracy = ((model(x)[:, 0] > 0) == label.bool()).float().mean().item()
print(f"loss {loss.item():.3f}, accuracy {accuracy:.3f}")

# %%
# What it has learned: the probability of the second moon, over the plane.

side = torch.linspace(-1.6, 2.6, 120)
grid = torch.cartesian_prod(side, side)
with torch.no_grad():
    probability = model(grid)[:, 0].sigmoid().view(120, 120).T
figure, axes = plt.subplots(figsize=(5.5, 5))
axes.contourf(side, side, probability, levels=20, cmap="RdBu", vmin=0, vmax=1)
axes.contour(side, side, probability, levels=[0.5], colors="black")
axes.scatter(*x.T, c=label, cmap="RdBu", edgecolor="white", s=18)
axes.set(xlim=(-1.6, 2.6), ylim=(-1.3, 1.8), title="two qubits between two linear layers")
plt.show()
