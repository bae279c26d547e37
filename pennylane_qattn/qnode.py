"""Circuits on PennyLane devices: the executor `qnode`.

Where gradients are by backprop the QNodes are called as they are, a batch at a time. Every other method goes through
one autograd function that sends whole batches of tapes to the device: equal inputs once where values are exact, one
vector-Jacobian product instead of a Jacobian row per observable, and gradients of encoded states that are finite
everywhere (see `gradients`).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn import gradients
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.counting import inference_executions, training_executions
from pennylane_qattn.devices import MAX_AMPLITUDES, Meter
from pennylane_qattn.executor import Executor
from pennylane_qattn.gradients import JACOBIANS
from pennylane_qattn.observables import to_pennylane, word_action
from pennylane_qattn.planning import Execution, make_plan, open_runner, with_default_step
from pennylane_qattn.tapes import Job, Tapes, encoding_angles
from pennylane_qattn.transforms import is_transformed


class QNodeExecutor(Executor):
    """Runs circuits on a device.

    Args:
        circuits: one per head.
        execution: device, method, shots and noise.
        index: sets the shots of several executors apart.
        for_states: final states are wanted, not expectation values.
        meter: counts executions, of other executors too where they share it.
    """

    name = "qnode"

    def __init__(
        self,
        circuits: Sequence[Circuit],
        execution: Execution,
        index: int = 0,
        for_states: bool = False,
        meter: Meter | None = None,
    ):
        super().__init__(circuits)
        self.execution, self._for_states = execution, for_states
        self.runner = open_runner(execution, self.circuits[0].num_wires, index, meter)
        self.meter = self.runner.meter
        self.plan = make_plan(execution, self.circuits, self.runner, for_states)
        self.tapes = Tapes(self.circuits, execution.noise, execution.shots)
        self.jacobian = None
        method = self.plan.diff_method
        if method in JACOBIANS:
            options = with_default_step(execution)
            if method == "spsa":
                options.setdefault("seed", (execution.seed, index))
            self.jacobian = JACOBIANS[method](method, options)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing: devices compute in their own precision, complex128 unless told otherwise."""

    def count(self, tokens: int, training: bool) -> int:
        sampling, states = self.execution.shots is not None, self.plan.input_gradient == "state"
        total = 0
        for circuit in self.circuits:
            if training:
                total += training_executions(
                    circuit,
                    self.plan.diff_method,
                    sampling=sampling,
                    gives_states=states or self._for_states,
                    for_states=self._for_states,
                    options=self.execution.gradient_options,
                ).total
            else:
                total += inference_executions(circuit, sampling)
        return tokens * total

    def expectations(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens words"]:
        return self._call(_Expectations, x, weights)

    def states(
        self, x: Float[Tensor, "#heads tokens features"], weights: Float[Tensor, "heads ..."]
    ) -> Float[Tensor, "heads tokens amplitudes"]:
        return self._call(_States, x, weights)

    def qnode(self, head: int = 0, states: bool = False) -> Callable:
        """The PennyLane QNode `f(inputs, weights)` of a head, noise included.

        It takes one input or a batch of them, and gives one value per distinct word, or the final state; with backprop
        on a mixed-state device, the density matrix.
        """
        circuit = self.circuits[head]

        def function(inputs, weights):
            with qml.queuing.QueuingManager.stop_recording():
                encoded = self._encoded(inputs.reshape(-1, circuit.num_features))
                angles = self.tapes.angles(weights[None])
                if self.runner.gives_channels:
                    # mixed-state devices turn a scalar float64 angle of a diagonal gate into complex64, a batch not
                    angles = angles.expand(len(encoded), -1)
                if inputs.ndim == 1:
                    encoded, angles = encoded[0], angles[0]
                elif not self.runner.gives_channels:
                    angles = angles[0]
                prepared = (None, encoded) if self.tapes.encoding.uses_gates else (self._state(encoded), None)
                operations = self.tapes.operations(*prepared, angles)
            for operation in operations:
                qml.apply(operation)
            if self._mixes:
                return qml.density_matrix(self.tapes.wires)
            if states:
                return qml.state()
            return [qml.expval(to_pennylane(word, self.tapes.wires)) for word in self.tapes.words[head]]

        # the names of PennyLane's methods are used here as they are
        node = qml.QNode(function, self.runner.device, interface="torch", diff_method=self.plan.diff_method)
        return node if self.execution.shots is None else qml.set_shots(node, shots=self.execution.shots)

    # --- what gradients call ------------------------------------------------------------------------------------

    def values(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        return self._run(jobs, self.tapes.expectations, self.tapes.gathered)

    def final_states(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        return self._run(jobs, self.tapes.states, lambda job, *results: self.tapes.gathered_states(*results))

    def values_and_states(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Words and final states, of one execution each."""

        def gather(job: Job, *results) -> tuple[np.ndarray, np.ndarray]:
            return self.tapes.gathered(job, *results), self.tapes.gathered_states(*results)

        return self._run(jobs, self.tapes.with_states, gather)

    def run_backwards(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        return self._run(jobs, self.tapes.backwards, lambda job, *results: self.tapes.gathered_states(*results))

    def _run(self, jobs: Sequence[Job], make: Callable, gather: Callable) -> list:
        """All tapes of all jobs in one call; broadcast jobs in parts that fit in memory."""
        broadcast = self.runner.broadcasts
        size = 4**self.tapes.num_wires if self.runner.gives_channels else 2**self.tapes.num_wires
        size = max(size, (self.execution.shots or 0) * self.tapes.num_wires)  # every bit of every shot is kept
        most = max(1, MAX_AMPLITUDES // size) if broadcast else None
        if most and self.execution.processes > 1:  # which share tapes, not what is in one
            most = min(most, -(-max(job.size for job in jobs) // self.execution.processes) or 1)
        parts = [
            [job[first : first + most] for first in range(0, job.size, most)] if most and job.size else [job]
            for job in jobs
        ]
        made = [[make(part, broadcast) if part.size else [] for part in of_job] for of_job in parts]
        results = iter(self.runner.run([tape for of_job in made for tapes in of_job for tape in tapes]))
        return [
            _joined(
                [
                    gather(part, list(itertools.islice(results, len(tapes))), broadcast)
                    for part, tapes in zip(of_job, tapes_of_job, strict=True)
                ]
            )
            for of_job, tapes_of_job in zip(parts, made, strict=True)
        ]

    # --- between torch and the device ---------------------------------------------------------------------------

    def _call(self, function: type[torch.autograd.Function], x: Tensor, weights: Tensor) -> Tensor:
        if is_transformed():
            raise RuntimeError("QNodes do not run under torch.func, torch.compile or torch.export; use executor folded")
        if not torch.isfinite(x).all():
            row = int((~torch.isfinite(x)).any(-1).flatten().nonzero()[0])
            raise ValueError(
                f"the inputs of a circuit hold NaN or infinity (first in row {row}); look for their origin"
            )
        if not torch.isfinite(weights).all():
            raise ValueError("the angles of a circuit hold NaN or infinity; lower the learning rate")
        if not x.shape[1]:
            # no circuit to run, and yet gradients that are zero
            width = 2 * 2**self.tapes.num_wires if function is _States else len(self.tapes.places[0])
            return (x.sum() + weights.sum() * 0).expand(len(weights), 0, width)
        if self.plan.diff_method == "backprop":
            return self._backprop(x, weights, states=function is _States)
        encoded = torch.stack([self._encoded(rows) for rows in x])
        values = function.apply(self, encoded, self.tapes.angles(weights))
        return values.to(x.dtype)

    def _encoded(self, x: Tensor) -> Tensor:
        """Real amplitudes, or angles of the encoding's gates: `(inputs, entries)`."""
        if self.tapes.encoding.uses_gates:
            return encoding_angles(self.circuits[0], x)
        return self.tapes.encoding.amplitudes(x)

    def _state(self, amplitudes: Tensor) -> Tensor:
        """Prepared states `(..., 2 ** wires)` from amplitudes."""
        phases = self.tapes.encoding.phases(self.circuits[0].num_features)
        padded = torch.nn.functional.pad(amplitudes, (0, 2**self.tapes.num_wires - amplitudes.shape[-1]))
        return padded if phases is None else padded * phases.to(padded.device, padded.dtype.to_complex())

    def _phases(self, entries: int) -> np.ndarray:
        phases = self.tapes.encoding.phases(self.circuits[0].num_features)
        return np.ones(entries) if phases is None else phases.numpy()[:entries]

    def _backprop(self, x: Tensor, weights: Tensor, states: bool) -> Tensor:
        """The QNodes themselves, called with all inputs at once."""
        results = []
        for head in range(len(self.circuits)):
            inputs = x[head if len(x) > 1 else 0]
            self.runner.meter.charge(len(inputs), self.runner.name)
            found = self.qnode(head, states)(inputs, weights[head])
            if states:
                state = found.reshape(len(inputs), 2**self.tapes.num_wires, -1)[..., 0]
                results.append(torch.cat((state.real, state.imag), dim=-1))
                continue
            values = self._traces(head, found) if self._mixes else found
            words = torch.stack([value.expand(len(inputs)) for value in values], dim=-1)
            words = words * words.new_tensor(self.tapes.readout_factors(head))
            results.append(words[:, self.tapes.places[head]])
        return torch.stack(results).to(x.dtype)

    @property
    def _mixes(self) -> bool:
        """Whether words are read from the density matrix.

        A mixed-state device takes the root of probabilities on its way, whose gradient at 0 is NaN.
        """
        return self.plan.diff_method == "backprop" and self.runner.gives_channels

    def _traces(self, head: int, density: Tensor) -> list[Tensor]:
        """Expectation values of a head's distinct words in density matrices `(inputs, dim, dim)`."""
        rows = np.arange(density.shape[-1])
        actions = [word_action(word) for word in self.tapes.words[head]]
        return [
            (density[:, source, rows] * torch.as_tensor(phases).to(density.device, density.dtype)).sum(-1).real
            for source, phases in actions
        ]

    def jobs(self, encoded: Tensor, angles: Tensor) -> tuple[list[Job], list[np.ndarray]]:
        """One job per head, equal inputs once where values are exact; and which row of it every token has."""
        distinct, places = [], []
        for rows in encoded.detach().to("cpu", torch.float64).numpy():
            if self.execution.shots is None:
                rows, place = np.unique(rows, axis=0, return_inverse=True)
                places.append(place.reshape(-1))
            else:
                places.append(np.arange(len(rows)))
            distinct.append(rows)
        turns = angles.detach().to("cpu", torch.float64).numpy()
        shared = len(distinct) == 1
        made = []
        for head, turn in enumerate(turns):
            rows = distinct[0 if shared else head]
            if self.tapes.encoding.uses_gates:
                made.append(Job(head, None, rows, turn))
            else:
                rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)  # float32 rounds more than devices accept
                made.append(Job(head, self._state(torch.from_numpy(rows)).numpy(), None, turn))
        return made, places * len(turns) if shared else places


class _Expectations(torch.autograd.Function):
    """Expectation values on a device, and their vector-Jacobian products."""

    @staticmethod
    def forward(ctx, engine: QNodeExecutor, encoded: Tensor, angles: Tensor) -> Tensor:
        jobs, places = engine.jobs(encoded, angles)
        ctx.states = None
        if ctx.needs_input_grad[1] and engine.plan.input_gradient == "state":
            values, ctx.states = zip(*engine.values_and_states(jobs), strict=True)
        else:
            values = engine.values(jobs)
        ctx.engine, ctx.jobs, ctx.places, ctx.entries = engine, jobs, places, encoded.shape
        ctx.dtypes = encoded.dtype, angles.dtype
        stacked = np.stack([value[place] for value, place in zip(values, places, strict=True)])
        return torch.from_numpy(stacked).to(encoded.device, torch.promote_types(*ctx.dtypes))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_derivatives(ctx.engine)
        cotangents = list(upstream.detach().to("cpu", torch.float64).numpy())
        with np.errstate(invalid="ignore"):  # an infinite loss has NaN gradients, which are the trainer's to see
            by_input, by_angle = _vjp(ctx, ctx.engine, cotangents)
        return None, *_as_gradients(ctx, upstream.device, by_input, by_angle)


def _vjp(ctx, engine: QNodeExecutor, cotangents: list[np.ndarray]):
    """Gradients `(tokens, entries)` and `(angles,)` of every head; `None` where none is wanted."""
    _, input_wanted, angles_wanted = ctx.needs_input_grad
    jobs, places = ctx.jobs, ctx.places
    encoded = ctx.entries[-1] if engine.tapes.encoding.uses_gates else 0
    turned = jobs[0].angles.shape[-1]
    columns = [*range(encoded if input_wanted else 0), *range(encoded, encoded + turned if angles_wanted else encoded)]
    taken = encoded if input_wanted else 0
    by_input: list = [None] * len(jobs)
    by_angle: list = [None] * len(jobs)

    if columns and engine.plan.diff_method == "adjoint":
        # gradients by inputs are a token's own; those by angles can be taken for equal inputs together
        merged = not taken
        run, weights = list(jobs), cotangents
        if merged:
            weights = [_summed(g, place, job.size) for g, place, job in zip(cotangents, places, jobs, strict=True)]
        else:
            run = [job[place] for job, place in zip(jobs, places, strict=True)]
        for head, product in enumerate(gradients.adjoint(engine, run, weights, columns)):
            by_input[head], by_angle[head] = product[:, :taken], product[:, taken:].sum(0)
    elif columns:
        for head, jacobian in enumerate(engine.jacobian(engine, jobs, columns)):
            summed = _summed(cotangents[head], places[head], jobs[head].size)
            by_angle[head] = np.einsum("ucw,uw->c", jacobian[:, taken:], summed)
            if taken:
                by_input[head] = np.einsum("tcw,tw->tc", jacobian[:, :taken][places[head]], cotangents[head])

    if input_wanted and not encoded:
        entries = ctx.entries[-1]
        phases = engine._phases(entries)
        if engine.plan.input_gradient == "state":
            tokens = [job[place] for job, place in zip(jobs, places, strict=True)]
            finals = [state[place] for state, place in zip(ctx.states, places, strict=True)]
            found = gradients.from_states(engine, tokens, cotangents, finals)
            by_input = [(phases.conj() * product[:, :entries]).real for product in found]
        else:
            for head, jacobian in enumerate(gradients.polarisation(engine, jobs, phases)):
                by_input[head] = np.einsum("tcw,tw->tc", jacobian[places[head]], cotangents[head])
    return by_input, by_angle


class _States(torch.autograd.Function):
    """Final states on a device, real amplitudes followed by imaginary ones, and their vector-Jacobian products."""

    @staticmethod
    def forward(ctx, engine: QNodeExecutor, encoded: Tensor, angles: Tensor) -> Tensor:
        jobs, places = engine.jobs(encoded, angles)
        states = [state[place] for state, place in zip(engine.final_states(jobs), places, strict=True)]
        ctx.engine, ctx.jobs, ctx.places, ctx.entries = engine, jobs, places, encoded.shape
        ctx.dtypes = encoded.dtype, angles.dtype
        packed = np.stack([np.concatenate([state.real, state.imag], axis=-1) for state in states])
        return torch.from_numpy(packed).to(encoded.device, torch.promote_types(*ctx.dtypes))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_derivatives(ctx.engine)
        engine, entries = ctx.engine, ctx.entries[-1]
        _, input_wanted, angles_wanted = ctx.needs_input_grad
        encoded = entries if engine.tapes.encoding.uses_gates else 0
        tokens = [job[place] for job, place in zip(ctx.jobs, ctx.places, strict=True)]
        halves = upstream.detach().to("cpu", torch.float64).unflatten(-1, (2, -1)).numpy()
        loads = list(halves[:, :, 0] + 1j * halves[:, :, 1])
        taken = encoded if input_wanted else 0
        last = encoded + (tokens[0].angles.shape[-1] if angles_wanted else 0)
        products = gradients.state_shifts(engine, tokens, loads, [*range(taken), *range(encoded, last)])
        by_angle = [product[:, taken:].sum(0) for product in products]
        by_input = [product[:, :taken] for product in products]
        if input_wanted and not encoded:
            phases = engine._phases(entries).conj()
            with np.errstate(invalid="ignore"):
                by_input = [(phases * v[:, :entries]).real for v in gradients.backwards(engine, tokens, loads)]
        return None, *_as_gradients(ctx, upstream.device, by_input, by_angle)


def _refuse_second_derivatives(engine: QNodeExecutor) -> None:
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradient; a part of it would be left out
        raise RuntimeError(
            f"circuits on devices have first derivatives only by {engine.plan.diff_method}; use executor folded, or "
            "default.qubit with backprop"
        )


def _as_gradients(ctx, device: torch.device, by_input: list, by_angle: list) -> tuple[Tensor | None, Tensor | None]:
    _, input_wanted, angles_wanted = ctx.needs_input_grad
    inputs = angles = None
    if input_wanted:
        summed = np.stack(by_input)
        if ctx.entries[0] == 1:  # all heads read the same inputs
            summed = summed.sum(0, keepdims=True)
        inputs = torch.from_numpy(summed).to(device, ctx.dtypes[0])
    if angles_wanted:
        angles = torch.from_numpy(np.stack(by_angle)).to(device, ctx.dtypes[1])
    return inputs, angles


def _summed(cotangent: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """Cotangents of equal inputs added up."""
    total = np.zeros((size, cotangent.shape[-1]))
    np.add.at(total, place, cotangent)
    return total


def _joined(pieces: list):
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], tuple):
        return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return np.concatenate(pieces)
