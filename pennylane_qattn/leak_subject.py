"""A module as its certificate sees it: a copy in float64, called again and again from one and the same state."""

import collections
import contextlib
import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pennylane_qattn.execution import executors, set_execution
from pennylane_qattn.module_sizes import (
    Reading,
    all_tensors,
    default_length,
    first_tensor,
    longest,
    readings,
    token_table,
)
from pennylane_qattn.planning import Execution
from pennylane_qattn.transforms import ordinary_mode

#: Largest relative change, by the precision that is computed in, when shapes differ and so the order of sums.
ROUNDING = {8: 1e-9, 4: 1e-4, 2: 5e-2, 1: 0.5}
#: Attributes that every module has: hooks are ours to set, and parameters and submodules are left alone.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
_CONTAINERS = (list, dict, set, collections.deque)


class Undecidable(Exception):
    """Nothing can be said; the message tells why."""


class OutOfTime(Exception):
    """The time limit has passed."""


class Subject:
    """A copy of a module, and what it is called with.

    Every call starts from the same random state, and with buffers and attributes as they were at first. Hooks that are
    set on the copy last for one call.

    Args:
        module: the copy.
        name: what it is called.
        seed: of the random state.
        dtype: its precision.

    Attributes:
        reading: what it reads.
        length: tokens of a sequence.
        features: entries of an output.
        parts: how these are shared out among the tensors of the latest output, the first being what it is for.
        remarks: what of its outputs cannot be looked at.
        form: how it is looked at, in words.
        deadline: when calls are refused, by `time.monotonic`.
        seconds_per_token: of the latest among its largest calls.
        default_dtype: of tensors that its calls make without a dtype.
    """

    def __init__(self, module: nn.Module, name: str, seed: int, dtype: torch.dtype, form: str):
        self.module, self.name, self.seed, self.dtype, self.form = module.requires_grad_(False), name, seed, dtype, form
        self.reading, self.length, self.features = Reading("tokens", None), 0, 0
        self.parts: list[int] = []
        self.remarks: list[str] = []
        self.deadline = math.inf
        self.seconds_per_token, self._most_tokens = 0.0, 0
        self._places: dict[tuple[str, int], list[int]] = {}
        self.default_dtype = torch.get_default_dtype()
        self._mode, self._states = "", {}
        self._hooks = _Hooks(self.module)

    def call(self, x: Tensor, mode: str, *, grad: bool = False, seed: int | None = None) -> Tensor:
        """Its logits or embeddings, and behind them all else that it returns for every token; complex ones as pairs."""
        returned = self.call_whole(x, mode, grad=grad, seed=seed)
        tensors = [self.tensor_of(returned, x), *self._others(returned, x, mode)]
        self.parts = [tensor.shape[2] for tensor in tensors]
        return torch.cat(tensors, -1) if len(tensors) > 1 else tensors[0]

    def _others(self, returned: Any, x: Tensor, mode: str) -> list[Tensor]:
        """Tensors `(batch, seq, features)` beside the first: those whose shape follows batch and length of the call."""

        def beside(returned: Any) -> list[Tensor]:
            first = first_tensor(returned)
            return [tensor for tensor in all_tensors(returned) if tensor is not first]

        found = beside(returned)
        likely = [index for index, tensor in enumerate(found) if tensor.ndim > 1 and tensor.shape[:2] == x.shape[:2]]
        if not likely:
            return []
        if (mode, len(found)) not in self._places:
            other = torch.cat((x, x[:1]))[:, :-1]
            try:
                again = beside(self.call_whole(other, mode))
            except OutOfTime:
                raise
            except Exception as error:  # a module raises what it likes
                again, why = [], f"it takes no other shape ({type(error).__name__}: {one_line(error)})"
                self.remarks.append(f"only the first tensor of its output in {mode} mode, as {why}")
            pairs = zip(found, again, strict=False)
            follows = [a.shape[:2] == x.shape[:2] and b.shape[:2] == other.shape[:2] for a, b in pairs]
            self._places[mode, len(found)] = [index for index, is_one in enumerate(follows) if is_one]
        dtype = self.dtype
        wide = [found[index] for index in self._places[mode, len(found)] if index in likely]
        wide = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in wide]
        return [(tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]).to(dtype) for tensor in wide]

    @staticmethod
    def tensor_of(returned: Any, x: Tensor) -> Tensor:
        """The logits or embeddings `(batch, seq, features)` in what a call on `x` returned.

        Raises:
            ValueError: if there are none.
        """
        output = first_tensor(returned)
        if output is None or output.shape[:2] != x.shape[:2]:
            got = "no tensor" if output is None else f"{tuple(output.shape)}"
            raise ValueError(f"outputs must be (batch, seq, ...), here {tuple(x.shape[:2])} and more; got {got}")
        if output.is_complex():
            output = torch.view_as_real(output)
        if not output.is_floating_point():
            raise ValueError(f"outputs must be embeddings or logits; got {output.dtype}")
        return output.flatten(2) if output.ndim > 2 else output[..., None]

    def call_whole(self, x: Tensor, mode: str, *, grad: bool = False, seed: int | None = None, **options: Any) -> Any:
        """All that it returns; `seed` is another than its own."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if mode != self._mode:
            self.module.train(mode == "train")
            self._mode = mode
        self._start(mode, self.seed if seed is None else seed)
        before, begun = torch.get_default_dtype(), time.monotonic()
        torch.set_default_dtype(self.default_dtype)
        try:
            with torch.set_grad_enabled(grad):
                return self.module(x.clone(), **options)  # a module may change it in place
        finally:
            torch.set_default_dtype(before)
            self._hooks.put_back()
            if not grad and (tokens := x.shape[0] * x.shape[1]) >= self._most_tokens:
                self._most_tokens, self.seconds_per_token = tokens, (time.monotonic() - begun) / tokens

    @contextlib.contextmanager
    def in_its_dtype(self) -> Iterator[None]:
        """Within it, tensors made without a dtype have that of the copy."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def drawn(self, x: Tensor, mode: str) -> list[bytes]:
        """The random state, of torch, that a call ends in."""
        self.call_whole(x, mode)
        return self._torch_state()

    def draws(self, x: Tensor, mode: str) -> bool:
        """Whether a call draws random numbers of torch: also those that change nothing."""
        drawn = self.drawn(x, mode)
        self._start(mode, self.seed)
        return drawn != self._torch_state()

    def precision(self, x: Tensor, mode: str) -> int:
        """Bytes of the narrowest floating numbers that a call computes."""
        with _Widths() as widths:
            self.call_whole(x, mode)
        return min(widths.seen, default=self.dtype.itemsize)

    def _start(self, mode: str, seed: int) -> None:
        """Puts everything back to where it was at first."""
        if mode not in self._states:
            self._states[mode] = _State(self.module)
        self._states[mode].put_back()
        _seed(seed)

    def _torch_state(self) -> list[bytes]:
        generators = (torch.default_generator, *self._states[self._mode].generators)
        return [generator.get_state().numpy().tobytes() for generator in generators]


