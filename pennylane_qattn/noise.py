"""A noise model in three numbers, as channels that PennyLane's mixed-state devices simulate."""

from collections.abc import Sequence
from dataclasses import dataclass

import pennylane as qml
from pennylane.operation import Operator


@dataclass(frozen=True, kw_only=True)
class Noise:
    r"""Noise after every gate, the state preparation counting as one, on each wire it acts on; and at the readout.

    Args:
        depolarizing: probability :math:`p` of X, Y or Z, equally likely; a Bloch vector shrinks by :math:`1 - 4p/3`.
        amplitude_damping: probability of falling from :math:`|1\rangle` to :math:`|0\rangle`.
        readout: probability that a measured bit is flipped; a Pauli word on :math:`w` wires shrinks by
            :math:`(1 - 2r)^w`.
    """

    depolarizing: float = 0.0
    amplitude_damping: float = 0.0
    readout: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("depolarizing", 1.0), ("amplitude_damping", 1.0), ("readout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"noise.{name} is a probability in [0, 1]; got {value!r}")

    def __bool__(self) -> bool:
        return bool(self.depolarizing or self.amplitude_damping or self.readout)

    def after_gate(self, wires: Sequence[int]) -> list[Operator]:
        """The channels that follow a gate on these wires."""
        channels: list[Operator] = []
        for wire in wires:
            if self.amplitude_damping:
                channels.append(qml.AmplitudeDamping(self.amplitude_damping, wire))
            if self.depolarizing:
                channels.append(qml.DepolarizingChannel(self.depolarizing, wire))
        return channels

    def before_readout(self, wires: Sequence[int]) -> list[Operator]:
        """The channels between the last change of basis and the measurement."""
        return [qml.BitFlip(self.readout, wire) for wire in wires] if self.readout else []
