r"""A kit for testing circuits, ansätze and attentions of your own: what this package's tests use. It needs no pytest.

- `assert_gradients_agree`: values and gradients on devices, by every method, against the folded circuit.
- `assert_fold_matches`: the folded circuit against a QNode that plain PennyLane runs.
- `assert_valid_attention`: a module `(B, T, C) -> (B, T, C)` against what a causal attention promises.

Each raises one `AssertionError` that lists everything it found, and otherwise returns what it did and what it left out.
Random numbers come from the `seed` that is given, never from torch's global generator.

How large an error may be. The unit is the largest entry of what is compared, or 1 if that is larger; gradients by
inputs have a unit for each input. Where a device computes in single precision, float32 holds for it.

===================================  ========================================  =======================================
compared                             float64                                   float32
===================================  ========================================  =======================================
values, any method                   1e-9                                      1e-5
exact gradients                      1e-9                                      1e-5
finite-diff with step h and order p  1e-9 + h^p + 1e-14/h                      1e-5 + h^p + 1e-6/h
spsa with step h                     5 standard errors + 1e-9 + h^2 + 1e-14/h  5 standard errors + 1e-5 + h^2 + 1e-6/h
fold and plain PennyLane             1e-9                                      not compared
outputs of an attention              1e-9                                      1e-5
the future, found by `certify`       1e-12                                     1e-12
===================================  ========================================  =======================================

Exact gradients are those by backprop, adjoint, parameter-shift and hadamard, and all by inputs encoded as amplitudes.
The future is looked for in float64, with circuits folded. The 1/h is the precision of the device, not of the tensors. A
standard error of spsa follows from the exact gradients: with K directions of signs,
:math:`\sqrt{(\lVert g\rVert^2 - g_i^2)/K}` for entry i of an input's gradient g. The mean square of P errors must not
exceed :math:`1 + 6\sqrt{2/P}` squared standard errors either.
"""

import copy
import inspect
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Float
from pennylane.tape import QuantumScript
from torch import Tensor, nn

from pennylane_qattn.ansatz import Ansatz
from pennylane_qattn.causality import certify
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.devices import LOCAL_SIMULATORS, Runner, installed_devices
from pennylane_qattn.execution import executors, make_executor
from pennylane_qattn.executor import Executor, FoldedExecutor
from pennylane_qattn.gradients import JACOBIANS
from pennylane_qattn.planning import METHODS, Execution
from pennylane_qattn.registry import from_plain

#: Largest error of exact methods, by precision.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
#: What differences of values are rounded to, by the precision of the device.
_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}
#: Steps of finite-diff and spsa for devices in single precision, where the usual ones drown in rounding.
_COARSE_STEP = {"h": 1e-2}
#: Random directions of spsa, unless said otherwise, and the standard errors that it may be off.
_DIRECTIONS, _STANDARD_ERRORS = 100, 5.0
#: The three things that are compared.
COMPARED = ("values", "gradient by inputs", "gradient by angles")