# --- making one -------------------------------------------------------------------------------------------------


def make_subject(
    module: nn.Module | Callable[[], nn.Module],
    name: str,
    seed: int,
    wanted: Reading | None,
    length: int | None,
    inputs: Tensor | None,
) -> Subject:
    """A copy of a module that can be called, in float64 if it runs so.

    Args:
        module: it, or a function that builds it.
        name: what it is called.
        seed: of what a function draws, and of all calls.
        wanted: what it reads, if that is known.
        length: tokens of a sequence, if that is known.
        inputs: an example, if there is one.

    Raises:
        ValueError: if it cannot be copied or called.
        Undecidable: if its circuits would be sampled.
    """
    source = _Source(module, name, seed)
    told = longest(source.wide.module)
    if length is None:
        length = default_length(source.wide.module) if inputs is None else inputs.shape[1]
    elif told is not None and length > told:
        raise ValueError(f"{name} takes {told} tokens at most; got length {length}")
    failure = "it has neither embeddings nor widths"
    choices = readings(source.wide.module) if wanted is None or wanted.size is None else [wanted]
    for choice in choices if wanted is None else [choice for choice in choices if choice.kind == wanted.kind]:
        failures = []
        for subject, form in source.subjects():
            try:
                found = _try(subject, choice, length, inputs)
            except Exception as error:  # a module raises what it likes
                failures.append(f"{type(error).__name__}: {one_line(error)}")
                continue
            subject.reading = choice if choice.size is not None else Reading("tokens", found)
            subject.length = length
            subject.form += form.format(*failures[:1])
            return subject
        failure = failures[0]
    if wanted is not None and wanted.size is not None:
        raise ValueError(f"{name} cannot be called with {wanted}, {length} at a time: {failure}")
    raise ValueError(f"cannot tell what {name} reads; give vocab_size or embed_dim, and length ({failure})")


