"""How circuits are to be run, as a description, and the plan that is made of it: what runs where, and why.

Nothing falls back in silence: a plan either does what was asked for or is refused with one line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.devices import LOCAL_SIMULATORS, Meter, Runner
from pennylane_qattn.folding import check_foldable
from pennylane_qattn.gradients import JACOBIANS, rotations, shift_rule
from pennylane_qattn.noise import Noise
from pennylane_qattn.tapes import Tapes, operation

#: Methods by name.
METHODS = ("backprop", "adjoint", *JACOBIANS)
#: Above so many wires adjoint is preferred to backprop, which keeps every intermediate state.
BACKPROP_WIRES = 12
#: Gates whose gradient PennyLane's mixed-state simulator loses on its way (0.45).
_LOST_BY_BACKPROP = frozenset({"PhaseShift", "PSWAP"})
#: Step of difference quotients where the device computes in single precision, radians.
SINGLE_STEP = 1e-2
#: Most executions on devices that are not simulators here, unless said otherwise.
REMOTE_MAX_EXECUTIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the circuits of a model are run. It belongs to a run, not to the model, and no checkpoint holds it.

    Args:
        executor: `"folded"` (as matrices in torch), `"qnode"` (on a device), or `"auto"`: folded where that is exact
            and small enough, on the device otherwise.
        device: PennyLane's name of the device.
        device_options: keyword arguments of the device.
        diff_method: how gradients are taken: backprop, adjoint, parameter-shift, finite-diff, spsa, hadamard, or
            `"auto"`: the fastest right one.
        gradient_options: options of that method, such as `h` of finite-diff and spsa.
        shots: measurements of every circuit and setting; `None`: exact expectation values.
        noise: what the device is to simulate.
        seed: of shots and of spsa, with the number of the feature map.
        max_executions: most executions in all; `None`: any number on simulators of this machine, 10,000 on other
            devices.
        retries: how often a failed call to a device that is no simulator here is tried again.
        processes: of this machine that run circuits at a time, on a simulator of its own each; 1: no others.
    """

    executor: str = "auto"
    device: str = "default.qubit"
    device_options: dict[str, Any] = field(default_factory=dict)
    diff_method: str = "auto"
    gradient_options: dict[str, Any] = field(default_factory=dict)
    shots: int | None = None
    noise: Noise = field(default_factory=Noise)
    seed: int = 0
    max_executions: int | None = None
    retries: int = 2
    processes: int = 1

    def __post_init__(self) -> None:
        def require(sound: bool, what: str) -> None:
            if not sound:
                raise ValueError(what)

        names = ("auto", "folded", "qnode")
        require(self.executor in names, f"unknown executor {self.executor!r}; choose from {', '.join(names)}")
        known = ("auto", *METHODS)
        require(self.diff_method in known, f"unknown diff_method {self.diff_method!r}; choose from {', '.join(known)}")
        for name, least in (("shots", 1), ("max_executions", 1), ("retries", 0), ("seed", 0), ("processes", 1)):
            value = getattr(self, name)
            optional = name in ("shots", "max_executions")
            sound = (value is None and optional) or (type(value) is int and value >= least)
            require(sound, f"{name} must be an integer of at least {least}; got {value!r}")
        for name in ("device_options", "gradient_options"):
            value = getattr(self, name)
            require(isinstance(value, dict), f"{name} must be like {{name: value}}; got {value!r}")
        require(isinstance(self.device, str), f"device must be a name; got {self.device!r}")
        for name in ("shots", "seed"):
            ours = name in self.device_options
            require(not ours, f"{name} is no device_option but an option of the execution itself")
        require(isinstance(self.noise, Noise), f"noise must be a Noise; got {self.noise!r}")

    @classmethod
    def from_plain(cls, options: Mapping[str, Any]) -> "Execution":
        """The execution that plain data describe, noise being a dict in it."""
        try:
            return cls(**{**options, "noise": Noise(**options.get("noise", {}))})
        except TypeError as error:
            raise ValueError(f"no description of an execution: {error}") from None

    @property
    def of_device(self) -> list[str]:
        """What it asks for that only a device can do."""
        names = ("device", "device_options", "diff_method", "gradient_options", "processes")
        return [name for name in names if getattr(self, name) != getattr(Execution(), name)]

    @property
    def is_exact(self) -> bool:
        """Whether it gives exact, noiseless expectation values."""
        return self.shots is None and not self.noise


