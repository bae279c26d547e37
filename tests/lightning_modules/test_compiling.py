"""`lightning_modules.compiling`: many models in one process, and no silent end of it."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from lightning_modules import compiling


class Repeated(nn.Module):
    """Each number of letters makes another graph of the same code."""

    def __init__(self, letters):
        super().__init__()
        self.letters = letters

    def forward(self, x):
        return x * len(self.letters)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Graphs are taken, and run by torch; torch's limits are its own again afterwards."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: plain(self, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def run(count):
    x = torch.arange(3.0)
    for number in range(count):
        model = Repeated("a" * number)
        compiling.compile_in_place(model, "default")
        assert torch.equal(model(x), number * x)
        assert list(model.state_dict()) == []


def test_more_models_than_torch_allows():
    run(20)


def test_no_plain_code_past_the_limit(monkeypatch):
    monkeypatch.setattr(compiling, "RECOMPILE_LIMIT", 9)
    with pytest.raises(FailOnRecompileLimitHit):
        run(20)
