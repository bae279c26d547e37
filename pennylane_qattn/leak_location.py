"""Where a leak begins: the first submodule whose output depends on what it must not see, while its inputs do not."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennylane_qattn.leak_subject import Subject

#: Judges whether two tensors, from two calls, differ.
Differ = Callable[[Tensor, Tensor], bool]


@dataclass
class Step:
    """One call of a submodule, by its path, with the tensors that went in and came out."""

    path: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def steps_of(module: nn.Module, keep: bool = False) -> Iterator[list[Step]]:
    """The calls of all submodules while this lasts, in the order in which they end: the inner before the outer.

    Args:
        module: it.
        keep: keep the tensors themselves, for gradients; otherwise copies, which nothing changes in place.
    """
    done: list[Step] = []
    begun: list[Step] = []

    def begin(path: str, args: tuple, kwargs: dict) -> None:
        begun.append(Step(path, _tensors((args, kwargs), keep)))

    def end(output: Any) -> None:
        begun[-1].outputs = _tensors(output, keep)
        done.append(begun.pop())

    hooks = []
    for path, part in module.named_modules():
        hooks.append(
            part.register_forward_pre_hook(lambda _, args, kwargs, p=path: begin(p, args, kwargs), with_kwargs=True)
        )
        hooks.append(part.register_forward_hook(lambda _, args, output: end(output)))
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any, keep: bool) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return found if keep else [tensor.detach().clone() for tensor in found]


def trace(subject: Subject, x: Tensor, mode: str, **options: Any) -> list[Step]:
    """The steps of a call; none if it cannot be made."""
    with steps_of(subject.module) as steps:
        try:
            subject.call_whole(x, mode, **options)
        except Exception:  # a shape that the module does not take, for example
            return []
    return steps


@dataclass(frozen=True)
class Axes:
    """Finds time, or the rows of the batch, in tensors of any layout: by what another length does to their shapes.

    Attributes:
        size, other: entries along that axis here, and in the other call.
        outer: whether it is the outer one where it is flattened with another axis, as rows are.
    """

    size: int
    other: int
    outer: bool

    def kept(self, tensor: Tensor, shape: torch.Size | None, keep: Tensor) -> Tensor | None:
        """The entries whose place along all such axes is among `keep`; `None` if there is no such axis.

        A table of queries by keys has two: its entries belong to the later of both times.

        Args:
            tensor: of one call.
            shape: of the same tensor in a call of the other length; `None` if there was no such call.
            keep: indices.
        """
        axes = []
        for axis, entries in enumerate(tensor.shape):
            others = entries // self.size * self.other
            if entries % self.size == 0 and entries and (entries == self.size or shape is not None):
                if shape is None or (len(shape) == tensor.ndim and shape[axis] == others):
                    axes.append((axis, entries // self.size))
        for axis, factor in reversed(axes):
            if factor > 1:
                sizes = (self.size, factor) if self.outer else (factor, self.size)
                tensor = tensor.unflatten(axis, sizes)
            tensor = tensor.index_select(axis if factor == 1 or self.outer else axis + 1, keep)
        return tensor if axes else None


def first_to_change(
    one: Sequence[Step], other: Sequence[Step], shapes: Sequence[Step], axes: Axes, keep: Tensor, differ: Differ
) -> str:
    """The path of the first step whose outputs differ between two calls in what is kept, while its inputs do not.

    Args:
        one, other: the calls, of equal shapes.
        shapes: a call of another length; empty if there is none.
        axes: along which to keep.
        keep: indices of what must not differ.
        differ: judges.

    Returns:
        The path; empty if it cannot be told.
    """

    def moved(first: list[Tensor], second: list[Tensor], third: list[Tensor] | None, is_input: bool) -> bool:
        for index, (a, b) in enumerate(zip(first, second, strict=False)):
            if a.shape != b.shape:
                continue
            shape = None if third is None else third[index].shape
            kept = [axes.kept(tensor, shape, keep) for tensor in (a, b)]
            # of an input without a known layout nobody can say whether it is innocent, so an outer step is blamed
            if differ(*kept) if kept[0] is not None else is_input and differ(a, b):
                return True
        return False

    paired = shapes if _alike(one, shapes) else [None] * len(one)
    for a, b, c in zip(one, other, paired, strict=False):
        if a.path != b.path:
            break
        begins = moved(a.outputs, b.outputs, c.outputs if c else None, False)
        if begins and not moved(a.inputs, b.inputs, c.inputs if c else None, True):
            return a.path
    return ""


def first_to_depend(
    steps: Sequence[Step], shapes: Sequence[Step], axes: Axes, keep: Tensor, depends: Callable[[Tensor], bool]
) -> str:
    """The path of the first step whose outputs depend, in what is kept, on what they must not, while its inputs do not.

    Args:
        steps: one call, with gradients.
        shapes: a call of another length; empty if there is none.
        axes: along which to keep.
        keep: indices of what must not depend.
        depends: judges by gradients.
    """

    def any_of(tensors: list[Tensor], others: list[Tensor] | None, is_input: bool) -> bool:
        for index, tensor in enumerate(tensors):
            if tensor.requires_grad and tensor.is_floating_point():
                kept = axes.kept(tensor, None if others is None else others[index].shape, keep)
                if depends(kept) if kept is not None else is_input:
                    return True
        return False

    paired = shapes if _alike(steps, shapes) else [None] * len(steps)
    for step, other in zip(steps, paired, strict=True):
        begins = any_of(step.outputs, other.outputs if other else None, False)
        if begins and not any_of(step.inputs, other.inputs if other else None, True):
            return step.path
    return ""


def _alike(one: Sequence[Step], other: Sequence[Step]) -> bool:
    def form(steps: Sequence[Step]) -> list[tuple]:
        return [(step.path, len(step.inputs), len(step.outputs)) for step in steps]

    return form(one) == form(other)
