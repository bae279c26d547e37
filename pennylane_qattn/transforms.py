"""Whether somebody else is planning the computation."""

import torch


def is_transformed() -> bool:
    """Whether this call is being compiled or transformed by `torch.func`.

    Then formulas are given as they stand: shortcuts that manage memory by themselves would be in the way.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
