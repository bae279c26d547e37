"""
Certify a model
===============

``certify`` finds out whether a module sees the future, by changing it and looking. Here for a causal attention, for the
same attention as it was published, and for a module that is not made here and masks one token too few.
"""

# %%
# A certificate has a verdict. Where there is a leak, it says in which layer, and from which token to which.

import matplotlib.pyplot as plt
import torch

from pennylane_qattn import build_attention, certify

torch.manual_seed(0)
length, width = 8, 8


class OffByOne(torch.nn.Module):
    """Masks everything from the token after the next one on, which is one too late."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(2)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


modules = {
    "qisa": build_attention("qisa", embed_dim=width, num_heads=2, block_size=length),
    "qisa-published": build_attention("qisa-published", embed_dim=width, num_heads=2, block_size=length),
    "a mask that is off by one": OffByOne(),
}
certificates = {name: certify(module, embed_dim=width, length=length) for name, module in modules.items()}
for name, certificate in certificates.items():
    print(f"{name}: {certificate.verdict}", certificate.leak or "", sep="\n    ")

# %%
# The picture is what the certificate looks for: how much output i moves when input j is changed. Above the diagonal
# there must be nothing.


def influence(module):
    """How much each output depends on each input, (outputs, inputs)."""
    x = torch.randn(1, length, width)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], x)  # (outputs, width, 1, inputs, width)
    return jacobian[:, :, 0].square().sum((1, 3)).sqrt()


figure, panels = plt.subplots(1, 3, figsize=(9, 3.6))
for axes, (name, module) in zip(panels, modules.items(), strict=True):
    axes.imshow(influence(module).clamp(min=1e-6).log10().numpy(), cmap="viridis", vmin=-4, vmax=0)
    axes.plot([-0.5, length - 0.5], [-0.5, length - 0.5], color="white", linewidth=1)
    axes.set(title=f"{name}\n{certificates[name].verdict}", xlabel="input token", ylabel="output token")
plt.show()
