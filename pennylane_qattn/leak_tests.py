"""The tests of a certificate. Each is a generator that stops once at the least that must be done, and then goes on."""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennylane_qattn.certificate import Check, Leak
from pennylane_qattn.leak_location import Axes, Step, first_to_change, steps_of, trace
from pennylane_qattn.leak_subject import OutOfTime, Undecidable, one_line
from pennylane_qattn.leak_trial import LeakFound, LeftOut, Trial, Variant, allowance, difference

#: Futures that are looked at before anything else is.
LEAST = 3
#: The test that comes after the least of all others, and that a certificate can be without.
LARGE_CALLS = "large calls"


@dataclass
class Progress:
    """What has been done of one test in one mode.

    Attributes:
        has_least: the least that must be done is done, or does not apply.
        undecided: why the test says nothing.
        gap: what should have been looked at and was not.
    """

    test: str
    mode: str
    done: int = 0
    total: int = 0
    largest: float = 0.0
    left_out: str = ""
    remark: str = ""
    has_least: bool = False
    undecided: str = ""
    gap: str = ""

    def note(self, change: Tensor) -> None:
        """Takes down the largest change of those that should be none."""
        if change.numel():
            self.largest = max(self.largest, float(change.nan_to_num(nan=0.0).max()))
        if change.isnan().any():
            raise Undecidable(f"its output has NaN in {self.mode} mode, and a change of NaN says nothing")

    def check(self) -> Check:
        """As the certificate has it."""
        shown = ("test", "mode", "done", "total", "largest", "left_out", "remark")
        return Check(**{name: getattr(self, name) for name in shown})


def rows(trial: Trial, progress: Progress) -> Iterator[None]:
    """Changes one row of the batch after the other; the other rows must stay as they are."""
    mode = progress.mode
    if trial.rows < 2:
        raise LeftOut("there is one row only")
    _check_changeable(trial)
    draws = trial.settle(mode)
    progress.total = trial.rows
    reference = trial.reference(mode, trial.rows)
    for row in range(trial.rows):
        changed = trial.bases.clone()
        changed[row] = trial.others[row]
        change = difference(trial.subject.call(changed, mode), reference)
        change = change.index_fill(0, torch.tensor([row]), 0.0)
        moved = change > trial.allowed(reference)
        if moved.any():
            _check_draws(trial, mode, draws, changed, trial.bases)
            other, position = (int(i) for i in moved.any(-1).nonzero()[0])
            size = float(change[other, position].max())
            seen = Leak("rows", mode, trial.name, position, None, size, size, "batch", other, row)
            raise trial.found(seen, trial.leak_of_rows, row)
        progress.note(change)
        progress.done += 1
        yield


def futures(trial: Trial, progress: Progress) -> Iterator[None]:
    """Changes every token by itself, and all tokens from it on; outputs before it must stay as they are.

    Many changed sequences are one batch, beside as many unchanged ones in a call of the same shape.
    """
    mode = progress.mode
    _check_future(trial)
    _check_changeable(trial)
    draws = trial.settle(mode)
    progress.total = trial.length - 1
    every = [Variant(p + 1, is_suffix) for p in trial.order(trial.length - 1) for is_suffix in (False, True)]
    reference = trial.reference(mode, trial.copies)
    for first in range(0, len(every), trial.copies):
        piece = every[first : first + trial.copies]
        changed = trial.base_rows(trial.copies)
        for row, variant in enumerate(piece):
            trial.change(changed, row, variant, row % trial.rows)
        change = difference(trial.subject.call(changed, mode), reference)
        ends = torch.zeros(trial.copies, dtype=torch.int64)
        ends[: len(piece)] = torch.tensor([variant.position for variant in piece])
        change = change.masked_fill(torch.arange(trial.length)[None, :, None] >= ends[:, None, None], 0.0)
        moved = change > trial.allowed(reference)
        if moved.any():
            _check_draws(trial, mode, draws, changed, trial.base_rows(trial.copies))
            row, position = (int(i) for i in moved.any(-1).nonzero()[0])
            size = float(change[row, position].max())
            where = piece[row].position
            seen = Leak("futures", mode, trial.name, position, where, size, float(change.nan_to_num(nan=0.0).max()))
            raise trial.found(seen, trial.leak_of_future, row % trial.rows)
        progress.note(change)
        progress.done += len(piece) // 2
        if progress.done >= LEAST:
            yield


