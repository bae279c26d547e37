r"""Folding: a circuit as matrices in torch, exact and differentiable in the angles.

With :math:`a(x)` the encoded real amplitudes, :math:`U` the ansatz, :math:`P_o` a Pauli word (QISA, arXiv 2603.03318),

.. math::

    v_o(x) = \langle\psi|U^\dagger P_o U|\psi\rangle
           = \sum_b s_{ob}\,\bigl|(R_g U D\, a(x))_b\bigr|^2

where :math:`D` holds the encoding's fixed phases, :math:`R_g` turns the measurement basis of the word's group to Z, and
:math:`s_{ob} = \pm 1`. All words that commute wire by wire share one :math:`R_g U D`; real and imaginary parts of all
groups stand in one real matrix, so a batch of tokens costs two matrix products and one square.
:math:`U` is applied as blocks of Kronecker products and permutations, never gate by gate on the tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.graph import Graph
from pennylane_qattn.observables import group_words, word_signs
from pennylane_qattn.program import Gate, Program, trace_rotations
from pennylane_qattn.transforms import is_transformed, ordinary_mode

#: Wires that are multiplied into one dense block: 16 x 16 keeps blocks in cache and products few.
BLOCK_WIRES = 4
#: Largest matrix a fold may build, in bytes.
MAX_FOLD_BYTES = 2**31
_TO_Z_BASIS = {
    "X": np.array([[1, 1], [1, -1]]) / np.sqrt(2),
    "Y": np.array([[1, -1j], [1, 1j]]) / np.sqrt(2),
    "Z": np.eye(2),
}


@dataclass
class _Local:
    """One-wire gates on several wires: for each wire the gates in order."""

    chains: dict[int, list[Gate]] = field(default_factory=lambda: defaultdict(list))

    @property
    def wires(self) -> set[int]:
        return set(self.chains)


@dataclass
class _Monomial:
    """Constant gates that permute basis states up to phases: amplitude `i` comes from `source[i]`."""

    wires: set[int]
    source: np.ndarray
    phases: np.ndarray


@dataclass
class _Dense:
    """Any other gate."""

    gate: Gate

    @property
    def wires(self) -> set[int]:
        return set(self.gate.wires)


_Step = _Local | _Monomial | _Dense


def fuse(program: Program) -> list[_Step]:
    """Gathers gates into few steps: one-wire gates into Kronecker products, CNOTs and the like into permutations.

    The last step is always of one-wire gates, so that a change of basis can be multiplied into it.
    """
    steps: list[_Step] = []
    for gate in program.gates:
        wires = set(gate.wires)
        blocking = max((i for i, step in enumerate(steps) if step.wires & wires), default=-1)
        if len(wires) == 1:
            (wire,) = wires
            home = _earliest(steps, blocking, _Local)
            if home is None:
                steps.append(home := _Local())
            home.chains[wire].append(gate)
        elif gate.angle is None and _is_monomial(gate.constant):
            source, phases = _embed_monomial(gate, program.num_wires)
            home = _earliest(steps, blocking, _Monomial)
            if home is None:
                steps.append(_Monomial(wires, source, phases))
            else:
                home.source, home.phases = home.source[source], phases * home.phases[source]
                home.wires |= wires
        else:
            steps.append(_Dense(gate))
    if not steps or not isinstance(steps[-1], _Local):
        steps.append(_Local())
    return steps


def _earliest(steps: list[_Step], blocking: int, kind: type) -> _Step | None:
    """The earliest step of a kind that a gate may join, `blocking` being the last step on its wires."""
    return next((step for step in steps[max(blocking, 0) :] if isinstance(step, kind)), None)


def _is_monomial(matrix: np.ndarray) -> bool:
    return bool(((np.abs(matrix) > 1e-12).sum(0) == 1).all())


def _embed_monomial(gate: Gate, num_wires: int) -> tuple[np.ndarray, np.ndarray]:
    matrix = gate.constant
    column = np.abs(matrix).argmax(1)
    states = np.arange(2**num_wires)
    shifts = [num_wires - 1 - wire for wire in gate.wires]
    local = sum(((states >> shift) & 1) << (len(shifts) - 1 - i) for i, shift in enumerate(shifts))
    source = states.copy()
    for i, shift in enumerate(shifts):
        bit = (column[local] >> (len(shifts) - 1 - i)) & 1
        source = (source & ~(1 << shift)) | (bit << shift)
    return source, matrix[local, column[local]]


class _PauliRotations:
    r"""Gates :math:`e^{-i\theta P/2} = \cos(\theta/2)\,1 - i \sin(\theta/2)\,P` on as many wires each, all at once.

    Real and imaginary parts stand side by side, as torch compiles no complex arithmetic.
    """

    def __init__(self, words: Sequence[str], dtype: torch.dtype, device: torch.device):
        def table(matrices: list[np.ndarray]) -> Tensor:
            pairs = np.stack([np.stack((m.real, m.imag), axis=-1) for m in matrices])
            return torch.as_tensor(pairs).to(device=device, dtype=dtype)

        self.identity = table([np.eye(2 ** len(words[0]))])
        self.generators = table([-1j * _pauli_matrix(word) for word in words])

    def __call__(self, angles: Float[Tensor, "circuits gates"]) -> Complex[Tensor, "circuits gates dim dim"]:
        half = (angles / 2)[..., None, None, None]
        return torch.view_as_complex(torch.addcmul(half.cos() * self.identity, half.sin(), self.generators))


@dataclass(frozen=True)
class _TracedGates:
    """Gates of any other kind, by PennyLane's formula."""

    graph: Graph
    dtype: torch.dtype

    def __call__(self, angles: Float[Tensor, "circuits gates"]) -> Complex[Tensor, "circuits gates dim dim"]:
        return self.graph(angles.reshape(-1))[0].to(self.dtype).unflatten(0, angles.shape)


