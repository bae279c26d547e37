r"""Gradients of circuits on devices: by angles with every method of PennyLane, by the encoded state exactly.

Angles: parameter shift (arXiv 1811.11184, 2107.12390), finite differences, SPSA, the Hadamard test (arXiv 2408.05406)
and the adjoint method (arXiv 2009.02823), the last as one vector-Jacobian product of one Hamiltonian.

Amplitude-encoded inputs, :math:`f(\psi) = \langle\psi|O|\psi\rangle` with :math:`O = \sum_o g_o U^\dagger P_o U`
(QISA, arXiv 2603.03318): from the state, :math:`2\,\mathrm{Re}(U^\dagger H U\psi)` with one more execution, or from
values alone by polarisation, for each basis vector :math:`e`

.. math::

    2\,\mathrm{Re}\langle\psi|O|e\rangle
        = \tfrac{1}{2}\left(\lVert\psi+e\rVert^2 f(\psi+e) - \lVert\psi-e\rVert^2 f(\psi-e)\right)

with :math:`f` of the normalised vector: exact and finite everywhere, with shots and with noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pennylane as qml

from pennylane_qattn.devices import Runner
from pennylane_qattn.program import Gate
from pennylane_qattn.tapes import Job, Tapes, operation


@runtime_checkable
class Engine(Protocol):
    """What gradients are computed with."""

    tapes: Tapes
    runner: Runner

    def values(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """The words `(inputs, words)` of every job."""

    def final_states(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """The final states `(inputs, 2 ** wires)` of every job."""

    def run_backwards(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        r""":math:`U^\dagger` on the states of every job."""


@cache
def shift_rule(gate: Gate) -> tuple[tuple[float, float], ...]:
    """The parameter-shift rule of a gate, pairs of coefficient and shift: two terms, or four.

    PennyLane knows a recipe or the frequencies of every gate in `ROTATIONS`, and no other gate has an angle.
    """
    op = operation(gate, 0.3)
    recipe = getattr(op, "grad_recipe", [None])[0]
    if recipe is not None:
        return tuple((float(coefficient), float(shift)) for coefficient, _, shift in recipe)
    (frequencies,) = op.parameter_frequencies
    return _rule(frequencies)


def state_shift_rule(gate: Gate) -> tuple[tuple[float, float], ...]:
    """The shift rule of a state, in which a gate has other frequencies than in expectation values."""
    # a generator's eigenvalues are (0 and) +-1/2, or 0 and 1
    whole = gate.name in ("PhaseShift", "ControlledPhaseShift", "PSWAP")
    return _rule((1.0,) if whole else (0.5,))


def _rule(frequencies: Sequence[float | int]) -> tuple[tuple[float, float], ...]:
    return tuple((float(c), float(s)) for c, s in qml.gradients.generate_shift_rule(frequencies))


class Jacobian(ABC):
    """A method that needs nothing but circuits' values.

    Args:
        options: the method's own, by name.
    """

    defaults: Mapping[str, Any] = {}

    def __init__(self, method: str, options: Mapping[str, Any]):
        unknown = set(options) - set(self.defaults)
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise ValueError(
                f"{method} has no option {min(unknown, key=str)!r} in gradient_options; its options: {known}"
            )
        self.options = {**self.defaults, **options}

    @abstractmethod
    def __call__(self, engine: Engine, jobs: Sequence[Job], columns: Sequence[int]) -> list[np.ndarray]:
        """For every job the derivatives `(inputs, columns, words)` by some angles, the encoding's counted first."""

    @abstractmethod
    def executions(self, gates: Sequence[Gate], settings: int) -> int:
        """Executions for one input, for derivatives by the angles of these gates."""


