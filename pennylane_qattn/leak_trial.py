"""A module on trial: its inputs and what is put in their place, calls that compare, and the leak when one is found."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pennylane_qattn.certificate import Leak
from pennylane_qattn.leak_location import Axes, Step, first_to_change, first_to_depend, steps_of, trace
from pennylane_qattn.leak_subject import ROUNDING, Subject, Undecidable, one_line, token_embeddings
from pennylane_qattn.module_sizes import MAX_WORK

#: Most tokens of one call, and most entries of its output: bounds memory, and the time between looks at the clock.
MAX_TOKENS, MAX_ENTRIES = 4096, 2 * 10**7
#: Most entries of the output, or of a table of tokens by tokens, of a call as large as a run's: 1 GiB in float64.
MAX_LARGE_ENTRIES = 2**27
#: The largest change that is written down: JSON knows no infinity.
LARGEST = torch.finfo(torch.float64).max


class LeakFound(Exception):
    """Carries a leak."""

    def __init__(self, leak: Leak):
        super().__init__(str(leak))
        self.leak = leak


class LeftOut(Exception):
    """A test that does not apply or cannot be made; the message tells why.

    Attributes:
        is_gap: it should have been made, so the certificate is one in part.
    """

    def __init__(self, why: str, is_gap: bool = False):
        super().__init__(why)
        self.is_gap = is_gap


@dataclass(frozen=True)
class Variant:
    """A change of the future: one token, or all from it on.

    Attributes:
        position: of the token.
        is_suffix: all later tokens are changed too.
    """

    position: int
    is_suffix: bool


def difference(one: Tensor, other: Tensor) -> Tensor:
    """The change of every entry; 0 between equal infinities, NaN between two NaN, else the largest float."""
    change = (one - other).abs().masked_fill(one == other, 0.0)
    change = change.masked_fill(one.isnan() != other.isnan(), torch.inf)
    return change.double().nan_to_num(nan=torch.nan, posinf=LARGEST)


def allowance(reference: Tensor, tolerance: float) -> Tensor:
    """The largest change of every entry that is rounding: relative to itself, or to what is usual for all features.

    A feature may be huge, as the logit of a token that must never come is, and must not cover leaks into others. So
    what is usual is not the largest entry but the largest entry of a small feature, of the first tenth.
    """
    sizes = reference.detach().abs().double().nan_to_num(nan=0.0, posinf=0.0)
    largest = (sizes.flatten(0, -2).amax(0) if sizes.ndim > 1 and sizes.numel() else sizes.flatten()).sort().values
    largest = largest[largest > 0]
    usual = float(largest[len(largest) // 10]) if len(largest) else 0.0
    return tolerance * sizes.clamp(min=usual)


@dataclass
class Trial:
    """A subject with inputs.

    Attributes:
        subject: it.
        bases: sequences, tokens `(rows, seq)` or embeddings `(rows, seq, embed)`.
        others: what to put in each token's place, different everywhere.
        tolerance: largest relative change, in calls of one shape, that is none.
        draw: gives as much of both for other rows and lengths.
        sizes: rows and lengths of calls that are larger than those of all other tests.
    """

    subject: Subject
    bases: Tensor
    others: Tensor
    tolerance: float
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    sizes: tuple[tuple[int, int], ...] = ()
    _draws: dict[str, bool] = field(default_factory=dict)
    _faults: dict[str, str] = field(default_factory=dict)
    _references: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _precisions: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.bases)

    @property
    def length(self) -> int:
        return self.bases.shape[1]

    @property
    def is_constant(self) -> bool:
        """There is but one token, so nothing can be changed."""
        return self.subject.reading.kind == "tokens" and self.subject.reading.size == 1

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def copies(self) -> int:
        """Rows of a large call: an even number."""
        parameters = max(1, sum(parameter.numel() for parameter in self.subject.module.parameters()))
        tokens = min(MAX_TOKENS, 2 * MAX_WORK // parameters, MAX_ENTRIES // max(1, self.subject.features))
        return max(2, min(tokens // self.length, 2 * self.length) // 2 * 2)

    def rounding(self, mode: str) -> float:
        """Largest relative change between calls of different shapes."""
        return max(self.tolerance, ROUNDING[self.precision(mode)])

    def precision(self, mode: str) -> int:
        """Bytes of the narrowest floating number computed."""
        if mode not in self._precisions:
            self._precisions[mode] = self.subject.precision(self.bases, mode)
        return self._precisions[mode]

    def allowed(self, reference: Tensor) -> Tensor:
        """The largest change, in calls of one shape, that is rounding: of every tensor of the output by itself."""
        return torch.cat([allowance(part, self.tolerance) for part in reference.split(self.subject.parts, -1)], -1)

    # --- calls ------------------------------------------------------------------------------------------------------

    def settle(self, mode: str) -> bool:
        """Whether calls in that mode draw random numbers, once it is known that two equal calls agree.

        Raises:
            Undecidable: if they do not.
        """
        if mode not in self._draws and mode not in self._faults:
            first = self.subject.call(self.bases, mode)
            change = difference(self.subject.call(self.bases, mode), first)
            if (change > self.allowed(first)).any():
                self._faults[mode] = f"two equal calls in {mode} mode differ by {float(change.max()):.1e}"
            else:
                # Python's and NumPy's are drawn from by much that has no effect, so these are told by what they change
                other = self.subject.call(self.bases, mode, seed=self.subject.seed + 1)
                differs = (difference(other, first) > self.allowed(first)).any()
                self._draws[mode] = bool(differs) or self.subject.draws(self.bases, mode)
        if mode in self._faults:
            raise Undecidable(self._faults[mode])
        return self._draws[mode]

    def base_rows(self, copies: int) -> Tensor:
        """The sequences, again and again."""
        return self.bases[torch.arange(copies) % self.rows]

    def reference(self, mode: str, copies: int) -> Tensor:
        """The output of so many unchanged rows."""
        if (mode, copies) not in self._references:
            self._references[mode, copies] = self.subject.call(self.base_rows(copies), mode)
        return self._references[mode, copies]

    def change(self, x: Tensor, row: int, variant: Variant, base: int) -> None:
        """Changes a row of `x` in place."""
        end = self.length if variant.is_suffix else variant.position + 1
        x[row, variant.position : end] = self.others[base, variant.position : end]

    def order(self, count: int) -> list[int]:
        """The numbers below `count`: the last, the first, the middle, and the others as the seed has them."""
        generator = torch.Generator().manual_seed(self.subject.seed)
        first = [count - 1, 0, count // 2]
        return list(dict.fromkeys([*first, *torch.randperm(count, generator=generator).tolist()]))[:count]

    def found(self, seen: Leak, locate: Callable[..., Leak], *details: Any) -> LeakFound:
        """A leak that was seen, located if the module lets itself be called for that: whatever the time."""
        self.subject.deadline = math.inf
        try:
            return LeakFound(locate(seen, *details))
        except Exception:  # a module raises what it likes
            return LeakFound(seen)

    # --- a leak in time, by changes ---------------------------------------------------------------------------------

    def leak_of_future(self, seen: Leak, base: int) -> Leak:
        """The leak that was seen in one sequence: its smallest positions, and the layer."""
        mode = seen.mode
        copies, length = self.copies, self.length
        x = self.bases[[base]].repeat_interleave(copies, 0)
        reference = self.subject.call(x, mode)
        every = [Variant(p, is_suffix) for is_suffix in (False, True) for p in range(1, length)]
        changes = torch.zeros(len(every), length, dtype=torch.float64)
        moved = torch.zeros(len(every), length, dtype=torch.bool)
        for first in range(0, len(every), copies):
            changed = x.clone()
            for row, each in enumerate(every[first : first + copies]):
                self.change(changed, row, each, base)
            change = difference(self.subject.call(changed, mode), reference).nan_to_num(nan=0.0)
            rows = len(every) - first
            changes[first : first + copies] = change.amax(-1)[:rows]
            moved[first : first + copies] = (change > self.allowed(reference)).any(-1)[:rows]
        is_past = torch.arange(length) < torch.tensor([each.position for each in every])[:, None]
        changes, moved = changes * is_past, moved & is_past
        if not moved.any():  # it came from the other rows
            return dataclasses.replace(seen, across="batch")
        output = int(moved.any(0).nonzero()[0])
        # a suffix names no token; the latest one says most
        singles, suffixes = moved[: length - 1, output], moved[length - 1 :, output]
        index = int(singles.nonzero()[0]) if singles.any() else length - 1 + int(suffixes.nonzero()[-1])
        chosen = every[index]
        changed = x.clone()
        self.change(changed, index % copies, chosen, base)
        layer = self._first_to_change(mode, x, changed, chosen.position)
        size = float(changes[index, output])
        return Leak(seen.test, mode, layer or self.name, output, chosen.position, size, float(changes.max()))

    def _first_to_change(self, mode: str, x: Tensor, changed: Tensor, position: int) -> str:
        axes = Axes(x.shape[1], x.shape[1] - 1, outer=False)
        one, other, shapes = (trace(self.subject, each, mode) for each in (x, changed, x[:, :-1]))
        return first_to_change(one, other, shapes, axes, torch.arange(position), self.differ(self.tolerance))

    # --- a leak in time, in large calls -----------------------------------------------------------------------------

    def late_futures(self, rows: int, length: int) -> list[Variant]:
        """Changes of the future for calls of so many rows: of late tokens first, as many as there are rows or six."""
        middle, late = length // 2, 3 * length // 4
        first = min(self.length, length - 1)
        suffixes = [middle, first, 7 * length // 8]
        chosen = [Variant(length - 1, False), Variant(middle, True), Variant(late, False), Variant(first, False)]
        chosen += [Variant(position, True) for position in suffixes]
        chosen += [Variant(p + 1, is_suffix) for p in self.order(length - 1) for is_suffix in (True, False)]
        chosen = [each for each in dict.fromkeys(chosen) if each.position > 0]
        return chosen[: max(rows, 6)]

    def afford(self, rows: int, length: int, calls: int) -> None:
        """Sees to it that large calls fit into memory and into a third of the time that is left.

        Raises:
            LeftOut: if they do not.
        """
        subject = self.subject
        if rows * length * max(subject.features, length) > MAX_LARGE_ENTRIES:
            raise LeftOut(f"calls of {rows} rows of {length} take too much memory", is_gap=True)
        seconds = calls * rows * length * subject.seconds_per_token
        if 3 * seconds > subject.deadline - time.monotonic():
            raise LeftOut(f"no time for calls of {rows} rows of {length}", is_gap=True)

    def leak_of_large_call(self, seen: Leak, x: Tensor, others: Tensor, row: int, variant: Variant) -> Leak:
        """The leak that was seen in one row of a large call: its positions, and the layer."""
        mode, length = seen.mode, x.shape[1]
        reference = self.subject.call(x, mode)[[row]]

        def changed(first: int) -> Tensor:
            other = x.clone()
            end = length if variant.is_suffix else first + 1
            other[row, first:end] = others[row, first:end]
            return other

        def effect(first: int) -> tuple[Tensor, Tensor]:
            change = difference(self.subject.call(changed(first), mode)[[row]], reference)
            moved = (change > self.allowed(reference)).any(-1)[0]
            return change.nan_to_num(nan=0.0).amax(-1)[0, :first], moved[:first]

        change, moved = effect(variant.position)
        if not moved.any():  # it came from the other rows
            return dataclasses.replace(seen, across="batch", output_row=row)
        output, first, end = int(moved.nonzero()[0]), variant.position, length
        while variant.is_suffix and end - first > 1:  # the latest from which on a change is felt there
            middle = (first + end) // 2
            first, end = (middle, end) if effect(middle)[1][output] else (first, middle)
        change, _ = effect(first)
        layer = ""
        if x.shape[0] * length <= MAX_TOKENS:  # as all tensors of all layers are kept
            layer = self._first_to_change(mode, x, changed(first), first)
        size, largest = float(change[output]), float(change.max())
        return Leak(seen.test, mode, layer or self.name, output, first, size, largest)

    @staticmethod
    def differ(tolerance: float) -> Callable[[Tensor, Tensor], bool]:
        """Judges whether two tensors differ by more than that, relative to the largest entry."""

        def judge(one: Tensor, other: Tensor) -> bool:
            if not (one.is_floating_point() or one.is_complex()):
                return not torch.equal(one, other)
            return bool((difference(one, other) > allowance(one, tolerance)).any())

        return judge

    # --- a leak in time, by gradients -------------------------------------------------------------------------------

    def gradients(self, mode: str, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Gradients `(rows, seq)`, in size, of each row's output at its position by that row's embeddings.

        Raises:
            LeftOut: if there are none.
        """
        output, leaves, _ = _call_with_gradients(self.subject, mode, x)
        chosen = output[torch.arange(len(outputs)), torch.tensor(outputs)]
        return self._by_leaves((chosen * self._combination(output)).sum(), leaves)

    def leak_of_gradient(self, seen: Leak, x: Tensor, row: int) -> Leak:
        """The leak that was seen in one row: its smallest positions, and the layer."""
        test, mode = seen.test, seen.mode
        output, leaves, steps = _call_with_gradients(self.subject, mode, x, with_steps=True)
        combination = self._combination(output)
        table = torch.zeros(self.length, self.length, dtype=torch.float64)
        across: Leak | None = None
        for position in range(self.length):
            found = self._by_leaves((output[row, position] * combination).sum(), leaves)
            table[position] = found[row]
            elsewhere = found.index_fill(0, torch.tensor([row]), 0.0)
            size = float(elsewhere.max())
            if across is None and size > self.tolerance * found.max():
                other, place = divmod(int(elsewhere.argmax()), self.length)
                across = Leak(test, mode, self.name, position, place, size, size, "batch", row, other)
        future = table.triu(1)
        leaking = future > self.tolerance * table.amax(1, keepdim=True)
        if not leaking.any():
            return across or seen
        position, place = (int(i) for i in leaking.nonzero()[0])

        def depends(kept: Tensor) -> bool:
            generator = torch.Generator().manual_seed(self.subject.seed)
            weights = torch.randn(kept.shape, dtype=torch.float64, generator=generator).to(kept.dtype)
            found = self._by_leaves((kept * weights).sum(), leaves)
            return bool(found[:, position + 1 :].max() > self.tolerance * found.max())

        axes = Axes(self.length, self.length - 1, outer=False)
        shapes = trace(self.subject, x[:, :-1], mode)
        layer = first_to_depend(steps, shapes, axes, torch.arange(position + 1), depends)
        size, largest = float(future[position, place]), float(future.max())
        return Leak(test, mode, layer or self.name, position, place, size, largest)

    def _combination(self, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.subject.seed)
        return torch.randn(output.shape[2], dtype=torch.float64, generator=generator).to(output.dtype)

    @staticmethod
    def _by_leaves(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        try:
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        except Exception as error:  # backward functions raise what they like
            raise LeftOut(f"it has no gradient ({type(error).__name__}: {one_line(error)})") from error
        sizes = [
            torch.zeros(leaf.shape[:2], dtype=torch.float64) if g is None else g.abs().amax(-1).double()
            for g, leaf in zip(found, leaves, strict=True)
        ]
        total = torch.stack(sizes).amax(0)
        if not total.isfinite().all():
            raise LeftOut("its gradient is not finite")
        return total

    # --- a leak across the batch ------------------------------------------------------------------------------------

    def leak_of_rows(self, seen: Leak, changed_row: int) -> Leak:
        """The leak that was seen from one row of the batch into others: its smallest positions, and the layer."""
        mode = seen.mode
        reference = self.subject.call(self.bases, mode)
        allowed = self.allowed(reference)

        def effect(tokens: int) -> Tensor:
            changed = self.bases.clone()
            changed[changed_row, :tokens] = self.others[changed_row, :tokens]
            change = difference(self.subject.call(changed, mode), reference).nan_to_num(nan=0.0)
            return change.index_fill(0, torch.tensor([changed_row]), 0.0)

        whole = effect(self.length)
        row, position = (int(i) for i in (whole > allowed).any(-1).nonzero()[0])
        low, high = 0, self.length  # the fewest first tokens whose change is felt there
        while high - low > 1:
            middle = (low + high) // 2
            is_felt = (effect(middle) > allowed)[row, position].any()
            low, high = (low, middle) if is_felt else (middle, high)
        changed = self.bases.clone()
        changed[changed_row] = self.others[changed_row]
        axes = Axes(self.rows, self.rows + 1, outer=True)
        more = torch.cat((self.bases, self.bases[:1]))
        one, other, shapes = (trace(self.subject, each, mode) for each in (self.bases, changed, more))
        keep = torch.tensor([r for r in range(self.rows) if r != changed_row])
        layer = first_to_change(one, other, shapes, axes, keep, self.differ(self.tolerance))
        size, largest = float(whole[row, position].max()), float(whole.max())
        return dataclasses.replace(
            seen, layer=layer or self.name, output=position, input=high - 1, size=size, largest=largest, output_row=row
        )


def _call_with_gradients(
    subject: Subject, mode: str, x: Tensor, with_steps: bool = False
) -> tuple[Tensor, list[Tensor], list[Step]]:
    """A call's output, the embeddings to differentiate by, and its steps."""
    leaves: list[Tensor] = []

    def replace(output: Tensor) -> Tensor | None:
        if not isinstance(output, Tensor) or output.shape[:2] != x.shape or not output.is_floating_point():
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
        leaves.append(x)
    steps: list[Step] = []
    try:
        with token_embeddings(subject.module, x, replace), contextlib.ExitStack() as stack:
            if with_steps:
                steps = stack.enter_context(steps_of(subject.module, keep=True))
            output = subject.call(x, mode, grad=True)
    except (RuntimeError, TypeError, ValueError) as error:
        why = f"it does not run with gradients ({type(error).__name__}: {one_line(error)})"
        raise LeftOut(why, is_gap=True) from error
    if not leaves:
        raise LeftOut("no embedding of the tokens was found to take gradients by")
    if not output.requires_grad:
        raise LeftOut("its output has no gradient")
    return output, leaves, steps
