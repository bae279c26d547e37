"""Shared fixtures: precision with its tolerances, and shape checking of every annotated signature."""

import pytest
import torch
from jaxtyping import install_import_hook

# Every call into the package has its tensor shapes checked against the signature.
install_import_hook("pennylane_qattn", "beartype.beartype")

torch.set_num_threads(1)

# The small inputs of tests go the way of large batches; that few tokens, which are done more simply, give the same is
# tested where it is decided.
from pennylane_qattn import double_exponential, measurement, quadratic  # noqa: E402 after the hook

FEWEST = {
    (measurement, "FEWEST_TOKENS"): measurement.FEWEST_TOKENS,
    (quadratic, "FEWEST_TOKENS"): quadratic.FEWEST_TOKENS,
    (double_exponential, "FEWEST_NUMBERS"): double_exponential.FEWEST_NUMBERS,
}
for _module, _name in FEWEST:
    setattr(_module, _name, 0)


@pytest.fixture
def few_tokens(monkeypatch):
    """Small inputs are recognised as such, as they are outside the tests."""
    for (module, name), value in FEWEST.items():
        monkeypatch.setattr(module, name, value)


#: Absolute and relative tolerance of exact methods by precision; the same everywhere.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


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
