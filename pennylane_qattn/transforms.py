"""Modes of torch: whether somebody else plans the computation, and how to make what outlives a mode."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_NOTHING = contextlib.nullcontext()
_OF_TORCH = (Tensor, nn.Parameter)


def is_transformed() -> bool:
    """Whether this call is compiled, recorded, transformed by `torch.func`, differentiated in forward mode, or without
    numbers.

    Then formulas are given as they stand: shortcuts that manage memory by themselves would be in the way.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 or is_without_numbers() or _is_recorded()


def _is_recorded() -> bool:
    """Whether operations are written down to be run again, as `make_fx` does: only what torch computes is seen."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_without_numbers() -> bool:
    """Whether tensors have shapes alone, as in `FakeTensorMode`, which asks what a model would take."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Operations keep the precision of what they are given; costs nothing where they do so anyhow."""
    if is_transformed() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors at once, as gradients do with `is_grads_batched` or `vectorize=True`.

    Operations of torch treat it as one of them; what reads its memory, or writes into another tensor's, cannot.
    """
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers as they are: not batched, no view of their negatives, and no subclass.

    Such a view is the imaginary part of a conjugate, `z.conj().imag`; operations of torch change the sign as they read.
    A subclass of a tensor may have no memory at all.
    """
    return type(tensor) in _OF_TORCH and not is_batched(tensor) and not tensor.is_neg()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether `torch.func` has wrapped it: its memory is found by `values_of` alone."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def values_of(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor; where `torch.func.vmap` maps over it, those of all calls, which stand in front."""
    mapped = []
    while is_wrapped(tensor):
        dim = torch._C._functorch.maybe_get_bdim(tensor)
        mapped += [dim] if dim >= 0 else []
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        values = tensor.detach().cpu().numpy()
    for depth, dim in enumerate(reversed(mapped)):
        values = np.moveaxis(values, dim + depth, depth)
    return values


@contextlib.contextmanager
def ordinary_mode() -> Iterator[None]:
    """Outside inference mode and autocast, with gradients: for what is made once and used in any mode later."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
