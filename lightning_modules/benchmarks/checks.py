r"""That models which are timed side by side compute the same kind of result.

A language model maps tokens to finite logits, each from the tokens up to its own, and all that can be trained in it
gets a gradient. Where the formula of a score is known, an attention gives what the formula written out gives,

.. math::

    \mathrm{out}_i = W \sum_{j \le i} \frac{\exp a_{ij}}{\sum_{k \le i} \exp a_{ik}} v_j + b .
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.benchmarks.result import CheckFailed
from lightning_modules.gpt import GPT
from pennylane_qattn import (
    Attention,
    GaussianScore,
    OverlapScore,
    PublishedGaussianScore,
    ScaledDotScore,
    Score,
    TemperedDotScore,
)
from pennylane_qattn.neighbours import join_neighbours

#: Rows of the batch, and tokens of a layer, that are looked at.
ROWS, TOKENS = 2, 32
#: How far an output may be from its formula, and logits may move where they should not, relative to the largest one.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def check_model(name: str, model: GPT, baseline: GPT, tokens: Tensor, leaks: bool = False) -> None:
    """Compares a model with the baseline: the same kind of logits, gradients for all, and no look at the future.

    Args:
        name: what it is called in messages.
        model: what is timed; it is left in evaluation mode, without gradients.
        baseline: what it is compared with.
        tokens: `(batch, seq + 1)`, two tokens or more; the first rows of what is timed.
        leaks: it is known to see the future, so that is no fault.

    Raises:
        CheckFailed: at the first fault, in one line that names it.
    """
    inputs, targets = tokens[:ROWS, :-1], tokens[:ROWS, 1:]
    logits, expected = _logits(name, model, inputs), _logits("the baseline", baseline, inputs)
    if (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
        raise CheckFailed(
            f"{name} gives logits {tuple(logits.shape)} of {logits.dtype}, and the baseline "
            f"{tuple(expected.shape)} of {expected.dtype}"
        )
    if not logits.isfinite().all():
        raise CheckFailed(f"{name} gives logits that are not finite")
    _check_time(name, model, inputs, logits, leaks)
    _check_gradients(name, model, inputs, targets)
    if not leaks:
        for attention in (block.attention for block in model.blocks):
            check_formula(name, attention)


def _logits(name: str, model: nn.Module, tokens: Tensor) -> Tensor:
    model.eval()
    try:
        with torch.no_grad():
            return model(tokens)
    except (RuntimeError, TypeError) as error:  # as where a sum over shapes that do not fit fails
        raise CheckFailed(f"{name} does not run on the tokens: {type(error).__name__}: {error}") from error


def _check_time(name: str, model: GPT, inputs: Tensor, logits: Tensor, leaks: bool) -> None:
    """A later token changes nothing before it, and the first one changes what comes of the last."""
    half = inputs.shape[1] // 2
    other_end, other_start = inputs.clone(), inputs.clone()
    other_end[:, half:] = (other_end[:, half:] + 1) % model.config.vocab_size
    other_start[:, 0] = (other_start[:, 0] + 1) % model.config.vocab_size
    moved = (_logits(name, model, other_end) - logits)[:, :half].abs().max()
    if not leaks and moved > _tolerance(logits) * logits.abs().max():
        raise CheckFailed(f"{name} sees the future: logits move by {moved:.2g} where only later tokens change")
    if torch.equal(_logits(name, model, other_start)[:, -1], logits[:, -1]) and not leaks:
        raise CheckFailed(f"{name} does not attend: the last token's logits do not depend on the first token")


def _check_gradients(name: str, model: GPT, inputs: Tensor, targets: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten()).backward()
    for parameter, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if tensor.grad is None or not tensor.grad.any():
            raise CheckFailed(f"{name}: the parameter {parameter} gets no gradient")
        if not tensor.grad.isfinite().all():
            raise CheckFailed(f"{name}: the gradient of {parameter} is not finite")
    model.zero_grad(set_to_none=True)


def _tolerance(tensor: Tensor) -> float:
    return TOLERANCES.get(tensor.dtype, TOLERANCES[torch.float32])


# --- formulas ---------------------------------------------------------------------------------------------------


def _squared_distances(q: Tensor, k: Tensor) -> Tensor:
    return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)


def _overlap(score: OverlapScore, q: Tensor, k: Tensor) -> Tensor:
    q, k = (
        torch.complex(*t.chunk(2, dim=-1)) if score.complex_states else t / t.norm(dim=-1, keepdim=True) for t in (q, k)
    )
    return score.strength.double()[:, None, None] * (q.conj() @ k.transpose(-2, -1)).abs().square()


#: What is normalised by the softmax, by the class of the score, from queries and keys `(B, H, T, f)` in float64.
FORMULAS: dict[type[Score], Callable[[Score, Tensor, Tensor], Tensor]] = {
    ScaledDotScore: lambda score, q, k: q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5,
    TemperedDotScore: lambda score, q, k: score.beta.double()[:, None, None] * (q @ k.transpose(-2, -1)),
    GaussianScore: lambda score, q, k: -score.beta.double()[:, None, None] * _squared_distances(q, k),
    PublishedGaussianScore: lambda score, q, k: torch.exp(-_squared_distances(q, k)),
    OverlapScore: _overlap,
}


def check_formula(name: str, attention: Attention) -> None:
    """Compares an attention with its formula written out in float64, if that of its score is known.

    Raises:
        CheckFailed: if they differ.
    """
    formula = FORMULAS.get(type(attention.score))
    if formula is None:
        return
    device = attention.out_proj.weight.device
    length = min(attention.block_size, TOKENS)
    x = torch.randn(ROWS, length, attention.embed_dim, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        found = attention(x)
        q, k = attention.query_map(x).double(), attention.key_map(x).double()
        joined = x if attention.span == 1 else join_neighbours(x, attention.span)[0]
        v = attention.value_map(joined).double()
        future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        weights = formula(attention.score, q, k).masked_fill(future, float("-inf")).softmax(-1)
        projection = attention.out_proj
        bias = None if projection.bias is None else projection.bias.double()
        heads = (weights @ v).transpose(1, 2).flatten(2)
        expected = nn.functional.linear(heads, projection.weight.double(), bias)
    if (error := (found - expected).abs().max()) > _tolerance(found) * expected.abs().max():
        raise CheckFailed(f"{name} differs by {error:.2g} from softmax({type(attention.score).__name__}) written out")


# --- the baseline -----------------------------------------------------------------------------------------------


def check_fused(model: GPT, tokens: Tensor) -> None:
    """The baseline runs on torch's fused attention, as fast as it is to be had.

    Raises:
        CheckFailed: if it does not.
    """
    with _Operations() as seen:
        model(tokens[:ROWS, :-1])
    # without a fused kernel torch runs matrix products and a softmax instead
    if not any("scaled_dot_product" in name for name in seen.names):
        raise CheckFailed(
            "classical attention did not run on torch's fused kernels, so nothing is to be measured by it"
        )


class _Operations(TorchDispatchMode):
    """Names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))