def awkward_inputs(num_features: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Vectors `(num_features,)` by what they are: random ones, and those at which gradients of encodings go wrong."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num_features, dtype=torch.float64, generator=generator)
    basis = torch.eye(num_features, dtype=torch.float64)
    alternating = torch.arange(num_features) % 2
    vectors = {
        "random vector": first,
        "the same vector again": first,
        "the same vector, signs flipped": first * (1 - 2 * alternating),
        "zero vector": torch.zeros_like(first),
        "first basis vector": basis[0],
        "last basis vector, negative": -basis[-1],
        "every other entry zero": second * (1 - alternating),
        "small vector": second * 1e-3,
    }
    return {name: vector.to(dtype) for name, vector in vectors.items()}


# --- values and gradients on devices ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A device and a method against the folded circuit.

    Attributes:
        device, method, encoding: what was compared.
        outcome: `"agrees"`, `"differs"` or `"skipped"`.
        reasons: why it was skipped, or how it differs.
        input_gradient: how gradients by the inputs were taken.
        errors: the largest error of each of `COMPARED`, in the unit of the table of tolerances.
        allowed: the largest one allowed.
        executions: circuits that the device ran, forward and backward, for all inputs.
        milliseconds: for each input, forward and backward.
    """

    device: str
    method: str
    encoding: str
    outcome: str
    reasons: tuple[str, ...] = ()
    input_gradient: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    allowed: Mapping[str, float] = field(default_factory=dict)
    executions: int = 0
    milliseconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.device}, {self.method}, {self.encoding} encoding"


@dataclass(frozen=True)
class Comparisons:
    """What was compared and what was not; `str` gives it as a table."""

    rows: tuple[Comparison, ...]

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, outcome: str) -> list[Comparison]:
        """The rows that agree, differ or were skipped."""
        return [row for row in self.rows if row.outcome == outcome]

    @property
    def skipped(self) -> list[Comparison]:
        """What was not compared, and why."""
        return self.of("skipped")

    def __str__(self) -> str:
        titles = ("device", "method", "encoding", *COMPARED, "executions")
        lines: list[tuple[str, ...]] = [titles]
        for row in self.rows:
            if row.outcome == "skipped":
                found = (f"skipped: {'; '.join(row.reasons)}",)
            else:
                found = (*(f"{row.errors.get(what, math.nan):.1e}" for what in COMPARED), f"{row.executions:,}")
                found = found if row.outcome == "agrees" else (*found, row.outcome)
            lines.append((row.device, row.method, row.encoding, *found))
        widths = [max(len(line[i]) for line in lines if len(line) > 4 or i < 3) for i in range(len(titles))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=False)).rstrip()
            for line in lines
        )


def assert_gradients_agree(
    circuit: Circuit,
    devices: Sequence[str] | str | None = None,
    methods: Sequence[str] | str | None = None,
    **options: Any,
) -> Comparisons:
    """Compares a circuit's values, and its gradients by inputs and by angles, on devices with the folded circuit.

    Args:
        circuit: what is run.
        devices: names of PennyLane devices; by default all simulators installed here.
        methods: of differentiation; by default all.
        **options: `dtype`, `inputs`, `weights`, `for_states`, `device_options`, `gradient_options` and `seed` of
            `compare_gradients`.

    Returns:
        A row for each device and method. What the planner refuses is skipped, and the row says why.

    Raises:
        AssertionError: naming device, method, encoding, which of the three is wrong, by how much, and where.
        ValueError: if a device or a method that was named could not be compared at all.
    """
    found = compare_gradients(circuit, devices, methods, **options)
    wrong = found.of("differs")
    if wrong:
        lines = [f"{row}: {reason}" for row in wrong for reason in row.reasons]
        raise AssertionError("\n".join(["values or gradients differ from the folded circuit:", *lines]))
    for kind, named in (("device", devices), ("method", methods)):
        for name in _listed(named, ()):
            rows = [row for row in found if getattr(row, kind) == name]
            if not any(row.outcome == "agrees" for row in rows):
                why = "; ".join(dict.fromkeys(reason for row in rows for reason in row.reasons))
                raise ValueError(f"nothing was compared on {kind} {name!r}: {why}")
    if not found.of("agrees"):
        raise ValueError("nothing was compared; install a simulator, or name a device and a method")
    return found


def compare_gradients(
    circuit: Circuit,
    devices: Sequence[str] | str | None = None,
    methods: Sequence[str] | str | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    inputs: Float[Tensor, "inputs features"] | None = None,
    weights: Float[Tensor, "..."] | None = None,
    for_states: bool = False,
    device_options: Mapping[str, Mapping[str, Any]] | None = None,
    gradient_options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Comparisons:
    """What `assert_gradients_agree` asserts; here differences are rows of the result.

    A batch of all inputs, of the first one alone, and of none are run. Gradients are those of a random linear function
    of the values.

    Args:
        circuit: what is run.
        devices: names of PennyLane devices; by default all simulators installed here.
        methods: of differentiation; by default all.
        dtype: of inputs and angles, float32 or float64; the folded circuit is computed in float64 always.
        inputs: what is encoded, `(inputs, features)`; by default `awkward_inputs`.
        weights: the angles, of `circuit.weight_shape`; by default drawn uniformly from [0, 2 pi).
        for_states: compare final states instead of expectation values.
        device_options: keyword arguments by device.
        gradient_options: `Execution.gradient_options` by method.
        seed: draws inputs, angles, the linear function, and the directions of spsa.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    methods = _listed(methods, METHODS)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if inputs is None:
        vectors = awkward_inputs(circuit.num_features, dtype, seed)
    else:
        if inputs.ndim != 2 or inputs.shape[1] != circuit.num_features or not len(inputs):
            raise ValueError(f"inputs must be (inputs, {circuit.num_features}), one or more; got {tuple(inputs.shape)}")
        vectors = {f"number {i}": vector.detach().to(dtype) for i, vector in enumerate(inputs)}
    case = _Case.make(circuit, vectors, weights, dtype, for_states, seed)
    rows: list[Comparison] = []
    for device in _listed(devices, installed_devices()):
        if devices is None and device not in LOCAL_SIMULATORS:
            why = ("no simulator of this machine; name it to have it compared",)
            rows += [Comparison(device, method, circuit.encoding.name, "skipped", why) for method in methods]
            continue
        asked = Execution(executor="qnode", device=device, device_options=dict((device_options or {}).get(device, {})))
        precision = _precision_of(asked)
        for method in methods:
            given = dict((gradient_options or {}).get(method, {}))
            if method == "spsa":
                given = {"num_directions": _DIRECTIONS, "seed": seed, **given}
            if method in ("finite-diff", "spsa") and precision is not torch.float64:
                given = {**_COARSE_STEP, **given}
            rows.append(case.compare(replace(asked, diff_method=method, gradient_options=given), precision))
    return Comparisons(tuple(rows))


def _listed(names: Sequence[str] | str | None, default: Sequence[str]) -> list[str]:
    return list(default) if names is None else [names] if isinstance(names, str) else list(names)


def _precision_of(execution: Execution) -> torch.dtype:
    """That of the device's expectation values, found by running one circuit; float64 unless they say otherwise."""
    try:
        return device_precision(Runner(execution.device, 1, execution.device_options)) or torch.float64
    except ValueError:  # it cannot be opened, which the planner says too
        return torch.float64


def device_precision(runner: Runner) -> torch.dtype | None:
    """The precision in which a simulator gives exact values, `None` if it gives none; runs one circuit."""
    if not runner.is_local:
        return None
    tape = QuantumScript([qml.RY(1.0, 0), qml.RX(0.7, 0)], [qml.expval(qml.Z(0)), qml.expval(qml.X(0))])
    try:
        found = np.ravel([float(np.real(value)) for value in runner.run([tape])[0]])
    except Exception:  # whatever a device raises, it gives no exact values
        return None
    error = np.abs(found - [math.cos(1.0) * math.cos(0.7), math.sin(1.0)]).max()
    return next((dtype for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)) if error < most), None)