def _pauli_matrix(word: str) -> np.ndarray:
    return qml.matrix(qml.pauli.string_to_pauli_word(word), wire_order=range(len(word)))


class Fold:
    """The pure torch program of one or several circuits that differ in their angles and words only.

    All tables are made once, for one dtype and device; `states` and `observables` then call torch alone.

    Args:
        program: the ansatz; `None` for no circuit at all (then `evolve` is not to be called).
        num_wires: number of qubits.
        words: for each circuit its Pauli words, as many for each.
        phases: fixed phases of the encoded amplitudes.
        dtype: real dtype, float32 or float64.
        device: where to compute.
    """

    def __init__(
        self,
        program: Program | None,
        num_wires: int,
        words: Sequence[Sequence[str]],
        *,
        phases: Tensor | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_wires, self.program = num_wires, program
        self._dtype, self._device = dtype, device
        self.complex_dtype = dtype.to_complex()
        with ordinary_mode():
            self._build(program, words, phases)

    def _build(self, program: Program | None, words: Sequence[Sequence[str]], phases: Tensor | None) -> None:
        self._phases = None if phases is None else self._complex(phases)
        self._bases, self._signs = self._measurement(words)
        self._kinds: list[tuple[Callable[[Tensor], Tensor] | None, Tensor]] = []
        self._steps: list[tuple] = []
        if program is not None:
            self._compile(program, len(words))

    def evolve(
        self, weights: Float[Tensor, "circuits ..."], num_amplitudes: int
    ) -> tuple[Complex[Tensor, "circuits dim amplitudes"], Complex[Tensor, "circuits wires 2 2"]]:
        """The ansatz up to its last one-wire gates, on the first columns of the identity; and those gates."""
        circuits = weights.shape[0]
        tables = self._gate_tables(weights)
        start = torch.eye(2**self.num_wires, dtype=self.complex_dtype, device=self._device)[:, :num_amplitudes]
        if self._phases is not None:
            start = start * self._phases[:num_amplitudes]
        matrix = start.expand(circuits, -1, -1)
        for kind, *step in self._steps[:-1]:
            if kind == "local":
                matrix = apply_local(self._local(tables, *step), matrix)
            elif kind == "monomial":
                source, phases = step
                matrix = matrix[:, source]
                if phases is not None:
                    matrix = matrix * phases[:, None]
            else:
                table, row, wires = step
                matrix = apply_dense(tables[table][:, row], wires, self.num_wires, matrix)
        return matrix, self._local(tables, *self._steps[-1][1:])

    def states(
        self, weights: Float[Tensor, "circuits ..."], num_amplitudes: int
    ) -> Complex[Tensor, "circuits dim amp"]:
        """The first columns of U D: amplitudes in, state out."""
        matrix, last = self.evolve(weights, num_amplitudes)
        return apply_local(last, matrix)

    def readout(
        self,
        matrix: Complex[Tensor, "circuits dim amplitudes"],
        last: Complex[Tensor, "circuits wires 2 2"] | None = None,
    ) -> tuple[Float[Tensor, "circuits rows amplitudes"], Float[Tensor, "circuits rows words"]]:
        """The real matrix `A` and the signs `S` with `v = (A a)^2 S`: all words of all settings at once.

        Args:
            matrix: takes amplitudes to the state before `last`.
            last: one-wire gates still to be applied, multiplied into the changes of basis.
        """
        circuits, dim, amplitudes = matrix.shape
        groups = self._bases.shape[1]
        local = self._bases if last is None else self._bases @ last[:, None]
        matrix = matrix[:, None].expand(-1, groups, -1, -1).reshape(circuits * groups, dim, amplitudes)
        rotated = apply_local(local.expand(circuits, -1, -1, -1, -1).flatten(0, 1), matrix)
        rows = torch.view_as_real(rotated).movedim(-1, 1).reshape(circuits, groups * 2 * dim, amplitudes)
        return rows, self._signs

    def _complex(self, values) -> Tensor:
        return torch.as_tensor(values).to(device=self._device, dtype=self.complex_dtype)

    def _measurement(self, words: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Changes of basis (circuits, settings, wires, 2, 2) and signs (circuits, settings * 2 * dim, words)."""
        grouped = [group_words(w) for w in words]
        settings = max(len(groups) for groups in grouped)
        dim = 2**self.num_wires
        bases = np.tile(np.eye(2, dtype=complex), (len(words), settings, self.num_wires, 1, 1))
        signs = np.zeros((len(words), settings, 2, dim, len(words[0])))
        for circuit, groups in enumerate(grouped):
            for setting, (basis, members) in enumerate(groups):
                bases[circuit, setting] = [_TO_Z_BASIS[letter] for letter in basis]
                for word in members:
                    signs[circuit, setting, :, :, word] = word_signs(words[circuit][word])
        signs = torch.as_tensor(signs.reshape(len(words), -1, signs.shape[-1]))
        return self._complex(bases), signs.to(device=self._device, dtype=self._dtype)

    def _compile(self, program: Program, circuits: int) -> None:
        # One table of matrices per kind of gate, all rotations about Pauli words on as many wires being of one kind.
        tables: dict[tuple, int] = {}
        rows: dict[int, tuple[int, int]] = {}
        angles: dict[tuple, list[int]] = defaultdict(list)
        generators: dict[tuple, list[str]] = defaultdict(list)
        for gate in program.gates:
            if gate.angle is not None:
                kind = (len(gate.wires), None if gate.generator else gate.name)
                tables.setdefault(kind, len(tables))
                rows[id(gate)] = (tables[kind], len(angles[kind]))
                angles[kind].append(gate.angle)
                generators[kind].append(gate.generator)
        entries = program.entries
        one_wire = []
        for kind, used in angles.items():
            columns = used if entries is None else [entries[i] for i in used]
            wires, name = kind
            if wires == 1:
                one_wire.append(len(self._kinds))
            matrices = (
                _PauliRotations(generators[kind], self._dtype, self._device)
                if name is None
                else _TracedGates(trace_rotations(name, circuits * len(used), self._dtype), self.complex_dtype)
            )
            self._kinds.append((matrices, torch.tensor(columns, device=self._device)))
        # One-wire gates, constant ones too, are looked up in one table: kinds in order, then constants, then identity.
        offsets, total = {}, 0
        for i in one_wire:
            offsets[i], total = total, total + len(self._kinds[i][1])
        constants: list[np.ndarray] = [np.eye(2)]
        self._one_wire = one_wire
        for step in fuse(program):
            if isinstance(step, _Local):
                depth = max((len(chain) for chain in step.chains.values()), default=1)
                lookup = np.full((depth, self.num_wires), total)
                for wire, chain in step.chains.items():
                    for place, gate in enumerate(chain):
                        if gate.angle is None:
                            lookup[place, wire] = total + len(constants)
                            constants.append(gate.constant)
                        else:
                            table, row = rows[id(gate)]
                            lookup[place, wire] = offsets[table] + row
                self._steps.append(("local", torch.as_tensor(lookup, device=self._device)))
            elif isinstance(step, _Monomial):
                phases = None if np.allclose(step.phases, 1) else self._complex(step.phases)
                self._steps.append(("monomial", torch.as_tensor(step.source, device=self._device), phases))
            elif step.gate.angle is None:
                self._steps.append(("dense", len(self._kinds), 0, step.gate.wires))
                self._kinds.append((None, self._complex(step.gate.constant)[None]))
            else:
                self._steps.append(("dense", *rows[id(step.gate)], step.gate.wires))
        self._constants = self._complex(np.stack(constants))

    def _gate_tables(self, weights: Tensor) -> list[Tensor]:
        """Matrices of every kind of gate, (circuits, gates, dim, dim); last all one-wire gates together."""
        circuits = weights.shape[0]
        program = self.program
        angles = weights.reshape(circuits, -1) if program.entries is not None else program.angles(weights)
        tables = []
        for matrices, columns in self._kinds:
            if matrices is None:
                tables.append(columns.expand(circuits, -1, -1, -1))
            else:
                tables.append(matrices(angles[:, columns]))
        constants = self._constants.expand(circuits, -1, -1, -1)
        tables.append(torch.cat([*(tables[i] for i in self._one_wire), constants], dim=1))
        return tables

    @staticmethod
    def _local(tables: list[Tensor], lookup: Tensor) -> Tensor:
        """The product of each wire's chain of gates: (circuits, wires, 2, 2)."""
        product = tables[-1][:, lookup[0]]
        for place in range(1, len(lookup)):  # to go through a tensor would put it into an exported program
            product = tables[-1][:, lookup[place]] @ product
        return product


class Memory:
    """Keeps the latest result of a function of some weights for as long as the weights have the same values.

    The values themselves are compared with a copy: version counters miss `.data` and NumPy aliases. It serves where the
    weights need no gradient, as in generation token by token; otherwise, and under `torch.compile`, it steps aside.
    """

    def __init__(self) -> None:
        self._weights: Tensor | None = None
        self._key: Any = None
        self._result: Any = None

    def __call__(self, function: Callable[[], Any], weights: Tensor, key: Any = None) -> Any:
        """`function()`, or what it gave last time if neither `weights` nor `key` has changed since."""
        if (torch.is_grad_enabled() and weights.requires_grad) or is_transformed():
            return function()
        key = (key, torch.is_inference_mode_enabled())  # autograd keeps no tensor of inference mode, even a constant
        held = self._weights
        comparable = held is not None and (held.dtype, held.device) == (weights.dtype, weights.device)
        if not (comparable and self._key == key and torch.equal(held, weights)):
            self._weights, self._key, self._result = weights.detach().clone(), key, function()
        return self._result


def apply_local(
    gates: Complex[Tensor, "batch wires 2 2"], matrix: Complex[Tensor, "batch dim columns"]
) -> Complex[Tensor, "batch dim columns"]:
    """One gate on every wire, several wires at a time."""
    batch, dim, columns = matrix.shape
    wires = gates.shape[1]
    for first in range(0, wires, BLOCK_WIRES):
        block = gates[:, first]
        for wire in range(first + 1, min(first + BLOCK_WIRES, wires)):
            size = 2 * block.shape[1]
            block = (block[:, :, None, :, None] * gates[:, wire, None, :, None, :]).reshape(batch, size, size)
        size = block.shape[1]
        parts = matrix.reshape(batch, 2**first, size, -1)
        matrix = (block[:, None] @ parts).reshape(batch, dim, columns)
    return matrix


def apply_dense(
    gates: Complex[Tensor, "batch sub sub"],
    wires: Sequence[int],
    num_wires: int,
    matrix: Complex[Tensor, "batch dim columns"],
) -> Complex[Tensor, "batch dim columns"]:
    """A gate on some of the wires."""
    batch, dim, columns = matrix.shape
    axes = [wire + 1 for wire in wires]
    front = list(range(1, len(wires) + 1))
    parts = matrix.reshape(batch, *[2] * num_wires, columns).movedim(axes, front)
    shape = parts.shape
    parts = gates @ parts.reshape(batch, gates.shape[1], -1)
    return parts.reshape(shape).movedim(front, axes).reshape(batch, dim, columns)


def check_foldable(circuit: Circuit, num_circuits: int) -> None:
    """Refuses circuits whose matrices would not fit in memory."""
    settings = len(group_words(circuit.words))
    amplitudes = circuit.encoding.num_amplitudes(circuit.num_features)
    size = 16 * num_circuits * settings * 2**circuit.num_wires * amplitudes
    if size > MAX_FOLD_BYTES:
        raise ValueError(
            f"folding {num_circuits} circuits of {circuit.num_wires} qubits takes {size / 2**30:.1f} GiB; "
            "use amplitude encoding, fewer features per head (split heads), or fewer wires"
        )
