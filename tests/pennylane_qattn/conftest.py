"""Small inputs go the way of large batches here, since few tokens are done more simply."""

import pytest

from pennylane_qattn import augmentation, measurement, quadratic

FEWEST = {
    (measurement, "FEWEST_TOKENS"): measurement.FEWEST_TOKENS,
    (quadratic, "FEWEST_TOKENS"): quadratic.FEWEST_TOKENS,
    (augmentation, "FEWEST_NUMBERS"): augmentation.FEWEST_NUMBERS,
}


@pytest.fixture(autouse=True, scope="module")
def many_tokens():
    """No input is too small for kernels and blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in FEWEST:
            patch.setattr(module, name, 0)
        yield


@pytest.fixture
def few_tokens(many_tokens, monkeypatch):
    """Small inputs are recognised as such, as they are outside the tests."""
    for (module, name), value in FEWEST.items():
        monkeypatch.setattr(module, name, value)
