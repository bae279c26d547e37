"""Shared fixtures: precision with its tolerances, and shape checking of every annotated signature."""

import zlib

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Calls into the package have their tensor shapes checked against the signature.
install_import_hook("pennylane_qattn", "beartype.beartype")

from lightning_modules import progress  # noqa: E402  it imports what the hook checks

torch.set_num_threads(1)

#: Absolute and relative tolerance of exact methods by precision; the same everywhere.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


#: Checking shapes takes twice as long as what is checked: by their names, one test in so many has it done.
CHECKED = 4


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="check shapes against signatures in every test")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    is_checked = item.config.getoption("--all-shapes") or zlib.crc32(item.nodeid.encode()) % CHECKED == 0
    jaxtyping.config.update("jaxtyping_disable", not is_checked)


@pytest.fixture
def without_shape_checks():
    """For this test alone, as a user has it."""
    jaxtyping.config.update("jaxtyping_disable", True)


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