@dataclass(frozen=True)
class _Case:
    """Inputs, angles and a linear function, and what the folded circuit makes of them."""

    circuit: Circuit
    names: tuple[str, ...]
    inputs: Tensor
    weights: Tensor
    cotangent: Tensor
    for_states: bool
    expected: tuple[Tensor, Tensor, Tensor]
    #: Gradients `(inputs, ...)` of each input alone, by its entries and by the angles.
    of_each: tuple[Tensor, Tensor]

    @classmethod
    def make(
        cls,
        circuit: Circuit,
        vectors: Mapping[str, Tensor],
        weights: Tensor | None,
        dtype: torch.dtype,
        for_states: bool,
        seed: int,
    ) -> "_Case":
        generator = torch.Generator().manual_seed(seed)
        if weights is None:
            weights = torch.rand(circuit.weight_shape, dtype=torch.float64, generator=generator) * 2 * math.pi
        if tuple(weights.shape) != tuple(circuit.weight_shape):
            raise ValueError(f"weights must be {tuple(circuit.weight_shape)}; got {tuple(weights.shape)}")
        inputs, weights = torch.stack(list(vectors.values())), weights.detach().to(dtype)
        width = 2 * 2**circuit.num_wires if for_states else len(circuit.words)
        cotangent = torch.randn(len(inputs), width, dtype=torch.float64, generator=generator).to(dtype)
        wide = inputs.double(), weights.double(), cotangent.double()
        expected = _run(FoldedExecutor([circuit]), *wide, for_states)
        # every input as a head of its own, with angles of its own
        alone = FoldedExecutor([circuit] * len(inputs))
        _, *of_each = _run_heads(
            alone, wide[0][:, None], wide[1].expand(len(inputs), *weights.shape), wide[2][:, None], for_states
        )
        each = of_each[0][:, 0], of_each[1].flatten(1)
        return cls(circuit, tuple(vectors), inputs, weights, cotangent, for_states, expected, each)

    def compare(self, execution: Execution, precision: torch.dtype) -> Comparison:
        row = Comparison(execution.device, execution.diff_method, self.circuit.encoding.name, "skipped")
        try:
            executor = make_executor([self.circuit], execution, for_states=self.for_states)
        except ValueError as refusal:
            return replace(row, reasons=(str(refusal),))
        row = replace(row, input_gradient=executor.plan.input_gradient)
        try:
            alone = _call(executor, self.inputs[None, :1], self.weights[None], self.for_states)[0]
            none = _call(executor, self.inputs[None, :0], self.weights[None], self.for_states)[0]
            before, start = executor.meter.executions, time.perf_counter()
            found = _run(executor, self.inputs, self.weights, self.cotangent, self.for_states)
            elapsed = time.perf_counter() - start
        except Exception as error:
            text = " ".join(str(error).split())
            return replace(row, outcome="differs", reasons=(f"raised {type(error).__name__}: {text}",))
        largest, reasons = {}, []
        allowed = self._allowed(execution, row.input_gradient, precision)
        for what, actual, expected, most in zip(COMPARED, found, self.expected, allowed.values(), strict=True):
            largest[what], reason = self._largest(what, actual, expected, most)
            reasons += reason
        if none.shape != (0, self.cotangent.shape[1]):
            reasons.append(f"values of no input: expected the shape (0, {self.cotangent.shape[1]}); got {none.shape}")
        reasons += self._largest("values", alone, self.expected[0][:1], allowed["values"], " alone")[1]
        return replace(
            row,
            outcome="differs" if reasons else "agrees",
            reasons=tuple(reasons),
            errors=largest,
            allowed={what: float(np.max(np.asarray(spread.most))) for what, spread in allowed.items()},
            executions=executor.meter.executions - before,
            milliseconds=elapsed / len(self.inputs) * 1e3,
        )

    def _allowed(self, execution: Execution, by_input: str, precision: torch.dtype) -> dict[str, "_Spread"]:
        """Allowed errors, in the unit of each entry."""
        coarser = torch.float32 if torch.float32 in (precision, self.inputs.dtype) else torch.float64
        exact = TOLERANCES[coarser]
        allowed = dict.fromkeys(COMPARED, _Spread(exact))
        method = execution.diff_method
        if method not in ("finite-diff", "spsa") or self.for_states:
            return allowed
        options = JACOBIANS[method](method, execution.gradient_options).options
        h = options["h"]
        near = exact + h ** options.get("approx_order", 2) + _ROUNDING[precision] / h
        allowed["gradient by angles"] = _Spread(near)
        moved = [self.of_each[1]]
        if by_input == method:  # gates encode, and their angles move with the others
            allowed["gradient by inputs"] = _Spread(near)
            moved.insert(0, self.of_each[0])
        if method == "spsa":
            squares = torch.cat(moved, dim=1).square()
            variance = (squares.sum(1, keepdim=True) - squares) / options["num_directions"]
            angles = self.of_each[1].shape[1]
            by_angles = variance[:, variance.shape[1] - angles :].sum(0).reshape(self.weights.shape)
            allowed["gradient by angles"] = _Spread(near, by_angles.sqrt() / _unit(self.expected[2]))
            if by_input == method:
                own = variance[:, : variance.shape[1] - angles].sqrt()
                allowed["gradient by inputs"] = _Spread(near, own / _unit(self.expected[1], by_row=True))
        return allowed

    def _largest(
        self, what: str, actual: Tensor, expected: Tensor, allowed: "_Spread", which: str = ""
    ) -> tuple[float, list[str]]:
        """The largest error, and what is to be said if one is too large."""
        if actual.shape != expected.shape:
            return math.inf, [f"{what}: expected the shape {tuple(expected.shape)}; got {tuple(actual.shape)}"]
        if not actual.numel():
            return 0.0, []
        error = (actual.double() - expected).abs() / _unit(expected, by_row=what == "gradient by inputs")
        error = error.nan_to_num(math.inf, math.inf)
        most = torch.as_tensor(allowed.most, dtype=torch.float64).expand(error.shape)
        excess = error / most
        worst = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), tuple(excess.shape)))
        if float(excess[worst]) <= 1:
            return float(error.max()), [f"{what}: {line}" for line in allowed.together(error)]
        if what == "gradient by angles":
            where = f"at angle {worst}"
        else:
            entry = "entry" if "inputs" in what else "amplitude" if self.for_states else "word"
            named = worst[1] if entry != "word" else self.circuit.words[worst[1]]
            where = f"at input {self.names[worst[0]]!r}{which}, {entry} {named}"
        said = f"largest error {float(error[worst]):.1e}, allowed {float(most[worst]):.1e}"
        got = f"{float(actual[worst]):.10g} instead of {float(expected[worst]):.10g}"
        return float(error.max()), [f"{what}: {said}, {where}: {got}"]