class _Shifts(Jacobian):
    """Values at shifted angles, one angle at a time."""

    @abstractmethod
    def terms(self, gate: Gate) -> Sequence[tuple[float, float]]:
        """Pairs of coefficient and shift."""

    def __call__(self, engine: Engine, jobs: Sequence[Job], columns: Sequence[int]) -> list[np.ndarray]:
        gates = rotations(engine.tapes)
        wanted = [(job, column, shift) for job in jobs for column in columns for _, shift in self.terms(gates[column])]
        values = iter(engine.values([shifted(job, column, shift) for job, column, shift in wanted]))
        jacobians = []
        for job in jobs:
            jacobian = np.zeros((job.size, len(columns), len(engine.tapes.places[job.head])))
            for place, column in enumerate(columns):
                for coefficient, _ in self.terms(gates[column]):
                    jacobian[:, place] += coefficient * next(values)
            jacobians.append(jacobian)
        return jacobians

    def executions(self, gates: Sequence[Gate], settings: int) -> int:
        return settings * sum(len(self.terms(gate)) for gate in gates)


class ParameterShift(_Shifts):
    """Exact: 2 executions for a gate with one frequency, 4 for one with two, times the settings when sampling."""

    def terms(self, gate: Gate) -> Sequence[tuple[float, float]]:
        return shift_rule(gate)


class FiniteDifference(_Shifts):
    """Difference quotients; `h` the step in radians, `approx_order` and `strategy` as in PennyLane."""

    defaults = {"h": 1e-4, "approx_order": 2, "strategy": "center"}

    def __init__(self, method: str, options: Mapping[str, Any]):
        super().__init__(method, options)
        _check_step(self.options["h"])
        order, strategy = self.options["approx_order"], self.options["strategy"]
        try:
            coefficients, shifts = qml.gradients.finite_diff_coeffs(n=1, approx_order=order, strategy=strategy)
        except (TypeError, ValueError) as error:
            raise ValueError(f"gradient_options of {method}: {error}") from None
        h = self.options["h"]
        self._terms = [(float(c) / h, float(s) * h) for c, s in zip(coefficients, shifts, strict=True)]

    def terms(self, gate: Gate) -> Sequence[tuple[float, float]]:
        return self._terms


class SPSA(Jacobian):
    """Simultaneous perturbation: all angles move at once in random directions (Spall 1992); unbiased up to h^2.

    Options: `h` the step in radians, `num_directions` how many directions are averaged, `seed` draws them.
    """

    defaults = {"h": 1e-3, "num_directions": 1, "seed": 0}

    def __init__(self, method: str, options: Mapping[str, Any]):
        super().__init__(method, options)
        _check_step(self.options["h"])
        count = self.options["num_directions"]
        if type(count) is not int or count < 1:
            raise ValueError(f"num_directions must be at least 1 in gradient_options; got {count!r}")
        try:
            self._rng = np.random.default_rng(self.options["seed"])
        except (TypeError, ValueError):
            seed = self.options["seed"]
            raise ValueError(f"seed must be a non-negative integer in gradient_options; got {seed!r}") from None

    def __call__(self, engine: Engine, jobs: Sequence[Job], columns: Sequence[int]) -> list[np.ndarray]:
        h, count = self.options["h"], self.options["num_directions"]
        directions, moved = [], []
        for job in jobs:
            for _ in range(count):
                directions.append(self._rng.choice([-1.0, 1.0], size=(job.size, len(columns))))
                moved += [perturbed(job, columns, sign * h * directions[-1]) for sign in (1, -1)]
        values = engine.values(moved)
        jacobians = []
        for number, _ in enumerate(jobs):
            total = 0.0
            for k in range(number * count, (number + 1) * count):
                slope = (values[2 * k] - values[2 * k + 1]) / (2 * h)
                total = total + directions[k][:, :, None] * slope[:, None, :]
            jacobians.append(total / count)
        return jacobians

    def executions(self, gates: Sequence[Gate], settings: int) -> int:
        return 2 * self.options["num_directions"] * settings if gates else 0


