"""Does a model see the future? Change one token, and see whether anything before it moves."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def largest_leak(forward: Callable[[Tensor], Tensor], inputs: Tensor, others: Tensor) -> float:
    """The largest change of an output at a position before the one token that was changed; 0 if causal.

    Every token is changed by itself. All variants are computed as one batch beside as many unchanged copies, in calls
    of one shape, so that a causal model gives 0 exactly, not up to rounding.

    Args:
        forward: a model in evaluation mode, `(batch, seq, ...) -> (batch, seq, ...)`.
        inputs: one sequence, `(seq, ...)`.
        others: what to put in each token's place, of the same shape and different everywhere.

    Raises:
        ValueError: if the sequences differ in shape or share a token.
    """
    if inputs.shape != others.shape or len(inputs) < 2:
        raise ValueError(f"two sequences of one shape and two tokens or more are needed; got {tuple(inputs.shape)}")
    same = (inputs == others).flatten(1).all(1) if inputs.ndim > 1 else inputs == others
    if same.any():
        raise ValueError(f"the sequences must differ at every position; they agree at {int(same.nonzero()[0])}")
    length = len(inputs)
    unchanged = inputs.expand(length, *inputs.shape).clone()
    changed = unchanged.clone()
    each = torch.arange(length)
    changed[each, each] = others
    difference = (forward(changed) - forward(unchanged)).abs().flatten(2).amax(-1)
    return float(difference.tril(-1).max())