@dataclass(frozen=True)
class _Spread:
    """How large errors may be: `near`, and for a statistical method its standard errors."""

    near: float
    sigma: Tensor | None = None

    @property
    def most(self) -> float | Tensor:
        return self.near if self.sigma is None else self.near + _STANDARD_ERRORS * self.sigma

    def together(self, error: Tensor) -> list[str]:
        """What is to be said of errors that are each allowed but too many."""
        if self.sigma is None:
            return []
        counted = self.sigma > self.near
        size = int(counted.sum())
        if not size:
            return []
        square = float(((error - self.near).clamp_min(0) / self.sigma)[counted].square().mean())
        allowed = 1 + 6 * math.sqrt(2 / size)
        if square <= allowed:
            return []
        rms, most = math.sqrt(square), math.sqrt(allowed)
        return [f"a root mean square error of {rms:.1f} standard errors, allowed {most:.1f}"]


def _unit(expected: Tensor, by_row: bool = False) -> Tensor:
    """What errors are measured in."""
    size = expected.abs()
    if not size.numel():
        return size.new_ones(())
    return (size.amax(1, keepdim=True) if by_row else size.amax()).clamp_min(1.0)


def _call(executor: Executor, x: Tensor, weights: Tensor, for_states: bool) -> Tensor:
    return executor.states(x, weights) if for_states else executor.expectations(x, weights)