class HadamardTest(Jacobian):
    """PennyLane's Hadamard test: exact, with one wire more."""

    def __call__(self, engine: Engine, jobs: Sequence[Job], columns: Sequence[int]) -> list[np.ndarray]:
        circuits, tapes, gathering = [], [], []
        for job in jobs:
            of_job = engine.tapes.expectations(job, broadcast=False)
            engine.tapes.trainable(of_job, columns)
            circuits.append(of_job)
            for tape in of_job:
                made, gather = self.transform(tape, engine.tapes.num_wires)
                gathering.append((gather, len(tapes), len(tapes) + len(made)))
                tapes += made
        results = [r if len(r) > 1 else r[0] for r in engine.runner.run(tapes)]
        per_tape = iter([gather(results[first:last]) for gather, first, last in gathering])
        jacobians = []
        for job, of_job in zip(jobs, circuits, strict=True):
            found = [_as_array(next(per_tape), len(tape.measurements), len(columns)) for tape in of_job]
            # what `gathered` expects: for each measurement an array, here of derivatives by one angle
            by_column = [
                engine.tapes.gathered(job, [tuple(f[:, c]) for f in found], broadcast=False)
                for c in range(len(columns))
            ]
            jacobians.append(np.stack(by_column, axis=1))
        return jacobians

    @staticmethod
    def transform(tape, num_wires: int):
        """PennyLane's transform, with the wire behind the circuit's as its auxiliary one."""
        return qml.gradients.hadamard_grad(tape, aux_wire=num_wires, mode="standard")

    def executions(self, gates: Sequence[Gate], settings: int) -> int:
        return settings * sum(_generator_terms(gate) for gate in gates)


def _check_step(h: Any) -> None:
    if isinstance(h, bool) or not isinstance(h, int | float) or not 0 < h < np.inf:
        raise ValueError(f"h must be a positive number in gradient_options; got {h!r}")


@cache
def _generator_terms(gate: Gate) -> int:
    tape = qml.tape.QuantumScript([operation(gate, 0.3)], [qml.expval(qml.Z(gate.wires[0]))], trainable_params=[0])
    return len(HadamardTest.transform(tape, max(gate.wires) + 1)[0])


def _as_array(found: Any, measurements: int, columns: int) -> np.ndarray:
    """Derivatives `(measurements, columns)`; PennyLane leaves out the axes of length 1."""
    return np.array(found, dtype=np.float64).reshape(measurements, columns)


#: Methods that need values alone.
JACOBIANS: dict[str, type[Jacobian]] = {
    "parameter-shift": ParameterShift,
    "finite-diff": FiniteDifference,
    "spsa": SPSA,
    "hadamard": HadamardTest,
}


def adjoint(
    engine: Engine, jobs: Sequence[Job], cotangents: Sequence[np.ndarray], columns: Sequence[int]
) -> list[np.ndarray]:
    """Vector-Jacobian products `(inputs, columns)`: one Hamiltonian and one backward sweep for each input."""
    tapes, places, gradients = [], [], []
    for job, cotangent in zip(jobs, cotangents, strict=True):
        gradients.append(np.zeros((job.size, len(columns))))
        needed = np.flatnonzero(cotangent.any(1))
        if not len(needed):
            continue
        part = job[needed]
        # a device may take tiny weights for zero, so they are scaled to 1
        scale = np.abs(cotangent[needed]).max(1, keepdims=True)
        of_job = engine.tapes.of_observables(part, engine.tapes.hamiltonians(job.head, cotangent[needed] / scale))
        engine.tapes.trainable(of_job, columns)
        places += [(gradients[-1], row, factor) for row, factor in zip(needed, scale[:, 0], strict=True)]
        tapes += of_job
    if tapes:
        for (gradient, row, factor), found in zip(places, engine.runner.adjoint_gradients(tapes), strict=True):
            gradient[row] = factor * found
    return gradients


def from_states(
    engine: Engine, jobs: Sequence[Job], cotangents: Sequence[np.ndarray], finals: Sequence[np.ndarray]
) -> list[np.ndarray]:
    r"""Vector-Jacobian products :math:`2\,U^\dagger H U\psi`, complex `(inputs, 2 ** wires)`.

    Args:
        finals: the final states :math:`U\psi`.
    """
    loads = [
        2 * engine.tapes.apply_hamiltonians(job.head, cotangent, final)
        for job, cotangent, final in zip(jobs, cotangents, finals, strict=True)
    ]
    return backwards(engine, jobs, loads)


