"""Modes of torch: whether somebody else plans the computation, and how to make what outlives a mode."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether this call is being compiled or transformed by `torch.func`.

    Then formulas are given as they stand: shortcuts that manage memory by themselves would be in the way.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors at once, as gradients do with `is_grads_batched` or `vectorize=True`.

    Operations of torch treat it as one of them; what reads its memory, or writes into another tensor's, cannot.
    """
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers as they are: not batched, and no view that stands for their negatives.

    Such a view is the imaginary part of a conjugate, `z.conj().imag`; operations of torch change the sign as they read.
    """
    return not is_batched(tensor) and not tensor.is_neg()


@contextlib.contextmanager
def ordinary_mode() -> Iterator[None]:
    """Outside inference mode and autocast, with gradients: for what is made once and used in any mode later."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
