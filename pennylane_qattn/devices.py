"""PennyLane devices by name: opening them, finding out what they can do, and running tapes on them.

What a device can do is asked of the device, by running a circuit of one wire or two where it is a simulator on this
machine. Any other device is taken to cost money: it is asked nothing that would run a circuit.
"""

import contextlib
import copy
import importlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pennylane as qml
from pennylane.devices import ExecutionConfig
from pennylane.measurements import StateMP
from pennylane.tape import QuantumScript

from pennylane_qattn.spreading import spread

#: Simulators that run on this machine: probing them costs nothing.
LOCAL_SIMULATORS = frozenset(
    """default.qubit default.mixed reference.qubit lightning.qubit lightning.kokkos lightning.gpu qiskit.aer
    cirq.simulator cirq.mixedsimulator qulacs.simulator braket.local.qubit""".split()
)
#: The packages that devices outside PennyLane come from.
PACKAGES = {
    "lightning.kokkos": "pennylane-lightning-kokkos",
    "lightning.gpu": "pennylane-lightning-gpu",
    "qiskit.aer": "pennylane-qiskit",
    "qiskit.basicsim": "pennylane-qiskit",
    "qiskit.remote": "pennylane-qiskit",
    "cirq.simulator": "pennylane-cirq",
    "cirq.mixedsimulator": "pennylane-cirq",
    "qulacs.simulator": "pennylane-qulacs",
    "braket.local.qubit": "amazon-braket-pennylane-plugin",
    "braket.aws.qubit": "amazon-braket-pennylane-plugin",
}
#: Devices whose circuits are not run gate by gate, and so give no numbers to train on.
_NOT_DEVICES = frozenset(
    """null.qubit default.tensor default.gaussian default.qutrit default.clifford braket.local.ahs
    braket.aws.ahs""".split()
)
#: Devices that take the seed of their shots as an option, and those that draw from NumPy's global generator.
_SEEDED = frozenset({"default.qubit", "default.mixed", "reference.qubit", "lightning.qubit", "lightning.kokkos"})
_GLOBALLY_SEEDED = frozenset({"qiskit.aer", "qulacs.simulator", "cirq.simulator", "cirq.mixedsimulator"})
#: Devices whose states are right in their phase too, for every way of preparing a state.
_STATES_WITH_PHASE = frozenset("default.qubit reference.qubit lightning.qubit lightning.kokkos lightning.gpu".split())
#: Tapes, or amplitudes of a broadcast tape, that go to a device in one call: bounds memory.
MAX_TAPES, MAX_AMPLITUDES = 2**14, 2**24


class ExecutionBudgetError(RuntimeError):
    """More executions than `max_executions` would be needed."""


def installed_devices() -> list[str]:
    """Names of the devices that PennyLane finds here and that run gates on qubits."""
    names = {entry.name for entry in entry_points(group="pennylane.plugins")}
    return sorted(
        n for n in names if n not in _NOT_DEVICES and not n.startswith(("default.qutrit", "strawberryfields"))
    )


def open_device(
    name: str, num_wires: int, options: Mapping[str, Any] | None = None, seed: int | None = None
) -> qml.devices.Device:
    """The PennyLane device of that name.

    Args:
        name: its short name, such as `"lightning.qubit"`.
        num_wires: wires that are needed.
        options: keyword arguments of the device; `c_dtype` may be a name, such as `"complex64"`.
        seed: of its shots, if the device takes one.

    Raises:
        ValueError: if the name is unknown, its package is not installed, it takes no such options, or too few wires.
    """
    options = dict(options or {})
    given = options.setdefault("wires", num_wires)
    if not isinstance(given, int) or given < num_wires:
        raise ValueError(f"the circuit needs {num_wires} wires; got wires={given!r} for {name}: leave wires out")
    if isinstance(options.get("c_dtype"), str):
        types = {"complex64": np.complex64, "complex128": np.complex128}
        if options["c_dtype"] not in types:
            raise ValueError(f"c_dtype is complex64 or complex128; got {options['c_dtype']!r}")
        options["c_dtype"] = types[options["c_dtype"]]
    if seed is not None and name in _SEEDED:
        options.setdefault("seed", seed)
    if name == "qiskit.aer":  # which would sample by itself
        options.setdefault("method", "statevector")
    if name in _NOT_DEVICES:
        raise ValueError(f"device {name!r} gives no expectation values of qubits; use default.qubit, for example")
    if name not in installed_devices():
        if name in PACKAGES:
            raise ValueError(f"device {name!r} is not installed; pip install {PACKAGES[name]}")
        raise ValueError(f"unknown device {name!r}; installed here: {', '.join(installed_devices())}")
    try:
        if name == "cirq.simulator" and "simulator" not in options:  # its own has single precision
            cirq = importlib.import_module("cirq")
            options["simulator"] = cirq.Simulator(dtype=np.complex128)
        return qml.device(name, **options)
    except Exception as error:  # plugins raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(f"device {name!r} cannot be made with {options}: {reason}") from error