def _run(
    executor: Executor, inputs: Tensor, weights: Tensor, cotangent: Tensor, for_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values `(inputs, words)`, and gradients by inputs and angles, of one circuit."""
    values, by_inputs, by_weights = _run_heads(executor, inputs[None], weights[None], cotangent[None], for_states)
    return values[0], by_inputs[0], by_weights[0]


def _run_heads(
    executor: Executor, inputs: Tensor, weights: Tensor, cotangent: Tensor, for_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, weights = (t.detach().clone().requires_grad_() for t in (inputs, weights))
    with torch.enable_grad():
        values = _call(executor, inputs, weights, for_states)
        total = (values * cotangent).sum()
        by_inputs, by_weights = torch.autograd.grad(total, (inputs, weights), materialize_grads=True)
    return values.detach(), by_inputs, by_weights


# --- folded and plain PennyLane ---------------------------------------------------------------------------------


def assert_fold_matches(
    circuit: Circuit,
    *,
    inputs: Float[Tensor, "inputs features"] | None = None,
    weights: Float[Tensor, "..."] | None = None,
    seed: int = 0,
) -> float:
    """Compares the folded circuit with `circuit.qnode()`, which plain PennyLane runs on `default.qubit`, in float64.

    Final states (up to their common phase), expectation values, and gradients by inputs and by angles (PennyLane's by
    backprop); then the same with the ansatz as a checkpoint holds it: written as plain data and read back.

    Args:
        circuit: what is folded and run.
        inputs: what is encoded, `(inputs, features)`; by default `awkward_inputs`.
        weights: the angles, of `circuit.weight_shape`; by default drawn uniformly from [0, 2 pi).
        seed: draws inputs and angles.

    Returns:
        The largest error.

    Raises:
        AssertionError: saying what differs, by how much, and where.
    """
    if inputs is None:
        vectors = awkward_inputs(circuit.num_features, seed=seed)
    else:
        vectors = {f"number {i}": vector.double() for i, vector in enumerate(inputs)}
    case = _Case.make(circuit, vectors, weights, torch.float64, False, seed)
    exact = _Spread(TOLERANCES[torch.float64])
    plain = _plain_run(circuit, case.inputs, case.weights, case.cotangent)
    largest, wrong = [], []
    for what, folded, expected in zip(COMPARED, case.expected, plain, strict=True):
        error, reasons = case._largest(what, folded, expected, exact)
        largest.append(error)
        wrong += reasons
    states = FoldedExecutor([circuit]).states(case.inputs[None], case.weights[None])[0]
    error, reasons = replace(case, for_states=True)._largest(
        "final states", *_aligned(states, _plain_states(circuit, case.inputs, case.weights)), exact
    )
    largest.append(error)
    wrong += reasons
    ansatz = circuit.ansatz.label
    if wrong:
        lines = [f"{ansatz}, {circuit.encoding.name} encoding: {line}" for line in wrong]
        raise AssertionError("\n".join(["the folded circuit differs from PennyLane's QNode:", *lines]))

    stored = replace(circuit, ansatz=cast(Ansatz, from_plain(json.loads(json.dumps(circuit.ansatz.to_plain())))))
    with torch.no_grad():
        read = {
            "folded": FoldedExecutor([stored]).expectations(case.inputs[None], case.weights[None])[0],
            "run by PennyLane": _plain_values(stored, case.inputs, case.weights),
        }
    for how, values in read.items():
        error, reasons = case._largest("values", values, case.expected[0], exact)
        largest.append(error)
        if reasons:
            raise AssertionError(f"{ansatz}: the ansatz as a checkpoint holds it, {how}, is another: {reasons[0]}")
    return max(largest)


def _plain_values(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    values = circuit.qnode("default.qubit", diff_method="backprop")(inputs, weights)
    return torch.stack([value.expand(len(inputs)) for value in values], dim=-1)


def _plain_run(circuit: Circuit, inputs: Tensor, weights: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs, weights = (t.detach().clone().requires_grad_() for t in (inputs, weights))
    values = _plain_values(circuit, inputs, weights)
    by_inputs, by_weights = torch.autograd.grad((values * cotangent).sum(), (inputs, weights), materialize_grads=True)
    return values.detach(), by_inputs, by_weights


def _plain_states(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    wires = range(circuit.num_wires)

    @qml.qnode(qml.device("default.qubit", wires=circuit.num_wires), interface="torch", diff_method="backprop")
    def states(inputs: Tensor, weights: Tensor):
        circuit.encoding.prepare(inputs, wires)
        cast(Ansatz, circuit.ansatz)(weights, list(wires))
        return qml.state()

    return states(inputs, weights).reshape(len(inputs), -1)


def _aligned(folded: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Both as real parts followed by imaginary ones, the second with the phase of the first, common to all inputs."""
    real, imaginary = folded.detach().chunk(2, dim=-1)
    overlap = (states.conj() * torch.complex(real, imaginary)).sum()
    turned = states * (overlap / overlap.abs() if overlap.abs() > 0 else 1.0)
    return folded.detach(), torch.cat((turned.real, turned.imag), dim=-1)


# --- attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checks:
    """What was checked of a module, and what was left out and why."""

    made: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([*self.made, *(f"{name}: skipped, {why}" for name, why in self.skipped.items())])


class _Skip(Exception):
    """A check that does not apply."""


def assert_valid_attention(
    module: nn.Module,
    *,
    embed_dim: int | None = None,
    seq_len: int | None = None,
    is_causal: bool | None = None,
    seed: int = 0,
) -> Checks:
    """Checks a module `(B, T, C) -> (B, T, C)` for what a causal attention promises.

    Shape and dtype; that no token sees a later one (`causality.certify`); that rows of a batch do not touch; that
    the attention weights, where `module.weights(x)` gives them, are `(B, H, T, T)`, not negative, zero for what is
    not seen, and sum to one over the keys; that a cache from `module.new_cache(B)` changes nothing; that padding,
    where `forward` takes a `key_padding_mask`, changes nothing; finite gradients of the inputs and of every
    parameter, at awkward tokens too; that evaluation mode repeats; and that `state_dict`, `deepcopy` and `pickle`
    keep what it computes.

    The module is copied and stays as it is. Circuits should run without shots.

    Args:
        module: the attention, in its own precision, float32 or float64.
        embed_dim: width `C`; by default `module.embed_dim`.
        seq_len: tokens `T`, two or more; by default 7, or `module.block_size` if that is less.
        is_causal: whether no token may see a later one; by default `module.is_causal`, or else `True`.
        seed: draws the inputs.

    Returns:
        The checks that were made, and those that do not apply.

    Raises:
        AssertionError: with a line for each check that failed.
        ValueError: if the sizes are not known, or the parameters have other precisions.
    """
    trial = _Trial.make(module, embed_dim, seq_len, is_causal, seed)
    made, skipped, wrong = [], {}, []
    for name, check in _CHECKS.items():
        try:
            check(trial)
            made.append(name)
        except _Skip as why:
            skipped[name] = str(why)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            wrong.append(f"{name}: {text if isinstance(error, AssertionError) else f'{type(error).__name__}: {text}'}")
            if trial.copy is None:
                break  # nothing to look at without a copy
    if wrong:
        about = "\n".join([f"{type(module).__name__} is no valid attention:", *wrong])
        raise AssertionError(about)
    return Checks(tuple(made), skipped)


@dataclass
class _Trial:
    """A module under test, and what it is tested with."""

    module: nn.Module
    x: Tensor
    is_causal: bool
    seed: int
    copy: nn.Module | None = None
    #: A copy that has not been called.
    fresh: nn.Module | None = None

    @classmethod
    def make(
        cls, module: nn.Module, embed_dim: int | None, seq_len: int | None, is_causal: bool | None, seed: int
    ) -> "_Trial":
        embed_dim = embed_dim or getattr(module, "embed_dim", None)
        if embed_dim is None:
            raise ValueError(f"{type(module).__name__} has no embed_dim; give assert_valid_attention(embed_dim=...)")
        seq_len = seq_len or min(7, getattr(module, "block_size", 7))
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, for there to be a future; got {seq_len}")
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        if dtype not in TOLERANCES:
            raise ValueError(f"the module must have float32 or float64 parameters; got {dtype}: convert a copy")
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, seq_len, embed_dim, dtype=torch.float64, generator=generator)
        return cls(module, x.to(dtype), is_causal, seed)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.x.dtype]

    @property
    def is_folded(self) -> bool:
        """Whether no circuit runs on a device."""
        return all(executor.plan.executor == "folded" for executor in executors(self.copy))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """The output in evaluation mode, without gradients."""
        with torch.no_grad():
            return self.copy.eval()(x, **options)

    def same(self, actual: Tensor, expected: Tensor, what: str, exactly: bool = False) -> None:
        """Asserts that two outputs are equal, up to the tolerance."""
        if actual.shape != expected.shape:
            raise AssertionError(f"{what}: expected the shape {tuple(expected.shape)}; got {tuple(actual.shape)}")
        allowed = 0.0 if exactly and self.is_folded else self.tolerance * max(1.0, float(expected.abs().max()))
        error = float((actual - expected).detach().abs().nan_to_num(math.inf, math.inf).max())
        assert error <= allowed, f"{what}: largest error {error:.1e}, allowed {allowed:.1e}"