def jacobians(trial: Trial, progress: Progress) -> Iterator[None]:
    """Gradients of every output by all embeddings: those by later ones must be 0.

    It sees leaks too small to move anything; `futures` sees those that have no gradient.
    """
    mode = progress.mode
    _check_future(trial)
    trial.settle(mode)
    progress.total = trial.length - 1
    outputs = trial.order(trial.length - 1)
    copies = max(2, min(trial.copies, trial.length))
    for first in range(0, len(outputs), copies):
        piece = outputs[first : first + copies]
        padded = piece + piece[-1:] * (copies - len(piece))
        x = trial.base_rows(copies)
        found = trial.gradients(mode, x, padded)
        future = torch.arange(trial.length) > torch.tensor(padded)[:, None]
        leaking = found.masked_fill(~future, 0.0)
        moved = leaking > trial.tolerance * found.amax(1, keepdim=True)
        if moved.any():
            row, place = (int(i) for i in moved.nonzero()[0])
            size = float(leaking[row, place])
            seen = Leak("jacobians", mode, trial.name, padded[row], place, size, size)
            raise trial.found(seen, trial.leak_of_gradient, x, row)
        progress.note(leaking)
        progress.done += len(piece)
        yield


def single_rows(trial: Trial, progress: Progress) -> Iterator[None]:
    """Each row of the batch by itself: the output must be the same, up to rounding.

    Here and with a cache it is the first tensor of the output that counts: others may be made otherwise.
    """
    mode = progress.mode
    if trial.rows < 2:
        raise LeftOut("there is one row only")
    if trial.settle(mode):
        raise LeftOut("random numbers are drawn, and other shapes draw others")
    progress.total, progress.remark = trial.rows, _rounding(trial, mode)
    reference = _first_part(trial, mode)
    for row in range(trial.rows):
        try:
            alone = trial.subject.call(trial.bases[[row]], mode)
        except OutOfTime:
            raise
        except Exception as error:  # a module raises what it likes
            why = f"it does not take a row alone ({type(error).__name__}: {one_line(error)})"
            raise LeftOut(why, is_gap=True) from error
        change = difference(alone[..., : reference.shape[2]], reference[[row]])
        moved = change > allowance(reference, trial.rounding(mode))[[row]]
        if moved.any():
            position = int(moved[0].any(-1).nonzero()[0])
            size, largest = (float(c.nan_to_num(nan=0.0).max()) for c in (change[0, position], change))
            raise LeakFound(Leak("single rows", mode, trial.name, position, None, size, largest, "batch", row))
        progress.note(change)
        progress.done += 1
        yield


def cache(trial: Trial, progress: Progress) -> Iterator[None]:
    """Token by token, and in uneven pieces, with a cache: the output must be the same, up to rounding."""
    mode = progress.mode
    start = cache_of(trial)
    if start is None:
        raise LeftOut("the module has no cache")
    if trial.settle(mode):
        raise LeftOut("random numbers are drawn, and other shapes draw others")
    length, sizes = trial.length, [3, 1, 2]
    uneven = []
    while sum(uneven) < length:
        uneven.append(min(sizes[len(uneven) % 3], length - sum(uneven)))
    ways = [way for way in ([1] * length, uneven) if way != [length]]
    progress.total, progress.remark = len(ways), _rounding(trial, mode)
    reference = _first_part(trial, mode)
    for way in ways:
        pieces = trial.bases.split(way, dim=1)
        try:
            step = start()
            outputs = [step(piece) for piece in pieces]
        except (OutOfTime, Undecidable, LeftOut):
            raise
        except Exception as error:  # a module raises what it likes
            why = f"it does not run with the cache that it offers ({type(error).__name__}: {one_line(error)})"
            raise Undecidable(f"{why}; has_cache = False says that it has none") from error
        change = difference(torch.cat(outputs, 1), reference)
        moved = change > allowance(reference, trial.rounding(mode))
        if moved.any():
            position = int(moved.any(-1).any(0).nonzero()[0])
            size, largest = (float(c.nan_to_num(nan=0.0).max()) for c in (change[:, position], change))
            seen = Leak("cache", mode, trial.name, position, None, size, largest, "cache")
            raise trial.found(seen, _leak_of_cache, trial, pieces, start)
        progress.note(change)
        progress.done += 1
        yield


