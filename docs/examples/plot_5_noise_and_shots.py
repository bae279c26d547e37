"""
Noise and shots
===============

With shots an expectation value scatters about the exact one; with noise it is another value. The first error goes away
with more measurements, the second does not.
"""

# %%
# One circuit of two qubits and three Pauli words. Its exact values come from folding it.

import matplotlib.pyplot as plt
import torch

from pennylane_qattn import Circuit, CircuitLayer, Execution, Noise, set_execution

torch.manual_seed(0)
layer = CircuitLayer(Circuit(4, ("ZI", "XX", "IY"))).double()
x = torch.randn(16, 4, dtype=torch.float64)
with torch.no_grad():
    exact = layer(x)

# %%
# More shots, with and without noise. The circuit is sampled on a simulator of mixed states, with depolarising noise
# after each gate in the second run.

shots = [10, 30, 100, 300, 1000, 3000, 10000]
errors = {}
for name, noise in (("no noise", Noise()), ("depolarizing=0.02", Noise(depolarizing=0.02))):
    errors[name] = []
    for number in shots:
        set_execution(layer, Execution(device="default.mixed", shots=number, noise=noise, seed=1))
        with torch.no_grad():
            errors[name].append((layer(x) - exact).square().mean().sqrt().item())

# %%
# The line is what statistics says of exact sampling: a Pauli word of mean m scatters by the root of (1 - m²) over the
# shots. The noisy circuit stops where its bias is as large as its scatter.

scatter = (1 - exact.square()).mean().sqrt().item()
figure, axes = plt.subplots()
for (name, found), marker in zip(errors.items(), "os", strict=True):
    axes.plot(shots, found, marker, label=name)
axes.plot(shots, [scatter / number**0.5 for number in shots], color="black", label="theory without noise")
axes.set(xscale="log", yscale="log", xlabel="shots of each setting", ylabel="error, root mean square")
axes.set_title("What shots can mend, and what they cannot")
axes.legend()
plt.show()