class _Source:
    """Where copies come from."""

    def __init__(self, module: nn.Module | Callable[[], nn.Module], name: str, seed: int):
        self.module, self.name, self.seed = module, name, seed
        self.wide = self._make(torch.float64)

    def subjects(self) -> Iterator[tuple[Subject, str]]:
        """Copies in float64, and then as it is; with what there is to say about why."""
        self.wide.default_dtype = torch.get_default_dtype()
        yield self.wide, ""
        # some modules make tensors without saying of which dtype
        self.wide.default_dtype = torch.float64
        yield self.wide, ", float64 as default dtype"
        yield self._as_it_is, ", as it does not run in float64 ({0})"

    @cached_property
    def _as_it_is(self) -> Subject:
        return self._make(None)

    def _make(self, dtype: torch.dtype | None) -> Subject:
        fresh, note = self._copy()
        circuits = _fold(fresh)
        if dtype is None:
            floating = (p.dtype for p in fresh.parameters() if p.is_floating_point())
            dtype = next(floating, torch.get_default_dtype())
        else:
            fresh = fresh._apply(_widened)
        form = f"{str(dtype).removeprefix('torch.')} copy{note}{circuits}"
        return Subject(fresh, self.name, self.seed, dtype, form)

    def _copy(self) -> tuple[nn.Module, str]:
        """A copy on the CPU, and what there is to say of it."""
        if not isinstance(self.module, nn.Module):
            return self._built(), ""
        module, note = self.module, ""
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module, note = inner, ", not compiled"
        memo: dict[int, Any] = {}
        try:
            for tensor in (*module.parameters(), *module.buffers()):  # never two copies on an accelerator
                if tensor.device.type != "cpu" and type(tensor) in (nn.Parameter, Tensor):
                    moved = tensor.detach().cpu()
                    memo[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
            return copy.deepcopy(module, memo).cpu(), note
        except Exception as error:  # a module's own attributes raise what they like
            why = f"{type(error).__name__}: {one_line(error)}"
            remedy = "hand in a function that builds one, or a fresh one"
            raise ValueError(f"{self.name} cannot be copied ({why}); {remedy}") from error

    def _built(self) -> nn.Module:
        """What the function builds."""
        _seed(self.seed)
        try:
            module = self.module()
        except Exception as error:  # a function raises what it likes
            why = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{self.name}() builds no module: {why}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"a function must build a torch module; got {type(module).__name__}")
        try:
            return copy.deepcopy(module).cpu()
        except Exception as error:  # a module's own attributes raise what they like
            if self.module() is module:
                raise ValueError(f"{self.name}() gives the same module twice; build a new one each time") from error
            return module.cpu()


