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
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.complex_numbers import as_pairs, as_working, matmul, multiply
from pennylane_qattn.observables import group_words, word_signs
from pennylane_qattn.program import Gate, Harmonics, Program
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
_Kind = TypeVar("_Kind", _Local, _Monomial)


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
            local = _earliest(steps, blocking, _Local)
            if local is None:
                steps.append(local := _Local())
            local.chains[wire].append(gate)
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


def _earliest(steps: list[_Step], blocking: int, kind: type[_Kind]) -> _Kind | None:
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


class _Gates:
    r"""Gates on as many wires each, all at once: :math:`C + A \cos a\theta + B \sin a\theta` (`Harmonics`).

    Args:
        gates: the gates.
        columns: for each the number of its angle; any for a constant gate.
    """

    def __init__(self, gates: Sequence[Gate], columns: Sequence[int], dtype: torch.dtype, device: torch.device):
        found = [Harmonics.of(gate) for gate in gates]

        def table(matrices: list[np.ndarray]) -> Tensor:
            pairs = np.stack([np.stack((m.real, m.imag), axis=-1) for m in matrices])
            return torch.as_tensor(pairs, dtype=dtype, device=device)

        self.constant = table([each.constant for each in found])
        self.cosine, self.sine = table([each.cosine for each in found]), table([each.sine for each in found])
        frequencies = [each.frequency for each in found]
        self.frequency = torch.tensor(frequencies, dtype=dtype, device=device)[:, None, None, None]
        self.columns = torch.tensor(columns, device=device)

    def __call__(self, angles: Float[Tensor, "circuits angles"]) -> Num[Tensor, "circuits gates dim dim *pair"]:
        if not angles.shape[1]:  # nothing turns
            return as_working(self.constant.expand(len(angles), -1, -1, -1, -1))
        turned = self.frequency * angles[:, self.columns, None, None, None]
        with_cosine = torch.addcmul(self.constant, self.cosine, turned.cos())
        return as_working(torch.addcmul(with_cosine, self.sine, turned.sin()))