@dataclass(frozen=True)
class Plan:
    """What was picked, and why.

    Attributes:
        executor: `"folded"` or `"qnode"`.
        device: the device, or `None` if folded.
        diff_method: how gradients by angles are taken; `None` if folded.
        input_gradient: how gradients by the inputs are taken: `"state"` (one more execution), `"polarisation"` (two
            for each entry), or as those by angles.
        reasons: why, in clauses.
        is_local_and_exact: whether executions cost nothing but this machine's time, and repeat.
    """

    executor: str
    device: str | None
    diff_method: str | None
    input_gradient: str | None
    reasons: tuple[str, ...]
    is_local_and_exact: bool = True

    def explain(self) -> str:
        """One line."""
        if self.executor == "folded":
            return f"folded in torch: {'; '.join(self.reasons)}"
        by_input = "" if self.input_gradient == self.diff_method else f", inputs by {self.input_gradient}"
        return f"QNodes on {self.device}, gradients by {self.diff_method}{by_input}: {'; '.join(self.reasons)}"


def make_plan(
    execution: Execution, circuits: Sequence[Circuit], runner: Runner | None = None, for_states: bool = False
) -> Plan:
    """The plan for circuits that share encoding and ansatz.

    Args:
        execution: what is asked for.
        circuits: one per head.
        runner: of the device, if one is open already.
        for_states: final states are wanted instead of expectation values.

    Raises:
        ValueError: if it cannot be done; the message says why, and what to use instead.
    """
    if execution.executor != "qnode":
        refusal = _why_not_folded(execution, circuits)
        if refusal is None and execution.executor == "folded":
            return Plan("folded", None, None, None, ("as asked for",))
        if refusal is None:
            reasons = ["exact, and its matrices are small"]
            if execution.of_device:  # what is asked for must be possible, though it is not needed
                make_plan(replace(execution, executor="qnode"), circuits, runner, for_states)
                reasons.append(f"executor qnode runs it on {execution.device}")
            return Plan("folded", None, None, None, tuple(reasons))
        if execution.executor == "folded":
            raise ValueError(refusal)
        because = (f"not folded, since {refusal.partition(';')[0]}",)
    else:
        because = ("as asked for",)
    runner = runner or open_runner(execution, circuits[0].num_wires)
    tapes = Tapes(circuits, execution.noise, execution.shots)
    if execution.processes > 1 and (refusal := runner.why_not_spread()):
        raise ValueError(refusal)
    if execution.noise and not runner.gives_channels:
        raise ValueError(f"{runner.name} simulates no noise channels; use default.mixed, or leave the noise out")
    refusal = runner.why_not_run(tapes.expectations(tapes.example(), broadcast=False))
    if refusal:
        raise ValueError(f"{runner.name} cannot run this circuit ({refusal}); use another device or encoding")
    if for_states and not (execution.is_exact and runner.gives_states):
        none = f"{runner.name} gives none" + ("" if execution.is_exact else " with shots or noise")
        raise ValueError(f"the overlap score reads states, and {none}; use the folded executor")
    if execution.diff_method == "auto":
        method, why = _fastest(execution, runner, tapes)
    else:
        method, why = execution.diff_method, None
        refusal = why_not(method, execution, runner, tapes)
        if refusal:
            raise ValueError(refusal)
    if method in JACOBIANS:
        JACOBIANS[method](method, with_default_step(execution))
    elif execution.gradient_options:
        raise ValueError(f"{method} takes no gradient_options; got {execution.gradient_options}")
    if tapes.encoding.uses_gates or method == "backprop":
        by_input = method
    else:
        by_input = "state" if execution.is_exact and runner.gives_states else "polarisation"
    if execution.shots is not None and not runner.repeats:
        because = (*because, "its shots have no seed and do not repeat")
    if for_states and method != "backprop":
        because = (*because, "states are differentiated by shifting angles, whatever the method")
    if "h" in with_default_step(execution) and "h" not in execution.gradient_options:
        because = (*because, f"steps of {SINGLE_STEP}, as the device computes in single precision")
    local = runner.is_local and execution.shots is None
    return Plan("qnode", runner.name, method, by_input, (*because, why) if why else because, local)


def with_default_step(execution: Execution) -> dict[str, Any]:
    """The options of the gradient method, with a step that single precision can resolve where that is needed."""
    single = execution.device_options.get("c_dtype") == "complex64" or execution.device == "cirq.mixedsimulator"
    if single and execution.diff_method in ("finite-diff", "spsa"):
        return {"h": SINGLE_STEP, **execution.gradient_options}
    return execution.gradient_options


