"""How many executions circuits need: circuits sent to a device, each with one input, one set of angles, one setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pennylane_qattn.ansatz import Ansatz
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.encoding import Encoding
from pennylane_qattn.gradients import JACOBIANS, state_shift_rule
from pennylane_qattn.observables import group_words
from pennylane_qattn.planning import METHODS
from pennylane_qattn.program import Gate
from pennylane_qattn.tapes import encoding_gates


@dataclass(frozen=True)
class Executions:
    """Executions for one input of one circuit.

    Attributes:
        forward: for the expectation values.
        angles: more of them, for the gradient with respect to the angles.
        inputs: more of them, for the gradient with respect to the input.
    """

    forward: int
    angles: int
    inputs: int

    @property
    def total(self) -> int:
        return self.forward + self.angles + self.inputs


def inference_executions(circuit: Circuit, sampling: bool = False) -> int:
    """Executions for the expectation values at one input: one, or when sampling one for each setting."""
    return settings_of(circuit.words) if sampling else 1


def training_executions(
    circuit: Circuit,
    method: str,
    *,
    sampling: bool = False,
    gives_states: bool = True,
    for_states: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Executions | None:
    r"""Executions for expectation values and all gradients at one input, as the executor `qnode` runs them.

    - `backprop`: 1, for everything.
    - `adjoint`: 1 forward and 1 backward, for all angles.
    - `parameter-shift`: 2 for each gate of the two-term rule, 4 for each of the four-term rule.
    - `finite-diff`: 2 for each gate (central differences).
    - `spsa`: 2 for each random direction.
    - `hadamard`: 1 for each Pauli word in the gates' generators, with one qubit more; at most, as PennyLane leaves out
      gates that no word of a setting can see.

    Where gates encode the input, they count among the gates. Amplitudes take 1 more where the device gives states, 2
    for each number, by polarisation, where it gives values alone. When sampling, each is run once for each setting.

    Args:
        circuit: the circuit.
        method: one of `METHODS`.
        sampling: expectation values come from shots.
        gives_states: the device gives states; never when sampling.
        for_states: the final state is wanted, not the words; its derivatives come from shifted states whatever the
            method, backprop apart.
        options: of the method, such as `num_directions` of spsa.

    Returns:
        The executions, or `None` where the method cannot be used.

    Raises:
        ValueError: for an unknown method or option.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    jacobian = JACOBIANS[method](method, options or {}) if method in JACOBIANS else None
    of_input, of_angles = _gates_with_angles(circuit.num_features, circuit.encoding, circuit.ansatz)
    by_gates = circuit.encoding.uses_gates
    if sampling and (jacobian is None or for_states) or for_states and not gives_states:
        return None
    if method == "backprop":
        return Executions(1, 0, 0)
    by_state = 0 if by_gates else 1
    if for_states:
        shifts = [sum(len(state_shift_rule(gate)) for gate in gates) for gates in (of_angles, of_input)]
        return Executions(1, shifts[0], shifts[1] + by_state)
    settings = settings_of(circuit.words) if sampling else 1
    entries = circuit.encoding.num_amplitudes(circuit.num_features)
    amplitudes = by_state if gives_states and not sampling else 2 * entries * settings * by_state
    if jacobian is None:
        return Executions(1, 1 if of_angles or of_input else 0, amplitudes)
    angles, everything = (jacobian.executions(gates, settings) for gates in (of_angles, of_input + of_angles))
    return Executions(settings, angles, everything - angles + amplitudes)


@lru_cache(maxsize=4096)
def settings_of(words: tuple[str, ...]) -> int:
    """Measurement settings: groups of words that commute wire by wire."""
    return len(group_words(words))


@lru_cache(maxsize=64)
def _gates_with_angles(num_features: int, encoding: Encoding, ansatz: Ansatz) -> tuple[list[Gate], list[Gate]]:
    wires = encoding.num_wires(num_features)
    circuit = Circuit(num_features, ("Z" * wires,), encoding, ansatz)
    encode = encoding_gates(circuit) if encoding.uses_gates else ()
    turn = ansatz.program(circuit.num_wires).gates
    return [gate for gate in encode if gate.angle is not None], [gate for gate in turn if gate.angle is not None]
