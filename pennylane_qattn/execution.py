"""From a description of execution to executors, for circuits and for whole modules."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.devices import Meter
from pennylane_qattn.executor import Executor, FoldedExecutor
from pennylane_qattn.planning import Execution, Plan, make_meter, make_plan
from pennylane_qattn.qnode import QNodeExecutor


@runtime_checkable
class RunsCircuits(Protocol):
    """A module that has an executor and can be given another: feature maps, layers and scores with circuits."""

    @property
    def executor(self) -> Executor: ...

    def make_executor(self, execution: Execution | str, index: int, meter: Meter | None) -> Executor:
        """What would run its circuits that way."""

    def use(self, executor: Executor, execution: Execution | str, index: int = 0) -> None:
        """Takes over what `make_executor` made."""


def make_executor(
    circuits: Sequence[Circuit],
    execution: Execution | str = "auto",
    index: int = 0,
    for_states: bool = False,
    meter: Meter | None = None,
) -> Executor:
    """The executor for circuits that share encoding and ansatz.

    Args:
        circuits: one per head.
        execution: how to run them, or the name of an executor.
        index: sets the shots of several executors apart.
        for_states: final states are wanted, not expectation values.
        meter: counts the device's executions, of other executors too where they share it.

    Raises:
        ValueError: if that cannot be done; the message names what can.
    """
    execution = as_execution(execution)
    if execution.executor != "qnode":
        plan = make_plan(execution, circuits, for_states=for_states)
        if plan.executor == "folded":
            return FoldedExecutor(circuits, plan)
    return QNodeExecutor(circuits, execution, index, for_states, meter)


def as_execution(execution: Execution | str) -> Execution:
    """An execution from the name of an executor; a description is returned as it is."""
    return Execution(executor=execution) if isinstance(execution, str) else execution


def set_execution(module: nn.Module, execution: Execution | str) -> list[Plan]:
    """Runs every circuit in a module that way from now on, on one meter; parameters stay as they are.

    Args:
        module: any module with circuits inside: feature maps, layers, scores.
        execution: how to run them, or the name of an executor.

    Returns:
        The plan of each of them.

    Raises:
        ValueError: if one of them cannot be run so.
    """
    maps = with_circuits(module)
    meter = make_meter(as_execution(execution))
    made = [part.make_executor(execution, index, meter) for index, part in enumerate(maps)]  # all of them, or none
    for index, (part, executor) in enumerate(zip(maps, made, strict=True)):
        part.use(executor, execution, index)
    return [part.executor.plan for part in maps]


def executors(module: nn.Module) -> list[Executor]:
    """What runs the circuits in a module."""
    return [part.executor for part in with_circuits(module)]


def with_circuits(module: nn.Module) -> list[RunsCircuits]:
    """The modules inside that run circuits."""
    return [part for part in module.modules() if isinstance(part, RunsCircuits)]
