"""
Train a language model and sample from it
=========================================

A GPT whose attention values are measured on circuits learns a random language. The entropy of that language is known
exactly, so the loss curve has a floor to be compared with.
"""

# %%
# The corpus ``markov`` is a Markov chain: each symbol depends on the two before it, here. The data module draws a text
# from it, cuts it into windows, and knows the source.

import lightning as L
import matplotlib.pyplot as plt
import torch

from lightning_modules.data import TextDataModule
from lightning_modules.language_model import LanguageModel
from lightning_modules.training_cli import quiet
from pennylane_qattn import QISA

quiet()  # no tips of Lightning's between the lines
torch.manual_seed(0)
corpus = "markov:order=2,symbols=5,seed=1,length=100000"
data = TextDataModule(corpus, block_size=16, batch_size=64, eval_windows=512)
print(data, data.corpus.text[:60], sep="\n")

# %%
# The model is two blocks of width 16. QISA is one of the mechanisms; ``split`` gives each of the two heads its own
# eight numbers, which three qubits hold.

options = dict(num_layers=2, num_heads=2, dropout=0.0, learning_rate=0.01, warmup_steps=20)
model = LanguageModel(data.tokenizer, attention=QISA(split=True), **options)


class Losses(L.Callback):
    """Keeps the training loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


losses = Losses()
quietly = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(max_steps=200, accelerator="cpu", callbacks=[losses], **quietly)
trainer.fit(model, data)
trainer.validate(model, data, verbose=False)

# %%
# What it writes after a prompt. The language has no words; what matters is which symbols follow which.

print(model.generate(["abc"], max_new_tokens=60, seed=0)[0])

# %%
# The entropy rate is what the best predictor needs that has seen an endless past. The first symbols of a window have
# next to none, so the best there can be is higher for them; the data module computes it for each position. The model is
# near the best at the first positions and falls behind at the later ones: no weight of a row of QISA exceeds another by
# more than a factor e, so in a long row the two symbols that matter get little of the whole.

floor = data.source.entropy_rate
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
left.plot(losses.values, label="training loss")
left.axhline(floor, color="black", linestyle="--", label=f"entropy rate, {floor:.2f} nats")
left.set(xlabel="step", ylabel="cross-entropy, nats per symbol", title="QISA learns a Markov chain")
right.plot(model.cross_entropy_per_position["val"], "o-", label="model")
right.plot(model.optimum_per_position["val"], "k--", label="best possible")
right.set(xlabel="position in the window", title="after training, validation text")
for axes in (left, right):
    axes.legend()
plt.show()
