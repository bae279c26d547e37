"""Ansätze: trainable circuits, as PennyLane writes them. One class, one registry entry; its shape is asked of it."""

import hashlib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pennylane as qml
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.program import Program
from pennylane_qattn.registry import Description, Registry

#: Ansätze by name.
ANSATZE: "Registry[Ansatz]" = Registry("ansatz")


class Ansatz(Description, ABC):
    """A trainable circuit: the shape of its angles, and its gates."""

    @abstractmethod
    def shape(self, num_wires: int) -> tuple[int, ...]:
        """Shape of the angles (radians) for that many wires."""

    @abstractmethod
    def __call__(self, weights: Float[Tensor, "..."], wires: Sequence[int]) -> None:
        """Queues the PennyLane gates."""

    def program(self, num_wires: int) -> Program:
        """The gates on wires 0 to `num_wires` - 1, traced."""
        return Program.trace(self, self.shape(num_wires), num_wires, label=self.label)

    @property
    def label(self) -> str:
        """What messages call it."""
        return getattr(self, "name", type(self).__name__)


def _at_least_one(layers: int) -> None:
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers must be an integer of at least 1; got {layers}")


@ANSATZE.register
@dataclass(frozen=True)
class QISAAnsatz(Ansatz):
    """The published circuit (QSANN, arXiv 2205.05625; QISA, arXiv 2603.03318): 3 angles per wire and layer.

    On each wire RX then RY; a ring of CNOTs from wire j to wire j + 1 (none on one wire); RY on each wire.

    Args:
        layers: how often that is repeated; published: once.
    """

    name = "qisa"
    layers: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self.layers)

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return (self.layers, 3, num_wires)

    def __call__(self, weights: Float[Tensor, "layers 3 wires"], wires: Sequence[int]) -> None:
        for first, second, third in weights:
            for wire, x_angle, y_angle in zip(wires, first, second, strict=True):
                qml.RX(x_angle, wires=wire)
                qml.RY(y_angle, wires=wire)
            if len(wires) > 1:
                for j, wire in enumerate(wires):
                    qml.CNOT(wires=[wire, wires[(j + 1) % len(wires)]])
            for wire, angle in zip(wires, third, strict=True):
                qml.RY(angle, wires=wire)


@ANSATZE.register
@dataclass(frozen=True)
class StronglyEntangling(Ansatz):
    """PennyLane's `StronglyEntanglingLayers` (arXiv 1804.00633): general rotations, CNOTs of growing range.

    Args:
        layers: number of layers.
    """

    name = "strongly-entangling"
    layers: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self.layers)

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return qml.StronglyEntanglingLayers.shape(n_layers=self.layers, n_wires=num_wires)

    def __call__(self, weights: Float[Tensor, "layers wires 3"], wires: Sequence[int]) -> None:
        qml.StronglyEntanglingLayers(weights, wires=wires)


@ANSATZE.register
@dataclass(frozen=True)
class BasicEntangler(Ansatz):
    """PennyLane's `BasicEntanglerLayers`: one rotation per wire, a ring of CNOTs.

    Args:
        layers: number of layers.
        rotation: axis of the rotations, `"X"`, `"Y"` or `"Z"`.
    """

    name = "basic-entangler"
    layers: int = 1
    rotation: str = "X"

    def __post_init__(self) -> None:
        _at_least_one(self.layers)
        if self.rotation not in ("X", "Y", "Z"):
            raise ValueError(f"rotation must be 'X', 'Y' or 'Z'; got {self.rotation!r}")

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return qml.BasicEntanglerLayers.shape(n_layers=self.layers, n_wires=num_wires)

    def __call__(self, weights: Float[Tensor, "layers wires"], wires: Sequence[int]) -> None:
        qml.BasicEntanglerLayers(weights, wires=wires, rotation=getattr(qml, f"R{self.rotation}"))


@ANSATZE.register
@dataclass(frozen=True)
class FunctionAnsatz(Ansatz):
    """A quantum function of your own.

    A checkpoint keeps its import path, the hash of its source and the traced gates; it is read back from the gates
    alone, without importing the function.

    Args:
        function: `f(weights, wires)`, queueing PennyLane gates, or its import path `"package.module:f"` (or
            `"package.module.f"`). Its gates may depend on the angles, which gates there are may not.
        weight_shape: shape of `weights`; an entry `"wires"` stands for the number of wires.
    """

    name = "function"
    is_plain = False
    function: str | Callable[[Any, Any], Any]
    weight_shape: tuple[int | str, ...]
    _programs: dict[int, Program] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        function = _import(self.function) if isinstance(self.function, str) else self.function
        if not callable(function):
            raise ValueError(f"function must be callable or an import path; got {self.function!r}")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "weight_shape", tuple(self.weight_shape))
        for size in self.weight_shape:
            if size != "wires" and not (isinstance(size, int) and size > 0):
                raise ValueError(f"weight_shape takes positive integers and 'wires'; got {self.weight_shape!r}")

    @property
    def _called(self) -> Callable[[Any, Any], Any]:
        return cast(Callable, self.function)  # no import path once it is built

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else num_wires for size in self.weight_shape)

    def __call__(self, weights: Float[Tensor, "..."], wires: Sequence[int]) -> None:
        self._called(weights, wires)

    @property
    def label(self) -> str:
        return _import_path(self._called)

    def program(self, num_wires: int) -> Program:
        if num_wires not in self._programs:
            self._programs[num_wires] = super().program(num_wires)
        return self._programs[num_wires]

    def to_plain(self) -> dict[str, Any]:
        """The form `TracedAnsatz` reads: where the function came from, and the programs traced so far."""
        return TracedAnsatz(
            origin=_import_path(self._called),
            source_sha256=_source_hash(self._called),
            programs=tuple(self._programs[n].to_plain() for n in sorted(self._programs)),
        ).to_plain()


@ANSATZE.register
@dataclass(frozen=True)
class TracedAnsatz(Ansatz):
    """A user's ansatz read from a checkpoint: the gates that were traced, run by PennyLane or folded.

    Args:
        origin: import path of the function it was traced from; for information, never imported.
        source_sha256: hash of that function's source.
        programs: the traced gates, one program for each number of wires that was in use.
    """

    name = "traced"
    origin: str
    source_sha256: str
    programs: tuple[dict, ...]
    _read: dict[int, Program] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "programs", tuple(self.programs))
        object.__setattr__(self, "_read", {p.num_wires: p for p in map(Program.from_plain, self.programs)})

    def __hash__(self) -> int:
        return hash((self.origin, self.source_sha256))

    def program(self, num_wires: int) -> Program:
        if num_wires not in self._read:
            raise ValueError(
                f"the ansatz {self.origin!r} was traced for {sorted(self._read)} wires, not for {num_wires}; "
                "build it anew with FunctionAnsatz"
            )
        return self._read[num_wires]

    def shape(self, num_wires: int) -> tuple[int, ...]:
        return self.program(num_wires).shape

    def __call__(self, weights: Float[Tensor, "..."], wires: Sequence[int]) -> None:
        self.program(len(wires)).queue(weights, wires)


def _import(path: str) -> Any:
    module, separator, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"cannot import {path!r}; give a function as 'package.module:function'") from None
    return found


def _import_path(function: Callable) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _source_hash(function: Callable) -> str:
    """SHA-256 of the source, or where there is none (an interactive session), `"unknown"`."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return "unknown"