def _copies(trial: _Trial) -> None:
    trial.fresh, trial.copy = copy.deepcopy(trial.module), copy.deepcopy(trial.module)
    expected = trial.forward(trial.x)
    own = trial.module.training
    with torch.no_grad():
        original = trial.module.eval()(trial.x)
    trial.module.train(own)
    trial.same(expected, original, "a deep copy", exactly=True)
    trial.same(copy.deepcopy(trial.copy)(trial.x), original, "a copy after a call", exactly=True)
    trial.same(pickle.loads(pickle.dumps(trial.copy))(trial.x), original, "a pickled copy", exactly=True)


def _shape(trial: _Trial) -> None:
    for tokens in (trial.x.shape[1], 1):
        x = trial.x[:, :tokens]
        out = trial.forward(x)
        assert out.shape == x.shape, f"expected the shape {tuple(x.shape)}; got {tuple(out.shape)}"
        assert out.dtype == x.dtype, f"expected {x.dtype}; got {out.dtype}"
        assert out.isfinite().all(), "the output is not finite"


def _deterministic(trial: _Trial) -> None:
    trial.same(trial.forward(trial.x), trial.forward(trial.x), "a second call in evaluation mode", exactly=True)


def _causal(trial: _Trial) -> None:
    if not trial.is_causal:
        raise _Skip("the module is not causal")
    leak = certify(trial.copy, inputs=trial.x, seed=trial.seed).leak
    # the other checks say what else is wrong
    assert leak is None or leak.across != "time", f"a token moves an output before it by {leak.size:.1e}: {leak}"


