"""Shared fixtures: precision with its tolerances, and shape checking of every annotated signature."""

import pytest
import torch
from jaxtyping import install_import_hook

# Every call into the package has its tensor shapes checked against the signature.
install_import_hook("pennylane_qattn", "beartype.beartype")

from lightning_modules import progress  # noqa: E402  it imports what the hook checks

torch.set_num_threads(1)

#: Absolute and relative tolerance of exact methods by precision; the same everywhere.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """However slow the machine is, no line of progress comes between those that a test expects."""
    monkeypatch.setattr(progress, "EVERY", 3600.0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def close(dtype):
    """Asserts that two tensors agree to the tolerance of the precision under test."""

    def check(actual, expected, factor: float = 1.0):
        tolerance = TOLERANCES[dtype] * factor
        expected = torch.as_tensor(expected)
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1234)