def backwards(engine: Engine, jobs: Sequence[Job], loads: Sequence[np.ndarray]) -> list[np.ndarray]:
    r""":math:`U^\dagger` on vectors `(inputs, 2 ** wires)`, normalised for the device; null vectors are not run."""
    norms = [np.linalg.norm(load, axis=1) for load in loads]
    needed = [np.flatnonzero(norm) for norm in norms]
    runs = [
        Job(job.head, load[rows] / norm[rows, None], None, job.angles)
        for job, load, norm, rows in zip(jobs, loads, norms, needed, strict=True)
    ]
    results = []
    for load, norm, rows, out in zip(loads, norms, needed, engine.run_backwards(runs), strict=True):
        results.append(np.zeros_like(load))
        results[-1][rows] = norm[rows, None] * out
    return results


def polarisation(engine: Engine, jobs: Sequence[Job], phases: np.ndarray) -> list[np.ndarray]:
    """Jacobians `(inputs, entries, words)` by the real amplitudes, from values alone; 2 executions per entry.

    Args:
        phases: the fixed phase of each amplitude that is not padding.
    """
    asked, norms = [], []
    for job in jobs:
        for entry, phase in enumerate(phases):
            vectors = np.concatenate([job.states, job.states]).astype(complex if np.iscomplexobj(phases) else float)
            vectors[: job.size, entry] += phase
            vectors[job.size :, entry] -= phase
            norm = np.linalg.norm(vectors, axis=1)
            vectors[norm == 0, 0] = 1  # its term is 0
            asked.append(replace(job, states=vectors / np.where(norm == 0, 1, norm)[:, None]))
            norms.append(norm)
    values = iter(zip(engine.values(asked), norms, strict=True))
    jacobians = []
    for job in jobs:
        columns = []
        for _ in phases:
            value, norm = next(values)
            weighted = norm[:, None] ** 2 * value / 2
            columns.append(weighted[: job.size] - weighted[job.size :])
        jacobians.append(np.stack(columns, axis=1))
    return jacobians


def state_shifts(
    engine: Engine, jobs: Sequence[Job], loads: Sequence[np.ndarray], columns: Sequence[int]
) -> list[np.ndarray]:
    r"""Products :math:`\mathrm{Re}\langle c|\partial_k\phi\rangle` `(inputs, columns)` of loads with final states."""
    gates = rotations(engine.tapes)
    rules = [state_shift_rule(gates[column]) for column in columns]
    each = [(column, shift) for column, rule in zip(columns, rules, strict=True) for _, shift in rule]
    states = iter(engine.final_states([shifted(job, *moved) for job in jobs for moved in each]))
    products = []
    for job, load in zip(jobs, loads, strict=True):
        products.append(np.zeros((job.size, len(columns))))
        for place, rule in enumerate(rules):
            for coefficient, _ in rule:
                products[-1][:, place] += coefficient * (load.conj() * next(states)).sum(1).real
    return products


def rotations(tapes: Tapes) -> list[Gate]:
    """The gates that have an angle, the encoding's first."""
    return [gate for gate in (*tapes.encoding_gates, *tapes.gates) if gate.angle is not None]


def shifted(job: Job, column: int, shift: float) -> Job:
    """The job with one angle shifted."""
    encoded = 0 if job.encoding is None else job.encoding.shape[1]
    if column < encoded:
        encoding = job.encoding.copy()
        encoding[:, column] += shift
        return replace(job, encoding=encoding)
    angles = job.angles.copy()
    angles[..., column - encoded] += shift
    return replace(job, angles=angles)


def perturbed(job: Job, columns: Sequence[int], by: np.ndarray) -> Job:
    """The job with some angles moved, input by input: `by` is `(inputs, columns)`."""
    encoded = 0 if job.encoding is None else job.encoding.shape[1]
    angles = np.tile(job.angles, (job.size, 1))
    encoding = None if job.encoding is None else job.encoding.copy()
    for place, column in enumerate(columns):
        if column < encoded:
            encoding[:, column] += by[:, place]
        else:
            angles[:, column - encoded] += by[:, place]
    return replace(job, encoding=encoding, angles=angles)
