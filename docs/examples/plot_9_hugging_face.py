"""
One layer in a Hugging Face model
=================================

The attention of a GPT-2 of ``transformers`` gives way to that of QISA; everything else of the model stays. Then both
are trained on the same text and certified.
"""

# %%
# A small GPT-2 with random weights, and another one whose attention is replaced. A block of theirs calls its attention
# with the hidden states and expects the output and the weights, or ``None`` for these.

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_modules.data import TextDataModule
from pennylane_qattn import build_attention, certify

torch.manual_seed(0)
data = TextDataModule("markov:order=2,symbols=5,seed=1,length=50000", block_size=16, batch_size=32)
config = GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, vocab_size=5, bos_token_id=None, eos_token_id=None)


class InGPT2(torch.nn.Module):
    """An attention of this package as a block of GPT-2 calls it."""

    def __init__(self, layer):
        super().__init__()
        self.attention = build_attention("qisa", 16, 2, 16, layer=layer, split=True)

    def forward(self, hidden_states, **_):
        return self.attention(hidden_states), None


quantum = GPT2LMHeadModel(config)
for layer, block in enumerate(quantum.transformer.h):
    block.attn = InGPT2(layer)

# %%
# The attention knows nothing of the key/value cache of ``transformers``, so the model is to be called without one. A
# module that does so is all that training and the certificate see.


class Logits(torch.nn.Module):
    """Tokens to logits, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


# %%
# Both see the same batches. The dashed line is the entropy of the source, which no model can go below on average.

figure, axes = plt.subplots()
for name, model in {"GPT-2": Logits(GPT2LMHeadModel(config)), "GPT-2 with QISA": Logits(quantum)}.items():
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _, (tokens, targets) in zip(range(150), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
        losses[-1].backward()
        optimizer.step()
    axes.plot(torch.stack(losses).detach(), label=name)
    print(f"{name}: {certify(model, vocab_size=5, length=8).verdict}")

axes.axhline(data.source.entropy_rate, color="black", linestyle="--", label="entropy rate of the text")
axes.set(xlabel="step", ylabel="cross-entropy, nats per symbol", title="GPT-2 of Hugging Face, attention replaced")
axes.legend()
plt.show()