def _rows_apart(trial: _Trial) -> None:
    changed = trial.x.clone()
    changed[0] += 1
    trial.same(trial.forward(changed)[1:], trial.forward(trial.x)[1:], "rows beside one that was changed")
    trial.same(trial.forward(trial.x[1:2]), trial.forward(trial.x)[1:2], "a row by itself")


def _weights(trial: _Trial) -> None:
    weights = getattr(trial.copy, "weights", None)
    if isinstance(weights, Tensor | nn.Module) or not callable(weights):
        raise _Skip("the module has no weights(x)")
    with torch.no_grad():
        found = weights(trial.x)
    batch, tokens, _ = trial.x.shape
    sound = found.ndim == 4 and found.shape[0] == batch and found.shape[2:] == (tokens, tokens)
    assert sound, f"expected the shape ({batch}, heads, {tokens}, {tokens}); got {tuple(found.shape)}"
    assert (found >= 0).all(), f"a weight is {float(found.min()):.1e}"
    trial.same(found.sum(-1), torch.ones_like(found[..., 0]), "sums of the rows")
    if trial.is_causal:
        future = float(found.triu(1).max())
        assert future == 0, f"a weight of the future is {future:.1e}"


def _cache(trial: _Trial) -> None:
    if not hasattr(trial.copy, "new_cache"):
        raise _Skip("the module has no new_cache")
    if not trial.is_causal:
        raise _Skip("the module is not causal")
    batch, tokens, _ = trial.x.shape
    expected = trial.forward(trial.x)
    for sizes in ([1] * tokens, [2, tokens - 2] if tokens > 2 else [2]):
        cache = trial.copy.new_cache(batch)
        pieces = [trial.forward(part, cache=cache) for part in trial.x.split(sizes, dim=1)]
        trial.same(torch.cat(pieces, dim=1), expected, f"with a cache, {sizes} tokens at a time")
        assert len(cache) == tokens, f"the cache holds {len(cache)} tokens; {tokens} were given"


