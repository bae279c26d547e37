"""
One layer in a Hugging Face model
=================================

The attention of a GPT-2 of ``transformers`` gives way to that of QISA; everything else of the model stays. Then both
are trained on the same text and certified, and the new one writes.
"""

# %%
# A small GPT-2 with random weights, and the same model with another attention, by its name.

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_modules.data import TextDataModule
from lightning_modules.hugging_face import replace_attention
from pennylane_qattn import certify

torch.manual_seed(0)
data = TextDataModule("markov:order=2,symbols=5,seed=1,length=50000", block_size=16, batch_size=32)
config = GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, vocab_size=5, bos_token_id=None, eos_token_id=None)
classical = GPT2LMHeadModel(config)
quantum = replace_attention(classical, "qisa", split=True)

# %%
# Both see the same batches.

curves = {}
for name, model in {"GPT-2": classical, "GPT-2 with QISA": quantum}.items():
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    losses = []
    for _, (tokens, targets) in zip(range(150), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()))
        losses[-1].backward()
        optimizer.step()
    curves[name] = torch.stack(losses).detach()
    print(f"{name}: {certify(model, vocab_size=5, length=8).verdict}")

# %%
# ``generate`` of ``transformers`` runs the new one with their cache of keys and values.

start = torch.tensor([[0, 1], [2, 3]])
texts = quantum.eval().generate(start, max_new_tokens=12, attention_mask=torch.ones_like(start), pad_token_id=0)
print(*("".join(map(str, text.tolist())) for text in texts), sep="\n")

# %%
# What both have learned. The dashed line is the entropy of the source, which no model can go below on average.

figure, axes = plt.subplots()
for name, curve in curves.items():
    axes.plot(curve, label=name)
axes.axhline(data.source.entropy_rate, color="black", linestyle="--", label="entropy rate of the text")
axes.set(xlabel="step", ylabel="cross-entropy, nats per symbol", title="GPT-2 of Hugging Face, attention replaced")
axes.legend()
plt.show()
