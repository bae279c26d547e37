r"""That models which are timed side by side compute the same kind of result.

A language model maps tokens to finite logits, each from the tokens up to its own, and all that can be trained in it
gets a gradient. Where the formula of a score is known, an attention gives what the formula written out gives,

.. math::

    \mathrm{out}_i = W \sum_{j \le i} \frac{\exp a_{ij}}{\sum_{k \le i} \exp a_{ik}} v_j + b ,

and elsewhere what its weights give, written out. It is the whole batch that is looked at, as it is timed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.benchmarks.references import REFERENCES, kernels_left_out
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
from pennylane_qattn.attention import Visibility, attention_weights
from pennylane_qattn.neighbours import join_neighbours
from pennylane_qattn.published import PublishedAttention

#: Rows of the batch that are looked at; tokens at both ends of a block; and tokens that feature maps are handed.
ROWS, TOKENS, MAPPED = 2, 32, 3
#: How far an output may be from its formula, and logits may move where they should not, relative to the largest one.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
#: What is smaller than that, relative to the largest gradient, may be rounding alone, as the gradient of a keys' bias.
LEAST_GRADIENT = 1e-3
#: What the gradient by the input is called, beside those of parameters.
INPUT = "input"


def check_model(name: str, model: GPT, baseline: GPT, tokens: Tensor, leaks: bool = False) -> None:
    """Compares a model with the baseline: the same kind of logits, gradients for all, and no look at the future.

    In the whole batch the first rows have the logits and the gradients that they have by themselves, without kernels.

    Args:
        name: what it is called in messages.
        model: what is timed; it is left in evaluation mode, without gradients.
        baseline: what it is compared with.
        tokens: `(batch, seq + 1)`, two tokens or more; all of what is timed.
        leaks: it is known to see the future, so that is no fault.

    Raises:
        CheckFailed: at the first fault, in one line that names it.
    """
    inputs = tokens[:ROWS, :-1]
    logits, expected = _outputs(name, model, inputs), _outputs("the baseline", baseline, inputs)
    if (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
        raise CheckFailed(
            f"{name} gives logits {tuple(logits.shape)} of {logits.dtype}, and the baseline "
            f"{tuple(expected.shape)} of {expected.dtype}"
        )
    if not logits.isfinite().all():
        raise CheckFailed(f"{name} gives logits that are not finite")
    if not leaks:
        _check_time(name, model, inputs, logits)
    _check_whole_batch(name, Evidence.of_model, model, tokens)
    for attention in (block.attention for block in model.blocks):
        check_formula(name, attention)
    check_maps(name, model.blocks[0].attention)  # circuits on a simulator take their time, and blocks are of one kind


def check_layer(name: str, layer: Attention, x: Tensor, leaks: bool = False) -> None:
    """The same for an attention by itself: `check_model` says what is looked at.

    Args:
        name: what it is called in messages.
        layer: what is timed; it is left in evaluation mode, without gradients.
        x: `(batch, seq, embed)`, two tokens or more; all of what is timed.
        leaks: it is known to see the future, so that is no fault.

    Raises:
        CheckFailed: at the first fault, in one line that names it.
    """
    output = _outputs(name, layer, x)
    if output.shape != x.shape:
        raise CheckFailed(f"{name}: {tuple(x.shape)} became {tuple(output.shape)}")
    if not output.isfinite().all():
        raise CheckFailed(f"{name}: the output is not finite")
    if not leaks:
        _check_time(name, layer, x, output)
    _check_whole_batch(name, Evidence.of_layer, layer, x)
    check_formula(name, layer)
    check_maps(name, layer)


def check_compiled(name: str, compiled: GPT, eager: GPT, tokens: Tensor) -> None:
    """A compiled model has the logits and gradients of the model as it is, on the batch that is timed.

    Both in evaluation mode, since compiled dropout draws other numbers.

    Raises:
        CheckFailed: if not.
    """
    expected = Evidence.of_model(eager, tokens)
    Evidence.of_model(compiled, tokens).check_same(f"{name}, compiled", expected, "the model that is not compiled")


def _outputs(name: str, module: nn.Module, inputs: Tensor) -> Tensor:
    module.eval()
    try:
        with torch.no_grad():
            return module(inputs)
    except (RuntimeError, TypeError) as error:  # as where a sum over shapes that do not fit fails
        what = "embeddings" if inputs.is_floating_point() else "tokens"
        raise CheckFailed(f"{name} does not run on the {what}: {type(error).__name__}: {error}") from error


def _check_time(name: str, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """A later token changes nothing before it, and the first ones change what comes of the last."""
    what = "outputs" if inputs.is_floating_point() else "logits"
    half = inputs.shape[1] // 2
    moved = (_outputs(name, module, _changed(module, inputs, slice(half, None))) - outputs)[:, :half].abs().max()
    if moved > _tolerance(outputs) * outputs.abs().max():
        raise CheckFailed(f"{name} sees the future: {what} move by {moved:.2g} where only later tokens change")
    # a token may keep few keys; but not one of all that come before it would be none at all
    past, which = (slice(0, -1), "those before it") if inputs.is_floating_point() else (slice(0, 1), "the first token")
    if torch.equal(_outputs(name, module, _changed(module, inputs, past))[:, -1], outputs[:, -1]):
        raise CheckFailed(f"{name} does not attend: the last token's {what} do not depend on {which}")


def _changed(module: nn.Module, inputs: Tensor, tokens: slice) -> Tensor:
    """Inputs with some of their tokens replaced."""
    changed = inputs.clone()
    if inputs.is_floating_point():
        changed[:, tokens] = 1 - changed[:, tokens].flip(-1)
    else:
        changed[:, tokens] = (changed[:, tokens] + 1) % module.config.vocab_size
    return changed


@dataclass(frozen=True)
class Evidence:
    """What a pass over a batch gives for its first rows.

    Attributes:
        outputs: by what they are called: with and without a graph for gradients.
        gradients: of a loss of these outputs, by the parameter's name, and by that of the inputs where they have one;
            `None` where there is none.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @classmethod
    def of_model(cls, model: GPT, tokens: Tensor) -> Self:
        """Logits, and gradients of the cross-entropy."""
        targets = tokens[:ROWS, 1:].flatten()
        return cls._of(model, tokens[:, :-1], lambda logits: F.cross_entropy(logits.flatten(0, 1).float(), targets))

    @classmethod
    def of_layer(cls, layer: nn.Module, x: Tensor) -> Self:
        """Outputs, and gradients of the sum of their squares."""
        return cls._of(layer, x.clone().requires_grad_(), lambda outputs: outputs.square().sum())

    @classmethod
    def _of(cls, module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Self:
        module.eval()
        module.zero_grad(set_to_none=True)
        what = "outputs" if inputs.is_floating_point() else "logits"
        with torch.no_grad():
            found = {what: module(inputs)[:ROWS].clone()}
        outputs = module(inputs)[:ROWS]
        found[f"{what} on the way to gradients"] = outputs.detach().clone()
        if outputs.requires_grad:
            loss(outputs).backward()
        gradients: dict[str, Tensor | None] = {}
        for name, tensor in module.named_parameters():
            if tensor.requires_grad:  # a copy, as what is compiled may write into the same memory the next time
                gradients[name] = None if tensor.grad is None else tensor.grad.clone()
        if inputs.requires_grad:  # the other rows are no part of the loss
            gradients[INPUT] = None if inputs.grad is None else inputs.grad[:ROWS]
        module.zero_grad(set_to_none=True)
        return cls(found, gradients)

    def check_gradients(self, name: str) -> None:
        """Whatever is trained has a gradient, and so have the inputs; all of it is finite."""
        for parameter, gradient in self.gradients.items():
            if gradient is None or not gradient.any():
                of = f"{name}: the parameter {parameter}" if parameter != INPUT else f"{name}: the {INPUT}"
                raise CheckFailed(f"{of} gets no gradient")
            if not gradient.isfinite().all():
                raise CheckFailed(f"{name}: the gradient of {parameter} is not finite")

    def check_same(self, name: str, expected: "Evidence", of: str) -> None:
        """These are the expected outputs and gradients, which are those of `of`."""
        tolerance = max(map(_tolerance, expected.outputs.values()))
        for what, output in expected.outputs.items():
            if (error := _distance(self.outputs[what], output)) > tolerance * output.abs().max():
                raise CheckFailed(f"{name}: the {what} differ by {error:.2g} from those of {of}")
        largest = max(gradient.abs().max() for gradient in expected.gradients.values() if gradient is not None)
        for parameter, gradient in expected.gradients.items():
            found = self.gradients[parameter]
            if found is None or gradient is None:
                raise CheckFailed(f"{name}: {parameter} has a gradient here or in {of}, and not in both")
            error = _distance(found, gradient)
            if error > tolerance * max(gradient.abs().max(), LEAST_GRADIENT * largest):
                raise CheckFailed(f"{name}: the gradient of {parameter} differs by {error:.2g} from that of {of}")


def _check_whole_batch(name: str, evidence_of: Callable, module: nn.Module, inputs: Tensor) -> None:
    """All that is trained has a gradient, and the first rows depend neither on the others nor on kernels."""
    found = evidence_of(module, inputs)
    found.check_gradients(name)
    with kernels_left_out():
        expected = evidence_of(module, inputs[:ROWS])
    found.check_same(f"{name}, in the whole batch", expected, "its first rows without kernels")


def _distance(found: Tensor, expected: Tensor) -> Tensor | float:
    return (found - expected).abs().max().nan_to_num(torch.inf)  # what is not finite is as far as can be


def _tolerance(tensor: Tensor) -> float:
    return TOLERANCES.get(tensor.dtype, TOLERANCES[torch.float32])


# --- formulas ---------------------------------------------------------------------------------------------------


def _squared_distances(q: Tensor, k: Tensor) -> Tensor:
    norms = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    return norms - 2 * q @ k.transpose(-2, -1)


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
    """Compares an attention with its formula written out in float64, for the first tokens of a block and the last.

    Where no formula of the score is known, the weights are those that `attention_weights` writes out.

    Raises:
        CheckFailed: if they differ.
    """
    device = attention.out_proj.weight.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, attention.block_size, attention.embed_dim, generator=generator).to(device)
    if isinstance(attention, PublishedAttention):
        x = x[:, :TOKENS]  # what a token receives depends on all rows of weights
    is_known = type(attention.score) in FORMULAS
    of = f"softmax({type(attention.score).__name__})" if is_known else "its weights and values"
    with torch.no_grad():
        found = attention(x)
        for length in sorted({min(TOKENS, x.shape[1]), x.shape[1]}):
            expected = _last_outputs(attention, x[:, :length])
            error = _distance(found[:, length - expected.shape[1] : length], expected)
            if error > _tolerance(found) * expected.abs().max():
                raise CheckFailed(f"{name} differs by {error:.2g} from {of} written out")