def open_runner(execution: Execution, num_wires: int, index: int = 0, meter: Meter | None = None) -> Runner:
    """The device of an execution, ready to run; `index` sets the shots of several feature maps apart."""
    return Runner(
        execution.device,
        num_wires + (execution.diff_method == "hadamard"),
        execution.device_options,
        execution.shots,
        # without shots too: a device without a seed draws one from NumPy's global generator
        (execution.seed * 1_000_003 + index) % 2**31,
        meter or make_meter(execution),
        execution.retries,
        execution.processes,
    )


def make_meter(execution: Execution) -> Meter:
    """The meter for all that an execution is used for."""
    is_remote = execution.device not in LOCAL_SIMULATORS
    return Meter(REMOTE_MAX_EXECUTIONS if execution.max_executions is None and is_remote else execution.max_executions)


def why_not(method: str, execution: Execution, runner: Runner, tapes: Tapes) -> str | None:
    """Why a method cannot be used, and what to use instead; `None` if it can."""
    if method in ("backprop", "adjoint") and execution.shots is not None:
        return f"{method} needs exact values, not shots={execution.shots}; use parameter-shift, or leave shots out"
    if method == "backprop" and execution.processes > 1:
        return "backprop runs within torch, so not in several processes; use adjoint or parameter-shift"
    if method == "adjoint" and execution.noise:
        return "adjoint needs pure states, and noise makes them mixed; use backprop or parameter-shift"
    if method in ("backprop", "adjoint") and not runner.differentiates(method):
        others = [m for m in ("backprop", "adjoint") if m != method and runner.differentiates(m)]
        others = [m for m in others if why_not(m, execution, runner, tapes) is None]
        return f"{runner.name} has no {method}; use {' or '.join([*others, 'parameter-shift'])}"
    if method == "adjoint" and not runner.is_local:
        return f"adjoint needs a simulator on this machine, and {runner.name} is none; use parameter-shift"
    lost = sorted(_LOST_BY_BACKPROP & {gate.name for gate in rotations(tapes)})
    if method == "backprop" and runner.gives_channels and lost:
        return f"backprop on {runner.name} loses the gradient of {lost[0]}; use parameter-shift"
    try:
        if method == "parameter-shift":
            for gate in rotations(tapes):
                shift_rule(gate)
        if method == "adjoint":
            return _why_not_adjoint(runner, tapes)
        if method == "hadamard":
            JACOBIANS[method](method, {}).executions(rotations(tapes), 1)
    except ValueError as error:
        return str(error)
    except Exception as error:  # PennyLane's own refusals have many types
        return f"{method} cannot differentiate this circuit ({' '.join(str(error).split())}); use parameter-shift"
    return None


def _why_not_adjoint(runner: Runner, tapes: Tapes) -> str | None:
    instead = "use backprop or parameter-shift" if runner.differentiates("backprop") else "use parameter-shift"
    for gate in rotations(tapes):  # without a generator its gradient would be an error, or silently 0
        if not operation(gate, 0.3).has_generator:
            return f"adjoint cannot differentiate {gate.name}, which has no generator; {instead}"
    job = tapes.example()
    (tape,) = tapes.of_observables(job, tapes.hamiltonians(0, np.ones((1, len(tapes.places[0])))))
    columns = range(len(rotations(tapes)))
    tapes.trainable([tape], columns)
    gate = runner.survives_adjoint(tape)
    if gate is not None:
        return f"adjoint on {runner.name} has no gate {gate}; {instead}"
    return None


def _fastest(execution: Execution, runner: Runner, tapes: Tapes) -> tuple[str, str]:
    small = tapes.num_wires <= BACKPROP_WIRES
    order = ["backprop", "adjoint"] if small else ["adjoint", "backprop"]
    refusals = []
    for method in (*order, "parameter-shift"):
        refusal = why_not(method, execution, runner, tapes)
        if refusal is None:
            why = {
                "backprop": "backprop is the fastest there",
                "adjoint": "adjoint is the fastest there",
                "parameter-shift": "parameter-shift needs values alone",
            }[method]
            return method, why
        refusals.append(refusal)
    raise ValueError(refusals[-1])


def _why_not_folded(execution: Execution, circuits: Sequence[Circuit]) -> str | None:
    if execution.executor == "folded" and execution.of_device:
        return f"folded circuits run on no device; leave {execution.of_device[0]} out, or use executor qnode"
    if execution.device_options:
        return "device_options may change the values; leave them out, or use executor qnode"
    if execution.shots is not None:
        return f"folding gives exact values, not shots={execution.shots}; use executor qnode"
    if execution.noise:
        return "folding is free of noise; use executor qnode on default.mixed"
    try:
        check_foldable(circuits[0], len(circuits))
    except ValueError as error:
        return str(error)
    return None
