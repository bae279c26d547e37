"""
Swap the device
===============

The same attention, with the same parameters, runs folded in torch and as QNodes on PennyLane's devices. The numbers are
the same; what differs is how they come about, and what they cost.
"""

# %%
# ``set_execution`` says how the circuits in a module are run. The module is not changed in anything else.

import matplotlib.pyplot as plt
import torch

from pennylane_qattn import Execution, build_attention, set_execution

torch.manual_seed(0)
attention = build_attention("qisa", embed_dim=8, num_heads=2, block_size=6).double()
x = torch.randn(1, 6, 8, dtype=torch.float64)
folded = attention(x)

executions = {
    "default.qubit\nbackprop": Execution(executor="qnode", device="default.qubit", diff_method="backprop"),
    "lightning.qubit\nadjoint": Execution(executor="qnode", device="lightning.qubit", diff_method="adjoint"),
    "lightning.qubit\nparameter-shift": Execution(
        executor="qnode", device="lightning.qubit", diff_method="parameter-shift"
    ),
    "default.mixed\nparameter-shift": Execution(
        executor="qnode", device="default.mixed", diff_method="parameter-shift"
    ),
}

# %%
# Each device runs forward and backward. An execution is one circuit that is sent to the device, with one setting.

differences, counts = {}, {}
for name, execution in executions.items():
    (plan,) = set_execution(attention, execution)
    out = attention(x)
    out.sum().backward()
    differences[name] = (out - folded).abs().max().item()
    counts[name] = attention.value_map.executor.meter.executions
    print(plan.explain())

# %%
# All four agree with the folded circuits to the last digits of double precision. Their prices do not: adjoint takes one
# circuit more for all angles together, parameter-shift two for each angle.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.bar(list(differences), differences.values(), color="tab:blue")
left.set(yscale="log", ylim=(1e-17, 1e-9), title="largest difference to folded")
right.bar(list(counts), counts.values(), color="tab:orange")
right.set(yscale="log", title="circuits executed, forward and backward")
for axes in (left, right):
    axes.tick_params(axis="x", labelsize=7)
plt.show()
