"""Modes of torch: whether somebody else plans the computation, and how to make what outlives a mode."""

import contextlib
from collections.abc import Iterator

import torch


def is_transformed() -> bool:
    """Whether this call is being compiled or transformed by `torch.func`.

    Then formulas are given as they stand: shortcuts that manage memory by themselves would be in the way.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def ordinary_mode() -> Iterator[None]:
    """Outside inference mode and autocast, with gradients: for what is made once and used in any mode later."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