def _last_outputs(attention: Attention, x: Tensor) -> Tensor:
    """The outputs of the last tokens, `TOKENS` or fewer, in float64."""
    length, score = x.shape[1], attention.score
    queries = min(TOKENS, length)
    formula = FORMULAS.get(type(score))
    exact = copy.deepcopy(attention).double()
    with kernels_left_out():
        if formula is None:  # in the precision of the scores, which decides what keys are kept
            q, k = score.queries(attention.query_map(x))[:, :, -queries:], score.keys(attention.key_map(x))
            weights = attention_weights(score, q, k, Visibility(queries, length, is_causal=True))
        with torch.autocast(x.device.type, enabled=False):
            x = x.double()
            v = exact.value_map(x if attention.span == 1 else join_neighbours(x, attention.span)[0])
            if formula is not None:
                future = torch.ones(queries, length, dtype=torch.bool, device=x.device).triu(length - queries + 1)
                scores = formula(exact.score, exact.query_map(x)[:, :, -queries:], exact.key_map(x))
                weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            if isinstance(attention, PublishedAttention):
                weights = weights.transpose(-2, -1)
            return exact.out_proj((weights.double() @ v).transpose(1, 2).flatten(2))


def check_maps(name: str, attention: Attention) -> None:
    """Compares feature maps of an attention with what is known of their classes (`references.py`).

    Raises:
        CheckFailed: if they differ.
    """
    maps = {"queries": attention.query_map, "keys": attention.key_map, "values": attention.value_map}
    for what, feature_map in maps.items():
        reference = REFERENCES.get(type(feature_map))
        if reference is None:
            continue
        x = torch.randn(ROWS, MAPPED, feature_map.embed_dim, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            found = feature_map(x.to(attention.out_proj.weight.device)).cpu()
        with kernels_left_out():
            expected = reference(feature_map, x.double())
        if (error := _distance(found, expected)) > _tolerance(found) * expected.abs().max():
            raise CheckFailed(f"{name}: the {what} differ by {error:.2g} from {type(feature_map).__name__} written out")


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
