r"""Joint registers: a token and those just before it, side by side as one vector, `(B, T, d) -> (B, T, d * span)`.

Amplitude encoding of the joint vector is one state of :math:`\lceil\log_2 (d \cdot \mathrm{span})\rceil` qubits,

.. math::

    |\psi_t\rangle \propto \sum_{s=0}^{\mathrm{span}-1} \sum_c x_{t-\mathrm{span}+1+s,\,c}\, |c\rangle |s\rangle,

so an observable of it holds products of features of *different* tokens, which one of a single token's state never does:
features of n-grams, n = span. Tokens before the first are 0. No source; ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennylane_qattn.precision import cast


@dataclass(frozen=True)
class Recent:
    """The latest tokens so far, which those to come are joined with; the latest stands last.

    Attributes:
        inputs: their embeddings, 0 where there is no token.
        times: their places in time, -1 where there is no token; `None`: their places in memory, and nobody is padding.
        in_order: tokens stand in time as in memory.
    """

    inputs: Float[Tensor, "batch held embed"]
    times: Int[Tensor, "batch held"] | None = None
    in_order: bool = True


def join_neighbours(
    x: Float[Tensor, "batch seq embed"],
    span: int,
    padding: Bool[Tensor, "batch seq"] | None = None,
    positions: Int[Tensor, "batch seq"] | None = None,
    recent: Recent | None = None,
    past: int = 0,
) -> tuple[Float[Tensor, "batch seq joint"], Recent]:
    """Each token joined with the `span - 1` tokens before it in time.

    Feature `c` of the token that stands `s`-th among them, the token itself last, is number `c * span + s`, so heads
    that read slices read whole features.

    Args:
        x: the tokens at hand.
        span: how many are joined.
        padding: `True` marks tokens that nobody is joined with.
        positions: places in time; by default the order in memory.
        recent: what came before, as an earlier call returned it.
        past: how many tokens came before; the first of `x` has this number in the order of memory.

    Raises:
        ValueError: for a token that lies before one of an earlier call.

    Returns:
        the joint vectors, and what later tokens are to be joined with.
    """
    batch, seq, embed = x.shape
    held = span - 1
    if recent is None:
        recent = Recent(x.new_zeros(batch, held, embed))
    inputs = torch.cat((cast(recent.inputs, x.dtype), x), dim=1)
    if recent.times is None and padding is None and positions is None:
        return _side_by_side(inputs, span), Recent(inputs.narrow(1, seq, held))
    in_order = recent.in_order and positions is None
    if positions is None:
        positions = torch.arange(past, past + seq, device=x.device).expand(batch, -1)
    before = recent.times
    if before is None:  # numbers below 0 are of no token, like -1
        before = torch.arange(past - held, past, device=x.device).clamp(min=-1).expand(batch, -1)
    times = torch.cat((before, positions if padding is None else positions.masked_fill(padding, -1)), dim=1)
    if in_order and padding is None:
        return _side_by_side(inputs, span), Recent(inputs.narrow(1, seq, held), times.narrow(1, seq, held))
    _check_order(before, times[:, held:])
    order = times.argsort(dim=1, stable=True)  # what is no token comes first
    times = times.gather(1, order)
    inputs = inputs.gather(1, order[..., None].expand(-1, -1, embed)).masked_fill(times[..., None] < 0, 0.0)
    joint = _side_by_side(F.pad(inputs, (0, 0, held, 0)), span)
    back = order.argsort(dim=1)[:, held:]
    joint = joint.gather(1, back[..., None].expand(-1, -1, joint.shape[-1]))
    return joint, Recent(inputs.narrow(1, seq, held), times.narrow(1, seq, held), in_order)


def _check_order(before: Tensor, times: Tensor) -> None:
    if before.shape[1] == 0 or times.shape[1] == 0:
        return
    latest = before.amax(1, keepdim=True)
    early = (times >= 0) & (times < latest)
    if early.any():
        row, token = early.nonzero()[0].tolist()
        raise ValueError(
            "tokens whose values are joined with their neighbours must come in the order of time; got position "
            f"{times[row, token]} after {latest[row, 0]}: give them in one call, or in order"
        )


def _side_by_side(inputs: Tensor, span: int) -> Tensor:
    seq = inputs.shape[1] - span + 1
    # narrow, here and above: slices tie a program that torch 2.6 exports to its batch
    return torch.stack([inputs.narrow(1, start, seq) for start in range(span)], dim=-1).flatten(-2)
