"""The model and the batch that are timed: as plain data, and built."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.compiling import compile_in_place
from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import Mechanism


@dataclass(frozen=True)
class Setup:
    """A GPT and a batch, as plain as a process is handed them.

    Args:
        config: of the GPT.
        mechanism: its attention.
        batch: windows in a batch; each has `config.block_size` tokens and one more to predict.
        device: where it runs.
        dtype: `"float32"`, or `"bfloat16"` by autocast.
        compile: the mode of `torch.compile`; `None` for none.
    """

    config: GPTConfig
    mechanism: Mechanism
    batch: int
    device: str = "cpu"
    dtype: str = "float32"
    compile: str | None = None

    def model(self) -> GPT:
        """The model; its weights are the same on every call."""
        torch.manual_seed(0)
        model = GPT(self.config, self.mechanism).to(self.device)
        if self.compile:
            compile_in_place(model, self.compile)
        return model

    def tokens(self) -> Tensor:
        """Random windows `(batch, block_size + 1)`, the same ones for every mechanism."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.config.block_size + 1
        return torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)

    def precision(self) -> contextlib.AbstractContextManager:
        """Within it, torch computes in that dtype."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

    def to_plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**vars(self), "config": self.config.to_plain(), "mechanism": self.mechanism.to_plain()}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "Setup":
        """What `to_plain` wrote."""
        described = {
            "config": GPTConfig.from_plain(data["config"]),
            "mechanism": Mechanism.from_plain(data["mechanism"]),
        }
        return cls(**{**data, **described})
