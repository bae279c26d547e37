"""Parameter-shift rules of gates."""

import pennylane as qml
import pytest

from pennylane_qattn.gradients import shift_rule
from pennylane_qattn.program import ROTATIONS, Gate


@pytest.mark.parametrize("name", sorted(ROTATIONS))
def test_every_gate_with_an_angle_has_a_rule(name):
    """One that differentiates sines and cosines of the gate's frequencies, of which PSWAP has 1 alone."""
    wires = tuple(range(getattr(qml, name).num_wires or 2))
    rule = shift_rule(Gate(name, wires, angle=0, word="XY" if name == "PauliRot" else None))
    controlled = name in ("CRX", "CRY", "CRZ", "IsingXY", "SingleExcitation", "DoubleExcitation")
    for frequency in (0.5, 1.0) if controlled else (1.0,):
        at = 0.7 / frequency
        with_sine = sum(c * qml.math.sin(frequency * (at + shift)) for c, shift in rule)
        with_cosine = sum(c * qml.math.cos(frequency * (at + shift)) for c, shift in rule)
        assert with_sine == pytest.approx(frequency * qml.math.cos(0.7))
        assert with_cosine == pytest.approx(-frequency * qml.math.sin(0.7))
    assert sum(c for c, _ in rule) == pytest.approx(0, abs=1e-12)