@dataclass
class Meter:
    """Counts executions, and stops before there are more than `limit`.

    An execution is one circuit with one measurement setting (and its shots), as a device would charge it.
    """

    limit: int | None = None
    executions: int = 0

    def charge(self, wanted: int, device: str) -> None:
        """Counts executions that are about to run; `ExecutionBudgetError` if they would be too many."""
        if self.limit is not None and self.executions + wanted > self.limit:
            raise ExecutionBudgetError(
                f"max_executions is {self.limit:,} and {self.executions:,} are done; the next call to {device} needs "
                f"{wanted:,} more; raise max_executions to go on"
            )
        self.executions += wanted


@dataclass
class Runner:
    """Runs tapes on one device, and tries failed jobs again.

    Args:
        name: the device.
        num_wires: wires that are needed.
        options: keyword arguments of the device.
        shots: of every execution; `None` is exact.
        seed: of the shots.
        meter: counts the executions of this runner and of others that share it.
        retries: how often a failed call is tried again on a device that is not a simulator here.
        processes: of this machine that run tapes at a time; 1 is this one alone.
    """

    name: str
    num_wires: int
    options: Mapping[str, Any]
    shots: int | None = None
    seed: int | None = None
    meter: Meter = field(default_factory=Meter)
    retries: int = 2
    processes: int = 1
    _stream: Any = field(default=None, init=False, repr=False)
    #: A simulator has one state: two threads at a time would read each other's.
    _lock: Any = field(default_factory=threading.RLock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self.device  # mistakes show now

    def __getstate__(self) -> dict[str, Any]:
        # devices do not all pickle; another one is opened where this lands
        unpickled = {"device", "broadcasts", "gives_states", "gives_channels", "_lock"}
        return {name: value for name, value in self.__dict__.items() if name not in unpickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @cached_property
    def device(self) -> qml.devices.Device:
        """The PennyLane device."""
        return open_device(self.name, self.num_wires, self.options, self.seed)

    @property
    def repeats(self) -> bool:
        """Whether the same seed gives the same shots."""
        return self.name in _SEEDED | _GLOBALLY_SEEDED

    @property
    def is_local(self) -> bool:
        """Whether it is a simulator on this machine."""
        return self.name in LOCAL_SIMULATORS

    def differentiates(self, method: str) -> bool:
        """Whether the device itself has that gradient method, `"backprop"` or `"adjoint"`."""
        return bool(self.device.supports_derivatives(ExecutionConfig(gradient_method=method)))

    @cached_property
    def broadcasts(self) -> bool:
        """Whether many inputs run as one tape."""
        state = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        tape = QuantumScript([qml.StatePrep(state, wires=0), qml.RX(np.zeros(3), 0)], [qml.expval(qml.Z(0))])

        def probe() -> bool:
            batch, _, _ = self._preprocessed([tape])
            return len(batch) == 1 and np.allclose(self._execute([tape])[0], [1, -0.28, -1], atol=1e-5)

        return self._probe(probe)

    @cached_property
    def gives_states(self) -> bool:
        """Whether it gives pure states, their phase included."""
        zeros = [0.0] * (2**self.num_wires - 2)
        tape = QuantumScript(
            [qml.StatePrep(np.array([0.6, 0.8, *zeros]), wires=range(self.num_wires)), qml.S(self.num_wires - 1)],
            [qml.expval(qml.Z(0)), qml.state()],
        )

        def probe() -> bool:
            state = np.asarray(self._execute([tape])[0][1])
            if state.ndim != 1:  # a density matrix
                return False
            state = state.reshape(2**self.num_wires, -1)[:, 0]  # a device may have further wires
            return np.allclose(state, [0.6, 0.8j, *zeros], atol=1e-5)

        return self.name in _STATES_WITH_PHASE and self._probe(probe)

    @cached_property
    def gives_channels(self) -> bool:
        """Whether it simulates noise channels."""
        tape = QuantumScript([qml.DepolarizingChannel(0.3, 0)], [qml.expval(qml.Z(0))])
        return self._probe(lambda: bool(np.allclose(self._execute([tape])[0], 0.6, atol=1e-5)))

    def why_not_run(self, tapes: Sequence[QuantumScript]) -> str | None:
        """What a simulator of this machine says of tapes that it cannot run; others are not tried."""
        if not self.is_local:
            return None
        try:
            self._execute(tapes)
            if self.shots is None:
                tape = QuantumScript([qml.RY(0.3, 0)], [qml.expval(qml.Z(0))])
                if abs(float(np.asarray(self._execute([tape])[0])) - np.cos(0.3)) > 1e-5:
                    return "it samples although shots is left out; give shots, or the device's option for exact values"
        except Exception as error:  # whatever a device raises
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            if self.shots is not None:  # the first shots are as a copy's, which is not tried
                del self.device
                self._stream = None
        return None

    def run(self, tapes: Sequence[QuantumScript]) -> list[tuple[np.ndarray, ...]]:
        """What every tape measures, in order; a broadcast tape gives arrays with its batch in front."""
        results: list[tuple[np.ndarray, ...]] = []
        self.meter.charge(_executions(tapes), self.name)
        for first in range(0, len(tapes), MAX_TAPES):
            part = tapes[first : first + MAX_TAPES]
            found = self._with_retries(part) if self.processes == 1 else self._spread("_execute", part)
            for tape, result in zip(part, found, strict=True):
                several = result if isinstance(result, tuple | list) else (result,)
                results.append(tuple(np.asarray(value) for value in several))
                if len(results[-1]) != len(tape.measurements):
                    raise RuntimeError(f"{self.name} gave {len(results[-1])} results of {len(tape.measurements)}")
        return results

    def adjoint_gradients(self, tapes: Sequence[QuantumScript]) -> list[np.ndarray]:
        """For tapes with one observable each: its derivatives by their trainable parameters."""
        gradients: list[np.ndarray] = []
        self.meter.charge(_executions(tapes), self.name)
        for first in range(0, len(tapes), MAX_TAPES):
            part = tapes[first : first + MAX_TAPES]
            gradients += self._derivatives(part) if self.processes == 1 else self._spread("_derivatives", part)
        return gradients

    def _derivatives(self, tapes: Sequence[QuantumScript]) -> list[np.ndarray]:
        batch, _, config = self._preprocessed(tapes, ExecutionConfig(gradient_method="adjoint"))
        with self._lock:
            found = self.device.compute_derivatives(tuple(batch), config)
        return [np.atleast_1d(np.asarray(gradient, dtype=np.float64)) for gradient in found]

    def _spread(self, method: str, tapes: Sequence[QuantumScript]) -> list[Any]:
        return spread(self._twin, method, tapes, self.processes)

    @cached_property
    def _twin(self) -> bytes:
        """What another process opens to run its share, always the same, so that it opens it once."""
        twin = copy.copy(self)
        twin.processes, twin.meter = 1, Meter()
        return pickle.dumps(twin)

    def why_not_spread(self) -> str | None:
        """Why tapes cannot be spread over processes; `None` if they can."""
        instead = "leave processes out"
        if not self.is_local:
            return f"{self.name} is no simulator of this machine, so its circuits go to it from one process; {instead}"
        if self.options.get("max_workers") is not None:
            return "max_workers is the device's own pool of processes; give max_workers or processes, not both"
        if self.shots is not None:
            return f"with shots={self.shots} several processes would draw the same numbers; {instead}, or shots"
        try:
            pickle.dumps(dict(self.options))
        except Exception as error:  # pickle and what it pickles raise many types
            reason = " ".join(str(error).split())
            return f"device_options of {self.name} cannot be handed to other processes ({reason}); {instead}"
        return None

    def survives_adjoint(self, tape: QuantumScript) -> str | None:
        """The gate of a tape that the device's adjoint method would replace by others, if there is one."""
        (prepared, *_), _, _ = self._preprocessed([tape], ExecutionConfig(gradient_method="adjoint"))
        names = [operation.name for operation in prepared.operations]
        return next((op.name for op, name in zip(tape.operations, names, strict=False) if op.name != name), None)

    def _preprocessed(self, tapes: Sequence[QuantumScript], config: ExecutionConfig | None = None):
        config = self.device.setup_execution_config(config or ExecutionConfig(), tapes[0])
        program = self.device.preprocess_transforms(config)
        kinds = {_kind(tape): tape for tape in tapes}
        # where it only checks, one of a kind is checked enough
        if 2 * len(kinds) <= len(tapes) and all(_is_same(program((tape,))[0], tape) for tape in kinds.values()):
            return tuple(tapes), tuple, config
        batch, gather = program(tuple(tapes))
        return batch, gather, config

    def _execute(self, tapes: Sequence[QuantumScript]) -> Sequence[Any]:
        batch, gather, config = self._preprocessed(tapes)
        with self._lock, self._seeded():
            return gather(self.device.execute(batch, config))

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Gives a device that draws from NumPy's global generator a stream of its own."""
        if self.seed is None or self.name not in _GLOBALLY_SEEDED:
            yield
            return
        outside = np.random.get_state()
        if self._stream is None:
            np.random.seed(self.seed)
        else:
            np.random.set_state(self._stream)
        try:
            yield
        finally:
            self._stream = np.random.get_state()
            np.random.set_state(outside)

    def _probe(self, probe: Callable[[], bool]) -> bool:
        if not self.is_local:
            return False
        try:
            return bool(probe())
        except Exception:  # whatever a device raises, the answer is no
            return False

    def _with_retries(self, tapes: Sequence[QuantumScript]) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._execute(tapes)
            except Exception:
                if self.is_local or attempt == self.retries:
                    raise
                time.sleep(2**attempt)
                self.meter.charge(_executions(tapes), self.name)  # a device charges for what failed too
        raise AssertionError


def _executions(tapes: Sequence[QuantumScript]) -> int:
    return sum(tape.batch_size or 1 for tape in tapes)


def _kind(tape: QuantumScript) -> tuple:
    """What preprocessing may depend on: the names of the gates, and the observables, which equal tapes share."""
    measured: list[Any] = []
    for measurement in tape.measurements:
        if isinstance(measurement, StateMP):
            measured.append("state")
        elif isinstance(measurement.obs, qml.ops.LinearCombination):
            measured.append(tuple(map(id, measurement.obs.ops)))
        else:
            measured.append(id(measurement))
    return tuple(operation.name for operation in tape.operations), tuple(measured)


def _is_same(batch: Sequence[QuantumScript], tape: QuantumScript) -> bool:
    """Whether preprocessing left a tape as it is, but for the wires of a state, which are those of the tape."""
    if len(batch) != 1 or batch[0].trainable_params != tape.trainable_params:
        return False
    before, after = ([*t.operations, *t.measurements] for t in (tape, batch[0]))
    return len(before) == len(after) and all(
        a is b or isinstance(a, StateMP) and isinstance(b, StateMP) for a, b in zip(before, after, strict=True)
    )