def weights(trial: Trial, progress: Progress) -> Iterator[None]:
    """Attention weights, where they are shown: none may be above the diagonal; the sums of their rows are told."""
    mode = progress.mode
    _check_future(trial)
    trial.settle(mode)
    found = _shown_weights(trial, mode)
    if not found:
        raise LeftOut("no attention weights are shown")
    progress.total = len(found)
    lowest, highest = float("inf"), float("-inf")
    for path, table in found:
        if table.shape[-2:] != (trial.length, trial.length):
            raise LeftOut(f"weights are not (batch, heads, seq, seq); got {tuple(table.shape)}")
        above = table.detach().double().abs().triu(1)
        if (above > trial.tolerance * table.abs().max()).any():
            seen = above.flatten(0, -3).amax(0)
            output, place = (int(i) for i in (seen > trial.tolerance * table.abs().max()).nonzero()[0])
            size = float(seen[output, place])
            raise LeakFound(Leak("weights", mode, path or trial.name, output, place, size, float(seen.max())))
        progress.note(above)
        sums = table.double().sum(-1)
        lowest, highest = min(lowest, float(sums.min())), max(highest, float(sums.max()))
        progress.done += 1
    is_one = max(abs(lowest - 1), abs(highest - 1)) <= trial.rounding(mode)
    progress.remark = "rows sum to 1" if is_one else f"rows sum to {lowest:.4g} to {highest:.4g}, not 1"
    yield