def _padding(trial: _Trial) -> None:
    if "key_padding_mask" not in inspect.signature(trial.copy.forward).parameters:
        raise _Skip("forward takes no key_padding_mask")
    padding = torch.zeros(trial.x.shape[:2], dtype=torch.bool)
    padding[0, 0] = padding[1, -1] = True
    out = trial.forward(trial.x, key_padding_mask=padding)
    for row, mask in enumerate(padding[:2]):
        expected = trial.forward(trial.x[row, ~mask][None])[0]
        trial.same(out[row, ~mask], expected, "tokens beside padding")


def _gradients(trial: _Trial) -> None:
    awkward = torch.stack(list(awkward_inputs(trial.x.shape[2], trial.x.dtype, trial.seed).values()))
    tokens = trial.x.shape[1]
    sequences = [awkward[first : first + tokens] for first in range(0, len(awkward), tokens)]
    sequences[-1] = torch.cat((sequences[-1], trial.x[0, len(sequences[-1]) :]))
    x = torch.stack(sequences).requires_grad_()
    trial.copy.eval().zero_grad()
    with torch.enable_grad():
        out = trial.copy(x)
        generator = torch.Generator().manual_seed(trial.seed)
        (out * torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)).sum().backward()
    found = {"the input": x, **{n: p for n, p in trial.copy.named_parameters() if p.requires_grad}}
    for name, tensor in found.items():
        assert tensor.grad is not None, f"{name} has none"
        assert tensor.grad.isfinite().all(), f"that of {name} is not finite"


def _state_dict(trial: _Trial) -> None:
    """Loaded into a module that has been called, so that what it may keep from that call shows."""
    other, loading = trial.fresh.eval(), copy.deepcopy(trial.copy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
        expected = other(trial.x)
        buffer = io.BytesIO()
        torch.save(other.state_dict(), buffer)
        buffer.seek(0)
        loading.load_state_dict(torch.load(buffer, weights_only=True))
        trial.same(loading(trial.x), expected, "a module that loads it", exactly=True)


_CHECKS: dict[str, Callable[[_Trial], None]] = {
    "deepcopy and pickle": _copies,
    "shape and dtype": _shape,
    "evaluation repeats": _deterministic,
    "causality": _causal,
    "rows of a batch": _rows_apart,
    "attention weights": _weights,
    "cache": _cache,
    "padding": _padding,
    "gradients": _gradients,
    "state_dict": _state_dict,
}