class Fold:
    """The pure torch program of one or several circuits that differ in their angles and words only.

    All tables are made once, for one dtype and device; `states` and `readout` then call torch alone. Complex matrices
    are those of `complex_numbers.py`.

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
        with ordinary_mode():
            self._build(program, words, phases)

    def _build(self, program: Program | None, words: Sequence[Sequence[str]], phases: Tensor | None) -> None:
        self._phases = self._pairs(torch.ones(2**self.num_wires) if phases is None else phases)
        self._bases, self._signs = self._measurement(words)
        self._steps: list[tuple] = []
        if program is not None:
            self._compile(program)

    def evolve(
        self, weights: Float[Tensor, "circuits ..."], num_amplitudes: int
    ) -> tuple[Num[Tensor, "circuits dim amplitudes *pair"], Num[Tensor, "circuits wires 2 2 *pair"]]:
        """The ansatz up to its last one-wire gates, on the first columns of the identity; and those gates."""
        products, dense = self._gate_tables(weights)
        start = torch.eye(2**self.num_wires, dtype=self._dtype, device=self._device)[:, :num_amplitudes, None]
        start = start * self._phases[:num_amplitudes]
        matrix = as_working(start.expand(weights.shape[0], *start.shape))
        for kind, *step in self._steps[:-1]:
            if kind == "local":
                matrix = apply_local(products[step[0]], matrix)
            elif kind == "monomial":
                source, phases = step
                matrix = matrix[:, source]
                if phases is not None:
                    matrix = multiply(as_working(phases[:, None]), matrix)
            else:
                size, number, wires = step
                matrix = apply_dense(dense[size][number], wires, self.num_wires, matrix)
        return matrix, products[-1]

    def states(
        self, weights: Float[Tensor, "circuits ..."], num_amplitudes: int
    ) -> Num[Tensor, "circuits dim amplitudes *pair"]:
        """The first columns of U D: amplitudes in, state out."""
        matrix, last = self.evolve(weights, num_amplitudes)
        return apply_local(last, matrix)

    def readout(
        self,
        matrix: Num[Tensor, "circuits dim amplitudes *pair"],
        last: Num[Tensor, "circuits wires 2 2 *pair"] | None = None,
    ) -> tuple[Float[Tensor, "circuits rows amplitudes"], Float[Tensor, "circuits rows words"]]:
        """The real matrix `A` and the signs `S` with `v = (A a)^2 S`: all words of all settings at once.

        Args:
            matrix: takes amplitudes to the state before `last`.
            last: one-wire gates still to be applied, multiplied into the changes of basis.
        """
        circuits, dim, amplitudes = matrix.shape[:3]
        groups = self._bases.shape[1]
        local = as_working(self._bases.expand(circuits, *self._bases.shape[1:]))
        if last is not None:
            local = matmul(local, last[:, None])
        matrix = matrix[:, None].expand(-1, groups, *matrix.shape[1:]).flatten(0, 1)
        rotated = apply_local(local.flatten(0, 1), matrix)
        rows = as_pairs(rotated).movedim(-1, 1).reshape(circuits, groups * 2 * dim, amplitudes)
        return rows, self._signs

    def _pairs(self, values) -> Tensor:
        numbers = torch.as_tensor(values).to(device=self._device, dtype=self._dtype.to_complex())
        return torch.view_as_real(numbers).contiguous()

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
        return self._pairs(bases), signs.to(device=self._device, dtype=self._dtype)

    def _compile(self, program: Program) -> None:
        # Gates are listed in the order in which they are used, those on as many wires together.
        steps = fuse(program)
        gates: dict[int, list[Gate]] = defaultdict(list)
        self._chains = []  # for each step of one-wire gates how many stand on every wire
        for step in steps:
            if isinstance(step, _Local):
                depth = max((len(chain) for chain in step.chains.values()), default=1)
                self._chains.append(depth)
                for place in range(depth):
                    for wire in range(self.num_wires):
                        chain = step.chains.get(wire, [])
                        gates[1].append(chain[place] if place < len(chain) else _identity(wire))
                self._steps.append(("local", len(self._chains) - 1))
            elif isinstance(step, _Monomial):
                phases = None if np.allclose(step.phases, 1) else self._pairs(step.phases)
                self._steps.append(("monomial", torch.as_tensor(step.source, device=self._device), phases))
            else:
                self._steps.append(("dense", len(step.gate.wires), len(gates[len(step.gate.wires)]), step.gate.wires))
                gates[len(step.gate.wires)].append(step.gate)
        entries = program.entries

        def column(gate: Gate) -> int:
            return 0 if gate.angle is None else gate.angle if entries is None else entries[gate.angle]

        self._gates = {
            size: _Gates(listed, [column(gate) for gate in listed], self._dtype, self._device)
            for size, listed in gates.items()
        }

    def _gate_tables(self, weights: Tensor) -> tuple[list[Tensor], dict[int, Sequence[Tensor]]]:
        """The product of the gates on every wire, `(circuits, wires, 2, 2)`, for each step of one-wire gates; and the
        matrices of gates on several wires, `(circuits, dim, dim)`, by their number of wires."""
        angles = self.program.angles(weights) if self.program.entries is None else weights.reshape(len(weights), -1)
        tables = {size: gates(angles) for size, gates in self._gates.items()}
        places = iter(tables.pop(1).split(self.num_wires, dim=1))
        products = []
        for depth in self._chains:
            product = next(places)
            for _ in range(depth - 1):
                product = matmul(next(places), product)
            products.append(product)
        return products, {size: table.unbind(1) for size, table in tables.items()}


def _identity(wire: int) -> Gate:
    return Gate("Identity", (wire,), matrix=(((1.0, 0.0), (0.0, 0.0)), ((0.0, 0.0), (1.0, 0.0))))


class Memory:
    """Keeps the latest result of a function of some weights for as long as the weights have the same values.

    The values themselves are compared with a copy: version counters miss `.data` and NumPy aliases. It serves where the
    weights need no gradient, as in generation token by token; otherwise, and under `torch.compile`, it steps aside.
    """

    def __init__(self) -> None:
        #: Weights, key and result, read and written as one: threads may share a module.
        self._kept: tuple[Tensor, Any, Any] | None = None

    def __call__(self, function: Callable[[], Any], weights: Tensor, key: Any = None) -> Any:
        """`function()`, or what it gave last time if neither `weights` nor `key` has changed since."""
        if (torch.is_grad_enabled() and weights.requires_grad) or is_transformed():
            return function()
        key = (key, torch.is_inference_mode_enabled())  # autograd keeps no tensor of inference mode, even a constant
        kept = self._kept
        if kept is not None:
            held, of, result = kept
            comparable = (of, held.dtype, held.device) == (key, weights.dtype, weights.device)
            if comparable and torch.equal(held, weights):
                return result
        copied, result = weights.detach().clone(), function()
        self._kept = copied, key, result
        return result


def apply_local(
    gates: Num[Tensor, "batch wires 2 2 *pair"], matrix: Num[Tensor, "batch dim columns *pair"]
) -> Num[Tensor, "batch dim columns *pair"]:
    """One gate on every wire, several wires at a time."""
    (batch, dim, columns), pair = matrix.shape[:3], matrix.shape[3:]
    first = 0
    for part in gates.split(BLOCK_WIRES, dim=1):
        block = _kronecker(part)
        size, rest = block.shape[1], dim // (2**first * block.shape[1]) * columns
        parts = matrix.reshape(batch, 2**first, size, rest, *pair)
        matrix = matmul(block[:, None], parts).reshape(batch, dim, columns, *pair)
        first += part.shape[1]
    return matrix


def _kronecker(gates: Num[Tensor, "batch wires 2 2 *pair"]) -> Num[Tensor, "batch dim dim *pair"]:
    """The Kronecker product of the gates of all wires, by pairs, pairs of pairs and so on."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        number, size, pair = left.shape[1], left.shape[2] * right.shape[2], left.shape[4:]
        spread = multiply(left[:, :, :, None, :, None], right[:, :, None, :, None, :])
        return spread.reshape(-1, number, size, size, *pair)

    last = None
    while (wires := gates.shape[1]) > 1:
        if wires % 2:
            gates, odd = gates.split((wires - 1, 1), dim=1)
            last = odd if last is None else product(odd, last)
        gates = product(*gates.unflatten(1, (-1, 2)).unbind(2))
    return (gates if last is None else product(gates, last))[:, 0]


def apply_dense(
    gates: Num[Tensor, "batch sub sub *pair"],
    wires: Sequence[int],
    num_wires: int,
    matrix: Num[Tensor, "batch dim columns *pair"],
) -> Num[Tensor, "batch dim columns *pair"]:
    """A gate on some of the wires."""
    (batch, dim, columns), pair = matrix.shape[:3], matrix.shape[3:]
    axes = [wire + 1 for wire in wires]
    front = list(range(1, len(wires) + 1))
    parts = matrix.reshape(batch, *[2] * num_wires, columns, *pair).movedim(axes, front)
    shape, size = parts.shape, gates.shape[1]
    parts = matmul(gates, parts.reshape(batch, size, dim // size * columns, *pair))
    return parts.reshape(shape).movedim(front, axes).reshape(batch, dim, columns, *pair)


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