def large_calls(trial: Trial, progress: Progress) -> Iterator[None]:
    """Some futures once more, in calls of as many rows and tokens as a run's: what sees the future in these alone."""
    mode = progress.mode
    _check_changeable(trial)
    draws = trial.settle(mode)
    every = {size: trial.late_futures(*size) for size in trial.sizes}
    progress.total, done = sum(map(len, every.values())), list[str]()
    for (rows, length), variants in every.items():
        trial.afford(rows, length, 1 + -(-len(variants) // rows))
        bases, others = trial.draw(rows, length)
        try:
            reference = trial.subject.call(bases, mode)
            for first in range(0, len(variants), rows):
                piece = variants[first : first + rows]
                changed = bases.clone()
                for row, variant in enumerate(piece):
                    end = length if variant.is_suffix else variant.position + 1
                    changed[row, variant.position : end] = others[row, variant.position : end]
                _compare_large_calls(trial, progress, draws, bases, others, changed, reference, piece)
                progress.done += len(piece)
        except (LeakFound, OutOfTime, Undecidable):
            raise
        except Exception as error:  # a module raises what it likes
            why = f"it does not take {rows} rows of {length} ({type(error).__name__}: {one_line(error)})"
            raise LeftOut(why, is_gap=True) from error
        done.append(f"{rows} rows of {length}")
        progress.remark = ", ".join(done)
    yield


def _compare_large_calls(
    trial: Trial,
    progress: Progress,
    draws: bool,
    bases: Tensor,
    others: Tensor,
    changed: Tensor,
    reference: Tensor,
    piece: Sequence[Variant],
) -> None:
    """Raises `LeakFound` if a row that was changed from somewhere on moves before that."""
    mode, length = progress.mode, bases.shape[1]
    output = trial.subject.call(changed, mode)
    for row, variant in enumerate(piece):  # one by one, as such outputs are large
        past = slice(0, variant.position)
        change = difference(output[[row], past], reference[[row], past])
        moved = (change > trial.allowed(reference[[row]])[:, past]).any(-1)[0]
        if moved.any():
            if (difference(trial.subject.call(bases, mode), reference) > trial.allowed(reference)).any():
                raise Undecidable(f"two equal calls of {len(bases)} rows of {length} in {mode} mode differ")
            _check_draws(trial, mode, draws, changed, bases)
            position, sizes = int(moved.nonzero()[0]), change.nan_to_num(nan=0.0)
            size, largest = float(sizes[0, position].max()), float(sizes.max())
            seen = Leak(progress.test, mode, trial.name, position, variant.position, size, largest)
            raise trial.found(seen, trial.leak_of_large_call, bases, others, row, variant)
        progress.note(change)


#: In this order: what is known of the rows serves the others.
TESTS: dict[str, Callable[[Trial, Progress], Iterator[None]]] = {
    "rows": rows,
    "futures": futures,
    "jacobians": jacobians,
    "single rows": single_rows,
    "weights": weights,
    "cache": cache,
    LARGE_CALLS: large_calls,
}


# --- caches and weights of modules nobody here wrote ------------------------------------------------------------


def cache_of(trial: Trial) -> Callable[[], Callable[[Tensor], Tensor]] | None:
    """How a module runs with a cache: what begins a sequence, and then takes piece after piece; `None` if it cannot."""
    module, subject = trial.subject.module, trial.subject
    taken = inspect.signature(module.forward).parameters
    if any(getattr(part, "has_cache", True) is False for part in module.modules()):
        return None
    for new, option in (("new_cache", "cache"), ("new_caches", "caches")):
        if callable(getattr(module, new, None)) and option in taken:

            def start(new: str = new, option: str = option) -> Callable[[Tensor], Tensor]:
                with subject.in_its_dtype():  # that of a cache made without saying which
                    held = getattr(module, new)(trial.rows)
                return lambda piece: subject.tensor_of(subject.call_whole(piece, "eval", **{option: held}), piece)

            return start
    if {"use_cache", "past_key_values"} <= taken.keys():

        def start_hugging_face() -> Callable[[Tensor], Tensor]:
            held: list[Any] = [None]

            def step(piece: Tensor) -> Tensor:
                output = subject.call_whole(piece, "eval", past_key_values=held[0], use_cache=True)
                held[0] = getattr(output, "past_key_values", None)
                if held[0] is None:
                    raise LeftOut("it returns no past_key_values", is_gap=True)
                return subject.tensor_of(output, piece)

            return step

        return start_hugging_face
    return None


def _shown_weights(trial: Trial, mode: str) -> list[tuple[str, Tensor]]:
    """Attention weights by the path of their layer."""
    module, subject = trial.subject.module, trial.subject
    given: list[tuple[str, nn.Module, tuple, dict]] = []

    def look(part: nn.Module, args: tuple, kwargs: dict, path: str) -> None:
        kept = {k: kwargs[k] for k in ("key_padding_mask", "position_ids") if kwargs.get(k) is not None}
        given.append((path, part, args, kept))

    hooks = [
        part.register_forward_pre_hook(lambda m, args, kwargs, p=path: look(m, args, kwargs, p), with_kwargs=True)
        for path, part in module.named_modules()
        if inspect.isfunction(getattr(type(part), "weights", None))
    ]
    if hooks:
        try:
            subject.call(trial.bases, mode)
        finally:
            for hook in hooks:
                hook.remove()
        try:
            with torch.no_grad():
                return [(path, part.weights(*args[:1], **kwargs)) for path, part, args, kwargs in given]
        except Exception as error:  # a module raises what it likes
            why = f"its weights cannot be read ({type(error).__name__}: {one_line(error)})"
            raise LeftOut(why, is_gap=True) from error
    return _weights_of_hugging_face(trial, mode)


def _weights_of_hugging_face(trial: Trial, mode: str) -> list[tuple[str, Tensor]]:
    module, subject = trial.subject.module, trial.subject
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "output_attentions"):
        return []
    before = getattr(config, "_attn_implementation", None)
    switch = getattr(module, "set_attn_implementation", None)
    is_switched = before not in (None, "eager") and callable(switch)
    try:
        if is_switched:
            switch("eager")  # the others show no weights
        output = subject.call_whole(trial.bases, mode, output_attentions=True)
    except (OutOfTime, Undecidable):
        raise
    except Exception as error:  # a module raises what it likes
        why = f"its weights cannot be read ({type(error).__name__}: {one_line(error)})"
        raise LeftOut(why, is_gap=True) from error
    finally:
        if is_switched:
            switch(before)
    found = getattr(output, "attentions", None) or ()
    return [(f"attentions.{i}", table) for i, table in enumerate(found) if isinstance(table, Tensor)]


# --- helpers ----------------------------------------------------------------------------------------------------


def _check_future(trial: Trial) -> None:
    if trial.length < 2:
        raise LeftOut("there is one position only, so no future")


def _check_changeable(trial: Trial) -> None:
    if trial.is_constant:
        raise LeftOut("there is one token only, so nothing to change")


def _first_part(trial: Trial, mode: str) -> Tensor:
    """The first tensor of the output of the rows."""
    reference = trial.reference(mode, trial.rows)
    return reference[..., : trial.subject.parts[0]]


def _check_draws(trial: Trial, mode: str, draws: bool, changed: Tensor, bases: Tensor) -> None:
    """Two calls compare only if they draw the same random numbers."""
    if draws and trial.subject.drawn(changed, mode) != trial.subject.drawn(bases, mode):
        raise Undecidable(f"what it draws at random in {mode} mode depends on its inputs, so calls do not compare")


def _rounding(trial: Trial, mode: str) -> str:
    """What to say of the precision."""
    width, allowed = trial.precision(mode), f"up to {trial.rounding(mode):.0e}"
    return allowed if width >= 8 else f"{allowed}, as it computes in {8 * width} bits inside"


def _leak_of_cache(seen: Leak, trial: Trial, pieces: Sequence[Tensor], start: Callable) -> Leak:
    """The same, with the first step that computes something else with a cache."""
    subject, mode = trial.subject, seen.mode
    one, step, parts = trace(subject, trial.bases, mode), start(), []
    for piece in pieces:
        with steps_of(subject.module) as steps:
            step(piece)
        parts.append(_by_call(steps))

    def joined(tensors: list[list[Tensor]], whole: list[Tensor]) -> list[Tensor]:
        """Tensors of all pieces along the axis that grows; an empty one where there is nothing to compare."""
        found = []
        for index, full in enumerate(whole):
            each = [part[index] for part in tensors if index < len(part) and part[index].ndim == full.ndim]
            grown = [a for a in range(full.ndim) if each and each[0].shape[a] != full.shape[a]]
            try:
                found.append(torch.cat(each, grown[0]) if len(grown) == 1 else full.new_empty(0))
            except RuntimeError:  # not pieces of it
                found.append(full.new_empty(0))
        return found

    whole, merged = [], []
    for call, full in _by_call(one).items():
        if all(call in part for part in parts):
            whole.append(full)
            inputs, outputs = ([getattr(part[call], side) for part in parts] for side in ("inputs", "outputs"))
            merged.append(Step(full.path, joined(inputs, full.inputs), joined(outputs, full.outputs)))
    # the axis that grows is the only one that was joined, and all of it is compared
    axes, every = Axes(trial.length, trial.length, outer=False), torch.arange(trial.length)
    layer = first_to_change(whole, merged, [], axes, every, trial.differ(trial.rounding(mode)))
    return dataclasses.replace(seen, layer=layer or seen.layer)


def _by_call(steps: Sequence[Step]) -> dict[tuple[str, int], Step]:
    """Steps by path, and by how often that path has been called before."""
    counts: collections.Counter[str] = collections.Counter()
    found = {}
    for step in steps:
        found[step.path, counts[step.path]] = step
        counts[step.path] += 1
    return found
