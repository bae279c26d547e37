"""
Grover search on an attention matrix
====================================

A row of attention is searched for its large entries. The search is simulated exactly and its oracle calls are counted;
the entries that it finds are kept, and all others are taken for one constant.
"""

# %%
# Queries and keys are random but for a few keys of each row that are planted: those have large scores.

import matplotlib.pyplot as plt
import torch

from pennylane_qattn.grover.bounds import bound
from pennylane_qattn.grover.rivals import QuantumFinder, ScoreRows
from pennylane_qattn.grover.sparse import SparseAttention
from pennylane_qattn.grover.support import DotProductScores, midrange_shift

torch.manual_seed(0)
n, d = 64, 256
k = torch.randn(n, d, dtype=torch.float64)
planted = torch.randint(0, n, (n, 2)) % torch.arange(1, n + 1)[:, None]  # keys that the row may see
q = 0.3 * k[planted].sum(1)
v = torch.randn(n, 8, dtype=torch.float64)

# %%
# The search does not know how many keys there are to find. Each key that it reports was verified. On rows as short as
# these it costs more than a scan would; :doc:`the page on Grover search </grover>` says from where on it costs less.

found = QuantumFinder(seed=0).above(ScoreRows.from_vectors(q, k), tau=3.0)
print(f"{len(found.keys)} keys found by {found.total} calls; a scan of the causal matrix is {n * (n + 1) // 2}")

# %%
# The operator keeps what was found. Its error is bounded row by row, and the bound can be compared with the truth.

scores = DotProductScores(q, k)
support = found.support()
operator = SparseAttention(scores, support, midrange_shift(scores, support))
certificate = bound(operator)
exact = torch.softmax((q @ k.T / d**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf), -1)
print("largest error of an output", (operator.attend(v) - exact @ v).abs().max().item())

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.6))
left.imshow(exact.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
left.set(title="attention, exact", xlabel="key", ylabel="query")
middle.imshow(operator.to_dense(normalised=True).sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
middle.set(title="found entries, constant elsewhere", xlabel="key")
right.plot(certificate.true_l1, ".", label="true error")
right.plot(certificate.l1, "-", linewidth=1, label="bound")
right.set(title="error of a row, ℓ₁", xlabel="query", ylim=0)
right.legend()
plt.show()
