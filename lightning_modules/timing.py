"""What models cost, side by side: time as ratios to a baseline in the same round, and what a training step keeps.

The contestants take turns, and a ratio compares times of one round only, so that a machine whose speed drifts slows
all alike.
"""

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def interleaved_ratios(
    functions: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int | Iterable[object],
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """The time of each function over the baseline's, once per round.

    Each is called once before anything is timed.

    Args:
        functions: what is timed, by name, in the order of their turns.
        baseline: the name of the one that the others are compared with.
        rounds: how many, or what to go through once per round, as in `rich.progress.track(range(21))`.
        synchronize: called after each function and timed with it, as `torch.cuda.synchronize` where functions return
            before their work is done.

    Raises:
        ValueError: if the baseline is none of the functions, or there is not one round.
    """
    if baseline not in functions:
        raise ValueError(f"the baseline must be one of {', '.join(functions)}; got {baseline!r}")
    seconds = interleaved_seconds(functions, rounds, synchronize)
    return {name: quotients(values, seconds[baseline]) for name, values in seconds.items()}


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    rounds: int | Iterable[object],
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """The time of each function in every round, in seconds; the arguments are those of `interleaved_ratios`.

    Raises:
        ValueError: if there is not one round.
    """
    if isinstance(rounds, int) and rounds < 1:
        raise ValueError(f"rounds must be positive; got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        seconds_of(function, synchronize)
    for _ in range(rounds) if isinstance(rounds, int) else rounds:
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, synchronize))
    return seconds


def quotients(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Value over reference of the same round."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def seconds_of(function: Callable[[], object], synchronize: Callable[[], object] | None = None) -> float:
    """The time that one call takes; `synchronize` as for `interleaved_ratios`."""
    begun = time.perf_counter()
    function()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - begun


def two_decimals(value: float) -> str:
    """`2.61`."""
    return f"{value:.2f}"


def describe_spread(values: Sequence[float], form: Callable[[float], str] = two_decimals) -> str:
    """Median, lowest and highest, each written by `form`: `2.61 (2.55 to 2.70)`."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


# --- what is timed ----------------------------------------------------------------------------------------------


def inference(model: nn.Module, tokens: Tensor) -> None:
    """One forward pass without gradients, over `tokens` (B, T + 1) but the last of each row."""
    model.eval()
    with torch.no_grad():
        model(tokens[:, :-1])


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Forward, backward and update: each of `tokens` (B, T + 1) is predicted from those before it in its row."""
    loss = _training_loss(model, tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def forward(layer: nn.Module, inputs: Tensor) -> None:
    """One forward pass of a layer without gradients."""
    with torch.no_grad():
        layer(inputs)


def forward_and_backward(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The gradient of a layer's summed squares by its inputs; by its parameters it is added to theirs."""
    inputs = inputs.clone().requires_grad_()
    layer(inputs).square().sum().backward()
    return inputs.grad


def _training_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    model.train()
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# --- memory -----------------------------------------------------------------------------------------------------


def activation_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that one training step keeps for its backward pass, from model and loss.

    Tensors that share storage count once, with all of that storage, which is what stays in memory. Parameters, buffers
    and the tokens are there anyway and do not count. The number follows from shapes alone: it is the same on every
    call. What an autograd function hides from torch (by keeping it without `save_for_backward`) is not seen.

    Args:
        model: tokens (B, T) to logits (B, T, V); its mode and the state of the random numbers are left as they are.
        tokens: (B, T + 1), as for `training_step`.
    """
    there = {_storage(tensor) for tensor in (tokens, *model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # what is not needed after all goes before it is counted

    def pack(tensor: Tensor) -> _Kept:
        packed = _Kept(tensor.detach())  # an output that knew its node, which knows what was packed, would be a cycle
        kept.add(packed)
        return packed

    devices = {tensor.device for tensor in model.parameters()} | {tokens.device}
    forked = torch.random.fork_rng([device for device in devices if device.type == "cuda"])
    with forked, _mode_restored(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = _training_loss(model, tokens)
        storages = {_storage(packed.tensor): packed.tensor.untyped_storage().nbytes() for packed in kept}
        del loss  # only now, since it holds the graph
    return sum(size for storage, size in storages.items() if storage not in there)


class _Kept:
    """A saved tensor that can be weakly referred to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _mode_restored(model: nn.Module):
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