def _widened(tensor: Tensor) -> Tensor:
    """In double precision, integers as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _fold(module: nn.Module) -> str:
    """Folds the circuits inside, and says what was done."""
    plans = [executor.plan for executor in executors(module)]
    devices = list(dict.fromkeys(plan.device for plan in plans if plan.executor != "folded"))
    if not devices:
        return ", circuits folded" if plans else ""
    where = " and ".join(map(str, devices))
    try:
        set_execution(module, Execution(executor="folded"))
    except ValueError as error:
        if all(plan.is_local_and_exact for plan in plans):
            return f", circuits run on {where}, as they cannot be folded ({one_line(error)})"
        raise Undecidable(f"its circuits are sampled on {where} and cannot be folded: {one_line(error)}") from error
    return f", circuits folded instead of run on {where}"


def _try(subject: Subject, reading: Reading, length: int, inputs: Tensor | None) -> int | None:
    """Calls it once; gives the size of the vocabulary if that was not known."""
    if inputs is not None:
        x = inputs if reading.kind == "tokens" else inputs.to(subject.dtype)
    elif reading.kind == "tokens":
        x = torch.zeros(2, length, dtype=torch.int64)
    else:
        x = torch.ones(2, length, reading.size, dtype=subject.dtype)
    with token_embeddings(subject.module, x) as found:
        subject.features = subject.call(x, "eval").shape[2]
    if reading.size is None and not found:
        raise ValueError("none of its embeddings reads the tokens")
    return None if reading.size is not None else found[0].num_embeddings


@contextlib.contextmanager
def token_embeddings(
    module: nn.Module, tokens: Tensor, replace: Callable[[Tensor], Tensor | None] | None = None
) -> Iterator[list[nn.Module]]:
    """The embeddings that read these very tokens while this lasts; `replace` may put something in an output's place."""
    found: list[nn.Module] = []

    def look(part: nn.Module, args: tuple, output: Any) -> Any:
        given = args[0] if args else None
        if isinstance(given, Tensor) and given.shape == tokens.shape and torch.equal(given, tokens):
            found.append(part)
            return None if replace is None else replace(output)
        return None

    parts = [] if tokens.is_floating_point() else [p for p in module.modules() if isinstance(p, nn.Embedding)]
    table = token_table(module)
    if parts and table is not None and table not in parts:
        parts.append(table)
    hooks = [part.register_forward_hook(look) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def one_line(error: object) -> str:
    """A message in one line of moderate length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


# --- states -----------------------------------------------------------------------------------------------------


class _State:
    """Attributes and buffers of a module and all its parts, apart from parameters."""

    def __init__(self, module: nn.Module):
        self._parts = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
        tensors, self._containers, self._held = {}, [], []
        self.generators: list[torch.Generator] = []
        for _, attributes, buffers in self._parts:
            own = {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}
            for value in (*buffers.values(), *own.values()):
                if isinstance(value, Tensor):
                    tensors[id(value)] = value
                elif isinstance(value, _CONTAINERS):
                    self._containers.append((value, copy.copy(value)))
                elif isinstance(value, torch.Generator):
                    self.generators.append(value)
                    self._held.append(value.get_state())
        self._tensors = [(value, value._version, value.detach().clone()) for value in tensors.values()]

    def put_back(self) -> None:
        for part, attributes, buffers in self._parts:
            if len(part.__dict__) != len(attributes):
                part.__dict__.clear()
            part.__dict__.update(attributes)
            if len(part._buffers) != len(buffers):
                part._buffers.clear()
            part._buffers.update(buffers)
        for value, held in self._containers:
            _refill(value, held)
        for generator, state in zip(self.generators, self._held, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for index, (value, version, held) in enumerate(self._tensors):
                if value._version != version or not torch.equal(value, held):
                    value.detach().copy_(held)
                    self._tensors[index] = value, value._version, held


class _Hooks:
    """The hooks of a module: some modules set more of them when called, and keep in an attribute that they did."""

    def __init__(self, module: nn.Module):
        found = (value for part in module.modules() for name, value in part.__dict__.items() if "hooks" in name)
        self._held = [(value, dict(value)) for value in found if isinstance(value, dict)]

    def put_back(self) -> None:
        for value, held in self._held:
            if value.keys() != held.keys():
                _refill(value, held)


def _refill(value: Any, held: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, list | collections.deque) else value.update)(held)


def _seed(seed: int) -> None:
    # torch.manual_seed would also seed an accelerator, at once or when it is first used
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leaves random states, grad and inference modes, autocast and default device outside as they were."""
    of_torch, of_python, of_numpy = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    dtype = torch.get_default_dtype()
    is_elsewhere = torch.get_default_device().type != "cpu"
    try:
        with ordinary_mode(), torch.device("cpu") if is_elsewhere else contextlib.nullcontext():
            yield
    finally:
        torch.default_generator.set_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_default_dtype(dtype)
        if of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)


class _Widths(TorchDispatchMode):
    """Notes the sizes of all floating numbers that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.seen.add(leaf.dtype.itemsize // (2 if leaf.is_complex() else 1))
        return output
