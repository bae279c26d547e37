r"""Amplitude amplification over the keys of a row as PennyLane circuits, for any device and any gradient method.

A row's marks enter as angles of rotations, so a row is a `Circuit` without trainable angles whose *encoding* is the
whole algorithm (Brassard, Hoyer, Mosca, Tapp, quant-ph/0005055; fixed point: arXiv 1409.3305). What is measured are the
words of I and Z on the key register, which commute and share one setting; a Walsh-Hadamard transform makes
probabilities of them. So the executors run it like any other circuit, and every gradient method works, also adjoint on
devices that differentiate no probabilities.

- The uniform state of `n` keys, which need not be a power of two, is prepared by Möttönen's circuit.
- Amplitude oracle: one rotation :math:`RY(2\arcsin\sqrt{f_j})` of the ancilla for each key, as a multiplexer of
  :math:`2^q` rotations in Gray order (quant-ph/0404089). It stands in the circuit :math:`2R + 1` times.
- Phase oracle: :math:`e^{i\pi f_j}` on each key, as :math:`2^q - 1` rotations about words of Z. It stands there
  R times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pennylane_qattn.ansatz import ANSATZE, Ansatz
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.devices import Meter
from pennylane_qattn.encoding import ENCODINGS, Encoding
from pennylane_qattn.execution import as_execution, make_executor
from pennylane_qattn.executor import Executor
from pennylane_qattn.grover.amplification import amplified, fixed_point_phases, most_iterations
from pennylane_qattn.planning import Execution, Plan, make_plan
from pennylane_qattn.qnode import QNodeExecutor

#: Keys that one row's circuit may have: 10 qubits and the ancilla. Its gates are 2^q for every use of the oracle.
MAX_KEYS = 1024


def key_wires(num_keys: int) -> int:
    """Qubits of the key register: at least one."""
    return max(1, (num_keys - 1).bit_length())


# The two descriptions below are parts of one algorithm, so no registry offers them by name.


@dataclass(frozen=True)
class Amplification(Encoding):
    r"""The circuit of a row, from the preparation to the last reflection; its features are one angle per key.

    Args:
        iterations: :math:`R`.
        oracle: `"amplitude"`, angles :math:`2\arcsin\sqrt{f_j}`, with an ancilla behind the key register; or `"phase"`,
            angles :math:`\pi f_j`.
        delta: makes the amplitude oracle's schedule a fixed-point one of length :math:`2R + 1`; `None`: plain.
    """

    name = "amplification"
    registry = ENCODINGS
    uses_gates = True
    iterations: int = 0
    oracle: str = "amplitude"
    delta: float | None = None

    def num_wires(self, num_features: int) -> int:
        return key_wires(num_features) + (self.oracle == "amplitude")

    def amplitudes(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch amplitudes"]:
        if self.oracle != "amplitude" or self.delta is not None:
            raise ValueError("the amplitudes of this circuit are no real numbers; use executor qnode")
        mean = (x / 2).sin().square().mean(-1)
        a, b = amplified(mean, torch.full_like(mean, self.iterations).long(), self.iterations)
        pairs = torch.stack((b[..., None] * (x / 2).cos(), a[..., None] * (x / 2).sin()), dim=-1)
        state = pairs.flatten(-2) / math.sqrt(x.shape[-1])
        return torch.nn.functional.pad(state, (0, 2 ** self.num_wires(x.shape[-1]) - state.shape[-1]))

    def prepare(self, x: Float[Tensor, "*batch features"], wires: Sequence[int]) -> None:
        keys = x.shape[-1]
        angles = torch.nn.functional.pad(x, (0, 2 ** key_wires(keys) - keys))
        if self.oracle == "phase":
            self._with_phases(angles, keys, list(wires))
        else:
            self._with_ancilla(angles, keys, list(wires[:-1]), wires[-1])

    def _with_ancilla(self, angles: Tensor, keys: int, register: list[int], ancilla: int) -> None:
        prepare_uniform(keys, register)
        multiplexed_ry(angles, register, ancilla)
        if self.delta is None:
            steps = [(math.pi, math.pi)] * self.iterations
        else:
            steps = list(zip(*fixed_point_phases(2 * self.iterations + 1, self.delta), strict=True))
        for alpha, beta in steps:
            qml.Z(ancilla) if self.delta is None else qml.PhaseShift(beta, ancilla)
            # about the prepared state: back to |0...0>, its phase, and forth
            multiplexed_ry(-angles, register, ancilla)
            prepare_uniform(keys, register, back=True)
            phase_of_zero(alpha, [*register, ancilla])
            prepare_uniform(keys, register)
            multiplexed_ry(angles, register, ancilla)

    def _with_phases(self, angles: Tensor, keys: int, register: list[int]) -> None:
        prepare_uniform(keys, register)
        for _ in range(self.iterations):
            diagonal(angles, register)
            prepare_uniform(keys, register, back=True)
            phase_of_zero(math.pi, register)
            prepare_uniform(keys, register)


@dataclass(frozen=True)
class NoAnsatz(Ansatz):
    """No gates: what a circuit computes is all in its encoding. Its one weight turns nothing."""

    name = "none"
    registry = ANSATZE

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return (1,)

    def __call__(self, weights: Float[Tensor, "1"], wires: Sequence[int]) -> None:
        pass


def row_circuit(num_keys: int, encoding: Amplification, joint: bool = False) -> Circuit:
    """The circuit of a row.

    Args:
        num_keys: allowed keys, at least 2.
        encoding: oracle and schedule.
        joint: measure the words with a Z on the ancilla too, for the distribution given its outcome.

    Raises:
        ValueError: for fewer than 2 or more than `MAX_KEYS` keys.
    """
    if not 2 <= num_keys <= MAX_KEYS:
        raise ValueError(f"a row's circuit takes 2 to {MAX_KEYS} keys; got {num_keys}: use the closed form")
    wires = key_wires(num_keys)
    register = [_word(number, wires) for number in range(2**wires)]
    if encoding.oracle == "phase":
        words = register[1:]
    else:
        words = [f"{word}I" for word in register[1:]] + ([f"{word}Z" for word in register] if joint else [])
    return Circuit(num_keys, tuple(words), encoding, NoAnsatz())


def _word(number: int, wires: int) -> str:
    return "".join("Z" if number >> (wires - 1 - wire) & 1 else "I" for wire in range(wires))


def walsh_hadamard(x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    r""":math:`\sum_w (-1)^{w \cdot j} x_w` for every j, in natural order, not normalised."""
    size = x.shape[-1]
    shape = x.shape
    for wire in range(size.bit_length() - 1):
        pairs = x.reshape(*shape[:-1], 2**wire, 2, -1)
        even, odd = pairs.select(-2, 0), pairs.select(-2, 1)
        x = torch.stack((even + odd, even - odd), dim=-2).reshape(shape)
    return x


# --- pieces of circuits -----------------------------------------------------------------------------------------


def prepare_uniform(num_keys: int, wires: Sequence[int], back: bool = False) -> None:
    r"""Queues :math:`|0\rangle \to \sum_{j<n} |j\rangle / \sqrt n`, or its inverse."""
    gates = _uniform_gates(num_keys, len(wires))
    for name, angles, places in reversed(gates) if back else gates:
        # fresh objects each time: PennyLane's queue holds an operator once
        getattr(qml, name)(*(-angle if back else angle for angle in angles), wires=[wires[place] for place in places])


@lru_cache(maxsize=256)
def _uniform_gates(num_keys: int, num_wires: int) -> tuple[tuple[str, tuple[float, ...], tuple[int, ...]], ...]:
    """Gates that are their own inverse, but for the sign of an angle: name, angles, wires."""
    if num_keys == 2**num_wires:
        return tuple(("Hadamard", (), (wire,)) for wire in range(num_wires))
    amplitudes = np.zeros(2**num_wires)
    amplitudes[:num_keys] = num_keys**-0.5
    with qml.queuing.QueuingManager.stop_recording():
        gates = qml.MottonenStatePreparation.compute_decomposition(amplitudes, wires=range(num_wires))
    return tuple((gate.name, tuple(map(float, gate.parameters)), tuple(gate.wires)) for gate in gates)


def multiplexed_ry(angles: Float[Tensor, "*batch size"], controls: Sequence[int], target: int) -> None:
    r"""Queues :math:`\sum_j |j\rangle\langle j| \otimes RY(\theta_j)`: as many rotations, and CNOTs, as angles."""
    count = len(controls)
    turns = walsh_hadamard(angles) / 2**count
    for place in range(2**count):
        gray = place ^ place >> 1
        qml.RY(turns[..., gray], wires=target)
        changed = gray ^ (after := (place + 1) % 2**count, after ^ after >> 1)[1]
        qml.CNOT([controls[count - changed.bit_length()], target])


def diagonal(phases: Float[Tensor, "*batch size"], wires: Sequence[int]) -> None:
    r"""Queues :math:`\sum_j e^{i\phi_j} |j\rangle\langle j|`, up to a global phase: a rotation for each word of Z."""
    count = len(wires)
    coefficients = walsh_hadamard(phases) / 2**count
    for word in range(1, 2**count):
        on = [wire for place, wire in enumerate(wires) if word >> (count - 1 - place) & 1]
        angle = -2 * coefficients[..., word]
        qml.RZ(angle, wires=on[0]) if len(on) == 1 else qml.MultiRZ(angle, wires=on)


def phase_of_zero(alpha: float, wires: Sequence[int]) -> None:
    r"""Queues :math:`1 - (1 - e^{-i\alpha})|0\ldots0\rangle\langle0\ldots0|`."""
    for wire in wires:
        qml.X(wire)
    qml.ctrl(qml.PhaseShift(-alpha, wires=wires[-1]), control=list(wires[:-1])) if len(wires) > 1 else qml.PhaseShift(
        -alpha, wires=wires[0]
    )
    for wire in wires:
        qml.X(wire)


# --- running them -----------------------------------------------------------------------------------------------


class RowExecutor(Executor):
    """Runs the rows of an amplification layer on a device, or says that the closed form serves.

    Rows of one length and one number of iterations are one circuit, made when it is first met; all of them count on
    one meter.

    Args:
        encoding: oracle and schedule; its iterations are those of the row.
        joint: the distribution given that the ancilla is 1 is wanted, not the unconditional one.
        longest_row: its number of keys.
        execution: how to run them, or the name of an executor.
        index: sets the shots of several layers apart.
        meter: counts executions, of other executors too where they share it.

    Raises:
        ValueError: if that cannot be done; the message names what can.
    """

    name = "amplification"

    def __init__(
        self,
        encoding: Amplification,
        joint: bool,
        longest_row: int,
        execution: Execution | str = "auto",
        index: int = 0,
        meter: Meter | None = None,
    ):
        self.execution, self._index, self._joint = as_execution(execution), index, joint
        self._encoding, self._longest_row = encoding, longest_row
        smallest = [row_circuit(2, self._of(0), joint)]
        super().__init__(smallest)
        self._executors: dict[tuple[int, int], QNodeExecutor] = {}
        self.plan: Plan = make_plan(self.execution, smallest) if self.execution.executor != "qnode" else None
        if self.plan is None or self.plan.executor != "folded":
            largest = self._made(max(2, longest_row), self._most(longest_row), meter)
            self.plan, self.meter = largest.plan, largest.meter

    @property
    def is_closed_form(self) -> bool:
        """Nothing is to be run on a device."""
        return self.plan.executor == "folded"

    def _most(self, num_keys: int) -> int:
        fixed = self._encoding.iterations
        return fixed if fixed else most_iterations(num_keys)

    def _of(self, iterations: int) -> Amplification:
        return Amplification(iterations, self._encoding.oracle, self._encoding.delta)

    def _made(self, num_keys: int, iterations: int, meter: Meter | None = None) -> QNodeExecutor:
        key = (num_keys, iterations)
        if key not in self._executors:
            circuit = row_circuit(num_keys, self._of(iterations), self._joint)
            execution = replace(self.execution, executor="qnode")
            made = make_executor([circuit], execution, self._index, meter=meter or self.meter)
            self._executors[key] = cast(QNodeExecutor, made)
        return self._executors[key]

    def probabilities(
        self, angles: Float[Tensor, "rows keys"], iterations: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, "rows keys"], Float[Tensor, "rows keys"] | None]:
        """The distribution over keys of every row, and its part with the ancilla in 1 where that is measured.

        Args:
            angles: one for each key, all of them allowed.
            iterations: of each row.
        """
        num_keys = angles.shape[-1]
        everywhere, with_one = [], []
        order = []
        for count in iterations.unique().tolist():
            rows = (iterations == count).nonzero()[:, 0]
            order.append(rows)
            words = self._run(num_keys, count, angles[rows])
            size = 2 ** key_wires(num_keys)
            of_keys = torch.cat((torch.ones_like(words[:, :1]), words[:, : size - 1]), dim=-1)
            everywhere.append(walsh_hadamard(of_keys)[:, :num_keys] / size)
            if self._joint:
                with_one.append(walsh_hadamard(of_keys - words[:, size - 1 :])[:, :num_keys] / (2 * size))
        back = torch.cat(order).argsort()
        return torch.cat(everywhere)[back], torch.cat(with_one)[back] if self._joint else None

    def _run(self, num_keys: int, iterations: int, angles: Tensor) -> Tensor:
        executor = self._made(num_keys, iterations)
        return executor.expectations(angles[None], angles.new_zeros(1, 1))[0]

    def expectations(self, x: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("rows of one length are run by `probabilities`")

    def states(self, x: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("rows of one length are run by `probabilities`")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing: devices compute in their own precision."""

    def count(self, tokens: int, training: bool) -> int:
        if self.is_closed_form:
            return 0
        return self._made(max(2, self._longest_row), self._most(self._longest_row)).count(tokens, training)
